"""The back end `triton`: launchers of the kernels in fastrnn.kernels.

The whole sequence is one launch where the recurrent weights stay on one multiprocessor, else each step is at least one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import gpu
from fastrnn.backends.call import RecurrenceCall
from fastrnn.backends.gpu import Kept, Layout, Loop, LoopGradients, OutputGradients, Results, time_strides

_ZONEOUT_RANDOM, _ZONEOUT_EXPECTED = 1, 2


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel that takes a whole sequence is launched."""

    block_b: int  # sequences of one program
    warps: int
    stages: int  # of the loads within the loop over time


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def reasons_against(call: RecurrenceCall) -> list[str]:
    reasons = []
    if not is_installed():
        reasons.append("triton is not installed")
    if not (call.x.is_cuda or (call.x.is_cpu and interpreted())):
        reasons.append(f"the tensors are on {call.x.device}, not on a CUDA device")
    elif any(tensor.dtype not in gpu.DTYPES for tensor in call.tensors().values()):
        reasons.append(f"the tensors are {call.x.dtype}; the kernels are for {', '.join(map(str, gpu.DTYPES))}")
    return reasons + call.reasons_against_kernels()


def saved_layout(loop: Loop) -> Layout:
    cell, hidden, rows, data = loop.cell, loop.hidden, loop.rows, loop.dtype
    values = {"lstm": 4, "gru": 4, "gru_reset_before": 3}.get(cell, 0)
    if cell.startswith("rnn") and _zoneout(loop) == _ZONEOUT_EXPECTED:
        values = 1
    layout: Layout = {}
    if values:
        layout["gates"] = (rows, values * hidden), data
    if loop.norm_hh is not None:
        layout["normalized"] = (rows, loop.gates * hidden), data
        layout["deviations"] = (rows, len(gpu.norm_groups(cell))), torch.float32
    if loop.norm_c is not None:
        layout["normalized_c"] = (rows, hidden), data
        layout["deviations_c"] = (rows,), torch.float32
    if loop.weight_hr is not None:
        layout["projected"] = (rows, hidden), data
    return layout


def projects(loop: Loop) -> bool:
    return False


def pick(cell: str, hidden: int, dtype: torch.dtype, capability: tuple[int, int], training: bool) -> Launch | None:
    """How to launch a whole sequence; None where the weights are too large for that."""
    if hidden > (64 if dtype is torch.float32 else 128):
        return None
    return Launch(16, 8 if hidden > 32 else 4, 1)


@functools.lru_cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"fastrnn.kernels.{name}")


def loop_forward(loop: Loop, results: Results) -> None:
    saved = results.saved
    kernel = _kernels("recurrence").recurrence_forward
    launch = pick(loop.cell, loop.hidden, loop.dtype, (9, 0), bool(saved))
    assert launch is not None and loop.gates_x is not None
    with torch.cuda.device_of(loop.weight_hh):
        kernel[_programs(loop.batch, launch.block_b)](
            loop.gates_x,
            *time_strides(loop.gates_x),
            loop.weight_hh,
            loop.bias_hh,
            loop.weight_hr,
            *(loop.norm_hh or (None, None)),
            *(loop.norm_c or (None, None)),
            loop.peephole,
            loop.h0,
            loop.c0,
            loop.lengths,
            loop.row_starts,
            *_resets(loop),
            loop.recurrent_mask,
            *_strided(results.y),
            results.h_n,
            results.c_n,
            *_strided(results.c_all),
            *(saved.get(name) for name in _SAVED),
            *_sizes(loop),
            **_constants(loop, launch),
        )


def loop_backward(loop: Loop, kept: Kept, given: OutputGradients) -> LoopGradients:
    saved, y, rows, hidden = kept.saved, kept.y, loop.gates * loop.hidden, loop.hidden
    found = LoopGradients(gpu.like_rows(y, rows), y, None, None)
    dproduct = gpu.like_rows(y, rows) if loop.norm_hh is not None or loop.cell == "gru" else None
    found.dproduct = found.dgates_x if dproduct is None else dproduct
    found.dh0 = y.new_empty(loop.batch, loop.outputs, dtype=torch.float32)
    if loop.cell == "lstm":
        found.dc0 = y.new_empty(loop.batch, hidden, dtype=torch.float32)
    if loop.weight_hr is not None:
        found.dprojected = gpu.like_rows(y, loop.outputs)
        found.projected = _of_rows(loop, saved["projected"])
    dnormed_c = None if loop.norm_c is None else y.new_empty(loop.rows, hidden)
    kernel = _kernels("recurrence").recurrence_backward
    launch = pick(loop.cell, loop.hidden, loop.dtype, (9, 0), True)
    assert launch is not None
    with torch.cuda.device_of(y):
        kernel[_programs(loop.batch, launch.block_b)](
            *_strided(given.dy),
            given.dh_n,
            given.dc_n,
            *_strided(given.dc_all),
            loop.weight_hh,
            loop.weight_hr,
            None if loop.norm_hh is None else loop.norm_hh[0],
            *(loop.norm_c or (None, None)),
            loop.peephole,
            loop.h0,
            loop.c0,
            loop.lengths,
            loop.row_starts,
            *_resets(loop),
            loop.recurrent_mask,
            *_strided(y),
            *_strided(kept.c_all),
            *(saved.get(name) for name in _SAVED[:-1]),
            *_strided(found.dgates_x),
            dproduct,
            found.dprojected,
            dnormed_c,
            found.dh0,
            found.dc0,
            *_sizes(loop),
            **_constants(loop, launch),
        )
    _finish(loop, kept, dnormed_c, found)
    return found


