"""Attention by fastrnn and as it is written with torch's own operators, from the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.check import Builder, Entries, enter
from bench.peers import Contender, Results, Unsupported
from bench.registry import AttentionCase
from fastrnn import nn
from fastrnn.ops import attention, key_factors

_CHANNELS = 32  # of the location score


class AttentionProblem:
    """One case's tensors, and the gradient of its result."""

    def __init__(self, case: AttentionCase) -> None:
        self.case, self.dtype = case, torch.float32
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator)

        batch, size, keys = case.memories * case.beams, case.size, case.keys
        self.tensors = {"query": randn(batch, case.queries, size), "keys": randn(case.memories, keys, size)}
        if case.score in ("additive", "location"):
            self.tensors["values"] = randn(case.memories, keys, 1 if case.mode == "weights" else size)
            self.tensors["v"] = randn(size, scale=size**-0.5)
        if case.score == "location":
            self.tensors["features"] = randn(batch, case.queries, keys, _CHANNELS)
            self.tensors["feature_weight"] = randn(size, _CHANNELS, scale=_CHANNELS**-0.5)
        if case.score == "general":
            self.tensors["weight"] = randn(size, size, scale=size**-0.5)
        if case.score in ("dot", "general"):
            self.tensors["query"] *= size**-0.5
        if case.mode == "self":
            self.tensors = {
                name: randn(batch * case.heads, keys, size // case.heads) for name in ("query", "keys", "values")
            }
        self.gradient = randn(
            *self.tensors["query"].shape[:2], self.tensors.get("values", self.tensors["keys"]).shape[-1]
        )
        if case.mode == "loop":
            torch.manual_seed(0)
            self.decoder = nn.AttentionDecoder("lstm", size, size, nn.AdditiveAttention(size, size, size))
            self.tensors = {"query": randn(batch, case.queries, size), "keys": randn(case.memories, keys, size)}
            self.gradient = randn(batch, case.queries, 2 * size)

    def reference(self) -> Results:
        """torch's operators in fp64."""
        return self.standard(torch.float64).checked()

    def standard(self, dtype: torch.dtype) -> Contender:
        """torch's operators."""
        return _loop(self, dtype, _eager_loop) if self.case.mode == "loop" else _contender(self, dtype, _eager)


Attend = Callable[[AttentionCase, dict[str, Tensor]], tuple[Tensor, Tensor | None]]


def _contender(problem: AttentionProblem, dtype: torch.dtype, attend: Attend, **more: Tensor) -> Contender:
    case, training = problem.case, problem.case.mode == "training"
    tensors = {name: t.detach().to(dtype).requires_grad_(training) for name, t in problem.tensors.items()} | more
    names = [name for name in tensors if tensors[name].requires_grad]
    gradient = problem.gradient.to(dtype)

    def call() -> Any:
        context, weights = attend(case, tensors)
        if training:
            return context, torch.autograd.grad(context, [tensors[name] for name in names], gradient)
        return context, weights

    def named(returned: Any) -> Results:
        context, others = returned
        results = {"context": context.detach()}
        if training:
            return results | {f"d{name}": g for name, g in zip(names, others, strict=True)}
        return results if case.mode == "self" else results | {"weights": others}

    return Contender(call, named)


def _fastrnn(case: AttentionCase, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    return attention(**tensors, score=case.score, need_weights=case.mode in ("weights", "step"))


def _eager(case: AttentionCase, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    query, keys, values = tensors["query"], tensors["keys"], tensors.get("values", tensors["keys"])
    if case.mode == "self":
        split = (tensor.unflatten(0, (-1, case.heads)) for tensor in (query, keys, values))
        return F.scaled_dot_product_attention(*split).flatten(0, 1), None
    if case.beams > 1:
        query = query.unflatten(0, (-1, case.beams)).flatten(1, 2)
    if case.score in ("additive", "location"):
        summed = query.unsqueeze(2) + keys.unsqueeze(1)
        if case.score == "location":
            summed = summed + tensors["features"] @ tensors["feature_weight"].T
        scores = torch.tanh(summed) @ tensors["v"]
    else:
        query = query @ tensors["weight"] if case.score == "general" else query
        scores = torch.bmm(query, keys.transpose(1, 2))
    weights = torch.softmax(scores, -1)
    context = torch.bmm(weights, values)
    if case.beams > 1:
        context, weights = (found.unflatten(1, (case.beams, -1)).flatten(0, 1) for found in (context, weights))
    return context, weights


def _loop(problem: AttentionProblem, dtype: torch.dtype, run: Callable[..., Tensor]) -> Contender:
    """Forward and backward of a decoder's loop, to its inputs, the memory and every parameter."""
    decoder = problem.decoder if dtype is problem.dtype else _like(problem.decoder, dtype)
    leaves = [problem.tensors[name].to(dtype).requires_grad_() for name in ("query", "keys")]
    wanted = [*leaves, *decoder.parameters()]
    names = ["dinput", "dmemory", *(f"d{name}" for name, _ in decoder.named_parameters())]
    gradient = problem.gradient.to(dtype)

    def call() -> Any:
        output = run(decoder, *leaves)
        return output, torch.autograd.grad(output, wanted, gradient)

    def named(returned: Any) -> Results:
        output, gradients = returned
        return {"output": output.detach()} | dict(zip(names, gradients, strict=True))

    return Contender(call, named)


def _like(decoder: nn.AttentionDecoder, dtype: torch.dtype) -> nn.AttentionDecoder:
    hidden = decoder.rnn.hidden_size
    other = nn.AttentionDecoder("lstm", hidden, hidden, nn.AdditiveAttention(hidden, hidden, hidden)).to(dtype)
    other.load_state_dict(decoder.state_dict())
    return other


def _eager_loop(decoder: nn.AttentionDecoder, x: Tensor, memory: Tensor) -> Tensor:
    """As users write it: an LSTMCell and attention from torch's operators, step by step."""
    rnn, asked = decoder.rnn, decoder.attention
    keys = memory @ asked.memory_weight.T
    h = c = context = x.new_zeros(x.shape[0], rnn.hidden_size)
    weights = (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)
    outputs = []
    for t in range(x.shape[1]):
        h, c = torch.lstm_cell(torch.cat([x[:, t], context], -1), (h, c), *weights)
        scores = torch.tanh((h @ asked.query_weight.T).unsqueeze(1) + keys) @ asked.v
        context = torch.bmm(torch.softmax(scores, -1).unsqueeze(1), memory).squeeze(1)
        outputs.append(torch.cat([h, context], -1))
    return torch.stack(outputs, 1)


def _build_fastrnn(problem: AttentionProblem) -> Contender:
    case = problem.case
    if case.mode == "loop":
        return _loop(problem, problem.dtype, lambda decoder, x, memory: decoder(x, memory)[0])
    more = {"factors": key_factors(problem.tensors["keys"])} if case.factors else {}
    return _contender(problem, problem.dtype, _fastrnn, **more)


def _build_torch(problem: AttentionProblem) -> Contender:
    return problem.standard(problem.dtype)


def _build_tiled(problem: AttentionProblem) -> Contender:
    """fastrnn with a copy of the memory for each beam, as other libraries have it."""
    case = problem.case
    if case.beams == 1:
        raise Unsupported("the memory is not shared")
    tiled = {
        name: problem.tensors[name].repeat_interleave(case.beams, 0)
        for name in ("keys", "values")
        if name in problem.tensors
    }
    more = {"factors": key_factors(tiled["keys"])} if case.factors else {}
    return _contender(problem, problem.dtype, _fastrnn, **tiled, **more)


BUILDERS: dict[str, Any] = {"fastrnn": _build_fastrnn, "torch": _build_torch, "tiled": _build_tiled}


def entries(case: AttentionCase, builders: Sequence[str] = tuple(BUILDERS)) -> Entries:
    """The contenders of a case, checked. Raises WrongResult where fastrnn or torch is wrong."""
    problem: Any = AttentionProblem(case)
    chosen: dict[str, Builder] = {name: BUILDERS[name] for name in builders}
    return enter(problem, chosen)
