"""The operator `recurrence`: one direction of one recurrent layer over time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import Norm, RecurrenceCall, aten, cpu, cuda, gpu, reference
from fastrnn.backends.call import wants_gradients
from fastrnn.ops.shared import differentiable_gradients, key_of, remember, use_registered_op
from fastrnn.reference import CELLS

Result = tuple[Tensor, Tensor, Tensor | None]


def recurrence(
    cell: str,
    gates_x: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout: float = 0.0,
    zoneout_seed: int | None = None,
    recurrent_mask: Tensor | None = None,
    layer_norm_hh: Norm | None = None,
    layer_norm_c: Norm | None = None,
    peephole: Tensor | None = None,
    reset_after: bool = True,
    weight_hr: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Result:
    """The loop over time, from the input's pre-activations.

    T steps, B sequences, H units, G gates (RNN 1, GRU 3: r z n, LSTM 4: i f g o), P = H, or the projected size.

    Args:
        cell: ``"rnn_tanh"``, ``"rnn_relu"``, ``"lstm"`` or ``"gru"``.
        gates_x: [T, B, G*H], W_ih x + b_ih for all steps.
        weight_hh, bias_hh: ``[G*H, P]`` and ``[G*H]``.
        h0, c0: [B, P] and [B, H] (LSTM); zero by default.
        lengths: [B] integers in 0..T. Steps t >= lengths[b] leave the state of sequence b alone and output zeros.
        resets: [T, B] bool. Where true, the state before step t is zero, and no gradient passes.
        zoneout: probability with which each unit keeps its previous h (and c) (Krueger et al. 2016, arXiv 1606.01305).
        zoneout_seed: seed of the random masks; None takes the expectation, as in evaluation.
        recurrent_mask: [B, P], multiplies h_{t-1} where it meets weight_hh (Gal and Ghahramani, arXiv 1512.05287).
        layer_norm_hh: weight and bias [G*H] of the layer norm of W_hh h (Ba et al. 2016, arXiv 1607.06450).
        layer_norm_c: weight and bias [H] of the layer norm of c_t before its tanh (LSTM).
        peephole: [3*H], for the LSTM: p_i * c_{t-1}, p_f * c_{t-1} and p_o * c_t are added to the pre-activations of
            the gates i, f and o, c_t as it is before zoneout and layer norm (Gers et al. 2002, JMLR 3).
        reset_after: for the GRU. True: n = tanh(x_n + r * (W_hn h + b_hn)), as torch; False:
            n = tanh(x_n + W_hn (r * h) + b_hn) (Cho et al. 2014, arXiv 1406.1078).
        weight_hr: [P, H], projects h (LSTM only; Sak et al. 2014, arXiv 1402.1128).
        reverse: run from the last step to the first.
        backend: ``"auto"`` or the name of a back end.

    Returns:
        y [T, B, P], h_n [B, P], c_n [B, H] (None but for the LSTM). Differentiable in every floating input.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came, before anything is computed.
        NotImplementedError: ``backend`` cannot compute this call; with all reasons.
    """
    call = RecurrenceCall(
        cell,
        gates_x,
        None,
        weight_hh,
        None,
        bias_hh,
        h0,
        c0,
        weight_hr,
        lengths=lengths,
        resets=resets,
        zoneout=zoneout,
        zoneout_seed=zoneout_seed,
        recurrent_mask=recurrent_mask,
        layer_norm_hh=layer_norm_hh,
        layer_norm_c=layer_norm_c,
        peephole=peephole,
        reset_after=reset_after,
        reverse=reverse,
    )
    return run_on(call, decide(call, backend))[:3]


def recurrent_layer(
    cell: str,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    weight_hr: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout: float = 0.0,
    zoneout_seed: int | None = None,
    recurrent_mask: Tensor | None = None,
    layer_norm_ih: Norm | None = None,
    layer_norm_hh: Norm | None = None,
    layer_norm_c: Norm | None = None,
    peephole: Tensor | None = None,
    reset_after: bool = True,
    reverse: bool = False,
    backend: str = "auto",
) -> Result:
    """The input projection and the loop over time in one call, which lets a back end fuse the two.

    As :func:`recurrence`, but for

    Args:
        x: [T, B, I], or [N, I] with ``batch_sizes``.
        weight_ih, bias_ih: ``[G*H, I]`` and ``[G*H]``.
        batch_sizes: [T] int64 on the CPU, as in a ``PackedSequence``: x, h0, c0 and all results hold their sequences
            longest first, and steps past a sequence's end do not exist.
        layer_norm_ih: weight and bias [G*H] of the layer norm of W_ih x.
    """
    call = RecurrenceCall(
        cell,
        x,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        h0,
        c0,
        weight_hr,
        lengths,
        batch_sizes,
        resets,
        zoneout,
        zoneout_seed,
        recurrent_mask,
        layer_norm_ih,
        layer_norm_hh,
        layer_norm_c,
        peephole,
        reset_after,
        reverse,
    )
    return run_on(call, decide(call, backend))[:3]


def check(call: RecurrenceCall) -> RecurrenceCall:
    """The call itself, once its arguments are known to fit together."""
    if call.cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, CELLS))}, got {call.cell!r}")
    tensors = call.tensors()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    name = "gates_x" if call.weight_ih is None else "x"
    x, weight_ih, weight_hh, cell = call.x, call.weight_ih, call.weight_hh, CELLS[call.cell]
    packed = call.batch_sizes is not None
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
    if x.dim() != (2 if packed else 3):
        raise ValueError(f"{name} must have {2 if packed else 3} dimensions, got shape {tuple(x.shape)}")
    if weight_hh.dim() != 2 or weight_hh.shape[0] % cell.gates:
        raise ValueError(
            f"weight_hh must have shape ({cell.gates} * hidden_size, hidden_size), got {tuple(weight_hh.shape)}"
        )
    rows = weight_hh.shape[0]
    hidden = rows // cell.gates
    projected = hidden if call.weight_hr is None else call.weight_hr.shape[0]
    if call.weight_hr is not None and call.cell != "lstm":
        raise ValueError(f"weight_hr is for the cell 'lstm', got cell {call.cell!r}")
    if call.c0 is not None and not cell.has_cell_state:
        raise ValueError(f"c0 is for the cell 'lstm', got cell {call.cell!r}")
    if packed:
        batch = _check_batch_sizes(call)
    else:
        batch = x.shape[1]

    expected = {
        "x": (*x.shape[:-1], rows if weight_ih is None else x.shape[-1]),
        "weight_ih": (rows, x.shape[-1]),
        "weight_hh": (rows, projected),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "h0": (batch, projected),
        "c0": (batch, hidden),
        "weight_hr": (projected, hidden),
        "recurrent_mask": (batch, projected),
        "peephole": (3 * hidden,),
    }
    device, dtype = x.device, x.dtype
    for argument, tensor in tensors.items():
        shape = expected.get(argument) or ((hidden,) if argument.startswith("layer_norm_c") else (rows,))
        argument = name if tensor is x else argument
        if tensor.shape != shape:
            raise ValueError(f"{argument} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{argument} must be on the device of {name}, {device}, got {tensor.device}")
        if tensor.dtype is not dtype and not torch.is_autocast_enabled(device.type):
            raise ValueError(f"{argument} must have the dtype of {name}, {dtype}, got {tensor.dtype}")
    _check_options(call, batch)
    return call


def _check_batch_sizes(call: RecurrenceCall) -> int:
    sizes = call.batch_sizes
    assert sizes is not None
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu" or not len(sizes):
        raise ValueError(
            "batch_sizes must be a non-empty 1-D int64 tensor on the CPU, got shape "
            f"{tuple(sizes.shape)} {sizes.dtype} on {sizes.device}"
        )
    if call.lengths is not None:
        raise ValueError("lengths cannot be combined with batch_sizes, which already say where sequences end")
    if torch.compiler.is_compiling():
        return call.h0.shape[0] if call.h0 is not None else int(sizes[0])
    listed = sizes.tolist()
    if listed[-1] <= 0 or any(a < b for a, b in itertools.pairwise(listed)) or sum(listed) != len(call.x):
        raise ValueError(
            "batch_sizes must be positive, must not increase and must add up to the rows of x "
            f"({len(call.x)}), got {listed if len(listed) <= 8 else str(listed[:8])[:-1] + ', ...]'}"
        )
    return int(listed[0])


def _check_options(call: RecurrenceCall, batch: int) -> None:
    if not 0 <= call.zoneout <= 1:
        raise ValueError(f"zoneout must be a probability in [0, 1], got {call.zoneout}")
    if not call.reset_after and call.cell != "gru":
        raise ValueError(f"reset_after=False is for the cell 'gru', got cell {call.cell!r}")
    if call.layer_norm_c is not None and call.cell != "lstm":
        raise ValueError(f"layer_norm_c is for the cell 'lstm', got cell {call.cell!r}")
    if call.peephole is not None and call.cell != "lstm":
        raise ValueError(f"peephole is for the cell 'lstm', got cell {call.cell!r}")
    lengths, resets = call.lengths, call.resets
    for name, given in (("lengths", lengths), ("resets", resets)):
        if not (given is None or isinstance(given, Tensor)):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    if lengths is not None:
        if lengths.dtype not in (torch.int64, torch.int32) or tuple(lengths.shape) != (batch,):
            raise ValueError(
                f"lengths must be int64 or int32 of shape {(batch,)}, got {lengths.dtype} {tuple(lengths.shape)}"
            )
        # Values are looked at on the CPU only: on a GPU that would stop the host, so the kernels clamp them there.
        if lengths.device.type == "cpu" and batch and not use_registered_op() and not backends.transforming():
            low, high = (int(bound) for bound in lengths.aminmax())
            if low < 0 or high > call.x.shape[0]:
                raise ValueError(f"lengths must lie in 0..{call.x.shape[0]}, got values in {low}..{high}")
    if resets is not None:
        steps = len(call.batch_sizes) if call.batch_sizes is not None else call.x.shape[0]
        if resets.dtype != torch.bool or tuple(resets.shape) != (steps, batch):
            raise ValueError(f"resets must be bool of shape {(steps, batch)}, got {resets.dtype} {tuple(resets.shape)}")
        if resets.device != call.x.device:
            raise ValueError(f"resets must be on {call.x.device}, got {resets.device}")


_decided: dict[tuple[Any, ...], str] = {}


def decide(call: RecurrenceCall, backend: str) -> str:
    """`check` and `backends.choose`, remembered for plain calls: they took 12 of the 24 us of a small step."""
    key = _key(call, backend)
    call.remembered = key is not None
    picked = None if key is None else _decided.get(key)
    if picked is None:
        picked = backends.choose(check(call), backend)
        remember(_decided, key, picked)
    return picked


def _key(call: RecurrenceCall, backend: str) -> tuple[Any, ...] | None:
    """All that `check` and `choose` look at, or None where that is more than shapes and types."""
    if call.weight_hr is not None or call.batch_sizes is not None or not call.is_plain():
        return None
    return key_of(_plain_inputs(call), [call.cell, backend])


def run_step(call: RecurrenceCall, picked: str) -> tuple[Tensor, Tensor | None]:
    """As `run_on` for a single step, T = 1: h_n and c_n."""
    return _bare_step(call) if picked == "cpu" and _is_bare_step(call) else _run(call, picked)[1:3]


def _is_bare_step(call: RecurrenceCall) -> bool:
    """Whether a call is a single step with neither options nor gradients. Those that are remembered have no options."""
    return (
        call.remembered
        and call.x.shape[0] == 1
        and call.x.dtype is torch.float32
        and not wants_gradients(_plain_inputs(call))
    )


def _bare_step(call: RecurrenceCall) -> tuple[Tensor, Tensor | None]:
    """Straight to the kernel: `_run` takes 12 us more, a third of a small layer's step."""
    h = call.x.new_empty(call.x.shape[1], call.weight_hh.shape[1])
    c = torch.empty_like(h) if call.cell == "lstm" else None
    cpu.launch_step(call.cell, *_plain_inputs(call), h, c, None)
    return h, c


