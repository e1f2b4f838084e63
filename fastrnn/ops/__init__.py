"""Operators: they check their arguments, choose a back end and make the result differentiable."""

from fastrnn.ops.recurrence import recurrence, recurrent_layer

__all__ = ["recurrence", "recurrent_layer"]
