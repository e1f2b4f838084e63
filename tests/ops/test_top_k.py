"""The operator top_k_log_softmax: selection, ties, what is not allowed, numbers of any width, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrnn import reference
from fastrnn.ops import top_k_log_softmax
from fastrnn.ops.top_k import select
from tests.ops.case import LIBRARY, using_isa

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")


def brute_force(logits: Tensor, k: int, scores: Tensor, group_size: int) -> tuple[list[list[float]], list[list[int]]]:
    """By sorting every continuation, in Python's floats."""
    values, indices = [], []
    for group in range(logits.shape[0] // group_size):
        candidates = []
        for row in range(group_size):
            own = logits[group * group_size + row].double().tolist()
            largest = max(own)
            total = largest + math.log(sum(math.exp(x - largest) for x in own))
            score = scores[group * group_size + row].item()
            candidates += [(-(x - total + score), row * len(own) + token) for token, x in enumerate(own)]
        best = sorted(candidates)[:k]
        values.append([-value for value, _ in best])
        indices.append([index for _, index in best])
    return values, indices


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("rows", "vocabulary", "k", "group_size"),
    [(1, 1, 1, 1), (6, 7, 5, 3), (5, 129, 129, 1), (8, 2048, 12, 4), (5, 5000, 10, 5), (1, 20000, 3, 1), (3, 2, 6, 3)],
)
def test_selects_what_sorting_everything_does(rows: int, vocabulary: int, k: int, group_size: int) -> None:
    logits, scores = 3 * torch.randn(rows, vocabulary), torch.randn(rows)
    values, indices = top_k_log_softmax(logits, k, scores, group_size)
    expected_values, expected_indices = brute_force(logits, k, scores, group_size)
    assert indices.tolist() == expected_indices
    torch.testing.assert_close(values, torch.tensor(expected_values, dtype=torch.float32), rtol=1e-6, atol=2e-6)


Call = tuple[Tensor, int, Tensor | None, int, Tensor | None]


@st.composite
def calls(draw: Any) -> Call:
    group_size, groups = draw(st.integers(1, 6)), draw(st.integers(0, 4))
    vocabulary = draw(st.sampled_from((1, 2, 15, 16, 17, 100, 2047, 2048, 2049, 4500)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 4 * torch.randn(groups * group_size, vocabulary, generator=generator)
    kind = draw(st.sampled_from(("plain", "ties", "hidden", "rising", "nan")))
    if kind == "ties":
        logits = logits.round()
    elif kind == "hidden":
        logits[torch.rand(logits.shape, generator=generator) < 0.7] = -torch.inf
    elif kind == "rising":
        logits = logits.sort(-1).values
    elif kind == "nan":
        logits[torch.rand(logits.shape, generator=generator) < 0.5 / vocabulary] = torch.nan
    logits = logits.to(draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))))
    if draw(st.booleans()):
        logits = torch.stack([logits, logits], -1)[..., 0]
    scores, normalizers = (
        torch.randn(len(logits), generator=generator) if draw(st.booleans()) else None for _ in range(2)
    )
    return logits, draw(st.integers(1, min(50, group_size * vocabulary))), scores, group_size, normalizers


@given(calls())
def test_agrees_with_the_reference(call: Call) -> None:
    group_size = call[3]
    expected = reference.top_k_log_softmax(*call)
    for isa, threads in itertools.product(LIBRARY.cpu_isas(), (1, 2)):
        torch.set_num_threads(threads)
        with using_isa(isa):
            values, indices, normalizers = select(*call)
        torch.testing.assert_close(normalizers, expected[2], rtol=1e-6, atol=2e-6, equal_nan=True)
        assert torch.equal(values.isnan(), expected[0].isnan())
        torch.testing.assert_close(values, expected[0], rtol=1e-6, atol=4e-6, equal_nan=True)
        # Where rows compete whose values differ by rounding alone, either may come first.
        near = torch.isclose(expected[0][:, 1:], expected[0][:, :-1], rtol=1e-6, atol=4e-6, equal_nan=True)
        if group_size == 1 or not near.any():
            assert torch.equal(indices, expected[1])


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(4, 5000)
    values, indices = top_k_log_softmax(logits, 7, None, 2)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 2
    torch.testing.assert_close(values, torch.full((2, 7), -math.log(5000)))
    logits[:, 4999], logits[1, 3] = 1.0, 1.0
    assert top_k_log_softmax(logits[:2], 3, torch.tensor([0.0, 5.0]), 2)[1].tolist() == [[5003, 9999, 5000]]
    assert top_k_log_softmax(torch.tensor([[-0.0, 0.0]]), 2)[1].tolist() == [[0, 1]]


def test_what_is_not_allowed_stays_so() -> None:
    logits = torch.tensor([[-torch.inf, 1.0], [-torch.inf, -torch.inf]])
    values, indices = top_k_log_softmax(logits, 4, torch.tensor([0.0, 9.0]), 2)
    assert indices.tolist() == [[1, 0, 2, 3]]
    assert values.tolist() == [[0.0, -math.inf, -math.inf, -math.inf]]


