"""What the tests choose of the emulated device, and of how the back end `cuda` uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn.backends import cuda
from tests.ops.case import options_of

MATHS = list(cuda.MATHS)


def dtype_of(math: str) -> torch.dtype:
    return torch.float32 if math == "tf32" else getattr(torch, math)


def cuda_options(cell: str) -> tuple[str, ...]:
    """All that the kernels have for this cell."""
    return tuple(option for option in options_of(cell) if option != "proj_size")


@contextlib.contextmanager
def emulated(**settings: int) -> Iterator[None]:
    """The emulator with these settings: policy, seed, multiprocessors, shared_bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"FASTRNN_EMULATOR_{name.upper()}", str(value))
        cuda._known_chip.cache_clear()
        try:
            yield
        finally:
            cuda._known_chip.cache_clear()


@contextlib.contextmanager
def tile(unit_groups: int, rows: int = cuda.ROW_TILE) -> Iterator[None]:
    """Every launch with blocks of this shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "pick", lambda *_, **__: cuda.Tile(unit_groups, rows))
        yield


@contextlib.contextmanager
def products(math: str) -> Iterator[None]:
    """With "tf32" kernels multiply floats in TF32, and torch does what it does on a GPU then."""
    if math != "tf32":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with _FactorsInTf32():
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class _FactorsInTf32(TorchDispatchMode):
    """Rounds the factors of products of float32 matrices to TF32."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):  # type: ignore[no-untyped-def]
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            arguments = (*arguments[:-2], *map(_in_tf32, arguments[-2:]))
        return function(*arguments, **(named or {}))


def _in_tf32(x: Tensor) -> Tensor:
    """To the nearest with 10 bits after the point, ties away from 0."""
    if x.dtype is not torch.float32:
        return x
    return (x.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
