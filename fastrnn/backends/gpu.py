"""What the back ends on a GPU share: everything around the loop over time, in plain torch.

`forward` and `backward` project the input, lay out memory, and turn what the backward loop found into the gradients of
x, weights and biases, each a single product over all steps. A back end brings the loop: the functions of `LoopModule`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastrnn.backends.call import Norm
from fastrnn.backends.tensors import is_batch_major, like_rows, new_gradients, with_unit_stride
from fastrnn.reference import CELLS

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ALIGNMENT = 64  # of saved tensors, in floats


@dataclass(slots=True)
class Loop:
    """The loop over time of one direction of one layer: T steps, B sequences, G gates, H units, P outputs.

    "Sequences" have a row for each (t, b). Unpacked they are [T, B, n] with any strides of t and b and unit stride of
    the last dimension, batch-major in memory where x is. Packed (`row_starts` is given) they are [N, n]; the row of
    (t, b) is row_starts[t] + b, and rows with t >= lengths[b] do not exist. "Data" is the one dtype of x, gates_x, the
    weights, h0, c0 and y: float32, float16 or bfloat16.
    """

    cell: str  # a key of CELLS, or "gru_reset_before"
    steps: int  # T
    batch: int  # B
    rows: int  # T * B, or N
    gates_x: Tensor | None  # sequence [T, B, G*H], data: W_ih x + b_ih, without b_hh; None in the backward pass
    weight_hh: Tensor  # [G*H, P], data, contiguous
    bias_hh: Tensor | None  # [G*H], float32, contiguous
    h0: Tensor | None  # [B, P], data, contiguous; None: zero
    c0: Tensor | None  # [B, H], data, contiguous; None: zero
    weight_hr: Tensor | None = None  # [P, H], data, contiguous
    lengths: Tensor | None = None  # [B] int64 on the device, contiguous, to be clamped to 0..T; given if packed, too
    row_starts: Tensor | None = None  # [T] int64 on the device
    resets: Tensor | None = None  # [T, B] bool, any strides
    recurrent_mask: Tensor | None = None  # [B, P], float32, contiguous
    zoneout: float = 0.0
    zoneout_seed: int | None = None  # None: the expectation
    norm_hh: Norm | None = None  # [G*H] each, float32, contiguous
    norm_c: Norm | None = None  # [H] each, float32, contiguous
    peephole: Tensor | None = None  # [3*H], float32, contiguous
    reverse: bool = False
    # How float32 is multiplied. "ieee": as accurately as by float32 products; "tf32": in one pass of TF32.
    precision: str = "ieee"
    # Of a single step that the back end projects itself: x [1, B, I] and weight_ih [G*H, I], data, unit stride of their
    # columns; bias_ih [G*H], float32. gates_x is None then.
    x: Tensor | None = None
    weight_ih: Tensor | None = None
    bias_ih: Tensor | None = None

    @property
    def gates(self) -> int:
        return CELLS[self.cell.removesuffix("_reset_before")].gates

    @property
    def hidden(self) -> int:
        return self.weight_hh.shape[0] // self.gates

    @property
    def outputs(self) -> int:
        return self.weight_hh.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_hh.dtype


@dataclass(slots=True)
class Results:
    """What loops_forward fills. All of it is allocated, and uninitialised."""

    y: Tensor  # sequence [T, B, P], data; unpacked: zero where t >= lengths[b]
    h_n: Tensor  # [B, P], data, contiguous
    c_n: Tensor | None  # [B, H], data, contiguous (LSTM)
    # Sequence [T, B, H], float32, of the LSTM if a backward pass will follow or the user wants it: c_t after zoneout;
    # unpacked: zero where t >= lengths[b].
    c_all: Tensor | None
    saved: Mapping[str, Tensor]  # as saved_layout declares them, contiguous; empty without a backward pass


@dataclass(slots=True)
class Kept:
    """What loops_backward finds again of the forward pass."""

    y: Tensor
    c_all: Tensor | None
    saved: Mapping[str, Tensor]


@dataclass(slots=True)
class OutputGradients:
    """Gradients of the results, None for zero. Where t >= lengths[b] they may hold anything."""

    dy: Tensor | None  # sequence [T, B, P], data
    dh_n: Tensor | None  # [B, P], data, contiguous
    dc_n: Tensor | None  # [B, H], data, contiguous
    dc_all: Tensor | None  # sequence [T, B, H], float32


@dataclass(slots=True)
class LoopGradients:
    """What loops_backward returns, in tensors that it allocates, with zeros where t >= lengths[b].

    Sequences may have any order of rows. One of another order than y costs a copy; `like_rows` gives y's.
    """

    dgates_x: Tensor  # sequence [T, B, G*H], data: gradient of gates_x
    # Sequence [T, B, G*H], data: gradient of W_hh h before its norm, in torch's order of gates. The same tensor as
    # dgates_x where they are equal: without norm_hh, but for the cell "gru".
    dproduct: Tensor
    dh0: Tensor | None  # [B, P], float32 or data; None only where there is no h0
    dc0: Tensor | None  # [B, H], float32 or data; None only where there is no c0
    # Sequence [T, B, P], data, finite everywhere: what met weight_hh. None: it is made of y, h0, resets and mask.
    h_in: Tensor | None = None
    rh: Tensor | None = None  # of "gru_reset_before": sequence [T, B, H], data: what met the rows n of weight_hh
    dprojected: Tensor | None = None  # with weight_hr: sequence [T, B, P], data, gradient of W_hr m
    projected: Tensor | None = None  # with weight_hr: sequence [T, B, H], data, m
    # Finished gradients of parameters, float32. That of norm_hh's bias is bias_hh's as well.
    norm_hh: Norm | None = None
    norm_c: Norm | None = None
    peephole: Tensor | None = None


class LoopModule(Protocol):
    """The functions of a back end."""

    def saved_layout(self, loop: Loop) -> Layout:
        """Name, shape and dtype of each tensor that the backward pass needs besides y and c_all.

        By shapes, dtypes and options alone: while a graph is traced the tensors have no memory, and sizes may be
        symbols.
        """

    def projects(self, loop: Loop) -> bool:
        """Whether loops_forward takes x and weight_ih in place of gates_x. Asked of single steps only."""

    def loops_forward(self, loops: Sequence[Loop], results: Sequence[Results]) -> None:
        """Enqueues a loop on the current stream, without waiting for it. Not called where T = 0 or B = 0.

        Or several of equal sizes, dtypes and options, at the same time where the back end can.
        """

    def loops_backward(
        self, loops: Sequence[Loop], kept: Sequence[Kept], given: Sequence[OutputGradients]
    ) -> list[LoopGradients]:
        """Likewise, for the gradients."""


NAMES = ("cuda", "triton")  # of the back ends that have these functions


def module(backend: str) -> LoopModule:
    assert backend in NAMES
    return cast(LoopModule, importlib.import_module(f"fastrnn.backends.{backend}"))


def precision() -> str:
    """How torch multiplies float32 matrices on a GPU, in the words of `Loop`."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _as_rows(sequence: Tensor, like: Tensor) -> Tensor:
    """[N, n], in the order of the rows of `like`; without a copy where the sequence has that order."""
    if sequence.dim() == 2:
        return sequence
    ordered = sequence.transpose(0, 1) if is_batch_major(like) else sequence
    return ordered.reshape(-1, sequence.shape[-1])


