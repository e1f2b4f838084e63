"""The back end `cpu`: launchers of the attention kernels in csrc/cpu. They allocate; the kernels only compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import native
from fastrnn.backends.attention.call import AttentionCall
from fastrnn.backends.tensors import address, as_float32, with_unit_stride

# Number of csrc/cpu/attention.h. Those of 16 bits are computed in float32: the forward pass converts them memory by
# memory, for the backward pass they are converted first.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ABSENT = (0, 0, 0)


def reasons_against(call: AttentionCall) -> list[str]:
    reasons = []
    if native.load() is None:
        reasons.append(f"the compiled extension is not available ({native.load_error()})")
    reasons += call.reasons_against_place("the CPU", call.query.is_cpu, tuple(DTYPES))
    return reasons + call.reasons_against_kernels()


def _place(tensor: Tensor | None) -> tuple[int, int, int]:
    """Where the matrices [B, rows, n] lie."""
    return _ABSENT if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else with_unit_stride(tensor.float())


class Inputs:
    """The inputs of a call as the kernels take them, kept alive. `widen`: query, keys and values as float32."""

    def __init__(
        self,
        widen: bool,
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
    ) -> None:
        dtype = torch.float32 if widen else query.dtype
        self.query, self.keys = with_unit_stride(query.to(dtype)), with_unit_stride(keys.to(dtype))
        self.values = self.keys if values is None else with_unit_stride(values.to(dtype))
        self.whole = tuple(map(as_float32, (v, features, feature_weight)))
        self.factors = None if factors is None else with_unit_stride(factors)
        self.lengths = None if lengths is None else lengths.contiguous()
        self.mask = mask
        batch, queries, size = query.shape
        self.sizes = (batch, queries, keys.shape[1], size, self.values.shape[-1])
        strides = (0, 0, 0) if mask is None else mask.stride()
        if mask is not None and mask.shape[1] == 1:
            strides = (strides[0], 0, strides[2])
        self.native = native.load().AttentionInputs(  # type: ignore[union-attr]
            DTYPES[dtype],
            (*self.sizes, 0 if feature_weight is None else feature_weight.shape[-1]),
            _place(self.query),
            _place(self.keys),
            _place(self.values),
            *map(address, self.whole),
            _place(self.factors),
            address(self.lengths),
            address(mask),
            strides,
            causal,
            normalize == "softmax",
            scale,
        )


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Context [B, Tq, Dv] in the query's dtype and weights [B, Tq, Tk] in float32. Arguments: those of Inputs."""
    inputs = Inputs(False, *arguments)
    batch, queries, keys, _, value_size = inputs.sizes
    context = inputs.query.new_empty(batch, queries, value_size, dtype=torch.float32)
    weights = context.new_empty(batch, queries, keys)
    launch(inputs, context, weights)
    return context.to(arguments[0].dtype), weights


def launch(inputs: Inputs, context: Tensor, weights: Tensor) -> None:
    """Into float32 tensors of these shapes, the context with any strides but its last."""
    threads = torch.get_num_threads()
    native.load().attention_forward(inputs.native, _place(context), weights.data_ptr(), threads)  # type: ignore[union-attr]


def backward(dcontext: Tensor | None, dweights: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of AttentionCall.inputs in their dtypes, empty where `needs` is False.

    Arguments: the tensors of Inputs, the weights, the rest of Inputs, needs.
    """
    tensors, weights, needs = arguments[:9], arguments[9], arguments[-1]
    inputs = Inputs(True, *tensors, *arguments[10:-1])
    query, values = tensors[0], tensors[2]
    batch = query.shape[0]
    if dcontext is None and dweights is None:
        zeros = (
            None if tensor is None or not need else torch.zeros_like(tensor) for tensor, need in zip(tensors, needs)
        )
        return tuple(query.new_empty(0) if gradient is None else gradient for gradient in zeros)

    def empty(index: int, *leading: int) -> Tensor | None:
        tensor = tensors[index]
        return None if tensor is None or not needs[index] else inputs.query.new_empty(*leading, *tensor.shape)

    dquery, dkeys, dvalues, dfeatures = (empty(index) for index in (0, 1, 2, 4))
    parts = [empty(index, batch) for index in (3, 5)]
    dcontext, dweights = _rows(dcontext), _rows(dweights)
    native.load().attention_backward(  # type: ignore[union-attr]
        inputs.native,
        _place(dcontext),
        _place(dweights),
        weights.data_ptr(),
        address(dquery),
        address(dkeys),
        address(dkeys if values is None else dvalues),
        address(parts[0]),
        address(dfeatures),
        address(parts[1]),
        torch.get_num_threads(),
    )
    dv, dfeature_weight = (None if part is None else part.sum(0) for part in parts)
    gradients = (dquery, dkeys, dvalues, dv, dfeatures, dfeature_weight)
    return tuple(
        query.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, tensors)
    )
