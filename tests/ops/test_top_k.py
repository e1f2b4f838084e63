"""The operator top_k_log_softmax: selection, ties, what is not allowed, numbers of any width, errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fastrnn.ops import top_k_log_softmax
from fastrnn.ops.top_k import select
from tests.ops.case import LIBRARY, using_isa
from tests.ops.top_k_case import Call, assert_selects, assert_values_as_accurate, calls

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


@given(calls((1, 2, 15, 16, 17, 100, 2047, 2048, 2049, 4500)))
def test_agrees_with_the_reference(call: Call) -> None:
    for isa, threads in itertools.product(LIBRARY.cpu_isas(), (1, 2)):
        torch.set_num_threads(threads)
        with using_isa(isa):
            assert_selects(select(*call), call)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [7, 300, 9001])
def test_values_are_as_accurate_as_those_of_torch(vocabulary: int, dtype: torch.dtype) -> None:
    assert_values_as_accurate(lambda call: select(*call), 3, 2, vocabulary, 5, dtype)


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
    values, indices = top_k_log_softmax(torch.zeros(2, 2), 4, torch.tensor([torch.nan, -torch.inf]), 2)
    assert indices.tolist() == [[2, 3, 0, 1]]
    assert values[0, :2].tolist() == [-torch.inf] * 2 and values[0, 2:].isnan().all()
    logits = torch.tensor([[torch.nan, 5.0, 1.0], [0.0, -torch.inf, -1.0]])
    values, indices = top_k_log_softmax(logits, 6, torch.tensor([100.0, 0.0]), 2)
    assert indices.tolist() == [[3, 5, 4, 1, 2, 0]]
    assert values[0, :3].isfinite().tolist() == [True, True, False] and values[0, 3:].isnan().all()


def test_infinite_logits_are_certain() -> None:
    values, indices, normalizers = select(torch.tensor([[1.0, torch.inf, 2.0]]), 3)
    assert indices.tolist() == [[1, 2, 0]]
    assert values.isnan().all() and normalizers.isnan()  # as log_softmax has it


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
        logits[row, token] = torch.inf if row == 2 else torch.nan
    logits[5] = -torch.inf
    logits[6], logits[6, 3000] = -torch.inf, torch.nan
    wide = torch.promote_types(dtype, torch.float32)
    values, _, normalizers = select(logits, 3, None, 1, torch.full((8,), 2.0, dtype=wide) if given else None)
    assert normalizers.dtype == values.dtype == wide
    assert normalizers.isnan().tolist() == values.isnan().all(1).tolist() == [True] * 5 + [False, True, False]
    assert (values[5] == -torch.inf).all()
    assert normalizers[5] == (2.0 if given else -math.inf)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_makes_no_ties_within_a_row(threads: int) -> None:
    """Logits that differ less than their values can, the larger ones last, in parts of two threads or one."""
    torch.set_num_threads(threads)
    logits = 1.0 + torch.arange(40000) * 2.0**-23
    expected = [[39999 - i for i in range(5)]]
    assert select(logits[None], 5)[1].tolist() == expected
    assert select(logits[None], 5, None, 1, torch.full((1,), 1000.0))[1].tolist() == expected
    values, indices, _ = select(logits[None].repeat(2, 1), 7, None, 2, torch.full((2,), 1000.0))
    assert (values == values[0, 0]).all()
    assert indices.tolist() == [[39999 - i for i in range(7)]]  # and equal values of two rows are of the first


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
