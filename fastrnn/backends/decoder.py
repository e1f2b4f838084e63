"""The loop of an attention decoder on the back end `cpu`: launchers of csrc/cpu/decoder.cpp. They allocate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import native
from fastrnn.backends.attention.cpu import DTYPES, Inputs
from fastrnn.backends.call import kernel_reasons, place_reasons, wants_gradients
from fastrnn.backends.cpu import outer_product, packed_weight, workspace
from fastrnn.backends.native import CELL_INDEX
from fastrnn.backends.tensors import address, as_float32
from fastrnn.reference import CELLS, LayerWeights


@dataclass(slots=True)
class DecoderCall:
    """T steps of N sequences and L layers of H units, N / B of them for each of B memories of Tk keys."""

    cell: str  # of native.CELL_INDEX
    x: Tensor  # [T, N, I]
    layers: Sequence[LayerWeights]  # the first one's weight_ih [G*H, I + Dv]
    h0: Tensor  # [L, N, H]
    c0: Tensor | None  # [L, N, H], LSTM
    context0: Tensor  # [N, Dv]
    query_weight: Tensor | None  # [D, H]; None: h is the query
    keys: Tensor  # [B, Tk, D]
    values: Tensor | None = None  # [B, Tk, Dv]; None: the keys
    v: Tensor | None = None  # [D], of the additive score
    factors: Tensor | None = None  # [B, Tk, D], of AttentionCall
    lengths: Tensor | None = None  # [B] int64
    mask: Tensor | None = None  # [B, 1, Tk] bool
    dropout_mask: Tensor | None = None  # [L - 1, T, N, H]
    scale: float = 1.0
    normalize: str = "softmax"

    def inputs(self) -> tuple[Tensor | None, ...]:
        """All tensors that have gradients, given or not; from the eighth on those of the layers, four each."""
        others = (self.h0, self.c0, self.context0, self.query_weight, self.keys, self.values, self.v)
        return (self.x, *others, *(tensor for layer in self.layers for tensor in layer))

    def reasons_against(self) -> list[str]:
        """Why the back end cpu cannot take the whole loop in one call."""
        tensors = {f"tensor {index}": tensor for index, tensor in enumerate(self.inputs()) if tensor is not None}
        reasons = []
        if native.load() is None:
            reasons.append(f"the compiled extension is not available ({native.load_error()})")
        reasons += place_reasons(self.x, tensors, "the CPU", self.x.is_cpu, tuple(DTYPES)) + kernel_reasons(tensors)
        if len({tensor.dtype for tensor in tensors.values()}) > 1:
            reasons.append("tensors of several dtypes")
        if self.x.numel() == 0 or self.keys.numel() == 0 or self.h0.numel() == 0:
            reasons.append("an empty tensor")
        if self.x.shape[1] != self.keys.shape[0] and wants_gradients(self.inputs()):
            reasons.append("gradients where several sequences share a memory")
        return reasons

    def __str__(self) -> str:
        (steps, batch, _), (layers, _, hidden) = self.x.shape, self.h0.shape
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"decoder loop, {layers} x {self.cell} of {hidden}, {batch}x{steps} steps, {dtype}"


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
INPUT_COUNT = 8  # of DecoderCall.inputs, before those of the layers


class Loop:
    """A native call, and the tensors whose addresses it holds."""

    def __init__(
        self, cell: str, x: Tensor, h0: Tensor, keys: Tensor, attention: Inputs | None, dropout_mask: Any
    ) -> None:
        library: Any = native.load()
        self.library, self.native = library, library.Decoder()
        self.lstm = cell == "lstm"
        self.cell, self.gates = cell, CELLS[cell.removesuffix("_reset_before")].gates
        self.steps, self.batch, self.fed = x.shape
        self.count, _, self.hidden = h0.shape
        self.kept: list[Any] = []
        self.attention = attention
        self.dropout_mask = as_float32(dropout_mask)
        native_loop = self.native
        native_loop.cell, native_loop.steps, native_loop.batch = CELL_INDEX[cell], self.steps, self.batch
        native_loop.hidden_size = self.hidden
        if attention is None:
            return
        native_loop.attention, native_loop.context_size = attention.native, attention.sizes[4]
        # With one query of each memory all steps of a memory lie together, as the gradients of its keys want them.
        shared = self.batch != keys.shape[0]
        count = keys.shape[1]
        native_loop.weights_t = self.batch * count if shared else count
        native_loop.weights_b = self.batch // keys.shape[0] * count if shared else self.steps * count
        self.weights_shape = (self.steps, self.batch, count) if shared else (self.batch, self.steps, count)

    def at(self, tensor: Tensor | None) -> int:
        """The address of a tensor that is kept as long as the call."""
        self.kept.append(tensor)
        return address(tensor)

    def layer(
        self,
        index: int,
        weights: Sequence[Tensor | None],  # of all layers
        inputs: Sequence[Tensor],
        h: Tensor,
        c: Tensor,
        saved: Tensor,
        backward: bool,
        reuse: bool,
    ) -> Any:
        """A native layer with packed weights, and with what the forward pass fills and the backward pass reads."""
        weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * index :][:4]
        assert weight_ih is not None and weight_hh is not None
        layer = self.library.DecoderLayer()
        layer.input_size = weight_ih.shape[1]
        for name, weight, hidden in (("weight_ih", weight_ih, False), ("weight_hh", weight_hh, True)):
            packed = packed_weight(weight, torch.float32, self.cell, self.gates, hidden, backward, reuse)
            self.kept.append(packed)
            setattr(layer, name, packed.address(backward))
        layer.bias_ih, layer.bias_hh = self.at(as_float32(bias_ih)), self.at(as_float32(bias_hh))
        layer.x, layer.h = inputs[index].data_ptr(), h[index].data_ptr()
        layer.c = c[index].data_ptr() if self.lstm else 0
        layer.saved = saved[index].data_ptr() if saved.numel() else 0
        if self.dropout_mask is not None and index + 1 < self.count:
            layer.mask = self.dropout_mask[index].data_ptr()
        return layer

    def pack_query(self, weight: Tensor | None, backward: bool, reuse: bool) -> None:
        if weight is not None:
            packed = packed_weight(weight, torch.float32, "rnn_tanh", 1, False, backward, reuse)
            self.kept.append(packed)
            self.native.query_weight = packed.address(backward)


def _parts(flat: Tensor, steps: int, batch: int, sizes: Sequence[int]) -> list[Tensor]:
    """The inputs of the layers [T, N, size], out of one tensor."""
    parts = flat.split([steps * batch * size for size in sizes])
    return [part.view(steps, batch, size) for part, size in zip(parts, sizes, strict=True)]


def _sizes(x: Tensor, h0: Tensor, context_size: int) -> list[int]:
    """Of what each layer sees at a step."""
    return [x.shape[2] + context_size, *[h0.shape[2]] * (h0.shape[0] - 1)]


def _new_outputs(
    cell: str,
    x: Tensor,
    h0: Tensor,
    context0: Tensor,
    query_weight: Tensor | None,
    keys: Tensor,
    weights_shape: tuple[int, ...],
    save: bool,
    empty: Callable[[tuple[int, ...]], Tensor],
) -> Outputs:
    steps, batch, _ = x.shape
    count, _, hidden = h0.shape
    library: Any = native.load()
    saved = library.saved_sizes(CELL_INDEX[cell], 1, hidden, False, False)[0] if save else 0  # of a row
    return (
        empty((count, steps + 1, batch, hidden)),
        empty((count, steps + 1, batch, hidden) if cell == "lstm" else (0,)),
        empty((steps, batch, context0.shape[1])),
        empty(weights_shape),
        empty((steps, batch, keys.shape[2]) if query_weight is not None else (0,)),
        empty((steps * batch * sum(_sizes(x, h0, context0.shape[1])),)),
        empty((count, steps * batch * saved)),
    )


def forward(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    context0: Tensor,
    query_weight: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None,
    weights: Sequence[Tensor | None],
    factors: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    dropout_mask: Tensor | None,
    scale: float,
    normalize: str,
    save: bool,
) -> Outputs:
    """All states h and c [L, T + 1, N, H], contexts [T, N, Dv], weights [N, T, Tk], and what the backward pass needs
    with `save`: queries, inputs of the layers and saved activations. All in float32."""
    query = keys.new_empty(keys.shape[0], x.shape[1] // keys.shape[0], keys.shape[2])
    arguments = (query, keys, values, v, None, None, factors, lengths, mask, False, scale, normalize)
    loop = Loop(cell, x, h0, keys, Inputs(True, *arguments), dropout_mask)
    steps, batch = loop.steps, loop.batch
    empty = functools.partial(workspace, x)  # The user gets copies.
    outputs = _new_outputs(cell, x, h0, context0, query_weight, keys, loop.weights_shape, save, empty)
    h, c, contexts, weighting, queries, inputs, saved = outputs
    h[:, 0] = h0
    if c0 is not None:
        c[:, 0] = c0
    parts = _parts(inputs, steps, batch, _sizes(x, h0, context0.shape[1]))
    parts[0][..., : loop.fed] = x
    parts[0][0, :, loop.fed :] = context0
    loop.native.layers = [
        loop.layer(index, weights, parts, h, c, saved, False, not save) for index in range(loop.count)
    ]
    loop.pack_query(query_weight, False, not save)
    loop.native.query, loop.native.context = queries.data_ptr(), contexts.data_ptr()
    loop.native.weights = weighting.data_ptr()
    loop.library.decoder_forward(loop.native, torch.get_num_threads())
    weighting = weighting if batch == keys.shape[0] else weighting.transpose(0, 1).contiguous()
    return h, c, contexts, weighting, queries, inputs, saved


def backward(
    dh: Tensor | None,
    dcontexts: Tensor | None,
    dweights: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    cell: str,
    x: Tensor,
    h0: Tensor,
    query_weight: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None,
    weights: Sequence[Tensor | None],
    factors: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    dropout_mask: Tensor | None,
    scale: float,
    normalize: str,
    h: Tensor,
    c: Tensor,
    contexts: Tensor,
    weighting: Tensor,
    queries: Tensor,
    inputs: Tensor,
    saved: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of DecoderCall.inputs in their dtypes; empty where `needs` is False.

    dh [T, N, H]: of the top layer's states; dcontexts, dweights, dh_n, dc_n: of the loop's other results.
    """
    query = keys.new_empty(keys.shape[0], 1, keys.shape[2])
    attention = Inputs(True, query, keys, values, v, None, None, factors, lengths, mask, False, scale, normalize)
    loop = Loop(cell, x, h0, keys, attention, dropout_mask)
    steps, batch, hidden, count = loop.steps, loop.batch, loop.hidden, loop.count
    sizes = _sizes(x, h0, contexts.shape[2])
    parts = _parts(inputs, steps, batch, sizes)
    dinputs = workspace(x, inputs.shape)
    dparts = _parts(dinputs, steps, batch, sizes)
    dstates = workspace(x, (count, steps, batch, hidden))
    dstates[:-1] = 0
    dstates[-1] = 0 if dh is None else dh
    if dh_n is not None:
        dstates[:, -1] += dh_n
    dcells = h.new_empty((count, steps, batch, hidden) if loop.lstm else 0)
    if loop.lstm:
        dcells[:, -1] = 0 if dc_n is None else dc_n
    dcontext = torch.empty_like(contexts)
    dcontext.zero_() if dcontexts is None else dcontext.copy_(dcontexts)
    dweights = as_float32(dweights)
    dquery = h.new_empty(steps, batch, keys.shape[2])
    dh0, dc0 = (h.new_empty(count, batch, hidden) for _ in range(2))
    found: list[Tensor | None] = [None] * len(needs)
    layers = []
    for index in range(count):
        layer = loop.layer(index, weights, parts, h, c, saved, True, False)
        layer.dh, layer.dx, layer.dh0 = (t.data_ptr() for t in (dstates[index], dparts[index], dh0[index]))
        if loop.lstm:
            layer.dc, layer.dc0 = dcells[index].data_ptr(), dc0[index].data_ptr()
        for position, name in enumerate(("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh"), 4 * index):
            at, weight = INPUT_COUNT + position, weights[position]
            if needs[at] and weight is not None:
                gradient = found[at] = h.new_empty(weight.shape)
                setattr(layer, name, gradient.data_ptr())
        layers.append(layer)
    loop.native.layers = layers
    loop.pack_query(query_weight, True, False)
    fields = {"query": queries, "context": contexts, "weights": weighting, "dcontext": dcontext, "dquery": dquery}
    for name, field in fields.items():
        setattr(loop.native, name, field.data_ptr())
    loop.native.dweights = address(dweights)
    parts_of_v = None
    for at, name, tensor in ((5, "dkey", keys), (6, "dvalue", values)):
        if needs[at] and tensor is not None:
            gradient = found[at] = h.new_empty(tensor.shape)
            setattr(loop.native, name, gradient.data_ptr())
            if values is None:
                loop.native.dvalue = gradient.data_ptr()
    if needs[7] and v is not None:
        parts_of_v = h.new_empty(keys.shape[0], *v.shape)
        loop.native.dv = parts_of_v.data_ptr()
    loop.library.decoder_backward(loop.native, torch.get_num_threads())

    found[0] = dparts[0][..., : loop.fed]
    found[1], found[2] = dh0, dc0 if loop.lstm else None
    # A copy, since a single row of dparts would be contiguous: results of an operator must not share memory.
    found[3] = dparts[0][0, :, loop.fed :].clone(memory_format=torch.contiguous_format)
    if needs[4] and query_weight is not None:
        found[4] = outer_product(dquery, h[-1, 1:])
    found[7] = None if parts_of_v is None else parts_of_v.sum(0)
    return [
        h.new_empty(0) if gradient is None or not need else gradient.to(x.dtype).contiguous()
        for gradient, need in zip(found, needs, strict=True)
    ]


