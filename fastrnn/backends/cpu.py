"""The back end `cpu`: launchers of the native kernels in csrc/cpu. They allocate; the kernels only compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastrnn.backends import native
from fastrnn.backends.call import RecurrenceCall, is_plain
from fastrnn.backends.native import CELL_INDEX
from fastrnn.backends.tensors import address, as_float32, like_rows, new_gradients, time_strides, with_unit_stride
from fastrnn.reference import CELLS, keep_scale

_GATES = {cell: CELLS[cell.removesuffix("_reset_before")].gates for cell in CELL_INDEX}

# State and sums are float32 for all of them. Data in bfloat16 have kernels of their own where the CPU multiplies it;
# elsewhere, and for float16, they are converted and computed in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Options of a call that the kernels have.
KERNEL_OPTIONS = frozenset(
    {
        "lengths",
        "resets",
        "zoneout",
        "recurrent_mask",
        "layer_norm",
        "layer_norm_c",
        "peephole",
        "return_cell_states",
        "reset_after=False",
    }
)

# Panels of weights, kept as long as the weight's storage lives: what packed_weight's key says -> PackedWeight. Not by
# tensor: a weak reference to a parameter keeps torch from swapping it (torch.utils.swap_tensors).
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def reasons_against(call: RecurrenceCall) -> list[str]:
    reasons = []
    if native.load() is None:
        reasons.append(f"the compiled extension is not available ({native.load_error()})")
    reasons += call.reasons_against_place("the CPU", call.x.is_cpu, DTYPES)
    reasons += [f"no kernel for {option} yet" for option in call.options() if option not in KERNEL_OPTIONS]
    return reasons + call.reasons_against_kernels()


def workspace(
    like: Tensor, shape: tuple[int, ...], stride: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """An uninitialised tensor for internal use over pooled memory, where fresh pages would cost more than the work."""
    size = math.prod(shape)
    if size < 2**14:  # malloc has no fresh pages for these; the pool would take 2 µs longer, which one step feels.
        if stride is None:
            return like.new_empty(shape, dtype=dtype)
        return like.new_empty_strided(shape, stride, dtype=dtype)
    floats = -(-size * dtype.itemsize // 4)
    flat = torch.frombuffer(native.load().Workspace(floats), dtype=dtype, count=size)  # type: ignore[union-attr]
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:  # type: ignore[attr-defined]
        flat.fill_(math.nan)
    return flat.view(shape) if stride is None else flat.as_strided(shape, stride)


def _has_kernels(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 or (dtype is torch.bfloat16 and native.load().has_bf16())  # type: ignore[union-attr]


def _widened(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def _batch(x: Tensor, batch_sizes: Tensor | None) -> int:
    return x.shape[1] if batch_sizes is None else int(batch_sizes[0])


def _layout(
    cell: str,
    x: Tensor,
    hidden: int,
    outputs: int,
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout: float,
    zoneout_seed: int | None,
    reverse: bool,
) -> Any:
    return native.load().Layout(  # type: ignore[union-attr]
        CELL_INDEX[cell],
        reverse,
        x.shape[0] if batch_sizes is None else batch_sizes.shape[0],
        _batch(x, batch_sizes),
        x.shape[-1],
        hidden,
        outputs,
        *map(address, (lengths, batch_sizes, resets)),
        (0, 0) if resets is None else resets.stride(),
        zoneout,
        zoneout_seed,
        address(recurrent_mask),
        x.dtype is torch.bfloat16,
    )


def packed_weight(
    weight: Tensor, dtype: torch.dtype, cell: str, gates: int, hidden_weight: bool, backward: bool, reuse: bool
) -> Any:
    """The weight in the panels of the kernels for this dtype."""
    storage = weight.untyped_storage()
    per_weight = _packed.get(storage)
    if per_weight is None:
        per_weight = _packed[storage] = {}
    key = (cell, tuple(weight.shape), weight.stride(), weight.storage_offset(), hidden_weight, dtype)
    packed = per_weight.get(key)
    if packed is None:
        library = native.load()
        packed = library.PackedWeight(  # type: ignore[union-attr]
            CELL_INDEX[cell], weight.shape[0] // gates, weight.shape[1], hidden_weight, dtype is torch.bfloat16
        )
        per_weight[key] = packed
    contiguous = weight.contiguous()
    if weight.dtype not in (dtype, torch.float32):
        contiguous = contiguous.float()
    floats = contiguous.dtype is torch.float32
    packed.prepare(contiguous.data_ptr(), floats, backward, reuse and contiguous is weight, torch.get_num_threads())
    return packed


def outer_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b over all leading dimensions, a [.., M] and b [.., N] in float32 on the CPU."""
    a, b = (tensor.reshape(-1, tensor.shape[-1]).contiguous() for tensor in (a, b))
    out = a.new_empty(a.shape[1], b.shape[1])
    native.load().outer_product(  # type: ignore[union-attr]
        a.shape[0], a.data_ptr(), a.shape[1], b.data_ptr(), b.shape[1], out.data_ptr(), torch.get_num_threads()
    )
    return out


