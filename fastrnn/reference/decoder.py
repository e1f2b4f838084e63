"""The loop of an attention decoder over time, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrnn.reference.attention import attention
from fastrnn.reference.recurrence import recurrence

LayerWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # weight_ih, weight_hh, bias_ih, bias_hh


def attention_decoder(
    cell: str,
    x: Tensor,  # [T, N, I]
    layers: Sequence[LayerWeights],
    h0: Tensor,  # [L, N, H]
    c0: Tensor | None,  # [L, N, H], LSTM
    context0: Tensor,  # [N, Dv]
    query_weight: Tensor | None,  # [D, H]
    keys: Tensor,  # [B, Tk, D]
    values: Tensor | None = None,  # [B, Tk, Dv]; None: the keys
    v: Tensor | None = None,  # [D]
    *,
    lengths: Tensor | None = None,  # [B]
    mask: Tensor | None = None,  # [B, 1, Tk] bool
    dropout_mask: Tensor | None = None,  # [L - 1, T, N, H]
    scale: float = 1.0,
    normalize: str = "softmax",
    reset_after: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """h_t of the top layer [T, N, H], contexts [T, N, Dv], weights [N, T, Tk], final states h_n and c_n [L, N, H].

    h_t = cells([x_t, context_{t-1}], h_{t-1}) and context_t = attention(W h_t, keys, values): input feeding of the
    context (Luong et al. 2015, arXiv 1508.04025, section 3.3). N / B neighbours share a memory. Between layers h is
    multiplied by ``dropout_mask``.
    """
    values = keys if values is None else values
    memories, size = keys.shape[0], keys.shape[2]
    h, c, context = list(h0), [None] * len(layers) if c0 is None else list(c0), context0
    tops, contexts, weights = [], [], []
    for t, x_t in enumerate(x):
        below = torch.cat([x_t, context], -1)
        for index, (weight_ih, weight_hh, bias_ih, bias_hh) in enumerate(layers):
            gates_x = below @ weight_ih.T if bias_ih is None else below @ weight_ih.T + bias_ih
            _, h[index], c[index], _ = recurrence(
                cell, gates_x[None], weight_hh, bias_hh, h[index], c[index], reset_after=reset_after
            )
            below = h[index]
            if dropout_mask is not None and index + 1 < len(layers):
                below = below * dropout_mask[index, t]
        query = h[-1] if query_weight is None else h[-1] @ query_weight.T
        query = query.reshape(memories, -1, size)
        found, seen = attention(query, keys, values, v, lengths=lengths, mask=mask, scale=scale, normalize=normalize)
        context = found.flatten(0, 1)
        tops.append(h[-1])
        contexts.append(context)
        weights.append(seen.flatten(0, 1))
    c_n = None if c0 is None else torch.stack([state for state in c if state is not None])
    return torch.stack(tops), torch.stack(contexts), torch.stack(weights, 1), torch.stack(h), c_n