def fake_forward(
    cell: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    context0: Tensor,
    query_weight: Tensor | None,
    keys: Tensor,
    *rest: Any,
) -> Outputs:
    """Shapes and dtypes of `forward`, for tracing."""
    shape = (x.shape[1], x.shape[0], keys.shape[1])
    empty = functools.partial(x.new_empty, dtype=torch.float32)
    return _new_outputs(cell, x, h0, context0, query_weight, keys, shape, rest[-1], empty)


def fake_backward(
    dh: Tensor | None,
    dcontexts: Tensor | None,
    dweights: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    cell: str,
    x: Tensor,
    h0: Tensor,
    query_weight: Tensor | None,
    keys: Tensor,
    values: Tensor | None,
    v: Tensor | None,
    weights: Sequence[Tensor | None],
    *rest: Any,
) -> list[Tensor]:
    """Shapes and dtypes of `backward`, for tracing."""
    context0 = x.new_empty(x.shape[1], (keys if values is None else values).shape[2])
    inputs = (x, h0, h0 if cell == "lstm" else None, context0, query_weight, keys, values, v, *weights)
    return [
        x.new_empty(tensor.shape) if need and tensor is not None else x.new_empty(0, dtype=torch.float32)
        for tensor, need in zip(inputs, rest[-1], strict=True)
    ]
