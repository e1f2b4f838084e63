"""What is timed: shapes, cells, modes and dtypes, and the least arithmetic and memory traffic of each case."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    batch: int  # B
    steps: int  # T
    input_size: int  # I
    hidden_size: int  # H


# a and b are bound by reading weight_hh every step, from L2 and from L3; c, d and e by arithmetic.
SHAPES = {
    "a": Shape(1, 100, 256, 256),
    "b": Shape(1, 100, 1024, 1024),
    "c": Shape(16, 100, 512, 512),
    "d": Shape(64, 50, 1024, 1024),
    "e": Shape(128, 50, 256, 256),
}
# One call of an RNNCell, LSTMCell or GRUCell: what a streaming program or a decoder waits for.
STEP_SHAPES = {"step1": Shape(1, 1, 256, 256), "step16": Shape(16, 1, 256, 256)}

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
# forward: inference, no gradients. training: forward, then backward to the input and every weight. step: a cell's call.
MODES = ("forward", "training", "step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
CPU_DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Variant:
    """A cell with one of the options that torch.nn does not have, or with sequences of unequal length."""

    title: str  # as the report calls it
    options: Mapping[str, Any] = field(default_factory=dict)  # of the module's constructor
    # What forward gets besides x: "lengths" of 1..T, "full_lengths" of T, "resets"; or, in place of x, "packed", a
    # PackedSequence with the same lengths.
    given: str | None = None
    cells: Sequence[str] = ("lstm", "gru")
    modes: Sequence[str] = ("forward", "training")


# Drop-outs do nothing in evaluation.
VARIANTS = {
    "lengths": Variant("`lengths` of 1 to T", given="lengths"),
    "full_lengths": Variant("`lengths`, all T", given="full_lengths"),
    "packed": Variant("`PackedSequence`, lengths of 1 to T", given="packed"),
    "resets": Variant("`resets` at 2 % of the steps", given="resets"),
    "zoneout": Variant("`zoneout=0.1`", {"zoneout": 0.1}),
    "recurrent_dropout": Variant("`recurrent_dropout=0.2`", {"recurrent_dropout": 0.2}, modes=("training",)),
    "weight_dropout": Variant("`weight_dropout=0.2`", {"weight_dropout": 0.2}, modes=("training",)),
    "layer_norm": Variant("`layer_norm=True`", {"layer_norm": True}),
    "peephole": Variant("`peephole=True`", {"peephole": True}, cells=("lstm",)),
    "reset_before": Variant("`reset_after=False`", {"reset_after": False}, cells=("gru",)),
}
VARIANT_SHAPE = "c"


@dataclass(frozen=True)
class Case:
    """One row of the results: a cell (tanh for "rnn") at one shape, in one mode and dtype, plain or a variant."""

    cell: str
    shape: str
    mode: str
    dtype: str = "fp32"
    variant: str | None = None

    @property
    def id(self) -> str:
        return "-".join([self.cell, self.shape, self.mode, self.dtype, *([self.variant] if self.variant else [])])

    @property
    def baseline(self) -> tuple[str, Case] | None:
        """The case, and its name in a row, that fastrnn is compared with itself in: a variant with the plain cell, a
        narrower dtype with fp32."""
        if self.variant:
            return "plain", replace(self, variant=None)
        return None if self.dtype == "fp32" else ("fp32", replace(self, dtype="fp32"))

    @property
    def given(self) -> str | None:
        return VARIANTS[self.variant].given if self.variant else None

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number of the dtype; for tf32, that of the factors of its products."""
        return 2.0**-10 if self.dtype == "tf32" else torch.finfo(DTYPES[self.dtype]).eps

    @property
    def lengths(self) -> Tensor:
        """Steps of each sequence, [B]."""
        batch, steps, *_ = self.size
        if self.given not in ("lengths", "packed"):
            return torch.full((batch,), steps)
        return torch.randint(1, steps + 1, (batch,), generator=torch.Generator().manual_seed(0))

    @property
    def size(self) -> Shape:
        return (STEP_SHAPES if self.mode == "step" else SHAPES)[self.shape]

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products; the pointwise part is not counted.

        The backward pass has two products for each one of the forward pass: towards the input and towards the weight.
        """
        *_, input_size, hidden_size = self.size
        forward = 2 * int(self.lengths.sum()) * GATES[self.cell] * hidden_size * (input_size + hidden_size)
        return 3 * forward if self.mode == "training" else forward

    @property
    def weight_bytes(self) -> int:
        """Size of weight_hh, which every time step needs whole."""
        hidden_size = self.size.hidden_size
        return GATES[self.cell] * hidden_size * hidden_size * DTYPES[self.dtype].itemsize

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weight_hh read over all steps, once each by the forward and by the backward loop."""
        return self.weight_bytes * self.size.steps * (2 if self.mode == "training" else 1)

    @property
    def bound(self) -> str:
        """What bounds the time from below: "weights" to read at B = 1, "arithmetic", or "latency" of a single step."""
        if self.mode == "step":
            return "latency"
        return "weights" if self.size.batch == 1 else "arithmetic"


