"""Search by fastrnn and as it is written with torch's operators: the selection, whole decodes, what search costs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.check import Builder, Entries, enter
from bench.peers import Contender, Results, Unsupported
from bench.registry import SearchCase
from fastrnn import nn
from fastrnn.nn.seq2seq import DecoderStep
from fastrnn.ops import top_k_log_softmax
from fastrnn.search import Shared, beam_search, expand

_BEAMS, _BEST = 5, 10
_SOURCE = 30  # tokens
_BOS, _EOS = 0, 1
_LENGTHS = [5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 44, 47, 50]  # of finishing sentences


class SearchProblem:
    """One case's tensors or model."""

    def __init__(self, case: SearchCase) -> None:
        self.case, self.dtype = case, torch.float32
        torch.manual_seed(0)
        if case.mode == "select":
            self.logits = 3 * torch.randn(case.rows, case.vocabulary)
            self.scores = -torch.rand(case.rows)
            return
        size = case.size
        layers: Any = nn.LSTM(size, size, case.layers)
        if case.attention:
            layers = nn.AttentionDecoder("lstm", size, size, nn.AdditiveAttention(size, size, size), case.layers)
        encoder = nn.TokenEncoder(case.vocabulary, size, nn.LSTM(size, size, case.layers))
        decoder = nn.TokenDecoder(case.vocabulary, size, layers, bos=_BOS, eos=_EOS)
        self.model = nn.Seq2Seq(encoder, decoder).eval()
        with torch.no_grad():
            decoder.projection.weight.mul_(8)  # A model that is sure of something, as trained ones are.
            decoder.projection.bias[_EOS] = -100.0  # Sentences end where the case says.
        self.source = torch.randint(2, case.vocabulary, (case.batch, _SOURCE))

    def reference(self) -> Results:
        """torch's operators in fp64."""
        return self.standard(torch.float64).checked()

    def standard(self, dtype: torch.dtype) -> Contender:
        """torch's operators."""
        if self.case.mode == "select":
            logits, scores = self.logits.to(dtype), self.scores.to(dtype)
            return Contender(lambda: _eager_select(logits, scores), _named_selection)
        model = self.model if dtype is self.dtype else copy.deepcopy(self.model).to(dtype)
        started = _Started(model, self.source)
        if self.case.mode == "decode":
            decoder, memory, hidden, steps = model.decoder, started.memory, started.hidden, self.case.steps
            return Contender(lambda: eager_decode(decoder, memory, hidden, steps)[0], _named_scores)
        return Contender(lambda: _search(started, self.case), _named_scores)


def _named_selection(found: Any) -> Results:
    return {"values": found[0]}


def _named_scores(scores: Any) -> Results:
    return {"scores": scores}


