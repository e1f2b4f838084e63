"""The reference of attention against the lectures' formulas, in loops over Python's numbers; its derivatives."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn.reference import attended_keys, attention, attention_scores

B, TQ, TK, D, DV, C = 2, 3, 4, 5, 2, 2

Vector = list[float]
Matrix = list[Vector]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def inner(x: Vector, y: Vector) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def times(matrix: Matrix, x: Vector) -> Vector:
    return [inner(row, x) for row in matrix]


def plus(*vectors: Vector) -> Vector:
    return [sum(parts) for parts in zip(*vectors, strict=True)]


def tanh(x: Vector) -> Vector:
    return [math.tanh(a) for a in x]


def softmax(e: Vector) -> Vector:
    total = sum(math.exp(a) for a in e)
    return [math.exp(a) / total for a in e]


def weighted_sum(weights: Vector, values: Matrix) -> Vector:
    return [sum(a * value[i] for a, value in zip(weights, values, strict=True)) for i in range(len(values[0]))]


def check(
    found: tuple[Tensor, Tensor],
    score: Callable[[int, int, int], float],
    values: Tensor,
    seen: Callable[[int, int, int], bool] = lambda b, t, s: True,
    normalize: str = "softmax",
) -> None:
    """Contexts and weights, by softmax or by length, of the scores e(b, t, s)."""
    context, weights = found
    for b, t in [(b, t) for b in range(weights.shape[0]) for t in range(weights.shape[1])]:
        places = [s for s in range(weights.shape[2]) if seen(b, t, s)]
        expected, summed = [0.0] * weights.shape[2], [0.0] * values.shape[-1]
        if places:
            e = [score(b, t, s) for s in places]
            a = softmax(e) if normalize == "softmax" else [x / len(places) for x in e]
            for s, weight in zip(places, a, strict=True):
                expected[s] = weight
            summed = weighted_sum(a, [values[b, s].tolist() for s in places])
        assert weights[b, t].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert context[b, t].tolist() == pytest.approx(summed, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("normalize", ["softmax", "length"])
def test_inner_products(normalize: str) -> None:
    """A3, a_ti = <h_i, h_t> divided by n, and A4, its softmax."""
    q, h = randn(B, TQ, D), randn(B, TK, D)
    check(
        attention(q, h, h, normalize=normalize),
        lambda b, t, s: inner(q[b, t].tolist(), h[b, s].tolist()),
        h,
        normalize=normalize,
    )


def test_bilinear() -> None:
    """A5, sim(x, y) = x W y."""
    q, h, w = randn(B, TQ, 3), randn(B, TK, D), randn(3, D)
    check(attention(q @ w, h, h), lambda b, t, s: inner(q[b, t].tolist(), times(w.tolist(), h[b, s].tolist())), h)


def test_additive() -> None:
    """A6, e_ij = v . tanh(W s_{i-1} + U h_j)."""
    s_, h, w, u, v = randn(B, TQ, 3), randn(B, TK, DV), randn(D, 3), randn(D, DV), randn(D)

    def score(b: int, t: int, s: int) -> float:
        summed = plus(times(w.tolist(), s_[b, t].tolist()), times(u.tolist(), h[b, s].tolist()))
        return inner(v.tolist(), tanh(summed))

    check(attention(s_ @ w.T, h @ u.T, h, v), score, h)


@pytest.mark.parametrize("kind", ["location", "coverage"])
def test_features_of_previous_weights(kind: str) -> None:
    """A7, with a convolution of three taps over the weights before, and the sum of all weights before."""
    q, k, h, v = randn(B, TQ, D), randn(B, TK, D), randn(B, TK, DV), randn(D)
    taps, f = randn(C, 3), randn(D, C if kind == "location" else 1)
    state = torch.zeros(B, TK, dtype=torch.float64)
    for t in range(TQ):
        features = [
            [
                [sum(taps[c, j].item() * _at(state[b].tolist(), s + j - 1) for j in range(3)) for c in range(C)]
                if kind == "location"
                else [state[b, s].item()]
                for s in range(TK)
            ]
            for b in range(B)
        ]

        def score(b: int, _: int, s: int, features: Any = features, t: int = t) -> float:
            summed = plus(q[b, t].tolist(), k[b, s].tolist(), times(f.tolist(), features[b][s]))
            return inner(v.tolist(), tanh(summed))

        given = torch.tensor(features, dtype=torch.float64).unsqueeze(1)
        context, weights = attention(q[:, t : t + 1], k, h, v, given, f)
        check((context, weights), score, h)
        state = weights[:, 0] if kind == "location" else state + weights[:, 0]


def _at(x: Vector, index: int) -> float:
    return x[index] if 0 <= index < len(x) else 0.0


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(causal: bool) -> None:
    """A8, softmax <x_j, x_i> of the inputs themselves; A9, softmax <q_j, k_i> / sqrt(d) of their projections."""
    x, w_q, w_k, w_v = randn(B, TK, 3), randn(D, 3), randn(D, 3), randn(DV, 3)

    def seen(b: int, t: int, s: int) -> bool:
        return s <= t or not causal

    check(attention(x, x, x, causal=causal), lambda b, t, s: inner(x[b, t].tolist(), x[b, s].tolist()), x, seen)
    values = torch.tensor(
        [[times(w_v.tolist(), x[b, s].tolist()) for s in range(TK)] for b in range(B)], dtype=torch.float64
    )

    def score(b: int, t: int, s: int) -> float:
        q, k = times(w_q.tolist(), x[b, t].tolist()), times(w_k.tolist(), x[b, s].tolist())
        return inner(q, k) / math.sqrt(D)

    projected = (x @ w_q.T, x @ w_k.T, x @ w_v.T)
    check(attention(*projected, causal=causal, scale=1 / math.sqrt(D)), score, values, seen)


LENGTHS = torch.tensor([3, 0])


@pytest.mark.parametrize("normalize", ["softmax", "length"])
@pytest.mark.parametrize("given", ["lengths", "mask", "query_mask", "all"])
def test_what_is_seen(normalize: str, given: str) -> None:
    q, k, v = randn(B, TK, D), randn(B, TK, D), randn(B, TK, DV)
    mask = torch.rand(B, TK if given in ("query_mask", "all") else 1, TK) < 0.6
    mask[0, 0] = False
    options: dict[str, Any] = {
        "lengths": {"lengths": LENGTHS},
        "mask": {"mask": mask},
        "query_mask": {"mask": mask},
        "all": {"lengths": LENGTHS, "mask": mask, "causal": True},
    }[given]

    def seen(b: int, t: int, s: int) -> bool:
        inside = s < LENGTHS[b].item() if "lengths" in options else True
        allowed = bool(mask[b, t if mask.shape[1] > 1 else 0, s]) if "mask" in options else True
        return inside and allowed and (s <= t or "causal" not in options)

    for b, t, s in [(b, t, s) for b in range(B) for t in range(TK) for s in range(TK)]:
        assert attended_keys(TK, k, **options)[b, t, s].item() == seen(b, t, s)
    check(
        attention(q, k, v, normalize=normalize, **options),
        lambda b, t, s: inner(q[b, t].tolist(), k[b, s].tolist()),
        v,
        seen,
        normalize,
    )


def leaves() -> dict[str, Tensor]:
    shapes = {
        "query": (B, TQ, D),
        "keys": (B, TK, D),
        "values": (B, TK, DV),
        "v": (D,),
        "features": (B, TQ, TK, C),
        "feature_weight": (D, C),
    }
    return {name: randn(*shape).requires_grad_() for name, shape in shapes.items()}


SCORES = {"dot": 3, "additive": 4, "location": 6}  # how many of the leaves it has


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", ["softmax", "length"])
def test_derivatives(score: str, normalize: str) -> None:
    inputs = tuple(leaves().values())[: SCORES[score]]
    for lengths in (None, LENGTHS):

        def run(*inputs: Tensor, lengths: Tensor | None = lengths) -> tuple[Tensor, Tensor]:
            return attention(*inputs, lengths=lengths, normalize=normalize)

        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", ["softmax", "length"])
def test_nan_that_nobody_sees(score: str, normalize: str) -> None:
    found = []
    for filler in (0.0, math.nan):
        torch.manual_seed(1)
        given = leaves()
        with torch.no_grad():
            for name, axis in {"keys": 1, "values": 1, "features": 2}.items():
                for b in range(B):
                    given[name].select(0, b).narrow(axis - 1, int(LENGTHS[b]), TK - int(LENGTHS[b])).fill_(filler)
        inputs = list(given.values())[: SCORES[score]]
        context, weights = attention(*inputs, lengths=LENGTHS, normalize=normalize)
        assert (context[1] == 0).all() and (weights[1] == 0).all()
        gradients = torch.autograd.grad(context.square().sum() + weights.square().sum(), inputs)
        for name, gradient in zip(given, gradients):
            assert name in ("v", "feature_weight") or (gradient[1] == 0).all()
        found.append((context, weights, *gradients))
    for zero, nan in zip(*found):
        assert torch.equal(zero, nan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """Their exponentials overflow: e^1000 exceeds float64."""
    q, k = torch.tensor([[[1000.0]]], dtype=dtype), torch.tensor([[[1.0], [-1.0], [1.0]]], dtype=dtype)
    context, weights = attention(q, k, k, mask=torch.tensor([[[True, True, False]]]))
    assert weights.tolist() == [[[1, 0, 0]]] and context.tolist() == [[[1]]]


def test_scores_alone() -> None:
    q, k, v = randn(B, TQ, D), randn(B, TK, D), randn(D)
    dot, additive = attention_scores(q, k, scale=0.5), attention_scores(q, k, v)
    assert dot[1, 2, 3].item() == pytest.approx(0.5 * inner(q[1, 2].tolist(), k[1, 3].tolist()))
    expected = inner(v.tolist(), tanh(plus(q[1, 2].tolist(), k[1, 3].tolist())))
    assert additive[1, 2, 3].item() == pytest.approx(expected)
