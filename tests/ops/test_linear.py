"""Products with a weight: accuracy, gradients, independence of the batch, and where torch's operator is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrnn.ops import linear as module
from fastrnn.ops.linear import linear, matmul
from tests.accuracy import assert_as_accurate_over
from tests.ops.case import LIBRARY

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", 0)


def _results(transposed: bool, ours: bool, x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if ours:
        y = linear(x, weight) if transposed else matmul(x, weight)
    else:
        y = x @ (weight.T if transposed else weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), gradient)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows, depth, columns", [(1, 1, 1), (7, 33, 129), (40, 700, 64), (300, 17, 31), (13, 5, 1)])
def test_accuracy(rows: int, depth: int, columns: int, transposed: bool) -> None:
    draws = []
    for _ in range(5):
        x, gradient = torch.randn(rows, depth), torch.randn(rows, columns)
        weight = torch.randn(columns, depth) if transposed else torch.randn(depth, columns)
        exact = _results(transposed, False, x.double(), weight.double(), gradient.double())
        draws.append(
            (
                _results(transposed, True, x, weight, gradient),
                _results(transposed, False, x, weight, gradient),
                exact,
            )
        )
    assert_as_accurate_over(draws)


def test_leading_dimensions_and_strides() -> None:
    x, weight = torch.randn(5, 7, 3).transpose(0, 1)[..., ::2], torch.randn(9, 2)
    assert not x.is_contiguous()
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    torch.testing.assert_close(matmul(x, weight.T), x @ weight.T)
    torch.testing.assert_close(linear(x[:0], weight), x[:0] @ weight.T)


@pytest.mark.usefixtures("isa")
def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = torch.randn(31, 600), torch.randn(70, 600)
    together = linear(x, weight)
    for row in (0, 17, 30):
        assert torch.equal(linear(x[row : row + 1], weight)[0], together[row])


def test_a_changed_weight_is_seen() -> None:
    x, weight = torch.randn(3, 40), torch.randn(20, 40)
    linear(x, weight)
    weight.data.mul_(2)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)


@pytest.mark.parametrize("transposed", [True, False])
def test_double_backward(transposed: bool) -> None:
    function = linear if transposed else matmul

    def second(ours: bool) -> list[Tensor]:
        torch.manual_seed(0)
        x, weight = (torch.randn(n, 4).mul(0.3).requires_grad_() for n in (3, 4))
        y = function(x, weight) if ours else x @ (weight.T if transposed else weight)
        first = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))

    for ours, expected in zip(second(True), second(False), strict=True):
        torch.testing.assert_close(ours, expected)


def test_torchs_operator_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(6, 8), torch.randn(5, 8)

    def refuse(*_: object) -> None:
        raise AssertionError("our kernels were taken")

    monkeypatch.setattr(module._Product, "apply", refuse)
    torch.testing.assert_close(linear(x.double(), weight.double()), x.double() @ weight.double().T)
    torch.testing.assert_close(torch.vmap(linear, (0, None))(x, weight), x @ weight.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype is torch.bfloat16
    monkeypatch.setattr(module, "_SMALL", 10**6)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
