"""Who takes part in a case on a GPU: fastrnn's choice, each of its back ends, cuDNN, and the peers that are installed.

The peers' adapters follow these sources: FlashRNN (NX-AI/flashrnn, flashrnn/flashrnn/flashrnn.py), haste
(lmnt-com/haste, frameworks/pytorch) and TorchRL (pytorch/rl, torchrl/modules/tensordict_module/_rnn_triton.py). Each
is checked like every other contender before it is timed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import peers
from bench.check import Builder
from bench.gpu import search
from bench.gpu.registry import GpuCase
from bench.peers import Around, Contender, Problem, Results, Unsupported, contender_of, layer_like
from bench.registry import GATES
from fastrnn import backends

# The back ends of fastrnn that are not for GPUs, or are torch's own operators.
NO_GPU_BACKENDS = ("cpu", "aten", "reference")
# Weights that are read in turns take this many times the room of the L2 cache, so that each comes from memory.
ROTATED_CACHES = 3


def gpu_backends() -> list[str]:
    return [name for name in backends.NAMES if name not in NO_GPU_BACKENDS]


def builders(
    case: GpuCase, explicit: Sequence[str], baselines: bool, compile_seconds: float, cache_bytes: int
) -> dict[str, Builder]:
    """The contenders of a case by name; `explicit` are the back ends that take part beside fastrnn's own choice, and
    with `baselines` only cuDNN does."""
    chosen: dict[str, Builder] = {}
    if case.mode == "search":
        return {name: build for name, build in search.BUILDERS.items() if name == "torch" or not baselines}
    if not baselines:
        chosen["fastrnn"] = peers.fastrnn
        chosen |= {f"fastrnn {name}": functools.partial(peers.fastrnn, backend=name) for name in explicit}
    if case.variant != "layer_norm":
        chosen["torch"] = peers.torch_nn
    elif not baselines:
        chosen["compiled_loop"] = functools.partial(peers.compiled_loop, seconds=compile_seconds)
    if case.mode == "step":
        copies = max(2, math.ceil(ROTATED_CACHES * cache_bytes / case.all_weight_bytes))
        chosen = {name: rotated(build, copies) for name, build in chosen.items()}
        chosen |= {f"{name}, graph": functools.partial(graphed, build=b, turns=copies) for name, b in chosen.items()}
    if not baselines:
        chosen |= {name: functools.partial(_guarded, build) for name, build in PEERS.items()}
    return chosen


def _guarded(build: Builder, problem: Problem) -> Contender:
    """A peer; Unsupported also where its first call fails, which may compile it."""
    try:
        contender = build(problem)
        contender.call()
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return contender


def rotated(build: Builder, copies: int) -> Builder:
    """The contender over several copies of its layer, which take turns."""

    def build_copies(problem: Problem) -> Contender:
        contenders = [build(problem) for _ in range(copies)]
        turns = itertools.cycle(contender.call for contender in contenders)
        return Contender(lambda: next(turns)(), contenders[0].named)

    return build_copies


def graphed(problem: Problem, build: Builder, turns: int) -> Contender:
    """One replay of a CUDA graph of so many calls of the contender."""
    if problem.device == "cpu":
        raise Unsupported("CUDA graphs need CUDA")
    contender = build(problem)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capturing wants everything loaded, by calls on another stream than the default one
        for _ in range(turns):
            contender.call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = [contender.call() for _ in range(turns)]
    except RuntimeError as error:
        raise Unsupported(f"not captured in a CUDA graph: {str(error).splitlines()[0]}") from error

    def replay() -> Any:
        graph.replay()
        return outputs[-1]

    return Contender(replay, contender.named, turns)


def _installed(module: str, problem: Problem, cells: Sequence[str], variants: Sequence[str | None]) -> Any:
    """The module; Unsupported where it is not there or does not have the case's cell or variant."""
    case = problem.case
    if case.mode == "step":
        raise Unsupported("runs whole sequences only")
    if case.cell not in cells:
        raise Unsupported(f"has no {case.cell}")
    if case.variant not in variants:
        raise Unsupported(f"has no {case.variant}")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Unsupported(f"not installed: {error.name}") from None


