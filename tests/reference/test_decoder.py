"""The reference of the attention decoder against torch.nn's cells and attention spelled out, sequence by sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrnn.reference import attention_decoder

T, N, I, H, TK, D, DV = 4, 3, 2, 5, 6, 7, 3

CELLS: dict[str, Any] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *args, **options: nn.RNNCell(*args, nonlinearity="relu", **options),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class ResetBefore(nn.Module):
    """The GRU of Cho et al. 2014 (arXiv 1406.1078): n = tanh(W_in x + b_in + W_hn (r * h) + b_hn)."""

    def __init__(self, inputs: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name, rows, columns in (("ih", 3 * hidden, inputs), ("hh", 3 * hidden, hidden)):
            self.register_parameter(f"weight_{name}", nn.Parameter(0.4 * torch.randn(rows, columns, dtype=dtype)))
            self.register_parameter(f"bias_{name}", nn.Parameter(0.4 * torch.randn(rows, dtype=dtype)))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        w_r, w_z, w_n = self.weight_ih.chunk(3)
        u_r, u_z, u_n = self.weight_hh.chunk(3)
        b_r, b_z, b_n = self.bias_ih.chunk(3)
        d_r, d_z, d_n = self.bias_hh.chunk(3)
        r = torch.sigmoid(x @ w_r.T + b_r + h @ u_r.T + d_r)
        z = torch.sigmoid(x @ w_z.T + b_z + h @ u_z.T + d_z)
        n = torch.tanh(x @ w_n.T + b_n + (r * h) @ u_n.T + d_n)
        return (1 - z) * n + z * h


CELLS["gru_reset_before"] = ResetBefore


def attend(q: Tensor, keys: Tensor, values: Tensor, v: Tensor | None, scale: float, normalize: str) -> Any:
    """Of one query [D] over the keys that it sees, [n, D]."""
    e = torch.stack([scale * (q @ k) if v is None else v @ torch.tanh(q + k) for k in keys])
    weights = e / len(e) if normalize == "length" else e.exp() / e.exp().sum()
    return sum(weight * value for weight, value in zip(weights, values, strict=True)), weights


def oracle(cells: list[Any], call: dict[str, Any]) -> tuple[Tensor, ...]:
    x, keys, v, weight = (call.get(name) for name in ("x", "keys", "v", "query_weight"))
    values = keys if call.get("values") is None else call["values"]
    lengths, mask, dropped = (call.get(name) for name in ("lengths", "mask", "dropout_mask"))
    sequences: list[list[Tensor]] = []
    for n in range(x.shape[1]):
        b = n // (x.shape[1] // len(keys))
        places = [
            s
            for s in range(keys.shape[1])
            if (lengths is None or s < lengths[b]) and (mask is None or bool(mask[b, 0, s]))
        ]
        context = call["context0"][n]
        states = [
            (call["h0"][layer, n], call["c0"][layer, n]) if call["c0"] is not None else call["h0"][layer, n]
            for layer in range(len(cells))
        ]
        tops, contexts, all_weights = [], [], []
        for t in range(len(x)):
            below = torch.cat([x[t, n], context])
            for layer, cell in enumerate(cells):
                states[layer] = cell(below, states[layer])
                below = states[layer][0] if isinstance(states[layer], tuple) else states[layer]
                if dropped is not None and layer + 1 < len(cells):
                    below = below * dropped[layer, t, n]
            row, context = torch.zeros(keys.shape[1]).double(), torch.zeros(values.shape[2]).double()
            if places:
                query = below if weight is None else weight @ below
                context, weights = attend(
                    query, keys[b, places], values[b, places], v, call.get("scale", 1.0), call.get("normalize", "")
                )
                row = row.index_put((torch.tensor(places),), weights)
            tops.append(below)
            contexts.append(context)
            all_weights.append(row)
        finals = [state if isinstance(state, tuple) else (state,) for state in states]
        ends = [torch.stack(state) for state in zip(*finals)]
        sequences.append([torch.stack(tops), torch.stack(contexts), torch.stack(all_weights), *ends])
    dimensions = (1, 1, 0, 1, 1)
    return tuple(torch.stack(parts, dimensions[i]) for i, parts in enumerate(zip(*sequences)))


def draw(cell: str, layers: int = 1, batch: int = N, memories: int = N, size: int = D, **options: Any) -> Any:
    """Cells, and a call of additive scores with projected queries and values of their own."""
    width = DV if options.get("values", "own") is not None else size
    cells = [CELLS[cell](H if layer else I + width, H, dtype=torch.float64) for layer in range(layers)]
    call: dict[str, Any] = {
        "x": randn(T, batch, I),
        "h0": randn(layers, batch, H),
        "c0": randn(layers, batch, H) if cell == "lstm" else None,
        "context0": randn(batch, width),
        "query_weight": randn(size, H),
        "keys": randn(memories, TK, size),
        "values": randn(memories, TK, DV),
        "v": randn(size),
        **options,
    }
    return cells, call


def check(cell: str, cells: list[Any], call: dict[str, Any]) -> None:
    """Results and gradients."""
    weights = [(one.weight_ih, one.weight_hh, one.bias_ih, one.bias_hh) for one in cells]
    leaves = [value for value in call.values() if isinstance(value, Tensor) and value.is_floating_point()]
    leaves = [leaf.requires_grad_() for leaf in leaves] + [p for one in cells for p in one.parameters()]
    found = attention_decoder(
        cell.removesuffix("_reset_before"), layers=weights, reset_after=cell != "gru_reset_before", **call
    )
    assert (found[4] is None) == (cell != "lstm")
    outputs, expected = [out for out in found if out is not None], oracle(cells, call)
    torch.testing.assert_close(tuple(outputs), expected)
    directions = [torch.randn_like(out) for out in outputs]
    gradients = [
        torch.autograd.grad(every, leaves, directions, allow_unused=True, materialize_grads=True)
        for every in (outputs, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_and_layers(cell: str, layers: int) -> None:
    check(cell, *draw(cell, layers))


@pytest.mark.parametrize("normalize", ["softmax", "length"])
@pytest.mark.parametrize(
    "options",
    [
        {"v": None, "scale": 0.5},  # general
        {"v": None, "query_weight": None, "values": None, "size": H},  # dot
        {"query_weight": None, "size": H},
        {"values": None},
    ],
    ids=["general", "dot", "additive", "additive_of_the_values"],
)
def test_scores(options: dict[str, Any], normalize: str) -> None:
    check("gru", *draw("gru", 2, **options, normalize=normalize))


@pytest.mark.parametrize("seen", [("lengths",), ("mask",), ("lengths", "mask")], ids="+".join)
@pytest.mark.parametrize("v", [{}, {"v": None}], ids=["additive", "general"])
def test_what_is_not_seen(v: dict[str, None], seen: tuple[str, ...]) -> None:
    """With a memory of which nothing is."""
    mask = torch.rand(N, 1, TK) < 0.5
    mask[1] = False
    given = {"lengths": torch.tensor([TK, 2, 0]), "mask": mask}
    check("lstm", *draw("lstm", **v, **{name: given[name] for name in seen}))


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_dropout_between_the_layers_only(cell: str) -> None:
    check(cell, *draw(cell, 3, dropout_mask=randn(2, T, N, H)))


@pytest.mark.parametrize("v", [{}, {"v": None}], ids=["additive", "general"])
def test_sequences_that_share_a_memory(v: dict[str, None]) -> None:
    lengths = torch.tensor([4, 0])
    check("gru", *draw("gru", 2, batch=6, memories=2, lengths=lengths, **v))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_without_biases(cell: str) -> None:
    cells, call = draw(cell, 2)
    cells = [CELLS[cell](one.input_size, H, bias=False, dtype=torch.float64) for one in cells]
    check(cell, cells, call)
