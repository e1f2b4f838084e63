"""The operator `top_k_log_softmax`: what a step of beam search selects, in one read of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import top_k, transforming
from fastrnn.ops.shared import use_registered_op


def top_k_log_softmax(
    logits: Tensor, k: int, scores: Tensor | None = None, group_size: int = 1
) -> tuple[Tensor, Tensor]:
    """The k largest of scores_r + log softmax(logits_r)_v among the rows r of each group and the tokens v.

    Within a row the logits themselves decide, so that rounding makes no ties; equal ones are taken by the lowest index,
    and equal values of several rows by the lowest row.

    Args:
        logits: [G * K, V], of a floating dtype. -inf is a token that is not allowed, and never counts for more than
            -inf. A row with NaN or inf, or with a score of NaN, gives NaN, which comes after everything else.
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
    values, indices, _ = select(logits.detach(), k, None if scores is None else scores.detach(), group_size)
    return values, indices


def select(
    logits: Tensor, k: int, scores: Tensor | None = None, group_size: int = 1, normalizers: Tensor | None = None
) -> top_k.Results:
    """As `top_k_log_softmax`, without checks, for steps of a search: nothing that is passed needs gradients.

    Args:
        normalizers: [G * K], in the dtype of the scores: what is subtracted in place of each row's logsumexp. The one
            before tokens were banned; zeros where the logits are log-probabilities already.

    Returns:
        Values, indices, and the normalizers that were subtracted [G * K]: NaN for a row that has NaN or inf, -inf for a
        row of nothing but -inf if they were not given.
    """
    if transforming():
        return reference.top_k_log_softmax(logits, k, scores, group_size, normalizers)
    if use_registered_op():
        values, indices, used = torch.ops.fastrnn.top_k_log_softmax(logits, k, scores, group_size, normalizers)
        return values, indices, used
    return top_k.launch(logits, k, scores, group_size, normalizers)


def _fake(logits: Tensor, k: int, scores: Tensor | None, group_size: int, normalizers: Tensor | None) -> top_k.Results:
    return top_k.new_results(logits, k, group_size)


torch.library.define(
    "fastrnn::top_k_log_softmax",
    "(Tensor logits, SymInt k, Tensor? scores, SymInt group_size, Tensor? normalizers) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("fastrnn::top_k_log_softmax", "CompositeExplicitAutograd", top_k.launch)
torch.library.register_fake("fastrnn::top_k_log_softmax", _fake)