def is_step(
    cell: str,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout: float,
) -> bool:
    """Whether the kernels for a single step, which read torch's weight layout, can compute the call."""
    plain = lengths is None and batch_sizes is None and recurrent_mask is None and zoneout == 0
    plain = plain and cell != "gru_reset_before" and x.dtype is torch.float32 and _are_none(parameters)
    return plain and x.shape[0] == 1


def _are_none(parameters: Sequence[Tensor | None]) -> bool:
    return all(parameter is None for parameter in parameters)


def _has_norms(parameters: Sequence[Tensor | None]) -> bool:
    return not _are_none(parameters[:6])


def _reset_state(state: Tensor | None, resets: Tensor | None) -> Tensor | None:
    return state if state is None or resets is None else torch.where(resets[0, :, None], 0, state)


def launch_step(
    cell: str,
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    saved: Tensor | None,
) -> None:
    """One step, x [1, B, I], into h, c (LSTM) and, where it has elements, saved."""
    x = with_unit_stride(x)
    inputs = [None if t is None else t.contiguous() for t in (weight_ih, weight_hh, bias_ih, bias_hh, h0, c0)]
    native.load().step(  # type: ignore[union-attr]
        CELL_INDEX[cell],
        x.shape[1],
        x.shape[2],
        weight_hh.shape[1],
        x.data_ptr(),
        x.stride(1),
        *map(address, inputs),
        h.data_ptr(),
        address(c),
        address(saved),
        torch.get_num_threads(),
    )