def _as_sequence(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_as_rows`."""
    if like.dim() == 2:
        return rows
    steps, batch, _ = like.shape
    if is_batch_major(like):
        return rows.view(batch, steps, -1).transpose(0, 1)
    return rows.view(steps, batch, -1)


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _norm(weight: Tensor | None, bias: Tensor | None) -> Norm | None:
    if weight is None or bias is None:
        return None
    return weight.float().contiguous(), bias.float().contiguous()


def _loop(
    cell: str,
    x: Tensor,
    weight_hh: Tensor,
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
) -> Loop:
    """All but the input projection."""
    data = x.dtype
    row_starts = None
    if batch_sizes is None:
        steps, batch = x.shape[:2]
    else:
        steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
        # One transfer, from the CPU, which knows these sizes.
        described = torch.cat(
            [batch_sizes.cumsum(0) - batch_sizes, (batch_sizes[:, None] > torch.arange(batch)).sum(0)]
        ).to(x.device, non_blocking=True)
        row_starts, lengths = described[:steps], described[steps:]
    return Loop(
        cell,
        steps,
        batch,
        steps * batch if batch_sizes is None else x.shape[0],
        None,
        weight_hh.to(data).contiguous(),
        _as(bias_hh, torch.float32),
        _as(h0, data),
        _as(c0, data),
        _as(parameters[7], data),
        None if lengths is None else lengths.to(x.device, torch.int64, non_blocking=True).contiguous(),
        row_starts,
        resets,
        _as(recurrent_mask, torch.float32),
        zoneout,
        zoneout_seed,
        _norm(*parameters[2:4]),
        _norm(*parameters[4:6]),
        _as(parameters[6], torch.float32),
        reverse,
        precision(),
    )


def _project(
    x: Tensor, weight_ih: Tensor | None, bias_ih: Tensor | None, norm: Norm | None, groups: tuple[int, ...]
) -> Tensor:
    """gates_x for all steps."""
    if weight_ih is None:
        return x if bias_ih is None else x + bias_ih.to(x.dtype)
    rows, weight = _as_rows(x, x), weight_ih.to(x.dtype)
    bias = None if bias_ih is None else bias_ih.to(x.dtype)
    if norm is not None:
        product = rows @ weight.T
        gain, shift = (parameter.to(x.dtype) for parameter in norm)
        shift = shift if bias is None else shift + bias
        hidden = weight.shape[0] // sum(groups)
        sizes = [n * hidden for n in groups]
        parts = zip(product.split(sizes, 1), gain.split(sizes), shift.split(sizes), strict=True)
        product = torch.cat([torch.nn.functional.layer_norm(p, p.shape[1:], g, s) for p, g, s in parts], 1)
    else:
        product = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    return _as_sequence(product, x)


def _project_backward(
    dgates: Tensor, rows: Tensor, weight: Tensor, norm: Norm, groups: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of the product [N, G*H] before its layer norm, and of the norm's weight."""
    hidden = weight.shape[0] // sum(groups)
    sizes = [n * hidden for n in groups]
    product = rows @ weight.T
    found = []
    for d, p, gain, shift in zip(
        dgates.split(sizes, 1), product.split(sizes, 1), norm[0].split(sizes), norm[1].split(sizes), strict=True
    ):
        gain, shift, d, p = gain.to(p.dtype), shift.to(p.dtype), d.contiguous(), p.contiguous()
        _, mean, scale = torch.native_layer_norm(p, p.shape[1:], gain, shift, 1e-5)
        found.append(
            torch.ops.aten.native_layer_norm_backward(d, p, p.shape[1:], mean, scale, gain, shift, [True, True, False])[
                :2
            ]
        )
    return torch.cat([d for d, _ in found], 1), torch.cat([gain for _, gain in found])


def _flat_size(layout: Layout) -> int:
    """Floats that `_views` needs."""
    total = 0
    for shape, dtype in layout.values():
        size = dtype.itemsize
        for n in shape:
            size = size * n
        total = total + (size + 4 * _ALIGNMENT - 1) // (4 * _ALIGNMENT) * _ALIGNMENT
    return total


def _views(flat: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of the layout, one after another in flat float32 memory."""
    found, start = {}, 0
    for name, (shape, dtype) in layout.items():
        floats = _flat_size({name: (shape, dtype)})
        count = 1
        for n in shape:
            count *= n
        found[name] = flat[start : start + floats].view(dtype)[:count].view(shape)
        start += floats
    return found


def _without_autocast(x: Tensor) -> Any:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def norm_groups(cell: str) -> tuple[int, ...]:
    return CELLS[cell.removesuffix("_reset_before")].norm_groups


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(backend: str, *arguments: Any) -> Outputs:
    """As cpu.forward, on the back end of this name."""
    return forwards(backend, [arguments])[0]


def backward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    """As cpu.backward, on the back end of this name."""
    return backwards(backend, [arguments])[0]


def forwards(backend: str, calls: Sequence[tuple[Any, ...]]) -> list[Outputs]:
    """`forward` of each; several have equal sizes, dtypes and options, and the back end runs them at once."""
    loops = module(backend)
    begun = [_begin_forward(loops, *arguments) for arguments in calls]
    if begun[0][0].rows > 0:
        with _without_autocast(begun[0][2][0]):
            loops.loops_forward([loop for loop, _, _ in begun], [results for _, results, _ in begun])
    return [outputs for _, _, outputs in begun]


def _begin_forward(
    loops: LoopModule,
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
) -> tuple[Loop, Results, Outputs]:
    """Everything before the loop over time: what it is given, where it writes, and what that is to the caller."""
    x = with_unit_stride(x)
    options = (lengths, batch_sizes, resets, recurrent_mask, zoneout, zoneout_seed, reverse)
    with _without_autocast(x):
        loop = _loop(cell, x, weight_hh, bias_hh, h0, c0, parameters, *options)
        lstm = cell == "lstm"
        y = like_rows(x, loop.outputs)
        h_n = x.new_empty(loop.batch, loop.outputs)
        c_n = x.new_empty((loop.batch, loop.hidden) if lstm else 0)
        c_all = like_rows(x, loop.hidden, torch.float32) if lstm and (save or cell_states) else None
        layout = loops.saved_layout(loop) if save else {}
        saved = x.new_empty(_flat_size(layout), dtype=torch.float32)
        if loop.rows == 0:
            for state, initial in ((h_n, loop.h0), (c_n, loop.c0)):
                state.zero_() if initial is None else state.copy_(initial)
        elif weight_ih is not None and parameters[0] is None and loop.steps == 1 and loops.projects(loop):
            loop.x, loop.weight_ih = x, weight_ih.to(x.dtype).contiguous()
            loop.bias_ih = _as(bias_ih, torch.float32)
        else:
            norm = None if parameters[0] is None else (parameters[0], cast(Tensor, parameters[1]))
            loop.gates_x = with_unit_stride(_project(x, weight_ih, bias_ih, norm, norm_groups(cell)))
        results = Results(y, h_n, c_n if lstm else None, c_all, _views(saved, layout))
    return loop, results, (y, h_n, c_n, saved, x.new_empty(0, dtype=torch.float32) if c_all is None else c_all)


def backwards(backend: str, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Tensor, ...]]:
    """`backward` of each, as `forwards`."""
    loops = module(backend)
    begun = [_begin_backward(loops, *arguments) for arguments in calls]
    found: Sequence[LoopGradients | None] = [None] * len(calls)
    if begun[0].loop.rows > 0:
        with _without_autocast(begun[0].x):
            found = loops.loops_backward([b.loop for b in begun], [b.kept for b in begun], [b.given for b in begun])
    return [_end_backward(b, gradients) for b, gradients in zip(begun, found, strict=True)]


@dataclass(slots=True)
class _Begun:
    """A backward call as far as the loop over time."""

    loop: Loop
    kept: Kept
    given: OutputGradients
    x: Tensor
    weight_ih: Tensor | None
    weight_hh: Tensor
    parameters: Sequence[Tensor | None]
    needs: list[bool]
    dh_n: Tensor | None
    dc_n: Tensor | None


def _begin_backward(
    loops: LoopModule,
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
) -> _Begun:
    x = with_unit_stride(x)
    options = (lengths, batch_sizes, resets, recurrent_mask, zoneout, zoneout_seed, reverse)
    with _without_autocast(x):
        loop = _loop(cell, x, weight_hh, None, h0, c0, parameters, *options)
        kept = Kept(y, c_all if cell == "lstm" else None, _views(saved, loops.saved_layout(loop)))
        given = OutputGradients(
            None if dy is None else with_unit_stride(dy),
            _as(dh_n, x.dtype),
            _as(dc_n, x.dtype),
            None if dc_all is None else with_unit_stride(dc_all.float()),
        )
    return _Begun(loop, kept, given, x, weight_ih, weight_hh, parameters, needs, dh_n, dc_n)


def _end_backward(begun: _Begun, gradients: LoopGradients | None) -> tuple[Tensor, ...]:
    x, weight_hh, needs = begun.x, begun.weight_hh, begun.needs
    with _without_autocast(x):
        if gradients is None:
            found = new_gradients(x, weight_hh, begun.loop.hidden, begun.loop.batch, needs, weight_hh.dtype, x.dtype)
            for index, gradient in enumerate(found):
                # T = 0 hands the initial states through.
                passed = begun.dh_n if index == 5 else begun.dc_n if index == 6 else None
                if gradient is not None:
                    gradient.zero_() if passed is None else gradient.copy_(passed)
        else:
            arguments = (x, begun.weight_ih, begun.parameters, weight_hh.dtype, needs)
            found = _finish(begun.loop, begun.kept, gradients, *arguments)
    return tuple(
        x.new_empty(0) if gradient is None else gradient.to(x.dtype if index in (0, 5, 6) else weight_hh.dtype)
        for index, gradient in enumerate(found)
    )


def _finish(
    loop: Loop,
    kept: Kept,
    found: LoopGradients,
    x: Tensor,
    weight_ih: Tensor | None,
    parameters: Sequence[Tensor | None],
    weight_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients of RecurrenceCall.inputs, from those of the loop."""
    gradients: list[Tensor | None] = [None] * len(needs)
    dgates = _as_rows(found.dgates_x, x)
    dlinear, gain = dgates, None
    if weight_ih is not None and parameters[0] is not None and any(needs[:2]) | needs[7]:
        norm = (parameters[0], cast(Tensor, parameters[1]))
        dlinear, gain = _project_backward(dgates, _as_rows(x, x), weight_ih.to(x.dtype), norm, norm_groups(loop.cell))

    if needs[0]:
        gradients[0] = _as_sequence(dlinear if weight_ih is None else dlinear @ weight_ih.to(x.dtype), x)
    if needs[1]:
        gradients[1] = _weight_gradient(dlinear, _as_rows(x, x), weight_dtype)
    if needs[2]:
        gradients[2] = _recurrent_weight_gradient(loop, kept, found, weight_dtype)
    if needs[3] or needs[8]:  # A bias and the norm's before it; an operator's results may not share memory.
        shift = sum_of_rows(found.dgates_x)
        gradients[3], gradients[8] = shift, shift.clone() if needs[3] else shift
    if needs[4]:
        gradients[4] = sum_of_rows(found.dproduct) if found.norm_hh is None else found.norm_hh[1].clone()
    gradients[5], gradients[6], gradients[7] = found.dh0, found.dc0, gain
    gradients[9:11] = found.norm_hh or (None, None)
    gradients[11:13] = found.norm_c or (None, None)
    gradients[13] = found.peephole
    if needs[14]:
        dprojected, projected = cast(Tensor, found.dprojected), cast(Tensor, found.projected)
        rows = _as_rows(dprojected, dprojected), _as_rows(projected, dprojected)
        gradients[14] = _weight_gradient(*rows, weight_dtype)
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _weight_gradient(dproduct: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """dproduct^T factor, summed over rows in float32 and, on a GPU, not rounded to less than the weight's dtype."""
    if dproduct.is_cuda and dtype is torch.float32 and dproduct.dtype is not dtype:
        return torch.mm(dproduct.T, factor, out_dtype=dtype)
    return dproduct.T @ factor


def _recurrent_weight_gradient(loop: Loop, kept: Kept, found: LoopGradients, dtype: torch.dtype) -> Tensor:
    h_in = fed_states(loop, kept.y) if found.h_in is None else found.h_in
    dproduct = _as_rows(found.dproduct, h_in)
    rows = _as_rows(h_in, h_in)
    if found.rh is None:
        return _weight_gradient(dproduct, rows, dtype)
    split = 2 * loop.hidden
    first = _weight_gradient(dproduct[:, :split], rows, dtype)
    return torch.cat([first, _weight_gradient(dproduct[:, split:], _as_rows(found.rh, h_in), dtype)])


def sum_of_rows(sequence: Tensor) -> Tensor:
    return sequence.sum(tuple(range(sequence.dim() - 1)), dtype=torch.float32)


def norm_gradients(dnormed: Tensor, normalized: Tensor) -> Norm:
    """Gradients of a layer norm's weight and bias, float32, from sequences: of its result, and before its affine."""
    return sum_of_rows(dnormed.float() * normalized), sum_of_rows(dnormed)


def _steps_of_rows(loop: Loop) -> tuple[Tensor, Tensor]:
    """t and b of each packed row."""
    assert loop.row_starts is not None
    row = torch.arange(loop.rows, device=loop.row_starts.device)
    t = torch.searchsorted(loop.row_starts, row, right=True) - 1
    return t, row - loop.row_starts[t]


def masked(loop: Loop, sequence: Tensor) -> Tensor:
    """The sequence with zeros where t >= lengths[b], where a loop may have left anything."""
    if loop.lengths is None or loop.row_starts is not None:
        return sequence
    ended = torch.arange(loop.steps, device=sequence.device)[:, None] >= loop.lengths
    return sequence.masked_fill(ended[..., None], 0)


def states_before(loop: Loop, sequence: Tensor, initial: Tensor | None) -> Tensor:
    """The state before each step, after resets, as a sequence: of the step before, or the initial one [B, n].

    Where t >= lengths[b] it is finite, and no more than that.
    """
    first = sequence.new_zeros(loop.batch, sequence.shape[-1]) if initial is None else initial.to(sequence.dtype)
    if loop.row_starts is not None:
        assert loop.lengths is not None
        t, b = _steps_of_rows(loop)
        before = t + 1 if loop.reverse else t - 1
        exists = before < loop.lengths[b] if loop.reverse else before >= 0
        row = loop.row_starts[before.clamp(0, loop.steps - 1)] + b
        states = torch.where(exists[:, None], sequence[torch.where(exists, row, 0)], first[b])
        reset = None if loop.resets is None else loop.resets[t, b]
    else:
        states = like_rows(sequence, sequence.shape[-1])
        if loop.reverse:
            states[:-1], states[-1] = sequence[1:], first
            if loop.lengths is not None:
                last = torch.arange(loop.steps, device=sequence.device)[:, None] >= loop.lengths - 1
                states = torch.where(last[..., None], first, states)
        else:
            states[1:], states[0] = sequence[:-1], first
        reset = loop.resets
    return states if reset is None else states.masked_fill(reset[..., None], 0)


def fed_states(loop: Loop, y: Tensor) -> Tensor:
    """What met weight_hh at each step, as a sequence."""
    states = states_before(loop, y, loop.h0)
    if loop.recurrent_mask is None:
        return states
    mask = loop.recurrent_mask if loop.row_starts is None else loop.recurrent_mask[_steps_of_rows(loop)[1]]
    return (states * mask).to(loop.dtype)


def fake_forward(
    backend: str,
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
    x = with_unit_stride(x)
    batch: Any
    if batch_sizes is None:
        steps, batch, rows = x.shape[0], x.shape[1], x.shape[0] * x.shape[1]
    else:
        steps, rows = batch_sizes.shape[0], x.shape[0]
        batch = torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.shape[0]
    loop = Loop(cell, steps, batch, rows, None, weight_hh.to(x.dtype), bias_hh, h0, c0, parameters[7])
    loop.zoneout, loop.zoneout_seed = zoneout, zoneout_seed
    loop.norm_hh, loop.norm_c = _norm(*parameters[2:4]), _norm(*parameters[4:6])
    lstm = cell == "lstm"
    return (
        like_rows(x, loop.outputs),
        x.new_empty(batch, loop.outputs),
        x.new_empty((batch, loop.hidden) if lstm else 0),
        x.new_empty(_flat_size(module(backend).saved_layout(loop)) if save else 0, dtype=torch.float32),
        like_rows(x, loop.hidden, torch.float32) if lstm and (save or cell_states) else x.new_empty(0).float(),
    )


def fake_backward(
    backend: str,
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
    state = h0 if h0 is not None else c0
    batch = 0 if state is None else state.shape[0]  # only the states' gradients have this size
    hidden = weight_hh.shape[0] // CELLS[cell.removesuffix("_reset_before")].gates
    found = new_gradients(with_unit_stride(x), weight_hh, hidden, batch, needs, weight_hh.dtype, x.dtype)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)
