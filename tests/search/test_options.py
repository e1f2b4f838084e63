"""Every option of beam_search against a slow oracle, and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrnn.search import beam_search
from tests.search.oracle import BOS, Toy, assert_agree, run, toy

EOS = 0
BASE: dict[str, Any] = {"beam_size": 3, "n_best": 3, "eos": EOS, "max_length": 5}


def options_of(draw: Any, batch: int = 3) -> dict[str, Any]:
    """Those of any search: sizes, lengths, scores, and when it stops."""
    beams = draw(st.sampled_from((1, 2, 3, 4, 6, 9)))
    stop = draw(st.sampled_from(("exact", "first", "heuristic")))
    penalty = draw(st.sampled_from(("none", "power", "gnmt", "average")))
    options: dict[str, Any] = {
        "beam_size": beams,
        "n_best": draw(st.integers(1, beams)),
        "eos": draw(st.sampled_from((EOS, [EOS], [2, 5], [5, 0, 3]))),
        "pad": draw(st.sampled_from((0, 4, -1))),
        "max_length": draw(st.integers(0, 6)),
        "min_length": draw(st.integers(0, 4)),
        "length_penalty": penalty,
        "early_stopping": stop,
        "sync_every": draw(st.sampled_from((1, 1, 2, 3, 10))),
    }
    if penalty in ("power", "gnmt"):
        options["alpha"] = draw(st.sampled_from((None, 0.0, 0.6, 1.5, -0.5)))
    if stop == "first":
        options["patience"] = draw(st.sampled_from((0.4, 1.0, 2.0)))
    if draw(st.booleans()):
        options["word_reward"] = draw(st.sampled_from((0.7, -0.3)))
    for name, most in (("max_length", 6), ("min_length", 5)):
        if draw(st.booleans()):
            options[name] = torch.tensor([draw(st.integers(0, most)) for _ in range(batch)])
    if draw(st.booleans()):
        options["bos"] = torch.tensor([draw(st.integers(0, 5)) for _ in range(batch)])
    return options


def coverage_of(draw: Any, batch: int = 3) -> dict[str, Any]:
    options: dict[str, Any] = {
        "coverage_penalty": draw(st.sampled_from(("wu", "summary"))),
        "coverage_beta": draw(st.sampled_from((0.2, 2.0))),
        "stepwise_coverage": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["source_lengths"] = torch.tensor([draw(st.integers(0, 4)) for _ in range(batch)])
    return options


def halved(logits: Tensor, tokens: Tensor, sentences: Tensor) -> Tensor:
    """A processor that knows sentences and histories: what sentence b has said b + 1 tokens ago halves its logit."""
    changed = logits.clone()
    for row, sentence in enumerate(sentences.tolist()):
        if tokens.shape[-1] > sentence:
            at = tokens[row, :, tokens.shape[-1] - 1 - sentence].unsqueeze(-1)
            changed[row] = logits[row].scatter(-1, at, logits[row].gather(-1, at) / 2)
    return changed


def forbidden(logits: Tensor, tokens: Tensor, sentences: Tensor) -> Tensor:
    """Another: an even step takes no token 4."""
    return logits.index_fill(-1, torch.tensor([4]), -math.inf) if tokens.shape[-1] % 2 == 0 else logits


def neighbours(sentence: int, tokens: Tensor) -> list[int]:
    """Tokens that are not too far from the last; the first is any but the sentence's number."""
    if not len(tokens):
        return [token for token in range(6) if token != sentence]
    return [token for token in range(6) if token == EOS or abs(token - int(tokens[-1])) < 3]


def constraints_of(draw: Any, batch: int = 3) -> dict[str, Any]:
    choices: dict[str, Any] = {
        "eos_threshold": st.sampled_from((0.8, 1.5)),
        "allowed_tokens": st.just(neighbours),
        "banned_tokens": st.sampled_from(((3,), (4, 1))),
        "banned_phrases": st.sampled_from((((2, 3),), ((4,), (1, 1), (5, 2, 5)), ((3, EOS),))),
        "repetition_penalty": st.sampled_from((1.5, 0.7)),
        "no_repeat_ngram": st.sampled_from((1, 2, 3)),
        "processors": st.sampled_from(((halved,), (forbidden, halved))),
    }
    names = draw(st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=3, unique=True))
    return {name: draw(choices[name]) for name in names}


def prefix_of(draw: Any, options: dict[str, Any], batch: int = 3) -> dict[str, Any]:
    """Prefixes as long as the lengths allow, of tokens that do not end."""
    ends = [options["eos"]] if isinstance(options["eos"], int) else options["eos"]
    plain = st.sampled_from([token for token in range(6) if token not in ends])
    longest = torch.as_tensor(options["max_length"]).expand(batch).tolist()
    steps = draw(st.integers(0, 4))
    lengths = [draw(st.integers(0, min(steps, limit))) for limit in longest]
    tokens = [[draw(plain) for _ in range(steps)] for _ in range(batch)]
    found = {"prefix": torch.tensor(tokens, dtype=torch.int64)}
    if steps > min(longest) or draw(st.booleans()):
        found["prefix_lengths"] = torch.tensor(lengths)
    return found


