"""The back end `cuda`: the persistent recurrence of csrc/cuda, a whole sequence in one launch, weights on the chip."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import gpu, native, triton
from fastrnn.backends.call import RecurrenceCall
from fastrnn.backends.gpu import Kept, Layout, Loop, LoopGradients, OutputGradients, Results
from fastrnn.backends.native import CELL_INDEX
from fastrnn.backends.tensors import address, like_rows, time_strides
from fastrnn.reference import CELLS

_ELEMENT_SIZE = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}
MATHS = tuple(_ELEMENT_SIZE)  # Math of csrc/cuda/recurrence.h, in its order

ROW_TILE = 16
UNIT_GROUP = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """The part of a layer that one block computes: groups of 8 hidden units, and rows of the batch."""

    unit_groups: int  # 1, 2 or 4
    rows: int  # a multiple of 16


@dataclass(frozen=True, slots=True)
class Chip:
    """What of a GPU decides the choice of a tile."""

    multiprocessors: int
    shared_bytes: int  # that one block can have
    exchange_rate: float = 5e12  # bytes per second that all blocks together read from L2
    exchange_latency: float = 1e-6  # seconds from handing over a value to its arrival
    weights_rate: float = 2.2e11  # bytes per second of weights that one block reads from shared memory


# Bytes of one block's shared memory that states and sums over time may take; weights get the rest.
_STATE_BYTES = 48 * 1024
# Bytes of weights that a block holds in its registers.
_REGISTER_BYTES = 48 * 1024


def _padded(hidden: int) -> int:
    return (hidden + 31) // 32 * 32


def pick(
    gates: int, math: str, hidden_size: int, batch: int, chip: Chip, states: int = 2, directions: int = 1
) -> Tile | None:
    """The tile with the least time per step by a model: exchange latency, bytes read from L2, rows one after another.

    ``states``: floats that a block keeps of each row and unit; ``directions``: 2 where both run at once. None: the
    hidden size is too large for all blocks to run at once. The constants are estimates until a GPU has measured them.
    """
    padded = _padded(hidden_size)
    size = _ELEMENT_SIZE[math]
    best: tuple[float, Tile] | None = None
    for unit_groups in (1, 2, 4):
        units = UNIT_GROUP * unit_groups
        slices = padded // units
        groups = min(chip.multiprocessors // (directions * slices), -(-batch // ROW_TILE))
        if groups == 0:
            continue
        most = max(ROW_TILE, _STATE_BYTES // (4 * states * units) // ROW_TILE * ROW_TILE)
        rows = min(most, -(-batch // (groups * ROW_TILE)) * ROW_TILE)
        launches = -(-batch // (groups * rows))
        weights = gates * units * padded * size
        streamed = max(0, weights - _REGISTER_BYTES - (chip.shared_bytes - _STATE_BYTES))
        tiles = -(-min(rows, batch) // ROW_TILE)
        read = slices * groups * (min(rows, batch) * padded * size + tiles * streamed)
        wait = chip.exchange_latency * (1 + 0.25 * (tiles - 1))  # a tile's wait hides behind the work on the others
        time = launches * (wait + read / chip.exchange_rate + tiles * weights / chip.weights_rate)
        if best is None or time < best[0]:
            best = time, Tile(unit_groups, rows)
    return None if best is None else best[1]


# Constants, so that torch.compile need not look for them. The kernels' emulator works on the memory of the CPU.
_DEVICE_TYPE: str = native.load().cuda_device_type() if native.load() else "cuda"  # type: ignore[union-attr]


def reasons_against(call: RecurrenceCall) -> list[str]:
    if native.load() is None:
        return [f"the compiled extension is not available ({native.load_error()})"]
    reasons = call.reasons_against_place("a CUDA device", call.x.device.type == _DEVICE_TYPE, gpu.DTYPES)
    if call.weight_hr is not None:
        reasons.append("no CUDA kernel for proj_size")
    reasons += call.reasons_against_kernels()
    if reasons:
        return reasons
    status = _status()
    if status != "ok":
        return [f"no usable CUDA device ({status})"]
    if not fits(call, 1):
        reasons.append(f"hidden size {call.weight_hh.shape[1]} needs more blocks than the device runs at once")
    return reasons


def why_later(call: RecurrenceCall) -> str | None:
    """Why "auto" asks the other back ends of a GPU first; None: it does not."""
    if call.steps == 1:
        return "for a single step packing the weights would cost more than the step"
    if triton.is_resident(call) and not triton.reasons_against(call):
        return "the weights fit into one block, so that Triton's kernel exchanges nothing (not measured yet)"
    if _is_persistent_in_cudnn(call):
        return "cuDNN has a persistent algorithm for this call, too; which is faster is not measured yet"
    return None


def _is_persistent_in_cudnn(call: RecurrenceCall) -> bool:
    """Whether torch has cuDNN keep the weights on the chip: get_algo in aten/src/ATen/native/cudnn/RNN.cpp."""
    hidden = call.weight_hh.shape[1]
    plain = call.cell == "lstm" and call.x.dtype is torch.float16 and call.batch_sizes is None and call.is_plain()
    if not plain or call.weight_ih is None:
        return False
    sizes = hidden <= 1024 and hidden % 128 == 0 and call.x.shape[-1] % 128 == 0
    return sizes and call.x.shape[1] % 8 == 0 and call.x.shape[1] <= 128


def fits(call: RecurrenceCall, directions: int) -> bool:
    """Whether so many directions of a layer run on the chip at the same time."""
    gates, hidden = CELLS[call.cell].gates, call.weight_hh.shape[1]
    return pick(gates, "float16", hidden, 1, _chip(call.x.device), directions=directions) is not None


@functools.cache
def _known_chip(device: torch.device) -> Chip:
    with _on(device):
        multiprocessors, shared_bytes, _ = native.load().cuda_limits()  # type: ignore[union-attr]
    return Chip(multiprocessors, shared_bytes)


def _chip(device: torch.device) -> Chip:
    return _known_chip(device)


@functools.cache
def _known_status() -> str:
    status: str = native.load().cuda_status()  # type: ignore[union-attr]
    return status


def _status() -> str:
    return _known_status()


_chip._dynamo_marked_constant = True  # type: ignore[attr-defined] # as for fastrnn.backends.transforming
_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _math(loop: Loop) -> str:
    if loop.dtype is torch.float32:
        return "tf32" if loop.precision == "tf32" else "float32"
    return str(loop.dtype).removeprefix("torch.")


def _tile(loop: Loop, states: int, directions: int) -> Tile | None:
    device = loop.weight_hh.device
    return pick(loop.gates, _math(loop), loop.hidden, loop.batch, _chip(device), states, directions)


def saved_layout(loop: Loop) -> Layout:
    hidden, rows, data = loop.hidden, loop.rows, loop.dtype
    slots: int = native.load().cuda_saved_slots(CELL_INDEX[loop.cell])  # type: ignore[union-attr]
    layout: Layout = {
        "activations": ((rows, slots, hidden), data),
        "h_in": ((rows, _padded(hidden)), data),
    }
    if loop.cell == "gru_reset_before":
        layout["rh"] = ((rows, _padded(hidden)), data)
    if loop.norm_hh is not None:
        layout["normalized"] = ((rows, loop.gates * hidden), data)
    if loop.norm_hh is not None or loop.norm_c is not None:
        layout["deviations"] = ((rows, 4), torch.float32)
    return layout


def projects(loop: Loop) -> bool:
    return False


def _norm(norm: tuple[Tensor, Tensor] | None) -> tuple[int, int]:
    return (0, 0) if norm is None else (norm[0].data_ptr(), norm[1].data_ptr())


def _fill_problem(problem: Any, loop: Loop) -> None:
    problem.cell = CELL_INDEX[loop.cell]
    problem.math = MATHS.index(_math(loop))
    problem.reverse = loop.reverse
    problem.steps, problem.batch, problem.hidden_size, problem.rows = loop.steps, loop.batch, loop.hidden, loop.rows
    problem.row_starts, problem.lengths = address(loop.row_starts), address(loop.lengths)
    problem.resets = address(loop.resets)
    problem.reset_strides = (0, 0) if loop.resets is None else loop.resets.stride()
    problem.zoneout = loop.zoneout
    problem.zoneout_random = loop.zoneout_seed is not None
    problem.zoneout_seed = 0 if loop.zoneout_seed is None else loop.zoneout_seed
    problem.recurrent_mask = address(loop.recurrent_mask)
    problem.norm_hh, problem.norm_c = _norm(loop.norm_hh), _norm(loop.norm_c)
    problem.peephole = address(loop.peephole)


def _strides(sequence: Tensor | None) -> tuple[int, int]:
    return (0, 0) if sequence is None else time_strides(sequence)


def _scratch(loop: Loop, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Memory for the packed weights, and with layer norm for the blocks' statistics."""
    library: Any = native.load()
    like = loop.weight_hh
    packed = library.cuda_packed_bytes(CELL_INDEX[loop.cell], MATHS.index(_math(loop)), loop.hidden)
    stats = None
    if loop.norm_hh is not None or loop.norm_c is not None:
        size = library.cuda_stats_bytes(loop.steps, loop.batch, loop.hidden)
        stats = like.new_empty(size, dtype=torch.uint8)
    return like.new_empty(packed, dtype=torch.uint8), stats


