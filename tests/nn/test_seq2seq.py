"""Seq2Seq against its formulas, sentence by sentence with torch.nn's layers; search, saving, and what it refuses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrnn
from fastrnn.backends import native
from fastrnn.nn import (
    AdditiveAttention,
    AttentionDecoder,
    DotAttention,
    GeneralAttention,
    LocationAttention,
    MeanContext,
    PositionalAttention,
    Seq2Seq,
    TokenDecoder,
    TokenEncoder,
)
from fastrnn.nn.attention import MemoryAttention
from fastrnn.search import BeamResult
from tests.search.oracle import assert_finds, search

SOURCES, TARGETS = 11, 9  # tokens
E, H = 5, 6
BOS, EOS = 1, 0
LENGTHS = torch.tensor([6, 3, 1, 5])
TARGET_LENGTHS = torch.tensor([5, 2, 0, 3])
CELLS = {"lstm": fastrnn.nn.LSTM, "gru": fastrnn.nn.GRU, "rnn": fastrnn.nn.RNN}
ATTENTIONS: dict[str, Callable[[int, int], MemoryAttention]] = {
    "mean": lambda hidden, memory: MeanContext(),
    "positional": lambda hidden, memory: PositionalAttention(20, 20),
    "dot": lambda hidden, memory: DotAttention(),
    "length": lambda hidden, memory: DotAttention("length"),
    "general": lambda hidden, memory: GeneralAttention(hidden, memory),
    "additive": lambda hidden, memory: AdditiveAttention(hidden, memory, 7),
    "coverage": lambda hidden, memory: AdditiveAttention(hidden, memory, 7, coverage=True),
    "location": lambda hidden, memory: LocationAttention(hidden, memory, 7, 2, 3),
}
# The encoder's cell, the decoder's, its attention, and what else is not as usual.
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {},
    "gru": {"cells": ("gru", "gru")},
    "rnn": {"cells": ("rnn", "rnn"), "layers": 2},
    "bare": {"attention": None},
    "bare_gru": {"cells": ("gru", "gru"), "attention": None, "layers": 2, "batch_first": True},
    "bare_none": {"cells": ("rnn", "rnn"), "attention": None, "bridge": "none"},
    "lstm_to_gru": {"cells": ("lstm", "gru"), "attention": "general"},
    "gru_to_lstm": {"cells": ("gru", "lstm"), "attention": "additive"},
    "two_directions": {"bidirectional": True, "layers": 2, "attention": "dot"},
    "learned": {"bridge": "learned", "bidirectional": True, "attention": "additive"},
    "learned_gru": {"bridge": "learned", "cells": ("gru", "lstm"), "layers": 2, "attention": "general"},
    "learned_bare": {"bridge": "learned", "cells": ("rnn", "gru"), "attention": None},
    "none": {"bridge": "none", "attention": "additive"},
    "reverse": {"reverse": True, "attention": "dot"},
    "reverse_bare": {"reverse": True, "attention": None, "bidirectional": True},
    "readout": {"readout_size": 7},
    "tied": {"readout_size": E, "tie_weights": True},
    "tied_bare": {"attention": None, "tie_weights": True, "hidden": E},
    "batch_first": {"batch_first": True},
    "two_ends": {"eos": (EOS, 3)},
    "before": {"attention": "additive", "attend": "before"},
    "no_feeding": {"attention": "additive", "input_feeding": False},
}


# Without our kernels torch's products decide, whose rows depend on each other in the last bit.
needs_kernels = pytest.mark.skipif(native.load() is None, reason="no compiled extension")


def model(
    cells: tuple[str, str] = ("lstm", "lstm"),
    attention: str | None = "general",
    bridge: str = "copy",
    bidirectional: bool = False,
    layers: int = 1,
    batch_first: bool = False,
    reverse: bool = False,
    hidden: int = H,
    eos: Any = EOS,
    attend: str = "after",
    input_feeding: bool = True,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    **options: Any,
) -> Seq2Seq:
    """With parameters far from where they start, so that tokens are far from equally probable."""
    rnn = CELLS[cells[0]](E, hidden, layers, bidirectional=bidirectional, batch_first=batch_first)
    encoder = TokenEncoder(SOURCES, E, rnn, reverse=reverse, dropout=dropout)
    memory = hidden * (2 if bidirectional else 1)
    size = memory if bridge == "copy" else hidden + 1
    if attention in ("dot", "length"):
        size = memory
    decoding: Any
    if attention is None:
        decoding = CELLS[cells[1]](E, size, layers, batch_first=batch_first)
    else:
        asked = ATTENTIONS[attention](size, memory)
        decoding = AttentionDecoder(cells[1], E, size, asked, layers, input_feeding, attend=attend, memory_size=memory)
    decoder = TokenDecoder(TARGETS, E, decoding, bos=BOS, eos=eos, dropout=dropout, **options)
    found = Seq2Seq(encoder, decoder, bridge=bridge).to(dtype).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.7)
        # No token is much likelier than others whatever comes before, so that hypotheses have many lengths.
        decoder.projection.weight.mul_(0.7)
        decoder.projection.bias.zero_()
    return found


def draw(batch: int = 4, steps: int = 6) -> tuple[Tensor, Tensor]:
    """A source, and a target with its end token."""
    source = torch.randint(SOURCES, (batch, steps))
    target = torch.randint(2, TARGETS, (batch, 5))
    return source, target


# The formula, one sentence at a time


def torchs(module: Any) -> nn.RNNBase:
    """torch.nn's layers with a module's parameters."""
    found: nn.RNNBase = getattr(nn, type(module).__name__)(
        module.input_size, module.hidden_size, module.num_layers, bidirectional=module.bidirectional
    ).double()
    found.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    return found


class Oracle:
    """What a model makes of one source, by hand; `after` is what tests.search.oracle asks."""

    def __init__(self, module: Seq2Seq, source: Tensor, lengths: Tensor | None = None) -> None:
        self.module = copy.deepcopy(module).double()
        self.layers = torchs(self.module.decoder.layers)
        self.encoded = []
        for row, tokens in enumerate(source):
            self.encoded.append(self._encode(tokens if lengths is None else tokens[: int(lengths[row])]))
        self._known: dict[Any, tuple[list[float], list[float]]] = {}

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Any]:
        encoder, bridge = self.module.encoder, self.module.bridge
        assert isinstance(encoder, TokenEncoder)
        x = encoder.embedding(tokens.flip(0) if encoder.reverse else tokens).unsqueeze(1)
        memory, state = torchs(encoder.rnn)(x)
        memory = memory.flip(0) if encoder.reverse else memory
        h, c = state if isinstance(state, tuple) else (state, None)
        layers, size = self.layers.num_layers, self.layers.hidden_size
        if bridge == "none":
            h, c = torch.zeros(layers, 1, size, dtype=h.dtype), None
        elif bridge == "learned":
            h = torch.tanh(self.module.bridge_hidden(h.flatten())).view(layers, 1, size)
            has_cell = hasattr(self.module, "bridge_cell") and c is not None
            c = self.module.bridge_cell(c.flatten()).view(layers, 1, size) if has_cell else None
        elif encoder.rnn.bidirectional:
            h, c = (None if s is None else torch.cat([s[0::2], s[1::2]], -1) for s in (h, c))
        if self.layers.mode != "LSTM":
            return memory[:, 0], h
        return memory[:, 0], (h, torch.zeros_like(h) if c is None else c)

    def logits(self, row: int, inputs: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """After each of these inputs [T, V], and the weights of each step."""
        decoder, (memory, state) = self.module.decoder, self.encoded[row]
        weights: list[Tensor] = []
        outputs, of_attention = [], None
        context = memory.new_zeros(1, memory.shape[-1])
        for token in inputs:
            x = decoder.embedding(torch.tensor([token]))
            if not isinstance(decoder.rnn, AttentionDecoder):
                y, state = self.layers(x.unsqueeze(0), state)
                outputs.append(y[0, 0])
                continue
            rnn, last = decoder.rnn, state[0] if isinstance(state, tuple) else state
            if rnn.attend == "before":
                context, seen, of_attention = rnn.attention(last[-1], memory[None], state=of_attention)
            y, state = self.layers((torch.cat([x, context], -1) if rnn.input_feeding else x).unsqueeze(0), state)
            if rnn.attend == "after":
                context, seen, of_attention = rnn.attention(y[0], memory[None], state=of_attention)
            weights.append(seen[0])
            outputs.append(torch.cat([y[0], context], -1)[0])
        if not outputs:
            return torch.empty(0, TARGETS, dtype=torch.float64), weights
        output = torch.stack(outputs)
        if decoder.readout is not None:
            output = torch.tanh(decoder.readout(output))
        return decoder.projection(output), weights

    @torch.no_grad()
    def after(self, row: int, tokens: Sequence[int], bos: int) -> tuple[list[float], list[float]]:
        key = (row, tuple(tokens), bos)
        if key not in self._known:
            logits, weights = self.logits(row, (bos, *tokens))
            self._known[key] = logits[-1].tolist(), weights[-1].tolist() if weights else []
        return self._known[key]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_scores(kind: str) -> None:
    """Of targets of several lengths, one of them 0; and with labels smoothed."""
    module = model(**KINDS[kind])
    source, target = draw()
    oracle = Oracle(module, source, LENGTHS)
    logits, labels, scores = [], [], []
    for row, length in enumerate(TARGET_LENGTHS.tolist()):
        said = target[row, :length]
        found, _ = oracle.logits(row, [BOS, *said[:-1].tolist()][:length])
        logits.append(found)
        labels.append(said)
        scores.append(-F.cross_entropy(found, said, reduction="sum"))
    given = (source, LENGTHS, target, TARGET_LENGTHS)
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum"):
            wanted = F.cross_entropy(
                torch.cat(logits), torch.cat(labels), label_smoothing=smoothing, reduction=reduction
            )
            torch.testing.assert_close(module.loss(*given, label_smoothing=smoothing, reduction=reduction), wanted)
    each = module.loss(*given, reduction="none")
    assert each.shape == target.shape
    for row, length in enumerate(TARGET_LENGTHS.tolist()):
        torch.testing.assert_close(each[row, :length], F.cross_entropy(logits[row], labels[row], reduction="none"))
        assert (each[row, length:] == 0).all()
    torch.testing.assert_close(module.score(*given), torch.stack(scores).detach())
    torch.testing.assert_close(module.score(*given, reduction="none"), -each.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    module = model(**KINDS[kind], dropout=0.2).train()
    source, target = draw()
    module.loss(source, LENGTHS, target, TARGET_LENGTHS).backward()
    unused = set()
    if KINDS[kind].get("bridge") == "none" and KINDS[kind].get("attention", "general") is None:
        # Nothing of the source reaches the decoder.
        unused = {name for name, _ in module.named_parameters() if name.startswith("encoder.")}
    for name, parameter in module.named_parameters():
        if name in unused:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None and parameter.grad.any() and parameter.grad.isfinite().all(), name


def padded(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With more padding, of other tokens; behind a target's length nothing is looked up."""
    wide_source, wide_target = torch.randint(SOURCES, (4, 9)), torch.full((4, 8), -100)
    for row in range(4):
        wide_source[row, : LENGTHS[row]] = source[row, : LENGTHS[row]]
        wide_target[row, : TARGET_LENGTHS[row]] = target[row, : TARGET_LENGTHS[row]]
    return wide_source, LENGTHS, wide_target, TARGET_LENGTHS


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    module = model(**KINDS[kind])
    source, target = draw()
    given, wide = (source, LENGTHS, target, TARGET_LENGTHS), padded(source, target)
    torch.testing.assert_close(module.loss(*wide), module.loss(*given))
    torch.testing.assert_close(module.score(*wide), module.score(*given))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_not_one_bit(kind: str) -> None:
    """Of each token's score; a sum may be taken in another order."""
    module = model(**KINDS[kind], dtype=torch.float32)
    source, target = draw()
    given, wide = (source, LENGTHS, target, TARGET_LENGTHS), padded(source, target)
    found, wanted = (module.score(*each, reduction="none") for each in (wide, given))
    assert torch.equal(found[:, :5], wanted)


