"""Beam search of one sentence, in lists and floats: slow, and written from beam_search's documentation alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastrnn.search import BeamResult, beam_search

BOS = 1


@dataclass(eq=False)
class Toy:
    """A model of B sentences. Its logits and attention depend on all tokens so far, through a number made of them."""

    logits: Tensor  # [B, N, V]
    attention: Tensor  # [B, N, S]

    def __post_init__(self) -> None:
        self.rows_seen: list[int] = []  # by each call

    def state(self, beams: int, sentences: Sequence[int] | None = None) -> dict[str, Tensor]:
        chosen = torch.arange(len(self.logits)) if sentences is None else torch.tensor(sentences, dtype=torch.int64)
        rows = chosen.repeat_interleave(beams)
        return {"sentence": rows, "seen": torch.zeros_like(rows)}

    def step(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        self.rows_seen.append(len(tokens))
        seen = (state["seen"] * 7 + tokens + 1) % self.logits.shape[1]
        at = (state["sentence"], seen)
        return self.logits[at], {"sentence": state["sentence"], "seen": seen}, self.attention[at]

    def after(self, sentence: int, tokens: Sequence[int], bos: int) -> tuple[list[float], list[float]]:
        """Logits and attention of the step that follows these tokens."""
        logits, attention = self._lists
        at = self.place(tokens, bos)
        return logits[sentence][at], attention[sentence][at]

    def place(self, tokens: Sequence[int], bos: int = BOS) -> int:
        """Where the logits of the step that follows these tokens are."""
        seen = 0
        for token in (bos, *tokens):
            seen = (seen * 7 + token + 1) % self.logits.shape[1]
        return seen

    @cached_property
    def _lists(self) -> tuple[Any, Any]:
        return self.logits.double().tolist(), self.attention.double().tolist()


def toy(
    batch: int = 3,
    vocabulary: int = 6,
    source: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    sharpness: float = 2.0,
    size: int = 61,
) -> Toy:
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(batch, size, vocabulary, generator=generator, dtype=torch.float64)
    attention = torch.rand(batch, size, source, generator=generator, dtype=torch.float64).softmax(-1)
    return Toy(logits.to(dtype), attention.to(torch.promote_types(dtype, torch.float32)))


@dataclass(frozen=True)
class Found:
    """A hypothesis: its tokens, the log-probability of each, its score, and the attention as each token was made."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    alignments: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Beam:
    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    alignments: tuple[tuple[float, ...], ...] = ()

    @property
    def total(self) -> float:
        return sum(self.log_probs)


def log_softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    if largest == -math.inf:
        return list(logits)
    total = largest + math.log(math.fsum(math.exp(x - largest) for x in logits))
    return [x - total for x in logits]


def divisor(penalty: str, alpha: float | None, length: int) -> float:
    if penalty == "power":
        return length ** (1.0 if alpha is None else alpha)
    if penalty == "gnmt":
        return ((5 + length) / 6) ** (0.6 if alpha is None else alpha)
    return length if penalty == "average" else 1.0


def coverage(kind: str | None, beta: float, alignments: Sequence[Sequence[float]], places: int | None) -> float:
    if kind is None:
        return 0.0
    totals = [sum(weights) for weights in zip(*alignments)][:places]
    if kind == "wu":
        return beta * sum(math.log(min(total, 1.0)) for total in totals)
    return beta * (len(totals) - sum(max(total, 1.0) for total in totals))


