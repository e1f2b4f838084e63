"""The back end `triton`: launchers of the kernels in fastrnn.kernels.

The whole sequence is one launch where the recurrent weights stay on one multiprocessor, else each step is at least one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends import gpu
from fastrnn.backends.call import RecurrenceCall
from fastrnn.backends.gpu import Kept, Layout, Loop, LoopGradients, OutputGradients, Results
from fastrnn.backends.tensors import like_rows, time_strides
from fastrnn.reference import CELLS

_ZONEOUT_RANDOM, _ZONEOUT_EXPECTED = 1, 2


@dataclass(frozen=True, slots=True)
class Sequence:
    """How a whole sequence is launched, with its recurrent weights resident on the multiprocessor."""

    block_b: int  # sequences of one program; the same for any batch, so that a row's result does not depend on it
    warps: int
    load_stages: int  # of the loads within the loop over time


@dataclass(frozen=True, slots=True)
class Step:
    """How the products of a single step are launched."""

    block_b: int
    block_n: int  # units (of all gates) or columns
    block_k: int
    warps: int
    stages: int


# Largest hidden size by (gates, bytes of an element) whose weights fit into the shared memory of one multiprocessor, by
# how much of that a block may have: 163 KB and more, or 99 KB. From what Triton 3.6 and 3.9 say of the compiled kernels
# (tests/kernels/test_compiled.py); not measured on a GPU yet.
_LARGEST = {
    163: {(4, 2): 128, (3, 2): 128, (1, 2): 256, (4, 4): 64, (3, 4): 64, (1, 4): 64},
    99: {(4, 2): 64, (3, 2): 64, (1, 2): 128, (4, 4): 64, (3, 4): 64, (1, 4): 64},
}


def pick(cell: str, hidden: int, dtype: torch.dtype, capability: tuple[int, int], training: bool) -> Sequence | None:
    """How to launch a whole sequence; None where the weights are too large for one multiprocessor."""
    shared = 163 if capability in ((8, 0), (9, 0), (10, 0), (10, 3)) else 99
    gates = CELLS[cell.removesuffix("_reset_before")].gates
    if capability < (8, 0) or hidden > _LARGEST[shared][gates, dtype.itemsize]:
        return None
    return Sequence(block_b=16, warps=4 if hidden <= 32 else 8, load_stages=1)


def pick_step(dtype: torch.dtype) -> Step:
    """How to launch the products of a single step."""
    return Step(16, 32, 32, 4, 3) if dtype is torch.float32 else Step(16, 32, 64, 4, 3)


# Constants, so that torch.compile need not look for them. The interpreter runs kernels in Python, on CPU tensors.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def reasons_against(call: RecurrenceCall) -> list[str]:
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed")
    here = call.x.is_cuda or (call.x.is_cpu and _INTERPRETED)
    reasons += call.reasons_against_place("a CUDA device", here, gpu.DTYPES)
    return reasons + call.reasons_against_kernels()


def why_later(call: RecurrenceCall) -> str | None:
    """Why "auto" takes torch's operator first where that computes the same; None: it does not."""
    if call.steps == 1 or is_resident(call):
        return None
    hidden = call.weight_hh.shape[0] // CELLS[call.cell].gates
    return f"each step is a launch of its own with {hidden} units; torch's operator is asked first (not measured yet)"


def is_resident(call: RecurrenceCall) -> bool:
    """Whether one program holds all of weight_hh, so that a whole sequence is one launch."""
    hidden = call.weight_hh.shape[0] // CELLS[call.cell].gates
    return pick(call.cell, hidden, call.x.dtype, _capability(call.x.device), True) is not None


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
    return _is_fused(loop)


def _is_fused(loop: Loop) -> bool:
    """Whether product and gates of a step are one launch."""
    return loop.norm_hh is None and loop.norm_c is None and loop.cell != "gru_reset_before"


@functools.lru_cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"fastrnn.kernels.{name}")


@functools.lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined] # as for fastrnn.backends.transforming


def _pick(loop: Loop, training: bool) -> Sequence | None:
    return pick(loop.cell, loop.hidden, loop.dtype, _capability(loop.weight_hh.device), training)


def loops_forward(loops: abc.Sequence[Loop], results: abc.Sequence[Results]) -> None:
    for loop, result in zip(loops, results, strict=True):
        _forward(loop, result)


def _forward(loop: Loop, results: Results) -> None:
    launch = None if loop.gates_x is None else _pick(loop, bool(results.saved))
    with torch.cuda.device_of(loop.weight_hh):
        if launch is None or not _fits(_forward_at_once, loop, results, launch):
            _forward_by_steps(loop, results)


def loops_backward(
    loops: abc.Sequence[Loop], kept: abc.Sequence[Kept], given: abc.Sequence[OutputGradients]
) -> list[LoopGradients]:
    return [_backward(*each) for each in zip(loops, kept, given, strict=True)]


