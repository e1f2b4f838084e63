"""Modules: torch.nn's recurrent modules on fastrnn's operators, with options that torch.nn does not have."""

from fastrnn.nn.cells import GRUCell, LSTMCell, RNNCell
from fastrnn.nn.rnn import GRU, LSTM, RNN
from fastrnn.nn.tracing import allow_tracing

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]

allow_tracing()
