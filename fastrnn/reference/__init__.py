"""The executable specification: every operator in plain PyTorch, written as its formula reads."""

from fastrnn.reference.attention import attended_keys, attention, attention_scores
from fastrnn.reference.decoder import LayerWeights, attention_decoder
from fastrnn.reference.dropout import dropout, keep_scale
from fastrnn.reference.recurrence import CELLS, Cell, layer_norm, recurrence, zoneout_mask
from fastrnn.reference.top_k import top_k_log_softmax

__all__ = [
    "CELLS",
    "Cell",
    "LayerWeights",
    "attended_keys",
    "attention",
    "attention_decoder",
    "attention_scores",
    "dropout",
    "keep_scale",
    "layer_norm",
    "recurrence",
    "top_k_log_softmax",
    "zoneout_mask",
]
