"""The back end `triton`: launchers of the kernels in kernels/attention.py.

A forward pass is two launches: the scores of all pairs, and their weights with the contexts. Both stay in memory as
float32 [B, Tq, Tk]; the weights are all that a backward pass needs of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import gpu
from fastrnn.backends import triton as shared
from fastrnn.backends.attention.call import AttentionCall
from fastrnn.backends.tensors import with_unit_stride


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is launched. No size depends on how many memories there are, so that no result does."""

    rows: int  # queries, or keys where they have the queries' place
    others: int  # keys, or queries
    columns: int  # of the vectors, or 0
    warps: int
    stages: int


# With these sizes the kernels, as Triton 3.9 compiles them, fit into shared memory and spill next to no registers
# (tests/kernels/test_compiled.py); not measured on a GPU yet.


def pick_product(rows: int, dtype: torch.dtype) -> Tiles:
    """How products of matrices are launched: of queries and keys, and of weights and values."""
    columns = 32 if dtype is torch.float32 else 64
    return Tiles(16, 32, columns, 4, 3) if rows <= 16 else Tiles(64, 64, columns, 8, 3)


def pick_additive(queries: int, features: bool) -> Tiles:
    """How additive scores are launched. Queries of one tile share its keys, which helps little with features."""
    if features:
        return Tiles(1, 32, 64, 8, 2)
    return Tiles(1, 16, 128, 4, 2) if queries == 1 else Tiles(4, 16, 32, 4, 2)


def pick_additive_backward() -> Tiles:
    """How the gradients of additive scores are launched: one query after the other."""
    return Tiles(1, 64, 32, 8, 2)


def pick_score_gradients() -> Tiles:
    """How gradients of scores are launched, which are rows of pairs and no more."""
    return Tiles(4, 256, 0, 4, 2)


def pick_features(features: int) -> int:
    """How many features are in a tile."""
    return min(64, max(16, 1 << (features - 1).bit_length()))


def reasons_against(call: AttentionCall) -> list[str]:
    reasons = [] if shared._INSTALLED else ["triton is not installed"]
    here = call.query.is_cuda or (call.query.is_cpu and shared._INTERPRETED)
    reasons += call.reasons_against_place("a CUDA device", here, gpu.DTYPES)
    return reasons + call.reasons_against_kernels()


def why_later(call: AttentionCall) -> str | None:
    """Why "auto" takes torch's operator first where that computes the same; None: it does not."""
    if call.need_weights or call.v is not None:
        return None
    return "it stores the weights; torch's operator, which does not, is asked first (not measured yet)"


