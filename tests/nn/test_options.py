"""The options that torch.nn does not have, as the modules give them to the operator."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.backends import native
from fastrnn.ops import dropout, recurrent_layer

LAYERS = ["RNN", "LSTM", "GRU"]


def state_of(result: Any) -> tuple[Tensor, ...]:
    return result[1] if isinstance(result[1], tuple) else (result[1],)


@pytest.mark.parametrize("kind", LAYERS)
def test_residual_adds_the_input_of_all_layers_but_the_first(kind: str) -> None:
    stack = getattr(fastrnn.nn, kind)(3, 4, num_layers=3, bidirectional=True, residual=True)
    x = torch.randn(5, 2, 3)
    expected, states = x, []
    for layer in range(3):
        single = getattr(nn, kind)(3 if layer == 0 else 8, 4, bidirectional=True)
        suffixes = (f"_l{layer}", f"_l{layer}_reverse")
        own = {name: value for name, value in stack.state_dict().items() if name.endswith(suffixes)}
        single.load_state_dict({name.replace(f"_l{layer}", "_l0"): value for name, value in own.items()})
        y, *_ = result = single(expected)
        expected = y + expected if layer else y
        states.append(state_of(result))
    found = stack(x)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(state_of(found), tuple(torch.cat(parts) for parts in zip(*states)))


def test_layer_norm_of_the_lstm() -> None:
    """Ba et al. 2016, equations 20 to 22, step by step."""
    layer = fastrnn.nn.LSTM(3, 5, layer_norm=True, bidirectional=True)
    names = [name for name, _ in layer.named_parameters()]
    assert names[:8] == [name for name, _ in nn.LSTM(3, 5, bidirectional=True).named_parameters()]
    assert names[8:14] == [f"layer_norm_{of}_l0_{kind}" for of in ("ih", "hh", "c") for kind in ("weight", "bias")]
    assert names[14:] == [name.replace("_l0_", "_l0_reverse_") for name in names[8:14]]
    with torch.no_grad():
        for name in names[8:]:
            getattr(layer, name).normal_()

    x = torch.randn(4, 2, 3)
    halves = []
    for suffix in ("_l0", "_l0_reverse"):
        norms = {
            of: (getattr(layer, f"layer_norm_{of}{suffix}_weight"), getattr(layer, f"layer_norm_{of}{suffix}_bias"))
            for of in ("ih", "hh", "c")
        }
        weights = [getattr(layer, f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h, c, outputs = torch.zeros(2, 5), torch.zeros(2, 5), []
        for x_t in x if suffix == "_l0" else x.flip(0):
            gates = layer_norm(x_t @ weights[0].T, (20,), *norms["ih"]) + weights[2]
            gates = gates + layer_norm(h @ weights[1].T, (20,), *norms["hh"]) + weights[3]
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * layer_norm(c, (5,), *norms["c"]).tanh()
            outputs.append(h)
        halves.append(torch.stack(outputs if suffix == "_l0" else outputs[::-1]))
    torch.testing.assert_close(layer(x)[0], torch.cat(halves, -1))


def test_layer_norm_starts_at_the_identity_and_is_reset() -> None:
    for module in (fastrnn.nn.GRU(3, 4, num_layers=2, layer_norm=True), fastrnn.nn.LSTMCell(3, 4, layer_norm=True)):
        for _ in range(2):
            norms = {name: value for name, value in module.named_parameters() if name.startswith("layer_norm")}
            assert norms and all((value == name.endswith("weight")).all() for name, value in norms.items())
            with torch.no_grad():
                for value in norms.values():
                    value.normal_()
            module.reset_parameters()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_peephole_parameters(layer_norm: bool) -> None:
    torch.manual_seed(3)
    layer = fastrnn.nn.LSTM(3, 400, num_layers=2, bidirectional=True, peephole=True, layer_norm=layer_norm)
    torchs = [name for name, _ in nn.LSTM(3, 400, num_layers=2, bidirectional=True).named_parameters()]
    own = [f"weight_peephole_l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")]
    assert list(layer.state_dict())[: len(torchs) + 4] == torchs + own
    drawn = {name: value.detach().clone() for name, value in layer.named_parameters()}
    for name in own:
        assert drawn[name].shape == (1200,)
        assert drawn[name].abs().max().item() == pytest.approx(1 / 20, rel=0.01)
        assert drawn[name].std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.1)
    # What the constructor has drawn is drawn again.
    with torch.no_grad():
        for value in layer.parameters():
            value.fill_(7)
    torch.manual_seed(3)
    layer.reset_parameters()
    for name, value in layer.named_parameters():
        assert torch.equal(value, drawn[name]), name
    assert list(fastrnn.nn.LSTMCell(3, 4, peephole=True).state_dict())[-1] == "weight_peephole"


def test_each_layer_and_direction_has_its_peepholes() -> None:
    layer = fastrnn.nn.LSTM(3, 4, num_layers=2, bidirectional=True, peephole=True)
    x = torch.randn(5, 2, 3)
    expected = x
    for suffixes in (("_l0", "_l0_reverse"), ("_l1", "_l1_reverse")):
        halves = []
        for suffix in suffixes:
            weights = [getattr(layer, f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            peephole = getattr(layer, f"weight_peephole{suffix}")
            reverse = suffix.endswith("reverse")
            halves.append(recurrent_layer("lstm", expected, *weights, peephole=peephole, reverse=reverse)[0])
        expected = torch.cat(halves, -1)
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_peephole_under_autocast(dtype: torch.dtype) -> None:
    layer, x, grad = fastrnn.nn.LSTM(20, 30, peephole=True), torch.randn(9, 5, 20), torch.randn(9, 5, 30)

    def run(backend: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        layer.backend = backend
        y = layer(x.to(layer.weight_hh_l0.dtype))[0]
        return y.double(), torch.autograd.grad(y, list(layer.parameters()), grad.to(y.dtype))

    with torch.autocast("cpu", dtype):
        y, gradients = run("cpu")
        assert layer(x)[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    layer.double()
    exact, exact_gradients = run("reference")
    # Rounding x, h and the weights makes half of this; leaving the peepholes out, three times as much and more.
    for found, wanted in zip((y, *gradients), (exact, *exact_gradients), strict=True):
        assert (found - wanted).norm() < torch.finfo(dtype).eps * wanted.norm()


def test_options_leave_the_initial_values_of_torchs_parameters() -> None:
    torch.manual_seed(3)
    ours = fastrnn.nn.LSTM(3, 4, num_layers=2, layer_norm=True, peephole=True, residual=True, zoneout=0.1)
    torch.manual_seed(3)
    theirs = nn.LSTM(3, 4, num_layers=2)
    for name, value in theirs.named_parameters():
        assert torch.equal(value, getattr(ours, name))


@pytest.mark.parametrize("module_cls", [fastrnn.nn.LSTM, fastrnn.nn.LSTMCell])
def test_forget_bias(module_cls: Any) -> None:
    torch.manual_seed(3)
    module = module_cls(3, 4, forget_bias=1.5)
    torch.manual_seed(3)
    plain = getattr(nn, module_cls.__name__)(3, 4)
    for _ in range(2):
        biases = [value for name, value in module.named_parameters() if name.startswith("bias")]
        assert torch.equal(sum(biases)[4:8], torch.full((4,), 1.5))
        module.reset_parameters()
    torch.manual_seed(3)
    module.reset_parameters()
    for (name, ours), theirs in zip(module.named_parameters(), plain.parameters()):
        kept = torch.arange(16) // 4 != 1 if name.startswith("bias") else torch.ones(16, dtype=torch.bool)
        assert torch.equal(ours[kept], theirs[kept])


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_dropout_of_everything(kind: str) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 4, num_layers=2, weight_dropout=1.0)
    plain = getattr(nn, kind)(3, 4, num_layers=2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    with torch.no_grad():
        plain.weight_hh_l0.zero_()
        plain.weight_hh_l1.zero_()
    torch.testing.assert_close(layer.train()(x), plain(x))


def test_weight_dropout_is_drawn_for_each_element_and_call() -> None:
    layer = fastrnn.nn.RNN(200, 200, weight_dropout=0.3, bias=False, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.fill_(0.7)
    ys = [layer(torch.zeros(1, 200, 200), torch.eye(200)[None])[0][0] for _ in range(2)]  # rows of weight_hh
    for y in ys:
        assert set(y.unique().tolist()) == {0.0, y.max().item()}
        assert y.max().item() == pytest.approx(1.0)
        assert (y == 0).double().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 40000) ** 0.5)
    assert not torch.equal(*ys)


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_dropout_is_the_operator_on_weight_hh(kind: str) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 4, num_layers=2, bidirectional=True, weight_dropout=0.3)
    plain = getattr(nn, kind)(3, 4, num_layers=2, bidirectional=True)
    plain.load_state_dict(layer.state_dict())
    x, given = torch.randn(5, 2, 3), torch.randn(5, 2, 8)
    torch.manual_seed(11)
    found = layer(x)[0]
    found.backward(given)
    torch.manual_seed(11)
    # In the order of layers and directions, each with a seed of its own from torch's generator.
    seeds = {name: int(torch.randint(2**63 - 1, ())) for name, _ in plain.named_parameters() if "weight_hh" in name}
    with torch.no_grad():
        for name, seed in seeds.items():
            getattr(plain, name).copy_(dropout(getattr(plain, name), 0.3, seed))
    expected = plain(x)[0]
    expected.backward(given)
    torch.testing.assert_close(found, expected)
    for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters()):
        gradient = dropout(theirs.grad, 0.3, seeds[name]) if name in seeds else theirs.grad
        torch.testing.assert_close(ours.grad, gradient)


def test_recurrent_dropout_is_drawn_by_sequence_and_unit() -> None:
    layer = fastrnn.nn.RNN(3, 8, recurrent_dropout=0.4, bias=False, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.copy_(torch.eye(8))
    for steps, batch in ((1, 6), (7, 6), (7, 4)):
        torch.manual_seed(11)
        seed = int(torch.randint(2**63 - 1, ()))
        torch.manual_seed(11)
        y = layer(torch.zeros(steps, batch, 3), torch.ones(1, batch, 8))[0]
        torch.testing.assert_close(y[0], dropout(torch.ones(6, 8), 0.4, seed)[:batch])


@pytest.mark.skipif(native.load() is None, reason="no compiled extension")
@pytest.mark.parametrize("kind", LAYERS)
def test_no_mask_of_weights_or_steps_is_kept_for_backward(kind: str) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 8, zoneout=0.3, recurrent_dropout=0.3, weight_dropout=0.3)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(torch.randn(5, 6, 3))[0]
    assert y.requires_grad
    # What has few values is a mask: recurrent_dropout's, of one step, is the only one. The weight is kept as used.
    masks = [tensor for tensor in kept if tensor.numel() and len(tensor.unique()) <= 2]
    assert [tensor.shape for tensor in masks] == [(6, 8)]
    (weight,) = [tensor for tensor in kept if tensor.shape == layer.weight_hh_l0.shape]
    assert torch.equal(weight != 0, (weight / layer.weight_hh_l0 - 1 / 0.7).abs() < 1e-5)


def test_recurrent_dropout_is_one_mask_for_all_steps() -> None:
    layer = fastrnn.nn.RNN(6, 100, recurrent_dropout=0.4, bias=False, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.copy_(torch.eye(100))
    x = torch.zeros(3, 50, 6)
    y = layer(x, torch.ones(1, 50, 100))[0]  # y_t = mask^t: 0 or 0.6^-t
    kept = y[0] > 0
    assert torch.equal(kept, y[2] > 0)
    torch.testing.assert_close(y[2][kept], y[0][kept] ** 3)
    torch.testing.assert_close(y[0][kept], torch.full_like(y[0][kept], 1 / 0.6))
    assert kept.double().mean().item() == pytest.approx(0.6, abs=5 * (0.24 / 5000) ** 0.5)
    assert torch.equal(layer.eval()(x, torch.ones(1, 50, 100))[0], torch.ones(3, 50, 100))


@pytest.mark.parametrize("strict", [False, True])
def test_random_masks_are_exported(strict: bool) -> None:
    layer, x = fastrnn.nn.GRU(3, 8, zoneout=0.3, recurrent_dropout=0.3, weight_dropout=0.3), torch.randn(5, 6, 3)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    ys = []
    for module, seed in ((exported, 7), (layer, 7), (exported, 8)):
        torch.manual_seed(seed)
        ys.append(module(x)[0])
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])


@pytest.mark.parametrize("kind", LAYERS)
def test_zoneout_of_everything_keeps_the_state(kind: str) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 4, zoneout=1.0)
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    for training in (True, False):
        result = layer.train(training)(x, (h, -h) if kind == "LSTM" else h)
        torch.testing.assert_close(result[0], h.expand(5, 2, 4))
        torch.testing.assert_close(state_of(result)[-1], -h if kind == "LSTM" else h)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])  # h of the LSTM is no linear function of its zoned-out c
def test_zoneout_in_evaluation_is_the_mean(kind: str) -> None:
    layer, n = getattr(fastrnn.nn, kind)(3, 4, zoneout=0.3), 20000
    x, h = torch.randn(1, 1, 3), torch.randn(1, 1, 4)
    drawn = layer(x.expand(1, n, 3), h.expand(1, n, 4))[0][0]
    mean = layer.eval()(x, h)[0][0, 0]
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=5 * drawn.std(0).max().item() / n**0.5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RNN", {"layer_norm": True}),
        ("GRU", {"layer_norm": True}),
        ("GRU", {"reset_after": False}),
        ("LSTM", {"layer_norm": True}),
        ("LSTM", {"peephole": True}),
        ("LSTM", {"peephole": True, "layer_norm": True}),
        ("LSTM", {"zoneout": 0.2}),
        ("LSTM", {}),
    ],
    ids=str,
)
def test_cells_are_the_steps_of_a_layer(kind: str, options: dict[str, Any]) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 4, **options).eval()
    cell = getattr(fastrnn.nn, f"{kind}Cell")(3, 4, **options).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x, state, outputs = torch.randn(6, 2, 3), None, []
    for x_t in x:
        state = cell(x_t, state)
        outputs.append(state[0] if kind == "LSTM" else state)
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_cell_states(bidirectional: bool) -> None:
    layer = fastrnn.nn.LSTM(3, 4, num_layers=2, bidirectional=bidirectional, batch_first=True, return_cell_states=True)
    x, lengths = torch.randn(3, 6, 3), torch.tensor([4, 6, 1])
    y, (_, c_n), c = layer(x)
    assert c.shape == y.shape
    torch.testing.assert_close(c[:, -1, :4], c_n[-2 if bidirectional else -1])
    if bidirectional:
        torch.testing.assert_close(c[:, 0, 4:], c_n[-1])
    torch.testing.assert_close(layer(x[0])[2], c[0])
    # Each c_t is the last one of the sequence cut off there.
    if not bidirectional:
        torch.testing.assert_close(c[:, 2], layer(x[:, :3])[1][1][-1])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    from_packed = pad_packed_sequence(layer(packed)[2], batch_first=True)[0]
    torch.testing.assert_close(layer(x, lengths=lengths)[2], from_packed)
    gradients = torch.autograd.grad(c[:, :3].square().sum(), list(layer.parameters()))
    if not bidirectional:
        cut = layer(x[:, :3])[2]
        torch.testing.assert_close(gradients, torch.autograd.grad(cut.square().sum(), list(layer.parameters())))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_cut_a_sequence_in_two(kind: str, batch_first: bool) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 4, num_layers=2, batch_first=batch_first)
    x, at = torch.randn(3, 6, 3), (2, 5, 0)
    resets = torch.zeros(3, 6, dtype=torch.bool)
    for sequence, t in enumerate(at):
        resets[sequence, t] = True
    expected = torch.stack(
        [torch.cat([layer(part)[0] for part in (row[:t], row[t:]) if len(part)]) for row, t in zip(x, at)]
    )
    y = layer(x if batch_first else x.transpose(0, 1), resets=resets if batch_first else resets.T)[0]
    torch.testing.assert_close(y if batch_first else y.transpose(0, 1), expected)
    torch.testing.assert_close(layer(x[0], resets=resets[0])[0], expected[0])
    # A packed sequence takes the flags of its sequences in their own order.
    lengths = torch.tensor([4, 6, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y = pad_packed_sequence(layer(packed, resets=resets if batch_first else resets.T)[0], batch_first=True)[0]
    for row, wanted, length in zip(y, expected, lengths):
        torch.testing.assert_close(row[:length], wanted[:length])


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths(kind: str) -> None:
    layer = getattr(fastrnn.nn, kind)(3, 4, num_layers=2, bidirectional=True)
    x, h = torch.randn(5, 4, 3, requires_grad=True), torch.randn(4, 4, 4, requires_grad=True)
    hx = (h, h) if kind == "LSTM" else h
    lengths = torch.tensor([3, 0, 5, 1])
    y, *_ = result = layer(x, hx, lengths=lengths)
    for b, length in enumerate(lengths):
        assert (y[length:, b] == 0).all()
        if length:
            alone = layer(x[:length, b], (h[:, b], h[:, b]) if kind == "LSTM" else h[:, b])
            torch.testing.assert_close(y[:length, b], alone[0])
            for state, wanted in zip(state_of(result), state_of(alone)):
                torch.testing.assert_close(state[:, b], wanted)
    for state in state_of(result):
        assert torch.equal(state[:, 1], h[:, 1])
    dx, dh = torch.autograd.grad(y.square().sum() + sum(s.sum() for s in state_of(result)), (x, h))
    assert all((dx[length:, b] == 0).all() for b, length in enumerate(lengths))
    assert torch.equal(dh[:, 1], torch.full((4, 4), float(len(state_of(result)))))
    torch.testing.assert_close(layer(x[:, 0], lengths=torch.tensor(3))[0], layer(x, lengths=lengths)[0][:, 0])


def test_repr_shows_what_differs_from_torch() -> None:
    assert repr(fastrnn.nn.LSTM(3, 4, 2, zoneout=0.1, forget_bias=1.0)) == (
        "LSTM(3, 4, num_layers=2, zoneout=0.1, forget_bias=1.0)"
    )
    assert repr(fastrnn.nn.LSTMCell(3, 4, peephole=True)) == "LSTMCell(3, 4, peephole=True)"
    assert repr(fastrnn.nn.GRUCell(3, 4, reset_after=False)) == "GRUCell(3, 4, reset_after=False)"
    assert repr(fastrnn.nn.RNN(3, 4, backend="reference")) == "RNN(3, 4, backend='reference')"


@pytest.mark.parametrize(
    ("kind", "options", "error", "text"),
    [
        ("LSTM", {"zoneout": -0.1}, ValueError, r"zoneout must be a probability in \[0, 1\], got -0.1"),
        ("LSTM", {"recurrent_dropout": 2}, ValueError, "recurrent_dropout must be a probability"),
        ("RNN", {"weight_dropout": True}, ValueError, "weight_dropout must be a probability"),
        ("RNN", {"weight_dropout": "0.5"}, ValueError, "weight_dropout must be a probability"),
        ("GRU", {"layer_norm": 1}, TypeError, "layer_norm must be a bool, got int"),
        ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs bias=True"),
        ("LSTM", {"forget_bias": "1"}, TypeError, "forget_bias must be a number or None, got str"),
        ("GRU", {"forget_bias": 1.0}, TypeError, "forget_bias"),
        ("LSTM", {"peephole": 1}, TypeError, "peephole must be a bool, got int"),
        ("GRU", {"peephole": True}, TypeError, "peephole"),
        ("RNNCell", {"peephole": True}, TypeError, "peephole"),
        ("LSTM", {"reset_after": False}, TypeError, "reset_after"),
        ("LSTMCell", {"residual": True}, TypeError, "residual"),
        (
            "GRU",
            {"backend": "cudnn"},
            ValueError,
            "backend must be one of 'cpu', 'cuda', 'triton', 'aten', 'reference', 'auto'",
        ),
    ],
    ids=str,
)
def test_wrong_options(kind: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        getattr(fastrnn.nn, kind)(3, 4, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lengths": torch.tensor([5])}, ValueError, r"lengths must be int64 or int32 of shape \(2,\)"),
        ({"lengths": torch.tensor([5.0, 1.0])}, ValueError, "lengths must be int64 or int32"),
        ({"lengths": torch.tensor([5, -1])}, ValueError, "lengths must lie in 0..5"),
        ({"lengths": [5, 1]}, TypeError, "lengths must be a torch.Tensor, got list"),
        ({"resets": torch.zeros(5, 2)}, ValueError, "resets must be bool"),
        ({"resets": torch.zeros(5, dtype=torch.bool)}, ValueError, "resets must have 2 dimensions"),
        ({"resets": [True]}, TypeError, "resets must be a torch.Tensor, got list"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastrnn.nn.GRU(3, 4)(torch.zeros(5, 2, 3), **arguments)


def test_lengths_of_a_packed_sequence() -> None:
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 2]))
    with pytest.raises(ValueError, match="lengths cannot be combined with batch_sizes"):
        fastrnn.nn.GRU(3, 4)(packed, lengths=torch.tensor([5, 2]))