@pytest.mark.parametrize("kind", ["lstm", "bare_gru", "learned", "two_directions"])
def test_scores_of_several_targets(kind: str) -> None:
    module = model(**KINDS[kind])
    source, _ = draw()
    targets, lengths = torch.randint(TARGETS, (4, 3, 5)), torch.randint(0, 6, (4, 3))
    found = module.score(source, LENGTHS, targets, lengths)
    each = module.score(source, LENGTHS, targets, lengths, reduction="none")
    assert found.shape == (4, 3) and each.shape == (4, 3, 5)
    for place in range(3):
        wanted = module.score(source, LENGTHS, targets[:, place], lengths[:, place])
        torch.testing.assert_close(found[:, place], wanted)
    torch.testing.assert_close(each.sum(-1), found)
    assert (each[torch.arange(5) >= lengths.unsqueeze(-1)] == 0).all()
    alone = module.score(source, LENGTHS, targets[:, :1], lengths[:, :1])
    assert torch.equal(alone, module.score(source, LENGTHS, targets[:, 0], lengths[:, 0]).unsqueeze(1))
    torch.testing.assert_close(module.score(source, None, targets), module.score(source, torch.full((4,), 6), targets))


def test_nothing_to_score() -> None:
    module = model()
    source, target = draw()
    assert module.score(source, LENGTHS, target[:, :0]).tolist() == [0.0] * 4
    assert module.score(source, LENGTHS, target[:, None, :0].expand(4, 2, 0)).tolist() == [[0.0] * 2] * 4
    assert module.score(source, LENGTHS, target[:, None][:, :0]).shape == (4, 0)
    assert module.score(source[:0], LENGTHS[:0], target[:0]).shape == (0,)
    assert module.loss(source, LENGTHS, target[:, :0], reduction="sum") == 0
    assert module.loss(source[:0], LENGTHS[:0], target[:0], reduction="none").shape == (0, 5)


