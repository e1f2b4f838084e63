"""Products with a weight by our packed kernels: on the CPU in float32 two to five times as fast as torch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.backends import native, transform_reasons
from fastrnn.backends.call import is_plain
from fastrnn.backends.cpu import outer_product, packed_weight
from fastrnn.backends.tensors import with_unit_stride
from fastrnn.ops.shared import use_registered_op

# Multiply-adds below which torch's operator, which costs less per call, is as fast. Where gradients are off a row's
# result counts for more: a search must not depend on its batch.
_SMALL = 2**20


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, x [.., K] and weight [N, K], as torch.nn.functional.linear.

    Where our kernels take the call a row's result does not depend on the other rows.
    """
    return _Product.apply(x, weight, True) if _has_kernels(x, weight, x.shape[-1]) else F.linear(x, weight)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x W, x [.., K] and weight [K, N], as :func:`linear`."""
    return _Product.apply(x, weight, False) if _has_kernels(x, weight, x.shape[-1]) else x @ weight


def _has_kernels(x: Tensor, weight: Tensor, depth: int) -> bool:
    return (
        not use_registered_op()
        and native.load() is not None
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and is_plain(type(x))
        and is_plain(type(weight))
        and not transform_reasons()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and not torch._C._functorch.is_legacy_batchedtensor(x)
        and (not torch.is_grad_enabled() or x.numel() // max(1, depth) * weight.numel() >= _SMALL)
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        # Without gradients the weights usually stand still, so that a checksum is worth its time.
        return _multiply(x, weight, transposed, reuse=not any(ctx.needs_input_grad))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx = gradient @ (weight if ctx.transposed else weight.T) if needs_x else None
            rows = x.flatten(0, -2), gradient.flatten(0, -2)
            dweight = (rows[1].T @ rows[0] if ctx.transposed else rows[0].T @ rows[1]) if needs_weight else None
            return dx, dweight, None
        dx = _multiply(gradient, weight, not ctx.transposed, reuse=False) if needs_x else None
        first, second = (gradient, x) if ctx.transposed else (x, gradient)
        return dx, outer_product(first, second) if needs_weight else None, None


def _multiply(x: Tensor, weight: Tensor, transposed: bool, reuse: bool) -> Tensor:
    """x W^T, or x W."""
    columns, depth = weight.shape if transposed else weight.shape[::-1]
    rows = with_unit_stride(x.reshape(-1, depth))
    out = x.new_empty(*x.shape[:-1], columns)
    # The panels of x W^T are those of an RNN's forward pass, those of x W of its backward pass.
    packed = packed_weight(weight, torch.float32, "rnn_tanh", 1, False, not transposed, reuse)
    native.load().multiply_packed(  # type: ignore[union-attr]
        rows.shape[0],
        depth,
        rows.data_ptr(),
        rows.stride(0),
        packed,
        not transposed,
        columns,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
