"""The operator inside torch: compile, export, opcheck, transforms, double backward, fake and meta tensors."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn.ops import recurrent_layer
from fastrnn.reference import CELLS
from tests.accuracy import assert_as_accurate
from tests.ops.case import LIBRARY, Case, converted, forward, kernel_options, run, with_tensors

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")


# Registered operators


class Recorder(TorchDispatchMode):
    """Keeps the calls of our registered operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastrnn":
            assert not kwargs
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"states": ()}, {"packed": True}, {"layout": "transposed", "needs": ("x", "weight_hh")}, {"reverse": True}],
    ids=["plain", "no_states", "packed", "transposed", "reverse"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell: str, arguments: dict[str, Any]) -> None:
    for options in {(), kernel_options(cell) if not arguments.get("packed") else ()}:
        for shape in [(1, 3, 5, 9), (4, 3, 5, 9)]:
            call, gradients = Case(cell, *shape, options, **arguments).draw()
            if call.lengths is not None:  # What is saved of steps past the end of a sequence is not written.
                call.lengths = torch.full_like(call.lengths, shape[0])
            with Recorder() as recorder:
                run(call, "cpu", gradients, arguments.get("needs"))
            assert [function.name() for function, _ in recorder.calls] == [
                "fastrnn::recurrence_forward",
                "fastrnn::recurrence_backward",
            ]
            for function, args in recorder.calls:
                torch.library.opcheck(function, pytree.tree_map_only(Tensor, Tensor.detach, list(args)))


def test_dispatch_modes_see_the_operators_and_get_the_same_numbers() -> None:
    call, gradients = Case("lstm", 4, 3, 5, 9).draw()
    plain = run(call, "cpu", gradients)
    with Recorder():
        seen = run(call, "cpu", gradients)
    assert all(torch.equal(result, plain[name]) for name, result in seen.items())


# torch.compile and torch.export


