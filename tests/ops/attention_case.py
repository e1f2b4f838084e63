"""Calls of the operator `attention`, and what a back end makes of them: outputs and all gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastrnn.backends import AttentionCall
from fastrnn.backends.attention.call import key_factors
from fastrnn.ops.attention import decide, run_on
from tests.accuracy import assert_as_accurate_over
from tests.ops.case import LAYOUTS

SCORES = ("inner", "additive", "factors", "location")  # "factors": additive by the factors of the keys
OPTIONS = ("lengths", "mask", "query_mask", "causal", "length")  # "length": normalize="length"
OUTPUTS = ("context", "weights")


@dataclass(frozen=True)
class AttentionCase:
    """One call but for its numbers, which `draw` gives."""

    score: str
    memories: int
    queries: int
    keys: int
    size: int
    values: int | None = 6  # the size of a value; None: the keys are the values
    options: tuple[str, ...] = ()
    channels: int = 3
    spread: float = 1.0  # of queries and keys
    layout: str = "contiguous"
    outputs: tuple[str, ...] = OUTPUTS  # that have a gradient
    needs: tuple[str, ...] | None = None  # inputs whose gradients are wanted; None: all
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = (f for f in fields(self)[6:] if getattr(self, f.name) != f.default)
        shape = f"{self.memories}x{self.queries}x{self.keys}x{self.size}x{self.values}"
        return "-".join([self.score, shape, *(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in changed)])

    def draw(self, seed: int = 0) -> tuple[AttentionCall, dict[str, Tensor]]:
        """A call with random numbers, and a gradient for each output."""
        generator = torch.Generator().manual_seed(seed)
        memories, queries, keys, size = self.memories, self.queries, self.keys, self.size
        lay_out = LAYOUTS[self.layout]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return lay_out((scale * torch.randn(shape, generator=generator)).to(self.dtype))

        call = AttentionCall(
            normal(memories, queries, size, scale=self.spread),
            normal(memories, keys, size, scale=self.spread),
            None if self.values is None else normal(memories, keys, self.values),
            causal="causal" in self.options,
            normalize="length" if "length" in self.options else "softmax",
        )
        if self.score == "inner":
            call.scale = 1 / math.sqrt(size)
        else:
            call.v = normal(size, scale=3 / math.sqrt(max(1, size)))
        if self.score == "factors":
            call.factors = lay_out(key_factors(call.keys))
        if self.score == "location":
            call.features = normal(memories, queries, keys, self.channels)
            call.feature_weight = normal(size, self.channels, scale=0.5)
        if "lengths" in self.options:
            call.lengths = torch.randint(0, keys + 1, (memories,), generator=generator)
            call.lengths[memories // 2 :][:1] = keys
            call.lengths[memories // 2 + 1 :][:1] = 0
            call.lengths = lay_out(call.lengths)
        if "mask" in self.options:
            call.mask = lay_out(torch.rand(memories, keys, generator=generator) < 0.7)
        elif "query_mask" in self.options:
            call.mask = lay_out(torch.rand(memories, queries, keys, generator=generator) < 0.7)
        shapes = {"context": (memories, queries, self.values or size), "weights": (memories, queries, keys)}
        return call, {name: normal(*shape) for name, shape in shapes.items() if name in self.outputs}


def with_tensors(call: AttentionCall, convert: Callable[[Tensor], Tensor]) -> AttentionCall:
    """The call with other floating tensors."""
    return replace(call, **{name: convert(tensor) for name, tensor in call.tensors().items()})


def on_device(call: AttentionCall, device: str) -> AttentionCall:
    rest = {name: getattr(call, name) for name in ("factors", "lengths", "mask")}
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in rest.items()}
    return replace(with_tensors(call, lambda tensor: tensor.to(device)), **moved)


def run(
    call: AttentionCall, backend: str, gradients: Mapping[str, Tensor], needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The outputs, and gradients of the inputs that `needs` names, by default all, as "d" and the input's name."""
    call = with_tensors(call, Tensor.detach)
    wanted = {name: x.requires_grad_() for name, x in call.tensors().items() if needs is None or name in needs}
    outputs = dict(zip(OUTPUTS, run_on(call, decide(call, backend)), strict=True))
    given = {name: gradient for name, gradient in gradients.items() if outputs[name].requires_grad}
    found = torch.autograd.grad(
        [outputs[name] for name in given], list(wanted.values()), list(given.values()), allow_unused=True
    )
    for (name, x), gradient in zip(wanted.items(), found, strict=True):
        outputs[f"d{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return {name: out.detach() for name, out in outputs.items()}


Runner = Callable[[AttentionCall, Mapping[str, Tensor], tuple[str, ...] | None], dict[str, Tensor]]


def assert_results_as_accurate(case: AttentionCase, runner: Runner, most_draws: int = 8) -> None:
    """Every output and gradient that the runner gives is within the bound of tests/accuracy.py."""
    draws = []
    # The largest error of few numbers is a matter of luck, so that small shapes are drawn several times.
    size = case.memories * case.queries * case.keys * case.size
    for seed in range(max(1, min(most_draws, 100000 // max(1, size)))):
        call, gradients = case.draw(seed)
        doubled = {name: gradient.double() for name, gradient in gradients.items()}
        exact = run(with_tensors(call, Tensor.double), "reference", doubled, case.needs)
        torchs = run(call, "reference", gradients, case.needs)
        draws.append((runner(call, gradients, case.needs), torchs, exact))
    assert_as_accurate_over(draws)
