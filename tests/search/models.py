"""Small models for tests of searches."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrnn import nn

CELLS = ("lstm", "gru")
ATTENTIONS = (None, "dot", "additive")
_TOKENS, _EMBEDDED, _HIDDEN, _LAYERS = 40, 24, 48, 2


def model(cell: str, attention: str | None, seed: int = 0) -> tuple[nn.Seq2Seq, Tensor]:
    """A model in evaluation, sure of something as trained ones are, and a source [4, 7] for it."""
    torch.manual_seed(seed)
    layers = {"lstm": nn.LSTM, "gru": nn.GRU}[cell]
    asked = {"dot": lambda: nn.DotAttention(), "additive": lambda: nn.AdditiveAttention(_HIDDEN, _HIDDEN, 20)}
    decoding = (
        layers(_EMBEDDED, _HIDDEN, _LAYERS)
        if attention is None
        else nn.AttentionDecoder(cell, _EMBEDDED, _HIDDEN, asked[attention](), _LAYERS)
    )
    encoder = nn.TokenEncoder(_TOKENS, _EMBEDDED, layers(_EMBEDDED, _HIDDEN, _LAYERS))
    decoder = nn.TokenDecoder(_TOKENS, _EMBEDDED, decoding, bos=0, eos=1)
    with torch.no_grad():
        decoder.projection.weight.mul_(30)
        decoder.projection.bias[1] = 2.0  # so that sentences end before they are cut
    return nn.Seq2Seq(encoder, decoder).eval(), torch.randint(2, _TOKENS, (4, 7))
