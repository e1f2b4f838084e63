"""The operator `top_k_log_softmax`: what a step of beam search selects, in one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import native, transforming
from fastrnn.backends.attention.cpu import DTYPES
from fastrnn.backends.call import is_plain
from fastrnn.backends.tensors import address, with_unit_stride
from fastrnn.ops.shared import use_registered_op


def top_k_log_softmax(
    logits: Tensor, k: int, scores: Tensor | None = None, group_size: int = 1
) -> tuple[Tensor, Tensor]:
    """The k largest of scores_r + log softmax(logits_r)_v among the rows r of each group and the tokens v.

    Within a row the logits themselves decide, so that rounding makes no ties; equal ones are taken by the lowest index,
    and so are equal values of several rows.

    Args:
        logits: [G * K, V], of a floating dtype. -inf is a token that is not allowed, and never counts for more than
            -inf. A row with NaN gives NaN, which comes after everything else.
        k: how many; at most K * V.
        scores: [G * K], what each row has so far; float32, or float64 with logits of float64. 0 by default.
        group_size: K, neighbouring rows that compete, such as the beams of a sentence.

    Returns:
        Values [G, k], best first, in float32 (float64 for such logits), and indices [G, k], int64: r * V + v, r being
        the row within the group. Not differentiable.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating dtype, got {logits.dtype}")
    if logits.dim() != 2:
        raise ValueError(f"logits must have 2 dimensions, got shape {tuple(logits.shape)}")
    for name, value in (("k", k), ("group_size", group_size)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rows, vocabulary = logits.shape
    if rows % group_size:
        raise ValueError(f"logits must have a multiple of group_size {group_size} rows, got {rows}")
    if k > group_size * vocabulary:
        raise ValueError(f"k must be at most {group_size * vocabulary}, rows of a group times tokens, got {k}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if scores is not None:
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores must be a torch.Tensor, got {type(scores).__name__}")
        if tuple(scores.shape) != (rows,) or scores.dtype is not dtype:
            raise ValueError(f"scores must be {dtype} of shape {(rows,)}, got {scores.dtype} {tuple(scores.shape)}")
        if scores.device != logits.device:
            raise ValueError(f"scores must be on {logits.device}, got {scores.device}")
    logits, scores = logits.detach(), None if scores is None else scores.detach()
    if transforming():
        return reference.top_k_log_softmax(logits, k, scores, group_size)
    if use_registered_op():
        values, indices = torch.ops.fastrnn.top_k_log_softmax(logits, k, scores, group_size)
        return values, indices
    return _launch(logits, k, scores, group_size)


def _launch(logits: Tensor, k: int, scores: Tensor | None, group_size: int) -> tuple[Tensor, Tensor]:
    library = native.load()
    if library is None or not logits.is_cpu or logits.dtype not in DTYPES or not is_plain(type(logits)):
        values, indices = reference.top_k_log_softmax(logits, k, scores, group_size)
        return values.contiguous(), indices.contiguous()
    groups = logits.shape[0] // group_size
    logits = with_unit_stride(logits)
    scores = None if scores is None else scores.contiguous()
    values = logits.new_empty(groups, k, dtype=torch.float32)
    indices = logits.new_empty(groups, k, dtype=torch.int64)
    library.top_k_log_softmax(
        DTYPES[logits.dtype],
        groups,
        group_size,
        logits.shape[1],
        k,
        logits.data_ptr(),
        logits.stride(0),
        address(scores),
        values.data_ptr(),
        indices.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices


def _fake(logits: Tensor, k: int, scores: Tensor | None, group_size: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0] // group_size, k)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=dtype), logits.new_empty(shape, dtype=torch.int64)


torch.library.define(
    "fastrnn::top_k_log_softmax", "(Tensor logits, SymInt k, Tensor? scores, SymInt group_size) -> (Tensor, Tensor)"
)
torch.library.impl("fastrnn::top_k_log_softmax", "CompositeExplicitAutograd", _launch)
torch.library.register_fake("fastrnn::top_k_log_softmax", _fake)