def test_nan_comes_last() -> None:
    logits = torch.tensor([[torch.nan, 5.0, 1.0], [0.0, -torch.inf, -1.0]])
    values, indices = top_k_log_softmax(logits, 6, torch.tensor([100.0, 0.0]), 2)
    assert indices.tolist() == [[3, 5, 4, 0, 1, 2]]
    assert values[0, :3].isfinite().tolist() == [True, True, False] and values[0, 3:].isnan().all()


@pytest.mark.usefixtures("isa")
def test_infinite_logits_are_certain() -> None:
    values, indices, normalizers = select(torch.tensor([[1.0, torch.inf, 2.0]]), 3)
    assert indices.tolist() == [[0, 2, 1]] and normalizers.item() == math.inf
    assert values[0, :2].tolist() == [-math.inf, -math.inf]
    assert values[0, 2].isnan()  # as log_softmax has it, which gives NaN for inf - inf


def test_normalizers_that_are_given() -> None:
    """Tokens that are banned after log-softmax leave the others' values alone."""
    logits, scores = torch.randn(4, 300), torch.randn(4)
    normalizers = torch.logsumexp(logits, 1)
    banned = logits.masked_fill(torch.rand(logits.shape) < 0.5, -torch.inf)
    values, indices, used = select(banned, 9, scores, 2, normalizers)
    expected = (torch.log_softmax(logits, 1) + banned - logits + scores[:, None]).view(2, 600).topk(9)
    assert torch.equal(indices, expected.indices) and torch.equal(used, normalizers)
    torch.testing.assert_close(values, expected.values)
    log_probabilities = torch.log_softmax(logits, 1)
    values, indices, used = select(log_probabilities, 1, normalizers=torch.zeros(4))
    assert torch.equal(values, log_probabilities.max(1, keepdim=True).values) and torch.equal(used, torch.zeros(4))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_normalizers_tell_of_broken_rows(given: bool, dtype: torch.dtype) -> None:
    """Wherever the NaN is, and whatever is beside it."""
    vocabulary = 5000
    logits = torch.randn(8, vocabulary, dtype=dtype)
    for row, token in enumerate((0, 17, 2047, 2048, vocabulary - 1)):
        logits[row, token] = torch.nan
    logits[5] = -torch.inf
    logits[6], logits[6, 3000] = -torch.inf, torch.nan
    logits[:3, 7] = torch.inf
    wide = torch.promote_types(dtype, torch.float32)
    values, _, normalizers = select(logits, 3, None, 1, torch.full((8,), 2.0, dtype=wide) if given else None)
    assert normalizers.dtype == values.dtype == wide
    assert normalizers.isnan().tolist() == values.isnan().all(1).tolist() == [True] * 5 + [False, True, False]
    assert (values[5] == -torch.inf).all()
    assert normalizers[5] == (2.0 if given else -math.inf)


@pytest.mark.usefixtures("isa")
def test_a_row_does_not_depend_on_its_batch_nor_on_threads() -> None:
    logits, scores = torch.randn(7, 9000), torch.randn(7)
    together = top_k_log_softmax(logits, 5, scores)
    for row, threads in itertools.product(range(7), (1, 2)):
        torch.set_num_threads(threads)
        alone = top_k_log_softmax(logits[row : row + 1], 5, scores[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))


def test_double() -> None:
    logits = torch.randn(4, 30, dtype=torch.float64)
    values, indices = top_k_log_softmax(logits, 3, torch.zeros(4, dtype=torch.float64), 2)
    expected = torch.log_softmax(logits, -1).view(2, 60).topk(3)
    assert values.dtype == torch.float64 and torch.equal(indices, expected.indices)
    torch.testing.assert_close(values, expected.values)


def test_compiled_and_opcheck() -> None:
    logits, scores = torch.randn(6, 40), torch.randn(6)
    compiled = torch.compile(lambda x, s: top_k_log_softmax(x, 4, s, 3), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(logits, scores), top_k_log_softmax(logits, 4, scores, 3), strict=True):
        assert torch.equal(found, expected)
    for optional in ((scores, 3, None), (None, 2, scores)):
        torch.library.opcheck(torch.ops.fastrnn.top_k_log_softmax, (logits, 4, *optional))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(4, 5).long()}, TypeError, "logits must have a floating dtype, got torch.int64"),
        ({"logits": torch.zeros(5)}, ValueError, r"logits must have 2 dimensions, got shape \(5,\)"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 1.0}, TypeError, "k must be an int, got float"),
        ({"k": 11}, ValueError, "k must be at most 10, rows of a group times tokens, got 11"),
        ({"group_size": 3}, ValueError, "logits must have a multiple of group_size 3 rows, got 4"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores must be torch.float32 of shape \(4,\), got .* \(3,\)"),
        ({"scores": torch.zeros(4).double()}, ValueError, "scores must be torch.float32 .*, got torch.float64"),
        ({"scores": 0.0}, TypeError, "scores must be a torch.Tensor, got float"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        top_k_log_softmax(**{"logits": torch.zeros(4, 5), "k": 2, "group_size": 2, **arguments})