def _backward(loop: Loop, kept: Kept, given: OutputGradients) -> LoopGradients:
    y, rows, hidden = kept.y, loop.gates * loop.hidden, loop.hidden
    dgates_x = like_rows(y, rows)
    separate = loop.norm_hh is not None or loop.cell == "gru"
    found = LoopGradients(
        dgates_x,
        like_rows(y, rows) if separate else dgates_x,
        y.new_empty(loop.batch, loop.outputs, dtype=torch.float32),
        y.new_empty(loop.batch, hidden, dtype=torch.float32) if loop.cell == "lstm" else None,
    )
    if loop.weight_hr is not None:
        found.dprojected = like_rows(y, loop.outputs)
        found.projected = _of_rows(loop, kept.saved["projected"])
    dnormed_c = None if loop.norm_c is None else y.new_empty(loop.rows, hidden)
    launch = _pick(loop, True)
    with torch.cuda.device_of(y):
        if launch is None or not _fits(_backward_at_once, loop, kept, given, found, dnormed_c, launch):
            _backward_by_steps(loop, kept, given, found, dnormed_c)
    _finish(loop, kept, dnormed_c, found)
    return found


def _fits(launcher: Callable[..., None], *arguments: Any) -> bool:
    """Launches. False where the kernel, as this version of Triton compiles it, needs more memory than the GPU has."""
    errors = importlib.import_module("triton.runtime.errors")
    try:
        launcher(*arguments)
    except errors.OutOfResources:
        return False
    return True


