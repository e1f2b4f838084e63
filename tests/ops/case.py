"""Calls of the operator, spelled out or drawn, and what a back end makes of them: outputs and all gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import RecurrenceCall, cpu, native
from fastrnn.ops.recurrence import check, run_on
from fastrnn.reference import CELLS
from tests.accuracy import assert_as_accurate_over

LIBRARY: Any = native.load()
ISAS: list[str] = LIBRARY.cpu_isas() if LIBRARY else []
OUTPUTS = ("y", "h_n", "c_n", "c_all")

# The options of a call, as RecurrenceCall.options() names them, and the cells that have them.
OPTIONS = {
    "lengths": tuple(CELLS),
    "resets": tuple(CELLS),
    "zoneout": tuple(CELLS),
    "recurrent_mask": tuple(CELLS),
    "layer_norm": tuple(CELLS),
    "layer_norm_c": ("lstm",),
    "peephole": ("lstm",),
    "reset_after=False": ("gru",),
    "return_cell_states": ("lstm",),
    "proj_size": ("lstm",),  # weight_hr
}

# The cells as kernels tell them apart, and the option that does.
ALL_CELLS = [*((cell, ()) for cell in CELLS), ("gru", ("reset_after=False",))]


def _transposed(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _offset(x: Tensor) -> Tensor:
    inner = tuple(slice(1, n + 1) for n in x.shape)
    surrounding = x.new_full([n + 3 for n in x.shape], math.nan if x.is_floating_point() else 1)
    surrounding[inner] = x
    return surrounding[inner]


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x) if x.dim() == 3 else x[:1].expand_as(x)


# Where a tensor's elements lie in memory; "expanded" makes rows equal too.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
}


@dataclass(frozen=True)
class Case:
    """One call of the operator but for its numbers, which `draw` gives."""

    cell: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    options: tuple[str, ...] = ()
    biases: tuple[str, ...] = ("bias_ih", "bias_hh")
    states: tuple[str, ...] = ("h0", "c0")
    project: bool = True  # False: gates_x in place of x and weight_ih
    packed: bool = False
    reverse: bool = False
    longest: int | None = None  # of the lengths, at most T; None: T
    zoneout_seed: int | None = 12345678901234
    layout: str = "contiguous"
    outputs: tuple[str, ...] = OUTPUTS  # that have a gradient
    needs: tuple[str, ...] | None = None  # inputs whose gradients are wanted; None: all that kernels have
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = (f for f in fields(self)[5:] if getattr(self, f.name) != f.default)
        shape = f"{self.steps}x{self.batch}x{self.inputs}x{self.hidden}"
        return "-".join([self.cell, shape, *(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed)])

    def draw(self, seed: int = 0) -> tuple[RecurrenceCall, dict[str, Tensor]]:
        """A call with random numbers, and a gradient for each output."""
        generator = torch.Generator().manual_seed(seed)
        rows = CELLS[self.cell].gates * self.hidden
        projected = max(1, self.hidden // 2) if "proj_size" in self.options else self.hidden
        lay_out = LAYOUTS[self.layout]

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return lay_out((mean + scale * torch.randn(shape, generator=generator)).to(self.dtype))

        def uniform(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(max(1, self.hidden))
            return lay_out(((2 * torch.rand(shape, generator=generator) - 1) * bound).to(self.dtype))

        # Random weights under layer norms with gains of 1 make a chaotic map, whose errors are a matter of luck.
        def norm(size: int) -> tuple[Tensor, Tensor]:
            return normal(size, scale=0.1, mean=0.4), normal(size, scale=0.1)

        longest = self.steps if self.longest is None else min(self.longest, self.steps)
        # Not by the seed: packed results of several draws must have one shape.
        lengths = torch.randint(0, longest + 1, (self.batch,), generator=torch.Generator().manual_seed(1))
        lengths[self.batch // 2 :][:1] = longest
        batch_sizes = None
        leading: tuple[int, ...] = (self.steps, self.batch)
        if self.packed:
            sequence_ends = lengths.clamp(min=1).sort(descending=True).values
            batch_sizes = (torch.arange(self.steps)[:, None] < sequence_ends).sum(1)
            leading = (int(batch_sizes.sum()),)
        call = RecurrenceCall(
            self.cell,
            normal(*leading, self.inputs if self.project else rows),
            uniform(rows, self.inputs) if self.project else None,
            uniform(rows, projected),
            uniform(rows) if "bias_ih" in self.biases and self.project else None,
            uniform(rows) if "bias_hh" in self.biases else None,
            h0=normal(self.batch, projected) if "h0" in self.states else None,
            c0=normal(self.batch, self.hidden) if "c0" in self.states and self.cell == "lstm" else None,
            batch_sizes=batch_sizes,
            reverse=self.reverse,
        )
        gradients = {"y": normal(*leading, projected), "h_n": normal(self.batch, projected)}
        if CELLS[self.cell].has_cell_state:
            gradients["c_n"] = normal(self.batch, self.hidden)
        for option in self.options:
            if option == "lengths":
                call.lengths = lay_out(lengths)
            elif option == "resets":
                call.resets = lay_out(torch.rand(self.steps, self.batch, generator=generator) < 0.3)
            elif option == "zoneout":
                call.zoneout, call.zoneout_seed = 0.3, self.zoneout_seed
            elif option == "recurrent_mask":
                kept = torch.rand(self.batch, projected, generator=generator) < 0.7
                call.recurrent_mask = lay_out((kept / 0.7).to(self.dtype))
            elif option == "layer_norm":
                call.layer_norm_hh = norm(rows)
                call.layer_norm_ih = norm(rows) if self.project else None
            elif option == "layer_norm_c":
                call.layer_norm_c = norm(self.hidden)
            elif option == "peephole":
                call.peephole = uniform(3 * self.hidden)
            elif option == "reset_after=False":
                call.reset_after = False
            elif option == "return_cell_states":
                call.return_cell_states = True
                gradients["c_all"] = normal(*leading, self.hidden)
            elif option == "proj_size":
                call.weight_hr = uniform(projected, self.hidden)
        return call, {name: gradient for name, gradient in gradients.items() if name in self.outputs}


# Arguments of a Case, apart from shapes, dtypes and options.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "no_states": {"states": ()},
    "h0_only": {"states": ("h0",)},
    "c0_only": {"states": ("c0",)},
    "no_biases": {"biases": ()},
    "bias_ih_only": {"biases": ("bias_ih",)},
    "bias_hh_only": {"biases": ("bias_hh",)},
    "reverse": {"reverse": True},
    "gates_x": {"project": False},
    "packed": {"packed": True},
    "packed_reverse": {"packed": True, "reverse": True},
    "packed_gates_x": {"packed": True, "project": False},
    "dy_only": {"outputs": ("y",)},
    "dh_n_only": {"outputs": ("h_n",)},
    "dc_n_only": {"outputs": ("c_n",)},
    "needs_x": {"needs": ("x",)},
    "needs_h0": {"needs": ("h0",)},
    "needs_weight_ih": {"needs": ("weight_ih",)},
    "needs_weight_hh": {"needs": ("weight_hh",)},
    "needs_biases": {"needs": ("bias_ih", "bias_hh")},
    "zoneout_expected": {"options": ("zoneout",), "zoneout_seed": None},
    "short_lengths_reverse": {"options": ("lengths", "resets"), "longest": 3, "reverse": True},
    **{layout: {"layout": layout} for layout in LAYOUTS if layout != "contiguous"},
}
CELLS_AND_ARGUMENTS = [
    (cell, name) for cell in CELLS for name in ARGUMENTS if cell == "lstm" or name not in ("c0_only", "dc_n_only")
]


@st.composite
def cases(draw: st.DrawFn, options_of: Callable[[str], tuple[str, ...]], dtypes: Sequence[torch.dtype]) -> Case:
    """Any case with the options that a back end has for a cell."""
    cell = draw(st.sampled_from(list(CELLS)))
    packed = draw(st.booleans())
    dtype = draw(st.sampled_from(dtypes))
    small, odd = st.integers(1, 6), st.sampled_from([1, 7, 15, 17, 33, 64, 129])
    available = [option for option in options_of(cell) if not (packed and option == "lengths")]
    names = ["x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0", "c0"]
    steps = draw(small | st.sampled_from([1, 12]))
    options = tuple(option for option in available if draw(st.booleans()))
    batch, inputs, hidden, layouts = draw(small | odd), draw(small | odd), draw(small | odd), list(LAYOUTS)
    if {"layer_norm", "layer_norm_c"} & set(options):
        # Equal numbers have no deviation, and the norm of few is little but their signs: mere rounding error. In
        # float16 the yardstick, which squares small numbers, is NaN at times.
        hidden = max(hidden, 15)
        layouts.remove("expanded")
        dtype = torch.float32 if dtype is torch.float16 else dtype
    return Case(
        cell,
        steps,
        batch,
        inputs,
        hidden,
        options,
        biases=draw(st.sampled_from([("bias_ih", "bias_hh"), ("bias_ih",), ("bias_hh",), ()])),
        states=draw(st.sampled_from([("h0", "c0"), ("h0",), ("c0",), ()])),
        project=draw(st.booleans()),
        packed=packed,
        reverse=draw(st.booleans()),
        longest=None if packed else draw(st.integers(0, steps)),
        zoneout_seed=draw(st.none() | st.integers(0, 2**63 - 1)),
        layout=draw(st.sampled_from(layouts)),
        outputs=draw(st.sampled_from([OUTPUTS, ("y",), ("h_n", "c_n"), ("y", "c_n"), ("y", "c_all")])),
        needs=draw(st.none() | st.sets(st.sampled_from(names), min_size=1).map(lambda some: tuple(sorted(some)))),
        dtype=dtype,
    )


def with_tensors(call: RecurrenceCall, tensors: Mapping[str, Tensor]) -> RecurrenceCall:
    """The call with other floating tensors, under the names that RecurrenceCall.tensors gives them."""
    norms = {name[:-3]: (tensor, tensors[f"{name[:-3]}[1]"]) for name, tensor in tensors.items() if name[-3:] == "[0]"}
    return replace(call, **{name: tensor for name, tensor in tensors.items() if name[-1] != "]"}, **norms)  # type: ignore[arg-type]


def with_rows(call: RecurrenceCall, rows: Sequence[int]) -> RecurrenceCall:
    """The call with these rows of the batch. Not packed."""
    per_row = {name: getattr(call, name) for name in ("h0", "c0", "recurrent_mask", "lengths")}
    return replace(
        call,
        x=call.x[:, rows],
        resets=None if call.resets is None else call.resets[:, rows],
        **{name: None if tensor is None else tensor[rows] for name, tensor in per_row.items()},
    )


def converted(call: RecurrenceCall, dtype: torch.dtype) -> RecurrenceCall:
    return with_tensors(call, {name: tensor.to(dtype) for name, tensor in call.tensors().items()})


def on_device(call: RecurrenceCall, device: torch.device | str) -> RecurrenceCall:
    moved = with_tensors(call, {name: tensor.to(device) for name, tensor in call.tensors().items()})
    lengths = None if call.lengths is None else call.lengths.to(device)
    return replace(moved, lengths=lengths, resets=None if call.resets is None else call.resets.to(device))


def forward(call: RecurrenceCall, backend: str) -> dict[str, Tensor]:
    """The outputs that the call has, by name."""
    named = zip(OUTPUTS, run_on(check(call), backends.choose(call, backend)), strict=True)
    return {name: out for name, out in named if out is not None and (name != "c_all" or call.return_cell_states)}


def run(
    call: RecurrenceCall, backend: str, gradients: Mapping[str, Tensor], needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Outputs, and gradients of the inputs that `needs` names as "d" and the input's name.

    None: of all but recurrent_mask, whose gradient only the reference has.
    """
    inputs = {name: tensor.detach() for name, tensor in call.tensors().items()}
    needs = needs or tuple(name for name in inputs if name != "recurrent_mask")
    wanted = {name: tensor.requires_grad_() for name, tensor in inputs.items() if name in needs}
    outputs = forward(with_tensors(call, inputs), backend)
    # With T = 0 some outputs of the reference depend on nothing.
    given = {name: gradient for name, gradient in gradients.items() if outputs[name].requires_grad}
    if wanted and given:
        found = torch.autograd.grad(
            [outputs[name] for name in given], list(wanted.values()), list(given.values()), allow_unused=True
        )
        for (name, tensor), gradient in zip(wanted.items(), found, strict=True):
            outputs[f"d{name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: out.detach() for name, out in outputs.items()}


def poison_scratch(floats: int = 1 << 16) -> None:
    """Fills the memory that the kernels are about to reuse with NaN, so that reading before writing shows."""
    blocks, size = [], 16
    while size < floats:
        blocks += [LIBRARY.Workspace(size) for _ in range(4)]
        size = size * 4 // 3
    for block in blocks:
        torch.frombuffer(block, dtype=torch.float32).fill_(math.nan)


@contextlib.contextmanager
def using_isa(name: str) -> Iterator[None]:
    before = LIBRARY.cpu_isa()
    LIBRARY.use_cpu_isa(name)
    try:
        yield
    finally:
        LIBRARY.use_cpu_isa(before)


Runner = Callable[[RecurrenceCall, Mapping[str, Tensor], tuple[str, ...] | None], dict[str, Tensor]]


def assert_results_as_accurate(case: Case, runners: Mapping[str, Runner], most_draws: int = 16) -> None:
    """Every output and gradient that the runners give is within the bound of tests/accuracy.py."""
    draws = []
    # The largest error of few numbers is a matter of luck, so that small shapes are drawn several times; so is that of
    # rows that a layer norm with a small deviation magnifies.
    fewest = 4 if {"layer_norm", "layer_norm_c"} & set(case.options) else 1
    size = case.steps * case.batch * min(case.inputs, case.hidden)
    for seed in range(max(fewest, min(most_draws, 5000 // max(1, size)))):
        call, gradients = case.draw(seed)
        doubled = {name: gradient.double() for name, gradient in gradients.items()}
        exact = run(converted(call, torch.float64), "reference", doubled, case.needs)
        torchs = run(call, "reference", gradients, case.needs)
        ours = {name: runner(call, gradients, case.needs) for name, runner in runners.items()}
        draws.append((ours, dict.fromkeys(runners, torchs), dict.fromkeys(runners, exact)))
    assert_as_accurate_over(draws)


def assert_kernels_as_accurate(case: Case, isas: Sequence[str] = ISAS) -> None:
    """The CPU kernels' results are, on every instruction set."""

    def on(isa: str) -> Runner:
        def runner(call: RecurrenceCall, gradients: Mapping[str, Tensor], needs: Any) -> dict[str, Tensor]:
            with using_isa(isa):
                poison_scratch()
                return run(call, "cpu", gradients, needs)

        return runner

    assert_results_as_accurate(case, {isa: on(isa) for isa in isas})


def options_of(cell: str) -> tuple[str, ...]:
    return tuple(option for option, cells in OPTIONS.items() if cell in cells)


def kernel_options(cell: str) -> tuple[str, ...]:
    """The options of this cell that the kernels have."""
    return tuple(
        option
        for option, cells in OPTIONS.items()
        if cell in cells and not cpu.reasons_against(Case(cell, 2, 2, 2, 2, (option,)).draw()[0])
    )


# The dtypes that the kernels have.
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if LIBRARY and not cpu.reasons_against(Case("rnn_tanh", 2, 2, 2, 2, dtype=dtype).draw()[0])
]
