"""Calls of top_k_log_softmax, and what every kernel's results must have in common with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastrnn import reference
from tests.accuracy import assert_as_accurate_over

Call = tuple[Tensor, int, Tensor | None, int, Tensor | None]  # logits, k, scores, group_size, normalizers
Results = tuple[Tensor, Tensor, Tensor]

KINDS = ("plain", "ties", "hidden", "rising", "nan")


def draw(
    kind: str, groups: int, group_size: int, vocabulary: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Call:
    """With scores, without normalizers."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(groups * group_size, vocabulary, generator=generator)
    if kind == "ties":
        logits = logits.round()
    elif kind == "hidden":
        logits[torch.rand(logits.shape, generator=generator) < 0.7] = -torch.inf
    elif kind == "rising":
        logits = logits.sort(-1).values
    elif kind == "nan":
        logits[torch.rand(logits.shape, generator=generator) < 0.5 / vocabulary] = torch.nan
    return logits.to(dtype), k, torch.randn(len(logits), generator=generator), group_size, None


@st.composite
def calls(draw_from: Any, vocabularies: Sequence[int], most_rows: int = 24) -> Call:
    group_size = draw_from(st.integers(1, 6))
    groups = draw_from(st.integers(0, max(1, most_rows // group_size)))
    vocabulary = draw_from(st.sampled_from(vocabularies))
    k = draw_from(st.integers(1, min(50, group_size * vocabulary)))
    dtype = draw_from(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    seed = draw_from(st.integers(0, 2**31))
    logits, k, scores, *_ = draw(draw_from(st.sampled_from(KINDS)), groups, group_size, vocabulary, k, dtype, seed)
    if draw_from(st.booleans()):
        logits = torch.stack([logits, logits], -1)[..., 0]
    elif draw_from(st.booleans()):
        logits = torch.cat([logits, logits], -1)[:, :vocabulary]
    normalizers = torch.randn(len(logits)) if draw_from(st.booleans()) else None
    return logits, k, scores if draw_from(st.booleans()) else None, group_size, normalizers


def assert_selects(found: Results, call: Call) -> None:
    """The reference's tokens, but for those whose values differ by rounding alone: each of these may come first."""
    logits, k, scores, group_size, normalizers = call
    values, indices, used = found
    expected = reference.top_k_log_softmax(*call)
    assert_close = torch.testing.assert_close
    assert_close(used, expected[2], rtol=1e-6, atol=2e-6, equal_nan=True)
    assert_close(values, expected[0], rtol=1e-6, atol=4e-6, equal_nan=True)
    if group_size == 1:  # The logits decide, which nothing has rounded.
        assert torch.equal(indices, expected[1])

    total = group_size * logits.shape[1]
    all_values, all_indices, _ = reference.top_k_log_softmax(logits, total, scores, group_size, normalizers)
    by_index = torch.empty_like(all_values).scatter_(1, all_indices, all_values)
    assert_close(values, by_index.gather(1, indices), rtol=1e-6, atol=4e-6, equal_nan=True)
    # Best first; equal values in the order of their rows.
    equal = (values[:, 1:] == values[:, :-1]) | (values[:, 1:].isnan() & values[:, :-1].isnan())
    in_order = (values[:, 1:] < values[:, :-1]) | values[:, 1:].isnan()
    assert torch.where(equal, (indices // logits.shape[1]).diff() >= 0, in_order).all()

    near = torch.isclose(all_values[:, 1:], all_values[:, :-1], rtol=1e-6, atol=8e-6) & all_values[:, 1:].isfinite()
    alone = ~torch.nn.functional.pad(near, (0, 1))[:, :k]
    alone[:, 1:] &= ~near[:, : k - 1]
    assert torch.equal(indices[alone], expected[1][alone])


def assert_values_as_accurate(
    run: Callable[[Call], Results], groups: int, group_size: int, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    """Values and normalizers are within the bound of tests/accuracy.py."""
    draws = []
    for seed in range(8):
        call = draw("plain", groups, group_size, vocabulary, k, dtype, seed)
        assert call[2] is not None
        exact = reference.top_k_log_softmax(call[0].double(), k, call[2].double(), group_size)
        draws.append(tuple(results[::2] for results in (run(call), reference.top_k_log_softmax(*call), exact)))
    assert_as_accurate_over(draws)