class Layer(torch.nn.Module):
    """recurrent_layer as a module, for compile and export."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        call, _ = case.draw()
        self.cell, self.reverse = case.cell, case.reverse
        self.weight_ih = torch.nn.Parameter(call.weight_ih)
        self.weight_hh = torch.nn.Parameter(call.weight_hh)
        self.bias_ih = torch.nn.Parameter(call.bias_ih)
        self.bias_hh = torch.nn.Parameter(call.bias_hh)

    def forward(
        self, x: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, ...]:
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        results = recurrent_layer(self.cell, x, *weights, h0, c0, reverse=self.reverse, **options)
        return tuple(result for result in results if result is not None)


def _gradients(layer: Layer, outputs: tuple[Tensor, ...], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad([(o * o).sum() for o in outputs], [x, *layer.parameters()]))


def _inputs(case: Case) -> dict[str, Any]:
    call, _ = case.draw()
    names = ("x", "h0", "c0", "lengths", "resets")
    inputs = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    inputs["x"].requires_grad_()
    return inputs


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("options", [(), ("lengths", "resets")], ids=["plain", "options"])
@pytest.mark.parametrize("cell", CELLS)
def test_compiles_as_one_graph_without_recompilation(cell: str, options: tuple[str, ...]) -> None:
    layer = Layer(Case(cell, 4, 3, 5, 9))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps, batch in [(4, 3), (7, 2), (11, 6)]:
        inputs = _inputs(Case(cell, steps, batch, 5, 9, options))
        outputs, expected = compiled(**inputs), layer(**inputs)
        for result, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)
        for result, wanted in zip(_gradients(layer, outputs, inputs["x"]), _gradients(layer, expected, inputs["x"])):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("steps", [1, 4])
def test_compiles_with_inductor(steps: int, layout: str) -> None:
    layer = Layer(Case("lstm", steps, 3, 5, 9, reverse=True))
    inputs = _inputs(Case("lstm", steps, 3, 5, 9, layout=layout))
    # What stands around the operator lets Inductor choose strides.
    compiled = torch.compile(lambda **kwargs: layer(**{**kwargs, "x": kwargs["x"] * 2})[0].relu() + 1, fullgraph=True)
    eager = layer(**{**inputs, "x": inputs["x"] * 2})[0].relu() + 1
    result = compiled(**inputs)
    torch.testing.assert_close(result, eager)
    for ours, wanted in zip(_gradients(layer, (result,), inputs["x"]), _gradients(layer, (eager,), inputs["x"])):
        torch.testing.assert_close(ours, wanted)


def test_exports() -> None:
    layer = Layer(Case("gru", 4, 3, 5, 9)).eval()
    inputs = {"x": torch.randn(4, 3, 5), "h0": torch.randn(3, 9)}
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    shapes = {"x": {0: steps, 1: batch}, "h0": {0: batch}, "c0": None, "options": {}}
    program = torch.export.export(layer, (), inputs, dynamic_shapes={"x": shapes["x"], "h0": shapes["h0"]})
    assert any("recurrence_forward" in str(node.target) for node in program.graph.nodes)
    larger = {"x": torch.randn(9, 7, 5), "h0": torch.randn(7, 9)}
    for result, wanted in zip(program.module()(**larger), layer(**larger), strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


# Derivatives


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell: str) -> None:
    options = kernel_options(cell)
    call, gradients = Case(cell, 4, 3, 5, 9, options).draw()

    def second(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        tensors = {n: t.to(dtype).requires_grad_(n != "recurrent_mask") for n, t in call.tensors().items()}
        inputs = [tensor for tensor in tensors.values() if tensor.requires_grad]
        given = {name: g.to(dtype).requires_grad_() for name, g in gradients.items()}
        outputs = forward(with_tensors(call, tensors), backend)
        first = torch.autograd.grad([outputs[name] for name in given], inputs, list(given.values()), create_graph=True)
        generator = torch.Generator().manual_seed(5)
        loss = sum((g * torch.randn(g.shape, generator=generator).to(dtype)).sum() for g in first)
        leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        leaves |= {f"d{name}": g for name, g in given.items()}
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        assert any(g is not None for g in found)
        return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found)}

    assert_as_accurate(
        second(torch.float32, "cpu"), second(torch.float32, "reference"), second(torch.float64, "reference")
    )


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward_where_an_input_depends_on_another(cell: str) -> None:
    """A sequence in two calls: the state that the second starts from depends on the weights."""
    call, _ = Case(cell, 4, 3, 5, 9).draw()

    def both(dtype: torch.dtype, backend: str, create_graph: bool = True) -> tuple[Tensor, ...]:
        tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in call.tensors().items()}
        leaves = list(tensors.values())
        first = forward(with_tensors(call, tensors), backend)
        states = {name: first[last] for name, last in (("h0", "h_n"), ("c0", "c_n")) if last in first}
        y = forward(with_tensors(call, tensors | states), backend)["y"]
        found = torch.autograd.grad(y.square().sum(), leaves, create_graph=create_graph)
        if not create_graph:
            return found
        loss = torch.stack([gradient.square().sum() for gradient in found]).sum()
        return *found, *torch.autograd.grad(loss, leaves)

    exact = both(torch.float64, "reference")
    assert_as_accurate(both(torch.float32, "cpu"), both(torch.float32, "reference"), exact)
    torch.testing.assert_close(both(torch.float64, "reference", False), exact[: len(exact) // 2])


def test_backward_twice_and_what_it_needs() -> None:
    call, gradients = Case("gru", 4, 3, 5, 9).draw()
    call.weight_hh.requires_grad_()
    y = forward(call, "cpu")["y"]
    y.backward(gradients["y"], retain_graph=True)
    once = call.weight_hh.grad.clone()
    y.backward(gradients["y"])
    assert torch.equal(call.weight_hh.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(gradients["y"])


def test_results_may_be_changed_in_place_before_backward() -> None:
    call, gradients = Case("lstm", 4, 3, 5, 9).draw()
    expected = run(call, "cpu", {"y": gradients["y"]}, ("weight_hh",))["dweight_hh"]
    call.weight_hh.requires_grad_()
    y = forward(call, "cpu")["y"]
    y.mul_(1.0)
    y.backward(gradients["y"])
    assert torch.equal(call.weight_hh.grad, expected)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    call, gradients = Case("lstm", 4, 3, 5, 9).draw()
    call.weight_hh.requires_grad_()
    y = forward(call, "cpu")["y"]
    with torch.no_grad():
        call.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(gradients["y"])


def _function(case: Case) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """The sum of squares of y as a function of x and weight_hh, and values for the two."""
    call, _ = case.draw()

    def function(x: Tensor, weight_hh: Tensor) -> Tensor:
        return forward(replace(call, x=x, weight_hh=weight_hh), "auto")["y"].square().sum()

    return function, call.x, call.weight_hh


@pytest.mark.parametrize("cell", CELLS)
def test_func_grad(cell: str) -> None:
    function, x, weight_hh = _function(Case(cell, 4, 3, 5, 9))
    dx, dweight = torch.func.grad(function, argnums=(0, 1))(x, weight_hh)
    x.requires_grad_(), weight_hh.requires_grad_()
    for result, expected in zip((dx, dweight), torch.autograd.grad(function(x, weight_hh), (x, weight_hh))):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_vmap_over_an_ensemble_of_weights(cell: str) -> None:
    function, x, weight_hh = _function(Case(cell, 4, 3, 5, 9))
    weights = torch.stack([weight_hh, 2 * weight_hh, -weight_hh])
    results = torch.func.vmap(function, in_dims=(None, 0))(x, weights)
    torch.testing.assert_close(results, torch.stack([function(x, weight) for weight in weights]))


@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell: str) -> None:
    call, _ = Case(cell, 4, 3, 5, 9, states=()).draw()

    def loss(weight_hh: Tensor, sample: Tensor) -> Tensor:
        single = replace(call, x=sample.unsqueeze(1), weight_hh=weight_hh)
        return forward(single, "auto")["y"].square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(call.weight_hh, call.x)
    singly = [torch.func.grad(loss)(call.weight_hh, call.x[:, b]) for b in range(3)]
    torch.testing.assert_close(per_sample, torch.stack(singly))


@pytest.mark.parametrize("cell", CELLS)
def test_jvp_is_the_transpose_of_backward(cell: str) -> None:
    function, x, weight_hh = _function(Case(cell, 4, 3, 5, 9, dtype=torch.float64))
    tangents = torch.randn_like(x), torch.randn_like(weight_hh)
    _, forward_mode = torch.func.jvp(function, (x, weight_hh), tangents)
    x.requires_grad_(), weight_hh.requires_grad_()
    gradients = torch.autograd.grad(function(x, weight_hh), (x, weight_hh))
    torch.testing.assert_close(forward_mode, sum((t * g).sum() for t, g in zip(tangents, gradients)))


# Tensors without memory


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cell", CELLS)
def test_fake_tensors(cell: str, packed: bool) -> None:
    case = Case(cell, 4, 3, 5, 9, () if packed else ("lengths", "resets"), packed=packed)
    call, gradients = case.draw()
    expected = run(call, "cpu", gradients)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = with_tensors(call, {name: mode.from_tensor(tensor) for name, tensor in call.tensors().items()})
    with mode:
        results = run(fake, "cpu", {name: mode.from_tensor(g) for name, g in gradients.items()})
    for name, result in results.items():
        assert (result.shape, result.stride()) == (expected[name].shape, expected[name].stride()), name


@pytest.mark.parametrize("cell", CELLS)
def test_meta_tensors(cell: str) -> None:
    call, gradients = Case(cell, 4, 3, 5, 9).draw()
    meta = with_tensors(call, {name: tensor.to("meta") for name, tensor in call.tensors().items()})
    results = run(meta, "auto", {name: gradient.to("meta") for name, gradient in gradients.items()})
    for name, expected in run(call, "cpu", gradients).items():
        assert results[name].shape == expected.shape and results[name].is_meta, name


def test_fp64_runs_where_there_is_no_kernel() -> None:
    call, gradients = Case("gru", 4, 3, 5, 9, dtype=torch.float64).draw()
    results = run(call, "auto", gradients)
    for name, expected in run(converted(call, torch.float64), "reference", gradients).items():
        torch.testing.assert_close(results[name], expected)
