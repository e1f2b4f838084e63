"""What the modules promise beyond torch.nn's: repeatable bit by bit, any derivative, transforms, clear refusals."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fastrnn

LAYERS, CELLS = ["RNN", "LSTM", "GRU"], ["RNNCell", "LSTMCell", "GRUCell"]


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for part in result for t in tensors(part))


def pair(kind: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, of equal parameters."""
    ours, theirs = getattr(fastrnn.nn, kind)(*args, **kwargs), getattr(nn, kind)(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [1, 6])
def test_bitwise_repeatable(kind: str, steps: int) -> None:
    layer, x = getattr(fastrnn.nn, kind)(33, 65, num_layers=2, bidirectional=True), torch.randn(steps, 9, 33)
    found = []
    for _ in range(3):
        y = tensors(layer(x))
        found.append((*y, *torch.autograd.grad(sum(t.sum() for t in y), list(layer.parameters()))))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_row_does_not_depend_on_its_batch_mates(kind: str, steps: int, grad: bool) -> None:
    layer = getattr(fastrnn.nn, kind)(33, 130, num_layers=2, bidirectional=True)
    x = torch.randn(steps, 40, 33)
    with torch.set_grad_enabled(grad):
        together = tensors(layer(x))
        for row in (0, 17, 39):
            for mates in ([row], [row, 3], [5, row, 8, 9, 1], list(range(row + 1))):
                alone = tensors(layer(x[:, mates]))
                for a, b in zip(alone, together):
                    assert torch.equal(a[:, mates.index(row)], b[:, row])


@pytest.mark.parametrize("kind", CELLS)
def test_a_row_of_a_cell_does_not_depend_on_its_batch_mates(kind: str) -> None:
    cell, x = getattr(fastrnn.nn, kind)(33, 130), torch.randn(40, 33)
    together = tensors(cell(x))
    for rows in (slice(7, 8), slice(5, 10), slice(0, 33)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(tensors(cell(x[rows])), together))
    assert all(torch.equal(a, b[7]) for a, b in zip(tensors(cell(x[7])), together))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_nan_reaches_what_depends_on_it_and_nothing_else(kind: str) -> None:
    module = getattr(fastrnn.nn, kind)(3, 4)
    x = torch.randn(3, 3) if "Cell" in kind else torch.randn(6, 3, 3)
    clean = tensors(module(x))[0]
    x[..., 1, 0] = float("nan") if "Cell" in kind else torch.tensor([0, 0, 0, float("nan"), 0, 0])
    y = tensors(module(x))[0]
    assert torch.equal(y[..., [0, 2], :], clean[..., [0, 2], :])
    assert y[..., 1, :].isnan().all() if "Cell" in kind else y[3:, 1].isnan().all() and not y[:3].isnan().any()


