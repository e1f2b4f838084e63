"""What the GPU suites time, in the order in which they do it until their time is up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.registry import DTYPES, GATES, Case, Shape, SizedCase


@dataclass(frozen=True)
class GpuCase(SizedCase):
    """A case of one of the GPU suites."""

    suite: str = ""

    @property
    def baseline(self) -> tuple[str, Case] | None:
        """A variant is timed beside the plain cell."""
        return super().baseline if self.variant else None

    @property
    def all_weight_bytes(self) -> int:
        """Size of weight_ih and weight_hh."""
        return self.weight_bytes * (self.size.input_size + self.size.hidden_size) // self.size.hidden_size

    @property
    def least_bytes(self) -> int:
        """What must move through memory: weights, x and y, each once in the forward pass and, with their gradients,
        twice more in the backward pass."""
        batch, steps, input_size, hidden_size = self.size
        element = self.weight_bytes // (GATES[self.cell] * hidden_size**2)
        once = self.all_weight_bytes + element * batch * steps * (input_size + hidden_size)
        return 3 * once if self.mode == "training" else once


# Of the model that searches.
LAYERS, VOCABULARY, BEAMS = 4, 32000, 5


@dataclass(frozen=True)
class GpuSearch(GpuCase):
    """A search by an encoder and a decoder with additive attention. T is the length of the source and of what is found;
    I, that of the embeddings, is H."""

    @property
    def _step_weights(self) -> int:
        """What a step of the decoder multiplies by: layers, the query's projection, and the projection to tokens."""
        size = self.size.hidden_size
        return GATES[self.cell] * size * size * (2 * LAYERS + 1) + size * size + 2 * size * VOCABULARY

    @property
    def least_bytes(self) -> int:
        """The decoder's weights at every step."""
        return self.size.steps * self._step_weights * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Of the decoder's products with weights."""
        return 2 * self.size.steps * self.size.batch * BEAMS * self._step_weights


SEQUENCE_MODES = ("forward", "training")
GATED = ("lstm", "gru")


def _sequences(
    suite: str, cells: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Shape], variants: Sequence[str | None]
) -> list[GpuCase]:
    """All combinations, shape by shape."""
    return [
        GpuCase(cell, "x".join(map(str, shape)), mode, dtype, variant, suite)
        for shape in shapes
        for cell in cells
        for dtype in dtypes
        for variant in variants
        for mode in SEQUENCE_MODES
    ]


def headline() -> list[GpuCase]:
    """Where cuDNN has its own persistent kernel: fp16, H a multiple of 128, one layer and direction."""
    return _sequences("headline", ["lstm"], ["fp16"], [Shape(16, 1024, 768, 768)], [None])


# B and H of the suite cudnn: all pairs of B 1, 16, 64, 128 and H 256 to 2048, so ordered that wherever the time ends,
# small and large ones have had their turn. Thinned: no B and no H between these, I = H.
GRID = [(16, 1024), (64, 256), (64, 2048), (1, 512), (128, 512), (1, 1024), (16, 256), (16, 2048)]
GRID += [(128, 1024), (16, 512), (128, 256), (1, 2048), (64, 1024), (1, 256), (64, 512), (128, 2048)]


def cudnn() -> list[GpuCase]:
    """Where cuDNN has no persistent kernel: bf16 and TF32 LSTM, and every GRU."""
    cases = []
    for batch, hidden in GRID:
        shape = [Shape(batch, 512, hidden, hidden)]
        cases += _sequences("cudnn", ["lstm"], ["bf16", "tf32"], shape, [None])
        cases += _sequences("cudnn", ["gru"], ["bf16", "fp16", "tf32", "fp32"], shape, [None])
    return cases


def small() -> list[GpuCase]:
    """Hidden sizes of one multiprocessor, as in reinforcement learning, with and without episode starts."""
    sizes = [(64, 128), (2048, 128), (1, 128), (512, 64), (4096, 32)]
    shapes = [Shape(batch, 128, hidden, hidden) for batch, hidden in sizes]
    return _sequences("small", GATED, ["tf32", "bf16"], shapes, [None, "resets"])


def masks() -> list[GpuCase]:
    """Resets and lengths against the plain cell's time."""
    shapes = [Shape(16, 512, 1024, 1024), Shape(64, 512, 512, 512)]
    return _sequences("masks", GATED, ["bf16"], shapes, ["resets", "lengths"])


def norm() -> list[GpuCase]:
    """Layer norm against the plain cell and against a loop whose step is compiled by torch.compile."""
    shapes = [Shape(16, 256, 1024, 1024), Shape(64, 256, 512, 512)]
    return _sequences("norm", GATED, ["bf16", "tf32"], shapes, ["layer_norm"])


def step() -> list[GpuCase]:
    """One call of a cell."""
    return [
        GpuCase(cell, f"{batch}x1x1024x1024", "step", dtype, None, "step")
        for dtype in ("bf16", "fp16", "tf32")
        for cell in GATED
        for batch in (1, 64)
    ]


def search() -> list[GpuCase]:
    """Beam search of 40 steps with 5 beams, a model of GNMT's size: 4 + 4 LSTM layers of 1024, 32,000 tokens."""
    return [GpuSearch("lstm", f"{batch}x40x1024x1024", "search", "fp16", None, "search") for batch in (1, 32, 128)]


SUITES = {suite.__name__: suite for suite in (headline, step, cudnn, small, masks, norm, search)}


def all_cases() -> list[GpuCase]:
    return [case for suite in SUITES.values() for case in suite()]


def ordered(names: Sequence[str]) -> list[GpuCase]:
    """The cases of these suites, so interleaved that at any time each suite has had about the same share of its own."""
    placed = []
    for rank, name in enumerate(SUITES):
        if name in names:
            cases = SUITES[name]()
            # The headline comes first as a whole, and whole searches last.
            fixed = {"headline": -1.0, "search": 1.0}.get(name)
            placed += [
                (index / len(cases) if fixed is None else fixed, rank, index, case) for index, case in enumerate(cases)
            ]
    return [case for *_, case in sorted(placed, key=lambda entry: entry[:3])]


def shrunk(case: GpuCase) -> GpuCase:
    """The case at a size that takes no time, for a trial of the suites."""
    batch, steps, input_size, hidden_size = case.size
    small = (min(batch, 3), min(steps, 5), min(input_size, 8), min(hidden_size, 8))
    return replace(case, shape="x".join(map(str, small)))