@dataclass(frozen=True)
class SizedCase(Case):
    """A case whose `shape` is B x T x I x H, as "16x64x256x256"."""

    @property
    def size(self) -> Shape:
        return Shape(*map(int, self.shape.split("x")))


def sequence_cases() -> list[Case]:
    return [
        Case(cell, shape, mode, dtype)
        for shape in SHAPES
        for cell in GATES
        for dtype in CPU_DTYPES
        for mode in ("forward", "training")
    ]


def step_cases() -> list[Case]:
    return [Case(cell, shape, "step") for shape in STEP_SHAPES for cell in GATES]


def variant_cases() -> list[Case]:
    return [
        Case(cell, VARIANT_SHAPE, mode, "fp32", name)
        for cell in GATES
        for name, variant in VARIANTS.items()
        if cell in variant.cells
        for mode in variant.modes
    ]


MIDDLE = Shape(16, 64, 256, 256)
# What the time is drawn against: one size varies, the others are those of MIDDLE.
SCALING = {
    "T": {steps: MIDDLE._replace(steps=steps) for steps in (4, 16, 64, 256, 1024)},
    "B": {batch: MIDDLE._replace(batch=batch) for batch in (1, 4, 16, 64, 256)},
    "H": {size: MIDDLE._replace(input_size=size, hidden_size=size) for size in (64, 128, 256, 512, 1024)},
}


def scaling_case(cell: str, shape: Shape, mode: str) -> SizedCase:
    return SizedCase(cell, "x".join(map(str, shape)), mode)


def scaling_cases() -> list[SizedCase]:
    shapes = dict.fromkeys(shape for line in SCALING.values() for shape in line.values())
    return [
        scaling_case(cell, shape, mode)
        for shape in shapes
        for cell in ("lstm", "gru")
        for mode in ("forward", "training")
    ]


@dataclass(frozen=True)
class AttentionCase:
    """One row of attention's results, in fp32: a step of decoding, training, or a decoder's whole loop.

    modes: "weights" of a step, without the context; "step"; "training", forward and backward to every input; "loop",
    that of an LSTM decoder with teacher forcing, I = H = D; "self", forward.
    """

    title: str  # as the report calls it
    id: str
    score: str
    mode: str
    memories: int  # B
    keys: int  # Tk
    size: int  # D, and of the values
    queries: int = 1  # Tq, of the loop its steps T
    beams: int = 1  # queries that share a memory
    factors: bool = False  # e^{2k} was prepared
    heads: int = 1
    baseline: None = None
    dtype: str = "fp32"
    eps: float = torch.finfo(torch.float32).eps

    @property
    def shape(self) -> str:
        """What --shapes calls it."""
        return self.id.partition("-")[2]

    @property
    def bound(self) -> str:
        """A step is bound by reading keys and values, everything else by what it computes, in no simple unit."""
        return "weights" if self.mode in ("weights", "step") else "latency"

    @property
    def weight_bytes(self) -> int:
        """Bytes of keys and values that are read, once where they are the same tensor."""
        matrices = 2 if self.mode == "step" and self.score == "additive" else 1
        return 4 * matrices * self.memories * self.keys * self.size

    streamed_bytes = weight_bytes


