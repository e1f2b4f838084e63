"""Operators: they check their arguments, choose a back end and make the result differentiable."""

from fastrnn.backends.attention.call import key_factors
from fastrnn.ops.attention import attention
from fastrnn.ops.dropout import dropout
from fastrnn.ops.recurrence import recurrence, recurrent_layer
from fastrnn.ops.top_k import top_k_log_softmax

__all__ = ["attention", "dropout", "key_factors", "recurrence", "recurrent_layer", "top_k_log_softmax"]