class _FlashRnn(Around):
    """FlashRNN's fused kernels behind torch.nn's interface; it takes pre-activations, batch first.

    Its GRU has the recurrent gates n, r, z, the input gates r, z, n, and biases of W_hn h, r, z and W_in x.
    """

    def __init__(self, layer: nn.Module, function: Any, cell: str, backend: str) -> None:
        super().__init__(layer)
        self.function, self.cell, self.backend = function, cell, backend

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        layer: Any = self.layer
        gates, size = GATES[self.cell], layer.hidden_size
        w_hh, b_ih, b_hh = layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0
        weight = w_hh.view(gates, size, size)
        if self.cell == "lstm":
            bias = (b_ih + b_hh).view(gates, size)
        else:
            weight = weight[[2, 0, 1]]
            (i_r, i_z, i_n), (h_r, h_z, h_n) = b_ih.view(gates, size), b_hh.view(gates, size)
            bias = torch.stack([h_n, i_r + h_r, i_z + h_z, i_n])
        gates_x = nn.functional.linear(x, layer.weight_ih_l0).view(*x.shape[:2], gates, 1, size).transpose(0, 1)
        name = str(x.dtype).removeprefix("torch.")
        states, last = self.function(
            gates_x, weight[:, None], bias[:, None], function=self.cell, backend=self.backend, dtype=name
        )
        y = states[0, :, :, 0].transpose(0, 1)  # [S, B, T, heads, H]
        h_n, *c_n = last[:, :, 0].transpose(1, 2)  # [S, 1, B, H]
        return y, (h_n, *c_n) if c_n else h_n


def flashrnn(problem: Problem, backend: str = "cuda_fused") -> Contender:
    """Compiles itself for every batch and hidden size, in the first call."""
    module = _installed("flashrnn", problem, ("lstm", "gru"), (None,))
    if problem.case.dtype == "fp32":
        raise Unsupported("multiplies in TF32")
    return contender_of(_FlashRnn(layer_like(nn, problem), module.flashrnn, problem.case.cell, backend), problem)


class _TorchRl(Around):
    """TorchRL's Triton kernels behind torch.nn's interface; they are batch first, and take the state of every step."""

    def __init__(self, layer: nn.Module, module: Any, cell: str, precision: str) -> None:
        super().__init__(layer)
        self.run = getattr(module, f"{cell}_triton")
        self.states = 2 if cell == "lstm" else 1
        self.precision = precision

    def forward(self, x: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Any]:
        layer: Any = self.layer
        batch_first = x.transpose(0, 1).contiguous()
        zeros = x.new_zeros(*batch_first.shape[:2], layer.hidden_size)
        starts = zeros.new_zeros(zeros.shape[:2], dtype=torch.bool) if resets is None else resets.T.contiguous()
        weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
        results = self.run(batch_first, *[zeros] * self.states, *weights, starts, input_precision=self.precision)
        final = tuple(state[None] for state in results[self.states :])
        return results[0].transpose(0, 1), final if self.states == 2 else final[0]


def torchrl(problem: Problem) -> Contender:
    name = "torchrl.modules.tensordict_module._rnn_triton"
    module = _installed(name, problem, ("lstm", "gru"), (None, "resets"))
    if problem.case.dtype not in ("fp32", "tf32"):
        raise Unsupported("takes fp32 data only")
    precision = "ieee" if problem.case.dtype == "fp32" else "tf32"
    return contender_of(_TorchRl(layer_like(nn, problem), module, problem.case.cell, precision), problem)


# haste's gates by torch's: LSTM i, g, f, o and GRU z, r, n. Either order is its own inverse.
_HASTE_GATES = {"lstm": [0, 2, 1, 3], "gru": [1, 0, 2]}


def haste(problem: Problem) -> Contender:
    case = problem.case
    module = _installed("haste_pytorch", problem, ("lstm", "gru"), (None,))
    if case.dtype != "fp32":
        raise Unsupported("is for fp32 only")
    layer = getattr(module, case.cell.upper())(case.size.input_size, case.size.hidden_size).to(problem.device)
    layer.from_native_weights(*problem.layer.parameters())
    contender = peers.torch_contender(layer, case.mode, problem.x, None, problem.grad_y, {})
    order = _HASTE_GATES[case.cell]

    def of_torch(gradient: Tensor) -> Tensor:
        """Gates are in the last dimension; matrices are transposed."""
        chunks = gradient.chunk(len(order), -1)
        ordered = torch.cat([chunks[gate] for gate in order], -1)
        return ordered.T if ordered.dim() == 2 else ordered

    def named(out: Any) -> Results:
        found = contender.named(out)
        gradients = {
            "grad weight_ih_l0": "grad kernel",
            "grad weight_hh_l0": "grad recurrent_kernel",
            "grad bias_ih_l0": "grad bias",
            "grad bias_hh_l0": "grad bias" if case.cell == "lstm" else "grad recurrent_bias",
        }
        translated = {name: of_torch(found[theirs]) for name, theirs in gradients.items() if theirs in found}
        return {name: value for name, value in found.items() if name not in gradients.values()} | translated

    return Contender(contender.call, named)


PEERS: dict[str, Builder] = {"flashrnn": flashrnn, "haste": haste, "torchrl": torchrl}