def _plain_inputs(
    call: RecurrenceCall,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return call.x, call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh, call.h0, call.c0


BackendResult = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def run_on(call: RecurrenceCall, picked: str) -> BackendResult:
    """A checked call on the back end that `backends.choose` has picked: y, h_n, c_n, every c_t (where asked for)."""
    if picked == "cpu" and _is_bare_step(call):
        h, c = _bare_step(call)
        return h.unsqueeze(0).clone(), h, c, None
    return _run(call, picked)


def _run(call: RecurrenceCall, picked: str) -> BackendResult:
    """`run_on` for calls that are no bare steps."""
    if picked == "aten":
        return aten.run(call)
    if picked == "reference":
        return reference.run(call)
    cell, inputs, options = _prepare(call, picked)
    if wants_gradients(inputs):
        y, h_n, c_n, c_all = _Recurrence.apply(picked, cell, call.return_cell_states, *inputs, *options)
    else:
        arguments = _forward_arguments(cell, inputs, options, False, call.return_cell_states)
        y, h_n, c_n, _, c_all = _forward(picked, *arguments)
    return _finish(call, y, h_n, c_n, c_all)


def _prepare(call: RecurrenceCall, picked: str) -> tuple[str, tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The cell, inputs and options of a call as the launchers take them."""
    lengths = call.lengths
    if lengths is not None:
        # On a GPU they stay there, or go there, without the host waiting for it.
        where = "cpu" if picked == "cpu" else call.x.device
        lengths = lengths.to(where, torch.int64, non_blocking=picked != "cpu").contiguous()
    batch_sizes = None if call.batch_sizes is None else call.batch_sizes.contiguous()
    inputs = call.inputs()
    device = call.x.device.type
    if torch.is_autocast_enabled(device):
        inputs = _autocast(inputs, torch.get_autocast_dtype(device))
    options = (
        lengths,
        batch_sizes,
        call.resets,
        call.recurrent_mask,
        call.zoneout,
        call.zoneout_seed,
        call.reverse,
    )
    return call.cell if call.reset_after else "gru_reset_before", inputs, options


def _finish(call: RecurrenceCall, y: Tensor, h_n: Tensor, c_n: Tensor, c_all: Tensor) -> BackendResult:
    lstm = call.cell == "lstm"
    cell_states = c_all.to(y.dtype) if lstm and call.return_cell_states else None
    if call.cell == "gru" and y.dtype != call.x.dtype:
        # Under autocast torch.nn's GRU gives out the dtype of its state, its RNN and LSTM that of the products.
        state = call.x if call.h0 is None else call.h0
        y, h_n = y.to(state.dtype), h_n.to(state.dtype)
    return y, h_n, c_n if lstm else None, cell_states


def run_together(calls: Sequence[RecurrenceCall], picked: Sequence[str]) -> list[BackendResult]:
    """`run_on` for the directions of a layer; at the same time where the back end can."""
    together = len(calls) == 2 and all(name == "cuda" for name in picked) and not use_registered_op()
    if not together or not _are_alike(*calls) or not cuda.fits(calls[0], 2):
        return [run_on(call, name) for call, name in zip(calls, picked)]
    prepared = [_prepare(call, "cuda") for call in calls]
    cell, cell_states = prepared[0][0], calls[0].return_cell_states
    if any(wants_gradients(inputs) for _, inputs, _ in prepared):
        arguments = [argument for _, inputs, options in prepared for argument in (*inputs, *options)]
        outputs = _Directions.apply(cell, cell_states, *arguments)
        results = [outputs[:4], outputs[4:]]
    else:
        arguments = [_forward_arguments(*each, False, cell_states) for each in prepared]
        results = [(y, h_n, c_n, c_all) for y, h_n, c_n, _, c_all in gpu.forwards("cuda", arguments)]
    return [_finish(call, *result) for call, result in zip(calls, results)]


def _are_alike(first: RecurrenceCall, second: RecurrenceCall) -> bool:
    """Whether two calls of one layer differ in their direction and in the values of tensors alone."""
    inputs = first.inputs(), second.inputs()
    return all((a is None) == (b is None) and (a is None or b is None or a.shape == b.shape) for a, b in zip(*inputs))


def _autocast(inputs: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """x, h0 and c0 in autocast's dtype. The weights stay as they are: the kernels round them when packing."""
    x, *weights, h0, c0 = inputs[:7]
    x, h0, c0 = (None if tensor is None else tensor.to(dtype) for tensor in (x, h0, c0))
    return (x, *weights, h0, c0, *inputs[7:])


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.fastrnn.recurrence_forward(*args) if use_registered_op() else _launch_forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.fastrnn.recurrence_backward(*args) if use_registered_op() else _launch_backward(*args)


# The first argument is the back end's name: cpu's launchers are its own, those of gpu serve several.


def _launch_forward(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.forward(*args) if backend == "cpu" else gpu.forward(backend, *args)


def _launch_backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    return cpu.backward(*args) if backend == "cpu" else gpu.backward(backend, *args)


def _fake_forward(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.fake_forward(*args) if backend == "cpu" else gpu.fake_forward(backend, *args)


def _fake_backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    return cpu.fake_backward(*args) if backend == "cpu" else gpu.fake_backward(backend, *args)


_INPUT_COUNT = 15  # of RecurrenceCall.inputs


def _forward_arguments(
    cell: str, inputs: Sequence[Tensor | None], options: Sequence[Any], save: bool, cell_states: bool
) -> tuple[Any, ...]:
    """Of the launchers, from RecurrenceCall.inputs."""
    return (cell, *inputs[:7], inputs[7:], *options, save, cell_states)


def _backward_arguments(
    cell: str,
    gradients: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],  # inputs and options
    scalars: Sequence[Any],
    kept: Sequence[Tensor],  # y, saved, c_all
    needs: Sequence[bool],
) -> tuple[Any, ...]:
    x, weight_ih, weight_hh, _, _, h0, c0 = tensors[:7]
    inputs = (x, weight_ih, weight_hh, h0, c0, tensors[7:_INPUT_COUNT], *tensors[_INPUT_COUNT:])
    return (cell, *gradients, *inputs, *scalars, *kept, list(needs))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, cell: str, cell_states: bool, *arguments: Any) -> tuple[Tensor | None, ...]:
        inputs, options = arguments[:_INPUT_COUNT], arguments[_INPUT_COUNT:]
        arguments = _forward_arguments(cell, inputs, options, True, cell_states)
        y, h_n, c_n, saved, c_all = _forward(backend, *arguments)
        ctx.backend, ctx.cell, ctx.scalars = backend, cell, options[4:]
        # A copy of y, so that the caller may work on y in place as with torch.nn (0.2 % of a training step).
        pooled = backend == "cpu" and not use_registered_op()
        kept = cpu.workspace(y, y.shape, y.stride(), y.dtype).copy_(y) if pooled else y.clone()
        ctx.save_for_backward(*inputs, *options[:4], kept, saved, c_all)
        ctx.set_materialize_grads(False)
        if cell != "lstm":
            ctx.mark_non_differentiable(c_n)
        return y, h_n, c_n, c_all if cell_states and cell == "lstm" else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        *tensors, y, saved, c_all = ctx.saved_tensors
        needs = ctx.needs_input_grad[3 : 3 + _INPUT_COUNT]
        if ctx.cell != "lstm":
            gradients = (*gradients[:2], None, None)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = _differentiable_gradients(ctx.cell, tensors, ctx.scalars, gradients, needs)
        else:
            kept = (y, saved, c_all)
            all_found = _backward(
                ctx.backend, *_backward_arguments(ctx.cell, gradients, tensors, ctx.scalars, kept, needs)
            )
            found = [gradient if need else None for gradient, need in zip(all_found, needs, strict=True)]
        return None, None, None, *found, *[None] * 7


class _Directions(torch.autograd.Function):
    """As _Recurrence on the back end cuda, for both directions of a layer at once."""

    @staticmethod
    def forward(ctx: Any, cell: str, cell_states: bool, *arguments: Any) -> tuple[Tensor | None, ...]:
        half = len(arguments) // 2
        calls: list[tuple[Any, ...]] = []
        kept: list[Tensor | None] = []
        scalars = []
        for call in (arguments[:half], arguments[half:]):
            inputs, options = call[:_INPUT_COUNT], call[_INPUT_COUNT:]
            calls.append(_forward_arguments(cell, inputs, options, True, cell_states))
            kept += inputs + options[:4]
            scalars.append(options[4:])
        results: list[Tensor | None] = []
        for y, h_n, c_n, saved, c_all in gpu.forwards("cuda", calls):
            results += y, h_n, c_n, c_all if cell_states and cell == "lstm" else None
            kept += y.clone(), saved, c_all
            if cell != "lstm":
                ctx.mark_non_differentiable(c_n)
        ctx.cell, ctx.scalars, ctx.given = cell, scalars, half - 3
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        kept = ctx.saved_tensors
        results: list[Any] = [None, None]
        calls, all_needs = [], []
        for direction in range(2):
            given = list(gradients[4 * direction :][:4])
            if ctx.cell != "lstm":
                given[2:] = None, None
            tensors = list(kept[direction * ctx.given :][: ctx.given])
            outputs = kept[2 * ctx.given + 3 * direction :][:3]
            needs = ctx.needs_input_grad[2 + direction * (ctx.given + 3) :][:_INPUT_COUNT]
            all_needs.append(needs)
            if torch.is_grad_enabled():
                results += _differentiable_gradients(ctx.cell, tensors, ctx.scalars[direction], tuple(given), needs)
                results += [None] * 7
                continue
            calls.append(_backward_arguments(ctx.cell, given, tensors, ctx.scalars[direction], outputs, needs))
        if calls:
            for found, needs in zip(gpu.backwards("cuda", calls), all_needs):
                results += [gradient if need else None for gradient, need in zip(found, needs, strict=True)]
                results += [None] * 7
        return tuple(results)


def _differentiable_gradients(
    cell: str,
    tensors: list[Tensor | None],
    scalars: tuple[Any, ...],
    gradients: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    *inputs, lengths, batch_sizes, resets, recurrent_mask = tensors
    zoneout, zoneout_seed, reverse = scalars

    def run(inputs: list[Any]) -> BackendResult:
        dtype = inputs[0].dtype  # under autocast the weights' is another
        same = [None if tensor is None else tensor.to(dtype) for tensor in inputs]
        call = RecurrenceCall(
            cell.removesuffix("_reset_before"),
            *cast("tuple[Any, Any, Any, Any, Any, Any, Any]", same[:7]),
            layer_norm_ih=_norm(same[7:9]),
            layer_norm_hh=_norm(same[9:11]),
            layer_norm_c=_norm(same[11:13]),
            peephole=same[13],
            weight_hr=same[14],
            reset_after=not cell.endswith("_reset_before"),
            lengths=lengths,
            batch_sizes=batch_sizes,
            resets=resets,
            recurrent_mask=recurrent_mask,
            zoneout=zoneout,
            zoneout_seed=zoneout_seed,
            reverse=reverse,
        )
        return reference.run(call)

    return differentiable_gradients(run, inputs, gradients, needs)


def _norm(parameters: Sequence[Tensor | None]) -> Norm | None:
    weight, bias = parameters
    return None if weight is None or bias is None else (weight, bias)


_INPUTS = (
    "Tensor x, Tensor? weight_ih, Tensor weight_hh, {}Tensor? h0, Tensor? c0, Tensor?[] parameters, "
    "Tensor? lengths, Tensor? batch_sizes, Tensor? resets, Tensor? recurrent_mask, "
    "float zoneout, SymInt? zoneout_seed, bool reverse, "
)
torch.library.define(
    "fastrnn::recurrence_forward",
    "(str backend, str cell, "
    + _INPUTS.format("Tensor? bias_ih, Tensor? bias_hh, ")
    + "bool save, bool cell_states) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastrnn::recurrence_backward",
    "(str backend, str cell, Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc_all, "
    + _INPUTS.format("")
    + "Tensor y, Tensor saved, Tensor c_all, bool[] needs) -> ("
    + ", ".join(["Tensor"] * _INPUT_COUNT)
    + ")",
)
for _device in ("CPU", "CUDA"):
    torch.library.impl("fastrnn::recurrence_forward", _device, _launch_forward)
    torch.library.impl("fastrnn::recurrence_backward", _device, _launch_backward)
torch.library.register_fake("fastrnn::recurrence_forward", _fake_forward)
torch.library.register_fake("fastrnn::recurrence_backward", _fake_backward)