@pytest.mark.parametrize("kind", LAYERS)
def test_loss_of_one_output_alone(kind: str) -> None:
    ours, theirs = pair(kind, 3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 2, 3, requires_grad=True)
    for index in range(len(tensors(ours(x)))):
        found = [
            torch.autograd.grad(tensors(module(x))[index].square().sum(), [x, *module.parameters()])
            for module in (ours, theirs)
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_frozen_weights_and_frozen_inputs(kind: str) -> None:
    ours, theirs = pair(kind, 3, 4)
    shape = (2, 3) if "Cell" in kind else (5, 2, 3)
    for frozen in ("weight_hh", "weight_ih", "bias", "everything"):
        found = []
        x = torch.randn(shape, requires_grad=frozen == "everything")
        for module in (ours, theirs):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(frozen != "everything" and not name.startswith(frozen))
                parameter.grad = None
            tensors(module(x))[0].square().sum().backward()
            found.append([x.grad, *(parameter.grad for parameter in module.parameters())])
            x.grad = None
        for a, b in zip(*found):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_double_backward(kind: str) -> None:
    """As gradient penalties need it."""
    ours, theirs = pair(kind, 3, 4)
    x = torch.randn((2, 3) if "Cell" in kind else (5, 2, 3), requires_grad=True)
    found = []
    for module in (ours, theirs):
        (dx,) = torch.autograd.grad(sum(t.square().sum() for t in tensors(module(x))), x, create_graph=True)
        found.append((dx, *torch.autograd.grad(dx.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_gradients_per_sample_and_forward_mode(kind: str) -> None:
    ours, theirs = pair(kind, 3, 4)
    x = torch.randn((6, 3) if "Cell" in kind else (6, 5, 3))  # six samples without batch dimension
    tangent = torch.randn_like(x[0])

    def of(module: nn.Module) -> tuple[Any, Any]:
        parameters = dict(module.named_parameters())

        def loss(parameters: Any, sample: Tensor) -> Tensor:
            return tensors(torch.func.functional_call(module, parameters, (sample,)))[0].square().sum()

        per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        return per_sample, torch.func.jvp(lambda sample: tensors(module(sample))[0], (x[0],), (tangent,))

    per_sample, forward_mode = of(ours)
    for index, sample in enumerate(x):
        expected = torch.autograd.grad(tensors(theirs(sample))[0].square().sum(), list(theirs.parameters()))
        for found, wanted in zip(per_sample.values(), expected):
            torch.testing.assert_close(found[index], wanted)
    theirs.double()
    start, moved = x[0].double(), x[0].double() + 1e-6 * tangent
    numerical = (tensors(theirs(moved))[0] - tensors(theirs(start))[0]) / 1e-6
    torch.testing.assert_close(forward_mode[1].double(), numerical, rtol=1e-4, atol=1e-5)


OPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"layer_norm": True}, True),
    ({"peephole": True}, True),
    ({"zoneout": 0.4}, True),
    ({"zoneout": 0.4}, False),
    ({"reset_after": False}, True),
    ({"recurrent_dropout": 0.4, "weight_dropout": 0.4}, True),
]


def with_options(kinds: list[str]) -> list[Any]:
    return [
        pytest.param(kind, options, training, id="-".join([kind, *options, "train" if training else "eval"]))
        for kind in kinds
        for options, training in OPTIONS
        if not ("reset_after" in options and "GRU" not in kind)
        and not ("peephole" in options and "LSTM" not in kind)
        and not ("weight_dropout" in options and "Cell" in kind)
    ]


@pytest.mark.parametrize(("kind", "options", "training"), with_options([*LAYERS, *CELLS]))
def test_transforms_with_options(kind: str, options: dict[str, Any], training: bool) -> None:
    """Per-sample gradients of layers with lengths and resets too, and ensembles. Random options draw the same masks."""
    cls = getattr(fastrnn.nn, kind)
    models = [cls(3, 4, **options).train(training) for _ in range(3)]
    xs = torch.randn(4, 2, 3) if "Cell" in kind else torch.randn(4, 5, 2, 3)
    given: dict[str, Tensor] = {}
    if "Cell" not in kind:
        given = {"lengths": torch.tensor([[2, 5], [0, 1], [5, 5], [3, 4]]), "resets": torch.rand(4, 5, 2) < 0.3}

    def output(model: nn.Module, parameters: Any, x: Tensor, given: Any) -> Tensor:
        return tensors(torch.func.functional_call(model, parameters, (x,), given))[0]

    def loss(parameters: Any, x: Tensor, given: Any) -> Tensor:
        return output(models[0], parameters, x, given).square().sum()

    parameters = dict(models[0].named_parameters())
    torch.manual_seed(1)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="same")(parameters, xs, given)
    for index, x in enumerate(xs):
        torch.manual_seed(1)
        single = loss(parameters, x, {name: value[index] for name, value in given.items()})
        expected = torch.autograd.grad(single, list(parameters.values()))
        torch.testing.assert_close([value[index] for value in per_sample.values()], list(expected))

    stacked = torch.func.stack_module_state(models)[0]
    torch.manual_seed(1)
    ys = torch.vmap(output, in_dims=(None, 0, None, None), randomness="same")(models[0], stacked, xs[0], {})
    for y, model in zip(ys, models):
        torch.manual_seed(1)
        torch.testing.assert_close(y, tensors(model(xs[0]))[0])
    twice = torch.stack([xs[0], xs[0]])
    ys = torch.vmap(lambda x: output(models[0], parameters, x, {}), randomness="different")(twice)
    random = training and any(isinstance(value, float) for value in options.values())
    assert torch.equal(ys[0], ys[1]) != random


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_inference_mode_and_shared_memory(kind: str) -> None:
    ours, theirs = pair(kind, 3, 4)
    x = torch.randn((2, 3) if "Cell" in kind else (5, 2, 3))
    ours.share_memory()
    assert all(parameter.is_shared() for parameter in ours.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_strided_inputs(kind: str) -> None:
    ours, theirs = pair(kind, 3, 4)
    base = torch.randn(3, 2) if "Cell" in kind else torch.randn(3, 2, 5)
    state = torch.randn(4, 2) if "Cell" in kind else torch.randn(4, 2, 1)
    for x, h in (
        (base.T if "Cell" in kind else base.permute(2, 1, 0), state.T if "Cell" in kind else state.permute(2, 1, 0)),
        (base.new_ones(1).expand(2, 3) if "Cell" in kind else base.new_ones(1).expand(5, 2, 3), None),
    ):
        hx = (h, h) if "LSTM" in kind and h is not None else h
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))


