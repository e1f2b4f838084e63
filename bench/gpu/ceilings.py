"""What the GPU can do at most, measured in the same run as the suites: memory, matrix products, launches."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.registry import GpuCase
from bench.gpu.timing import Timer
from bench.registry import DTYPES
from bench.timing import Call, digits

COPY_BYTES = 2**30
PRODUCT_SIZE = 8192
GRAPH_LAUNCHES = 200
ROUNDS = 10
Ceilings = dict[str, Any]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """How torch multiplies fp32: TF32 for "tf32", else IEEE."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    _let_cudnn_take_tf32(dtype == "tf32")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        _let_cudnn_take_tf32(before[1])


def _let_cudnn_take_tf32(allowed: bool) -> None:
    # Not by the attribute, which torch's own testing utilities freeze for the whole process.
    torch.backends.cudnn.set_flags(_allow_tf32=allowed, _fp32_precision=None)


def measure(device: str, timer: Timer, copy_bytes: int = COPY_BYTES, product_size: int = PRODUCT_SIZE) -> Ceilings:
    """GB/s of a copy, counting bytes read and bytes written; TFLOP/s of a square product of random matrices by dtype;
    microseconds from launch to launch of a small kernel, called from Python and (on a GPU) inside a CUDA graph."""

    def median(call: Call, calls: int = 1) -> float:
        timer.time(call, calls)
        return statistics.median(timer.time(call, calls) for _ in range(ROUNDS))

    def copy() -> float:
        source = torch.randn(copy_bytes // 4, device=device)
        target = torch.empty_like(source)
        return median(lambda: target.copy_(source))

    def product(dtype: str) -> float:
        a, b = (torch.randn(product_size, product_size, device=device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        with precision(dtype):
            return median(lambda: torch.mm(a, b, out=out))

    found: Ceilings = {
        "copy_gbytes": digits(2 * copy_bytes / copy() / 1e9),
        "tflops": {dtype: digits(2 * product_size**3 / product(dtype) / 1e12) for dtype in DTYPES},
    }
    one = torch.zeros(1, device=device)
    found["launch_us"] = digits(1e6 * median(lambda: one.add_(1), 500))
    if device != "cpu":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_LAUNCHES):
                one.add_(1)
        found["graph_launch_us"] = digits(1e6 * median(graph.replay) / GRAPH_LAUNCHES)
    return found


def floor_seconds(case: GpuCase, ceilings: Ceilings) -> float:
    """No version runs faster: of a sequence the larger of arithmetic and memory traffic, of a step one read of all its
    weights and a launch."""
    if case.mode == "step":
        launch = ceilings.get("graph_launch_us", ceilings["launch_us"])
        return case.all_weight_bytes / (1e9 * ceilings["copy_gbytes"]) + 1e-6 * launch
    arithmetic = case.flops / (1e12 * ceilings["tflops"][case.dtype])
    return max(arithmetic, case.least_bytes / (1e9 * ceilings["copy_gbytes"]))
