"""The Triton kernels of attention on a GPU, against the fp64 reference: results and all gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import AttentionCall
from fastrnn.backends.attention.call import key_factors
from fastrnn.ops.attention import attention, run_on
from tests.accuracy import assert_as_accurate
from tests.ops.attention_case import (
    OPTIONS,
    SCORES,
    AttentionCase,
    assert_results_as_accurate,
    on_device,
    run,
    with_tensors,
)
from tests.ops.case import LAYOUTS

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _on_gpu(call: AttentionCall, gradients: Mapping[str, Tensor]) -> tuple[AttentionCall, dict[str, Tensor]]:
    return on_device(call, "cuda"), {name: gradient.cuda() for name, gradient in gradients.items()}


def _triton(call: AttentionCall, gradients: Mapping[str, Tensor], needs: Any = None) -> dict[str, Tensor]:
    moved, given = _on_gpu(call, gradients)
    return {name: result.cpu() for name, result in run(moved, "triton", given, needs).items()}


def assert_accurate(case: AttentionCase, most_draws: int = 4) -> None:
    assert_results_as_accurate(case, _triton, most_draws)


SHAPES = [  # memories, queries, keys, sizes of keys and values
    (1, 1, 1, 1, 1),
    (3, 1, 129, 7, 5),
    (2, 7, 5, 129, 7),
    (16, 5, 50, 1000, 1000),
    (2, 100, 131, 64, 70),
    (2, 3, 5000, 40, 40),
]


# Compiling takes most of the time, so that float16, which differs in nothing but the conversions, has one shape.
@pytest.mark.parametrize(
    "shape, dtype", [*((shape, dtype) for dtype in (FP32, BF16) for shape in SHAPES), (SHAPES[4], FP16)], ids=str
)
@pytest.mark.parametrize("score", SCORES)
def test_shapes(score: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_accurate(AttentionCase(score, *shape, options=("lengths",), dtype=dtype))


@pytest.mark.parametrize("channels", [1, 17, 70])
def test_many_features(channels: int) -> None:
    assert_accurate(AttentionCase("location", 2, 9, 70, 130, channels=channels))


@pytest.mark.parametrize(
    "options",
    [*((option,) for option in OPTIONS), ("lengths", "query_mask", "causal"), ("lengths", "mask", "causal", "length")],
    ids="+".join,
)
@pytest.mark.parametrize("score", SCORES)
def test_options(score: str, options: tuple[str, ...]) -> None:
    assert_accurate(AttentionCase(score, 4, 100, 100, 40, options=options))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("outputs", [("context",), ("weights",), ("context", "weights")], ids="+".join)
@pytest.mark.parametrize("score", ["inner", "additive"])
def test_keys_as_values(score: str, outputs: tuple[str, ...], dtype: torch.dtype) -> None:
    assert_accurate(AttentionCase(score, 2, 3, 70, 40, None, outputs=outputs, dtype=dtype))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("score", SCORES)
def test_layouts(score: str, layout: str) -> None:
    assert_accurate(AttentionCase(score, 3, 4, 40, 20, options=("lengths", "query_mask"), layout=layout))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_empty(score: str, shape: tuple[int, int, int]) -> None:
    assert_accurate(AttentionCase(score, *shape, 4))


@pytest.mark.parametrize("queries", [1, 5])
def test_factors_beyond_their_range(queries: int) -> None:
    call, gradients = AttentionCase("factors", 4, queries, 50, 300, spread=20.0).draw()
    call.query[..., 0], call.keys[..., 0] = 44.5, -43.4  # e^{2q} alone overflows,
    call.keys[:, ::3, 1] = 60.0  # and e^{2k}
    call = replace(call, factors=key_factors(call.keys))
    assert call.factors is not None and call.factors.isnan().any()
    doubled = {name: gradient.double() for name, gradient in gradients.items()}
    exact = run(with_tensors(call, Tensor.double), "reference", doubled)
    assert_as_accurate(_triton(call, gradients), run(call, "reference", gradients), exact)


@pytest.mark.parametrize("score", SCORES)
def test_nothing_unseen_matters(score: str) -> None:
    call, gradients = AttentionCase(score, 4, 20, 100, 40).draw()
    call.lengths = torch.tensor([100, 33, 0, 64])
    unseen = torch.arange(100) >= call.lengths[:, None]
    results = []
    for value in (0.0, torch.nan):
        keys = call.keys.masked_fill(unseen[..., None], value)
        assert call.values is not None
        other = replace(call, keys=keys, values=call.values.masked_fill(unseen[..., None], value))
        if call.features is not None:
            other.features = call.features.masked_fill(unseen[:, None, :, None], value)
        if call.factors is not None:
            other.factors = key_factors(keys)
        results.append(_triton(other, gradients))
    for name, found in results[1].items():
        assert found.isfinite().all() and torch.equal(found, results[0][name]), name
    for name in ("context", "weights", "dquery"):
        assert (results[1][name][2] == 0).all(), name


@pytest.mark.parametrize("queries", [1, 5, 40])
@pytest.mark.parametrize("score", SCORES)
def test_repeats_bitwise_and_apart_from_the_batch(score: str, queries: int) -> None:
    case = AttentionCase(score, 20, queries, 150, 70, options=("lengths", "query_mask"), dtype=BF16)
    call, gradients = _on_gpu(*case.draw())
    together = run(call, "triton", gradients)
    for _ in range(5):
        for name, result in run(call, "triton", gradients).items():
            assert torch.equal(result, together[name]), name
    for b in (0, 7, 19):
        names = ("query", "keys", "values", "features", "factors", "lengths", "mask")
        parts = {name: None if getattr(call, name) is None else getattr(call, name)[b : b + 1] for name in names}
        alone = run(replace(call, **parts), "triton", {name: given[b : b + 1] for name, given in gradients.items()})
        for name in ("context", "weights", "dquery", "dkeys", "dvalues"):
            assert torch.equal(alone[name][0], together[name][b]), name


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("score", ["inner", "location"])
def test_tf32_is_used_where_torch_is_told_to(score: str, queries: int) -> None:
    call, _ = AttentionCase(score, 4, queries, 100, 256, channels=32).draw()
    exact = run_on(with_tensors(call, Tensor.double), "reference")[1]
    moved = on_device(call, "cuda")
    plain = run_on(moved, "triton")[1]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        fast = run_on(moved, "triton")[1]
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact is not None and plain is not None and fast is not None
    plain_error, fast_error = ((x.cpu() - exact).abs().max() for x in (plain, fast))
    assert plain_error * 10 < fast_error < 0.1


@pytest.mark.parametrize("score", SCORES)
def test_the_host_never_waits(score: str) -> None:
    call, gradients = _on_gpu(*AttentionCase(score, 3, 5, 40, 20, options=("lengths", "query_mask")).draw())
    run(call, "triton", gradients)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call, "triton", gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("score", SCORES)
def test_cuda_graphs(score: str) -> None:
    call, _ = _on_gpu(*AttentionCase(score, 3, 5, 40, 20, options=("lengths",)).draw())
    call.query.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def step() -> tuple[Tensor, Tensor]:
        context, _ = run_on(call, "triton")
        return context, torch.autograd.grad(context, call.query, torch.ones_like(context))[0]

    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call.query.copy_(torch.randn_like(call.query))
    expected = step()
    for _ in range(2):
        graph.replay()
        for found, wanted in zip(captured, expected, strict=True):
            assert torch.equal(found, wanted)


def test_beams_share_a_memory() -> None:
    query, keys, v = torch.randn(12, 300), torch.randn(3, 50, 300), torch.randn(300)
    lengths = torch.tensor([50, 20, 0])

    def results(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in (query, keys, v)]
        factors = key_factors(inputs[1])
        context, weights = attention(
            *inputs[:2], score="additive", v=inputs[2], factors=factors, lengths=lengths.to(device), backend=backend
        )
        assert weights is not None
        found = torch.autograd.grad(context.square().sum() + weights.square().sum(), inputs)
        return [x.cpu() for x in (context, weights, *found)]

    exact = results("reference", "cpu", torch.float64)
    assert_as_accurate(results("triton", "cuda", FP32), results("reference", "cpu", FP32), exact)


def test_autocast() -> None:
    query = torch.randn(4, 3, 20, device="cuda", requires_grad=True)
    keys = torch.randn(2, 70, 20, device="cuda")
    wanted, _ = attention(query, keys, score="scaled_dot", backend="reference")
    with torch.autocast("cuda", BF16):
        context, _ = attention(query, keys, score="scaled_dot", backend="triton")
    assert context.dtype is BF16
    torch.testing.assert_close(context.float(), wanted, atol=3e-2, rtol=0)
    context.float().sum().backward()
    assert query.grad is not None and query.grad.dtype is FP32


def test_what_auto_picks() -> None:
    for score in SCORES:
        call = on_device(AttentionCase(score, 2, 3, 70, 20).draw()[0], "cuda")
        assert backends.choose(call) == "triton"
    call = on_device(AttentionCase("inner", 2, 3, 70, 20).draw()[0], "cuda")
    assert backends.choose(replace(call, need_weights=False)) == "aten"
    lengths = torch.tensor([70, 3], device="cuda")
    assert backends.choose(replace(call, need_weights=False, lengths=lengths)) == "triton"


def test_a_step_of_decoding_is_two_launches() -> None:
    query, keys, v = (torch.randn(*shape, device="cuda") for shape in ((12, 300), (3, 50, 300), (300,)))
    torch.use_deterministic_algorithms(False)  # which would fill empty tensors, a launch each
    with torch.no_grad():
        attention(query, keys, score="additive", v=v)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            attention(query, keys, score="additive", v=v)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert sorted(launched) == ["attention_additive_scores", "attention_context"], launched
