"""Between the steps at which it looks, a search must not wait for its device. On device meta, which has nothing to be
read, and which refuses every operator whose result's shape depends on values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastrnn.nn.seq2seq import DecoderStep
from fastrnn.search import beam_search
from fastrnn.search.hypotheses import Hypotheses
from tests.search.models import ATTENTIONS, CELLS, model
from tests.search.oracle import BOS, toy

LENGTH = 5
ENDS = {"beam_size": 4, "eos": [0, 2], "max_length": LENGTH, "sync_every": LENGTH + 1}
OPTIONS: list[dict[str, Any]] = [
    {"length_penalty": "gnmt", "word_reward": 0.3, "min_length": 2},
    {"early_stopping": "first", "patience": 2.0},
    {"early_stopping": "heuristic"},
    {"coverage_penalty": "wu", "need_alignments": True},
    {"coverage_penalty": "summary", "stepwise_coverage": True},
    {"eos_threshold": 1.2},
    {"banned_tokens": [4], "banned_phrases": [[1, 3], [3, 1, 3]]},
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram": 2},
    {"groups": 2, "diversity": 0.5},
    {"sample": "ancestral", "temperature": 0.8, "top_k": 3, "top_p": 0.9},
    {"sample": "gumbel"},
    {"processors": [lambda logits, tokens, sentences: logits / 2]},
]


class Looked(Exception):
    """The host has asked which sentences are done."""


class Steps(TorchDispatchMode):
    """Counts steps. From the first on it refuses copies between the CPU and the device that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs, found))
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        assert self.count == 0 or len(places) < 2 or kwargs.get("non_blocking"), f"{func} of tensors on {places}"
        return found


@contextmanager
def looking_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """For a search, which ends where it looks."""
    counted = Steps()
    new_tensor = torch.tensor

    def tensor(*args: Any, **kwargs: Any) -> Tensor:  # which the mode does not see
        assert counted.count == 0 or kwargs.get("device") is None, "a tensor is made of numbers"
        return new_tensor(*args, **kwargs)

    def look(hypotheses: Hypotheses) -> int:
        raise Looked

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(Hypotheses, "unfinished", look)
    # Meta has no autocast, which torch says by raising.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    with counted, pytest.raises(Looked):
        yield counted
    assert counted.count == LENGTH


def on_meta(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.to("meta"), tree)


def run(monkeypatch: pytest.MonkeyPatch, sources: int = 1, **options: Any) -> None:
    models = [toy(seed=seed, dtype=torch.float32) for seed in range(sources)]
    states = [on_meta(each.state(ENDS["beam_size"])) for each in models]
    for each in models:
        each.logits, each.attention = on_meta((each.logits, each.attention))

    with looking_once(monkeypatch) as steps:

        def first(tokens: Tensor, state: Any) -> Any:
            steps.count += 1
            return models[0].step(tokens, state)

        beam_search([first, *(each.step for each in models[1:])], states, batch_size=3, bos=BOS, **ENDS, **options)


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=lambda options: "+".join(options) or "plain")
def test_options(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    run(monkeypatch, **options)


@pytest.mark.parametrize("combine", ["log", "linear"])
def test_ensembles(monkeypatch: pytest.MonkeyPatch, combine: str) -> None:
    run(monkeypatch, 3, combine=combine)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_models(monkeypatch: pytest.MonkeyPatch, cell: str, attention: str | None) -> None:
    found, source = (part.to("meta") for part in model(cell, attention))
    call = DecoderStep.__call__
    with looking_once(monkeypatch) as steps:

        def counted(self: DecoderStep, tokens: Tensor, state: Any) -> Any:
            steps.count += 1
            return call(self, tokens, state)

        monkeypatch.setattr(DecoderStep, "__call__", counted)
        found.generate(source, **{name: value for name, value in ENDS.items() if name != "eos"})
