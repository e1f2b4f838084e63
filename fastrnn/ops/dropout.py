"""The operator `dropout`: elements of a matrix dropped at random, and no mask kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import cpu, transforming
from fastrnn.ops.shared import use_registered_op


def dropout(x: Tensor, probability: float, seed: int | Tensor) -> Tensor:
    """x * keep / (1 - probability).

    The mask is drawn by (seed, row, column) and by nothing else, so that it is the same for every dtype, device and
    number of threads, and again in the backward pass, which keeps the seed alone.

    Args:
        x: [R, C], of a floating dtype.
        probability: with which each element is dropped. 0 gives x itself, 1 gives zeros.
        seed: integer in [0, 2**63), under torch.vmap also a tensor that holds one.

    Returns:
        [R, C] in x's dtype. Differentiable in x any number of times.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must have a floating dtype, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x must have 2 dimensions, got shape {tuple(x.shape)}")
    if isinstance(probability, bool) or not isinstance(probability, (int, float, torch.SymFloat)):
        raise TypeError(f"probability must be a number, got {type(probability).__name__}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    if isinstance(seed, Tensor) and transforming():
        return reference.dropout(x, probability, seed)
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an integer, got {type(seed).__name__}")
    if not torch.compiler.is_compiling() and not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63), got {seed}")
    return x if probability == 0 else _run(x, probability, seed)


def _run(x: Tensor, probability: float, seed: int) -> Tensor:
    if _only_reference(x):
        return reference.dropout(x, probability, seed)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, probability, seed)
    return torch.ops.fastrnn.dropout(x, probability, seed) if use_registered_op() else _launch(x, probability, seed)


def _only_reference(x: Tensor) -> bool:
    """Whether a transform, forward-mode differentiation or torch.jit.trace is at work, which want torch's operators."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._functorch.is_legacy_batchedtensor(x)  # of autograd.grad(.., is_grads_batched=True)
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float, seed: int) -> Tensor:
        ctx.probability, ctx.seed = probability, seed
        return _run(x, probability, seed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _run(gradient, ctx.probability, ctx.seed), None, None


def _launch(x: Tensor, probability: float, seed: int) -> Tensor:
    if cpu.has_dropout(x):
        return cpu.dropout(x, probability, seed)
    return reference.dropout(x, probability, seed).contiguous()


def _fake(x: Tensor, probability: float, seed: int) -> Tensor:
    return x.new_empty(x.shape)


torch.library.define("fastrnn::dropout", "(Tensor x, float probability, SymInt seed) -> Tensor")
torch.library.impl("fastrnn::dropout", "CompositeExplicitAutograd", _launch)
torch.library.register_fake("fastrnn::dropout", _fake)
