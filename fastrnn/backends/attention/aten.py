"""The back end `aten`: torch's scaled_dot_product_attention, where it computes the same."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastrnn.backends.attention.call import AttentionCall


def reasons_against(call: AttentionCall) -> list[str]:
    reasons = []
    if call.v is not None:
        reasons.append("torch has inner products only, no additive score")
    if call.normalize != "softmax":
        reasons.append(f"torch has no normalize={call.normalize!r}")
    if call.need_weights:
        reasons.append("torch's operator does not return the weights")
    if call.lengths is not None or call.mask is not None:
        reasons.append("torch's operator lets NaN in masked values through")
    return reasons


def run(call: AttentionCall) -> tuple[Tensor, None]:
    values = call.keys if call.values is None else call.values
    # One head: three dimensions would miss the fused kernels.
    query, keys, values = (tensor.unsqueeze(1) for tensor in (call.query, call.keys, values))
    return scaled_dot_product_attention(query, keys, values, is_causal=call.causal, scale=call.scale).squeeze(1), None
