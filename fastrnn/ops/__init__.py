"""Operators: they check their arguments, choose a back end and make the result differentiable."""

from fastrnn.ops.dropout import dropout
from fastrnn.ops.recurrence import recurrence, recurrent_layer

__all__ = ["dropout", "recurrence", "recurrent_layer"]
