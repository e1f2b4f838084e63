"""beam_search: the most probable sequences of any model that goes step by step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastrnn.ops.top_k import select
from fastrnn.search import constraints, sampling
from fastrnn.search.hypotheses import EARLY_STOPPING, LENGTH_PENALTIES, Hypotheses, Ranking, StopRule

Step = Callable[[Tensor, Any], tuple[Any, ...]]
Processor = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shared:
    """In a state: a tree whose tensors have leading dimension B, one row for all beams of a sentence.

    It is handed to the step as it is, `.value`, and never re-ordered; rows leave with their sentences.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class BeamResult(NamedTuple):
    """What a search has found, best first."""

    tokens: Tensor
    """[B, n_best, L] int64: without the begin token, with the end token that ended them, then pad."""
    lengths: Tensor
    """[B, n_best] int64, the end token counted; 0 where there is no such hypothesis."""
    scores: Tensor
    """[B, n_best], sums of log-probabilities under the length penalty; -inf where there is none."""
    log_probs: Tensor
    """[B, n_best, L], of each token, 0 behind the length."""
    alignments: Tensor | None
    """[B, n_best, L, S], attention's weights as each token was made, 0 behind the length."""


def expand(state: Any, beams: int, dim: int = 0) -> Any:
    """A tree whose tensors have their slices along `dim` repeated for `beams` neighbours: [B, ..] to [B*K, ..]."""
    if beams == 1:
        return state
    return tree_map(lambda leaf: leaf.repeat_interleave(beams, dim) if isinstance(leaf, Tensor) else leaf, state)


