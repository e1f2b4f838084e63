"""The one measure of numerical error that the tests use."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def assert_as_accurate(ours: Any, torchs: Any, exact: Any) -> None:
    """Compares nested tuples of tensors: ours and torch's of one dtype, and the exact result, in fp64.

    Ours may be twice as far from the exact result as torch's is, plus the rounding of the largest value:
    err(ours) <= 2 * (err(torch) + eps * max|exact|), err being the largest absolute difference. Of a few elements the
    largest error is a matter of luck: small cases are to be drawn several times and compared together (`pooled`).
    """
    for path, a, b, c in zip(_paths(ours), *map(_pytree.tree_leaves, (ours, torchs, exact)), strict=True):
        assert (a is None) == (c is None), f"{path}: ours {a}, exact {c}"
        if a is None:
            continue
        assert a.shape == c.shape, f"{path}: shape {tuple(a.shape)}, wanted {tuple(c.shape)}"
        assert a.dtype == b.dtype, f"{path}: {a.dtype}, torch's is {b.dtype}"
        if a.numel() == 0:
            continue
        a, b, c = a.detach(), b.detach(), c.detach()
        limit = 2 * (_error(b, c) + torch.finfo(b.dtype).eps * float(c.abs().max()))
        assert _error(a, c) <= limit, f"{path}: error {_error(a, c):.3g}, torch's {_error(b, c):.3g}, limit {limit:.3g}"


def pooled(trees: Sequence[Any]) -> Any:
    """Several nested tuples as one, each of its tensors holding the elements of all."""
    leaves, specs = zip(*map(_pytree.tree_flatten, trees))
    together = [None if group[0] is None else torch.cat([t.reshape(-1) for t in group]) for group in zip(*leaves)]
    return _pytree.tree_unflatten(together, specs[0])


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())  # NaN where found has one, which no limit admits


def _paths(tree: Any) -> list[str]:
    return [_pytree.keystr(path) for path, _ in _pytree.tree_flatten_with_path(tree)[0]]
