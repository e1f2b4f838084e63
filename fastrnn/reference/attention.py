"""Softmax attention of the seq2seq kind: scores of queries and keys, weights, and the weighted sum of values.

Any floating dtype, any device, differentiable any number of times. Nothing here is tuned, and the additive score forms
its [B, Tq, Tk, D] tensor: this file says what the other back ends must compute.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attended_keys(
    queries: int,
    keys: Tensor,  # [B, Tk, D]
    lengths: Tensor | None = None,  # [B]
    mask: Tensor | None = None,  # [B, Tq or 1, Tk] bool
    causal: bool = False,
) -> Tensor:
    """Which keys each query sees: bool [B, Tq, Tk]."""
    batch, count, _ = keys.shape
    position = torch.arange(count, device=keys.device)
    seen = torch.ones(batch, queries, count, dtype=torch.bool, device=keys.device)
    if lengths is not None:
        seen = seen & (position < lengths.to(keys.device)[:, None, None])
    if mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & (position <= torch.arange(queries, device=keys.device)[:, None])
    return seen


def attention_scores(
    query: Tensor,  # [B, Tq, D]
    keys: Tensor,  # [B, Tk, D]
    v: Tensor | None = None,  # [D]
    features: Tensor | None = None,  # [B, Tq, Tk, C]
    feature_weight: Tensor | None = None,  # [D, C]
    scale: float = 1.0,
) -> Tensor:
    """e [B, Tq, Tk].

    Without v the inner product, e_ts = scale ``<q_t, k_s>`` (Luong et al. 2015, arXiv 1508.04025). With v the additive
    score, e_ts = v . tanh(q_t + k_s) (Bahdanau et al. 2015, arXiv 1409.0473), or, with features of each pair such as
    a convolution over previous weights, e_ts = v . tanh(q_t + k_s + F f_ts) (Chorowski et al. 2015, arXiv 1506.07503).
    """
    if v is None:
        return scale * (query @ keys.transpose(1, 2))
    summed = query[:, :, None] + keys[:, None]
    if features is not None and feature_weight is not None:
        summed = summed + features @ feature_weight.T
    return torch.tanh(summed) @ v


def attention(
    query: Tensor,  # [B, Tq, D]
    keys: Tensor,  # [B, Tk, D]
    values: Tensor,  # [B, Tk, Dv]
    v: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    *,
    lengths: Tensor | None = None,  # [B]
    mask: Tensor | None = None,  # [B, Tq or 1, Tk] bool: True where a query sees a key
    causal: bool = False,
    scale: float = 1.0,
    normalize: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Context [B, Tq, Dv] and weights [B, Tq, Tk], context_t = sum_s weights_ts values_s.

    ``normalize``: ``"softmax"`` over the keys that a query sees, or ``"length"``, scores divided by how many it sees.
    Unseen keys have the weight 0; a query that sees none gets zeros. What is masked for all queries may hold anything.
    """
    seen = attended_keys(query.shape[1], keys, lengths, mask, causal)
    unused = ~seen.any(1)[..., None]
    keys, values = keys.masked_fill(unused, 0), values.masked_fill(unused, 0)
    if features is not None:
        features = features.masked_fill(~seen[..., None], 0)
    scores = attention_scores(query, keys, v, features, feature_weight, scale)
    if normalize == "length":
        weights = scores / seen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    else:
        # The finite fill keeps rows without any key, and their gradients, from being NaN.
        lowest = torch.finfo(scores.dtype).min
        weights = torch.softmax(scores.masked_fill(~seen, lowest), -1)
    weights = weights.masked_fill(~seen, 0)
    return weights @ values, weights