@torch.no_grad()
def beam_search(
    step: Step | Sequence[Step],
    state: Any,
    *,
    batch_size: int,
    beam_size: int,
    bos: int | Tensor,
    eos: int | Sequence[int],
    max_length: int | Tensor,
    n_best: int = 1,
    pad: int | None = None,
    min_length: int | Tensor = 0,
    length_penalty: str = "none",
    alpha: float | None = None,
    word_reward: float = 0.0,
    coverage_penalty: str | None = None,
    coverage_beta: float = 0.2,
    stepwise_coverage: bool = False,
    source_lengths: Tensor | None = None,
    early_stopping: str = "exact",
    patience: float = 1.0,
    eos_threshold: float | None = None,
    prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    allowed_tokens: Callable[[int, Tensor], Iterable[int]] | None = None,
    banned_tokens: Iterable[int] = (),
    banned_phrases: Iterable[Sequence[int]] = (),
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    groups: int = 1,
    diversity: float = 0.0,
    sample: str | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor = 0,
    processors: Sequence[Processor] = (),
    weights: Sequence[float] | None = None,
    combine: str = "log",
    need_alignments: bool = False,
    sync_every: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BeamResult:
    """Batched beam search, on the device of the state, for any step function.

    At each step the ``beam_size`` best continuations of a sentence's beams that do not end go on; those with an end
    token, where they are among the ``beam_size`` best of all, are finished hypotheses. What a sentence gets does not
    depend on its batch mates, as far as the step's logits do not.

    Args:
        step: ``step(tokens [b * beam_size], state) -> (logits [b * beam_size, V], state)``, or with attention's weights
            [b * beam_size, S] as a third result. b is batch_size at first; sentences that are done leave. Several
            steps, with a list of states, are an ensemble, in which attention's weights are the first one's.
        state: any tree. Its tensors have leading dimension batch_size * beam_size and are re-ordered as beams are;
            those within :class:`Shared` have batch_size rows. Other leaves are passed on. See :func:`expand`.
        batch_size, beam_size: B and K.
        bos: the first input token, or one for each sentence [B].
        eos: the token, or tokens, that end a hypothesis.
        max_length: of a hypothesis, the end token counted; one for each sentence where it is a tensor [B]. What is cut
            there competes with finished hypotheses by the same score.
        n_best: hypotheses to return, at most beam_size. Fewer are a prefix of more.
        pad: fills up tokens; by default the (first) end token.
        min_length: tokens before which none ends, the end token counted; [B] or one for all.
        length_penalty: what a sum of log-probabilities is divided by: ``"none"``, ``"power"`` (length^alpha),
            ``"gnmt"`` (((5 + length) / 6)^alpha) or ``"average"`` (length).
        alpha: of the length penalty; by default 1 for ``"power"`` and 0.6 for ``"gnmt"``.
        word_reward: added to a score for each token.
        coverage_penalty: ``"wu"`` or ``"summary"``: a finished hypothesis is scored by what its attention has seen of
            the source, times coverage_beta; :func:`fastrnn.search.constraints.coverage` says how. The step must return
            attention's weights.
        stepwise_coverage: the penalty also decides which beams go on.
        source_lengths: [B]: how much of the S attended places counts for the coverage; by default all.
        early_stopping: when a sentence is done: ``"exact"`` when no beam can still become one of the n_best;
            ``"heuristic"`` when the best beam, were it to end now, would not be among the beam_size best finished ones;
            ``"first"`` when patience * beam_size hypotheses have ended.
        patience: of ``"first"`` (Kasai et al. 2022, arXiv 2204.05424).
        eos_threshold: an end token is taken only where its log-probability exceeds this times the largest of the other
            tokens' (Hannun et al. 2019, arXiv 1904.02619).
        prefix: [B, P] tokens that every hypothesis of a sentence begins with; they count in its score and length.
        prefix_lengths: [B]: how many of them count; by default all.
        allowed_tokens: ``allowed_tokens(sentence, tokens [t])`` names the tokens that may come next, for each beam
            that lives. Runs on the host.
        banned_tokens, banned_phrases: what must not appear. Bans leave other tokens' probabilities as they are.
        repetition_penalty: logits of tokens that were there already are divided by it, multiplied where negative.
        no_repeat_ngram: size of n-grams that appear once at most; 0: no limit.
        groups: beams compete within as many groups, one after the other, each of beam_size / groups.
        diversity: what a token's value loses where it is selected for each beam of earlier groups that has just taken
            it (Vijayakumar et al. 2016, arXiv 1610.02424); scores stay the model's.
        sample: ``"ancestral"``: each beam draws its own tokens; ``"gumbel"``: beam_size sequences without replacement,
            in the order in which they were drawn (stochastic beam search, Kool et al. 2019, arXiv 1903.06059). Scores
            are the model's.
        temperature, top_k, top_p: of what is sampled from.
        seed: of samples; sentence b has seed + b, or seed[b].
        processors: each ``processor(logits [b, K, V], tokens [b, K, t], sentences [b]) -> logits``, before log-softmax.
            In an ensemble they get the combined log-probabilities, which stay as they return them.
        weights: of the steps; by default 1 / how many there are.
        combine: ``"log"``: sum of weights * log-probabilities (shallow fusion); ``"linear"``: log of the weighted mean
            of probabilities.
        need_alignments: whether attention's weights are returned.
        sync_every: steps after which the host looks at which sentences are done; by default 1 on a CPU and 8 on a GPU.
        progress: called as ``progress(steps done, sentences not done)`` whenever the host looks.

    Returns:
        A :class:`BeamResult`. Where nothing may come next a beam dies; a sentence whose beams all die with nothing
        finished has hypotheses of length 0 and score -inf, and so has n_best where there are fewer hypotheses.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came; or the step returned NaN or inf.
    """
    if callable(step):
        step, state = [step], [state]
    if not isinstance(step, (list, tuple)) or not isinstance(state, (list, tuple)):
        raise TypeError(
            "step must be a function, or a list of them with a list of states, got "
            f"{type(step).__name__} and {type(state).__name__}"
        )
    steps, states = list(step), list(state)
    _check_counts(batch_size=(batch_size, 0), beam_size=(beam_size, 1), n_best=(n_best, 1), groups=(groups, 1))
    if not steps:
        raise ValueError("step must be one function or several, got none")
    if len(states) != len(steps):
        raise ValueError(f"state must have one state for each of the {len(steps)} steps, got {len(states)}")
    if n_best > beam_size:
        raise ValueError(f"n_best must be at most beam_size {beam_size}, got {n_best}")
    if beam_size % groups:
        raise ValueError(f"groups must divide beam_size {beam_size}, got {groups}")
    ends = _tokens("eos", eos)
    banned = [_tokens("banned_tokens", [token]) for token in banned_tokens]
    banned += [_tokens("banned_phrases", phrase) for phrase in banned_phrases]
    _check_choice("length_penalty", length_penalty, LENGTH_PENALTIES)
    _check_choice("early_stopping", early_stopping, EARLY_STOPPING)
    _check_choice("combine", combine, ("log", "linear"))
    if coverage_penalty is not None:
        _check_choice("coverage_penalty", coverage_penalty, ("wu", "summary"))
    if sample is not None:
        _check_choice("sample", sample, ("ancestral", "gumbel"))
    if sample and (groups > 1 or stepwise_coverage):
        raise ValueError("sample does not go with groups or stepwise_coverage")
    if not 0 < patience < math.inf or (patience != 1 and early_stopping != "first"):
        raise ValueError(f"patience must be above 0, and 1 unless early_stopping is 'first', got {patience}")
    if coverage_beta < 0:
        raise ValueError(f"coverage_beta must be at least 0, got {coverage_beta}")
    if repetition_penalty <= 0 or temperature <= 0 or not 0 < top_p <= 1 or top_k < 0 or no_repeat_ngram < 0:
        raise ValueError(
            "repetition_penalty and temperature must be above 0, top_p in (0, 1], top_k and no_repeat_ngram at least "
            f"0, got {repetition_penalty}, {temperature}, {top_p}, {top_k}, {no_repeat_ngram}"
        )
    if sync_every is not None and sync_every < 1:
        raise ValueError(f"sync_every must be at least 1, got {sync_every}")
    if weights is not None and len(weights) != len(steps):
        raise ValueError(f"weights must be one for each of the {len(steps)} steps, got {len(weights)}")
    if combine == "linear" and weights is not None and min(weights) < 0:
        raise ValueError(f"weights must be at least 0 where combine is 'linear', got {list(weights)}")
    if source_lengths is not None and (source_lengths.is_floating_point() or source_lengths.shape != (batch_size,)):
        got = f"{source_lengths.dtype} {tuple(source_lengths.shape)}"
        raise ValueError(f"source_lengths must hold integers of shape {(batch_size,)}, got {got}")
    device = _check_state(states, batch_size, beam_size)
    longest, limits = _per_sentence("max_length", max_length, batch_size, device)
    _, least = _per_sentence("min_length", min_length, batch_size, device)
    starts = _per_sentence("bos", bos, batch_size, device)[1]
    seeds = None
    if sample:
        seeds = seed.to(device) if isinstance(seed, Tensor) else seed + torch.arange(batch_size, device=device)
        if seeds.shape != (batch_size,) or seeds.is_floating_point():
            got = f"{seeds.dtype} {tuple(seeds.shape)}"
            raise ValueError(f"seed must be an int or hold integers of shape {(batch_size,)}, got {got}")
    forced = _Prefix(prefix, prefix_lengths, batch_size, longest, ends, limits, device)
    phrases = constraints.Phrases(banned, device)
    search = _Search(
        steps=steps,
        states=states,
        beams=beam_size,
        groups=groups,
        eos=torch.tensor(ends, device=device),
        weights=[1 / len(steps)] * len(steps) if weights is None else list(weights),
        linear=combine == "linear",
        processors=processors,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram=no_repeat_ngram,
        phrases=phrases,
        allowed=allowed_tokens,
        forced=forced,
        eos_threshold=eos_threshold,
        diversity=diversity,
        sample=sample,
        truncation=(temperature, top_k, top_p),
        seeds=seeds,
        coverage=coverage_penalty,
        coverage_beta=coverage_beta,
        stepwise=stepwise_coverage,
        source_lengths=None if source_lengths is None else source_lengths.to(device),
        need_weights=need_alignments or coverage_penalty is not None,
        need_alignments=need_alignments,
        known={"eos": ends, "banned tokens": [max(phrase) for phrase in banned], "prefix": [forced.largest]},
    )
    rising = any(weight < 0 for weight in search.weights) or (len(steps) > 1 and bool(processors))
    falling = not rising and (combine == "log" or sum(search.weights) <= 1 + 1e-6)
    # Where sums may rise nothing can be ruled out.
    never = sample is not None or (early_stopping == "exact" and not falling)
    stop = StopRule("never" if never else early_stopping, n_best, math.ceil(patience * beam_size))

    def begin(dtype: torch.dtype) -> Hypotheses:
        scores = torch.full((batch_size, beam_size), -torch.inf, dtype=dtype, device=device)
        # The beams of a sentence, or of a group, are the same at first: one of them lives. Those that draw each live.
        scores[:, :: 1 if sample == "ancestral" else beam_size // groups] = 0
        ranking = Ranking(length_penalty, alpha, word_reward, longest, dtype, device)
        return Hypotheses(batch_size, beam_size, search.eos, least, limits, ranking, stop, scores)

    if len(steps) == 1 and batch_size and hasattr(steps[0], "fastrnn_fused"):
        search.runner = steps[0].fastrnn_fused(states[0])
    tokens = starts.repeat_interleave(beam_size)
    every = sync_every or (1 if device.type == "cpu" else 8)
    found: Hypotheses | None = None
    for t in range(longest if batch_size else 0):
        logits = search.call(tokens, t)
        if found is None:
            found = begin(torch.promote_types(logits[0].dtype, torch.float32) if logits else torch.float32)
        tokens = search.take(found, logits, t)
        if (t + 1) % every == 0 or t + 1 == longest:
            left = found.unfinished()
            if progress is not None:
                progress(t + 1, left)
            if left == 0:
                break
            if left < found.scores.shape[0]:
                tokens = tokens.view(-1, beam_size)[search.drop(found)].flatten()
    if found is None:
        found = begin(torch.float32)
    filling = ends[0] if pad is None else pad
    return BeamResult(*found.best(n_best, filling))


class _Prefix:
    """Tokens that the hypotheses of each sentence must begin with."""

    def __init__(
        self,
        tokens: Tensor | None,
        lengths: Tensor | None,
        batch: int,
        longest: int,
        ends: Sequence[int],
        limits: Tensor,
        device: torch.device,
    ) -> None:
        self.steps = self.largest = 0
        if tokens is None:
            return
        if not isinstance(tokens, Tensor):
            raise TypeError(f"prefix must be a torch.Tensor, got {type(tokens).__name__}")
        if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"prefix must hold integers of shape ({batch}, P), got {tokens.dtype} {tuple(tokens.shape)}"
            )
        lengths = torch.full((batch,), tokens.shape[1]) if lengths is None else lengths
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"prefix_lengths must have shape {(batch,)}, got {tuple(lengths.shape)}")
        self.tokens, self.lengths = tokens.to(device, torch.int64), lengths.to(device)
        if bool(((self.lengths > limits) | (self.lengths > tokens.shape[1]) | (self.lengths < 0)).any()):
            raise ValueError(
                f"prefix_lengths must be from 0 to max_length and to the prefix's {tokens.shape[1]}, "
                f"got {lengths.tolist()}"
            )
        counted = torch.arange(tokens.shape[1], device=device) < self.lengths.unsqueeze(1)
        if bool((torch.isin(self.tokens, torch.tensor(ends, device=device)) & counted).any()):
            raise ValueError(f"prefix must not hold the end token, got one of {list(ends)} in it")
        self.steps = int(self.lengths.max()) if batch else 0
        used = self.tokens[counted]
        if used.numel():
            self.largest = int(used.max())
            if int(used.min()) < 0:
                raise ValueError(f"prefix must hold tokens of at least 0, got {int(used.min())}")

    def force(self, allowed: Tensor, log_probs: Tensor, t: int) -> Tensor:
        """[b, K, V]: that of the prefix's token alone where it has one for step t, else what is allowed."""
        token = self.tokens[:, t].clamp(0, log_probs.shape[-1] - 1).view(-1, 1, 1).expand(-1, log_probs.shape[1], 1)
        only = torch.full_like(log_probs, -torch.inf).scatter(-1, token, log_probs.gather(-1, token))
        return torch.where((t < self.lengths).view(-1, 1, 1), only, allowed)

    def keep(self, rows: Tensor) -> None:
        if self.steps:
            self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]


