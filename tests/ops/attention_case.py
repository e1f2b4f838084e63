"""Calls of the operator attention, spelled out or drawn, and what a back end makes of them: results and gradients."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastrnn.ops import attention, key_factors
from tests.accuracy import assert_as_accurate_over

SCORES = ("dot", "scaled_dot", "general", "additive", "location")
SEEN = ("all", "lengths", "mask", "mask_per_query", "causal")


@dataclass(frozen=True)
class AttentionCase:
    """One call of the operator but for its numbers, which `draw` gives."""

    score: str = "dot"
    memories: int = 2
    beams: int = 1  # batches of queries that share a memory
    queries: int = 3
    keys: int = 5
    size: int = 7
    value_size: int | None = 6  # None: the values are the keys
    channels: int = 3
    normalize: str = "softmax"
    seen: str = "all"
    factors: bool = False
    spread: float = 1.0  # of what tanh is taken of
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )

    def draw(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], tuple[Tensor, Tensor]]:
        """Tensors, options, and gradients of context and weights."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = (scale * torch.randn(shape, generator=generator)).to(self.dtype)
            return torch.stack([drawn, drawn], -1)[..., 0] if self.strided else drawn

        batch = self.memories * self.beams
        queries = self.keys if self.seen == "causal" else self.queries
        additive = self.score in ("additive", "location")
        spread = self.spread if additive else 1.0
        tensors = {
            "query": normal(batch, queries, self.size, scale=spread),
            "keys": normal(self.memories, self.keys, self.size, scale=spread),
        }
        if self.value_size is not None:
            tensors["values"] = normal(self.memories, self.keys, self.value_size)
        if self.score == "general":
            tensors["weight"] = normal(self.size, self.size, scale=self.size**-0.5)
        if additive:
            tensors["v"] = normal(self.size, scale=self.size**-0.5)
        if self.score == "location":
            tensors["features"] = normal(batch, queries, self.keys, self.channels)
            tensors["feature_weight"] = normal(self.size, self.channels, scale=spread)
        options: dict[str, Any] = {"score": self.score, "normalize": self.normalize}
        # Not by the seed, so that all draws leave out the same keys.
        where = torch.Generator().manual_seed(1)
        if self.seen == "lengths":
            options["lengths"] = torch.randint(0, self.keys + 1, (self.memories,), generator=where)
        elif self.seen == "mask":
            options["mask"] = torch.rand(self.memories, self.keys, generator=where) < 0.6
        elif self.seen == "mask_per_query":
            options["mask"] = torch.rand(batch, queries, self.keys, generator=where) < 0.6
        elif self.seen == "causal":
            options["causal"] = True
        width = self.size if self.value_size is None else self.value_size
        return tensors, options, (normal(batch, queries, width), normal(batch, queries, self.keys))

    def run(self, backend: str, dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Context, weights and the gradients of all tensors, in this dtype, of the same numbers."""
        tensors, options, gradients = self.draw(seed)
        dtype = dtype or self.dtype
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        if self.factors and dtype is not torch.float64:
            options["factors"] = key_factors(leaves["keys"])
        results = attention(**leaves, **options, backend=backend)
        torch.autograd.backward(results, [gradient.to(dtype) for gradient in gradients])
        found = {"context": results[0].detach(), "weights": results[1].detach()}
        return found | {name: leaf.grad for name, leaf in leaves.items()}


def assert_accurate(case: AttentionCase, backend: str, draws: int = 5) -> None:
    """The back end's results and gradients against fp64, by the error that the reference has in the same dtype."""
    assert_as_accurate_over(
        [
            (case.run(backend, seed=seed), case.run("reference", seed=seed), case.run("reference", torch.float64, seed))
            for seed in range(draws)
        ]
    )


@st.composite
def attention_cases(draw: Any) -> AttentionCase:
    score = draw(st.sampled_from(SCORES))
    seen = draw(st.sampled_from(SEEN))
    return AttentionCase(
        score,
        memories=draw(st.integers(1, 5)),
        beams=1 if seen == "causal" else draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 9)),
        keys=draw(st.integers(1, 40)),
        size=draw(st.integers(1, 40)),
        value_size=draw(st.one_of(st.none(), st.integers(1, 40))),
        channels=draw(st.integers(1, 5)),
        normalize=draw(st.sampled_from(("softmax", "length"))),
        seen=seen,
        factors=score == "additive" and draw(st.booleans()),
        spread=draw(st.sampled_from((0.1, 1.0, 30.0))),
        strided=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
    )
