"""The k best continuations of groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_log_softmax(
    logits: Tensor,  # [G * K, V]
    k: int,
    scores: Tensor | None = None,  # [G * K]
    group_size: int = 1,  # K
    normalizers: Tensor | None = None,  # [G * K]; None: logsumexp of the logits
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of scores_r + logits_rv - normalizer_r in each group of K rows, best first: values and indices
    r V + v within the group [G, k]. And the normalizers [G * K].

    In at least float32. Within a row by the logits themselves, equal ones by the lowest index; equal values of several
    rows by the lowest row. A logit of -inf gives -inf whatever the others are. In a row that has NaN or inf every value
    is NaN, and so is the normalizer; with a score of NaN every value. NaN comes last.
    """
    rows, vocabulary = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = min(k, vocabulary)
    if normalizers is None:
        normalizers = torch.logsumexp(logits, -1)
    normalizers = torch.where((logits < torch.inf).all(1), normalizers, torch.nan)
    tokens = _best_first(logits)[:, :kept]
    best = logits.gather(1, tokens)
    values, broken = best - normalizers[:, None], normalizers.isnan()
    if scores is not None:
        values, broken = values + scores.to(values.dtype)[:, None], broken | scores.isnan()
    values = torch.where((best == -torch.inf) & ~broken[:, None], best, values)
    indices = tokens + (torch.arange(rows, device=logits.device) % group_size * vocabulary)[:, None]
    values, indices = (found.reshape(-1, group_size * kept) for found in (values, indices))
    order = _best_first(values)[:, :k]
    return values.gather(1, order), indices.gather(1, order), normalizers


def _best_first(values: Tensor) -> Tensor:
    """Indices that sort each row: the largest first, equal ones as they come, NaN after everything else."""
    broken = values.isnan()
    order = torch.sort(values.masked_fill(broken, -torch.inf), dim=-1, descending=True, stable=True).indices
    return order.gather(1, torch.sort(broken.gather(1, order).to(torch.uint8), dim=-1, stable=True).indices)
