"""The back end `reference`: fastrnn.reference behind the interface of a call."""

from torch import Tensor

from fastrnn import reference
from fastrnn.backends.attention.call import AttentionCall


def reasons_against(call: AttentionCall) -> list[str]:
    return []


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Context and weights, by plain differentiable PyTorch."""
    return reference.attention(
        call.query,
        call.keys,
        call.keys if call.values is None else call.values,
        call.v,
        call.features,
        call.feature_weight,
        lengths=call.lengths,
        mask=call.mask,
        causal=call.causal,
        scale=call.scale,
        normalize=call.normalize,
    )
