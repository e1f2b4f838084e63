"""The operator `dropout`: its mask, its derivatives, what it keeps for them, and how it behaves inside torch."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn import reference
from fastrnn.ops import dropout
from fastrnn.reference import zoneout_mask
from tests.ops.case import ISAS, LAYOUTS, using_isa

SEED = 2**62 + 12345
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS or ["reference"])
def any_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set of this machine, or the reference where there is no compiled extension."""
    if not ISAS:
        yield
        return
    with using_isa(request.param):
        yield


def keep(rows: int, columns: int, seed: int = SEED, probability: float = 0.5) -> Tensor:
    """The mask, as the operator shows it on ones."""
    return dropout(torch.ones(rows, columns), probability, seed) != 0


# The numbers


def test_reference_is_its_formula() -> None:
    x = torch.randn(30, 20, dtype=torch.float64)
    dropped = zoneout_mask(0.3, SEED, 2, 0, 30, 20)
    assert 0 < dropped.sum() < dropped.numel()
    torch.testing.assert_close(reference.dropout(x, 0.3, SEED), x.masked_fill(dropped, 0) / 0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("probability", [0.1, 0.3, 0.999, 1])
@pytest.mark.usefixtures("any_isa")
def test_is_the_reference_bit_for_bit(dtype: torch.dtype, layout: str, probability: float) -> None:
    for rows, columns in [(1, 1), (1, 40), (40, 1), (3, 15), (5, 16), (7, 17), (64, 100), (300, 513), (0, 4), (4, 0)]:
        x = LAYOUTS[layout](torch.randn(rows, columns).to(dtype))
        result, expected = dropout(x, probability, SEED), reference.dropout(x, probability, SEED)
        assert result.dtype is dtype and result.is_contiguous()
        assert torch.equal(result, expected), (rows, columns)


@pytest.mark.usefixtures("any_isa")
def test_one_mask_for_every_dtype_and_number_of_threads() -> None:
    masks = []
    for dtype in DTYPES:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            masks.append(dropout(torch.ones(301, 257, dtype=dtype), 0.4, SEED) != 0)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.usefixtures("any_isa")
def test_nan_and_infinity_are_torchs() -> None:
    for value in (math.nan, math.inf, -math.inf):
        result = dropout(torch.full((20, 30), value), 0.5, SEED)
        expected = torch.full((20, 30), value).where(keep(20, 30), math.nan)
        torch.testing.assert_close(result, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_defaults_make_no_difference(dtype: torch.dtype) -> None:
    x = torch.randn(6, 17).to(dtype)
    expected = dropout(x, 0.4, SEED)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = [function(x, 0.4, SEED) for function in (dropout, reference.dropout)]
    finally:
        torch.set_default_dtype(torch.float32)
    for result in results:
        assert result.dtype is dtype and torch.equal(result, expected)


def test_probability_zero_and_one() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    assert dropout(x, 0, SEED) is x and dropout(x, 0.0, SEED) is x
    result = dropout(x, 1.0, SEED)
    assert torch.equal(result, torch.zeros(4, 5))
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], torch.zeros(4, 5))


# The mask


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_mask_has_its_probability_and_no_pattern(probability: float) -> None:
    mask = keep(2048, 512, SEED, probability).double()
    expected, sigma = 1 - probability, math.sqrt(probability * (1 - probability))
    assert abs(mask.mean() - expected) < 4 * sigma / math.sqrt(mask.numel())
    for dim in (0, 1):
        line = mask.mean(1 - dim)  # each row and column by itself
        deviations = (line - expected) / (sigma / math.sqrt(mask.shape[1 - dim]))
        assert deviations.abs().max() < 5 and 0.9 < deviations.std() < 1.1
        for lag in (1, 2, 7, 16, 64):
            a, b = mask.narrow(dim, 0, mask.shape[dim] - lag), mask.narrow(dim, lag, mask.shape[dim] - lag)
            covariance = ((a - expected) * (b - expected)).mean()
            assert abs(covariance) < 4 * sigma**2 / math.sqrt(a.numel())


def test_any_two_rows_and_any_two_columns_are_independent() -> None:
    mask = keep(2048, 512).double() * 2 - 1
    for lines in (mask[:400], mask.T[:400]):
        correlation = (lines @ lines.T / math.sqrt(lines.shape[1])).tril(-1)
        pairs = correlation[torch.ones_like(correlation).tril(-1) > 0]  # 79 800 numbers of a normal distribution
        assert pairs.abs().max() < 5.5
        assert pairs.mean().abs() < 5 / math.sqrt(len(pairs)) and 0.98 < pairs.std() < 1.02


def test_mask_depends_on_seed_row_and_column_alone() -> None:
    mask = keep(300, 200)
    assert torch.equal(mask[:77, :33], keep(77, 33))
    assert (keep(300, 200, SEED, 0.6) <= mask).all()  # what 0.5 drops, 0.6 drops too
    for other in (SEED + 1, SEED - 1, SEED ^ 2**31, SEED ^ 2**32, SEED ^ 2**61, 0):
        agreeing = (mask == keep(300, 200, other)).double().mean()
        assert abs(agreeing - 0.5) < 4 * 0.5 / math.sqrt(mask.numel()), other
    for stream in (0, 1):  # zoneout's
        agreeing = (mask == ~zoneout_mask(0.5, SEED, stream, 0, 300, 200)).double().mean()
        assert abs(agreeing - 0.5) < 4 * 0.5 / math.sqrt(mask.numel()), stream


