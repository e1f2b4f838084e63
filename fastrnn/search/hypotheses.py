"""What a search has found: the live beams of each sentence, its finished hypotheses, and how both came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import native
from fastrnn.backends.tensors import address

LENGTH_PENALTIES = ("none", "power", "gnmt", "average")
EARLY_STOPPING = ("first", "heuristic", "exact")
_BOUND = ("eos", "min_length", "max_length", "scores", "done", "broken", "count")
_TABLES = ("divisor", "bonus", "largest_divisor", "largest_bonus")


class Ranking:
    """How finished hypotheses are compared: sum of log-probabilities / divisor(length) + word_reward * length.

    ``divisor`` is 1 for ``"none"``, length for ``"average"``, length^alpha for ``"power"``, and
    ((5 + length) / 6)^alpha for ``"gnmt"`` (Wu et al. 2016, arXiv 1609.08144, equation 14).
    """

    divisor: Tensor  # by length
    bonus: Tensor
    largest_divisor: Tensor  # the most of that length and later ones
    largest_bonus: Tensor

    def __init__(
        self,
        penalty: str,
        alpha: float | None,
        word_reward: float,
        longest: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        lengths = torch.arange(longest + 2, dtype=torch.float64)
        alpha = {"power": 1.0, "gnmt": 0.6}.get(penalty, 0.0) if alpha is None else alpha
        divisor = {
            "none": torch.ones_like(lengths),
            "average": lengths,
            "power": lengths**alpha,
            "gnmt": ((5 + lengths) / 6) ** alpha,
        }[penalty]
        divisor[0] = 1  # of no hypothesis
        bonus = word_reward * lengths
        # The most that a length or any later one allows, for sums that are not positive.
        most = [table[1:].flip(0).cummax(0).values.flip(0) for table in (divisor, bonus)]
        tables = [divisor, bonus, *(torch.cat([table[:1], table]) for table in most)]
        for name, table in zip(_TABLES, tables):
            # This is made after the first step, for which the host need not wait.
            setattr(self, name, table.to(device, dtype, non_blocking=True))
        self.longest = longest

    def rank(self, sums: Tensor, length: int) -> Tensor:
        return sums / self.divisor[length] + self.bonus[length]

    def bound(self, sums: Tensor, length: int) -> Tensor:
        """At least the rank of whatever these hypotheses may become at that length or later."""
        length = min(length, self.longest)
        return sums / self.largest_divisor[length] + self.largest_bonus[length]


@dataclass
class StopRule:
    """When a sentence is done."""

    early_stopping: str  # of EARLY_STOPPING, or "never"
    wanted: int  # n_best
    enough: int  # finished hypotheses, for "first"


class Hypotheses:
    """The bookkeeping of a search over B sentences with K beams each.

    Tensors of sentences have a row for each that is not done, `sentences` says which, since :meth:`compact` drops those
    that are done. Only :meth:`unfinished`, :meth:`compact` and :meth:`best` wait for the device.
    """

    def __init__(
        self,
        batch: int,
        beams: int,
        eos: Tensor,  # [E]
        min_length: Tensor,  # [B]
        max_length: Tensor,  # [B]
        ranking: Ranking,
        stop: StopRule,
        scores: Tensor,  # [B, K]: 0 for what lives at the start, -inf elsewhere
    ) -> None:
        device = scores.device
        self.batch, self.beams = batch, beams
        self.eos, self.min_length, self.max_length = eos, min_length, max_length
        self.ranking, self.stop = ranking, stop
        self.sentences: Tensor | None = None  # [b]; None: all
        self.scores = scores
        self.done = max_length < 1
        self.scores.masked_fill_(self.done[:, None], -torch.inf)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.broken = torch.zeros_like(self.done)  # a beam that lives had logits with NaN
        self._left_over: int | None = None  # sentences that are not done, where that is known; -1: one is broken
        # Finished hypotheses: what they are sorted by, their score, the log-probability of the last token; the step and
        # the beam that it came from, and itself.
        empty = torch.full_like(scores, -torch.inf)
        nothing = torch.zeros(batch, beams, dtype=torch.int64, device=device)
        self.pool = [empty, empty.clone(), empty.clone(), nothing, nothing.clone(), nothing.clone()]
        self._left = [tensor.clone() for tensor in self.pool]  # of all sentences, filled in as they leave
        self.tokens: list[Tensor] = []  # of each step [B, K]
        self.parents: list[Tensor] = []
        self.increments: list[Tensor] = []
        self.weights: list[Tensor] = []  # [B, K, S]: attention of each step, beams as they were before it
        self._native = self._bind()

    def _bind(self) -> Any:
        """What csrc/cpu/beam.h works on, where it can: the addresses of the tensors here."""
        library: Any = native.load()
        if library is None or not self.scores.is_cpu or self.scores.dtype is not torch.float32:
            return None
        beams = library.Beams()
        beams.sentences, beams.beams, beams.ends = len(self.done), self.beams, len(self.eos)
        beams.longest, beams.rule = self.ranking.longest, [*EARLY_STOPPING, "never"].index(self.stop.early_stopping)
        beams.wanted, beams.enough = self.stop.wanted, self.stop.enough
        names = ("key", "score", "increment", "step", "beam", "token")
        fields = {name: getattr(self, name) for name in _BOUND}
        fields |= {name: getattr(self.ranking, name) for name in _TABLES} | dict(zip(names, self.pool))
        for name, tensor in fields.items():
            assert tensor.is_contiguous()
            setattr(beams, name, tensor.data_ptr())
        return beams

    def take(
        self,
        values: Tensor,  # [b, C]: sums of log-probabilities, best first by what selects
        indices: Tensor,  # [b, C]: beam * vocabulary + token
        vocabulary: int,
        extra: Tensor | None = None,  # [b, K]: added to the score of what comes from a beam (coverage)
        weights: Tensor | None = None,
        normalizers: Tensor | None = None,  # [b * K]: NaN where a beam's logits have NaN
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`choose` and :meth:`advance`, all beams of a sentence competing."""
        if self._native is None:
            if normalizers is not None:
                self.note_broken(normalizers.view(-1, self.beams).isnan())
            parents, tokens = indices // vocabulary, indices % vocabulary
            ends, *live, _ = self.choose(values, tokens, parents, self.beams)
            return self.advance(values, tokens, parents, ends, (live[0], live[1], live[2]), extra, weights=weights)
        increments = torch.empty(self.scores.shape)
        tokens, parents, rows = torch.empty((3, *self.scores.shape), dtype=torch.int64).unbind()
        values, indices = values.contiguous(), indices.contiguous()
        extra = None if extra is None else extra.contiguous()
        self._left_over = native.load().beam_step(  # type: ignore[union-attr]
            self._native,
            values.data_ptr(),
            indices.data_ptr(),
            values.shape[1],
            vocabulary,
            address(extra),
            address(normalizers),
            len(self.tokens) + 1,
            tokens.data_ptr(),
            parents.data_ptr(),
            rows.data_ptr(),
            increments.data_ptr(),
        )
        self._note(tokens, parents, increments, weights)
        return tokens, parents, rows.view(-1)

    def choose(
        self,
        values: Tensor,  # [b, C]: sums of log-probabilities, best first by what selects
        tokens: Tensor,  # [b, C]
        parents: Tensor,  # [b, C]: beams before the step
        width: int,  # beams that go on
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Which candidates end, and which go on: the first `width` that do not end. Those that end must be among the
        first `width` themselves.

        Returns:
            Which candidates end [b, C], and of those that go on sums, tokens, parents and place among the candidates
            [b, width]; sums are -inf where there are none.
        """
        length = len(self.tokens) + 1
        valid = values > -torch.inf
        is_end = (tokens.unsqueeze(-1) == self.eos).any(-1)
        early = (length < self.min_length).unsqueeze(1)
        ends = valid & is_end & ~early
        ends[:, width:] = False
        order = torch.sort((~valid | is_end).to(torch.uint8), dim=1, stable=True).indices[:, :width]
        goes_on = (valid & ~is_end).gather(1, order)
        sums = values.gather(1, order).masked_fill(~goes_on, -torch.inf)
        fill = self.eos[0]
        return ends, sums, torch.where(goes_on, tokens.gather(1, order), fill), parents.gather(1, order), order

    def advance(
        self,
        values: Tensor,  # [b, C]: all candidates
        tokens: Tensor,
        parents: Tensor,
        ends: Tensor,
        live: tuple[Tensor, Tensor, Tensor],  # sums, tokens, parents [b, K]
        extra: Tensor | None = None,  # [b, K]: added to the rank of what comes from a beam (coverage)
        keys: tuple[Tensor, Tensor] | None = None,  # [b, C], [b, K]: what to sort by in place of the scores
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes one step: notes what ends and what goes on, and whether that was all of a sentence.

        Returns:
            Tokens that go on, the beams that they came from [b, K], dead ones from themselves, and these rows [b * K].
        """
        length = len(self.tokens) + 1
        sums, live_tokens, live_parents = live
        alive = sums > -torch.inf
        live_parents = torch.where(alive, live_parents, torch.arange(self.beams, device=sums.device))
        before = self.scores
        self._note(live_tokens, live_parents, sums - before.gather(1, live_parents), weights)
        at_limit = (length >= self.max_length).unsqueeze(1)
        # What is cut at the limit competes as it is.
        pairs = [(values, tokens, parents, ends), (sums, live_tokens, live_parents, alive & at_limit)]
        offered = []
        for index, (v, t, p, e) in enumerate(pairs):
            score = self.ranking.rank(v, length)
            score = score if extra is None else score + extra.gather(1, p)
            gone = [score if keys is None else keys[index], score, v - before.gather(1, p)]
            offered.append([x.masked_fill(~e, -torch.inf) for x in gone] + [torch.full_like(t, length - 1), p, t])
        both = [torch.cat(columns, 1) for columns in zip(self.pool, *offered)]
        # Stable: what finished earlier comes first among equals.
        order = torch.sort(both[0], dim=1, descending=True, stable=True).indices[:, : self.beams]
        self.pool = [column.gather(1, order) for column in both]
        self.count += ends.sum(1)
        self.done = self.done | at_limit.squeeze(1) | ~alive.any(1) | self._ruled(sums, length)
        self.scores = sums.masked_fill(self.done.unsqueeze(1), -torch.inf)
        first = torch.arange(0, sums.numel(), self.beams, device=sums.device)
        return live_tokens, live_parents, (first.unsqueeze(1) + live_parents).flatten()

    def note_broken(self, nan: Tensor) -> None:
        """nan [b, K]: which beams' logits have NaN; those of dead beams nobody sees."""
        self.broken |= (nan & (self.scores > -torch.inf)).any(1)

    def _ruled(self, sums: Tensor, length: int) -> Tensor:
        """[b]: done by the stop rule."""
        stop, best = self.stop, sums.amax(1)
        if stop.early_stopping == "first":
            return self.count >= stop.enough
        if stop.early_stopping == "heuristic":
            return self.ranking.rank(best, length) <= self.pool[0][:, -1]
        if stop.early_stopping == "never":
            return torch.zeros_like(self.done)
        return self.ranking.bound(best, length + 1) <= self.pool[0][:, stop.wanted - 1]

    def _note(self, tokens: Tensor, parents: Tensor, increments: Tensor, weights: Tensor | None) -> None:
        for history, new in ((self.tokens, tokens), (self.parents, parents), (self.increments, increments)):
            history.append(self._of_all(new))
        if weights is not None:
            self.weights.append(self._of_all(weights))

    def _of_all(self, rows: Tensor) -> Tensor:
        """Rows of the sentences that are left as rows of all sentences."""
        if self.sentences is None:
            return rows
        return rows.new_zeros(self.batch, *rows.shape[1:]).index_copy_(0, self.sentences, rows)

    def unfinished(self) -> int:
        """How many sentences are not done.

        Raises:
            ValueError: a step has returned NaN.
        """
        if self._left_over is not None and self._left_over >= 0:
            return self._left_over
        broken = self.broken.nonzero().squeeze(1)
        if len(broken):
            sentences = (broken if self.sentences is None else self.sentences[broken]).tolist()
            raise ValueError(f"step must return logits without NaN and inf, got some for sentences {sentences}")
        return len(self.done) - int(self.done.sum())

    def compact(self) -> Tensor:
        """Drops the sentences that are done; returns which rows stay."""
        self._leave()
        keep = (~self.done).nonzero().squeeze(1)
        self.sentences = keep if self.sentences is None else self.sentences[keep]
        for name in ("scores", "done", "broken", "count", "min_length", "max_length"):
            setattr(self, name, getattr(self, name)[keep])
        self.pool = [column[keep] for column in self.pool]
        self._native = self._bind()
        return keep

    def _leave(self) -> None:
        for whole, part in zip(self._left, self.pool):
            if self.sentences is None:
                whole.copy_(part)
            else:
                whole.index_copy_(0, self.sentences, part)

    def best(self, count: int, pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """The best `count` of each sentence: tokens, lengths, scores, log-probabilities, weights."""
        self._leave()
        _, score, increment, step, beam, token = (column[:, :count] for column in self._left)
        found = score > -torch.inf
        lengths = torch.where(found, step + 1, 0)
        longest = int(lengths.max()) if lengths.numel() else 0
        tokens = torch.full((*score.shape, longest), pad, device=score.device)
        log_probs = score.new_zeros(tokens.shape)
        if self._native is not None and not self.weights:
            self._trace_back(found, step, beam, token, increment, tokens, log_probs)
            return tokens, lengths, score, log_probs, None
        weights = self.weights[0].new_zeros(*tokens.shape, self.weights[0].shape[-1]) if self.weights else None
        for t in range(longest - 1, -1, -1):
            last, inside = found & (step == t), found & (step > t)
            at = beam.clamp(min=0)
            tokens[..., t] = torch.where(last, token, torch.where(inside, self.tokens[t].gather(1, at), pad))
            log_probs[..., t] = torch.where(
                last, increment, torch.where(inside, self.increments[t].gather(1, at), log_probs[..., t])
            )
            # The beam, before step t, that this token came from.
            beam = torch.where(inside, self.parents[t].gather(1, at), beam)
            if weights is not None:
                seen = self.weights[t].gather(1, beam.unsqueeze(-1).expand(-1, -1, weights.shape[-1]))
                weights[:, :, t] = seen * (last | inside).unsqueeze(-1)
        return tokens, lengths, score, log_probs, weights

    def _trace_back(
        self,
        found: Tensor,
        step: Tensor,
        beam: Tensor,
        token: Tensor,
        increment: Tensor,
        tokens: Tensor,
        log_probs: Tensor,
    ) -> None:
        last = torch.where(found, step, -1)
        beam, token, increment = beam.contiguous(), token.contiguous(), increment.contiguous()
        steps = zip(self.tokens, self.parents, self.increments)
        native.load().trace_back(  # type: ignore[union-attr]
            [tuple(tensor.data_ptr() for tensor in of_step) for of_step in steps],
            self.batch,
            self.beams,
            tokens.shape[1],
            tokens.shape[2],
            last.data_ptr(),
            beam.data_ptr(),
            token.data_ptr(),
            increment.data_ptr(),
            tokens.data_ptr(),
            log_probs.data_ptr(),
        )
