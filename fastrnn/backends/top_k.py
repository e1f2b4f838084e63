"""The back ends of the operator `top_k_log_softmax`: launchers of the kernels, and which of them runs.

Arguments are those of `fastrnn.ops.top_k.select`, already checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import native
from fastrnn.backends.attention.cpu import DTYPES
from fastrnn.backends.call import is_plain
from fastrnn.backends.tensors import address, with_unit_stride

Results = tuple[Tensor, Tensor, Tensor]


def launch(logits: Tensor, k: int, scores: Tensor | None, group_size: int, normalizers: Tensor | None) -> Results:
    """On the kernels where they take these tensors, else on the reference."""
    if is_plain(type(logits)) and logits.dtype in DTYPES and logits.is_cpu and native.load() is not None:
        return _launch_cpu(logits, k, scores, group_size, normalizers)
    values, indices, used = reference.top_k_log_softmax(logits, k, scores, group_size, normalizers)
    return values.contiguous(), indices.contiguous(), used


def new_results(logits: Tensor, k: int, group_size: int) -> Results:
    """Empty."""
    rows = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((rows // group_size, k), dtype=dtype),
        logits.new_empty((rows // group_size, k), dtype=torch.int64),
        logits.new_empty((rows,), dtype=dtype),
    )


def _launch_cpu(logits: Tensor, k: int, scores: Tensor | None, group_size: int, normalizers: Tensor | None) -> Results:
    logits = with_unit_stride(logits)
    scores = None if scores is None else scores.contiguous()
    normalizers = None if normalizers is None else normalizers.contiguous()
    values, indices, used = new_results(logits, k, group_size)
    native.load().top_k_log_softmax(  # type: ignore[union-attr]
        DTYPES[logits.dtype],
        values.shape[0],
        group_size,
        logits.shape[1],
        k,
        logits.data_ptr(),
        logits.stride(0),
        address(scores),
        address(normalizers),
        values.data_ptr(),
        indices.data_ptr(),
        used.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices, used