# Derivatives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("any_isa")
def test_backward_draws_the_same_mask_again(dtype: torch.dtype) -> None:
    x, gradient = torch.randn(65, 130).to(dtype).requires_grad_(), torch.randn(65, 130).to(dtype)
    (found,) = torch.autograd.grad(dropout(x, 0.3, SEED), x, gradient)
    assert torch.equal(found, reference.dropout(gradient, 0.3, SEED))
    (found,) = torch.autograd.grad(dropout(x, 0.3, SEED).sum(), x)  # whose gradient is one number, expanded
    assert torch.equal(found, reference.dropout(torch.ones_like(x), 0.3, SEED).detach())


def test_nothing_is_kept_for_backward() -> None:
    kept: list[Tensor] = []
    x = torch.randn(20, 30, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda packed: packed):
        (gradient,) = torch.autograd.grad(dropout(x, 0.3, SEED).sum(), x, create_graph=True)
    assert not kept and gradient.count_nonzero() > 0


def test_gradcheck() -> None:
    x = torch.randn(6, 17, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return dropout(x * x.sin(), 0.4, SEED)

    assert torch.autograd.gradcheck(function, x, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x, check_batched_grad=True)


def test_double_backward() -> None:
    x, gradient = (torch.randn(6, 17, requires_grad=True) for _ in range(2))
    (first,) = torch.autograd.grad(dropout(x, 0.4, SEED), x, gradient, create_graph=True)
    given = torch.randn(6, 17)
    (second,) = torch.autograd.grad(first, gradient, given)
    assert torch.equal(second, reference.dropout(given, 0.4, SEED))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batched_gradients(dtype: torch.dtype) -> None:
    x, gradients = torch.randn(6, 17).to(dtype).requires_grad_(), torch.randn(5, 6, 17).to(dtype)
    (found,) = torch.autograd.grad(dropout(x, 0.4, SEED), x, gradients, is_grads_batched=True)
    assert torch.equal(found, torch.stack([reference.dropout(gradient, 0.4, SEED) for gradient in gradients]))


# Inside torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    torch.library.opcheck(torch.ops.fastrnn.dropout, (LAYOUTS[layout](torch.randn(6, 17).to(dtype)), 0.4, SEED))


def test_compiles_to_one_operator_each_way_and_keeps_no_mask() -> None:
    torch._dynamo.reset()
    recorded = AotEagerAndRecordGraphs()

    def function(x: Tensor) -> Tensor:
        return dropout(x, 0.4, int(torch.randint(2**63 - 1, ())))

    compiled = torch.compile(function, fullgraph=True, backend=recorded)
    results = []
    for run in (function, compiled):
        torch.manual_seed(5)
        x = torch.linspace(1, 2, 6 * 17).view(6, 17).requires_grad_()
        y = run(x)
        y.sum().backward()
        results.append((y, x.grad))
    assert all(torch.equal(found, expected) for found, expected in zip(*results))
    (forward,), (backward,) = recorded.fw_graphs, recorded.bw_graphs
    for graph in (forward, backward):
        assert sum("fastrnn.dropout" in str(node.target) for node in graph.graph.nodes) == 1
    outputs = [node.meta.get("val") for node in forward.graph.output_node().args[0]]
    assert sum(isinstance(value, Tensor) and value.dim() > 0 for value in outputs) == 1


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    x = torch.randn(6, 17, requires_grad=True)
    compiled = torch.compile(lambda x: dropout(x.T * 2, 0.4, SEED).relu() + 1, fullgraph=True)
    results = [run(x) for run in (lambda x: dropout(x.T * 2, 0.4, SEED).relu() + 1, compiled)]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(*(torch.autograd.grad(result.square().sum(), x) for result in results))


def test_transforms() -> None:
    x, tangent = torch.randn(3, 6, 17), torch.randn(6, 17)
    mask = keep(6, 17, SEED, 0.4) / 0.6
    torch.testing.assert_close(torch.vmap(lambda x: dropout(x, 0.4, SEED))(x), x * mask)
    torch.testing.assert_close(torch.func.grad(lambda x: dropout(x, 0.4, SEED).sum())(x[0]), mask)
    for result in torch.func.jvp(lambda x: dropout(x, 0.4, SEED), (tangent,), (tangent,)):
        torch.testing.assert_close(result, tangent * mask)


def test_jit_trace_records_torchs_operators() -> None:
    traced = torch.jit.trace(lambda x: dropout(x, 0.4, SEED), torch.randn(6, 17))
    x = torch.randn(6, 17)
    torch.testing.assert_close(traced(x), dropout(x, 0.4, SEED))


def test_tensors_without_memory() -> None:
    x = torch.randn(17, 6).T
    mode = FakeTensorMode()
    with mode:
        fake = dropout(mode.from_tensor(x), 0.4, SEED)
    for result in (fake, dropout(x.to("meta"), 0.4, SEED)):
        assert (result.shape, result.stride(), result.dtype) == (x.shape, (17, 1), x.dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": [[1.0]]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must have a floating dtype, got torch.int64"),
        ({"x": torch.ones(3)}, ValueError, r"x must have 2 dimensions, got shape \(3,\)"),
        ({"probability": "0.5"}, TypeError, "probability must be a number, got str"),
        ({"probability": True}, TypeError, "probability must be a number, got bool"),
        ({"probability": -0.1}, ValueError, r"probability must lie in \[0, 1\], got -0.1"),
        ({"probability": math.nan}, ValueError, r"probability must lie in \[0, 1\], got nan"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ({"seed": None}, TypeError, "seed must be an integer, got NoneType"),
        ({"seed": -1}, ValueError, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, ValueError, r"seed must lie in \[0, 2\*\*63\), got 9223372036854775808"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dropout(**({"x": torch.ones(3, 4), "probability": 0.5, "seed": SEED} | arguments))