def _launch(function: Any, calls: Sequence[Any], tile: Tile, device: torch.device) -> None:
    with _on(device):
        stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
        function(calls, (tile.unit_groups, tile.rows), stream)


def loops_forward(loops: Sequence[Loop], results: Sequence[Results]) -> None:
    """One or two loops of equal sizes, dtypes and options in one launch."""
    library: Any = native.load()
    tile = _tile(loops[0], _forward_states(loops[0]), len(loops))
    assert tile is not None  # fits() was asked
    scratch: list[Any] = []  # that must outlive the launch
    calls = [_forward_call(loop, result, tile, scratch) for loop, result in zip(loops, results, strict=True)]
    _launch(library.cuda_forward, calls, tile, loops[0].weight_hh.device)


def _forward_states(loop: Loop) -> int:
    return 2 if loop.cell == "lstm" else 1


def _sum_count(loop: Loop) -> int:
    norms = (loop.norm_hh is not None, loop.norm_c is not None)
    count: int = native.load().cuda_gradient_sums(CELL_INDEX[loop.cell], *norms, loop.peephole is not None)  # type: ignore[union-attr]
    return count


def _forward_call(loop: Loop, results: Results, tile: Tile, scratch: list[Any]) -> Any:
    packed, stats = _scratch(loop, tile)
    saved = results.saved
    h_in = saved["h_in"] if saved else loop.weight_hh.new_empty(loop.rows, _padded(loop.hidden))
    rh = None
    if loop.cell == "gru_reset_before":
        rh = saved["rh"] if saved else torch.empty_like(h_in)
    scratch += packed, stats, h_in, rh
    gates_x, y = loop.gates_x, results.y
    assert gates_x is not None
    call = native.load().CudaForward()  # type: ignore[union-attr]
    _fill_problem(call.problem, loop)
    call.gates_x, call.gates_x_rows = gates_x.data_ptr(), _strides(gates_x)
    call.weight_hh, call.bias_hh = loop.weight_hh.data_ptr(), address(loop.bias_hh)
    call.h0, call.c0 = address(loop.h0), address(loop.c0)
    call.y, call.y_rows = y.data_ptr(), _strides(y)
    call.h_n, call.c_n = results.h_n.data_ptr(), address(results.c_n)
    call.packed_weight, call.stats = packed.data_ptr(), address(stats)
    call.h_in, call.rh = h_in.data_ptr(), address(rh)
    call.saved = address(saved.get("activations"))
    call.c_all, call.c_rows = address(results.c_all), _strides(results.c_all)
    call.norm_saved, call.deviations = address(saved.get("normalized")), address(saved.get("deviations"))
    return call