def forward(
    cell: str,
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout: float,
    zoneout_seed: int | None,
    reverse: bool,
    save: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n, and what the backward pass needs with `save` (else empty): saved activations and every c_t.

    Every c_t also comes with `cell_states`, then as a tensor that may be handed to the user. These two are float32
    whatever the dtype of x, which may differ from that of the weights. `parameters`: RecurrenceCall.inputs from the
    eighth on.
    """
    if not _has_kernels(x.dtype):
        inputs = _widened((x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0))
        ends = _widened((lengths, batch_sizes, resets, recurrent_mask))
        arguments = [cell, *inputs, parameters, *ends, zoneout, zoneout_seed, reverse, save, cell_states]
        y, h_n, c_n, saved, c_all = forward(*arguments)
        return y.to(x.dtype), h_n.to(x.dtype), c_n.to(x.dtype), saved, c_all
    library: Any = native.load()
    gates = _GATES[cell]
    hidden, outputs = weight_hh.shape[0] // gates, weight_hh.shape[1]
    x = with_unit_stride(x)
    lstm = cell == "lstm"
    batch = _batch(x, batch_sizes)
    rows = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    expected = zoneout > 0 and zoneout_seed is None
    y = like_rows(x, outputs)
    h_n = x.new_empty(batch, outputs, dtype=torch.float32)
    c_n = x.new_empty((batch, hidden) if lstm else 0, dtype=torch.float32)
    *others, weight_hr = parameters
    others = [as_float32(parameter) for parameter in others]
    sizes = library.saved_sizes(CELL_INDEX[cell], rows, hidden, expected, _has_norms(parameters))
    saved = workspace(x, (sum(sizes) if save else 0,))
    if lstm and cell_states:
        c_all = like_rows(x, hidden, torch.float32)
    elif lstm and save:
        c_all = workspace(x, (*y.shape[:-1], hidden), y.stride() if weight_hr is None else None)
    else:
        c_all = x.new_empty(0, dtype=torch.float32)
    if batch == 0:
        return y, h_n.to(x.dtype), c_n.to(x.dtype), saved, c_all
    # Without gradients the weights usually stand still, so that a checksum is worth its time; training changes them, if
    # not from step to step.
    reuse = not save or x.shape[0] == 1
    bias_ih, bias_hh, h0, c0, recurrent_mask = map(as_float32, (bias_ih, bias_hh, h0, c0, recurrent_mask))
    threads = torch.get_num_threads()

    if is_step(cell, x, parameters, lengths, batch_sizes, recurrent_mask, zoneout):
        h0, c0 = _reset_state(h0, resets), _reset_state(c0, resets)
        launch_step(cell, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, h_n, c_n, saved)
        y.copy_(h_n[None])
        if c_all.numel():
            c_all.copy_(c_n[None])
        return y, h_n, c_n, saved, c_all

    options = (lengths, batch_sizes, resets, recurrent_mask, zoneout, zoneout_seed, reverse)
    library.forward(
        _layout(cell, x, hidden, outputs, *options),
        x.data_ptr(),
        time_strides(x),
        None if weight_ih is None else packed_weight(weight_ih, x.dtype, cell, gates, False, False, reuse),
        packed_weight(weight_hh, x.dtype, cell, gates, True, False, reuse),
        None if weight_hr is None else packed_weight(weight_hr, x.dtype, "rnn_tanh", 1, False, False, reuse),
        *map(address, (bias_ih, bias_hh, h0, c0, y)),
        time_strides(y),
        h_n.data_ptr(),
        address(c_n) if lstm else 0,
        address(saved) if save and sizes[0] else 0,
        address(c_all) if c_all.numel() else 0,
        time_strides(c_all) if c_all.numel() else (0, 0),
        [*map(address, others)],
        saved.data_ptr() + 4 * sizes[0] if save and sizes[1] else 0,
        threads,
    )
    return y, h_n.to(x.dtype), c_n.to(x.dtype), saved, c_all


def backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout: float,
    zoneout_seed: int | None,
    reverse: bool,
    y: Tensor,
    saved: Tensor,
    c_all: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of RecurrenceCall.inputs; empty where `needs` is False.

    Those of weights and biases have the dtype of weight_hh, the others that of x.
    """
    if not _has_kernels(x.dtype):
        inputs = _widened((dy, dh_n, dc_n, dc_all, x, weight_ih, weight_hh, h0, c0))
        ends = _widened((lengths, batch_sizes, resets, recurrent_mask))
        arguments = [cell, *inputs, parameters, *ends, zoneout, zoneout_seed, reverse, y.float(), saved, c_all, needs]
        return _narrowed(backward(*arguments), x.dtype, weight_hh.dtype)
    library: Any = native.load()
    gates = _GATES[cell]
    hidden, outputs = weight_hh.shape[0] // gates, weight_hh.shape[1]
    lstm = cell == "lstm"
    x = with_unit_stride(x)
    batch = _batch(x, batch_sizes)
    *others, weight_hr = parameters
    others = [as_float32(parameter) for parameter in others]
    gradients = new_gradients(x, weight_hh, hidden, batch, needs, torch.float32, torch.float32)
    if batch == 0:
        zeros = tuple(x.new_empty(0) if gradient is None else gradient.zero_() for gradient in gradients)
        return _narrowed(zeros, x.dtype, weight_hh.dtype)
    dy, dc_all = (None if t is None else with_unit_stride(t) for t in (dy, dc_all))
    dc_all = None if dc_all is None else dc_all.float()
    dh_n, dc_n, h0, c0, recurrent_mask = map(as_float32, (dh_n, dc_n, h0, c0, recurrent_mask))
    dx, dh0, dc0 = gradients[0], gradients[5], gradients[6]
    threads = torch.get_num_threads()

    if is_step(cell, x, parameters, lengths, batch_sizes, recurrent_mask, zoneout):
        dh, dc = _of_one_step(dy, dh_n), _of_one_step(dc_all, dc_n)
        h0, c0 = _reset_state(h0, resets), _reset_state(c0, resets)
        weights = (None if weight_ih is None else weight_ih.contiguous(), weight_hh.contiguous())
        library.step_backward(
            CELL_INDEX[cell],
            batch,
            x.shape[-1],
            hidden,
            address(dh),
            address(dc) if lstm else 0,
            x.data_ptr(),
            x.stride(1),
            *map(address, (*weights, h0, c0)),
            y.data_ptr(),
            address(c_all) if lstm else 0,
            saved.data_ptr(),
            *map(address, gradients[:7]),
            threads,
        )
        for gradient in (dh0, dc0):
            if gradient is not None and resets is not None:
                gradient.masked_fill_(resets[0, :, None], 0)
    else:
        project = weight_ih is not None and dx is not None
        reuse = x.shape[0] == 1
        expected = zoneout > 0 and zoneout_seed is None
        sizes = library.saved_sizes(CELL_INDEX[cell], math.prod(x.shape[:-1]), hidden, expected, _has_norms(parameters))
        options = (lengths, batch_sizes, resets, recurrent_mask, zoneout, zoneout_seed, reverse)
        library.backward(
            _layout(cell, x, hidden, outputs, *options),
            address(dy),
            (0, 0) if dy is None else time_strides(dy),
            address(dh_n),
            address(dc_n) if lstm else 0,
            address(dc_all),
            (0, 0) if dc_all is None else time_strides(dc_all),
            x.data_ptr(),
            time_strides(x),
            packed_weight(weight_ih, x.dtype, cell, gates, False, True, reuse) if project else None,  # type: ignore[arg-type]
            packed_weight(weight_hh, x.dtype, cell, gates, True, True, reuse),
            None if weight_hr is None else packed_weight(weight_hr, x.dtype, "rnn_tanh", 1, False, True, reuse),
            address(h0),
            address(c0) if lstm else 0,
            y.data_ptr(),
            time_strides(y),
            address(saved) if sizes[0] else 0,
            address(c_all) if lstm else 0,
            time_strides(c_all) if lstm else (0, 0),
            address(dx),
            (0, 0) if dx is None else time_strides(dx),
            *map(address, (*gradients[1:3], gradients[14], *gradients[3:7])),
            [*map(address, others)],
            saved.data_ptr() + 4 * sizes[0] if sizes[1] else 0,
            [*map(address, gradients[7:14])],
            threads,
        )
    found = tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return _narrowed(found, x.dtype, weight_hh.dtype)


def _narrowed(gradients: tuple[Tensor, ...], data: torch.dtype, weight: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of RecurrenceCall.inputs in the dtypes of x (for x, h0, c0) and of the weights."""
    if data is torch.float32 and weight is torch.float32:
        return gradients
    return tuple(gradient.to(data if index in (0, 5, 6) else weight) for index, gradient in enumerate(gradients))


def _of_one_step(sequence: Tensor | None, final: Tensor | None) -> Tensor | None:
    """The gradient of a state that a single step gives out twice: in the sequence [1, B, H] and as [B, H]."""
    if sequence is None or final is None:
        return final if sequence is None else sequence[0].contiguous()
    return sequence[0] + final


def fake_forward(
    cell: str,
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout: float,
    zoneout_seed: int | None,
    reverse: bool,
    save: bool,
    cell_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes, strides and dtypes of `forward`, for tracing."""
    lstm = cell == "lstm"
    hidden, outputs = weight_hh.shape[0] // _GATES[cell], weight_hh.shape[1]
    x = with_unit_stride(x)
    batch: Any
    if batch_sizes is None:
        batch, rows = x.shape[1], x.shape[0] * x.shape[1]
    else:
        batch = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[0]
        rows = x.shape[0]
    expected = zoneout > 0 and zoneout_seed is None
    sizes = native.load().saved_sizes(CELL_INDEX[cell], 1, hidden, expected, _has_norms(parameters))  # type: ignore[union-attr]
    if lstm and (cell_states or (save and parameters[7] is None)):
        c_all = like_rows(x, hidden, torch.float32)
    else:
        c_all = x.new_empty((*x.shape[:-1], hidden) if lstm and save else 0, dtype=torch.float32)
    return (
        like_rows(x, outputs),
        x.new_empty(batch, outputs),
        x.new_empty((batch, hidden) if lstm else 0),
        x.new_empty(rows * sum(sizes) if save else 0, dtype=torch.float32),
        c_all,
    )


def fake_backward(
    cell: str,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc_all: Tensor | None,
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Sequence[Tensor | None],
    lengths: Tensor | None,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    recurrent_mask: Tensor | None,
    zoneout: float,
    zoneout_seed: int | None,
    reverse: bool,
    y: Tensor,
    saved: Tensor,
    c_all: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Shapes, strides and dtypes of `backward`, for tracing."""
    x = with_unit_stride(x)
    state = h0 if h0 is not None else c0
    batch = 0 if state is None else state.shape[0]  # only the states' gradients have this size
    hidden = weight_hh.shape[0] // _GATES[cell]
    gradients = new_gradients(x, weight_hh, hidden, batch, needs, weight_hh.dtype, x.dtype)
    found = tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return _narrowed(found, x.dtype, weight_hh.dtype)


def has_dropout(x: Tensor) -> bool:
    """Whether `dropout` takes x."""
    plain = x.layout is torch.strided and is_plain(type(x))
    return native.load() is not None and x.is_cpu and plain and x.numel() > 0


def dropout(x: Tensor, probability: float, seed: int) -> Tensor:
    """The operator's result for x [R, C]. The kernel computes in fp32; with other dtypes it draws the mask."""
    scale = keep_scale(probability)
    if x.dtype is torch.float32:
        return _dropout(with_unit_stride(x), probability, scale, seed)
    ones = x.new_ones(x.shape[1], dtype=torch.float32).expand(x.shape)
    return (x * _dropout(ones, probability, 1.0, seed).to(x.dtype) * scale).contiguous()


def _dropout(x: Tensor, probability: float, scale: float, seed: int) -> Tensor:
    out = x.new_empty(x.shape)
    native.load().dropout(  # type: ignore[union-attr]
        x.data_ptr(), x.stride(0), *x.shape, probability, scale, seed, out.data_ptr(), torch.get_num_threads()
    )
    return out
