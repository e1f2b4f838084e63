"""What is timed: shapes, cells, modes and dtypes, and the least arithmetic and memory traffic of each case."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch


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
DTYPES = {"fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One row of the results: a cell (tanh for "rnn") at one shape, in one mode and dtype."""

    cell: str
    shape: str
    mode: str
    dtype: str = "fp32"

    @property
    def id(self) -> str:
        return f"{self.cell}-{self.shape}-{self.mode}-{self.dtype}"

    @property
    def size(self) -> Shape:
        return (STEP_SHAPES if self.mode == "step" else SHAPES)[self.shape]

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products; the pointwise part is not counted.

        The backward pass has two products for each one of the forward pass: towards the input and towards the weight.
        """
        batch, steps, input_size, hidden_size = self.size
        forward = 2 * steps * batch * GATES[self.cell] * hidden_size * (input_size + hidden_size)
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


def all_cases() -> list[Case]:
    return [
        Case(cell, shape, mode, dtype)
        for shape in (*SHAPES, *STEP_SHAPES)
        for cell in GATES
        for dtype in DTYPES
        for mode in (("step",) if shape in STEP_SHAPES else ("forward", "training"))
    ]


def chosen_cases() -> list[Case]:
    """All cases, or those of the shapes in FASTRNN_BENCH_SHAPES=a,c; ValueError where it names an unknown shape."""
    chosen = os.environ.get("FASTRNN_BENCH_SHAPES")
    known = [*SHAPES, *STEP_SHAPES]
    names = known if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"FASTRNN_BENCH_SHAPES must name shapes out of {', '.join(known)}, got {name!r}")
    return [case for case in all_cases() if case.shape in names]
