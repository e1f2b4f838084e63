"""A model of another project with torch.nn's modules and with fastrnn's: the same numbers, and the time of both."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import fastrnn
from tests.accuracy import assert_as_accurate_over

Step = Callable[[Any, Any], tuple[Any, Tensor]]

TRAINING_TIMES: dict[str, tuple[float, float]] = {}  # Seconds a step, with torch.nn and with fastrnn, by title.


def compare(title: str, model: Any, ours: Any, step: Step, batches: Sequence[Any], rounds: int = 9) -> None:
    """Results, loss and the gradient of every parameter; the exact ones are those of the model in fp64.

    Args:
        ours: the model, accelerated.
        step: of a model and a batch makes the model's results, and the loss.
        batches: the random draws of the case; the first is timed.
    """
    layers = [part for part in ours.modules() if isinstance(part, torch.nn.RNNBase | torch.nn.RNNCellBase)]
    assert layers and all(isinstance(part, fastrnn.nn.options.WithOptions) for part in layers)
    exact_model = copy.deepcopy(model).double()
    with fastrnn.backends.recorded_choices() as choices:
        found = [_train(ours, step, batch) for batch in batches]
    assert {choice.picked for choice in choices} == {"cpu"}
    expected = [_train(model, step, batch) for batch in batches]
    exact = [_train(exact_model, step, _pytree.tree_map(_double, batch)) for batch in batches]
    assert_as_accurate_over(list(zip(found, expected, exact)))
    torch.use_deterministic_algorithms(False)  # which fills new tensors with NaN: torch.nn takes 2.7 times as long
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for which, taken in zip((model, ours), times):
            start = time.perf_counter()
            _train(which, step, batches[0])
            taken.append(time.perf_counter() - start)
    TRAINING_TIMES[title] = (statistics.median(times[0]), statistics.median(times[1]))


def _train(model: Any, step: Step, batch: Any) -> Any:
    model.zero_grad()
    results, loss = step(model, batch)
    loss.backward()
    return results, loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