def test_int32() -> None:
    module = model(reverse=True)
    source, target = draw()
    given = (source, LENGTHS, target, TARGET_LENGTHS)
    narrow = [tensor.int() for tensor in given]
    torch.testing.assert_close(module.loss(*narrow), module.loss(*given))
    assert torch.equal(module.score(*narrow), module.score(*given))
    assert_same(module.generate(*narrow[:2]), module.generate(*given[:2]))


def test_reversed_memories_are_in_the_order_of_the_source() -> None:
    module = model(reverse=True).encoder
    source, _ = draw()
    memory, hidden = module(source, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        wanted, last = torchs(module.rnn)(module.embedding(source[row, :length].flip(0)).unsqueeze(1))
        torch.testing.assert_close(memory[row, :length], wanted[:, 0].flip(0))
        assert (memory[row, length:] == 0).all()
        for state, of_one in zip(hidden, last):
            torch.testing.assert_close(state[:, row], of_one[:, 0])
    full, _ = module(source)
    torch.testing.assert_close(full, module(source, torch.full((4,), 6))[0])


def test_tied_weights_are_one_parameter() -> None:
    module = model(**KINDS["tied"])
    assert module.decoder.projection.weight is module.decoder.embedding.weight
    names = [name for name, _ in module.named_parameters()]
    assert "decoder.embedding.weight" in names and "decoder.projection.weight" not in names


def test_dropout_is_of_training_alone() -> None:
    module = model(dropout=0.5)
    source, target = draw()
    given = (source, LENGTHS, target, TARGET_LENGTHS)
    assert torch.equal(module.loss(*given), module.loss(*given))
    module.train()
    assert not torch.equal(module.loss(*given), module.loss(*given))


# Search


def assert_same(found: BeamResult, wanted: BeamResult, rows: list[int] | None = None) -> None:
    """That results are bitwise equal, `rows` of what is wanted; lengths of padding may differ."""
    for name, part, other in zip(BeamResult._fields, found, wanted):
        assert (part is None) == (other is None)
        if part is None or other is None:
            continue
        other = other if rows is None else other[rows]
        sizes = [min(a, b) for a, b in zip(part.shape, other.shape)]
        for whole in (part, other):
            behind = whole[:, :, sizes[2] :] if whole.dim() > 2 else whole[:0]
            assert name in ("lengths", "scores") or len(behind.unique()) <= 1
        cut = tuple(slice(size) for size in sizes)
        assert torch.equal(part[cut], other[cut]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_is_a_search_by_hand(kind: str, dtype: torch.dtype) -> None:
    """Greedy, and with three beams; the alignments are those of the attention module."""
    module = model(**KINDS[kind], dtype=dtype)
    source, _ = draw()
    oracle: Any = Oracle(module, source, LENGTHS)
    attends = KINDS[kind].get("attention", "general") is not None
    ends = module.decoder.eos
    for beams, penalty in ((1, "none"), (3, "gnmt")):
        options: dict[str, Any] = {"beam_size": beams, "n_best": beams, "length_penalty": penalty}
        result = module.generate(source, LENGTHS, max_length=5, need_alignments=attends, **options)
        if result.alignments is not None:
            longest = int(LENGTHS.max())
            assert (
                result.alignments[torch.arange(longest).expand(result.alignments.shape) >= LENGTHS.view(-1, 1, 1, 1)]
                == 0
            ).all()
        for row in range(4):
            wanted = search([oracle], row, eos=ends, bos=BOS, max_length=5, **options)
            if beams == 1:
                assert list(wanted[0].tokens) == greedy(oracle, row, ends)
            assert_finds(BeamResult(*result[:4], None), row, wanted, ends[0])
            for place, found in enumerate(wanted):
                if attends:
                    assert result.alignments is not None
                    seen = result.alignments[row, place, : len(found.tokens), : LENGTHS[row]]
                    torch.testing.assert_close(seen, torch.tensor(found.alignments, dtype=dtype))


def greedy(oracle: Oracle, row: int, ends: Sequence[int]) -> list[int]:
    said: list[int] = []
    while len(said) < 5 and not (said and said[-1] in ends):
        said.append(int(torch.tensor(oracle.after(row, said, BOS)[0]).argmax()))
    return said


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_module_searches(attention: str) -> None:
    module = model(attention=attention)
    source, _ = draw()
    oracle: Any = Oracle(module, source, LENGTHS)
    result = module.generate(source, LENGTHS, max_length=5, beam_size=3, n_best=3)
    for row in range(4):
        assert_finds(result, row, search([oracle], row, eos=[EOS], beam_size=3, n_best=3, max_length=5), EOS)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"beam_size": 4, "n_best": 4, "length_penalty": "average"},
    "prefix": {"beam_size": 3, "n_best": 2},
    "banned": {"beam_size": 3, "banned_tokens": [4], "no_repeat_ngram": 2, "min_length": (0.5, 1)},
    "groups": {"beam_size": 4, "n_best": 4, "groups": 2, "diversity": 1.0},
    "ancestral": {"beam_size": 3, "n_best": 3, "sample": "ancestral", "temperature": 0.8},
    "gumbel": {"beam_size": 3, "n_best": 3, "sample": "gumbel"},
}


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "bare", "bare_gru", "learned", "reverse", "before", "no_feeding"])
def test_batch_mates_order_and_padding_change_nothing(kind: str, options: dict[str, Any]) -> None:
    """Bitwise: one sentence alone, or among 64, in any order, with any padding."""
    batch = 64
    module = model(**KINDS[kind], dtype=torch.float32)
    attends = KINDS[kind].get("attention", "general") is not None
    source, lengths = torch.randint(SOURCES, (batch, 9)), torch.randint(1, 10, (batch,))
    own: dict[str, Any] = {"seed": torch.arange(batch) * 7} if "sample" in options else {}
    if options == OPTIONS["prefix"]:
        own = {"prefix": torch.randint(2, TARGETS, (batch, 2)), "prefix_lengths": torch.arange(batch) % 3}
    given = {**options, "need_alignments": attends}
    together = module.generate(source, lengths, **given, **own)
    assert len(together.lengths.unique()) > 2
    for rows in ([0], [63], [40], [5, 4, 3], torch.randperm(batch).tolist()):
        of_rows = {name: value[rows] for name, value in own.items()}
        assert_same(module.generate(source[rows], lengths[rows], **given, **of_rows), together, rows)
        # As little padding as there can be, and more, of other tokens.
        longest = int(lengths[rows].max())
        assert_same(module.generate(source[rows, :longest], lengths[rows], **given, **of_rows), together, rows)
        wide = torch.cat([source[rows], torch.randint(SOURCES, (len(rows), 4))], 1)
        padding = torch.arange(13) >= lengths[rows].unsqueeze(1)
        wide = torch.where(padding, torch.randint_like(wide, SOURCES), wide)
        assert_same(module.generate(wide, lengths[rows], **given, **of_rows), together, rows)


