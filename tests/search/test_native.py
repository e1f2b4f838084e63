"""What a CPU does natively in a search against the tensor operations that specify it: bookkeeping, and fused steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrnn
from fastrnn.nn import seq2seq
from fastrnn.search.hypotheses import Hypotheses, Ranking, StopRule
from tests.accuracy import assert_as_accurate
from tests.ops.case import LIBRARY

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")

RULES = ("first", "heuristic", "exact", "never")


def _both(
    batch: int, beams: int, eos: list[int], rule: str, penalty: str, reward: float, wanted: int, longest: int
) -> tuple[Hypotheses, Hypotheses]:
    """The same search natively, and by tensor operations."""
    found = []
    for _ in range(2):
        scores = torch.full((batch, beams), -torch.inf)
        scores[:, 0] = 0
        limits = torch.randint(1, longest + 1, (batch,), generator=torch.Generator().manual_seed(1))
        least = torch.randint(0, 4, (batch,), generator=torch.Generator().manual_seed(2))
        ranking = Ranking(penalty, None, reward, longest, torch.float32, torch.device("cpu"))
        stop = StopRule(rule, wanted, beams)
        found.append(Hypotheses(batch, beams, torch.tensor(eos), least, limits, ranking, stop, scores))
    native, tensors = found
    assert native._native is not None
    tensors._native = None
    return native, tensors


def _candidates(scores: Tensor, vocabulary: int, count: int, generator: torch.Generator, ties: bool) -> Any:
    batch, beams = scores.shape
    log_probs = torch.randn(batch, beams, vocabulary, generator=generator).log_softmax(-1)
    log_probs = (log_probs * 2).round() / 2 if ties else log_probs
    log_probs[torch.rand(log_probs.shape, generator=generator) < 0.2] = -torch.inf
    sums = (scores.unsqueeze(-1) + log_probs).flatten(1)
    sums[torch.rand(sums.shape, generator=generator) < 0.02] = torch.nan
    keys = sums.nan_to_num(-torch.inf, neginf=-torch.inf)
    order = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :count]
    return sums.gather(1, order), order


@given(
    batch=st.integers(1, 4),
    beams=st.integers(1, 5),
    vocabulary=st.integers(2, 7),
    ends=st.integers(1, 2),
    rule=st.sampled_from(RULES),
    penalty=st.sampled_from(["none", "power", "gnmt", "average"]),
    reward=st.sampled_from([0.0, 0.3, -0.3]),
    covered=st.booleans(),
    ties=st.booleans(),
    compacted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bookkeeping(
    batch: int,
    beams: int,
    vocabulary: int,
    ends: int,
    rule: str,
    penalty: str,
    reward: float,
    covered: bool,
    ties: bool,
    compacted: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    eos, longest = list(range(min(ends, vocabulary - 1))), 8
    native, tensors = _both(batch, beams, eos, rule, penalty, reward, 1 + seed % beams, longest)
    for _ in range(longest):
        count = min((1 + len(eos)) * beams, beams * vocabulary)
        values, indices = _candidates(native.scores, vocabulary, count, generator, ties)
        extra = -torch.rand(native.scores.shape, generator=generator) if covered else None
        took = [search.take(values, indices, vocabulary, extra) for search in (native, tensors)]
        for name in ("scores", "done", "count"):
            assert torch.equal(getattr(native, name), getattr(tensors, name)), name
        alive = native.scores > -torch.inf
        for ours, theirs in zip(took[0][:2], took[1][:2]):
            assert torch.equal(ours[alive], theirs[alive])
        assert all(torch.equal(a, b) for a, b in zip(native.pool[:2], tensors.pool[:2]))
        if native.unfinished() == 0:
            break
        if compacted and native.unfinished() < len(native.done):
            assert torch.equal(native.compact(), tensors.compact())
            tensors._native = None
    for ours, theirs in zip(native.best(beams, -7), tensors.best(beams, -7)):
        assert ours is None or torch.equal(ours, theirs)


def _model(cell: str, score: str | None, attend: str, readout: int | None, layers: int = 2) -> fastrnn.nn.Seq2Seq:
    hidden, memory = 32, 32 if score == "dot" else 24
    kind = {"lstm": fastrnn.nn.LSTM, "gru": fastrnn.nn.GRU, "rnn": fastrnn.nn.RNN}[cell]
    if score is None:
        rnn: Any = kind(16, hidden, layers)
    else:
        attention = {
            "dot": lambda: fastrnn.nn.DotAttention(),
            "general": lambda: fastrnn.nn.GeneralAttention(hidden, memory),
            "additive": lambda: fastrnn.nn.AdditiveAttention(hidden, memory, 20),
        }[score]()
        rnn = fastrnn.nn.AttentionDecoder(cell, 16, hidden, attention, layers, attend=attend)
    encoder = fastrnn.nn.TokenEncoder(30, 16, kind(16, memory // 2, bidirectional=True))
    decoder = fastrnn.nn.TokenDecoder(600, 16, rnn, bos=0, eos=[1, 5], pad=2, readout_size=readout)
    with torch.no_grad():
        decoder.projection.weight.mul_(4)
    return fastrnn.nn.Seq2Seq(encoder, decoder, bridge="learned").eval()


SOURCE, LENGTHS = torch.arange(42).reshape(6, 7) % 27 + 3, torch.tensor([7, 1, 3, 4, 5, 6])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lengths": {"length_penalty": "gnmt", "min_length": 3},
    "bans": {"no_repeat_ngram": 2},
    "prefix": {"prefix": torch.arange(12).view(6, 2) + 6, "prefix_lengths": torch.tensor([0, 1, 2, 0, 1, 2])},
    "alignments": {"need_alignments": True},
    "coverage": {"coverage_penalty": "wu", "need_alignments": True},
    "stepwise": {"coverage_penalty": "summary", "stepwise_coverage": True},
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "cell, score, attend, readout",
    [
        ("lstm", None, "after", None),
        ("gru", None, "after", 16),
        ("lstm", "additive", "after", 16),
        ("lstm", "additive", "before", None),
        ("gru", "general", "after", None),
        ("rnn", "dot", "before", 16),
    ],
)
def test_a_fused_step_is_the_step(
    cell: str, score: str | None, attend: str, readout: int | None, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if score is None and options in ("alignments", "coverage", "stepwise"):
        pytest.skip("no attention")
    model, fused = _model(cell, score, attend, readout), []
    run = seq2seq.DecoderStep.fastrnn_fused
    monkeypatch.setattr(seq2seq.DecoderStep, "fastrnn_fused", lambda *args: fused.append(run(*args)) or fused[-1])
    ours = model.generate(SOURCE, LENGTHS, beam_size=4, n_best=3, **OPTIONS[options])
    assert fused[0] is not None
    monkeypatch.setattr(seq2seq.DecoderStep, "fastrnn_fused", lambda *args: None)
    theirs = model.generate(SOURCE, LENGTHS, beam_size=4, n_best=3, **OPTIONS[options])
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.lengths, theirs.lengths)
    monkeypatch.undo()
    exact = copy.deepcopy(model).double().generate(SOURCE, LENGTHS, beam_size=4, n_best=3, **OPTIONS[options])
    assert torch.equal(ours.tokens, exact.tokens)
    names = ["scores", "log_probs"] + (["alignments"] if ours.alignments is not None else [])
    assert_as_accurate(*(tuple(getattr(result, name) for name in names) for result in (ours, theirs, exact)))


@pytest.mark.parametrize("bos", [600, -1])
def test_a_begin_token_without_an_embedding(bos: int) -> None:
    with pytest.raises(ValueError, match=f"bos must be from 0 to below 600, got {bos} to {bos}|bos must be at least 0"):
        _model("lstm", None, "after", None).generate(SOURCE, LENGTHS, bos=bos)


@pytest.mark.usefixtures("isa")
def test_fused_steps_of_every_instruction_set() -> None:
    model = _model("lstm", "additive", "after", 16)
    ours = model.generate(SOURCE, LENGTHS, beam_size=3)
    assert torch.equal(ours.tokens, copy.deepcopy(model).double().generate(SOURCE, LENGTHS, beam_size=3).tokens)


def test_what_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with options, other dtypes, dropout at work: the step as it is."""
    fused = []
    run = seq2seq.DecoderStep.fastrnn_fused
    monkeypatch.setattr(seq2seq.DecoderStep, "fastrnn_fused", lambda *args: fused.append(run(*args)) or fused[-1])
    model = _model("lstm", "additive", "after", None)
    encoder, decoder = model.encoder, model.decoder
    layers = fastrnn.nn.LSTM(16, 32, 2, layer_norm=True)
    normed = fastrnn.nn.TokenDecoder(600, 16, layers, bos=0, eos=1, dropout=0.1)
    for other in (
        fastrnn.nn.Seq2Seq(encoder, normed, bridge="learned").eval(),
        fastrnn.nn.Seq2Seq(encoder, normed, bridge="learned").train(),
        copy.deepcopy(model).double(),
        copy.deepcopy(model).bfloat16(),
    ):
        other.generate(SOURCE, LENGTHS, beam_size=2, max_length=4)
        assert fused.pop() is None
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(SOURCE, LENGTHS, beam_size=2, max_length=4)
    assert fused.pop() is None
    decoder.rnn.attention = fastrnn.nn.LocationAttention(32, 24, 20, 4, 3)
    model.generate(SOURCE, LENGTHS, beam_size=2, max_length=4)
    assert fused.pop() is None
