"""The operator `attention_decoder`: the whole teacher-forced loop of cells and attention in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import decoder
from fastrnn.backends.call import wants_gradients
from fastrnn.backends.decoder import INPUT_COUNT, DecoderCall
from fastrnn.ops.shared import differentiable_gradients, use_registered_op

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def run_loop(call: DecoderCall, backend: str) -> Result:
    """The loop on the back end ``"cpu"`` or ``"reference"``: that of :func:`fastrnn.reference.attention_decoder`.

    Returns:
        h_t of the top layer [T, N, H], contexts [T, N, Dv], weights [N, T, Tk], final states h_n and c_n [L, N, H].
    """
    inputs = call.inputs()
    if backend == "reference":
        return _reference(call.cell, inputs, (call.lengths, call.mask, call.dropout_mask), (call.scale, call.normalize))
    others = (call.factors, call.lengths, call.mask, call.dropout_mask, call.scale, call.normalize)
    if wants_gradients(inputs):
        h, contexts, weights, h_n, c_n = _Decoder.apply(call.cell, *others, *inputs)
        return h, contexts, weights, h_n, c_n
    return _results(_forward(call.cell, *_arguments(inputs), *others, False), call.x.dtype)


def _arguments(inputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Of the launchers: DecoderCall.inputs with those of the layers as one list."""
    return (*inputs[:INPUT_COUNT], list(inputs[INPUT_COUNT:]))


def _results(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> Result:
    h, c, contexts, weights = (tensor.to(dtype) for tensor in outputs[:4])
    # Copies, since the backward pass needs the states as they are.
    c_n = c[:, -1].clone() if c.numel() else None
    return h[-1, 1:].clone(), contexts.clone(), weights.clone(), h[:, -1].clone(), c_n


def _reference(
    cell: str, inputs: Sequence[Tensor | None], options: tuple[Tensor | None, ...], scalars: tuple[float, str]
) -> Result:
    arguments: list[Any] = list(inputs[:INPUT_COUNT])
    layers = [inputs[at : at + 4] for at in range(INPUT_COUNT, len(inputs), 4)]
    lengths, mask, dropout_mask = options
    return reference.attention_decoder(
        cell.removesuffix("_reset_before"),
        arguments[0],
        layers,  # type: ignore[arg-type]
        *arguments[1:],
        lengths=lengths,
        mask=mask,
        dropout_mask=dropout_mask,
        scale=scalars[0],
        normalize=scalars[1],
        reset_after=not cell.endswith("_reset_before"),
    )


class _Decoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        factors: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        dropout_mask: Tensor | None,
        scale: float,
        normalize: str,
        *inputs: Tensor | None,
    ) -> Result:
        options = (factors, lengths, mask, dropout_mask)
        outputs = _forward(cell, *_arguments(inputs), *options, scale, normalize, True)
        ctx.cell, ctx.scalars, ctx.count = cell, (scale, normalize), len(inputs)
        ctx.save_for_backward(*inputs, *options, *outputs)
        ctx.set_materialize_grads(False)
        dtype = inputs[0].dtype  # type: ignore[union-attr]
        return _results(outputs, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        inputs, options, outputs = tensors[: ctx.count], tensors[ctx.count : ctx.count + 4], tensors[ctx.count + 4 :]
        needs = list(ctx.needs_input_grad[7:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def run(inputs: list[Any]) -> Result:
                return _reference(ctx.cell, inputs, options[1:], ctx.scalars)

            found = differentiable_gradients(run, inputs, gradients, needs)
        else:
            x, h0, _, _, *others = _arguments(inputs)
            arguments = (*gradients, ctx.cell, x, h0, *others, *options, *ctx.scalars, *outputs, needs)
            found = [g if need else None for g, need in zip(_backward(*arguments), needs, strict=True)]
        return *[None] * 7, *found


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.fastrnn.decoder_forward(*args) if use_registered_op() else decoder.forward(*args)


def _backward(*args: Any) -> list[Tensor]:
    return torch.ops.fastrnn.decoder_backward(*args) if use_registered_op() else decoder.backward(*args)


_TENSORS = "Tensor? query_weight, Tensor keys, Tensor? values, Tensor? v, Tensor?[] weights, "
_OPTIONS = "Tensor? factors, Tensor? lengths, Tensor? mask, Tensor? dropout_mask, float scale, str normalize, "
_OUTPUTS = ("h", "c", "contexts", "weighting", "queries", "inputs", "saved")
torch.library.define(
    "fastrnn::decoder_forward",
    f"(str cell, Tensor x, Tensor h0, Tensor? c0, Tensor context0, {_TENSORS}{_OPTIONS}bool save) -> ("
    + ", ".join(["Tensor"] * len(_OUTPUTS))
    + ")",
)
torch.library.define(
    "fastrnn::decoder_backward",
    "(Tensor? dh, Tensor? dcontexts, Tensor? dweights, Tensor? dh_n, Tensor? dc_n, str cell, Tensor x, Tensor h0, "
    + f"{_TENSORS}{_OPTIONS}"
    + "".join(f"Tensor {name}, " for name in _OUTPUTS)
    + "bool[] needs) -> Tensor[]",
)
torch.library.impl("fastrnn::decoder_forward", "CPU", decoder.forward)
torch.library.impl("fastrnn::decoder_backward", "CPU", decoder.backward)
torch.library.register_fake("fastrnn::decoder_forward", decoder.fake_forward)
torch.library.register_fake("fastrnn::decoder_backward", decoder.fake_backward)