def test_torchs_tracer_and_tensor_subclasses_get_torchs_operator() -> None:
    ours, theirs = pair("LSTM", 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        traced = torch.jit.trace(ours, (torch.randn(5, 2, 3),))
    x = torch.randn(7, 3, 3)
    torch.testing.assert_close(traced(x)[0], theirs(x)[0])
    y = ours(TwoTensor(x, 2 * x))[0]
    assert isinstance(y, TwoTensor)
    torch.testing.assert_close(y.a, theirs(x)[0])
    torch.testing.assert_close(y.b, theirs(2 * x)[0])


class Traced(nn.Module):
    """The first result: torch.jit.trace takes no None, which the weights and the state may be."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs, need_weights=False)[0]


@pytest.mark.parametrize(
    "module",
    [
        fastrnn.nn.AdditiveAttention(4, 4, 5),
        fastrnn.nn.GeneralAttention(4, 4),
        fastrnn.nn.AttentionDecoder("lstm", 4, 4, fastrnn.nn.AdditiveAttention(4, 4, 6)),
        fastrnn.nn.AttentionDecoder("gru", 4, 4, fastrnn.nn.DotAttention(), input_feeding=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_torchs_tracer_takes_attention(module: nn.Module) -> None:
    module = Traced(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        traced = torch.jit.trace(module, (torch.randn(2, 3, 4), torch.randn(2, 6, 4)))
    inputs = torch.randn(5, 3, 4), torch.randn(5, 7, 4)
    torch.testing.assert_close(traced(*inputs), module(*inputs))


@pytest.mark.parametrize(
    "module",
    [
        fastrnn.nn.LSTM(3, 4),
        fastrnn.nn.GRUCell(3, 4),
        fastrnn.nn.DotAttention(),
        fastrnn.nn.SelfAttention(4),
        fastrnn.nn.AttentionDecoder("rnn", 3, 4, fastrnn.nn.AdditiveAttention(4, 5, 6)),
        fastrnn.accelerate(nn.GRU(3, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_scripting_is_refused_with_the_way_out(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"fastrnn.restore\(model\)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        torch.jit.script(nn.Sequential(module))


def test_a_restored_model_is_scripted() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(fastrnn.restore(fastrnn.accelerate(model)))
    assert torch.equal(scripted(x)[0], model(x)[0])


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_every_back_end_computes_the_same(kind: str, backend: str) -> None:
    ours, theirs = pair(kind, 3, 4)
    ours.backend = backend
    x = torch.randn((2, 3) if "Cell" in kind else (5, 2, 3))
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_back_end_that_cannot_gives_its_reasons() -> None:
    layer = fastrnn.nn.LSTM(3, 4, backend="aten", zoneout=0.1)
    with pytest.raises(NotImplementedError, match="backend 'aten' cannot compute this call: torch has no zoneout"):
        layer(torch.zeros(5, 2, 3))
    layer.backend = "gpu"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(torch.zeros(5, 2, 3))


def test_import_takes_less_than_a_tenth_of_a_second_beyond_torchs() -> None:
    code = "import time, torch; start = time.perf_counter(); import fastrnn; print(time.perf_counter() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.1


def test_public_names() -> None:
    assert set(fastrnn.__all__) == {
        *("accelerate", "explain", "from_keras", "from_onnx", "nn", "plot", "restore", "search"),
    }
    assert all(hasattr(fastrnn, name) for name in fastrnn.__all__)
    assert fastrnn.__version__[0].isdigit()
