"""Attention: modules that weigh a memory, such as the outputs of an encoder, for each query."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrnn.backends import AttentionCall, transforming
from fastrnn.nn.options import check_backend, refuse_scripting
from fastrnn.ops import attention, key_factors
from fastrnn.ops.attention import NORMALIZATIONS, check
from fastrnn.ops.linear import linear
from fastrnn.reference import attended_keys


class PreparedMemory(NamedTuple):
    """What depends on the memory alone, computed once for all queries. Differentiable; None where not needed."""

    memory: Tensor
    """[B, Tk, Dk]."""
    keys: Tensor | None = None
    """[B, Tk, hidden_size], the projected memory."""
    factors: Tensor | None = None
    """[B, Tk, hidden_size], :func:`fastrnn.ops.key_factors` of the keys; without gradient."""
    lengths: Tensor | None = None
    """[B] int64."""


class LoopTerms(NamedTuple):
    """An attention module as the operator attention_decoder takes it."""

    query_weight: Tensor | None  # [D, Dq]
    v: Tensor | None
    scale: float
    normalize: str


class Attention(torch.nn.Module):
    """Base of all attention modules."""

    backend: str
    _settings: tuple[str, ...] = ()  # The arguments of the constructor, which repr shows.

    def __init__(self, backend: str) -> None:
        super().__init__()
        check_backend(backend)
        self.backend = backend

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*self._settings, "backend"))

    def reset_parameters(self) -> None:
        """Weights as those of torch.nn.Linear: uniform in +-1 / sqrt(inputs), all dimensions but the first being inputs
        (of a vector: its own)."""
        for parameter in self.parameters():
            _init_uniform(parameter)


class MemoryAttention(Attention):
    """Base of the modules that have queries and a memory: the call that they share."""

    def forward(
        self,
        query: Tensor,
        memory: Tensor | PreparedMemory,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        state: Any = None,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Context and weights of each query.

        Args:
            query: [N, Tq, Dq], or [N, Dq] for one query each. N is B, or a multiple of it: N / B neighbours share a
                memory, as the beams of a sentence do.
            memory: [B, Tk, Dk], or what :meth:`prepare` has made of it.
            lengths: [B] integers in 0..Tk: what lies from lengths[b] on is not seen and may hold anything, NaN too. By
                default those that the memory was prepared with.
            mask: bool, True where a query sees a place of the memory: [B, Tk], or [N, Tq, Tk].
            state: what the call before returned, where a module has a state; None at the start.
            need_weights: without, the second result is None.

        Returns:
            Context [N, Tq, Dk], weights [N, Tq, Tk], both without Tq where the query has none, and the next state. A
            query that sees nothing gets zeros, and gives zero gradients.

        Raises:
            ValueError, TypeError: naming the argument, what was wanted and what came.
            NotImplementedError: the module's ``backend`` cannot compute this call; with all reasons.
        """
        _check_tensor("query", query, (2, 3))
        single = query.dim() == 2
        if single:
            query = query.unsqueeze(1)
        if isinstance(memory, PreparedMemory):
            prepared = memory if lengths is None else memory._replace(lengths=lengths)
        else:
            self._check_memory(memory)
            prepared = self._prepare(memory, lengths, mask, query)
        _check_fits("query", query, "memory", prepared.memory)
        context, weights, state = self._attend(query, prepared, mask, state, need_weights)
        if not need_weights:
            weights = None
        if single:
            return context.squeeze(1), None if weights is None else weights.squeeze(1), state
        return context, weights, state

    def prepare(self, memory: Tensor, lengths: Tensor | None = None) -> PreparedMemory:
        """What depends on the memory alone, to be given to :meth:`forward` in the memory's place.

        Args:
            memory: [B, Tk, Dk].
            lengths: [B] integers in 0..Tk, as in :meth:`forward`.
        """
        self._check_memory(memory)
        return self._prepare(memory, checked_lengths(memory, lengths), None, memory[:, :0])

    def _check_memory(self, memory: Tensor) -> None:
        if not isinstance(memory, Tensor):
            raise TypeError(f"memory must be a torch.Tensor or a PreparedMemory, got {type(memory).__name__}")
        _check_tensor("memory", memory, (3,))

    def _prepare(self, memory: Tensor, lengths: Tensor | None, mask: Tensor | None, query: Tensor) -> PreparedMemory:
        """For these queries, of which only how many there are matters, to go with the mask."""
        return PreparedMemory(memory, lengths=lengths)

    def _attend(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        raise NotImplementedError

    def _loop_terms(self, query_size: int) -> LoopTerms | None:
        """What a decoder's loop in one operator call needs, or None where the module cannot be in one."""
        return None

    def _refuse_state(self, state: Any) -> None:
        if state is not None:
            raise ValueError(f"state must be None, {type(self).__name__} has none, got {type(state).__name__}")

    def _refuse_kernels(self) -> None:
        """For the modules whose few operations are torch's own."""
        if self.backend not in ("auto", "reference"):
            raise NotImplementedError(
                f"backend {self.backend!r} cannot compute this call: {type(self).__name__} has no kernels"
            )


class MeanContext(MemoryAttention):
    """c = (1/n) sum_s h_s, the same context for every query, n being how many places of the memory are seen.

    The first of the lectures' versions of attention. No parameters; of the query only the shape matters.

    Args:
        backend: ``"auto"`` or ``"reference"``: it is computed by torch's own operations.
    """

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__(backend)

    def _attend(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        self._refuse_kernels()
        self._refuse_state(state)
        memory, seen = _seen(query, prepared, mask)
        weights = seen.to(memory.dtype) / seen.sum(-1, keepdim=True).clamp(min=1).to(memory.dtype)
        context = weights @ memory
        return _of_queries(context, query), _of_queries(weights.to(context.dtype), query), None


class PositionalAttention(MemoryAttention):
    """c_t = sum_s a_ts h_s with a learned table a of weights, taken as they are.

    The second of the lectures' versions of attention: what is looked at depends on the positions alone. Its state is
    the number of queries so far, an int: the position of the next.

    Args:
        max_queries: rows of the table.
        max_memory: columns of the table.
        backend: ``"auto"`` or ``"reference"``: it is computed by torch's own operations.

    Attributes:
        table: [max_queries, max_memory], uniform in +-1 / sqrt(max_memory) at first.

    Raises:
        ValueError: in forward, where there are more queries, or more memory, than the table has.
    """

    _settings = ("max_queries", "max_memory")

    def __init__(
        self, max_queries: int, max_memory: int, *, backend: str = "auto", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(backend)
        _check_sizes(max_queries=max_queries, max_memory=max_memory)
        self.max_queries = max_queries
        self.max_memory = max_memory
        self.table = _parameter(max_queries, max_memory, device=device, dtype=dtype)
        self.reset_parameters()

    def _attend(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        self._refuse_kernels()
        start = 0 if state is None else state
        if not isinstance(start, int) or isinstance(start, bool):
            raise TypeError(f"state must be an int, the number of queries so far, or None, got {type(state).__name__}")
        _check_fits("memory", prepared.memory, "table", self.table)
        end, count = start + query.shape[1], prepared.memory.shape[1]
        if start < 0 or end > self.max_queries:
            raise ValueError(f"query positions must lie in 0..{self.max_queries - 1}, got {start} to {end - 1}")
        if count > self.max_memory:
            raise ValueError(f"memory must have at most {self.max_memory} places, got {count}")
        memory, seen = _seen(query, prepared, mask)
        table = self.table[start:end, :count]
        batch = memory.shape[0]
        rows = query.shape[0] * query.shape[1] // max(batch, 1)
        weights = table.repeat(rows // max(len(table), 1), 1).masked_fill(~seen, 0).expand(batch, rows, count)
        context = weights @ memory
        return _of_queries(context, query), _of_queries(weights.to(context.dtype), query), end


class DotAttention(MemoryAttention):
    """e_ts = ``<q_t, h_s>``, weights softmax_s e_ts, c_t = sum_s a_ts h_s (Luong et al. 2015, arXiv 1508.04025).

    The fourth of the lectures' versions of attention, and the third with ``normalize="length"``. No parameters.

    Args:
        normalize: ``"softmax"``, or ``"length"``: a_ts = e_ts / n, n being how many places of the memory are seen. The
            context then grows with the square of the memory's scale.
        scaled: divides the products by the root of their size (Vaswani et al. 2017, arXiv 1706.03762).
        backend: ``"auto"``, or the name of the back end that shall compute every call.
    """

    _settings = ("normalize", "scaled")

    def __init__(self, normalize: str = "softmax", *, scaled: bool = False, backend: str = "auto") -> None:
        super().__init__(backend)
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {', '.join(map(repr, NORMALIZATIONS))}, got {normalize!r}")
        _check_flags(scaled=scaled)
        self.normalize = normalize
        self.scaled = scaled

    def _attend(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        self._refuse_state(state)
        context, weights = attention(
            query,
            prepared.memory,
            score="scaled_dot" if self.scaled else "dot",
            lengths=prepared.lengths,
            mask=mask,
            normalize=self.normalize,
            need_weights=need_weights,
            backend=self.backend,
        )
        return context, weights, None

    def _loop_terms(self, query_size: int) -> LoopTerms | None:
        return LoopTerms(None, None, 1 / math.sqrt(query_size) if self.scaled else 1.0, self.normalize)


class GeneralAttention(MemoryAttention):
    """e_ts = q_t W h_s, weights softmax_s e_ts, c_t = sum_s a_ts h_s (Luong et al. 2015, arXiv 1508.04025).

    Args:
        query_size: Dq.
        memory_size: Dk.
        backend: ``"auto"``, or the name of the back end that shall compute every call.

    Attributes:
        weight: W [query_size, memory_size], uniform in +-1 / sqrt(memory_size) at first.
    """

    _settings = ("query_size", "memory_size")

    def __init__(
        self, query_size: int, memory_size: int, *, backend: str = "auto", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(backend)
        _check_sizes(query_size=query_size, memory_size=memory_size)
        self.query_size = query_size
        self.memory_size = memory_size
        self.weight = _parameter(query_size, memory_size, device=device, dtype=dtype)
        self.reset_parameters()

    def _check_memory(self, memory: Tensor) -> None:
        super()._check_memory(memory)
        _check_vectors("memory", memory, self.memory_size)

    def _attend(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        self._refuse_state(state)
        _check_vectors("query", query, self.query_size)
        _check_fits("query", query, "weight", self.weight)
        context, weights = attention(
            query,
            prepared.memory,
            score="general",
            weight=self.weight,
            lengths=prepared.lengths,
            mask=mask,
            need_weights=need_weights,
            backend=self.backend,
        )
        return context, weights, None

    def _loop_terms(self, query_size: int) -> LoopTerms | None:
        return LoopTerms(self.weight.T, None, 1.0, "softmax")


class _AdditiveScore(MemoryAttention):
    """e_ts = v . tanh(W q_t + U h_s + b + F f_ts), b and the features f where a subclass has them."""

    _state_rows = 0  # How many weights [N, Tk] the state holds; 0: there is none.
    bias: Tensor | None
    feature_weight: Tensor | None

    def __init__(
        self, query_size: int, memory_size: int, hidden_size: int, bias: bool, backend: str, device: Any, dtype: Any
    ) -> None:
        super().__init__(backend)
        _check_sizes(query_size=query_size, memory_size=memory_size, hidden_size=hidden_size)
        self.query_size = query_size
        self.memory_size = memory_size
        self.hidden_size = hidden_size
        self.query_weight = _parameter(hidden_size, query_size, device=device, dtype=dtype)
        self.memory_weight = _parameter(hidden_size, memory_size, device=device, dtype=dtype)
        self.v = _parameter(hidden_size, device=device, dtype=dtype)
        self.register_parameter("bias", _parameter(hidden_size, device=device, dtype=dtype) if bias else None)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _check_memory(self, memory: Tensor) -> None:
        super()._check_memory(memory)
        _check_vectors("memory", memory, self.memory_size)
        _check_fits("memory", memory, "memory_weight", self.memory_weight)

    def prepare(self, memory: Tensor, lengths: Tensor | None = None) -> PreparedMemory:
        """As in every attention module; here ``keys`` are U h + b.

        Without state ``factors`` are given as well where kernels take them: for keys in float32 on the CPU, and in
        float32, bfloat16 or float16 on CUDA.
        """
        prepared = super().prepare(memory, lengths)
        assert prepared.keys is not None
        if self._state_rows or transforming() or not _kernels_take_factors(prepared.keys):
            return prepared
        return prepared._replace(factors=key_factors(prepared.keys))

    def _prepare(self, memory: Tensor, lengths: Tensor | None, mask: Tensor | None, query: Tensor) -> PreparedMemory:
        prepared = PreparedMemory(memory, lengths=lengths)
        # Zeros for what nobody sees: the gradient of U would multiply NaN there by 0.
        zeroed, _ = _seen(query, prepared, mask)
        keys = linear(zeroed, self.memory_weight)
        return prepared._replace(keys=keys if self.bias is None else keys + self.bias)

    def _score_vector(self) -> Tensor:
        return self.v

    def _attend(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        if prepared.keys is None:
            raise ValueError("memory must be prepared by this module, got a PreparedMemory whose keys are None")
        _check_vectors("query", query, self.query_size)
        _check_fits("query", query, "query_weight", self.query_weight)
        projected, v = linear(query, self.query_weight), self._score_vector()
        if not self._state_rows:
            self._refuse_state(state)
            context, weights = attention(
                projected,
                prepared.keys,
                prepared.memory,
                score="additive",
                v=v,
                factors=prepared.factors,
                lengths=prepared.lengths,
                mask=mask,
                need_weights=need_weights,
                backend=self.backend,
            )
            return context, weights, None
        call = AttentionCall(projected, prepared.keys, prepared.memory, lengths=prepared.lengths, mask=mask)
        check(call)
        state = self._start(query, prepared.memory, state)
        contexts, all_weights = [], []
        # One after the other, as each needs the weights of the one before. No queries at all come as one empty piece.
        for t, step in enumerate(projected.split(1, 1)):
            features = self._features(state).to(projected.dtype).unsqueeze(1)
            context, weights = attention(
                step,
                prepared.keys,
                prepared.memory,
                score="location",
                v=v,
                features=features.expand(-1, step.shape[1], -1, -1),
                feature_weight=self.feature_weight,
                lengths=call.lengths,
                mask=mask if mask is None or mask.dim() == 2 else mask[:, t : t + 1],
                backend=self.backend,
            )
            assert weights is not None
            if query.shape[1]:
                state = self._next(state, weights.squeeze(1).to(state.dtype))
            contexts.append(context)
            all_weights.append(weights)
        if len(contexts) == 1:
            return contexts[0], all_weights[0], state
        return torch.cat(contexts, 1), torch.cat(all_weights, 1), state

    def _start(self, query: Tensor, memory: Tensor, state: Any) -> Tensor:
        batch, count = query.shape[0], memory.shape[1]
        shape = (batch, count) if self._state_rows == 1 else (batch, self._state_rows, count)
        if state is None:
            # Sums over many steps are kept in float32 at least.
            return memory.new_zeros(shape, dtype=torch.promote_types(memory.dtype, torch.float32))
        if not isinstance(state, Tensor):
            raise TypeError(f"state must be a torch.Tensor or None, got {type(state).__name__}")
        if tuple(state.shape) != shape or not state.is_floating_point():
            raise ValueError(f"state must be floating of shape {shape}, got {state.dtype} {tuple(state.shape)}")
        _check_device("state", state, memory)
        return state

    def _features(self, state: Tensor) -> Tensor:
        """[N, Tk, C] of the state."""
        raise NotImplementedError

    def _next(self, state: Tensor, weights: Tensor) -> Tensor:
        """The state after a query whose weights [N, Tk] are these."""
        raise NotImplementedError


class AdditiveAttention(_AdditiveScore):
    """e_ts = v . tanh(W q_t + U h_s), weights softmax_s e_ts, c_t = sum_s a_ts h_s.

    Bahdanau et al. 2015, arXiv 1409.0473.

    Args:
        query_size: Dq.
        memory_size: Dk.
        hidden_size: of v.
        normalize_v: takes g v / ``|v|`` for v and adds b within the tanh, as GNMT does (normalised Bahdanau attention:
            Salimans and Kingma 2016, arXiv 1602.07868).
        coverage: e_ts = v . tanh(W q_t + U h_s + b + w k_ts), the coverage k_ts being the sum of the weights of all
            queries before t (See et al. 2017, arXiv 1704.04368). It is the state, [N, Tk], float32 at least; several
            queries are then taken one after the other.
        backend: ``"auto"``, or the name of the back end that shall compute every call.

    Attributes:
        query_weight: W [hidden_size, query_size].
        memory_weight: U [hidden_size, memory_size].
        v: [hidden_size]. Like W and U at first as the weights of torch.nn.Linear.
        bias: b [hidden_size], 0 at first; with ``normalize_v`` or ``coverage``, else None.
        g: scalar, sqrt(1 / hidden_size) at first; with ``normalize_v``, else None.
        feature_weight: w [hidden_size, 1], uniform in +-1 at first; with ``coverage``, else None.
    """

    _settings = ("query_size", "memory_size", "hidden_size", "normalize_v", "coverage")
    g: Tensor | None

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        hidden_size: int,
        normalize_v: bool = False,
        *,
        coverage: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_flags(normalize_v=normalize_v, coverage=coverage)
        super().__init__(query_size, memory_size, hidden_size, normalize_v or coverage, backend, device, dtype)
        self.normalize_v = normalize_v
        self.coverage = coverage
        self._state_rows = 1 if coverage else 0
        self.register_parameter("g", _parameter(device=device, dtype=dtype) if normalize_v else None)
        feature_weight = _parameter(hidden_size, 1, device=device, dtype=dtype) if coverage else None
        self.register_parameter("feature_weight", feature_weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.g is not None:
            torch.nn.init.constant_(self.g, math.sqrt(1 / self.hidden_size))

    def _score_vector(self) -> Tensor:
        return self.v if self.g is None else self.g * self.v / torch.linalg.vector_norm(self.v)

    def _loop_terms(self, query_size: int) -> LoopTerms | None:
        return None if self.coverage else LoopTerms(self.query_weight, self._score_vector(), 1.0, "softmax")

    def _features(self, state: Tensor) -> Tensor:
        return state.unsqueeze(-1)

    def _next(self, state: Tensor, weights: Tensor) -> Tensor:
        return state + weights


class LocationAttention(_AdditiveScore):
    """e_ts = v . tanh(W q_t + U h_s + b + F f_ts), f a convolution over the weights a_{t-1} of the query before.

    Weights softmax_s e_ts, c_t = sum_s a_ts h_s (Chorowski et al. 2015, arXiv 1506.07503). The state is a_{t-1},
    [N, Tk], zeros at first; several queries are taken one after the other.

    Args:
        query_size: Dq.
        memory_size: Dk.
        hidden_size: of v.
        channels: of the convolution.
        kernel_size: of the convolution, odd: the places around each, zeros beyond the ends.
        cumulative: the convolution sees the sum of all weights so far too, as in Tacotron 2 (Shen et al. 2018, arXiv
            1712.05884). The state is [N, 2, Tk], a_{t-1} and the sum.
        backend: ``"auto"``, or the name of the back end that shall compute every call.

    Attributes:
        query_weight: W [hidden_size, query_size].
        memory_weight: U [hidden_size, memory_size].
        v: [hidden_size].
        bias: b [hidden_size], 0 at first.
        conv_weight: [channels, 2 if cumulative else 1, kernel_size].
        feature_weight: F [hidden_size, channels]. All but b at first as the weights of torch.nn.Linear and Conv1d.
    """

    _settings = ("query_size", "memory_size", "hidden_size", "channels", "kernel_size", "cumulative")

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        hidden_size: int,
        channels: int,
        kernel_size: int,
        *,
        cumulative: bool = False,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_flags(cumulative=cumulative)
        super().__init__(query_size, memory_size, hidden_size, True, backend, device, dtype)
        _check_sizes(channels=channels, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.cumulative = cumulative
        self._state_rows = 2 if cumulative else 1
        self.conv_weight = _parameter(channels, self._state_rows, kernel_size, device=device, dtype=dtype)
        self.feature_weight = _parameter(hidden_size, channels, device=device, dtype=dtype)
        self.reset_parameters()

    def _features(self, state: Tensor) -> Tensor:
        stacked = (state if self.cumulative else state.unsqueeze(1)).to(self.conv_weight.dtype)
        if stacked.shape[-1] == 0:  # torch has no convolution of nothing.
            return stacked.new_zeros(stacked.shape[0], 0, self.channels)
        return F.conv1d(stacked, self.conv_weight, padding=self.kernel_size // 2).transpose(1, 2)

    def _next(self, state: Tensor, weights: Tensor) -> Tensor:
        return torch.stack([weights, state[:, 1] + weights], 1) if self.cumulative else weights


class SelfAttention(Attention):
    """q, k, v = W_Q x, W_K x, W_V x, weights softmax_s ``<q_t, k_s>`` / sqrt(d), c_t = sum_s a_ts v_s.

    Every step of a sequence attends to all of them (Vaswani et al. 2017, arXiv 1706.03762); d is the size of a head.

    Args:
        embed_dim: D.
        num_heads: divides embed_dim. The contexts of several heads are concatenated and projected once more.
        projections: without, a_ts = softmax_s ``<x_t, x_s>``, c_t = sum_s a_ts x_s: no parameters, no scale, one head.
        causal: step t sees the steps 0..t.
        backend: ``"auto"``, or the name of the back end that shall compute every call.

    Attributes:
        in_proj_weight: W_Q, W_K and W_V, one below the other, [3 * embed_dim, embed_dim].
        out_proj: torch.nn.Linear without bias, with several heads, else None. Both weights are uniform in
            +-1 / sqrt(embed_dim) at first, and have the names that they have in torch.nn.MultiheadAttention.
    """

    _settings = ("embed_dim", "num_heads", "projections", "causal")
    in_proj_weight: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 1,
        projections: bool = True,
        causal: bool = False,
        *,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(backend)
        _check_sizes(embed_dim=embed_dim, num_heads=num_heads)
        _check_flags(projections=projections, causal=causal)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        if not projections and num_heads != 1:
            raise ValueError(f"num_heads must be 1 without projections, got {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.projections = projections
        self.causal = causal
        in_proj_weight = _parameter(3 * embed_dim, embed_dim, device=device, dtype=dtype) if projections else None
        self.register_parameter("in_proj_weight", in_proj_weight)
        self.out_proj = None
        if num_heads > 1:
            self.out_proj = torch.nn.Linear(embed_dim, embed_dim, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(
        self, x: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None, None]:
        """Contexts and weights of a batch of sequences.

        Args:
            x: [B, T, D].
            lengths: [B] integers in 0..T: the steps from lengths[b] on are padding.
            mask: bool. [B, T]: False where a step is padding. [B, T, T]: True where step t, the second index, sees step
                s, the third.
            need_weights: without, the second result is None.

        Returns:
            Context [B, T, D], weights [B, T, T], or [B, num_heads, T, T] with several heads, and None. A step that sees
            none, and padding, has zeros. Padding may hold anything, NaN too.

        Raises:
            ValueError, TypeError: naming the argument, what was wanted and what came.
            NotImplementedError: the module's ``backend`` cannot compute this call; with all reasons.
        """
        _check_tensor("x", x, (3,))
        _check_vectors("x", x, self.embed_dim)
        call = AttentionCall(x, x, lengths=lengths, mask=mask)
        check(call)
        lengths = call.lengths
        padding = None
        if lengths is not None or (mask is not None and mask.dim() == 2):
            present = attended_keys(1, x, lengths, mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else None)
            padding = ~present.transpose(1, 2)  # [B, T, 1]
            x = x.masked_fill(padding, 0)
        q = k = v = x
        if self.in_proj_weight is not None:
            _check_fits("x", x, "in_proj_weight", self.in_proj_weight)
            q, k, v = linear(x, self.in_proj_weight).chunk(3, -1)
        heads = self.num_heads
        if heads > 1:  # Each head is an entry of the batch, and so needs lengths and mask of its own.
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for part in (q, k, v))
            lengths = None if lengths is None else lengths.repeat_interleave(heads)
            mask = None if mask is None else mask.repeat_interleave(heads, 0)
        context, weights = attention(
            q,
            k,
            v,
            score="scaled_dot" if self.projections else "dot",
            lengths=lengths,
            mask=mask,
            causal=self.causal,
            need_weights=need_weights,
            backend=self.backend,
        )
        if self.out_proj is not None:
            context = self.out_proj(context.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2))
            weights = None if weights is None else weights.unflatten(0, (-1, heads))
        if padding is not None:
            context = context.masked_fill(padding, 0)
            if weights is not None:
                weights = weights.masked_fill(padding if heads == 1 else padding.unsqueeze(1), 0)
        return context, weights, None


def checked_lengths(memory: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Lengths that are known to fit the memory, where the kernels want them."""
    call = AttentionCall(memory[:, :0], memory, lengths=lengths)
    check(call)
    return call.lengths


def _parameter(*shape: int, device: Any, dtype: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def _init_uniform(weight: Tensor) -> None:
    inputs = math.prod(weight.shape[1:] if weight.dim() > 1 else weight.shape)
    bound = 1 / math.sqrt(inputs)
    torch.nn.init.uniform_(weight, -bound, bound)


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name} must be positive, got {size}")


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _check_tensor(name: str, tensor: Any, dims: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if tensor.dim() not in dims:
        wanted = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {wanted} dimensions, got shape {tuple(tensor.shape)}")


def _check_vectors(name: str, tensor: Tensor, size: int) -> None:
    if tensor.shape[-1] != size:
        raise ValueError(f"{name} must have vectors of size {size}, got shape {tuple(tensor.shape)}")


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {tensor.device}")


def _check_fits(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Device and dtype, as torch's products want them equal."""
    _check_device(name, tensor, other)
    if tensor.dtype is not other.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise ValueError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def _kernels_take_factors(keys: Tensor) -> bool:
    if keys.device.type == "cuda":
        return keys.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return keys.device.type == "cpu" and keys.dtype is torch.float32


def _seen(query: Tensor, prepared: PreparedMemory, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The memory, zero where no query sees it, and which of it is seen, bool [B, N / B * Tq, Tk].

    [B, 1, Tk] where all queries of a memory see the same. Lengths and mask are checked.
    """
    memory = prepared.memory
    placeholder = memory.new_zeros(()).expand(*query.shape[:2], memory.shape[-1])
    call = AttentionCall(placeholder, memory, lengths=prepared.lengths, mask=mask)
    check(call)
    rows = 1 if call.mask is None else call.mask.shape[1]
    seen = attended_keys(rows, memory, call.lengths, call.mask)
    if call.lengths is None and call.mask is None:
        return memory, seen
    return memory.masked_fill(~seen.any(1)[..., None], 0), seen


def _of_queries(rows: Tensor, query: Tensor) -> Tensor:
    """[N, Tq, n] of [B, N / B * Tq or 1, n]."""
    batch, _, size = rows.shape
    count, steps = query.shape[:2]
    return rows.expand(batch, count * steps // max(batch, 1), size).reshape(count, steps, size)
