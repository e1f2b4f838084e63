"""The one measure of numerical error that the tests use."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def assert_as_accurate(ours: Any, torchs: Any, exact: Any) -> None:
    """Compares nested tuples of tensors: ours and torch's of one dtype, and the exact result, in fp64.

    Ours may be twice as far from the exact result as torch's is, plus the rounding of the largest value:
    err(ours) <= 2 * (err(torch) + eps * max|exact|), err being the largest absolute difference.
    """
    assert_as_accurate_over([(ours, torchs, exact)])


def assert_as_accurate_over(draws: Sequence[tuple[Any, Any, Any]]) -> None:
    """As `assert_as_accurate`, for several random draws of one case.

    The largest error of a few elements is a matter of luck. So small cases are drawn several times, and the means are
    compared of the errors in units of max|exact|.
    """
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(draws[0][0])[0]]
    leaves = [[_pytree.tree_leaves(tree) for tree in draw] for draw in draws]
    for index, path in enumerate(paths):
        errors = [_relative_errors(path, *(tree[index] for tree in draw)) for draw in leaves]
        ours, limit = (sum(column) / len(draws) for column in zip(*errors))
        assert ours <= limit, f"{path}: error {ours:.3g}, limit {limit:.3g}, in units of the largest value"


def _relative_errors(path: str, ours: Tensor | None, torchs: Tensor | None, exact: Tensor | None) -> tuple[float, float]:
    """err(ours) and what it may be, both divided by max|exact|."""
    assert (ours is None) == (torchs is None) == (exact is None), f"{path}: {ours}, {torchs}, {exact}"
    if ours is None or torchs is None or exact is None:
        return 0.0, 0.0
    assert ours.shape == torchs.shape == exact.shape, f"{path}: {ours.shape}, {torchs.shape}, {exact.shape}"
    assert ours.dtype == torchs.dtype and exact.dtype == torch.float64, f"{path}: {ours.dtype}, {torchs.dtype}"
    if ours.numel() == 0:
        return 0.0, 0.0
    error, torchs_error = (float((found.detach().double() - exact.detach()).abs().max()) for found in (ours, torchs))
    scale = float(exact.detach().abs().max())
    limit = 2 * (torchs_error + torch.finfo(ours.dtype).eps * scale)
    return error / (scale or 1.0), limit / (scale or 1.0)  # A NaN in ours makes the error NaN, which no limit admits.