@dataclass(eq=False)
class _Search:
    """A search under way: what its steps return is turned into candidates, and its states follow the beams."""

    steps: list[Step]
    states: list[Any]
    beams: int
    groups: int
    eos: Tensor
    weights: list[float]
    linear: bool
    processors: Sequence[Processor]
    repetition_penalty: float
    no_repeat_ngram: int
    phrases: constraints.Phrases
    allowed: Callable[[int, Tensor], Iterable[int]] | None
    forced: _Prefix
    eos_threshold: float | None
    diversity: float
    sample: str | None
    truncation: tuple[float, int, float]
    seeds: Tensor | None  # [b]
    coverage: str | None
    coverage_beta: float
    stepwise: bool
    source_lengths: Tensor | None  # [b]
    need_weights: bool
    need_alignments: bool
    known: dict[str, list[int]]  # tokens that must be in the vocabulary

    def __post_init__(self) -> None:
        self.attention: Tensor | None = None  # [b, K, S] of this step
        self.total: Tensor | None = None  # [b, K, S] of the steps before
        self.history: Tensor | None = None  # [b, K, t], where something wants it
        self.sampled: tuple[Tensor, Tensor] | None = None  # [b, K]: sums under what is sampled from, and perturbed
        self.vocabulary = 0
        # For each beam that goes on: so many contain one that does not end, whatever ends.
        self.candidates = 1 + self.eos.shape[0]
        # A step that is fused with the selection keeps its state, whose rows these are now, and gets these tokens.
        self.runner: Any = None
        self.rows: Tensor | None = None
        self.tokens: Tensor | None = None
        self.remembers = bool(
            self.processors
            or self.repetition_penalty != 1
            or self.no_repeat_ngram
            or self.phrases
            or self.allowed is not None
        )
        self.changes = self.remembers or len(self.steps) > 1 or self.eos_threshold is not None
        self.changes |= self.groups > 1 or self.sample is not None or self.stepwise

    def call(self, tokens: Tensor, t: int) -> list[Tensor]:
        """Logits of every step function, [b * K, V] each; none where the selection is fused with the step."""
        if self.runner is not None:
            if not self.vocabulary:
                self._check_first(self.runner.vocabulary, tokens.shape[0])
                lowest, highest = int(tokens.min()), int(tokens.max())
                if lowest < 0 or highest >= self.vocabulary:  # The kernels do not look.
                    raise ValueError(f"bos must be from 0 to below {self.vocabulary}, got {lowest} to {highest}")
            self.rows = torch.arange(tokens.shape[0]) if self.rows is None else self.rows
            if not self.changes and t >= self.forced.steps:
                self.tokens = tokens
                return []
            logits = self.runner.logits(tokens, self.rows)
            if self.need_weights:
                self.attention = self.runner.seen.view(len(tokens) // self.beams, self.beams, -1)
            return [logits]
        found: list[Tensor] = []
        for index, step in enumerate(self.steps):
            logits, self.states[index], *more = step(tokens, self.states[index])
            if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != len(tokens):
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"step must return logits of shape ({len(tokens)}, V), got {got}")
            if not logits.is_floating_point():
                raise TypeError(f"step must return logits of a floating dtype, got {logits.dtype}")
            if found and logits.shape != found[0].shape:
                raise ValueError(
                    f"all steps must return logits of shape {tuple(found[0].shape)}, got {tuple(logits.shape)}"
                )
            found.append(logits)
            if self.need_weights and index == 0:
                weights = more[0] if more else None
                if not isinstance(weights, Tensor) or weights.dim() != 2 or len(weights) != len(tokens):
                    raise ValueError(
                        f"step must return attention's weights [{len(tokens)}, S] for alignments and coverage, got "
                        f"{tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__}"
                    )
                self.attention = weights.view(-1, self.beams, weights.shape[1])
        if not self.vocabulary:
            self._check_first(found[0].shape[1], len(tokens))
        return found

    def _check_first(self, vocabulary: int, rows: int) -> None:
        """That what the first call has returned goes with what was given."""
        self.vocabulary = vocabulary
        for name, tokens in self.known.items():
            if max(tokens, default=0) >= vocabulary:
                raise ValueError(f"{name} must be below {vocabulary}, what the logits have, got {max(tokens)}")
        _check_state(self.states, rows // self.beams, self.beams)

    def take(self, found: Hypotheses, logits: list[Tensor], t: int) -> Tensor:
        """Advances by one step; the next tokens [b * K]."""
        if self.sample is not None:
            tokens, parents, rows = self._draw(found, self._log_probs(found, logits, t), t)
        elif self.groups > 1:
            tokens, parents, rows = self._select_groups(found, self._log_probs(found, logits, t))
        else:
            tokens, parents, rows = self._select(found, logits, t)
        self._follow(tokens, parents, rows)
        return tokens.flatten()

    def drop(self, found: Hypotheses) -> Tensor:
        """Lets go of the sentences that are done; returns which rows stay."""
        keep = found.compact()
        rows = (keep.unsqueeze(1) * self.beams + torch.arange(self.beams, device=keep.device)).flatten()
        if self.runner is None:
            self.states = [_take_rows(state, rows, keep) for state in self.states]
        else:
            self.runner, self.rows = self.runner.keep(self.rows[rows], keep), None  # type: ignore[index]
        for name in ("attention", "total", "history", "seeds", "source_lengths"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[keep])
        if self.sampled is not None:
            self.sampled = (self.sampled[0][keep], self.sampled[1][keep])
        self.forced.keep(keep)
        return keep

    def _follow(self, tokens: Tensor, parents: Tensor, rows: Tensor) -> None:
        """Moves everything that belongs to a beam to where its continuation is."""
        if self.remembers:
            new = tokens.unsqueeze(-1)
            if self.history is not None:
                at = parents.unsqueeze(-1).expand(-1, -1, self.history.shape[-1])
                new = torch.cat([self.history.gather(1, at), new], -1)
            self.history = new
        if self.total is not None:
            self.total = self.total.gather(1, parents.unsqueeze(-1).expand(self.total.shape))
        if self.runner is not None:
            self.rows = rows
        elif self.beams > 1:
            self.states = [_take_rows(state, rows, None) for state in self.states]

    def _covered(self, found: Hypotheses) -> Tensor | None:
        """[b, K]: the coverage penalty of what comes from each beam, this step's attention included."""
        if self.coverage is None:
            return None
        assert self.attention is not None
        attention = self.attention.to(found.scores.dtype)
        self.total = attention if self.total is None else self.total + attention
        return constraints.coverage(self.total, self.coverage, self.coverage_beta, self._seen())

    def _seen(self) -> Tensor | None:
        """[b, S]: which attended places the source has."""
        if self.source_lengths is None:
            return None
        assert self.attention is not None
        places = torch.arange(self.attention.shape[-1], device=self.attention.device)
        return places < self.source_lengths.unsqueeze(1)

    def _log_probs(self, found: Hypotheses, logits: list[Tensor], t: int) -> Tensor:
        """[b, K, V], -inf for what may not come next."""
        batch, dtype = len(found.done), found.scores.dtype
        shaped = [rows.view(batch, self.beams, -1).to(dtype) for rows in logits]
        if len(shaped) == 1:
            log_probs = _log_softmax(self._processed(found, shaped[0]))
        else:
            # Weights are Python's numbers: as a tensor the host would wait for them at every step on a GPU.
            each = [(_log_softmax(rows), weight) for rows, weight in zip(shaped, self.weights)]
            if self.linear:
                terms = [rows + (math.log(weight) if weight else -math.inf) for rows, weight in each]
                log_probs = torch.stack(terms).logsumexp(0)
            else:
                # A weight of 0 times -inf would be NaN.
                log_probs = torch.stack(
                    [rows * weight if weight else torch.zeros_like(rows) for rows, weight in each]
                ).sum(0)
            log_probs = self._processed(found, log_probs)
        allowed = log_probs
        if self.no_repeat_ngram and self.history is not None:
            allowed = allowed.masked_fill(
                constraints.ngram_mask(self.history, self.no_repeat_ngram, self.vocabulary), -torch.inf
            )
        if self.phrases:
            allowed = allowed.masked_fill(self.phrases.mask(self._history(batch), self.vocabulary), -torch.inf)
        if self.allowed is not None:
            sentences = range(batch) if found.sentences is None else found.sentences.tolist()
            alive = found.scores > -torch.inf
            mask = constraints.allowed_mask(self.allowed, self._history(batch), alive, sentences, self.vocabulary)
            allowed = allowed.masked_fill(mask, -torch.inf)
        if self.eos_threshold is not None:
            others = log_probs.index_fill(-1, self.eos, -torch.inf).amax(-1, keepdim=True)
            ends = log_probs.index_select(-1, self.eos)
            taken = ends > self.eos_threshold * others
            allowed = allowed.index_copy(
                -1, self.eos, torch.where(taken, allowed.index_select(-1, self.eos), -torch.inf)
            )
        if self.sample is not None:
            early = (t + 1 < found.min_length).view(-1, 1, 1)
            allowed = torch.where(early, allowed.index_fill(-1, self.eos, -torch.inf), allowed)
        if t < self.forced.steps:
            allowed = self.forced.force(allowed, log_probs, t)
        found.note_broken(log_probs.isnan().any(-1))
        return allowed

    def _processed(self, found: Hypotheses, logits: Tensor) -> Tensor:
        batch = len(logits)
        sentences = found.sentences
        if self.processors and sentences is None:
            sentences = torch.arange(batch, device=logits.device)
        for processor in self.processors:
            shape, logits = logits.shape, processor(logits, self._history(batch), sentences)  # type: ignore[arg-type]
            if not isinstance(logits, Tensor) or logits.shape != shape:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"processors must return logits of shape {tuple(shape)}, got {got}")
        if self.repetition_penalty != 1 and self.history is not None:
            logits = constraints.repetition(logits, self.history, self.repetition_penalty)
        return logits

    def _history(self, batch: int) -> Tensor:
        if self.history is None:
            return torch.empty(batch, self.beams, 0, dtype=torch.int64, device=self.eos.device)
        return self.history

    def _select(self, found: Hypotheses, logits: list[Tensor], t: int) -> tuple[Tensor, Tensor, Tensor]:
        beams, vocabulary, scores = self.beams, self.vocabulary, found.scores.view(-1)
        count = min(self.candidates * beams, beams * vocabulary)
        if not logits:
            values, indices, normalizers = self.runner.select(self.tokens, self.rows, count, scores, beams)
            if self.need_weights:
                self.attention = self.runner.seen.view(-1, beams, self.runner.seen.shape[1])
            extra = self._covered(found)
        elif self.changes:
            extra = self._covered(found)
            log_probs = self._log_probs(found, logits, t).view(-1, vocabulary)
            steered = scores + extra.flatten() if self.stepwise and extra is not None else scores
            values, indices, _ = select(log_probs, count, steered, beams, torch.zeros_like(scores))
            if self.stepwise and extra is not None:
                values = values - extra.gather(1, indices // vocabulary)
            return found.take(values, indices, vocabulary, extra, self._noted())
        else:
            rows, normalizers = logits[0], None
            if t < self.forced.steps:
                # The normalizers are those that sentences without a prefix get where nobody has one.
                normalizers = select(rows, 1)[2]
                shaped = rows.view(-1, beams, vocabulary)
                rows = self.forced.force(shaped, shaped, t).view(-1, vocabulary)
            values, indices, normalizers = select(rows, count, scores, beams, normalizers)
            extra = self._covered(found)
        return found.take(values, indices, vocabulary, extra, self._noted(), normalizers)

    def _select_groups(self, found: Hypotheses, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, beams, vocabulary = log_probs.shape
        extra = self._covered(found)
        width = beams // self.groups
        count = min(self.candidates * width, width * vocabulary)
        taken = log_probs.new_zeros(batch, 1, vocabulary)
        chosen = []
        for first in range(0, beams, width):
            of_group, scores = log_probs[:, first : first + width], found.scores[:, first : first + width]
            selected_by = scores if extra is None or not self.stepwise else scores + extra[:, first : first + width]
            values, indices, _ = select(
                (of_group - self.diversity * taken).reshape(-1, vocabulary),
                count,
                selected_by.flatten(),
                width,
                scores.new_zeros(batch * width),
            )
            parents, tokens = indices // vocabulary, indices % vocabulary
            sums = scores.gather(1, parents) + of_group.flatten(1).gather(1, indices)
            values = torch.where(values > -torch.inf, sums, -torch.inf)
            ends, sums, live_tokens, live_parents, _ = found.choose(values, tokens, parents, width)
            taken.squeeze(1).scatter_add_(1, live_tokens, (sums > -torch.inf).to(taken.dtype))
            chosen.append((values, tokens, parents + first, ends, sums, live_tokens, live_parents + first))
        values, tokens, parents, ends, sums, *others = (torch.cat(parts, 1) for parts in zip(*chosen))
        live = (sums, others[0], others[1])
        return found.advance(values, tokens, parents, ends, live, extra, weights=self._noted())

    def _draw(self, found: Hypotheses, log_probs: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.seeds is not None
        extra = self._covered(found)
        batch, beams, vocabulary = log_probs.shape
        scores = found.scores
        drawn_from = sampling.truncated(log_probs.double(), *self.truncation).log_softmax(-1)
        # A row of -inf alone has nothing to be drawn.
        drawn_from = drawn_from.masked_fill(log_probs == -torch.inf, -torch.inf)
        noise = sampling.gumbel_noise(self.seeds, t, beams, vocabulary)
        if self.sample == "ancestral":
            tokens = (drawn_from + noise).argmax(-1)
            parents = torch.arange(beams, device=tokens.device).expand(batch, -1)
            values = scores + log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            ends, chosen, live_tokens, live_parents, _ = found.choose(values, tokens, parents, beams)
            live = (chosen, live_tokens, live_parents)
            return found.advance(values, tokens, parents, ends, live, extra, weights=self._noted())
        dead = (scores == -torch.inf).unsqueeze(-1)
        if self.sampled is None:
            self.sampled = (scores.double(), scores.double())
        sums = (self.sampled[0].unsqueeze(-1) + drawn_from).masked_fill(dead, -torch.inf)
        perturbed = sampling.conditioned(sums + noise, self.sampled[1]).masked_fill(sums == -torch.inf, -torch.inf)
        keys, indices = perturbed.flatten(1).topk(min(beams, beams * vocabulary), 1)
        # The beams hold the largest of all, whether they have ended or not.
        both = torch.cat([found.pool[0].double(), keys], 1)
        order = torch.sort(both, dim=1, descending=True, stable=True).indices[:, :beams]
        among = torch.zeros_like(both, dtype=torch.bool).scatter(1, order, True)
        found.pool[0] = found.pool[0].masked_fill(~among[:, :beams], -torch.inf)
        found.pool[1] = found.pool[1].masked_fill(~among[:, :beams], -torch.inf)
        parents, tokens = indices // vocabulary, indices % vocabulary
        values = scores.gather(1, parents) + log_probs.flatten(1).gather(1, indices)
        values = values.masked_fill(~among[:, beams:] | (keys == -torch.inf), -torch.inf)
        ends, live_sums, live_tokens, live_parents, at = found.choose(values, tokens, parents, beams)
        self.sampled = (sums.flatten(1).gather(1, indices.gather(1, at)), keys.gather(1, at))
        sorted_by = (keys.to(scores.dtype), keys.gather(1, at).to(scores.dtype))
        live = (live_sums, live_tokens, live_parents)
        return found.advance(values, tokens, parents, ends, live, extra, sorted_by, self._noted())

    def _noted(self) -> Tensor | None:
        if not self.need_alignments or self.attention is None:
            return None
        # A fused step writes the next step's there.
        return self.attention if self.runner is None else self.attention.clone()


def _log_softmax(logits: Tensor) -> Tensor:
    """Of a row of -inf alone: -inf."""
    return logits.log_softmax(-1).masked_fill(logits == -torch.inf, -torch.inf)


def _take_rows(state: Any, rows: Tensor, sentences: Tensor | None) -> Any:
    """A state with these rows; what is shared has its rows by `sentences`, None: all as they are."""
    leaves, tree = tree_flatten(state)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[index] = leaf.index_select(0, rows)
        elif isinstance(leaf, Shared) and sentences is not None:
            leaves[index] = Shared(_take_rows(leaf.value, sentences, None))
    return tree_unflatten(leaves, tree)


def _check_state(states: list[Any], batch: int, beams: int) -> torch.device:
    """The device of the first tensor; without any, torch's default."""
    device = None

    def check(state: Any, wanted: int, what: str) -> None:
        nonlocal device
        for leaf in tree_flatten(state)[0]:
            if isinstance(leaf, Shared):
                check(leaf.value, batch, "shared in the state must have leading dimension batch_size")
            elif isinstance(leaf, Tensor):
                device = device or leaf.device
                if leaf.dim() == 0 or leaf.shape[0] != wanted:
                    raise ValueError(f"what is {what} = {wanted}, got shape {tuple(leaf.shape)}")

    for state in states:
        check(state, batch * beams, "in the state must have leading dimension batch_size * beam_size")
    return device or torch.get_default_device()


def _check_counts(**counts: tuple[Any, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _tokens(name: str, values: int | Iterable[int]) -> list[int]:
    try:
        found = [operator.index(token) for token in ([values] if isinstance(values, int) else values)]
    except TypeError:
        raise TypeError(f"{name} must be or hold ints, got {values!r}") from None
    if not found:
        raise ValueError(f"{name} must hold at least one token, got none")
    if min(found) < 0:
        raise ValueError(f"{name} must hold tokens of at least 0, got {min(found)}")
    return found


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _per_sentence(name: str, value: int | Tensor, batch: int, device: torch.device) -> tuple[int, Tensor]:
    """The largest, and one for each sentence [B] int64."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or tuple(value.shape) != (batch,):
            raise ValueError(f"{name} must hold integers of shape {(batch,)}, got {value.dtype} {tuple(value.shape)}")
        largest = int(value.max()) if batch else 0
        smallest = int(value.min()) if batch else 0
        value = value.to(device, torch.int64)
    else:
        _check_counts(**{name: (value, 0)})
        largest = smallest = value
        value = torch.full((batch,), value, dtype=torch.int64, device=device)
    if smallest < 0:
        raise ValueError(f"{name} must be at least 0, got {smallest}")
    return largest, value
