"""The contract of beam_search: against all sequences, whatever the batch, and where nothing is as it should be."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrnn.search import BeamResult, Shared, beam_search, expand
from tests.search.oracle import BOS, Toy, assert_agree, divisor, log_softmax, run, toy

EOS = 0
BASE: dict[str, Any] = {"beam_size": 3, "n_best": 3, "eos": EOS, "max_length": 5}
# One of each path from logits to candidates.
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "banned": {"banned_tokens": [3]},
    "repetition": {"repetition_penalty": 1.3},
    "prefix": {"prefix": torch.tensor([[2, 4]] * 3)},
    "groups": {"groups": 3, "diversity": 0.5},
    "coverage": {"coverage_penalty": "wu", "stepwise_coverage": True},
    "ancestral": {"sample": "ancestral"},
    "gumbel": {"sample": "gumbel"},
}


def assert_same(found: BeamResult, wanted: BeamResult, rows: list[int] | None = None) -> None:
    """That results are bitwise equal, `rows` of what is wanted; lengths of padding may differ."""
    steps = min(found.tokens.shape[-1], wanted.tokens.shape[-1])
    for name, part, other in zip(BeamResult._fields, found, wanted):
        assert (part is None) == (other is None)
        if part is None or other is None:
            continue
        other = other if rows is None else other[rows]
        if part.dim() > 2:
            assert int(found.lengths.max()) <= steps
            part, other = part[:, :, :steps], other[:, :, :steps]
        assert torch.equal(part, other), name


def every_sequence(model: Toy, sentence: int, ends: list[int], longest: int) -> list[tuple[float, tuple[int, ...]]]:
    """All sequences that end, or are cut at the longest, with their log-probabilities."""
    found: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(model.logits.shape[-1]), repeat=length):
            inside = any(token in ends for token in tokens[:-1])
            if inside or (length < longest and tokens[-1] not in ends):
                continue
            rows = [log_softmax(model.after(sentence, tokens[:t], BOS)[0]) for t in range(length)]
            found.append((sum(row[token] for row, token in zip(rows, tokens)), tokens))
    return found


@pytest.mark.parametrize("early_stopping", ["exact", "heuristic"])
@pytest.mark.parametrize("penalty", ["none", "power", "gnmt", "average"])
@pytest.mark.parametrize(("vocabulary", "longest", "ends"), [(3, 4, [0]), (4, 3, [0, 2]), (2, 5, [1]), (5, 1, [0])])
def test_enough_beams_search_everything(
    vocabulary: int, longest: int, ends: list[int], penalty: str, early_stopping: str
) -> None:
    beams = vocabulary**longest
    model = toy(vocabulary=vocabulary, seed=longest)
    options: dict[str, Any] = {"length_penalty": penalty, "early_stopping": early_stopping, "word_reward": 0.1}
    result = run([model], beam_size=beams, n_best=beams, eos=ends, max_length=longest, **options)
    for sentence in range(3):
        ranked = [
            (total / divisor(penalty, None, len(tokens)) + 0.1 * len(tokens), tokens)
            for total, tokens in every_sequence(model, sentence, ends, longest)
        ]
        ranked.sort(reverse=True)
        count = len(ranked)
        assert (result.scores[sentence, count:] == -math.inf).all() and (result.lengths[sentence, count:] == 0).all()
        assert result.scores[sentence, :count].tolist() == pytest.approx([score for score, _ in ranked])
        lengths = result.lengths[sentence].tolist()
        found = [tuple(row[:n]) for row, n in zip(result.tokens[sentence].tolist(), lengths)][:count]
        assert found == [tokens for _, tokens in ranked]


@pytest.mark.parametrize("early_stopping", ["exact", "heuristic", "first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_beam_is_greedy(dtype: torch.dtype, early_stopping: str) -> None:
    batch, longest = 7, 9
    model = toy(batch=batch, vocabulary=11, dtype=dtype, sharpness=1.0)
    result = run([model], beam_size=1, eos=[EOS, 3], max_length=longest, early_stopping=early_stopping, pad=-1)
    seen = set()
    for sentence in range(batch):
        said: list[int] = []
        while len(said) < longest and (not said or said[-1] not in (EOS, 3)):
            said.append(int(torch.tensor(model.after(sentence, said, BOS)[0]).argmax()))
        seen.add(len(said))
        assert result.tokens[sentence, 0].tolist() == said + [-1] * (result.tokens.shape[-1] - len(said))
        assert result.lengths[sentence].tolist() == [len(said)]
    assert len(seen) > 2


@pytest.mark.parametrize("path", PATHS)
def test_fewer_are_a_prefix_of_more(path: str) -> None:
    model = toy()
    for stop in ("exact", "heuristic", "first"):
        options = BASE | PATHS[path] | {"beam_size": 6, "early_stopping": stop, "length_penalty": "gnmt"}
        many = run([model], **options | {"n_best": 6})
        for n_best in range(1, 6):
            few = run([model], **options | {"n_best": n_best})
            assert_same(few, BeamResult(*(None if part is None else part[:, :n_best] for part in many)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
def test_what_a_sentence_gets_does_not_depend_on_its_batch(path: str, dtype: torch.dtype) -> None:
    """Bitwise: alone, among 64, in any order, with mates that go on for longer or have other prefixes."""
    batch = 64
    model = toy(batch=batch, vocabulary=33, source=7, dtype=dtype, sharpness=1.5)
    given = PATHS[path]
    seed = {"seed": torch.randint(2**60, (batch,))} if "sample" in given else {}
    own = {
        "max_length": torch.randint(1, 9, (batch,)),
        "min_length": torch.randint(0, 3, (batch,)),
        "source_lengths": torch.randint(0, 8, (batch,)),
        "bos": torch.randint(0, 33, (batch,)),
        **seed,
    }
    if "prefix" in given:
        own["prefix"] = torch.randint(1, 33, (batch, 4))
        own["prefix_lengths"] = torch.minimum(torch.randint(0, 5, (batch,)), own["max_length"])
    options = {"beam_size": 3, "n_best": 3, "eos": EOS, "length_penalty": "gnmt", "need_alignments": True, **given}
    together = run([model], **options | own)
    for rows in ([0], [63], [17], [5, 4, 3], torch.randperm(batch).tolist()):
        of_rows = {name: value[rows] for name, value in own.items()}
        assert_same(run([model], rows, **options | of_rows), together, rows)


@pytest.mark.parametrize("path", PATHS)
def test_when_the_host_looks_changes_nothing(path: str) -> None:
    model = toy(batch=9, vocabulary=7)
    lengths = {"max_length": torch.arange(3, 12), "seed": 3}
    given = {name: value[[0]].expand(9, -1) if name == "prefix" else value for name, value in PATHS[path].items()}
    options = BASE | lengths | given | {"need_alignments": True}
    wanted = run([model], **options)
    for every in (1, 2, 3, 7, 11, 100):
        assert_same(run([model], **options, sync_every=every), wanted)


@settings(max_examples=25)
@given(st.data())
def test_scores_are_what_the_model_gives_the_tokens(data: st.DataObject) -> None:
    model = toy(batch=4, seed=data.draw(st.integers(0, 50)))
    penalty = data.draw(st.sampled_from(("none", "average", "gnmt")))
    path = data.draw(st.sampled_from([path for path in PATHS if path not in ("repetition", "coverage")]))
    given = {name: value[[0]].expand(4, -1) if name == "prefix" else value for name, value in PATHS[path].items()}
    result = run([model], **BASE | given, length_penalty=penalty)
    for sentence, place in itertools.product(range(4), range(3)):
        length = int(result.lengths[sentence, place])
        if not length:
            continue
        said = result.tokens[sentence, place, :length].tolist()
        each = [log_softmax(model.after(sentence, said[:t], BOS)[0])[token] for t, token in enumerate(said)]
        assert result.log_probs[sentence, place, :length].tolist() == pytest.approx(each)
        wanted = sum(each) / divisor(penalty, None, length)
        assert float(result.scores[sentence, place]) == pytest.approx(wanted)


# States


class Nested(NamedTuple):
    row: Tensor
    more: Any


@pytest.mark.parametrize("beams", [1, 3])
def test_states_are_any_trees(beams: int) -> None:
    """Every tensor follows its beam, what is shared its sentence; the rest is passed on."""
    model = toy(batch=5)
    marker = object()

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        inner = state["inner"]
        own, table = inner.more[1], state["shared"].value["table"]
        assert inner.more[0] is None and state["marker"] is marker and state["count"] == len(model.rows_seen)
        assert torch.equal(own["sentence"].float(), inner.row[:, 1, 0])
        assert torch.equal(table, own["sentence"][::beams]) and table.data_ptr() != own["sentence"].data_ptr()
        assert torch.equal(own["seen"], inner.row[:, 0, 0].long())
        logits, own, weights = model.step(tokens, own)
        row = torch.stack([own["seen"], own["sentence"]], 1)[..., None].expand(-1, -1, 2).float()
        after = {"inner": Nested(row, (None, own)), "marker": marker, "count": state["count"] + 1}
        return logits, {**after, "shared": state["shared"]}, weights

    own = model.state(beams)
    row = torch.stack([own["seen"], own["sentence"]], 1)[..., None].expand(-1, -1, 2).float()
    state = {
        "inner": Nested(row, (None, own)),
        "marker": marker,
        "count": 0,
        "shared": Shared({"table": torch.arange(5)}),
    }
    options: dict[str, Any] = {
        "beam_size": beams,
        "n_best": beams,
        "eos": EOS,
        "max_length": torch.tensor([6, 2, 4, 1, 5]),
    }
    found = beam_search(step, state, batch_size=5, bos=BOS, **options)
    model.rows_seen.clear()
    assert_same(found, run([model], **options))


def test_states_without_tensors() -> None:
    table = torch.randn(3, 4)
    found = beam_search(
        lambda tokens, state: (table[min(state, 2)].expand(len(tokens), -1), state + 1),
        0,
        batch_size=2,
        beam_size=2,
        bos=1,
        eos=0,
        max_length=4,
    )
    assert found.lengths.shape == (2, 1) and torch.equal(found.scores[0], found.scores[1])


def test_expand_repeats_for_neighbouring_beams() -> None:
    tree = {"a": torch.arange(4).view(2, 2), "b": (None, 3, torch.arange(2))}
    found = expand(tree, 2)
    assert found["a"].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert found["b"][:2] == (None, 3) and found["b"][2].tolist() == [0, 0, 1, 1]
    assert expand(tree["a"], 2, dim=1).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert expand(tree, 1)["a"] is tree["a"]


def test_sentences_that_are_done_leave() -> None:
    model = toy(batch=4)
    model.logits[..., EOS] = -math.inf
    run([model], **BASE | {"max_length": torch.tensor([1, 4, 2, 4])})
    assert model.rows_seen == [12, 9, 6, 6]
    model.rows_seen.clear()
    run([model], **BASE | {"max_length": torch.tensor([1, 4, 2, 4])}, sync_every=3)
    assert model.rows_seen == [12, 12, 12, 6]
    model.rows_seen.clear()
    run([model], **BASE | {"max_length": torch.tensor([0, 1, 0, 2])})
    assert model.rows_seen == [12, 3]


def test_progress() -> None:
    model = toy(batch=4)
    model.logits[..., EOS] = -math.inf
    calls: list[tuple[int, int]] = []

    def progress(steps: int, left: int) -> None:
        calls.append((steps, left))

    options = BASE | {"max_length": torch.tensor([1, 4, 2, 4])}
    run([model], **options, progress=progress)
    assert calls == [(1, 3), (2, 2), (3, 2), (4, 0)]
    calls.clear()
    run([model], **options, progress=progress, sync_every=3)
    assert calls == [(3, 2), (4, 0)]


# What is odd


def constant(*logits: float, batch: int = 1, dtype: torch.dtype = torch.float64) -> Toy:
    """The same logits at every step."""
    row = torch.tensor(logits, dtype=dtype)
    return Toy(row.expand(batch, 1, -1).clone(), torch.ones(batch, 1, 1, dtype=dtype))


def test_all_candidates_end() -> None:
    """Nothing goes on: no slot of a beam that is not there may be read."""
    model = constant(1.0, -math.inf, 0.0)
    result = run([model], beam_size=4, n_best=4, eos=[0, 2], max_length=5)
    assert result.tokens.tolist() == [[[0], [2], [0], [0]]] and result.lengths.tolist() == [[1, 1, 0, 0]]
    assert result.scores[0, :2].tolist() == pytest.approx(log_softmax([1.0, 0.0]))
    assert (result.scores[0, 2:] == -math.inf).all() and (result.log_probs[0, 2:] == 0).all()
    assert model.rows_seen == [4]


@pytest.mark.parametrize("path", [path for path in PATHS if "prefix" not in path])
def test_more_beams_than_tokens(path: str) -> None:
    model = toy(vocabulary=4, sharpness=1.0)
    result = run([model], **BASE | PATHS[path] | {"beam_size": 12, "n_best": 12})
    assert (result.scores > -math.inf).sum(1).min() > 6
    found = [tuple(tokens.tolist()) for tokens in result.tokens[0]]
    if path not in ("groups", "ancestral"):
        assert len(set(found)) == 12


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("prefix", "groups")])
def test_fewer_valid_tokens_than_beams(path: str) -> None:
    """Two sequences have any probability: "2 0" and "0"; beams beyond them are none."""
    model = toy(batch=3, vocabulary=6)
    model.logits[..., [1, 3, 4, 5]] = -math.inf
    result = run([model], **BASE | PATHS[path] | {"beam_size": 6, "n_best": 6, "max_length": 2})
    for tokens, lengths, scores in zip(result.tokens.tolist(), result.lengths.tolist(), result.scores):
        found = [tuple(row[:n]) for row, n in zip(tokens, lengths) if n]
        assert set(found) <= {(0,), (2, 0), (2, 2)} and (scores[: len(found)] > -math.inf).all()
        assert (scores[len(found) :] == -math.inf).all()
        if path != "ancestral":
            assert len(found) == 3


@pytest.mark.parametrize("path", PATHS)
def test_nothing_may_come_next(path: str) -> None:
    """Where all logits of a step are -inf a beam dies; of a sentence whose beams all die nothing is left."""
    model = toy(batch=3)
    model.logits[1] = -math.inf
    given = PATHS[path]
    result = run([model], **BASE | given | {"n_best": 2})
    assert result.lengths[1].tolist() == [0, 0] and result.scores[1].tolist() == [-math.inf] * 2
    assert (result.tokens[1] == EOS).all() and (result.log_probs[1] == 0).all()
    intact = toy(batch=3)
    assert_same(
        BeamResult(*(part[[0, 2]] for part in result[:4]), None), run([intact], **BASE | given | {"n_best": 2}), [0, 2]
    )


def test_a_dead_beam_among_others() -> None:
    """After "2" nothing may come; what is left is found as if it were not there."""
    model = toy(batch=4, vocabulary=5)
    model.logits[:, model.place([2])] = -math.inf
    for options in ({}, {"banned_tokens": [4]}, {"groups": 3}, {"length_penalty": "average"}):
        result = assert_agree([model], **BASE, **options)
        assert not ((result.tokens[..., 0] == 2) & (result.lengths > 0)).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("every", [1, 4])
def test_nan_and_inf_are_refused_by_the_sentences_number(path: str, value: float, every: int) -> None:
    """Also after other sentences have left."""
    model = toy(batch=3)
    model.logits[..., EOS] = -math.inf
    t = 2

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        logits, own, weights = model.step(tokens, state)
        if len(model.rows_seen) == t + 1:
            logits = logits.clone()
            logits[(own["sentence"] == 2).nonzero()[0], 4] = value
        return logits, own, weights

    options = BASE | PATHS[path] | {"max_length": torch.tensor([2, 5, 5]), "sync_every": every}
    with pytest.raises(ValueError, match=r"step must return logits without NaN and inf, got some for sentences \[2\]"):
        beam_search(step, model.state(3), batch_size=3, bos=BOS, **options)


@pytest.mark.parametrize("path", PATHS)
def test_nan_where_nobody_looks(path: str) -> None:
    """In rows of dead beams, and of sentences that are done."""
    model, given = toy(batch=3), PATHS[path]
    options = BASE | given | {"max_length": torch.tensor([2, 5, 4]), "sync_every": 5}
    wanted = run([model], **options)
    calls = 0

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        nonlocal calls
        logits, own, weights = model.step(tokens, state)
        logits = logits.clone()
        if calls == 0 and given.get("sample") != "ancestral":
            # One beam of a sentence, or group, lives at first.
            dead = torch.arange(9) % 3 > 0 if given.get("groups", 1) == 1 else torch.zeros(9, dtype=torch.bool)
            logits[dead] = math.nan
        if calls >= 2:
            logits[own["sentence"] == 0] = math.nan
        calls += 1
        return logits, own, weights

    assert_same(beam_search(step, model.state(3), batch_size=3, bos=BOS, **options), wanted)


def test_pad_zero_is_not_the_end_token() -> None:
    model = toy(vocabulary=5)
    result = run([model], **BASE | {"eos": [4, 2], "pad": 0})
    behind = torch.arange(result.tokens.shape[-1]) >= result.lengths.unsqueeze(-1)
    assert behind.any() and (result.tokens[behind] == 0).all()
    by_default = run([model], **BASE | {"eos": [4, 2]})
    assert (by_default.tokens[behind] == 4).all()
    assert torch.equal(by_default.tokens[~behind], result.tokens[~behind])


def test_token_zero_may_be_a_word() -> None:
    """Neither end, nor pad, nor what dead beams hold, is 0 by itself."""
    model = toy(vocabulary=5, seed=2)
    result = assert_agree([model], **BASE | {"eos": 3, "pad": 0})
    inside = torch.arange(result.tokens.shape[-1]) < result.lengths.unsqueeze(-1)
    assert (result.tokens[inside] == 0).any()


def test_equal_logits_are_taken_by_the_lowest_index() -> None:
    model = constant(0.0, 0.0, 0.0, 0.0, batch=2, dtype=torch.float32)
    for options in ({}, {"banned_phrases": [[2, 2, 2]]}):
        result = run([model], beam_size=3, n_best=3, eos=3, max_length=2, **options)
        assert result.tokens.tolist() == [[[0, 0], [0, 1], [0, 2]]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    model = toy(dtype=dtype)
    found = assert_agree([model], **BASE, need_alignments=True)
    assert found.scores.dtype is found.log_probs.dtype is torch.float32
    assert_agree([model], **BASE, repetition_penalty=1.5, coverage_penalty="summary")


@pytest.mark.parametrize(
    ("batch", "longest"),
    [(2, 0), (2, torch.zeros(2, dtype=torch.int64)), (0, 0), (0, 3), (0, torch.zeros(0, dtype=torch.int64))],
)
@pytest.mark.parametrize("path", [path for path in PATHS if path != "prefix"])
def test_nothing_to_do(batch: int, longest: Any, path: str) -> None:
    """An empty batch, or hypotheses of no tokens: the step is never asked."""
    model = toy(batch=2)
    result = run([model], list(range(batch)), **BASE | PATHS[path] | {"max_length": longest})
    assert result.tokens.shape == result.log_probs.shape == (batch, 3, 0)
    assert result.lengths.tolist() == [[0] * 3] * batch and result.scores.tolist() == [[-math.inf] * 3] * batch
    assert result.tokens.dtype is result.lengths.dtype is torch.int64
    assert model.rows_seen == []


def test_gradients_are_not_kept() -> None:
    table = torch.randn(3, 5, requires_grad=True)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        return table[state], state

    found = beam_search(step, torch.zeros(4, dtype=torch.int64), batch_size=2, beam_size=2, bos=0, eos=0, max_length=3)
    assert not found.scores.requires_grad


def test_very_different_scores() -> None:
    """-1e30 is a number like any other, and less than none of the sentinels that others use for -inf."""
    model = constant(-1e30, 0.0, -5e29)
    result = run([model], beam_size=3, n_best=3, eos=EOS, max_length=2)
    assert result.tokens.tolist() == [[[1, 1], [1, 2], [2, 1]]]
    result = run([model], beam_size=1, eos=EOS, max_length=3, banned_tokens=[1, 2])
    assert result.tokens.tolist() == [[[0]]] and result.scores.item() == -1e30


# Errors


def step_of_four(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    return torch.zeros(len(tokens), 4), state


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"batch_size": -1}, ValueError, "batch_size must be at least 0, got -1"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got float"),
        ({"beam_size": 0}, ValueError, "beam_size must be at least 1, got 0"),
        ({"beam_size": True}, TypeError, "beam_size must be an int, got bool"),
        ({"n_best": 0}, ValueError, "n_best must be at least 1, got 0"),
        ({"n_best": 3}, ValueError, "n_best must be at most beam_size 2, got 3"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"beam_size": 3, "groups": 2}, ValueError, "groups must divide beam_size 3, got 2"),
        ({"step": [step_of_four]}, TypeError, "step must be a function, or a list .* of states, got list and NoneType"),
        ({"step": None, "state": []}, TypeError, "step must be a function, or a list .* got NoneType and list"),
        ({"step": [], "state": []}, ValueError, "step must be one function or several, got none"),
        (
            {"step": [step_of_four] * 2, "state": [None]},
            ValueError,
            "state must have one state for each of the 2 steps",
        ),
        ({"eos": []}, ValueError, "eos must hold at least one token, got none"),
        ({"eos": -1}, ValueError, "eos must hold tokens of at least 0, got -1"),
        ({"eos": [0.5]}, TypeError, r"eos must be or hold ints, got \[0.5\]"),
        ({"eos": 1.0}, TypeError, "eos must be or hold ints, got 1.0"),
        ({"eos": [0, 4]}, ValueError, "eos must be below 4, what the logits have, got 4"),
        ({"bos": -1}, ValueError, "bos must be at least 0, got -1"),
        ({"bos": torch.zeros(3, dtype=torch.int64)}, ValueError, r"bos must hold integers of shape \(2,\), got"),
        ({"max_length": -1}, ValueError, "max_length must be at least 0, got -1"),
        ({"max_length": 3.0}, TypeError, "max_length must be an int, got float"),
        ({"max_length": torch.tensor([1, -2])}, ValueError, "max_length must be at least 0, got -2"),
        (
            {"max_length": torch.ones(2)},
            ValueError,
            r"max_length must hold integers of shape \(2,\), got torch.float32",
        ),
        (
            {"min_length": torch.ones(1, dtype=torch.int64)},
            ValueError,
            r"min_length must hold integers of shape \(2,\)",
        ),
        ({"length_penalty": "wu"}, ValueError, "length_penalty must be one of 'none', 'power', 'gnmt', 'average', got"),
        ({"early_stopping": True}, ValueError, "early_stopping must be one of 'first', 'heuristic', 'exact', got True"),
        ({"coverage_penalty": "sum"}, ValueError, "coverage_penalty must be one of 'wu', 'summary', got 'sum'"),
        ({"coverage_beta": -0.1}, ValueError, "coverage_beta must be at least 0, got -0.1"),
        ({"combine": "mean"}, ValueError, "combine must be one of 'log', 'linear', got 'mean'"),
        ({"sample": "top"}, ValueError, "sample must be one of 'ancestral', 'gumbel', got 'top'"),
        ({"sample": "gumbel", "groups": 2}, ValueError, "sample does not go with groups or stepwise_coverage"),
        ({"sample": "gumbel", "stepwise_coverage": True}, ValueError, "sample does not go with groups or stepwise"),
        (
            {"sample": "gumbel", "seed": torch.zeros(2)},
            ValueError,
            r"seed must be an int or hold integers of shape \(2,",
        ),
        (
            {"sample": "gumbel", "seed": torch.arange(3)},
            ValueError,
            r"seed must be an int or hold integers of shape \(2,",
        ),
        ({"patience": 2.0}, ValueError, "patience must be above 0, and 1 unless early_stopping is 'first', got 2.0"),
        ({"patience": 0.0, "early_stopping": "first"}, ValueError, "patience must be above 0"),
        ({"patience": math.inf, "early_stopping": "first"}, ValueError, "patience must be above 0"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty and temperature must be above 0"),
        ({"temperature": -1.0}, ValueError, "repetition_penalty and temperature must be above 0"),
        ({"top_p": 0.0}, ValueError, r"top_p in \(0, 1\]"),
        ({"top_p": 1.1}, ValueError, r"top_p in \(0, 1\]"),
        ({"top_k": -1}, ValueError, "top_k and no_repeat_ngram at least 0"),
        ({"no_repeat_ngram": -1}, ValueError, "top_k and no_repeat_ngram at least 0"),
        ({"sync_every": 0}, ValueError, "sync_every must be at least 1, got 0"),
        ({"weights": [0.5, 0.5]}, ValueError, "weights must be one for each of the 1 steps, got 2"),
        ({"weights": [-0.5], "combine": "linear"}, ValueError, "weights must be at least 0 where combine is 'linear'"),
        (
            {"source_lengths": torch.ones(1, dtype=torch.int64)},
            ValueError,
            r"source_lengths must hold integers of shape",
        ),
        (
            {"source_lengths": torch.ones(2)},
            ValueError,
            r"source_lengths must hold integers of shape \(2,\), got torch.f",
        ),
        ({"banned_tokens": [-2]}, ValueError, "banned_tokens must hold tokens of at least 0, got -2"),
        ({"banned_tokens": [4]}, ValueError, "banned tokens must be below 4, what the logits have, got 4"),
        ({"banned_tokens": ["a"]}, TypeError, r"banned_tokens must be or hold ints, got \['a'\]"),
        ({"banned_phrases": [[]]}, ValueError, "banned_phrases must hold at least one token, got none"),
        ({"banned_phrases": [[1, 9]]}, ValueError, "banned tokens must be below 4, what the logits have, got 9"),
        (
            {"allowed_tokens": lambda sentence, tokens: [4]},
            ValueError,
            "allowed_tokens must name tokens from 0 to 3, got",
        ),
        (
            {"processors": [lambda *seen: None]},
            ValueError,
            r"processors must return logits of shape \(2, 2, 4\), got None",
        ),
        (
            {"processors": [lambda *seen: seen[0][0]]},
            ValueError,
            r"processors must return logits of shape .* got \(2, 4\)",
        ),
        (
            {"need_alignments": True},
            ValueError,
            r"step must return attention's weights \[4, S\] for alignments and cov",
        ),
        ({"coverage_penalty": "wu"}, ValueError, r"step must return attention's weights \[4, S\] .* got NoneType"),
        ({"prefix": [[1], [2]]}, TypeError, "prefix must be a torch.Tensor, got list"),
        ({"prefix": torch.ones(2, 1)}, ValueError, r"prefix must hold integers of shape \(2, P\), got torch.float32"),
        (
            {"prefix": torch.tensor([1, 2])},
            ValueError,
            r"prefix must hold integers of shape \(2, P\), got torch.int64 \(2,",
        ),
        ({"prefix": torch.tensor([[1]])}, ValueError, r"prefix must hold integers of shape \(2, P\)"),
        (
            {"prefix": torch.ones(2, 6, dtype=torch.int64)},
            ValueError,
            "prefix_lengths must be from 0 to max_length and to",
        ),
        ({"prefix": torch.tensor([[1], [4]])}, ValueError, "prefix must be below 4, what the logits have, got 4"),
        ({"prefix": torch.tensor([[1], [-1]])}, ValueError, "prefix must hold tokens of at least 0, got -1"),
        (
            {"prefix": torch.tensor([[1], [0]])},
            ValueError,
            r"prefix must not hold the end token, got one of \[0\] in it",
        ),
        (
            {"prefix": torch.tensor([[1], [2]]), "prefix_lengths": torch.tensor([1, 2])},
            ValueError,
            r"prefix_lengths must be from 0 to max_length and to the prefix's 1, got \[1, 2\]",
        ),
        (
            {"prefix": torch.tensor([[1], [2]]), "prefix_lengths": torch.tensor([1])},
            ValueError,
            r"prefix_lengths must have shape \(2,\), got \(1,\)",
        ),
        (
            {"state": torch.zeros(2, 3)},
            ValueError,
            r"state must have leading dimension batch_size \* beam_size = 4, got",
        ),
        ({"state": {"h": torch.zeros(())}}, ValueError, r"batch_size \* beam_size = 4, got shape \(\)"),
        (
            {"state": Shared(torch.zeros(4))},
            ValueError,
            r"shared in the state must have leading dimension batch_size = 2",
        ),
        (
            {"step": lambda tokens, state: (torch.zeros(2, 4), state)},
            ValueError,
            r"logits of shape \(4, V\), got \(2, 4\)",
        ),
        ({"step": lambda tokens, state: (torch.zeros(4), state)}, ValueError, r"logits of shape \(4, V\), got \(4,\)"),
        ({"step": lambda tokens, state: ([0.0], state)}, ValueError, r"logits of shape \(4, V\), got list"),
        (
            {"step": lambda tokens, state: (torch.zeros(4, 4, dtype=torch.int64), state)},
            TypeError,
            "step must return logits of a floating dtype, got torch.int64",
        ),
        (
            {"step": lambda tokens, state: (torch.zeros(4, 4), torch.zeros(2))},
            ValueError,
            r"state must have leading dimension batch_size \* beam_size = 4, got shape \(2,\)",
        ),
        (
            {"step": [step_of_four, lambda tokens, state: (torch.zeros(4, 5), state)], "state": [None, None]},
            ValueError,
            r"all steps must return logits of shape \(4, 4\), got \(4, 5\)",
        ),
    ],
)
def test_errors(given: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {
        "step": step_of_four,
        "state": None,
        "batch_size": 2,
        "beam_size": 2,
        "bos": 1,
        "eos": 0,
        "max_length": 5,
    }
    with pytest.raises(error, match=message):
        beam_search(**options | given)
