"""What the operators share: when torch must see the registered one, remembered choices, gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import backends


def use_registered_op() -> bool:
    """Under torch.compile, export and dispatch modes (fake tensors, FLOP counters) the registered op must be seen."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def key_of(tensors: Sequence[Tensor | None], key: list[Any]) -> tuple[Any, ...] | None:
    """The key and what a back end's choice depends on of these tensors; None where more than that counts."""
    if (
        use_registered_op()
        or backends.recording()
        or backends.transform_reasons()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    ):
        return None
    for tensor in tensors:
        if tensor is None:
            key.append(None)
        elif type(tensor) in (Tensor, torch.nn.Parameter):
            key += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        else:
            return None
    return tuple(key)


def remember(decided: dict[tuple[Any, ...], str], key: tuple[Any, ...] | None, picked: str) -> None:
    """Notes which back end was picked for a key, where there is one."""
    if key is not None:
        if len(decided) >= 1024:
            decided.clear()
        decided[key] = picked


def differentiable_gradients(
    run: Callable[[list[Any]], Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients as differentiable functions of everything (create_graph=True), None where `needs` is False.

    `run`: the operator by the reference. `gradients`: of its results.
    """
    with torch.enable_grad():
        # Views, since one input may depend on another: projected keys on the values, a state on the weights.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        # A result may depend on nothing that needs a gradient, as attention's weights do not on the values.
        pairs = [
            (output, gradient)
            for output, gradient in zip(run(views), gradients, strict=True)
            if output is not None and output.requires_grad and gradient is not None
        ]
        if not pairs:
            return [None] * len(needs)
        outputs, given = zip(*pairs)
        wanted = [tensor for tensor, need in zip(views, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]
