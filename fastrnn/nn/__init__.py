"""Modules: torch.nn's recurrent modules on fastrnn's operators, with options that torch.nn does not have; attention."""

from fastrnn.nn.attention import (
    AdditiveAttention,
    DotAttention,
    GeneralAttention,
    LocationAttention,
    MeanContext,
    PositionalAttention,
    PreparedMemory,
    SelfAttention,
)
from fastrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.nn.decoder import AttentionDecoder, DecoderState
from fastrnn.nn.rnn import GRU, LSTM, RNN
from fastrnn.nn.seq2seq import RecurrentState, Seq2Seq, TokenDecoder, TokenEncoder
from fastrnn.nn.tracing import allow_tracing

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionDecoder",
    "DecoderState",
    "DotAttention",
    "GRUCell",
    "GeneralAttention",
    "LSTMCell",
    "LocationAttention",
    "MeanContext",
    "PositionalAttention",
    "PreparedMemory",
    "RNNCell",
    "RecurrentState",
    "SelfAttention",
    "Seq2Seq",
    "TokenDecoder",
    "TokenEncoder",
]

allow_tracing()
