"""Tensors as all launchers of kernels take and make them.

A sequence has a row for each step and sequence of the batch: [T, B, n], batch-major in memory or not, or [N, n] packed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def time_strides(sequence: Tensor) -> tuple[int, int]:
    """Elements from step to step and from row to row; packed data have rows only."""
    return (sequence.stride(0), sequence.stride(1)) if sequence.dim() == 3 else (0, sequence.stride(0))


def as_float32(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, as the CPU kernels take states, biases, masks and parameters of options."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def is_batch_major(sequence: Tensor) -> bool:
    if sequence.dim() == 2:
        return False
    steps, batch, _ = sequence.shape
    return batch > 1 and steps > 1 and sequence.stride(0) < sequence.stride(1)


def like_rows(sequence: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty sequence with so many columns, its rows in the order of another. By default of its dtype."""
    if sequence.dim() == 2:
        return sequence.new_empty(sequence.shape[0], columns, dtype=dtype)
    steps, batch, _ = sequence.shape
    if is_batch_major(sequence):
        return sequence.new_empty(batch, steps, columns, dtype=dtype).transpose(0, 1)
    return sequence.new_empty(steps, batch, columns, dtype=dtype)


def new_gradients(
    x: Tensor, weight_hh: Tensor, hidden: int, batch: int, needs: list[bool], weight: torch.dtype, state: torch.dtype
) -> list[Tensor | None]:
    """Empty gradients of RecurrenceCall.inputs; None where `needs` is False."""
    rows, outputs = weight_hh.shape
    inputs = x.shape[-1]
    shapes: list[tuple[int, ...]] = [(rows, inputs), (rows, outputs), (rows,), (rows,)]
    shapes += [(batch, outputs), (batch, hidden)] + [(rows,)] * 4 + [(hidden,)] * 2 + [(3 * hidden,), (outputs, hidden)]
    dtypes = [weight] * 4 + [state] * 2 + [weight] * 8
    rest = [
        x.new_empty(shape, dtype=dtype) if need else None
        for shape, dtype, need in zip(shapes, dtypes, needs[1:], strict=True)
    ]
    return [like_rows(x, inputs) if needs[0] else None, *rest]
