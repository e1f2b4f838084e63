"""Beam search on a GPU against the CPU's: what it finds, that the host does not wait, and CUDA graphs of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastrnn import nn
from fastrnn.nn.seq2seq import DecoderStep
from fastrnn.ops.top_k import select
from fastrnn.search import BeamResult, beam_search, expand
from fastrnn.search.hypotheses import Hypotheses
from tests.accuracy import assert_as_accurate_over
from tests.search.models import ATTENTIONS, CELLS, model
from tests.search.oracle import BOS, toy
from tests.search.test_host_reads import OPTIONS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
BEAMS = 3
SEARCH: dict[str, Any] = {"beam_size": BEAMS, "n_best": 2, "min_length": 3, "max_length": 6}
# With these a search finds the same where every logit is off by up to 0.1; those of bfloat16 are by about 0.03.
SEEDS = {
    ("lstm", None): 5,
    ("lstm", "dot"): 32,
    ("lstm", "additive"): 2,
    ("gru", None): 5,
    ("gru", "dot"): 18,
    ("gru", "additive"): 1,
}


def on(device: str, tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), tree)


def generate(found: nn.Seq2Seq, source: Tensor, device: str = "cpu", **options: Any) -> BeamResult:
    lengths = torch.tensor([7, 3, 1, 6])
    found = copy.deepcopy(found).to(device)
    return BeamResult(*on("cpu", found.generate(source.to(device), lengths.to(device), **SEARCH, **options)))


def on_reference(found: nn.Seq2Seq) -> nn.Seq2Seq:
    """By torch's operators alone."""
    found = copy.deepcopy(found)
    for module in found.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return found


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_models(dtype: torch.dtype) -> None:
    draws = []
    for (cell, attention), seed in SEEDS.items():
        found, source = model(cell, attention, seed)
        found.to(dtype)
        exact, torchs = generate(on_reference(found).double(), source), generate(on_reference(found), source)
        ours, later = (generate(found, source, DEVICE, sync_every=every) for every in (1, 8))
        for other in (torchs, ours):
            assert torch.equal(other.tokens, exact.tokens), (cell, attention)
        for at_once, at_the_end in zip(ours[:4], later[:4], strict=True):
            assert torch.equal(at_once, at_the_end), (cell, attention)
        draws.append(tuple((result.scores, result.log_probs) for result in (ours, torchs, exact)))
    assert_as_accurate_over(draws)


def search(options: dict[str, Any], device: str, on_step: Callable[[], None] = lambda: None) -> BeamResult:
    """Over toy models, which are tables, so that logits are the same everywhere; three of them where it is told how to
    combine them."""
    models = [toy(seed=seed, dtype=FP32) for seed in range(3 if "combine" in options else 1)]
    states = [on(device, each.state(4)) for each in models]
    for each in models:
        each.logits, each.attention = on(device, (each.logits, each.attention))

    def first(tokens: Tensor, state: Any) -> Any:
        on_step()
        return models[0].step(tokens, state)

    steps = [first, *(each.step for each in models[1:])]
    given = {"beam_size": 4, "n_best": 4, "eos": [0, 2], "max_length": 6, **on(device, options)}
    return beam_search(steps, states, batch_size=3, bos=BOS, **given)


PREFIX = {"prefix": torch.tensor([[1, 3, 4], [4, 4, 4], [5, 1, 3]]), "prefix_lengths": torch.tensor([2, 0, 3])}
EVERY_OPTION: list[dict[str, Any]] = [
    {},
    *OPTIONS,
    {"combine": "log"},
    {"combine": "linear"},
    PREFIX,
    {**PREFIX, "no_repeat_ngram": 1},
    {"coverage_penalty": "wu", "source_lengths": torch.tensor([4, 1, 2])},
    {"max_length": torch.tensor([6, 1, 3]), "min_length": torch.tensor([3, 0, 2])},
]


def names(options: dict[str, Any]) -> str:
    return "+".join(options) or "plain"


