"""The Triton kernels of attention against the fp64 reference: results and all gradients.

The grid is thin, since the interpreter takes about 0.1 s for a call: options alone and all at once, the other
dimensions in combination with all.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import AttentionCall
from fastrnn.backends.attention import triton
from fastrnn.backends.attention.call import key_factors
from fastrnn.ops.attention import attention, run_on
from tests.accuracy import assert_as_accurate
from tests.ops.attention_case import OPTIONS, SCORES, AttentionCase, assert_results_as_accurate, run
from tests.ops.case import LAYOUTS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INPUTS = ("query", "keys", "values", "v", "features", "feature_weight")


def _triton(call: AttentionCall, gradients: Mapping[str, Tensor], needs: Any = None) -> dict[str, Tensor]:
    return run(call, "triton", gradients, needs)


def assert_triton_as_accurate(case: AttentionCase, most_draws: int = 2) -> None:
    assert_results_as_accurate(case, _triton, most_draws)


# One dimension each is beyond a tile, in the largest all.
SHAPES = [(1, 1, 1, 1, 1), (2, 1, 129, 7, 5), (2, 7, 5, 129, 7), (1, 18, 67, 70, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_shapes(score: str, shape: tuple[int, ...]) -> None:
    memories, queries, *sizes = shape
    if score == "location":  # A tile has one query then.
        memories, queries = 1, min(queries, 2)
    assert_triton_as_accurate(AttentionCase(score, memories, queries, *sizes))


@pytest.mark.parametrize(
    "score, dtype", [*((score, BF16) for score in SCORES), ("inner", FP16), ("additive", FP16)], ids=str
)
def test_dtypes(score: str, dtype: torch.dtype) -> None:
    assert_triton_as_accurate(AttentionCase(score, 2, 5, 37, 20, options=("lengths",), dtype=dtype))


@pytest.mark.parametrize("queries, keys", [(1, 4099), (20, 200)])
def test_many_keys(queries: int, keys: int) -> None:
    assert_triton_as_accurate(AttentionCase("inner", 1, queries, keys, 9, options=("mask",)), most_draws=1)


@pytest.mark.parametrize("channels", [0, 1, 17, 70])
def test_numbers_of_features(channels: int) -> None:
    assert_triton_as_accurate(AttentionCase("location", 2, 2, 9, 37, channels=channels))


ALL = ("lengths", "query_mask", "causal")


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option(option: str) -> None:
    assert_triton_as_accurate(AttentionCase("inner", 3, 21, 21, 9, options=(option,)))


@pytest.mark.parametrize("options", [ALL, ("lengths", "mask", "length")], ids="+".join)
@pytest.mark.parametrize("score", SCORES)
def test_several_options(score: str, options: tuple[str, ...]) -> None:
    assert_triton_as_accurate(AttentionCase(score, 3, 7, 7, 5, options=options))


@pytest.mark.parametrize("score, memories", [("inner", 3), ("additive", 1)])
def test_several_options_beyond_a_tile(score: str, memories: int) -> None:
    assert_triton_as_accurate(AttentionCase(score, memories, 80, 80, 5, 3, options=("lengths", "causal")), most_draws=1)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("outputs", [("context",), ("weights",), ("context", "weights")], ids="+".join)
@pytest.mark.parametrize("score", ["inner", "additive"])
def test_keys_as_values(score: str, outputs: tuple[str, ...], dtype: torch.dtype) -> None:
    assert_triton_as_accurate(AttentionCase(score, 2, 3, 9, 20, None, outputs=outputs, dtype=dtype))


@pytest.mark.parametrize(
    "score, layout",
    [
        *(("inner", layout) for layout in LAYOUTS if layout != "contiguous"),
        *((score, layout) for score in ("factors", "location") for layout in ("transposed", "strided")),
    ],
)
def test_layouts(score: str, layout: str) -> None:
    assert_triton_as_accurate(AttentionCase(score, 3, 2, 9, 7, options=("lengths", "query_mask"), layout=layout))


@pytest.mark.parametrize("outputs", [("context",), ("weights",)], ids="+".join)
@pytest.mark.parametrize("score", ["inner", "location"])
def test_gradients_of_one_output(score: str, outputs: tuple[str, ...]) -> None:
    assert_triton_as_accurate(AttentionCase(score, 2, 3, 9, 7, options=("lengths",), outputs=outputs))


@pytest.mark.parametrize(
    "score, needed", [("inner", name) for name in INPUTS[:3]] + [("location", name) for name in INPUTS]
)
def test_one_gradient_at_a_time(score: str, needed: str) -> None:
    assert_triton_as_accurate(AttentionCase(score, 2, 3, 9, 7, needs=(needed,)))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_empty(score: str, shape: tuple[int, int, int]) -> None:
    assert_triton_as_accurate(AttentionCase(score, *shape, 4), most_draws=1)


# Additive scores by factors


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_factors_beyond_their_range(queries: int, dtype: torch.dtype) -> None:
    """Large queries and keys cancel, or their factors over- or underflow."""
    case = AttentionCase("factors", 2, queries, 19, 35, spread=20.0, dtype=dtype)
    call, gradients = case.draw()
    call.query[..., 0], call.keys[..., 0] = 44.5, -43.4  # e^{2q} alone overflows,
    call.keys[:, ::3, 1] = 60.0  # and e^{2k}
    call = replace(call, factors=key_factors(call.keys))
    assert call.factors is not None and call.factors.isnan().any()
    exact = run(_double(call), "reference", {name: gradient.double() for name, gradient in gradients.items()})
    assert_as_accurate(run(call, "triton", gradients), run(call, "reference", gradients), exact)


def _double(call: AttentionCall) -> AttentionCall:
    return replace(call, **{name: tensor.double() for name, tensor in call.tensors().items()})


def test_factors_just_within_their_range() -> None:
    """The exponentials keep their digits where they are large."""
    case = AttentionCase("factors", 4, 3, 9, 64)
    call, _ = case.draw()
    call.query += 42.0
    call.keys -= 42.0
    call = replace(call, keys=call.keys.clamp(min=-43.4), query=call.query.clamp(max=43.4))
    call = replace(call, factors=key_factors(call.keys))
    assert call.factors is not None and not call.factors.isnan().any()
    # The factors are rounded to float32 once, and so is each of their products: 3 half units of the last place, each of
    # which moves tanh by at most a quarter of it.
    weights = run_on(replace(call, normalize="length"), "triton")[1]
    exact = run_on(_double(replace(call, normalize="length")), "reference")[1]
    bound = 6e-8 * float(call.v.abs().sum()) / 9
    assert weights is not None and exact is not None
    assert (weights - exact).abs().max() <= bound


@pytest.mark.parametrize("queries", [1, 5])
def test_factors_beyond_their_range_change_no_other_score(queries: int) -> None:
    call, _ = AttentionCase("factors", 1, queries, 9, 35, options=("length",)).draw()
    beyond = call.keys.clone()
    beyond[0, 3, 0] = 60.0
    expected = run_on(call, "triton")[1]
    weights = run_on(replace(call, keys=beyond, factors=key_factors(beyond)), "triton")[1]
    assert weights is not None and expected is not None
    changed = (weights != expected)[0]
    assert changed[:, 3].all() and not changed[:, torch.arange(9) != 3].any()


# Exactly


def _poisoned(x: Tensor | None, unseen: Tensor, value: float) -> Tensor | None:
    return None if x is None else x.masked_fill(unseen[..., None], value)


@pytest.mark.parametrize(
    "options", [("lengths",), ("mask",), ("lengths", "query_mask"), ("causal", "mask")], ids="+".join
)
@pytest.mark.parametrize("score", SCORES)
def test_nothing_unseen_matters(score: str, options: tuple[str, ...]) -> None:
    queries, keys = (9, 9) if "causal" in options else (2, 67 if score == "inner" else 35)
    call, gradients = AttentionCase(score, 3, queries, keys, 7, 5, options=options).draw()
    position = torch.arange(keys)
    seen = torch.ones(3, queries, keys, dtype=torch.bool)
    if call.lengths is not None:
        seen &= position < call.lengths[:, None, None]
    if call.mask is not None:
        if call.mask.dim() == 3:
            call.mask[..., 5] = False
        seen &= call.mask if call.mask.dim() == 3 else call.mask[:, None]
    if call.causal:
        seen &= position <= torch.arange(queries)[:, None]
    never = ~seen.any(1)
    assert never.any()
    results = []
    for value in (0.0, torch.nan):
        poisoned, values = _poisoned(call.keys, never, value), _poisoned(call.values, never, value)
        assert poisoned is not None
        other = replace(call, keys=poisoned, values=values, features=_poisoned(call.features, ~seen, value))
        if score == "factors":
            other.factors = key_factors(poisoned)
        given = {**gradients, "weights": gradients["weights"].masked_fill(~seen, value)}
        results.append(run(other, "triton", given))
    for name, found in results[1].items():
        assert found.isfinite().all() and torch.equal(found, results[0][name]), name
    assert (results[1]["weights"][~seen] == 0).all()
    assert (results[1]["dvalues"][never] == 0).all() and (results[1]["dkeys"][never] == 0).all()


@pytest.mark.parametrize("normalize", ["softmax", "length"])
@pytest.mark.parametrize("score", SCORES)
def test_queries_that_see_nothing(score: str, normalize: str) -> None:
    call, gradients = AttentionCase(score, 3, 4, 40, 7).draw()
    call.mask = torch.ones(3, 4, 40, dtype=torch.bool)
    call.mask[1], call.mask[2, 1] = False, False
    call.query[1] = torch.nan
    found = run(replace(call, normalize=normalize), "triton", gradients)
    for name in ("context", "weights", "dquery"):
        assert (found[name][1] == 0).all() and (found[name][2, 1] == 0).all() and (found[name][0] != 0).any(), name
    for name, result in found.items():
        assert result.isfinite().all(), name


def test_gradients_of_unseen_scores_are_zero() -> None:
    """Beyond a tile, too, for the kernels that read them."""
    call, _ = AttentionCase("inner", 3, 2, 600, 7, options=("query_mask",)).draw()
    call.lengths = torch.tensor([0, 5, 600])
    assert call.mask is not None
    seen = call.mask & (torch.arange(600) < call.lengths[:, None, None])
    weights, gradient = seen / 600, torch.randn(3, 2, 600)
    for causal in (False, True):
        seen = seen & (torch.arange(600) <= torch.arange(2)[:, None]) if causal else seen
        options = (call.lengths, call.mask, causal, call.normalize)
        launcher = triton._Launcher(call.query, call.keys, None, None, None, *options)
        found = launcher.score_gradients(torch.where(seen, 1.0, torch.nan), gradient, weights)
        assert (found[~seen] == 0).all() and (found[seen] != 0).any()


def test_lengths_are_clamped_where_values_cannot_be_looked_at() -> None:
    call, _ = AttentionCase("inner", 3, 2, 9, 7).draw()
    found = run_on(replace(call, lengths=torch.tensor([-3, 99, 4])), "triton")
    wanted = run_on(replace(call, lengths=torch.tensor([0, 9, 4])), "triton")
    for ours, clamped in zip(found, wanted, strict=True):
        assert torch.equal(ours, clamped)


def test_nan_of_what_is_seen_is_passed_on() -> None:
    call, _ = AttentionCase("inner", 3, 2, 40, 7).draw()
    call.keys[0, 3], call.values[1, 35] = torch.nan, torch.nan
    context, weights = run_on(call, "triton")
    assert context[:2].isnan().all() and context[2].isfinite().all()
    assert weights is not None and weights[0].isnan().all() and weights[1:].isfinite().all()


@pytest.mark.parametrize(
    "score, queries",
    [("inner", 1), ("inner", 5), ("inner", 18), ("additive", 5), ("factors", 1), ("factors", 5), ("location", 2)],
)
def test_repeats_bitwise_and_apart_from_the_batch(score: str, queries: int) -> None:
    keys = 67 if score == "inner" else 35
    case = AttentionCase(score, 4, queries, keys, 9, options=("lengths", "query_mask"), dtype=BF16)
    call, gradients = case.draw()
    together = run(call, "triton", gradients)
    for name, result in run(call, "triton", gradients).items():
        assert torch.equal(result, together[name]), name
    for b in (0, 3):
        names = ("query", "keys", "values", "features", "factors", "lengths", "mask")
        parts = {name: None if getattr(call, name) is None else getattr(call, name)[b : b + 1] for name in names}
        alone = run(replace(call, **parts), "triton", {name: given[b : b + 1] for name, given in gradients.items()})
        for name in ("context", "weights", "dquery", "dkeys", "dvalues"):
            assert torch.equal(alone[name][0], together[name][b]), name


# Through the public operator


@pytest.mark.parametrize("queries", [None, 2])
@pytest.mark.parametrize("score", ["general", "additive", "location"])
def test_beams_share_a_memory(score: str, queries: int | None) -> None:
    memories, beams, keys, size = 2, 3, 20, 12
    many = (memories * beams,) if queries is None else (memories * beams, queries)
    drawn = {
        "query": torch.randn(*many, size),
        "keys": torch.randn(memories, keys, size),
        "values": torch.randn(memories, keys, 5),
        "weight": torch.randn(size, size) / size if score == "general" else None,
        "v": None if score == "general" else torch.randn(size),
        "features": torch.randn(*many, keys, 2) if score == "location" else None,
        "feature_weight": torch.randn(size, 2) if score == "location" else None,
    }
    lengths = torch.tensor([20, 13])
    mask = torch.rand(memories * beams, queries or 1, keys) < 0.8

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        given = {name: None if x is None else x.to(dtype).requires_grad_() for name, x in drawn.items()}
        outputs = attention(**given, score=score, lengths=lengths, mask=mask, backend=backend)  # type: ignore[arg-type]
        inputs = [x for x in given.values() if x is not None]
        return [*outputs, *torch.autograd.grad([x.square().sum() for x in outputs if x is not None], inputs)]

    exact = results("reference", torch.float64)
    assert exact[0].shape == (*many, 5) and exact[1].shape == (*many, keys)
    assert_as_accurate(results("triton", FP32), results("reference", FP32), exact)


@pytest.mark.parametrize("score", ["inner", "location"])
def test_registered_operator(score: str) -> None:
    call, gradients = AttentionCase(score, 2, 3, 7, 5, options=("lengths", "query_mask")).draw()
    inputs = call.inputs()
    options = (call.factors, call.lengths, call.mask)
    scalars = (call.causal, call.scale, call.normalize)
    arguments = ("triton", *inputs, *options, *scalars)
    torch.library.opcheck(torch.ops.fastrnn.attention_forward.default, arguments)
    _, weights = torch.ops.fastrnn.attention_forward(*arguments)
    given = ("triton", *gradients.values(), *inputs, *options, weights, *scalars)
    needs = [tensor is not None for tensor in inputs]
    torch.library.opcheck(torch.ops.fastrnn.attention_backward.default, (*given, needs))


def test_compiles_as_one_graph() -> None:
    query, keys, v = torch.randn(4, 3, 5), torch.randn(2, 7, 5), torch.randn(5)
    inputs = [tensor.requires_grad_() for tensor in (query, keys, v)]

    def attend(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
        return attention(query, keys, score="additive", v=v, backend="triton")[0]

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        context = function(*inputs)
        results.append((context, *torch.autograd.grad(context.square().sum(), inputs)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_double_backward_by_way_of_the_reference() -> None:
    query, keys = torch.randn(2, 3, 5), torch.randn(2, 7, 5)

    def second(backend: str, dtype: torch.dtype) -> Tensor:
        q, k = query.to(dtype).requires_grad_(), keys.to(dtype)
        context, weights = attention(q, k, score="scaled_dot", backend=backend)
        assert weights is not None
        (first,) = torch.autograd.grad(context.square().sum() + weights.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    assert_as_accurate(second("triton", FP32), second("reference", FP32), second("reference", torch.float64))


def test_autocast() -> None:
    query, keys = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 7, 5)
    wanted, _ = attention(query, keys, backend="reference")
    with torch.autocast("cpu", BF16):
        context, _ = attention(query, keys, backend="triton")
    assert context.dtype is BF16
    torch.testing.assert_close(context.float(), wanted, atol=3e-2, rtol=0)
    context.float().sum().backward()
    assert query.grad is not None and query.grad.dtype is FP32


# The choice


def test_the_choice() -> None:
    """In the interpreter the kernels take CPU tensors, as they take those on a GPU elsewhere."""
    call, _ = AttentionCase("inner", 2, 3, 7, 5).draw()
    assert backends.choose(call, "triton") == "triton"
    assert triton.why_later(call) is None
    assert "torch's operator" in str(triton.why_later(replace(call, need_weights=False)))
    with pytest.raises(NotImplementedError, match=r"the tensors are torch\.float64"):
        backends.choose(_double(call), "triton")
    with pytest.raises(NotImplementedError, match="vectors of size 0"):
        backends.choose(AttentionCase("additive", 2, 3, 7, 0).draw()[0], "triton")