_DECODE = {"memories": 80, "keys": 50, "size": 1000}
_BEAMS = {"memories": 16, "keys": 50, "size": 1000, "beams": 5}
_TRAINING = {"memories": 16, "queries": 50, "keys": 50, "size": 512}
ATTENTION_CASES = [
    AttentionCase(
        "additive weights, keys prepared", "attention-weights-factors", "additive", "weights", **_DECODE, factors=True
    ),
    AttentionCase("additive weights, tanh itself", "attention-weights-tanh", "additive", "weights", **_DECODE),
    AttentionCase(
        "additive step, keys prepared", "attention-step-additive", "additive", "step", **_DECODE, factors=True
    ),
    AttentionCase("dot step", "attention-step-dot", "dot", "step", **_DECODE),
    AttentionCase("general step", "attention-step-general", "general", "step", **_DECODE),
    AttentionCase("additive step, 5 beams", "attention-beams-additive", "additive", "step", **_BEAMS, factors=True),
    AttentionCase("dot step, 5 beams", "attention-beams-dot", "dot", "step", **_BEAMS),
    AttentionCase("location step", "attention-step-location", "location", "step", memories=32, keys=200, size=128),
    AttentionCase("additive training", "attention-training-additive", "additive", "training", **_TRAINING),
    AttentionCase("dot training", "attention-training-dot", "dot", "training", **_TRAINING),
    AttentionCase(
        "self-attention, 8 heads",
        "attention-self",
        "scaled_dot",
        "self",
        memories=8,
        queries=256,
        keys=256,
        size=512,
        heads=8,
    ),
    AttentionCase(
        "LSTM decoder, additive, whole loop, training",
        "attention-loop",
        "additive",
        "loop",
        memories=32,
        queries=40,
        keys=40,
        size=512,
    ),
]


@dataclass(frozen=True)
class SearchCase:
    """One row of search's results, in fp32.

    modes: "select": the 10 best of 5 rows each by log-softmax and score; "decode": a search by an LSTM decoder,
    5 beams; "overhead": the same against its forward passes; "finishing": those
    that end one after the other, after 5 to 50 steps, against searches over those that are left.
    """

    title: str  # as the report calls it
    id: str
    mode: str
    vocabulary: int
    rows: int = 0  # of the selection
    batch: int = 0
    size: int = 512
    layers: int = 2
    attention: bool = True
    steps: int = 40
    baseline: None = None
    dtype: str = "fp32"
    eps: float = torch.finfo(torch.float32).eps

    @property
    def shape(self) -> str:
        """What --shapes calls it."""
        return self.id.partition("-")[2]

    @property
    def bound(self) -> str:
        """A selection is bound by reading the logits, a search by what it computes, in no simple unit."""
        return "weights" if self.mode == "select" else "latency"

    @property
    def weight_bytes(self) -> int:
        """Bytes of logits."""
        return 4 * self.rows * self.vocabulary

    streamed_bytes = weight_bytes


AnyCase = Case | AttentionCase | SearchCase
SEARCH_CASES = [
    *(
        SearchCase(f"select, {rows} rows of 32000", f"search-select-{rows}", "select", 32000, rows)
        for rows in (5, 40, 160, 768)
    ),
    SearchCase("decode, B = 1, V = 8000, 2 x 512", "search-decode-1", "decode", 8000, batch=1),
    SearchCase("decode, B = 16, V = 8000, 2 x 512", "search-decode-16", "decode", 8000, batch=16),
    SearchCase(
        "decode, B = 1, V = 80000, 4 x 1000, no attention",
        "search-decode-large",
        "decode",
        80000,
        batch=1,
        size=1000,
        layers=4,
        attention=False,
        steps=10,
    ),
    SearchCase("search, B = 16, V = 32000, 1 x 512", "search-overhead", "overhead", 32000, batch=16, layers=1),
    SearchCase("lengths 5 to 50, B = 16, V = 8000, 2 x 512", "search-finishing", "finishing", 8000, batch=16),
]


SUITES: dict[str, Sequence[AnyCase]] = {
    "recurrence": sequence_cases(),
    "steps": step_cases(),
    "variants": variant_cases(),
    "attention": ATTENTION_CASES,
    "search": SEARCH_CASES,
    "scaling": scaling_cases(),
}


def all_cases() -> list[AnyCase]:
    return [case for cases in SUITES.values() for case in cases]


def chosen(suites: str | None, shapes: str | None) -> list[AnyCase]:
    """The cases of these suites and shapes, names with commas between them; None stands for all.

    Raises ValueError for a name that does not exist, or that none of these suites has.
    """
    cases = [case for suite in _names("--suite", suites, SUITES) for case in SUITES[suite]]
    names = _names("--shapes", shapes, dict.fromkeys(case.shape for case in cases))
    return [case for case in cases if case.shape in names]


def _names(option: str, given: str | None, known: Iterable[str]) -> list[str]:
    names = list(known) if given is None else given.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must name some of {', '.join(known)}, got {name!r}")
    return names