@pytest.mark.parametrize("every", [1, 8])
@pytest.mark.parametrize("options", EVERY_OPTION, ids=names)
def test_options(options: dict[str, Any], every: int) -> None:
    found, wanted = search({**options, "sync_every": every}, DEVICE), search(options, "cpu")
    rounding = 200 * torch.finfo(FP32).eps
    for name, ours, cpus in zip(BeamResult._fields, on("cpu", found), wanted, strict=True):
        if cpus is None or not cpus.is_floating_point():
            assert (ours is None and cpus is None) or torch.equal(ours, cpus), name
        else:
            torch.testing.assert_close(
                ours, cpus, rtol=rounding, atol=rounding, msg=lambda text, of=name: f"{of}: {text}"
            )


def test_allowed_tokens() -> None:
    def allowed(sentence: int, tokens: Tensor) -> list[int]:
        return [token for token in range(6) if len(tokens) > 2 or token not in (0, 2, sentence)]

    found, wanted = (search({"allowed_tokens": allowed}, device) for device in (DEVICE, "cpu"))
    assert torch.equal(found.tokens.cpu(), wanted.tokens)


@contextmanager
def waiting_only_to_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Yields what is to be called at a step: from then on the host must not wait before it looks who is done."""
    torch.use_deterministic_algorithms(False)  # with which torch's scatter copies strides to the GPU, and waits
    look = Hypotheses.unfinished

    def may_wait(hypotheses: Hypotheses) -> int:
        torch.cuda.set_sync_debug_mode("default")
        return look(hypotheses)

    monkeypatch.setattr(Hypotheses, "unfinished", may_wait)
    try:
        yield lambda: torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", EVERY_OPTION, ids=names)
def test_the_host_never_waits(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**options, "sync_every": 100}
    search(options, DEVICE)  # compiles
    with waiting_only_to_look(monkeypatch) as on_step:
        search(options, DEVICE, on_step)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_the_host_never_waits_for_a_model(cell: str, attention: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, source = model(cell, attention)
    need = attention is not None
    generate(found, source, DEVICE, sync_every=100, need_alignments=need)  # compiles
    call = DecoderStep.__call__
    with waiting_only_to_look(monkeypatch) as on_step:

        def watched(self: DecoderStep, tokens: Tensor, state: Any) -> Any:
            on_step()
            return call(self, tokens, state)

        monkeypatch.setattr(DecoderStep, "__call__", watched)
        generate(found, source, DEVICE, sync_every=100, need_alignments=need)


def captured(step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A step's results, and what computes them anew in place."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


@torch.no_grad()
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_cuda_graphs(cell: str, attention: str | None, dtype: torch.dtype) -> None:
    found, source = (part.to(DEVICE) for part in model(cell, attention))
    found.to(dtype)
    decoder = found.decoder
    memory, hidden = found.encode(source)
    prepared = decoder.prepare(memory, torch.tensor([7, 3, 1, 6], device=DEVICE))
    state = decoder.initial_state(expand(hidden, BEAMS, dim=1), memory, BEAMS)
    tokens, scores = torch.full((4 * BEAMS,), 2, device=DEVICE), torch.zeros(4 * BEAMS, device=DEVICE)
    # Of its own memory each, which takes the next inputs.
    inputs = pytree.tree_map_only(Tensor, torch.clone, (tokens, scores, state))

    def step() -> Any:
        tokens, scores, state = inputs
        logits, after, weights = decoder.step(tokens, state, prepared, need_weights=True)
        return logits, after, weights, select(logits, 2 * BEAMS, scores, BEAMS)

    results, replay = captured(step)
    for round in range(2):
        logits, after, _, (values, indices, _) = step()
        others = (indices[:, :BEAMS] % logits.shape[1]).flatten(), values[:, :BEAMS].flatten(), after
        for place, new in zip(pytree.tree_leaves(inputs), pytree.tree_leaves(others), strict=True):
            if place is not None:
                place.copy_(new)
        replay()
        for ours, eager in zip(pytree.tree_leaves(results), pytree.tree_leaves(step()), strict=True):
            assert (ours is None and eager is None) or torch.equal(ours, eager), round