def loops_backward(
    loops: Sequence[Loop], kept: Sequence[Kept], given: Sequence[OutputGradients]
) -> list[LoopGradients]:
    """As loops_forward, for the gradients."""
    library: Any = native.load()
    tile = _tile(loops[0], _forward_states(loops[0]) + _sum_count(loops[0]), len(loops))
    assert tile is not None
    runs = [_Backward(*each, tile) for each in zip(loops, kept, given, strict=True)]
    _launch(library.cuda_backward, [run.call for run in runs], tile, loops[0].weight_hh.device)
    return [run.gradients() for run in runs]


class _Backward:
    """One direction's part of a backward launch, and what its results mean."""

    def __init__(self, loop: Loop, kept: Kept, given: OutputGradients, tile: Tile) -> None:
        hidden, gates, batch = loop.hidden, loop.gates, loop.batch
        padded, weight, saved = _padded(hidden), loop.weight_hh, kept.saved
        self.loop, self.saved = loop, saved
        self.packed, self.stats = _scratch(loop, tile)
        self.dproduct = weight.new_empty(loop.rows, gates, padded)
        self.dgates_x = None
        if loop.cell == "gru" or loop.norm_hh is not None or padded != hidden:
            self.dgates_x = like_rows(kept.y, gates * hidden)
        self.dh0 = None if loop.h0 is None else weight.new_empty(batch, hidden, dtype=torch.float32)
        has_c0 = loop.c0 is not None and loop.cell == "lstm"
        self.dc0 = weight.new_empty(batch, hidden, dtype=torch.float32) if has_c0 else None
        count = _sum_count(loop)
        self.sums = weight.new_empty(count, batch, hidden, dtype=torch.float32) if count else None
        self.call = call = native.load().CudaBackward()  # type: ignore[union-attr]
        _fill_problem(call.problem, loop)
        call.dy, call.dy_rows = address(given.dy), _strides(given.dy)
        call.dh_n, call.dc_n = address(given.dh_n), address(given.dc_n)
        call.dc_all, call.dc_all_rows = address(given.dc_all), _strides(given.dc_all)
        call.weight_hh = weight.data_ptr()
        call.h0, call.c0 = address(loop.h0), address(loop.c0)
        call.y, call.y_rows = kept.y.data_ptr(), _strides(kept.y)
        call.saved = saved["activations"].data_ptr()
        call.c_all, call.c_rows = address(kept.c_all), _strides(kept.c_all)
        call.norm_saved, call.deviations = address(saved.get("normalized")), address(saved.get("deviations"))
        call.packed_weight, call.stats = self.packed.data_ptr(), address(self.stats)
        call.dproduct = self.dproduct.data_ptr()
        call.dgates_x, call.dgates_x_rows = address(self.dgates_x), _strides(self.dgates_x)
        call.dh0, call.dc0, call.sums = address(self.dh0), address(self.dc0), address(self.sums)

    def gradients(self) -> LoopGradients:
        loop, gates, hidden = self.loop, self.loop.gates, self.loop.hidden
        dproduct = self._sequence(self.dproduct[..., :hidden].reshape(loop.rows, gates * hidden))
        rh = self.saved.get("rh")
        found = LoopGradients(
            dproduct if self.dgates_x is None else self.dgates_x,
            dproduct,
            self.dh0,
            self.dc0,
            h_in=self._sequence(self.saved["h_in"][:, :hidden]),
            rh=None if rh is None else self._sequence(rh[:, :hidden]),
        )
        if self.sums is not None:
            totals = iter(self.sums.sum(1))  # in the order of gradient_sums in csrc/cuda/recurrence.h
            if loop.norm_hh is not None:
                weight = torch.cat([next(totals) for _ in range(gates)])
                found.norm_hh = weight, torch.cat([next(totals) for _ in range(gates)])
            if loop.norm_c is not None:
                found.norm_c = next(totals), next(totals)
            if loop.peephole is not None:
                found.peephole = torch.cat([next(totals) for _ in range(3)])
        return found

    def _sequence(self, rows: Tensor) -> Tensor:
        return rows if self.loop.row_starts is not None else rows.unflatten(0, (self.loop.steps, self.loop.batch))
