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
    """As `assert_as_accurate`, for several random draws of one case, err being the mean over the draws.

    The largest error of a few elements is a matter of luck, so that small cases need several draws.
    """
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(draws[0][0])[0]]
    leaves = [[_pytree.tree_leaves(tree) for tree in draw] for draw in draws]
    for index, path in enumerate(paths):
        measured = [_errors_and_scale(path, *(tree[index] for tree in draw)) for draw in leaves]
        ours, torchs, scale = zip(*measured)
        limit = 2 * (sum(torchs) / len(draws) + max(scale))
        error = sum(ours) / len(draws)
        assert error <= limit, f"{path}: error {error:.3g}, torch's {sum(torchs) / len(draws):.3g}, limit {limit:.3g}"


def _errors_and_scale(path: str, ours: Any, torchs: Any, exact: Any) -> tuple[float, float, float]:
    """err(ours), err(torch) and eps * max|exact|."""
    assert (ours is None) == (torchs is None) == (exact is None), f"{path}: {ours}, {torchs}, {exact}"
    if ours is None:
        return 0.0, 0.0, 0.0
    assert ours.shape == torchs.shape == exact.shape, f"{path}: {ours.shape}, {torchs.shape}, {exact.shape}"
    assert ours.dtype == torchs.dtype and exact.dtype == torch.float64, f"{path}: {ours.dtype}, {torchs.dtype}"
    if ours.numel() == 0:
        return 0.0, 0.0, 0.0
    scale = torch.finfo(ours.dtype).eps * float(exact.detach().abs().max())
    return _error(ours, exact), _error(torchs, exact), scale


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).abs().max())  # NaN for a NaN, which no limit admits