def forward(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None,
    features: Tensor | None,
    feature_weight: Tensor | None,
    factors: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Context [B, Tq, Dv] in the dtype of the query, and weights [B, Tq, Tk], float32."""
    launcher = _Launcher(query, keys, v, features, feature_weight, lengths, mask, causal, normalize)
    values = launcher.keys if values is None else with_unit_stride(values)
    context = query.new_empty(*query.shape[:2], values.shape[-1])
    weights = launcher.new_pairs()
    if weights.numel() == 0:
        return context.zero_(), weights
    with torch.cuda.device_of(query):
        scores = launcher.inner(launcher.query, launcher.keys, scale) if v is None else launcher.additive(factors)
        launcher.contexts(scores, values, weights, context)
    return context, weights


def backward(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None,
    features: Tensor | None,
    feature_weight: Tensor | None,
    factors: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    weights: Tensor,
    causal: bool,
    scale: float,
    normalize: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of query, keys, values, v, features and feature_weight; empty where `needs` is False.

    Without values that of the keys is that of both. The factors are left alone: tanh itself is more accurate.
    """
    inputs = (query, keys, values, v, features, feature_weight)
    found = tuple(
        query.new_empty(tensor.shape if tensor is not None and need else 0)
        for tensor, need in zip(inputs, needs, strict=True)
    )
    if weights.numel() == 0:
        return tuple(gradient.zero_() for gradient in found)
    launcher = _Launcher(query, keys, v, features, feature_weight, lengths, mask, causal, normalize)
    dquery, dkeys, dvalues = found[:3]
    weights, added = weights.contiguous(), None
    dcontext = None if dcontext is None else with_unit_stride(dcontext)
    with torch.cuda.device_of(query):
        if dcontext is None:
            dvalues.zero_()
        elif values is None and needs[1]:
            added = torch.empty(dkeys.shape, dtype=torch.float32, device=dkeys.device)
            launcher.of_keys(weights, dcontext, 1.0, added)
        elif needs[2]:
            launcher.of_keys(weights, dcontext, 1.0, dvalues)
        if any(needs[:2]) or any(needs[3:]):
            values = launcher.keys if values is None else with_unit_stride(values)
            dproducts = None if dcontext is None else launcher.inner(dcontext, values, 1.0)
            dscores = launcher.score_gradients(dproducts, dweights, weights)
            if v is not None:
                launcher.additive_backward(dscores, added, found, needs)
            else:
                if needs[0]:
                    launcher.of_queries(dscores, launcher.keys, scale, dquery)
                if needs[1]:
                    launcher.of_keys(dscores, launcher.query, scale, dkeys, added)
    return found


class _Launcher:
    """Launches the kernels of one call."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        v: Tensor | None,
        features: Tensor | None,
        feature_weight: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        normalize: str,
    ) -> None:
        self.kernels = shared._kernels("attention")
        self.query, self.keys = with_unit_stride(query), with_unit_stride(keys)
        self.lengths = None if lengths is None else lengths.contiguous()
        self.causal, self.softmax = causal, normalize == "softmax"
        self.mask: tuple[Any, ...] = (None, 0, 0, 0)
        if mask is not None:
            stride_b, stride_q, stride_k = mask.stride()
            self.mask = mask.view(torch.uint8), stride_b, 0 if mask.shape[1] == 1 else stride_q, stride_k
        self.v = None if v is None else v.contiguous()
        self.features: tuple[Any, ...] = (None, 0, 0, 0, None)
        if features is not None and feature_weight is not None:
            features = with_unit_stride(features)
            self.features = features, *features.stride()[:3], feature_weight.contiguous()
        self.memories, self.queries, self.size = query.shape
        self.count = keys.shape[1]
        self.precision = gpu.precision() if query.dtype is torch.float32 else "ieee"

    def new_pairs(self) -> Tensor:
        return self.query.new_empty(self.memories, self.queries, self.count, dtype=torch.float32)

    def inner(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        """Scaled inner products of the vectors [B, Tq, n] and [B, Tk, n], where a query may see the key."""
        scores, tiles = self.new_pairs(), pick_product(self.queries, query.dtype)
        grid = self.memories * _cdiv(self.queries, tiles.rows) * _cdiv(self.count, tiles.others)
        self.kernels.attention_inner_scores[(grid,)](
            query,
            *query.stride()[:2],
            keys,
            *keys.stride()[:2],
            self.lengths,
            scores,
            scale,
            self.queries,
            self.count,
            query.shape[-1],
            CAUSAL=self.causal,
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.others,
            BLOCK_D=tiles.columns,
            PRECISION=self.precision,
            **_options(tiles),
        )
        return scores

    def additive(self, factors: Tensor | None) -> Tensor:
        """Additive scores, where a query may see the key."""
        scores, tiles = self.new_pairs(), pick_additive(self.queries, self.features[0] is not None)
        factors = None if factors is None else with_unit_stride(factors)
        grid = self.memories * _cdiv(self.queries, tiles.rows) * _cdiv(self.count, tiles.others)
        self.kernels.attention_additive_scores[(grid,)](
            *self._pre_activations(),
            factors,
            *((0, 0) if factors is None else factors.stride()[:2]),
            self.lengths,
            scores,
            *self._sizes(),
            CAUSAL=self.causal,
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.others,
            **self._additive_options(tiles),
        )
        return scores

    def contexts(self, scores: Tensor, values: Tensor, weights: Tensor, context: Tensor) -> None:
        """Fills weights and context."""
        size, tiles = context.shape[-1], pick_product(self.queries, context.dtype)
        grid = self.memories * _cdiv(self.queries, tiles.rows) * _cdiv(size, tiles.columns)
        self.kernels.attention_context[(grid,)](
            scores,
            values,
            *values.stride()[:2],
            self.lengths,
            *self.mask,
            weights,
            context,
            self.queries,
            self.count,
            size,
            CAUSAL=self.causal,
            SOFTMAX=self.softmax,
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.others,
            BLOCK_N=tiles.columns,
            PRECISION=self.precision,
            **_options(tiles),
        )

    def score_gradients(self, dproducts: Tensor | None, dweights: Tensor | None, weights: Tensor) -> Tensor:
        """Gradients of the scores, in place of the products of dcontext and values where there are some."""
        dscores = self.new_pairs() if dproducts is None else dproducts
        dweights = None if dweights is None else with_unit_stride(dweights)
        tiles = pick_score_gradients()
        self.kernels.attention_score_gradients[(self.memories * _cdiv(self.queries, tiles.rows),)](
            dproducts,
            dweights,
            *((0, 0) if dweights is None else dweights.stride()[:2]),
            weights,
            self.lengths,
            *self.mask,
            dscores,
            self.queries,
            self.count,
            CAUSAL=self.causal,
            SOFTMAX=self.softmax,
            BLOCK_Q=tiles.rows,
            BLOCK_K=tiles.others,
            **_options(tiles),
        )
        return dscores

    def of_queries(self, pairs: Tensor, vectors: Tensor, scale: float, out: Tensor) -> None:
        """out [B, Tq, n] = scale * pairs @ vectors [B, Tk, n]."""
        self._product(pairs, vectors, scale, out, None, False)

    def of_keys(self, pairs: Tensor, vectors: Tensor, scale: float, out: Tensor, added: Tensor | None = None) -> None:
        """out [B, Tk, n] = scale * transposed pairs @ vectors [B, Tq, n] + added."""
        self._product(pairs.mT, vectors, scale, out, added, True)

    def _product(
        self, pairs: Tensor, vectors: Tensor, scale: float, out: Tensor, added: Tensor | None, of_keys: bool
    ) -> None:
        (_, rows, inner), size = pairs.shape, vectors.shape[-1]
        tiles = pick_product(rows, vectors.dtype)
        grid = self.memories * _cdiv(rows, tiles.rows) * _cdiv(size, tiles.columns)
        self.kernels.attention_product[(grid,)](
            pairs,
            *pairs.stride(),
            vectors,
            *vectors.stride()[:2],
            self.lengths,
            added,
            out,
            scale,
            rows,
            inner,
            size,
            OF_KEYS=of_keys,
            CAUSAL=self.causal,
            BLOCK_I=tiles.rows,
            BLOCK_J=tiles.others,
            BLOCK_N=tiles.columns,
            PRECISION=self.precision,
            **_options(tiles),
        )

    def additive_backward(
        self, dscores: Tensor, added: Tensor | None, found: Sequence[Tensor], needs: Sequence[bool]
    ) -> None:
        """Fills the gradients that are needed, but for that of the values."""
        dquery, dkeys, _, dv, dfeatures, dfeature_weight = found
        tiles = pick_additive_backward()
        key_tiles, channels = _cdiv(self.count, tiles.others), self._channels if needs[5] else 0
        parts = [
            self.query.new_empty(self.memories, key_tiles, *shape, dtype=torch.float32) if need else None
            for need, shape in (
                (needs[0], (self.queries, self.size)),
                (needs[3], (self.size,)),
                (channels > 0, (self.size, channels)),
            )
        ]
        if any(needs[i] for i in (0, 1, 3, 5)):
            grid = self.memories * key_tiles * _cdiv(self.size, tiles.columns)
            self.kernels.attention_additive_backward[(grid * max(1, _cdiv(channels, pick_features(channels))),)](
                dscores,
                *self._pre_activations(),
                self.lengths,
                added,
                dkeys if needs[1] else None,
                *parts,
                *self._sizes(),
                CAUSAL=self.causal,
                BLOCK_K=tiles.others,
                **self._additive_options(tiles),
            )
        for part, gradient, dimensions in zip(parts, (dquery, dv, dfeature_weight), ((1,), (0, 1), (0, 1))):
            if part is not None:
                gradient.copy_(part.sum(dimensions))
        if needs[4]:
            grid = self.memories * self.queries * _cdiv(self.count, tiles.others)
            self.kernels.attention_feature_gradients[(grid * _cdiv(self._channels, pick_features(self._channels)),)](
                dscores,
                *self._pre_activations(),
                self.lengths,
                dfeatures,
                *self._sizes(),
                CAUSAL=self.causal,
                BLOCK_K=tiles.others,
                **self._additive_options(tiles),
            )

    def _pre_activations(self) -> tuple[Any, ...]:
        return (self.query, *self.query.stride()[:2], self.keys, *self.keys.stride()[:2], self.v, *self.features)

    def _sizes(self) -> tuple[int, ...]:
        return self.queries, self.count, self.size, self._channels

    def _additive_options(self, tiles: Tiles) -> dict[str, Any]:
        sizes = {"BLOCK_D": tiles.columns, "BLOCK_C": pick_features(self._channels)}
        return {**sizes, "PRECISION": self.precision, **_options(tiles)}

    @property
    def _channels(self) -> int:
        return 0 if self.features[0] is None else self.features[0].shape[-1]


def _options(tiles: Tiles) -> dict[str, Any]:
    return {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