def toy_of(draw: Any, dtype: torch.dtype = torch.float64, sharpness: float = 2.0) -> Toy:
    """Every other time with many tokens that have no probability, so that beams die."""
    seed = draw(st.integers(0, 99))
    model = toy(seed=seed, dtype=dtype, sharpness=sharpness)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        model.logits[torch.rand(model.logits.shape, generator=generator) < 0.5] = -math.inf
    return model


@settings(max_examples=150)
@given(st.data(), st.sampled_from((torch.float32, torch.float64)))
def test_penalties_lengths_and_stopping(data: st.DataObject, dtype: torch.dtype) -> None:
    options = data.draw(st.composite(options_of)())
    assert_agree([toy_of(data.draw, dtype)], **options, need_alignments=True)


@settings(max_examples=100)
@given(st.data(), st.sampled_from((torch.float32, torch.float64)))
def test_coverage(data: st.DataObject, dtype: torch.dtype) -> None:
    options = data.draw(st.composite(options_of)()) | data.draw(st.composite(coverage_of)())
    if options["early_stopping"] == "heuristic":
        options["early_stopping"] = "exact"
    assert_agree([toy_of(data.draw, dtype)], **options)


@settings(max_examples=120)
@given(st.data())
def test_constraints_and_prefixes(data: st.DataObject) -> None:
    options = data.draw(st.composite(options_of)()) | data.draw(st.composite(constraints_of)())
    if data.draw(st.booleans()):
        options |= prefix_of(data.draw, options)
    assert_agree([toy_of(data.draw)], **options)


@settings(max_examples=60)
@given(st.data(), st.sampled_from((torch.float32, torch.float64)))
def test_prefixes(data: st.DataObject, dtype: torch.dtype) -> None:
    options = data.draw(st.composite(options_of)())
    options |= prefix_of(data.draw, options)
    assert_agree([toy_of(data.draw, dtype)], **options)


@settings(max_examples=80)
@given(st.data())
def test_groups(data: st.DataObject) -> None:
    options = data.draw(st.composite(options_of)())
    options["groups"] = data.draw(st.sampled_from([n for n in (1, 2, 3, 9) if options["beam_size"] % n == 0]))
    options["diversity"] = data.draw(st.sampled_from((0.3, 1.0, 5.0)))
    for more in (coverage_of, constraints_of):
        if data.draw(st.integers(0, 2)) == 0:
            options |= data.draw(st.composite(more)())
    if options["early_stopping"] == "heuristic":
        options["early_stopping"] = "first"
    assert_agree([toy_of(data.draw)], **options)


@settings(max_examples=80)
@given(st.data())
def test_ensembles(data: st.DataObject) -> None:
    options = data.draw(st.composite(options_of)())
    models = [toy_of(data.draw, sharpness=s) for s in (2, 1, 3)[: data.draw(st.integers(2, 3))]]
    options["combine"] = data.draw(st.sampled_from(("log", "linear")))
    if data.draw(st.booleans()):
        options["weights"] = [data.draw(st.sampled_from((0.0, 0.3, 0.5, 1.0))) for _ in models]
    for more in (coverage_of, constraints_of):
        if data.draw(st.integers(0, 2)) == 0:
            options |= data.draw(st.composite(more)())
    if options["early_stopping"] == "heuristic":
        options["early_stopping"] = "first"
    assert_agree(models, **options)


# By hand