def _eager_select(logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.log_softmax(logits, -1) + scores.unsqueeze(1)
    values, indices = torch.topk(total.view(-1, _BEAMS * total.shape[1]) if len(total) % _BEAMS == 0 else total, _BEST)
    return values, indices


class _Started:
    """A model that has read its source, and everything that a search begins with."""

    @torch.no_grad()
    def __init__(self, model: nn.Seq2Seq, source: Tensor) -> None:
        self.model, self.batch = model, len(source)
        self.memory, hidden = model.encode(source)
        self.hidden = expand(hidden, _BEAMS, dim=1)
        self.prepared = model.decoder.prepare(self.memory, None)

    def first(self, count: int) -> Any:
        """The state of a search over the first sentences."""
        hidden = tuple(state[:, : count * _BEAMS] for state in self.hidden)
        prepared = self.prepared
        if prepared is not None:
            prepared = type(prepared)(*(None if tensor is None else tensor[:count] for tensor in prepared))
        return self.model.decoder.initial_state(hidden, self.memory[:count], _BEAMS), Shared(prepared)


def _search(started: _Started, case: SearchCase) -> Tensor:
    """Scores [B, K] of a search whose sentences end together, or one after the other."""
    limits = torch.tensor(_LENGTHS) if case.mode == "finishing" else case.steps
    return _searched(started, started.batch, limits)


def _searched(started: _Started, count: int, limits: int | Tensor) -> Tensor:

    return beam_search(
        DecoderStep(started.model.decoder, False),
        started.first(count),
        batch_size=count,
        beam_size=_BEAMS,
        bos=_BOS,
        eos=_EOS,
        max_length=limits,
        n_best=_BEAMS,
    ).scores


@torch.no_grad()
def eager_decode(decoder: nn.TokenDecoder, memory: Tensor, hidden: Any, steps: int) -> tuple[Tensor, list[Tensor]]:
    """As users write it: LSTM cells, attention, log-softmax, topk and index_select from torch's operators, the memory
    [B, S, M] tiled, h and c [layers, B * K, H] given for the beams. Nothing ends here, so that hypotheses are the
    beams: their scores [B, K], best first, and the tokens of each step [B * K]."""
    rnn, projection = decoder.layers, decoder.projection
    asked = decoder.rnn.attention if isinstance(decoder.rnn, nn.AttentionDecoder) else None
    batch, beams, vocabulary, device = len(memory), _BEAMS, decoder.num_tokens, memory.device
    dtype = torch.promote_types(memory.dtype, torch.float32)
    memory = memory.repeat_interleave(beams, 0)
    if asked is not None:
        keys, v = memory @ asked.memory_weight.T, asked.v
        if asked.normalize_v:
            keys, v = keys + asked.bias, asked.g * v / v.norm()
    h, c = ([*state] for state in hidden)
    context = memory.new_zeros(batch * beams, memory.shape[2])
    weights = [[getattr(rnn, name) for name in names] for names in rnn._all_weights]
    tokens = torch.full((batch * beams,), _BOS, device=device)
    scores = torch.full((batch, beams), -torch.inf, dtype=dtype, device=device)
    scores[:, 0] = 0
    first = torch.arange(0, batch * beams, beams, device=device).unsqueeze(1)
    histories: list[Tensor] = []
    for _ in range(steps):
        x = decoder.embedding(tokens)
        if asked is not None:
            x = torch.cat([x, context], -1)
        for layer, parameters in enumerate(weights):
            h[layer], c[layer] = torch.lstm_cell(x, (h[layer], c[layer]), *parameters)
            x = h[layer]
        if asked is not None:
            energies = torch.tanh((x @ asked.query_weight.T).unsqueeze(1) + keys) @ v
            context = torch.bmm(torch.softmax(energies, -1).unsqueeze(1), memory).squeeze(1)
            x = torch.cat([x, context], -1)
        logits = projection(x)
        total = torch.log_softmax(logits, -1, dtype=dtype) + scores.view(-1, 1)
        scores, indices = torch.topk(total.view(batch, -1), beams)
        tokens = (indices % vocabulary).flatten()
        rows = (indices // vocabulary + first).flatten()
        h, c = ([state.index_select(0, rows) for state in states] for states in (h, c))
        context = context.index_select(0, rows)
        histories = [history.index_select(0, rows) for history in histories] + [tokens]
    return scores, histories


def _build_fastrnn(problem: SearchProblem) -> Contender:
    case = problem.case
    if case.mode == "select":
        groups = _BEAMS if case.rows % _BEAMS == 0 else 1
        return Contender(lambda: top_k_log_softmax(problem.logits, _BEST, problem.scores, groups), _named_selection)
    started = _Started(problem.model, problem.source)
    return Contender(lambda: _search(started, case), _named_scores)


def _build_torch(problem: SearchProblem) -> Contender:
    if problem.case.mode not in ("select", "decode"):
        raise Unsupported("what is measured is the share of our own time")
    return problem.standard(problem.dtype)


def _build_model(problem: SearchProblem) -> Contender:
    """The model's own forward pass of as many steps: layers, attention, and logits in memory."""
    if problem.case.mode != "overhead":
        raise Unsupported("only asked of the overhead")
    started = _Started(problem.model, problem.source)
    decoder = problem.model.decoder
    state, shared = started.first(started.batch)
    with torch.no_grad():
        runner = decoder.fused(state, shared.value)
    assert runner is not None
    tokens, rows = torch.full((started.batch * _BEAMS,), 2), torch.arange(started.batch * _BEAMS)

    expected = problem.reference()["scores"]

    def call() -> Tensor:
        for _ in range(problem.case.steps):
            runner.logits(tokens, rows)
        return expected

    return Contender(call, _named_scores)


def _build_live(problem: SearchProblem) -> Contender:
    """Searches over the sentences that are not done, each of as many steps as until the next one ends."""
    if problem.case.mode != "finishing":
        raise Unsupported("only asked of finishing sentences")
    started = _Started(problem.model, problem.source)
    ends = [0, *_LENGTHS]
    expected = problem.reference()["scores"]

    def call() -> Tensor:
        for done, (before, end) in enumerate(itertools.pairwise(ends)):
            _searched(started, started.batch - done, end - before)
        return expected

    return Contender(call, _named_scores)


BUILDERS: dict[str, Callable[[SearchProblem], Contender]] = {
    "fastrnn": _build_fastrnn,
    "torch": _build_torch,
    "model": _build_model,
    "live": _build_live,
}


def entries(case: SearchCase, builders: Sequence[str] = tuple(BUILDERS)) -> Entries:
    """The contenders of a case, checked. Raises WrongResult where fastrnn or torch is wrong."""
    problem: Any = SearchProblem(case)
    chosen: dict[str, Builder] = {name: BUILDERS[name] for name in builders}  # type: ignore[dict-item]
    return enter(problem, chosen)
