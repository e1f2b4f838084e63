"""A user's program. `make lint` has mypy check it with all that --strict asks: what is wrong here must be an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastrnn
from fastrnn.nn import GRU, LSTM, AdditiveAttention, AttentionDecoder, Seq2Seq, TokenDecoder, TokenEncoder
from fastrnn.ops import attention
from fastrnn.search import BeamResult, Shared, beam_search


def test_layers() -> None:
    ours: torch.nn.GRU = GRU(3, 4, zoneout=0.1, reset_after=False)
    theirs = torch.nn.GRU(3, 4)
    theirs = fastrnn.restore(fastrnn.accelerate(theirs))
    text: str = fastrnn.explain(ours, torch.zeros(5, 2, 3))
    assert text
    with pytest.raises(ValueError, match="backend must be"):
        fastrnn.accelerate(theirs, backend=3)  # type: ignore[arg-type]


def test_attention() -> None:
    context, weights = attention(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), need_weights=False)
    context.sum()
    with pytest.raises(AttributeError):
        weights.sum()  # type: ignore[union-attr]


def test_search() -> None:
    layers = AttentionDecoder("lstm", 3, 4, AdditiveAttention(4, 4, 5), num_layers=2)
    encoder = TokenEncoder(9, 3, LSTM(3, 4, forget_bias=1.0))
    model = Seq2Seq(encoder, TokenDecoder(9, 3, layers, bos=0, eos=1), bridge="learned")
    found: BeamResult = model.generate(torch.zeros(2, 6, dtype=torch.int64), beam_size=2)
    tokens: Tensor = found.tokens
    alignments: Tensor | None = found.alignments
    assert tokens.shape[:2] == (2, 1) and alignments is None

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return torch.zeros(len(tokens), 9), state

    state = Shared(torch.zeros(2, 4))
    beam_search(step, state, batch_size=2, beam_size=3, bos=0, eos=[1], max_length=5)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'eos'"):
        beam_search(step, state, batch_size=2, beam_size=3, bos=0, max_length=5)  # type: ignore[call-arg]