def chain(*rows: dict[int, float], vocabulary: int = 4) -> Toy:
    """One sentence whose step t has these probabilities whatever came before; tokens without one have none."""
    probabilities = torch.zeros(len(rows), vocabulary, dtype=torch.float64)
    for t, row in enumerate(rows):
        probabilities[t, list(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
    found = Toy(probabilities.log().unsqueeze(0), torch.empty(1, len(rows), 1))

    def step(tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        found.rows_seen.append(len(tokens))
        return found.logits[0, state["seen"]], {**state, "seen": state["seen"] + 1}

    found.step = step  # type: ignore[method-assign, assignment]
    return found


# Sums of log-probabilities: "0" log 0.4, "2 0" log 0.3, "2 2 2" log 0.2 and more.
THREE = chain({0: 0.4, 2: 0.6}, {0: 0.5, 2: 0.5}, {0: 1 / 3, 2: 2 / 3})


@pytest.mark.parametrize(
    ("penalty", "alpha", "scores"),
    [
        ("none", None, [math.log(0.4), math.log(0.3), math.log(0.2), math.log(0.1)]),
        ("average", None, [math.log(0.2) / 3, math.log(0.3) / 2, math.log(0.1) / 3, math.log(0.4)]),
        ("power", None, [math.log(0.2) / 3, math.log(0.3) / 2, math.log(0.1) / 3, math.log(0.4)]),
        ("power", 2.0, [math.log(0.2) / 9, math.log(0.1) / 9, math.log(0.3) / 4, math.log(0.4)]),
        ("power", 0.0, [math.log(0.4), math.log(0.3), math.log(0.2), math.log(0.1)]),
        (
            "gnmt",
            None,
            [
                math.log(0.4),
                math.log(0.3) / (7 / 6) ** 0.6,
                math.log(0.2) / (8 / 6) ** 0.6,
                math.log(0.1) / (8 / 6) ** 0.6,
            ],
        ),
        (
            "gnmt",
            4.0,
            [math.log(0.2) / (8 / 6) ** 4, math.log(0.3) / (7 / 6) ** 4, math.log(0.1) / (8 / 6) ** 4, math.log(0.4)],
        ),
    ],
)
def test_length_penalties_by_hand(penalty: str, alpha: float | None, scores: list[float]) -> None:
    result = run([THREE], beam_size=4, n_best=4, eos=EOS, max_length=3, length_penalty=penalty, alpha=alpha)
    assert result.scores[0].tolist() == pytest.approx(scores)
    assert scores == sorted(scores, reverse=True)


def test_word_reward_by_hand() -> None:
    result = run([THREE], beam_size=4, n_best=4, eos=EOS, max_length=3, word_reward=0.5)
    wanted = [math.log(0.2) + 1.5, math.log(0.3) + 1.0, math.log(0.4) + 0.5, math.log(0.1) + 1.5]
    assert result.scores[0].tolist() == pytest.approx(sorted(wanted, reverse=True))


@pytest.mark.parametrize(
    ("kind", "places", "wanted"),
    [
        ("wu", 3, 0.5 * (math.log(1.0) + math.log(0.75) + math.log(0.125))),
        ("wu", 2, 0.5 * (math.log(1.0) + math.log(0.75))),
        ("summary", 3, 0.5 * (3 - 1.125 - 1 - 1)),
        ("summary", 1, 0.5 * (1 - 1.125)),
        ("summary", 0, 0.0),
    ],
)
def test_coverage_by_hand(kind: str, places: int, wanted: float) -> None:
    attention = torch.tensor([[0.5, 0.5, 0.0], [0.625, 0.25, 0.125]])

    def step(tokens: Tensor, t: int) -> tuple[Tensor, int, Tensor]:
        return (
            torch.tensor([[-math.inf, 0.0]]) if t == 0 else torch.tensor([[0.0, -math.inf]]),
            t + 1,
            attention[t : t + 1],
        )

    result = beam_search(
        step,
        0,
        batch_size=1,
        beam_size=1,
        bos=1,
        eos=0,
        max_length=5,
        coverage_penalty=kind,
        coverage_beta=0.5,
        source_lengths=torch.tensor([places]),
    )
    assert result.tokens.tolist() == [[[1, 0]]]
    assert result.scores.item() == pytest.approx(wanted)


def test_coverage_counts_what_a_beam_itself_has_seen() -> None:
    """Two beams that change places at every step: attention of the wrong one would give another penalty."""
    own = torch.tensor([[1.0, 0.0], [0.25, 0.75]])  # of a beam whose first token was 2, or 3

    def step(tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        first = torch.where(state["first"] < 0, tokens, state["first"]) if state["t"][0] else state["first"]
        t = int(state["t"][0])
        logits = torch.full((len(tokens), 4), -math.inf)
        if t == 0:
            logits[:, 2], logits[:, 3] = math.log(0.6), math.log(0.4)
        elif t < 4:
            # What is behind overtakes: its one token costs nothing, the other's half.
            behind = (first == 2) == (t % 2 == 0)
            logits[:, 2] = 0.0
            logits[~behind, 3] = 2.0
        else:
            logits[:, 0] = 0.0
        return logits, {"first": first, "t": state["t"] + 1}, own[(first == 3).long()]

    state = {"first": torch.full((2,), -1), "t": torch.zeros(2, dtype=torch.int64)}
    result = beam_search(
        step,
        state,
        batch_size=1,
        beam_size=2,
        bos=1,
        eos=0,
        max_length=8,
        n_best=2,
        coverage_penalty="summary",
        coverage_beta=0.1,
        need_alignments=True,
    )
    assert result.alignments is not None
    assert sorted(result.tokens[0, :, 0].tolist()) == [2, 3]
    for tokens, score, log_probs, weights in zip(*(part[0] for part in (result[0], *result[2:]))):
        expected = own[int(tokens[0] == 3)].expand(4, -1)
        torch.testing.assert_close(weights[1:], expected)
        totals = weights.sum(0)
        penalty = 0.1 * (2 - totals.clamp(min=1).sum())
        torch.testing.assert_close(score, log_probs.sum() + penalty)


def test_what_the_source_lacks_is_not_covered() -> None:
    """Weights of padding change neither penalty, whatever they are."""
    model = toy(source=7)
    lengths = torch.tensor([2, 7, 4])
    options = BASE | {"coverage_penalty": "wu", "source_lengths": lengths}
    expected = run([model], **options)
    for sentence, length in enumerate(lengths.tolist()):
        model.attention[sentence, :, length:] = 99.0
    for found, wanted in zip(run([model], **options)[:4], expected):
        assert torch.equal(found, wanted)


def test_an_end_token_must_exceed_the_threshold() -> None:
    model = chain({0: 0.35, 2: 0.5, 3: 0.15}, {0: 0.5, 2: 0.3, 3: 0.2})
    # log 0.35 / log 0.5 = 1.51; the largest of the others is the 0.5.
    for threshold, first in ((1.5, 2), (1.52, 0)):
        result = run([model], beam_size=6, n_best=6, eos=EOS, max_length=2, eos_threshold=threshold)
        assert ([0] in [t[:n] for t, n in zip(result.tokens[0].tolist(), result.lengths[0])]) == (first == 0)
        kept = [score for score, tokens in zip(result.scores[0], result.tokens[0]) if tokens[0] == 2]
        assert max(kept) == pytest.approx(math.log(0.25))


def test_several_tokens_end() -> None:
    model = chain({0: 0.2, 2: 0.5, 3: 0.3}, {0: 0.1, 2: 0.6, 3: 0.3})
    result = run([model], beam_size=3, n_best=3, eos=[3, 0], max_length=2)
    assert result.tokens.tolist() == [[[3, 3], [2, 2], [0, 3]]]
    assert result.lengths.tolist() == [[1, 2, 1]]
    assert result.scores[0].tolist() == pytest.approx([math.log(0.3), math.log(0.3), math.log(0.2)])


def test_lengths_of_each_sentence() -> None:
    batch = 4
    model = toy(batch=batch, vocabulary=3, sharpness=0.5)
    least, most = torch.tensor([1, 4, 3, 0]), torch.tensor([1, 4, 6, 0])
    result = run([model], beam_size=9, n_best=9, eos=EOS, max_length=most, min_length=least)
    for row in range(batch):
        found = result.lengths[row][result.scores[row] > -math.inf]
        assert ((found >= least[row]) & (found <= most[row])).all()
        for tokens, length in zip(result.tokens[row], result.lengths[row]):
            assert EOS not in tokens[: max(0, min(int(length), int(least[row])) - 1)]
    assert (result.lengths[3] == 0).all() and (result.scores[3] == -math.inf).all()


def test_first_stops_when_enough_have_ended() -> None:
    """Two beams, of which one ends at every step; what would have come later is better and never seen."""
    model = chain({0: 0.5, 2: 0.5}, {0: 0.5, 2: 0.5}, {0: 0.001, 2: 0.999}, {0: 1.0})
    for patience, steps in ((0.5, 1), (1.0, 2), (1.5, 3), (2.0, 4)):
        model.rows_seen.clear()
        options = {"length_penalty": "power", "alpha": 3.0, "early_stopping": "first", "patience": patience}
        run([model], beam_size=2, eos=EOS, max_length=4, **options)
        assert len(model.rows_seen) == steps


def test_exact_stops_as_soon_as_nothing_can_be_better() -> None:
    model = chain({0: 0.4, 2: 0.6}, {0: 0.5, 2: 0.5}, *[{2: 1.0}] * 8)
    for n_best, steps in ((1, 2), (2, 2), (3, 10)):
        model.rows_seen.clear()
        run([model], beam_size=3, n_best=n_best, eos=EOS, max_length=10)
        assert len(model.rows_seen) == steps


def test_heuristic_stops_where_exact_goes_on() -> None:
    """The only beam is worse than what has ended, until a longer length makes it better."""
    model = chain({0: 0.6, 2: 0.4}, *[{2: 1.0}] * 6, {0: 1.0})
    options: dict[str, Any] = {"beam_size": 1, "eos": EOS, "max_length": 8, "length_penalty": "average"}
    for early_stopping, tokens in (("heuristic", [0]), ("first", [0]), ("exact", [2] * 7 + [0])):
        assert run([model], **options, early_stopping=early_stopping).tokens[0, 0].tolist() == tokens


def test_a_prefix_counts_in_score_and_length() -> None:
    model = chain({0: 0.5, 2: 0.3, 3: 0.2}, {0: 0.9, 3: 0.1}, {0: 1.0})
    result = run([model], beam_size=2, eos=EOS, max_length=3, prefix=torch.tensor([[3, 3]]), length_penalty="average")
    assert result.tokens.tolist() == [[[3, 3, 0]]]
    assert result.scores.item() == pytest.approx(math.log(0.02) / 3)
    assert result.log_probs[0, 0].tolist() == pytest.approx([math.log(0.2), math.log(0.1), 0.0])


@pytest.mark.parametrize("more", [{}, {"banned_tokens": [1]}, {"sample": "ancestral"}, {"groups": 2}])
def test_a_prefix_that_has_no_probability(more: dict[str, Any]) -> None:
    model = chain({0: 0.5, 2: 0.5}, {0: 0.5, 2: 0.5})
    both = Toy(model.logits.expand(2, -1, -1), model.attention)
    options: dict[str, Any] = {"beam_size": 2, "eos": EOS, "max_length": 2, "prefix": torch.tensor([[3], [2]])}
    state = {"seen": torch.zeros(4, dtype=torch.int64)}
    result = beam_search(model.step, state, batch_size=len(both.logits), bos=BOS, **options, **more)
    assert result.lengths.tolist()[0] == [0]
    assert result.scores[0].item() == -math.inf
    assert result.tokens[1, 0, 0] == 2 and result.scores[1].item() == pytest.approx(math.log(0.25))


def test_a_prefix_may_hold_what_is_banned() -> None:
    prefix = torch.tensor([[4, 4]] * 3)
    options = {"banned_tokens": [4], "no_repeat_ngram": 1, "allowed_tokens": lambda sentence, tokens: [0, 2, 3]}
    result = assert_agree([toy()], **BASE, prefix=prefix, **options)
    assert (result.tokens[:, :, :2] == 4).all() and (result.tokens[:, :, 2:] != 4).all()


def test_what_is_behind_a_prefix_does_not_matter() -> None:
    lengths = torch.tensor([2, 0, 1])
    prefix = torch.tensor([[4, 5], [3, 2], [2, 2]])
    expected = run([toy()], **BASE, prefix=prefix, prefix_lengths=lengths)
    prefix = torch.tensor([[4, 5, -7], [-1, 99, EOS], [2, EOS, 6]])
    for found, wanted in zip(run([toy()], **BASE, prefix=prefix, prefix_lengths=lengths)[:4], expected):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.1}, {"length_penalty": "gnmt"}])
def test_prefixes_of_batch_mates_change_nothing(more: dict[str, Any], dtype: torch.dtype) -> None:
    model = toy(batch=40, vocabulary=37, dtype=dtype)
    alone = run([model], beam_size=4, n_best=4, eos=EOS, max_length=6, **more)
    lengths = torch.arange(40) % 4
    prefix = torch.randint(1, 37, (40, 3))
    mixed = run([model], beam_size=4, n_best=4, eos=EOS, max_length=6, prefix=prefix, prefix_lengths=lengths, **more)
    free = lengths == 0
    for found, wanted in zip(mixed[:4], alone):
        assert torch.equal(found[free], wanted[free])
    assert not torch.equal(mixed.scores, alone.scores)


def test_banned_tokens_leave_others_as_they_are() -> None:
    model = chain({0: 0.1, 2: 0.6, 3: 0.3}, {0: 1.0})
    result = run([model], beam_size=2, eos=EOS, max_length=2, banned_tokens=[2])
    assert result.tokens.tolist() == [[[3, 0]]]
    assert result.scores.item() == pytest.approx(math.log(0.3))


def test_allowed_tokens_are_asked_for_beams_that_live() -> None:
    """By a trie: what it has never held, such as the filling of a dead beam, it does not know."""
    trie = {(): [2, 3], (2,): [3], (2, 3): [0], (3,): [0, 2], (3, 2): [0]}

    def allowed(sentence: int, tokens: Tensor) -> list[int]:
        assert sentence in range(3)
        return trie[tuple(tokens.tolist())]

    result = run([toy()], beam_size=5, n_best=5, eos=EOS, max_length=4, allowed_tokens=allowed)
    assert (result.scores > -math.inf).sum(1).tolist() == [3, 3, 3]
    found = {tuple(t[:n].tolist()) for t, n in zip(result.tokens.flatten(0, 1), result.lengths.flatten()) if n}
    assert found == {(2, 3, 0), (3, 0), (3, 2, 0)}


@pytest.mark.parametrize("stop", ["exact", "first", "heuristic"])
def test_bans_leave_minus_infinity_below_everything(stop: str) -> None:
    """A cornered beam must not end before min_length: nothing that is banned comes before anything else."""
    model = chain({2: 1.0}, {0: 0.9, 2: 0.1}, {0: 1.0}, {0: 1.0})
    options: dict[str, Any] = {"beam_size": 2, "eos": EOS, "min_length": 4, "max_length": 5, "early_stopping": stop}
    result = run([model], **options, no_repeat_ngram=1)
    assert result.lengths.tolist() == [[0]] and result.scores.item() == -math.inf


def test_repetition_by_hand() -> None:
    """Logits 2 and -1 of tokens that were there become 1 and -2."""

    def step(tokens: Tensor, state: None) -> tuple[Tensor, None]:
        return torch.tensor([[-9.0, -1.0, 2.0]], dtype=torch.float64), None

    found = beam_search(step, None, batch_size=1, beam_size=1, bos=1, eos=0, max_length=3, repetition_penalty=2.0)
    assert found.tokens.tolist() == [[[2, 2, 2]]]
    first, later = (torch.tensor([-9.0, -1.0, x], dtype=torch.float64).log_softmax(0)[2] for x in (2.0, 1.0))
    torch.testing.assert_close(found.log_probs[0, 0], torch.stack([first, later, later]))


def test_no_ngram_twice() -> None:
    model = toy(batch=5, vocabulary=4, sharpness=0.3)
    model.logits[..., EOS] = -math.inf
    for size in (1, 2, 3):
        result = run([model], beam_size=4, n_best=4, eos=EOS, max_length=9, no_repeat_ngram=size)
        if size == 1:
            assert (result.lengths == 0).all()  # three tokens are too few for nine
            continue
        for tokens in result.tokens.flatten(0, 1)[result.lengths.flatten() > 0].tolist():
            grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
            assert len(set(grams)) == len(grams)


def test_groups_do_not_say_the_same() -> None:
    model = toy(batch=4, vocabulary=8)
    model.logits[..., EOS] = -math.inf
    result = run([model], beam_size=4, n_best=4, eos=EOS, max_length=1, groups=4, diversity=100.0)
    for row in result.tokens[..., 0].tolist():
        assert len(set(row)) == 4
    # Each group takes what is best of what is left; scores stay the model's.
    logits = torch.tensor([model.after(sentence, (), BOS)[0] for sentence in range(4)], dtype=torch.float64)
    wanted = logits.log_softmax(-1).topk(4)
    assert torch.equal(result.tokens[..., 0], wanted.indices)
    torch.testing.assert_close(result.scores, wanted.values)


def test_dead_beams_of_a_group_have_taken_nothing() -> None:
    """The first group says "2", after which nothing may come; the second may end then, which its best token does."""
    model = toy(batch=1)
    model.logits[:, [model.place(tokens) for tokens in ((), (2,), (3,))]] = -math.inf
    model.logits[0, model.place([]), [2, 3]] = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    model.logits[0, model.place([3]), [EOS, 4]] = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    result = run([model], beam_size=2, n_best=2, eos=EOS, max_length=2, groups=2, diversity=1.0)
    assert result.tokens.tolist() == [[[3, 0], [3, 4]]]


def test_processors_see_histories_and_sentences() -> None:
    seen = []

    def processor(logits: Tensor, tokens: Tensor, sentences: Tensor) -> Tensor:
        assert logits.shape == (len(sentences), 3, 6) and tokens.shape == (len(sentences), 3, len(seen))
        seen.append(sentences.tolist())
        return logits

    model = toy()
    result = run([model], **BASE | {"max_length": torch.tensor([2, 4, 3]), "min_length": 4}, processors=[processor])
    assert seen == [[0, 1, 2], [0, 1, 2], [1, 2], [1]]
    for found, wanted in zip(
        result[:4], run([model], **BASE | {"max_length": torch.tensor([2, 4, 3]), "min_length": 4})
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("combine", ["log", "linear"])
def test_a_model_of_weight_zero_does_not_count(combine: str) -> None:
    """Even where it has no probability, or NaN."""
    model, other = toy(), toy(seed=1)
    other.logits[:, ::2, 2:4] = -math.inf
    expected = run([model], **BASE)
    found = run([model, other], **BASE, weights=[1.0, 0.0], combine=combine)
    for part, wanted in zip(found[:4], expected):
        torch.testing.assert_close(part, wanted)
    if combine == "log":
        other.logits[:] = math.nan
        for part, wanted in zip(run([model, other], **BASE, weights=[1.0, 0.0])[:4], expected):
            torch.testing.assert_close(part, wanted)


def test_ensembles_by_hand() -> None:
    models = [chain({0: 0.5, 2: 0.4, 3: 0.1}), chain({0: 0.1, 2: 0.2, 3: 0.7})]
    options: dict[str, Any] = {"beam_size": 3, "n_best": 3, "eos": EOS, "max_length": 1}
    result = run(models, **options)
    assert result.tokens[0, :, 0].tolist() == [2, 3, 0]
    assert result.scores[0].tolist() == pytest.approx([0.5 * math.log(p) for p in (0.08, 0.07, 0.05)])
    result = run(models, **options, combine="linear", weights=[0.25, 0.75])
    assert result.tokens[0, :, 0].tolist() == [3, 2, 0]
    assert result.scores[0].tolist() == pytest.approx([math.log(p) for p in (0.55, 0.25, 0.2)])
    result = run(models, **options, weights=[1.0, 2.0])
    assert result.scores[0].tolist() == pytest.approx([math.log(p) for p in (0.1 * 0.49, 0.4 * 0.04, 0.5 * 0.01)])


def test_alignments_are_the_first_models() -> None:
    models = [toy(), toy(seed=1, source=9)]
    assert_agree(models, **BASE, need_alignments=True)


# Sampling


def sampled(model: Toy, batch: int, **options: Any) -> list[tuple[tuple[int, ...], ...]]:
    """For each of so many seeds the sequences drawn from the model's first sentence."""
    result = run([model], [0] * batch, eos=EOS, max_length=3, **options)
    pairs = zip(result.tokens.tolist(), result.lengths.tolist())
    return [tuple(tuple(t[:n]) for t, n in zip(tokens, lengths)) for tokens, lengths in pairs]


def distribution(
    model: Toy, choose: Any = lambda log_probs: log_probs, min_length: int = 0
) -> dict[tuple[int, ...], float]:
    """Probabilities of all sequences of at most three tokens, each step's log-probabilities changed by `choose`."""
    found: dict[tuple[int, ...], float] = {}

    def grow(tokens: tuple[int, ...], probability: float) -> None:
        if len(tokens) == 3 or (tokens and tokens[-1] == EOS):
            found[tokens] = probability
            return
        logits = torch.tensor(model.after(0, tokens, BOS)[0], dtype=torch.float64)
        if len(tokens) + 1 < min_length:
            logits[EOS] = -math.inf
        for token, p in enumerate(choose(logits.log_softmax(0)).softmax(0).tolist()):
            if p:
                grow((*tokens, token), probability * p)

    grow((), 1.0)
    return found


def assert_distributed(counts: dict[Any, int], expected: dict[Any, float]) -> None:
    """Chi-square, with at most one false alarm in 10^5; a seed that is fixed gives none at all."""
    assert counts.keys() <= expected.keys(), set(counts) - set(expected)
    total = sum(counts.values())
    large = [key for key, p in expected.items() if p * total >= 8]
    rest = 1 - sum(expected[key] for key in large)
    cells = [(counts.get(key, 0), expected[key] * total) for key in large]
    if rest * total >= 8:
        cells.append((total - sum(seen for seen, _ in cells), rest * total))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty's approximation of the quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.27 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, (statistic, limit)


def counted(values: list[Any]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return found


def warm(log_probs: Tensor) -> Tensor:
    return log_probs / 0.6


def largest_two(log_probs: Tensor) -> Tensor:
    return log_probs.masked_fill(log_probs < log_probs.topk(2).values[-1], -math.inf)


def nucleus(log_probs: Tensor) -> Tensor:
    """The fewest tokens that hold 0.7."""
    order = sorted(range(len(log_probs)), key=lambda token: -log_probs[token])
    kept, total = [], 0.0
    for token in order:
        if total >= 0.7:
            break
        kept.append(token)
        total += math.exp(log_probs[token])
    return torch.full_like(log_probs, -math.inf).index_copy(0, torch.tensor(kept), log_probs[kept])


@pytest.mark.parametrize(
    ("options", "choose"),
    [
        ({}, lambda log_probs: log_probs),
        ({"temperature": 0.6}, warm),
        ({"top_k": 2}, largest_two),
        ({"top_p": 0.7}, nucleus),
        ({"temperature": 0.6, "top_p": 0.7}, lambda log_probs: nucleus(warm(log_probs).log_softmax(0))),
        ({"banned_tokens": [2]}, lambda log_probs: log_probs.index_fill(0, torch.tensor([2]), -math.inf)),
        ({"min_length": 2}, lambda log_probs: log_probs),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "temperature+top_p", "banned", "min_length"],
)
@pytest.mark.parametrize("sample", ["ancestral", "gumbel"])
def test_samples_are_distributed_as_they_should(sample: str, options: dict[str, Any], choose: Any) -> None:
    """With several beams, ancestral ones are as many samples, and the first of those without replacement is one."""
    model = toy(batch=1, vocabulary=4, sharpness=1.0, seed=3)
    if sample == "ancestral":
        drawn = [
            tokens
            for beams in sampled(model, 1500, beam_size=3, n_best=3, sample=sample, **options)
            for tokens in beams
        ]
    else:
        drawn = [beams[0] for beams in sampled(model, 4000, beam_size=3, sample=sample, **options)]
    assert_distributed(counted(drawn), distribution(model, choose, options.get("min_length", 0)))


def test_without_replacement() -> None:
    """The second is distributed as what is left when the first is taken away, and none comes twice."""
    model = toy(batch=1, vocabulary=3, sharpness=0.5, seed=5)
    expected = distribution(model)
    drawn = sampled(model, 10000, beam_size=4, n_best=4, sample="gumbel")
    for beams in drawn:
        assert len(set(beams)) == 4
    pairs = {(a, b): p * q / (1 - p) for a, p in expected.items() for b, q in expected.items() if a != b}
    assert_distributed(counted([beams[:2] for beams in drawn]), pairs)


def test_without_replacement_until_nothing_is_left() -> None:
    """Also where some that were drawn come to nothing."""
    model = toy(batch=1, vocabulary=3, seed=5)
    every = set(distribution(model))
    assert len(every) == 15
    assert all(set(beams) == {*every, ()} for beams in sampled(model, 50, beam_size=17, n_best=17, sample="gumbel"))
    model.logits[:, model.place([2])] = -math.inf
    left = {tokens for tokens in every if tokens[0] != 2}
    assert all(set(beams) == {*left, ()} for beams in sampled(model, 50, beam_size=17, n_best=17, sample="gumbel"))
    # Of two beams one comes to something, and what does not takes nobody's place.
    assert all(beams[0] in left for beams in sampled(model, 50, beam_size=2, sample="gumbel"))


@pytest.mark.parametrize("sample", ["ancestral", "gumbel"])
def test_scores_of_samples_are_the_models(sample: str) -> None:
    model = toy(vocabulary=5)
    options = {"temperature": 0.5, "top_k": 3, "length_penalty": "average"}
    result = run([model], beam_size=4, n_best=4, eos=EOS, max_length=4, sample=sample, **options)
    for sentence in range(3):
        for tokens, length, score in zip(result.tokens[sentence], result.lengths[sentence], result.scores[sentence]):
            total, said = 0.0, tokens[:length].tolist()
            for t, token in enumerate(said):
                logits = torch.tensor(model.after(sentence, said[:t], BOS)[0], dtype=torch.float64)
                total += float(logits.log_softmax(0)[token])
            assert float(score) == pytest.approx(total / int(length))


@pytest.mark.parametrize("sample", ["ancestral", "gumbel"])
def test_samples_depend_on_seeds_alone(sample: str) -> None:
    model = toy(batch=8, vocabulary=20)
    seeds = torch.tensor([5, 2**40, 7, -3, 5, 0, 1, 2])
    options: dict[str, Any] = {"beam_size": 3, "n_best": 3, "eos": EOS, "max_length": 6, "sample": sample}
    together = run([model], **options, seed=seeds)
    for row in range(8):
        alone = run([model], [row], **options, seed=seeds[row : row + 1])
        length = alone.tokens.shape[-1]
        assert torch.equal(together.tokens[row, :, :length], alone.tokens[0])
        assert torch.equal(together.scores[row], alone.scores[0])
    same = run([model], **options, seed=seeds)
    assert all(torch.equal(found, wanted) for found, wanted in zip(same[:4], together))
    # Sentence b has seed + b.
    first = run([model], **options, seed=11)
    shifted = run([model], [3, 4], **options, seed=14)
    assert torch.equal(first.scores[3:5], shifted.scores)
    assert not torch.equal(first.scores, run([model], **options, seed=12).scores)
    # Neighbouring seeds, and seeds that differ in their high words alone, are independent.
    rows = run([model], [0] * 4, **options, seed=torch.tensor([0, 1, 2**32, -1]))
    assert len({tuple(tokens.flatten().tolist()) for tokens in rows.tokens}) == 4


@pytest.mark.parametrize("sample", ["ancestral", "gumbel"])
def test_samples_with_constraints(sample: str) -> None:
    model = toy(batch=20, vocabulary=5, sharpness=0.5)
    prefix = torch.tensor([[2, 2]] * 20)
    options: dict[str, Any] = {"beam_size": 3, "n_best": 3, "eos": [EOS, 4], "max_length": 7, "min_length": 5}
    result = run([model], **options, sample=sample, prefix=prefix, banned_tokens=[3], banned_phrases=[(1, 1)])
    assert (result.scores > -math.inf).all() and ((result.lengths >= 5) & (result.lengths <= 7)).all()
    assert (result.tokens[..., :2] == 2).all()
    assert not ((result.tokens == 3).any() or ((result.tokens[..., 1:] == 1) & (result.tokens[..., :-1] == 1)).any())
    for tokens, length in zip(result.tokens.flatten(0, 1).tolist(), result.lengths.flatten().tolist()):
        assert not {EOS, 4} & set(tokens[: length - 1])