def _forward_at_once(loop: Loop, results: Results, launch: Sequence) -> None:
    _kernels("recurrence").recurrence_forward[(-(-loop.batch // launch.block_b),)](
        *_strided(loop.gates_x),
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
        *(results.saved.get(name) for name in _SAVED),
        *_sizes(loop),
        **_constants(loop, launch),
    )


def _backward_at_once(
    loop: Loop,
    kept: Kept,
    given: OutputGradients,
    found: LoopGradients,
    dnormed_c: Tensor | None,
    launch: Sequence,
) -> None:
    _kernels("recurrence").recurrence_backward[(-(-loop.batch // launch.block_b),)](
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
        *_strided(kept.y),
        *_strided(kept.c_all),
        *(kept.saved.get(name) for name in _SAVED[:-1]),
        *_strided(found.dgates_x),
        None if found.dproduct is found.dgates_x else found.dproduct,
        found.dprojected,
        dnormed_c,
        found.dh0,
        found.dc0,
        *_sizes(loop),
        **_constants(loop, launch),
    )


class _Steps:
    """Launches the kernels of single steps of one loop."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.kernels = _kernels("step")
        self.step = pick_step(loop.dtype)
        self.precision = _precision(loop)
        self.lengths = {"lengths": loop.lengths, "T": loop.steps, "B": loop.batch}
        resets, reset_t, reset_b = _resets(loop)
        self.resets = {"resets": resets, "reset_t": reset_t, "reset_b": reset_b}
        self.zoneout = {"probability": loop.zoneout, "threshold": int(loop.zoneout * 2**24), "ZONEOUT": _zoneout(loop)}
        self.words = dict(zip(("word_h", "word_c"), _words(loop), strict=True))
        self.staged = loop.cell == "gru_reset_before"
        # Layer norm needs a row's units in one tile; of small ones several rows.
        whole = _block(loop.hidden)
        rows = max(1, min(16, 2048 // whole))
        self.rows = Step(rows, whole, 16, min(32, max(4, rows * whole // 256)), 1)

    def multiply(
        self,
        t: int,
        a: Tensor | None,
        weight: Tensor,
        weight_strides: tuple[int, int],
        depth: int,
        width: int,
        *,
        one_step: bool = False,
        scale: Tensor | None = None,
        reset: bool = False,
    ) -> Tensor:
        """Rows of step t of a, or of a as that of one step, by a weight; zero where reset: float32 [B, width]."""
        loop, step = self.loop, self.step
        out = weight.new_empty(loop.batch, width, dtype=torch.float32)
        strides = (0, 0) if a is None else (0, a.stride(0)) if one_step else time_strides(a)
        self.kernels.multiply[(-(-loop.batch // step.block_b) * -(-width // step.block_n),)](
            a,
            *strides,
            scale,
            weight,
            *weight_strides,
            row_starts=None if one_step else loop.row_starts,
            out=out,
            t=t,
            N=width,
            K=depth,
            **self.lengths,
            **(self.resets if reset else {"resets": None, "reset_t": 0, "reset_b": 0}),
            BLOCK_B=step.block_b,
            BLOCK_N=step.block_n,
            BLOCK_K=step.block_k,
            PRECISION=self.precision,
            num_warps=step.warps,
            num_stages=step.stages,
            enable_fp_fusion=True,
        )
        return out

    def launch(self, name: str, t: int, width: int, **named: Any) -> None:
        """A kernel of step t, over so many units or outputs."""
        loop = self.loop
        if name.startswith("project"):
            step = self.step
            named |= {"word_h": self.words["word_h"], "P": width}
        else:
            step = self.step if _is_fused(loop) else self.rows
            named |= {"H": width, "P": loop.outputs, "CELL": loop.cell, **self.words}
            named |= {"BLOCK_K": step.block_k, "PRECISION": self.precision}
        getattr(self.kernels, name)[(-(-loop.batch // step.block_b) * -(-width // step.block_n),)](
            t=t,
            row_starts=loop.row_starts,
            **named,
            **self.lengths,
            **self.resets,
            **self.zoneout,
            BLOCK_B=step.block_b,
            BLOCK_N=step.block_n,
            num_warps=step.warps,
            num_stages=step.stages,
            enable_fp_fusion=True,
        )


def _forward_by_steps(loop: Loop, results: Results) -> None:
    steps = _Steps(loop)
    hidden, outputs, batch = loop.hidden, loop.outputs, loop.batch
    weight, by_rows = loop.weight_hh, (outputs, 1)
    keep = bool(results.saved)
    saved = {name: results.saved.get(name) for name in _SAVED}
    if steps.staged and not keep:
        saved["gates"] = weight.new_empty(batch, 3 * hidden)
    if loop.weight_hr is not None and not keep:
        saved["projected"] = weight.new_empty(batch, hidden)
    rh = weight.new_empty(batch, hidden) if steps.staged else None
    y = _strides("y", results.y)
    fixed = {
        **_strides("x", loop.gates_x, "gates_x"),
        "x": loop.x,
        "x_row": 0 if loop.x is None else loop.x.stride(1),
        "I": 0 if loop.x is None else loop.x.shape[2],
        "weight_ih": loop.weight_ih,
        "bias_ih": loop.bias_ih,
        "weight_hh": weight,
        "bias_hh": loop.bias_hh,
        **_parameters(loop, biases=True),
        **y,
        **_strides("c", results.c_all, "c_all"),
        **saved,
        "rh": rh,
        "KEEP": keep,
    }
    fed: dict[str, Any] = {"one_step": True, "scale": loop.recurrent_mask, "reset": True}
    states = [_States(loop), _States(loop)]
    h, c = loop.h0, loop.c0
    for index in range(loop.steps):
        t = loop.steps - 1 - index if loop.reverse else index
        after = states[index % 2]
        h_out, c_out = (results.h_n, results.c_n) if index == loop.steps - 1 else (after.h, after.c)
        step = functools.partial(
            steps.launch, "step_forward", t, hidden, h_in=h, c_in=c, h_out=h_out, c_out=c_out, **fixed
        )
        if steps.staged:
            step(STAGE=1, product=steps.multiply(t, h, weight, by_rows, outputs, 2 * hidden, **fed))
            step(STAGE=2, product=steps.multiply(t, rh, weight[2 * hidden :], by_rows, hidden, hidden, one_step=True))
        elif _is_fused(loop):
            step(STAGE=0, product=None)
        else:
            step(STAGE=0, product=steps.multiply(t, h, weight, by_rows, outputs, loop.gates * hidden, **fed))
        if loop.weight_hr is not None:
            m = saved["projected"]
            m = _of_rows(loop, m) if keep and m is not None else m
            product = steps.multiply(t, m, loop.weight_hr, (hidden, 1), hidden, outputs, one_step=not keep)
            steps.launch("project_forward", t, outputs, product=product, h_in=h, h_out=h_out, **y)
        h, c = h_out, c_out


def _backward_by_steps(
    loop: Loop, kept: Kept, given: OutputGradients, found: LoopGradients, dnormed_c: Tensor | None
) -> None:
    steps = _Steps(loop)
    hidden, outputs = loop.hidden, loop.outputs
    weight, by_columns = loop.weight_hh, (1, outputs)
    fused = _is_fused(loop) and loop.weight_hr is None
    depth = 2 * hidden if steps.staged else loop.gates * hidden  # of the product that gives the gradient of h
    dy, mask = _strides("dy", given.dy), {"mask": loop.recurrent_mask}
    fixed = {
        **dy,
        **_strides("dc_all", given.dc_all),
        **_parameters(loop, biases=False),
        "weight_hh": weight,
        "h0": loop.h0,
        "c0": loop.c0,
        **_strides("y", kept.y),
        **_strides("c", kept.c_all, "c_all"),
        **{name: kept.saved.get(name) for name in _SAVED[:-1]},
        **_strides("dx", found.dgates_x, "dgates_x"),
        "dproduct": None if found.dproduct is found.dgates_x else found.dproduct,
        "dnormed_c": dnormed_c,
        "direct_out": found.dh0,
        "dc_out": found.dc0,
        "REVERSE": loop.reverse,
    }
    direct, dc = given.dh_n, given.dc_n
    following: Tensor | None = None
    for index in range(loop.steps):
        t = index if loop.reverse else loop.steps - 1 - index
        dfed: Tensor | None = None
        dm: Tensor | None = None
        if following is not None and not fused:
            next_t = t - 1 if loop.reverse else t + 1
            dfed = steps.multiply(next_t, following, weight, by_columns, depth, outputs)
        if loop.weight_hr is not None:
            projected = _strides("p", found.dprojected, "dprojected")
            at_end = {"dfed": dfed, "direct": direct, "direct_out": found.dh0, "REVERSE": loop.reverse}
            steps.launch("project_backward", t, outputs, **at_end, **dy, **mask, **projected)
            dm = steps.multiply(t, found.dprojected, loop.weight_hr, (1, hidden), outputs, hidden)
            dfed = None
        step = functools.partial(
            steps.launch,
            "step_backward",
            t,
            hidden,
            following=following if fused else None,
            dfed=dfed,
            dm=dm,
            direct=direct,
            dc=dc,
            **fixed,
        )
        if steps.staged:
            step(STAGE=1, drh=None)
            dn = found.dproduct[..., 2 * hidden :]
            step(STAGE=2, drh=steps.multiply(t, dn, weight[2 * hidden :], by_columns, hidden, hidden))
        else:
            step(STAGE=0, drh=None)
        direct, dc, following = found.dh0, found.dc0, found.dproduct

    if loop.h0 is not None and found.dh0 is not None:
        dfed = steps.multiply(t, found.dproduct, weight, by_columns, depth, outputs)
        if loop.recurrent_mask is not None:
            dfed *= loop.recurrent_mask
        if loop.resets is not None:
            dfed.masked_fill_(loop.resets[t, :, None], 0)
        found.dh0 += dfed


class _States:
    """h and c between two steps, float32."""

    def __init__(self, loop: Loop) -> None:
        single = loop.steps == 1  # which goes from the initial to the final states
        like, batch = loop.weight_hh, loop.batch
        self.h = None if single else like.new_empty(batch, loop.outputs, dtype=torch.float32)
        lstm = loop.cell == "lstm" and not single
        self.c = like.new_empty(batch, loop.hidden, dtype=torch.float32) if lstm else None


def _parameters(loop: Loop, biases: bool) -> dict[str, Tensor | None]:
    """Of norms and peepholes, and the mask, as keywords."""
    (weight, bias), (weight_c, bias_c) = loop.norm_hh or (None, None), loop.norm_c or (None, None)
    found = {"norm_weight": weight, "norm_c_weight": weight_c, "norm_c_bias": bias_c, "peephole": loop.peephole}
    found |= {"norm_bias": bias} if biases else {}
    return {**found, "mask": loop.recurrent_mask}


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


def _strided(sequence: Tensor | None) -> tuple[Any, ...]:
    return (None, 0, 0) if sequence is None else (sequence, *time_strides(sequence))


def _strides(prefix: str, sequence: Tensor | None, name: str | None = None) -> dict[str, Any]:
    """A sequence and its strides, as keywords."""
    return dict(zip((name or prefix, f"{prefix}_t", f"{prefix}_b"), _strided(sequence), strict=True))


def _resets(loop: Loop) -> tuple[Any, ...]:
    return (None, 0, 0) if loop.resets is None else (loop.resets.view(torch.uint8), *loop.resets.stride())


def _zoneout(loop: Loop) -> int:
    return 0 if loop.zoneout == 0 else _ZONEOUT_EXPECTED if loop.zoneout_seed is None else _ZONEOUT_RANDOM


def _words(loop: Loop) -> tuple[int, int]:
    seed = loop.zoneout_seed
    return (0, 0) if seed is None else (_word(seed, 0), _word(seed, 1))


def _sizes(loop: Loop) -> tuple[Any, ...]:
    threshold = int(loop.zoneout * 2**24)
    return (loop.steps, loop.batch, loop.hidden, loop.outputs, loop.zoneout, threshold, *_words(loop))


def _precision(loop: Loop) -> str:
    return loop.precision if loop.dtype is torch.float32 else "ieee"


def _constants(loop: Loop, launch: Sequence) -> dict[str, Any]:
    return {
        "CELL": loop.cell,
        "REVERSE": loop.reverse,
        "ZONEOUT": _zoneout(loop),
        "BLOCK_B": launch.block_b,
        "BLOCK_H": _block(loop.hidden),
        "BLOCK_P": _block(loop.outputs),
        "PRECISION": _precision(loop),
        "LOAD_STAGES": launch.load_stages,
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