def repeats_ngram(tokens: Sequence[int], size: int) -> bool:
    """Whether the last n-gram was there before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return bool(grams) and grams[-1] in grams[:-1]


def search(
    toys: Sequence[Toy],
    sentence: int,
    *,
    beam_size: int,
    eos: Sequence[int],
    max_length: int,
    bos: int = BOS,
    n_best: int = 1,
    min_length: int = 0,
    length_penalty: str = "none",
    alpha: float | None = None,
    word_reward: float = 0.0,
    coverage_penalty: str | None = None,
    coverage_beta: float = 0.2,
    stepwise_coverage: bool = False,
    source_length: int | None = None,
    early_stopping: str = "exact",
    patience: float = 1.0,
    eos_threshold: float | None = None,
    prefix: Sequence[int] = (),
    allowed_tokens: Callable[[int, Tensor], Iterable[int]] | None = None,
    banned_tokens: Iterable[int] = (),
    banned_phrases: Iterable[Sequence[int]] = (),
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    groups: int = 1,
    diversity: float = 0.0,
    processors: Sequence[Callable[..., Tensor]] = (),
    weights: Sequence[float] | None = None,
    combine: str = "log",
) -> list[Found]:
    """The n_best hypotheses of a sentence, or fewer. Exact stopping is no stopping at all, but that nothing goes on."""
    width = beam_size // groups
    phrases = [(token,) for token in banned_tokens] + [tuple(phrase) for phrase in banned_phrases]
    shares = [1 / len(toys)] * len(toys) if weights is None else weights

    def edited(logits: list[float], tokens: tuple[int, ...]) -> list[float]:
        for processor in processors:
            history = torch.tensor(tokens, dtype=torch.int64).view(1, 1, -1)
            row = torch.tensor(logits, dtype=torch.float64).view(1, 1, -1)
            logits = processor(row, history, torch.tensor([sentence])).flatten().tolist()
        penalty = repetition_penalty
        return [x if token not in tokens else x / penalty if x > 0 else x * penalty for token, x in enumerate(logits)]

    def log_probs_after(tokens: tuple[int, ...]) -> list[float]:
        rows = [toy.after(sentence, tokens, bos)[0] for toy in toys]
        if len(rows) == 1:
            return log_softmax(edited(rows[0], tokens))
        each = [log_softmax(row) for row in rows]
        if combine == "linear":
            sums = [sum(w * math.exp(x) for w, x in zip(shares, column)) for column in zip(*each)]
            combined = [math.log(x) if x > 0 else -math.inf for x in sums]
        else:
            combined = [sum(w * x for w, x in zip(shares, column) if w) for column in zip(*each)]
        return edited(combined, tokens)

    def may_come(token: int, log_probs: list[float], tokens: tuple[int, ...]) -> bool:
        after = (*tokens, token)
        if token in eos and len(after) < min_length:
            return False
        if len(tokens) < len(prefix):
            return token == prefix[len(tokens)]
        if any(after[-len(phrase) :] == phrase for phrase in phrases):
            return False
        if no_repeat_ngram and repeats_ngram(after, no_repeat_ngram):
            return False
        if allowed_tokens is not None and token not in allowed_tokens(sentence, torch.tensor(tokens)):
            return False
        if eos_threshold is not None and token in eos:
            return log_probs[token] > eos_threshold * max(x for v, x in enumerate(log_probs) if v not in eos)
        return True

    def score(beam: _Beam) -> float:
        length = len(beam.tokens)
        ranked = beam.total / divisor(length_penalty, alpha, length) + word_reward * length
        return ranked + coverage(coverage_penalty, coverage_beta, beam.alignments, source_length)

    finished: list[_Beam] = []
    ended = 0
    live = [[_Beam()] for _ in range(groups)]
    for length in range(1, max_length + 1):
        taken: dict[int, int] = {}
        after: list[list[_Beam]] = []
        for beams in live:
            candidates = []
            for beam in beams:
                log_probs = log_probs_after(beam.tokens)
                seen = tuple(toys[0].after(sentence, beam.tokens, bos)[1])
                for token, log_prob in enumerate(log_probs):
                    if log_prob == -math.inf or not may_come(token, log_probs, beam.tokens):
                        continue
                    new = _Beam((*beam.tokens, token), (*beam.log_probs, log_prob), (*beam.alignments, seen))
                    value = new.total - diversity * taken.get(token, 0)
                    if stepwise_coverage:
                        value += coverage(coverage_penalty, coverage_beta, new.alignments, source_length)
                    candidates.append((value, new))
            candidates.sort(key=lambda candidate: -candidate[0])
            ending = [beam for _, beam in candidates[:width] if beam.tokens[-1] in eos]
            ended += len(ending)
            finished += ending
            after.append([beam for _, beam in candidates if beam.tokens[-1] not in eos][:width])
            for beam in after[-1]:
                taken[beam.tokens[-1]] = taken.get(beam.tokens[-1], 0) + 1
        live = after
        going = [beam for beams in live for beam in beams]
        if length == max_length:
            finished += going
        if early_stopping == "first" and ended >= math.ceil(patience * beam_size):
            break
        if early_stopping == "heuristic" and going and len(finished) >= beam_size:
            if max(map(score, going)) <= sorted(map(score, finished))[-beam_size]:
                break
    finished.sort(key=lambda beam: -score(beam))
    return [Found(beam.tokens, beam.log_probs, score(beam), beam.alignments) for beam in finished[:n_best]]


def per_sentence(options: dict[str, Any], sentence: int) -> dict[str, Any]:
    """Options of beam_search as `search` takes them."""
    own = {name: value for name, value in options.items() if name not in ("pad", "sync_every", "need_alignments")}
    for name in ("max_length", "min_length", "bos"):
        if isinstance(own.get(name), Tensor):
            own[name] = int(own[name][sentence])
    if isinstance(own["eos"], int):
        own["eos"] = [own["eos"]]
    if "source_lengths" in own:
        own["source_length"] = int(own.pop("source_lengths")[sentence])
    lengths = own.pop("prefix_lengths", None)
    if "prefix" in own:
        own["prefix"] = own["prefix"][sentence][: None if lengths is None else int(lengths[sentence])].tolist()
    return own


def run(toys: Sequence[Toy], sentences: Sequence[int] | None = None, **options: Any) -> BeamResult:
    """beam_search over toy models, of all sentences or of these."""
    batch = len(toys[0].logits) if sentences is None else len(sentences)
    states = [toy.state(options["beam_size"], sentences) for toy in toys]
    steps: Any = [toy.step for toy in toys]
    if len(toys) == 1:
        steps, states = steps[0], states[0]
    return beam_search(steps, states, batch_size=batch, **{"bos": BOS, **options})


def assert_agree(toys: Sequence[Toy], **options: Any) -> BeamResult:
    """That beam_search finds for every sentence what the oracle does."""
    result = run(toys, **options)
    ends = options["eos"]
    pad = options.get("pad", ends if isinstance(ends, int) else ends[0])
    for sentence in range(len(toys[0].logits)):
        expected = search(toys, sentence, **per_sentence(options, sentence))
        assert_finds(result, sentence, expected, pad)
    return result


def assert_finds(result: Any, row: int, expected: Sequence[Found], pad: int) -> None:
    """That a row of a BeamResult holds these hypotheses and nothing else."""
    tokens, lengths, scores, log_probs, alignments = (None if part is None else part[row] for part in result)
    rounding = 200 * torch.finfo(scores.dtype).eps
    for place in range(len(lengths)):
        found = expected[place] if place < len(expected) else Found((), (), -math.inf, ())
        length = int(lengths[place])
        assert tuple(tokens[place, :length].tolist()) == found.tokens, (row, place)
        assert (tokens[place, length:] == pad).all()
        torch.testing.assert_close(float(scores[place]), found.score, rtol=rounding, atol=rounding)
        wanted = torch.tensor(found.log_probs, dtype=log_probs.dtype)
        torch.testing.assert_close(log_probs[place, :length], wanted, rtol=rounding, atol=rounding)
        assert (log_probs[place, length:] == 0).all()
        if alignments is not None:
            wanted = torch.tensor(found.alignments, dtype=alignments.dtype).view(length, alignments.shape[-1])
            torch.testing.assert_close(alignments[place, :length], wanted, rtol=0, atol=0)
            assert (alignments[place, length:] == 0).all()