@needs_kernels
@pytest.mark.parametrize("kind", ["lstm", "bare", "learned"])
def test_prefixes_of_batch_mates_change_nothing(kind: str) -> None:
    module = model(**KINDS[kind], dtype=torch.float32)
    source, lengths = torch.randint(SOURCES, (30, 6)), torch.randint(1, 7, (30,))
    options: dict[str, Any] = {"beam_size": 3, "n_best": 3, "max_length": 8}
    prefix, prefix_lengths = torch.randint(2, TARGETS, (30, 3)), torch.arange(30) % 3
    mixed = module.generate(source, lengths, prefix=prefix, prefix_lengths=prefix_lengths, **options)
    free = (prefix_lengths == 0).nonzero().flatten().tolist()
    plain = module.generate(source[free], lengths[free], **options)
    assert_same(plain, mixed, free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lstm", "gru", "bare", "two_directions", "tied", "before"])
def test_scores_are_those_of_teacher_forcing(kind: str, dtype: torch.dtype) -> None:
    module = model(**KINDS[kind], dtype=dtype)
    source, _ = draw()
    result = module.generate(source, LENGTHS, beam_size=4, n_best=4, max_length=7)
    found = module.score(source, LENGTHS, result.tokens, result.lengths)
    each = module.score(source, LENGTHS, result.tokens, result.lengths, reduction="none")
    # The state is kept in the model's dtype: a step and a loop may round its last bit differently.
    limits = {"rtol": 0.05, "atol": 0.2} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(found, result.scores, **limits)
    torch.testing.assert_close(each, result.log_probs, **limits)
    assert found.dtype is torch.promote_types(dtype, torch.float32)


def test_limits_of_length_follow_the_source() -> None:
    module = model()
    with torch.no_grad():
        module.decoder.projection.bias[EOS] = -1e4
    source, _ = draw()
    assert module.generate(source, LENGTHS).lengths.flatten().tolist() == (2 * LENGTHS + 10).tolist()
    assert module.generate(source).lengths.flatten().tolist() == [22] * 4
    found = module.generate(source, LENGTHS, max_length=(0.5, 1)).lengths
    assert found.flatten().tolist() == [4, 2, 1, 3]
    assert module.generate(source, LENGTHS, max_length=torch.tensor([3, 1, 2, 0])).lengths.tolist() == [
        [3],
        [1],
        [2],
        [0],
    ]
    with torch.no_grad():
        module.decoder.projection.bias[EOS] = 1e4
    assert module.generate(source, LENGTHS, min_length=(1, 2)).lengths.flatten().tolist() == (LENGTHS + 2).tolist()
    assert module.generate(source, LENGTHS, min_length=2, beam_size=2).lengths.flatten().tolist() == [2] * 4


def test_tokens_of_the_decoder_are_what_a_search_begins_and_ends_with() -> None:
    module = model(eos=(3, 5), pad=7)
    with torch.no_grad():
        module.decoder.projection.bias[[3, 5]] = 1.0
    source, _ = draw(batch=20)
    result = module.generate(source, beam_size=2, n_best=2, max_length=12)
    behind = torch.arange(result.tokens.shape[-1]) >= result.lengths.unsqueeze(-1)
    assert behind.any() and (result.tokens[behind] == 7).all()
    last = result.tokens.gather(-1, result.lengths.unsqueeze(-1) - 1).squeeze(-1)
    assert {3, 5} <= set(last.flatten().tolist())
    changed = module.generate(source, beam_size=2, n_best=2, max_length=12, bos=2, eos=3, pad=6)
    behind = torch.arange(changed.tokens.shape[-1]) >= changed.lengths.unsqueeze(-1)
    assert behind.any() and (changed.tokens[behind] == 6).all() and 5 in changed.tokens[..., 0]
    assert not torch.equal(changed.log_probs[..., 0], result.log_probs[..., 0])


def test_coverage_takes_the_lengths_of_the_source() -> None:
    module = model()
    source, _ = draw()
    options: dict[str, Any] = {"beam_size": 3, "n_best": 3, "max_length": 5, "coverage_penalty": "wu"}
    result = module.generate(source, LENGTHS, **options, need_alignments=True)
    plain = module.generate(source, LENGTHS, **options | {"coverage_penalty": None})
    assert not torch.equal(result.scores, plain.scores)
    assert result.alignments is not None
    seen = torch.arange(6) < LENGTHS.view(-1, 1, 1)
    total = result.alignments.sum(2).clamp(max=1).log()
    wanted = result.log_probs.sum(-1) + 0.2 * torch.where(seen, total, 0).sum(-1)
    torch.testing.assert_close(result.scores, wanted)
    assert module.generate(source, LENGTHS, **options).alignments is None


@pytest.mark.parametrize("attention", ["general", None])
def test_odd_batches(attention: str | None) -> None:
    """None at all, and sources of length 0."""
    module = model(attention=attention)
    source, _ = draw()
    for beams in (1, 3):
        empty = module.generate(source[:0], LENGTHS[:0], beam_size=beams, n_best=beams)
        assert empty.tokens.shape == (0, beams, 0) and empty.scores.shape == (0, beams)
        lengths = torch.tensor([0, 6, 0, 2])
        result = module.generate(source, lengths, beam_size=beams)
        assert result.scores.isfinite().all()
        for row in (0, 2):
            assert (result.lengths[row] <= 10).all()
        alone = module.generate(source[:1], lengths[:1], beam_size=beams)
        torch.testing.assert_close(alone.scores[0], result.scores[0])


def test_training_is_not_disturbed() -> None:
    """Searching keeps no graph and no state, and the module in the mode that it was in."""
    module = model().train()
    source, target = draw()
    wanted = module.loss(source, LENGTHS, target, TARGET_LENGTHS)
    assert not module.generate(source, LENGTHS, beam_size=2).scores.requires_grad
    assert not module.score(source, LENGTHS, target).requires_grad
    assert module.training and torch.equal(module.loss(source, LENGTHS, target, TARGET_LENGTHS), wanted)
    # A step of training changes what is found.
    before = module.generate(source, LENGTHS, beam_size=2)
    wanted.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= parameter.grad
    after = module.generate(source, LENGTHS, beam_size=2)
    assert not torch.equal(before.scores, after.scores)
    found = module.score(source, LENGTHS, after.tokens[:, 0], after.lengths[:, 0])
    torch.testing.assert_close(found, after.scores[:, 0])


# Encoders of one's own


class Pooled(nn.Module):
    """Embeds, and offers the mean as final states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SOURCES, H)

    def forward(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
        memory = self.embedding(source)
        pooled = memory.mean(1).unsqueeze(0)
        return memory, (pooled, pooled.sin())


@pytest.mark.parametrize("bridge", ["copy", "learned", "none"])
def test_an_encoder_of_ones_own(bridge: str) -> None:
    decoder = TokenDecoder(TARGETS, E, AttentionDecoder("lstm", E, H, DotAttention()), bos=BOS, eos=EOS)
    module = Seq2Seq(Pooled(), decoder, bridge=bridge, encoder_states=H if bridge == "learned" else None)
    source, target = draw()
    module.loss(source, None, target, TARGET_LENGTHS).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    result = module.eval().generate(source, beam_size=3, n_best=3, max_length=4)
    torch.testing.assert_close(module.score(source, None, result.tokens, result.lengths), result.scores)
    with pytest.raises(TypeError, match=r"save takes modules of fastrnn.nn alone, got Pooled; use state_dict"):
        module.save("nowhere")


class Frames(nn.Module):
    """Recurrent layers over frames [B, S, 3], as of speech."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = fastrnn.nn.LSTM(3, H, batch_first=True)

    def forward(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return self.layers(source, lengths=lengths)


class Picture(nn.Module):
    """A vector of each picture [B, 2, 5, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(50, H))

    def forward(self, source: Tensor, lengths: Tensor | None) -> tuple[Tensor, Any]:
        vector = self.layers(source)
        return vector.unsqueeze(1), vector.unsqueeze(0)


@pytest.mark.parametrize(
    ("encoder", "shape", "lengths", "longest"), [(Frames, (4, 6, 3), LENGTHS, 12), (Picture, (4, 2, 5, 5), None, 2)]
)
def test_sources_that_are_no_tokens(
    encoder: type[nn.Module], shape: tuple[int, ...], lengths: Tensor | None, longest: int
) -> None:
    """`longest`: twice the memory, which is what max_length=(2, 0) means."""
    decoder = TokenDecoder(TARGETS, E, AttentionDecoder("lstm", E, H, DotAttention()), bos=BOS, eos=EOS)
    module = Seq2Seq(encoder(), decoder, bridge="copy").eval()
    source, (_, target) = torch.randn(shape), draw()
    module.loss(source, lengths, target, TARGET_LENGTHS).backward()
    assert all(parameter.grad is not None for parameter in module.encoder.parameters())
    result = module.generate(source, lengths, beam_size=3, n_best=3, max_length=(2, 0), min_length=(2, 0))
    assert result.lengths.max() == longest
    torch.testing.assert_close(module.score(source, lengths, result.tokens, result.lengths), result.scores)
    with pytest.raises(TypeError, match=r"source must be a torch.Tensor, got list"):
        module.generate([[1]])
    with pytest.raises(ValueError, match=r"source must have at least 2 dimensions, got shape \(3,\)"):
        module.generate(torch.zeros(3))


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    module = model(**KINDS[kind], dtype=dtype)
    module.save(tmp_path / "model.pt")
    loaded = Seq2Seq.load(tmp_path / "model.pt")
    assert repr(loaded) == repr(module) and type(loaded) is Seq2Seq
    assert loaded.decoder.eos == module.decoder.eos and loaded.decoder.pad == module.decoder.pad
    assert {name: tensor.dtype for name, tensor in loaded.named_parameters()} == {
        name: dtype for name, _ in module.named_parameters()
    }
    if "tie_weights" in KINDS[kind]:
        assert loaded.decoder.projection.weight is loaded.decoder.embedding.weight
    source, target = draw()
    given = (source, LENGTHS, target, TARGET_LENGTHS)
    assert torch.equal(loaded.eval().loss(*given), module.loss(*given))
    assert_same(loaded.generate(source, LENGTHS, beam_size=2), module.generate(source, LENGTHS, beam_size=2))
    # It can be saved and trained again.
    loaded.save(str(tmp_path / "again.pt"))
    loaded.train().loss(*given).backward()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_save_and_load_of_every_attention_module(attention: str, tmp_path: Path) -> None:
    module = model(attention=attention)
    module.save(tmp_path / "model.pt")
    loaded = Seq2Seq.load(tmp_path / "model.pt", map_location="cpu").eval()
    assert repr(loaded) == repr(module)
    source, _ = draw()
    found, wanted = (each.generate(source, LENGTHS, max_length=9) for each in (loaded, module))
    assert_same(found, wanted)


def test_save_and_load_of_options(tmp_path: Path) -> None:
    """Of the layers, the attention module and the decoder."""
    encoder = TokenEncoder(
        SOURCES, E, fastrnn.nn.LSTM(E, H, 2, dropout=0.1, layer_norm=True, zoneout=0.2, bidirectional=True), dropout=0.3
    )
    attention = AdditiveAttention(H, 2 * H, 4, normalize_v=True)
    rnn = AttentionDecoder(
        "gru", E, H, attention, 2, False, attend="before", dropout=0.1, reset_after=False, bias=False
    )
    decoder = TokenDecoder(TARGETS, E, rnn, bos=BOS, eos=[2, 3], pad=4, readout_size=E, dropout=0.5, tie_weights=True)
    module = Seq2Seq(encoder, decoder, bridge="learned").eval()
    module.save(tmp_path / "model.pt")
    loaded = Seq2Seq.load(tmp_path / "model.pt")
    assert repr(loaded) == repr(module)
    for a, b in ((loaded.encoder.rnn, module.encoder.rnn), (loaded.decoder.rnn.rnn, rnn.rnn)):
        for name in ("layer_norm", "zoneout", "dropout", "bias", "reset_after", "bidirectional", "num_layers"):
            assert getattr(a, name) == getattr(b, name), name
    assert loaded.encoder.dropout == 0.3 and loaded.decoder.rnn.attend == "before"
    source, target = draw()
    assert torch.equal(loaded.eval().loss(source, LENGTHS, target), module.loss(source, LENGTHS, target))


def test_load_keeps_each_parameters_dtype(tmp_path: Path) -> None:
    module = model()
    module.encoder.float()
    module.save(tmp_path / "model.pt")
    loaded = Seq2Seq.load(tmp_path / "model.pt")
    for (name, found), wanted in zip(loaded.named_parameters(), module.parameters()):
        assert torch.equal(found, wanted) and found.dtype is wanted.dtype, name


def test_load_refuses_what_save_has_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    module = model()
    for content in (
        torch.zeros(3),
        module.state_dict(),
        {"model": module.state_dict(), "state": {}},
        {"model": torch.zeros(3), "state": {}},
        {"model": {"class": "LSTM", "arguments": {}}, "state": {}},
        [1, 2],
        module,
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"model\.pt must be a file that Seq2Seq\.save has written"):
            Seq2Seq.load(path)
    for text in ("hello", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"model\.pt must be a file that Seq2Seq\.save has written"):
            Seq2Seq.load(path)
    with pytest.raises(FileNotFoundError):
        Seq2Seq.load(tmp_path / "nothing.pt")


def test_save_refuses_classes_of_ones_own(tmp_path: Path) -> None:
    class Own(Seq2Seq):
        pass

    module = model()
    with pytest.raises(TypeError, match=r"save takes modules of fastrnn\.nn alone, got Own; use state_dict"):
        Own(module.encoder, module.decoder).save(tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


# Errors


def of_sizes(encoder: Any = None, decoder: Any = None, **options: Any) -> Seq2Seq:
    encoder = TokenEncoder(SOURCES, E, fastrnn.nn.LSTM(E, H) if encoder is None else encoder)
    decoding = AttentionDecoder("lstm", E, H, DotAttention()) if decoder is None else decoder
    return Seq2Seq(encoder, TokenDecoder(TARGETS, E, decoding, bos=BOS, eos=EOS), **options)


def decoding(rnn: Any = None, tokens: int = TARGETS, embedding: int = E, **options: Any) -> TokenDecoder:
    rnn = AttentionDecoder("lstm", E, H, DotAttention()) if rnn is None else rnn
    return TokenDecoder(tokens, embedding, rnn, **{"bos": BOS, "eos": EOS, **options})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: TokenEncoder(9, E, nn.LSTM(E, H)),
            TypeError,
            "rnn must be an RNN, LSTM or GRU of fastrnn.nn, got LSTM",
        ),
        (
            lambda: TokenEncoder(9, 4, fastrnn.nn.GRU(E, H)),
            ValueError,
            "rnn must have input_size 4, the embeddings' size",
        ),
        (
            lambda: TokenEncoder(9, E, fastrnn.nn.GRU(E, H), dropout=1.5),
            ValueError,
            r"dropout must be a probability in \[",
        ),
        (
            lambda: TokenEncoder(9, E, fastrnn.nn.GRU(E, H), dropout=True),
            ValueError,
            r"probability in \[0, 1\], got True",
        ),
        (
            lambda: decoding(nn.GRU(E, H)),
            TypeError,
            "rnn must be an AttentionDecoder, RNN, LSTM or GRU of fastrnn.nn, got",
        ),
        (lambda: decoding(embedding=4), ValueError, "rnn must have input_size 4, the embeddings' size, got 5"),
        (
            lambda: decoding(fastrnn.nn.GRU(E, H, bidirectional=True)),
            ValueError,
            "bidirectional and proj_size do not go",
        ),
        (
            lambda: decoding(fastrnn.nn.LSTM(E, H, proj_size=2)),
            ValueError,
            "bidirectional and proj_size do not go with",
        ),
        (lambda: decoding(bos=9), ValueError, r"bos must be below num_tokens 9, got \(9,\)"),
        (lambda: decoding(bos=-1), ValueError, r"bos must be below num_tokens 9, got \(-1,\)"),
        (lambda: decoding(eos=[0, 9]), ValueError, r"eos must be below num_tokens 9, got \(0, 9\)"),
        (lambda: decoding(eos=[]), ValueError, r"eos must be below num_tokens 9, got \(\)"),
        (lambda: decoding(tie_weights=True), ValueError, "tie_weights needs embedding_dim 12, what W sees, got 5"),
        (lambda: decoding(dropout=-0.1), ValueError, r"dropout must be a probability in \[0, 1\], got -0.1"),
        (lambda: Seq2Seq(Pooled(), nn.Linear(2, 2)), TypeError, "decoder must be a TokenDecoder, got Linear"),  # type: ignore[arg-type]
        (lambda: of_sizes(bridge="mean"), ValueError, "bridge must be one of 'copy', 'learned', 'none', got 'mean'"),
        (
            lambda: of_sizes(fastrnn.nn.LSTM(E, H, 2)),
            ValueError,
            r"bridge='copy' needs an encoder whose layers and sizes \(2, 6\) are the decoder's \(1, 6\), got others",
        ),
        (
            lambda: of_sizes(fastrnn.nn.LSTM(E, 8, proj_size=H)),
            ValueError,
            "bridge='copy' needs an encoder whose layers and sizes",
        ),
        (
            lambda: of_sizes(fastrnn.nn.LSTM(E, H, bidirectional=True), bridge="learned"),
            ValueError,
            "decoder must have memory_size 12, got 6",
        ),
        (
            lambda: Seq2Seq(Pooled(), decoding(), bridge="learned"),
            ValueError,
            "bridge='learned' needs encoder_states with an encoder of your own",
        ),
    ],
)
def test_errors_of_construction(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


SOURCE, TARGET = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], None, TARGET, None), TypeError, "source must be a torch.Tensor, got list"),
        ((SOURCE.float(), None, TARGET, None), TypeError, "source must hold int64 or int32, got torch.float32"),
        ((SOURCE[0], None, TARGET, None), ValueError, r"source must have 2 dimensions, got shape \(6,\)"),
        ((SOURCE, [6] * 4, TARGET, None), TypeError, "source_lengths must be a torch.Tensor or None, got list"),
        ((SOURCE, torch.ones(4), TARGET, None), TypeError, "source_lengths must hold integers, got torch.float32"),
        ((SOURCE, LENGTHS[:3], TARGET, None), ValueError, r"source_lengths must have shape \(4,\), got \(3,\)"),
        ((SOURCE, LENGTHS + 1, TARGET, None), ValueError, "source_lengths must be from 0 to 6, got 2 to 7"),
        ((SOURCE, LENGTHS - 2, TARGET, None), ValueError, "source_lengths must be from 0 to 6, got -1 to 4"),
        ((SOURCE, None, [[1]], None), TypeError, "target must be a torch.Tensor, got list"),
        ((SOURCE, None, TARGET.double(), None), TypeError, "target must hold int64 or int32, got torch.float64"),
        ((SOURCE, None, TARGET[0], None), ValueError, r"target must have .* dimensions, got shape \(5,\)"),
        ((SOURCE, None, TARGET[:3], None), ValueError, "target must have the source's batch 4, got 3"),
        (
            (SOURCE, None, TARGET, torch.ones(4, 1).long()),
            ValueError,
            r"target_lengths must have shape \(4,\), got \(4, 1",
        ),
        ((SOURCE, None, TARGET, TARGET_LENGTHS + 1), ValueError, "target_lengths must be from 0 to 5, got 1 to 6"),
        ((SOURCE, None, TARGET, TARGET_LENGTHS > 1), TypeError, "target_lengths must hold integers, got torch.bool"),
    ],
)
def test_errors_of_sequences(arguments: Any, error: type[Exception], message: str) -> None:
    module = model()
    for method in (module.loss, module.score):
        with pytest.raises(error, match=message):
            method(*arguments)
    if "target" not in message:
        with pytest.raises(error, match=message):
            module.generate(*arguments[:2])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: m.loss(SOURCE, None, TARGET, reduction="all"),
            ValueError,
            "reduction must be 'mean', 'sum' or 'none'",
        ),
        (
            lambda m: m.score(SOURCE, None, TARGET, reduction="mean"),
            ValueError,
            "reduction must be 'sum' or 'none', got",
        ),
        (
            lambda m: m.loss(SOURCE, None, TARGET[:, None]),
            ValueError,
            r"target must have 2 dimensions, got shape \(4, 1,",
        ),
        (
            lambda m: m.score(SOURCE, None, TARGET[:, None], TARGET_LENGTHS),
            ValueError,
            r"target_lengths must have shape \(4, 1\), got \(4,\)",
        ),
        (lambda m: m.generate(SOURCE, beam_size=0), ValueError, "beam_size must be at least 1, got 0"),
        (lambda m: m.generate(SOURCE, beam_size=-1), ValueError, "beam_size must be at least 1, got -1"),
        (lambda m: m.generate(SOURCE, beam_size=2.0), TypeError, "beam_size must be an int, got float"),
        (lambda m: m.generate(SOURCE, beam_size=2, n_best=3), ValueError, "n_best must be at most beam_size 2, got 3"),
        (lambda m: m.generate(SOURCE, max_length=[2, 10]), TypeError, "max_length must be an int, got list"),
        (lambda m: m.generate(SOURCE, min_length=(0.5, -9)), ValueError, "min_length must be at least 0, got -6"),
        (lambda m: m.generate(SOURCE, eos=TARGETS), ValueError, "eos must be below 9, what the logits have, got 9"),
        (lambda m: m.generate(SOURCE, banned_tokens=[9]), ValueError, "banned tokens must be below 9, what the logits"),
        (
            lambda m: m.generate(SOURCE, prefix=torch.full((4, 1), 12)),
            ValueError,
            "prefix must be below 9, what the logits have, got 12",
        ),
    ],
)
def test_errors_of_calls(call: Callable[[Seq2Seq], Any], error: type[Exception], message: str) -> None:
    for kind, dtype in itertools.product(("lstm", "bare"), (torch.float32, torch.float64)):
        with pytest.raises(error, match=message):
            call(model(**KINDS[kind], dtype=dtype))


@pytest.mark.parametrize("options", [{"need_alignments": True}, {"coverage_penalty": "wu"}])
def test_alignments_need_attention(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need_alignments and coverage_penalty need a decoder with attention"):
        model(attention=None).generate(SOURCE, **options)


def test_nan_of_a_model_is_refused() -> None:
    for kind, dtype in itertools.product(("lstm", "bare"), (torch.float32, torch.float64)):
        module = model(**KINDS[kind], dtype=dtype)
        source, _ = draw()
        source = source.clamp(max=SOURCES - 2)
        source[2, 0] = SOURCES - 1
        with torch.no_grad():
            module.encoder.embedding.weight[SOURCES - 1] = float("nan")
        for options in ({}, {"beam_size": 3}, {"sample": "ancestral"}, {"banned_tokens": [4]}):
            with pytest.raises(ValueError, match=r"without NaN and inf, got some for sentences \[2\]"):
                module.generate(source, LENGTHS, **options)
