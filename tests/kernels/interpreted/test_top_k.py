"""The Triton kernels of top_k_log_softmax against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import top_k
from tests.ops.top_k_case import Call, Results, assert_selects, assert_values_as_accurate, calls, draw

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _select(
    logits: Tensor,
    k: int,
    scores: Tensor | None = None,
    group_size: int = 1,
    normalizers: Tensor | None = None,
) -> Results:
    return top_k._launch_triton(logits, k, scores, group_size, normalizers)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several parts cost less time."""
    monkeypatch.setattr(top_k, "pick_parts", lambda vocabulary: top_k.Parts(32, 1))


@settings(max_examples=20)
@given(calls((1, 2, 17, 128, 129, 4096, 4097), most_rows=8))
def test_agrees_with_the_reference(call: Call) -> None:
    assert_selects(_select(*call), call)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["ties", "hidden", "nan"])
@pytest.mark.parametrize(
    ("groups", "group_size", "vocabulary", "k"),
    [(2, 3, 100, 5), (1, 18, 33, 31), (2, 1, 570, 20), (1, 2, 95, 100)],
)
def test_several_parts(kind: str, groups: int, group_size: int, vocabulary: int, k: int) -> None:
    call = draw(kind, groups, group_size, vocabulary, k)
    assert_selects(_select(*call), call)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["plain", "rising"])
def test_more_parts_than_are_summed_at_once(kind: str) -> None:
    call = draw(kind, 1, 1, 1300, 2)
    assert_selects(_select(*call), call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    call = draw("plain", 1, 2, 9001, 128, dtype)
    assert_selects(_select(*call), call)


@pytest.mark.parametrize(
    "vocabulary, dtype", [*((7, dtype) for dtype in DTYPES), (4097, torch.float32), (4097, torch.bfloat16)], ids=str
)
def test_values_are_as_accurate_as_those_of_torch(vocabulary: int, dtype: torch.dtype) -> None:
    assert_values_as_accurate(lambda call: _select(*call), 1, 2, vocabulary, 5, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    """Also of parts and rows."""
    logits = torch.zeros(2, 4100, dtype=dtype)
    assert _select(logits, 7, None, 2)[1].tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    logits[:, [3, 4090, 4095, 4096, 4099]] = 1.0
    assert _select(logits, 7, None, 2)[1].tolist() == [[3, 4090, 4095, 4096, 4099, 4103, 8190]]
    assert _select(torch.tensor([[-0.0, 0.0, -1.0]], dtype=dtype), 2)[1].tolist() == [[0, 1]]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_in_a_row(dtype: torch.dtype) -> None:
    """NaN, -inf and inf in any part, up to a row of nothing else, and both zeros."""
    numbers = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    rare = torch.tensor([0.05, 0.3, 0.05, 1.0, 1.0, 1.0, 1.0])
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        logits = numbers[torch.multinomial(rare, 8 * 45, True, generator=generator)].view(8, 45)
        logits[0], logits[1], logits[2, :40], logits[3, 32:] = -torch.inf, torch.nan, -torch.inf, torch.nan
        logits[4:6] = logits[4:6].nan_to_num(0.0, 2.0, -torch.inf)
        scores = torch.randn(8).masked_fill(torch.arange(8) == 7, torch.nan)
        for normalizers in (None, torch.arange(8.0)):
            call = (logits, 100, scores, 4, normalizers)
            found = _select(*call)
            assert_selects(found, call)
            assert found[2].isnan().tolist() == (~(logits < torch.inf)).any(1).tolist()


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_makes_no_ties_within_a_row(dtype: torch.dtype) -> None:
    """Neighbouring numbers of the type, all with the same value, the largest last."""
    as_integer = torch.int32 if dtype is torch.float32 else torch.int16
    bits = torch.tensor([1.0], dtype=dtype).view(as_integer) + torch.arange(90, dtype=as_integer)
    call = (bits.view(dtype).repeat(2, 1), 19, None, 2, torch.full((2,), 1e8))
    values, indices, _ = _select(*call)
    assert (values == values[0, 0]).all()
    assert indices.tolist() == [[89 - i for i in range(19)]]


def test_normalizers_that_are_given() -> None:
    logits, scores = torch.randn(4, 300), torch.randn(4)
    normalizers = torch.logsumexp(logits, 1)
    banned = logits.masked_fill(torch.rand(logits.shape) < 0.5, -torch.inf)
    call = (banned, 9, scores, 2, normalizers)
    found = _select(*call)
    assert all(torch.equal(a, b) for a, b in zip(found, reference.top_k_log_softmax(*call), strict=True))
    assert torch.equal(found[2], normalizers)


def test_nothing_to_select_from() -> None:
    values, indices, normalizers = _select(torch.empty(0, 5), 3, None, 2)
    assert values.shape == indices.shape == (0, 3) and normalizers.shape == (0,)
    values, indices, normalizers = _select(torch.full((1, 5), -torch.inf), 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] and normalizers.item() == -math.inf
    assert (values == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise_and_apart_from_the_batch(dtype: torch.dtype) -> None:
    logits, k, scores, group_size, _ = draw("plain", 3, 2, 4100, 6, dtype)
    assert scores is not None
    together = _select(logits, k, scores, group_size)
    for found, expected in zip(_select(logits, k, scores, group_size), together, strict=True):
        assert torch.equal(found, expected)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        values, indices, normalizers = _select(logits[rows], k, scores[rows], group_size)
        assert torch.equal(values[0], together[0][group]) and torch.equal(indices[0], together[1][group])
        assert torch.equal(normalizers, together[2][rows])
