"""Dropout on a matrix, with the mask of the counter-based generator.

Any floating dtype, any device, differentiable any number of times: the specification of the operator `dropout`.
"""

from __future__ import annotations

from torch import Tensor

from fastrnn.reference.recurrence import zoneout_mask


def dropout(x: Tensor, probability: float, seed: int | Tensor) -> Tensor:
    """x * keep / (1 - probability), x [R, C]; with probability 1, x * 0.

    Whether (row, column) is dropped depends on the seed and on nothing else, as in :func:`zoneout_mask` (stream 2,
    t = 0, the row in the batch's place). As with torch, NaN and infinity stay NaN where they are dropped.
    """
    rows, columns = x.shape
    keep = ~zoneout_mask(probability, seed, 2, 0, rows, columns, x.device)
    return x * keep.to(x.dtype) * keep_scale(probability)


def keep_scale(probability: float) -> float:
    """What the elements that are kept are multiplied by, so that the mean stays."""
    return 1 / (1 - probability) if probability < 1 else 0.0
