"""One call of the operator `attention`: what every back end is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrnn.backends.call import kernel_reasons, place_reasons


@dataclass(slots=True)
class AttentionCall:
    """B memories of Tk keys, each with Tq queries; the queries of several beams are more queries of one memory.

    All that projects queries and keys is done: scores are inner products of `size` D, or additive.
    """

    query: Tensor  # [B, Tq, D]
    keys: Tensor  # [B, Tk, D]
    values: Tensor | None = None  # [B, Tk, Dv]; None: the keys
    v: Tensor | None = None  # [D], of the additive score; None: the inner product
    features: Tensor | None = None  # [B, Tq, Tk, C], additive
    feature_weight: Tensor | None = None  # [D, C]
    factors: Tensor | None = None  # [B, Tk, D] float32, additive: `key_factors` of the keys
    lengths: Tensor | None = None  # [B] int64
    mask: Tensor | None = None  # [B, Tq or 1, Tk] bool: True where a query sees a key
    causal: bool = False  # query t sees keys 0..t
    scale: float = 1.0  # of the inner product
    normalize: str = "softmax"  # or "length"
    need_weights: bool = True

    def inputs(self) -> tuple[Tensor | None, ...]:
        """All tensors that have gradients, given or not."""
        return (self.query, self.keys, self.values, self.v, self.features, self.feature_weight)

    def tensors(self) -> dict[str, Tensor]:
        """The floating tensors that are given, by name."""
        names = ("query", "keys", "values", "v", "features", "feature_weight")
        return {name: tensor for name, tensor in zip(names, self.inputs(), strict=True) if tensor is not None}

    def reasons_against_place(self, place: str, here: bool, dtypes: tuple[torch.dtype, ...]) -> list[str]:
        """As RecurrenceCall.reasons_against_place."""
        return place_reasons(self.query, self.tensors(), place, here, dtypes)

    def reasons_against_kernels(self) -> list[str]:
        """What no native kernel can compute, whatever the device and dtype."""
        reasons = kernel_reasons(self.tensors())
        if self.query.shape[-1] == 0 or (self.keys if self.values is None else self.values).shape[-1] == 0:
            reasons.append("vectors of size 0")
        return reasons

    def __str__(self) -> str:
        batch, queries, size = self.query.shape
        score = "inner product" if self.v is None else "additive score" if self.features is None else "location score"
        dtype = str(self.query.dtype).removeprefix("torch.")
        return f"attention, {score}, {batch}x{queries} queries of {size} on {self.keys.shape[1]} keys {dtype}"


# Of e^x as a float, either side: beyond it a factor of tanh overflows or loses digits.
LARGEST_EXPONENT = 87.0


def key_factors(keys: Tensor) -> Tensor:
    """e^{2k} of keys [B, Tk, D] in float32: tanh(q + k) = 1 - 2 / (1 + e^{2q} e^{2k}) needs no exponential per pair.

    NaN, which sends kernels to tanh itself, where a factor would over- or underflow.
    """
    doubled = 2 * keys.detach().float()
    return torch.where(doubled.abs() <= LARGEST_EXPONENT, doubled.exp(), torch.nan)