_SAVED = ("gates", "normalized", "deviations", "normalized_c", "deviations_c", "projected")


def _finish(loop: Loop, kept: Kept, dnormed_c: Tensor | None, found: LoopGradients) -> None:
    """The gradients of norms and peepholes and the factors of the weights' gradients, from what the loops stored."""
    hidden = loop.hidden
    saved = {name: _of_rows(loop, tensor) for name, tensor in kept.saved.items()}
    if loop.cell == "gru_reset_before":
        found.h_in = gpu.fed_states(loop, kept.y)
        found.rh = gpu.masked(loop, saved["gates"][..., :hidden]) * found.h_in
    if loop.norm_hh is not None:
        dterms = found.dgates_x
        if loop.cell == "gru":
            dn = dterms[..., 2 * hidden :] * gpu.masked(loop, saved["gates"][..., :hidden])
            dterms = torch.cat([dterms[..., : 2 * hidden], dn], -1)
        found.norm_hh = gpu.norm_gradients(dterms, gpu.masked(loop, saved["normalized"]))
    if dnormed_c is not None:
        found.norm_c = gpu.norm_gradients(_of_rows(loop, dnormed_c), gpu.masked(loop, saved["normalized_c"]))
    if found.projected is not None:
        found.projected = gpu.masked(loop, found.projected)
    if loop.peephole is not None:
        assert kept.c_all is not None
        c = gpu.states_before(loop, kept.c_all, loop.c0)
        i, f, g, _ = gpu.masked(loop, saved["gates"]).float().chunk(4, -1)
        di, df, _, do = found.dgates_x.chunk(4, -1)
        terms = (di * c, df * c, do * (f * c + i * g))
        found.peephole = torch.cat([gpu.sum_of_rows(term) for term in terms])


def _of_rows(loop: Loop, tensor: Tensor) -> Tensor:
    """A tensor whose rows have no gaps, as a sequence."""
    return tensor if loop.row_starts is not None else tensor.unflatten(0, (loop.steps, loop.batch))


def _programs(batch: int, block_b: int) -> tuple[int]:
    return (-(-batch // block_b),)


def _strided(sequence: Tensor | None) -> tuple[Any, ...]:
    return (None, 0, 0) if sequence is None else (sequence, *time_strides(sequence))


def _resets(loop: Loop) -> tuple[Any, ...]:
    return (None, 0, 0) if loop.resets is None else (loop.resets.view(torch.uint8), *loop.resets.stride())


def _zoneout(loop: Loop) -> int:
    return 0 if loop.zoneout == 0 else _ZONEOUT_EXPECTED if loop.zoneout_seed is None else _ZONEOUT_RANDOM


def _sizes(loop: Loop) -> tuple[Any, ...]:
    words = (0, 0) if loop.zoneout_seed is None else (_word(loop.zoneout_seed, 0), _word(loop.zoneout_seed, 1))
    threshold = int(loop.zoneout * 2**24)
    return (loop.steps, loop.batch, loop.hidden, loop.outputs, loop.zoneout, threshold, *words)


def _constants(loop: Loop, launch: Launch) -> dict[str, Any]:
    return {
        "CELL": loop.cell,
        "REVERSE": loop.reverse,
        "ZONEOUT": _zoneout(loop),
        "BLOCK_B": launch.block_b,
        "BLOCK_H": _block(loop.hidden),
        "BLOCK_P": _block(loop.outputs),
        "PRECISION": loop.precision,
        "LOAD_STAGES": launch.stages,
        "num_warps": launch.warps,
        "enable_fp_fusion": True,
    }


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _mix32(x: int) -> int:
    x ^= x >> 16
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x ^= x >> 13
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _word(seed: int, stream: int) -> int:
    """What all draws of one seed and stream share, as a signed number, whose type does not depend on its value."""
    word = _mix32(_mix32((seed ^ (seed >> 32)) & 0xFFFFFFFF) ^ stream)
    return word - 2**32 if word >= 2**31 else word
