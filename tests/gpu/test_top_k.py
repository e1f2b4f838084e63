"""The Triton kernels of top_k_log_softmax on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.ops.top_k import select, top_k_log_softmax
from tests.ops.top_k_case import KINDS, Call, Results, assert_selects, assert_values_as_accurate, draw

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _moved(call: Call) -> Call:
    logits, k, scores, group_size, normalizers = call
    scores, normalizers = (None if tensor is None else tensor.cuda() for tensor in (scores, normalizers))
    return logits.cuda(), k, scores, group_size, normalizers


def _select(call: Call) -> Results:
    values, indices, normalizers = select(*_moved(call))
    return values.cpu(), indices.cpu(), normalizers.cpu()


SHAPES = [  # groups, group_size, vocabulary, k
    (1, 1, 1, 1),
    (5, 1, 129, 1),
    (3, 4, 5, 20),
    (6, 5, 50257, 10),
    (2, 3, 9001, 128),
    (1, 2, 6000, 5000),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: str) -> None:
    call = draw(kind, *shape, dtype)
    assert_selects(_select(call), call)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("vocabulary", [7, 50257])
def test_values_are_as_accurate_as_those_of_torch(vocabulary: int, dtype: torch.dtype) -> None:
    assert_values_as_accurate(_select, 2, 5, vocabulary, 10, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_whatever_is_in_a_row(dtype: torch.dtype) -> None:
    numbers = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    rare = torch.tensor([0.0001, 0.3, 0.0001, 1.0, 1.0, 1.0, 1.0])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logits = numbers[torch.multinomial(rare, 40 * 5000, True, generator=generator)].view(40, 5000)
        logits[0], logits[1], logits[2, :4990], logits[3, 4096:] = -torch.inf, torch.nan, -torch.inf, torch.nan
        scores = torch.randn(40).masked_fill(torch.arange(40) == 7, torch.nan)
        for normalizers in (None, torch.arange(40.0)):
            call = (logits, 100, scores, 4, normalizers)
            found = _select(call)
            assert_selects(found, call)
            assert found[2].isnan().tolist() == (~(logits < torch.inf)).any(1).tolist()


def test_strides() -> None:
    logits = torch.randn(12, 9000, device="cuda")
    for view in (logits[:, 1:7778], logits[::2], logits[:1].expand(6, 9000), logits.T.contiguous().T):
        found, expected = top_k_log_softmax(view, 7), reference.top_k_log_softmax(view.cpu(), 7)
        assert torch.equal(found[1].cpu(), expected[1])
        torch.testing.assert_close(found[0].cpu(), expected[0])


def test_repeats_bitwise_and_apart_from_the_batch() -> None:
    logits, k, scores, group_size, _ = _moved(draw("plain", 30, 5, 32000, 10, BF16))
    assert scores is not None
    together = select(logits, k, scores, group_size)
    for _ in range(5):
        for found, expected in zip(select(logits, k, scores, group_size), together, strict=True):
            assert torch.equal(found, expected)
    for group in (0, 13, 29):
        rows = slice(5 * group, 5 * group + 5)
        values, indices, normalizers = select(logits[rows], k, scores[rows], group_size)
        assert torch.equal(values[0], together[0][group]) and torch.equal(indices[0], together[1][group])
        assert torch.equal(normalizers, together[2][rows])


def test_the_host_never_waits() -> None:
    call = _moved(draw("plain", 4, 5, 9000, 10))
    select(*call)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        select(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("given", [False, True])
def test_cuda_graphs(given: bool) -> None:
    logits, k, scores, group_size, _ = _moved(draw("plain", 4, 5, 9000, 10))
    call = logits, k, scores, group_size, torch.randn(20, device="cuda") if given else None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        select(*call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select(*call)
    for kind in ("nan", "ties"):
        logits.copy_(draw(kind, 4, 5, 9000, 10, seed=1)[0])
        graph.replay()
        expected: tuple[Tensor, ...] = select(*call)
        for found, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_step_of_search_is_three_launches() -> None:
    call = _moved(draw("plain", 4, 5, 9000, 10))
    torch.use_deterministic_algorithms(False)  # which would fill empty tensors, a launch each
    select(*call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        select(*call)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert launched == ["top_k_parts", "top_k_rows", "top_k_groups"], launched
