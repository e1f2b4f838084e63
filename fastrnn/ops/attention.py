"""The operator `attention`: contexts and weights of queries over the keys and values of a memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import AttentionCall
from fastrnn.backends.attention import aten, cpu, reference, triton
from fastrnn.backends.call import wants_gradients
from fastrnn.ops.linear import matmul
from fastrnn.ops.shared import differentiable_gradients, key_of, remember, use_registered_op

SCORES = ("dot", "scaled_dot", "general", "additive", "location")
NORMALIZATIONS = ("softmax", "length")


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None = None,
    *,
    score: str = "dot",
    weight: Tensor | None = None,
    v: Tensor | None = None,
    features: Tensor | None = None,
    feature_weight: Tensor | None = None,
    factors: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    normalize: str = "softmax",
    scale: float | None = None,
    need_weights: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """context_t = sum_s a_ts values_s, the weights a being a softmax over the keys of a score e of query t and key s.

    B memories of Tk keys, and N batches of Tq queries, N a multiple of B: N / B neighbours share a memory (the beams of
    a sentence), of which no copies are made. No [N, Tq, Tk, D] tensor is formed.

    Args:
        query: [N, Tq, D], or [N, D] for one query each.
        keys: [B, Tk, D]; with the score ``"general"`` [B, Tk, Dk].
        values: [B, Tk, Dv]; the keys by default.
        score: ``"dot"``, e_ts = ``<q_t, k_s>``; ``"scaled_dot"``, that divided by the root of D (Vaswani et al. 2017,
            arXiv 1706.03762); ``"general"``, q_t W k_s (Luong et al. 2015, arXiv 1508.04025); ``"additive"``,
            v . tanh(q_t + k_s), of queries and keys that are projected already (Bahdanau et al. 2015, arXiv 1409.0473);
            ``"location"``, v . tanh(q_t + k_s + F f_ts) (Chorowski et al. 2015, arXiv 1506.07503; with the coverage as
            only feature See et al. 2017, arXiv 1704.04368).
        weight: [D, Dk], W of ``"general"``.
        v: [D], of ``"additive"`` and ``"location"``.
        features: [N, Tq, Tk, C], or [N, Tk, C] where the query is [N, D]: f of ``"location"``.
        feature_weight: [D, C], F of ``"location"``.
        factors: [B, Tk, D], :func:`fastrnn.ops.key_factors` of the keys, with which additive scores need no exponential
            for each pair of query and key.
        lengths: [B] integers in 0..Tk: keys from lengths[b] on are not seen.
        mask: bool, True where a key is seen: [B, Tk], or [N, Tq, Tk].
        causal: query t sees the keys 0..t; needs Tq = Tk and N = B.
        normalize: ``"softmax"``, or ``"length"``: a_ts = e_ts / n, n being the number of keys that the query sees.
        scale: of inner products, in place of 1 or of the root.
        need_weights: without, the second result is None.
        backend: ``"auto"`` or the name of a back end.

    Returns:
        Context [N, Tq, Dv] and weights [N, Tq, Tk], without Tq where the query has none. A query that sees no key gets
        zeros and has zero gradients; unseen keys and values may hold anything, NaN too. Differentiable in every
        floating input but ``factors``, through the weights too.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came, before anything is computed.
        NotImplementedError: ``backend`` cannot compute this call; with all reasons.
    """
    tensors = {"query": query, "keys": keys, "values": values, "weight": weight, "v": v}
    tensors |= {"features": features, "feature_weight": feature_weight, "factors": factors}
    picked, key = None, None
    if type(score) is str and type(normalize) is str and type(backend) is str:
        options = [score, normalize, backend, causal, scale, need_weights, lengths is None]
        key = key_of((*tensors.values(), mask), options)
        picked = None if key is None else _decided.get(key)
    if picked is None:
        _check_arguments(score, scale, tensors)
    single = query.dim() == 2
    if single:
        query = query.unsqueeze(1)
        features = None if features is None or features.dim() != 3 else features.unsqueeze(1)
    if weight is not None:
        query = matmul(query, weight)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if score == "scaled_dot" and query.shape[-1] else 1.0
    call = AttentionCall(
        query,
        keys,
        None if values is keys else values,
        v,
        features,
        feature_weight,
        factors,
        lengths,
        mask,
        causal,
        float(scale),
        normalize,
        need_weights,
    )
    shape = query.shape[:2]
    if picked is None:
        picked = decide(call, backend)
        remember(_decided, key, picked)
    else:
        _check_lengths(call)
        _fold(call)
    context, weights = run_on(call, picked)
    context = context.reshape(*shape, context.shape[-1])
    weights = None if weights is None else weights.reshape(*shape, weights.shape[-1])
    if single:
        return context.squeeze(1), None if weights is None else weights.squeeze(1)
    return context, weights


# What `check` and `backends.choose` have found, by all that they look at: they took 10 of the 25 us of a small call.
_decided: dict[tuple[Any, ...], str] = {}


def _check_arguments(score: str, scale: float | None, tensors: dict[str, Tensor | None]) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    given = {name: tensors[name] for name in ("weight", "v", "features", "feature_weight", "factors")}
    wanted = {
        "general": ("weight",),
        "additive": ("v",),
        "location": ("v", "features", "feature_weight"),
    }.get(score, ())
    for name, tensor in given.items():
        if name in wanted and tensor is None:
            raise ValueError(f"{name} must be given with score {score!r}, got None")
        if tensor is not None and name not in (*wanted, *(("factors",) if score == "additive" else ())):
            raise ValueError(f"{name} does not belong to score {score!r}")
    if scale is not None and given["v"] is not None:
        raise ValueError(f"scale is for inner products, got score {score!r}")
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_tensors(found)
    if "weight" in found:
        weight, shape = found["weight"], (found["query"].shape[-1], found["keys"].shape[-1])
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    query = tensors["query"]
    if query.dim() not in (2, 3):
        raise ValueError(f"query must have 2 or 3 dimensions, got shape {tuple(query.shape)}")
    for name, tensor in tensors.items():
        if name in ("keys", "values", "factors") and tensor.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
        autocast = torch.is_autocast_enabled(query.device.type)
        if name != "factors" and tensor.dtype is not query.dtype and not autocast:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")


def check(call: AttentionCall) -> None:
    """`_fold`, once the arguments are known to fit together."""
    query, keys = call.query, call.keys
    memories, count, size = keys.shape
    batch, queries, _ = query.shape
    if (memories == 0 and batch) or (memories and batch % memories):
        raise ValueError(f"query must have a batch that is a multiple of the keys' {memories}, got {batch}")
    if query.shape[-1] != size:
        raise ValueError(f"query must have vectors of the keys' size {size}, got shape {tuple(query.shape)}")
    channels = 0 if call.feature_weight is None else call.feature_weight.shape[-1]
    expected = {
        "values": (memories, count, 0 if call.values is None else call.values.shape[-1]),
        "v": (size,),
        "features": (batch, queries, count, channels),
        "feature_weight": (size, channels),
        "factors": (memories, count, size),
    }
    for name, shape in expected.items():
        tensor = getattr(call, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if call.factors is not None and call.factors.dtype is not torch.float32:
        raise ValueError(f"factors must be torch.float32, got {call.factors.dtype}")
    if call.normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZATIONS))}, got {call.normalize!r}")
    if call.causal and (queries != count or batch != memories):
        raise ValueError(
            f"causal needs as many queries as keys and a memory for each, got query {tuple(query.shape)}, "
            f"keys {tuple(keys.shape)}"
        )
    _check_lengths(call)
    _check_mask(call)
    _fold(call)


def _fold(call: AttentionCall) -> None:
    """Has the queries of one memory side by side, and the mask with them."""
    memories, count, size = call.keys.shape
    if call.mask is not None:
        call.mask = call.mask.unsqueeze(1) if call.mask.dim() == 2 else call.mask.reshape(memories, -1, count)
    if call.query.shape[0] != memories:
        call.query = call.query.reshape(memories, -1, size)
        if call.features is not None:
            call.features = call.features.reshape(memories, -1, *call.features.shape[2:])


def _check_lengths(call: AttentionCall) -> None:
    lengths, (memories, count, _) = call.lengths, call.keys.shape
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int64, torch.int32) or tuple(lengths.shape) != (memories,):
        raise ValueError(
            f"lengths must be int64 or int32 of shape {(memories,)}, got {lengths.dtype} {tuple(lengths.shape)}"
        )
    # Values are looked at on the CPU only: on a GPU that would stop the host, so the kernels clamp them there.
    if lengths.device.type == "cpu" and memories and not use_registered_op() and not backends.transforming():
        low, high = (int(bound) for bound in lengths.aminmax())
        if low < 0 or high > count:
            raise ValueError(f"lengths must lie in 0..{count}, got values in {low}..{high}")
    call.lengths = lengths.to(call.keys.device, torch.int64)


def _check_mask(call: AttentionCall) -> None:
    mask = call.mask
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    (memories, count, _), (batch, queries, _) = call.keys.shape, call.query.shape
    shapes = (memories, count), (batch, queries, count)
    if mask.dtype is not torch.bool or tuple(mask.shape) not in shapes:
        raise ValueError(
            f"mask must be torch.bool of shape {shapes[0]} or {shapes[1]}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if mask.device != call.keys.device:
        raise ValueError(f"mask must be on {call.keys.device}, got {mask.device}")


def decide(call: AttentionCall, backend: str) -> str:
    """`check` and `backends.choose`."""
    check(call)
    return backends.choose(call, backend)


Result = tuple[Tensor, Tensor | None]
_MODULES = {"cpu": cpu, "triton": triton}
_INPUT_COUNT = 6  # of AttentionCall.inputs


def run_on(call: AttentionCall, picked: str) -> Result:
    """A checked call on the back end that `backends.choose` has picked."""
    if picked == "aten":
        return aten.run(call)
    if picked == "reference":
        context, weights = reference.run(call)
        return context, weights if call.need_weights else None
    device = call.query.device.type
    if torch.compiler.is_compiling():
        # TorchDynamo does not take the query twice, as self-attention gives it.
        call.keys = call.keys.view_as(call.keys)
    inputs: tuple[Tensor | None, ...] = call.inputs()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inputs = tuple(None if tensor is None else tensor.to(dtype) for tensor in inputs)
    options = (call.factors, call.lengths, call.mask, call.causal, call.scale, call.normalize)
    if wants_gradients(inputs):
        context, weights = _Attention.apply(picked, call.need_weights, *inputs, *options)
        return context, weights
    context, weights = _forward(picked, *inputs, *options)
    return context, weights.to(context.dtype) if call.need_weights else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, need_weights: bool, *arguments: Any) -> Result:
        context, weights = _forward(backend, *arguments)
        ctx.backend, ctx.scalars = backend, arguments[-3:]
        ctx.save_for_backward(*arguments[:-3], weights)
        ctx.set_materialize_grads(False)
        return context, weights.to(context.dtype) if need_weights else None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        *tensors, weights = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2 : 2 + _INPUT_COUNT])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            *inputs, _, lengths, mask = tensors
            options = (None, lengths, mask, *ctx.scalars)

            def run(inputs: list[Any]) -> Result:
                query, keys, values, v, features, feature_weight = inputs
                return reference.run(AttentionCall(query, keys, values, v, features, feature_weight, *options))

            found = differentiable_gradients(run, inputs, gradients, needs)
        else:
            all_found = _backward(ctx.backend, *gradients, *tensors, weights, *ctx.scalars, needs)
            found = [gradient if need else None for gradient, need in zip(all_found, needs, strict=True)]
        return None, None, *found, *[None] * 6


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.fastrnn.attention_forward(*args) if use_registered_op() else _launch_forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.fastrnn.attention_backward(*args) if use_registered_op() else _launch_backward(*args)


def _launch_forward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    return _MODULES[backend].forward(*args)


def _launch_backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    return _MODULES[backend].backward(*args)


def _fake_forward(
    backend: str, query: Tensor, keys: Tensor, values: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    batch, queries, _ = query.shape
    size = keys.shape[-1] if values is None else values.shape[-1]
    return query.new_empty(batch, queries, size), query.new_empty(batch, queries, keys.shape[1], dtype=torch.float32)


def _fake_backward(backend: str, dcontext: Tensor | None, dweights: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    query, needs = args[0], args[-1]
    return tuple(
        tensor.new_empty(tensor.shape) if need else query.new_empty(0)
        for tensor, need in zip(args[:_INPUT_COUNT], needs, strict=True)
    )


_INPUTS = (
    "Tensor query, Tensor keys, Tensor? values, Tensor? v, Tensor? features, Tensor? feature_weight, "
    "Tensor? factors, Tensor? lengths, Tensor? mask, {}bool causal, float scale, str normalize"
)
torch.library.define(
    "fastrnn::attention_forward", f"(str backend, {_INPUTS.format('')}) -> (Tensor context, Tensor weights)"
)
torch.library.define(
    "fastrnn::attention_backward",
    f"(str backend, Tensor? dcontext, Tensor? dweights, {_INPUTS.format('Tensor weights, ')}, bool[] needs) -> ("
    + ", ".join(["Tensor"] * _INPUT_COUNT)
    + ")",
)
for _device in ("CPU", "CUDA"):
    torch.library.impl("fastrnn::attention_forward", _device, _launch_forward)
    torch.library.impl("fastrnn::attention_backward", _device, _launch_backward)
torch.library.register_fake("fastrnn::attention_forward", _fake_forward)
torch.library.register_fake("fastrnn::attention_backward", _fake_backward)
