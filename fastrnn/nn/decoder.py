"""AttentionDecoder: recurrent layers that look at a memory at every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import AttentionCall
from fastrnn.backends.decoder import DecoderCall
from fastrnn.nn.attention import MemoryAttention, PreparedMemory, checked_lengths
from fastrnn.nn.options import WithOptions, check_backend
from fastrnn.nn.rnn import GRU, LSTM, RNN, Layers
from fastrnn.ops.attention import check
from fastrnn.ops.decoder import run_loop
from fastrnn.reference import LayerWeights

_LAYERS: dict[str, Any] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}


class DecoderState(NamedTuple):
    """What a decoder carries from step to step; the first dimension of every tensor is that of the sequences."""

    hidden: Tensor
    """[N, num_layers, hidden_size]."""
    cell: Tensor | None
    """[N, num_layers, hidden_size], LSTM."""
    context: Tensor
    """[N, memory_size], what the next step is fed."""
    attention: Any = None
    """The state of the attention module."""


class AttentionDecoder(torch.nn.Module):
    """Recurrent layers with attention within the loop over time.

    ``h_t = layers([x_t, c_{t-1}], h_{t-1})`` and ``c_t = attention(h_t, memory)``: the context is fed back (input
    feeding, Luong et al. 2015, arXiv 1508.04025). With ``attend="before"``, as in Bahdanau et al. 2015 (arXiv
    1409.0473), ``c_t = attention(h_{t-1}, memory)`` and ``h_t = layers([x_t, c_t], h_{t-1})``. The top layer's h is
    what asks, and the output of step t is [h_t, c_t].

    On the CPU the whole loop is one operator call, forward and backward, for :class:`DotAttention`,
    :class:`GeneralAttention` and :class:`AdditiveAttention` without coverage, and layers without options but dropout
    and reset_after. Otherwise every step is some, on the back ends of the layers and of the attention module.

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"rnn"``.
        input_size: of x_t.
        hidden_size: of h_t, and of the queries.
        attention: a module of ``fastrnn.nn`` with queries and a memory.
        num_layers: of the recurrence.
        input_feeding: without, the layers see x_t alone, and all queries are asked at once.
        attend: ``"after"`` or ``"before"`` the layers' step.
        memory_size: of the memory; by default the attention module's, or hidden_size where it has none.
        dropout: probability with which an element is dropped between layers.
        bias: whether the layers have biases.
        backend: ``"auto"``, or the name of the back end that shall compute the layers and the loop.
        options: those of :class:`fastrnn.nn.LSTM`, :class:`fastrnn.nn.GRU` or :class:`fastrnn.nn.RNN`.

    Attributes:
        rnn: the layers, with their parameters.
        attention: the attention module.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        attention: MemoryAttention,
        num_layers: int = 1,
        input_feeding: bool = True,
        *,
        attend: str = "after",
        memory_size: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        if cell not in _LAYERS:
            raise ValueError(f"cell must be one of {', '.join(map(repr, _LAYERS))}, got {cell!r}")
        if attend not in ("after", "before"):
            raise ValueError(f"attend must be 'after' or 'before', got {attend!r}")
        if not isinstance(attention, MemoryAttention):
            raise TypeError(
                f"attention must be a module of fastrnn.nn with queries and a memory, got {type(attention).__name__}"
            )
        asked = getattr(attention, "query_size", hidden_size)
        if asked != hidden_size:
            raise ValueError(f"attention must have queries of hidden_size {hidden_size}, got query_size {asked}")
        remembered = getattr(attention, "memory_size", memory_size)
        if memory_size is not None and remembered != memory_size:
            raise ValueError(f"memory_size must be the attention module's {remembered}, got {memory_size}")
        for name in ("batch_first", "bidirectional", "proj_size", "return_cell_states"):
            if options.get(name):
                raise ValueError(f"{name} does not go with a decoder")
        if not isinstance(input_feeding, bool):
            raise TypeError(f"input_feeding must be a bool, got {type(input_feeding).__name__}")
        for name in ("recurrent_dropout", "weight_dropout"):
            if input_feeding and options.get(name):
                raise ValueError(f"{name} needs input_feeding=False: its mask is one for all steps of a call")
        check_backend(backend)
        self.memory_size: int = getattr(attention, "memory_size", hidden_size) if memory_size is None else memory_size
        self.input_size = input_size
        self.input_feeding = input_feeding
        self.attend = attend
        self.rnn = _LAYERS[cell](
            input_size + (self.memory_size if input_feeding else 0),
            hidden_size,
            num_layers,
            bias=bias,
            dropout=dropout,
            backend=backend,
            **options,
        )
        self.attention = attention

    def extra_repr(self) -> str:
        return f"input_size={self.input_size}, input_feeding={self.input_feeding}, attend={self.attend!r}"

    def initial_state(self, memory: Tensor | PreparedMemory, hidden: Any = None, beams: int = 1) -> DecoderState:
        """The state before the first step: no context yet.

        Args:
            memory: [B, Tk, memory_size], or what ``attention.prepare`` has made of it.
            hidden: h_0 [num_layers, N, hidden_size] (LSTM: h_0 and c_0), as an encoder of torch.nn returns it, N being
                B * beams; zeros by default.
            beams: sequences that share a memory, neighbours in N.
        """
        tensor = _tensor_of(memory)
        batch = tensor.shape[0] * beams
        shape = (batch, self.rnn.num_layers, self.rnn.hidden_size)
        lstm = self.rnn.mode == "LSTM"
        if lstm and not (hidden is None or isinstance(hidden, (tuple, list))):
            raise TypeError(f"hidden must hold h_0 and c_0, got {type(hidden).__name__}")
        given = (None, None) if hidden is None else tuple(hidden) if lstm else (hidden,)
        if lstm and len(given) != 2:
            raise ValueError(f"hidden must hold h_0 and c_0, got {len(given)} tensors")
        states = []
        for name, state in zip(("h_0", "c_0"), given if lstm else given[:1]):
            if state is None:
                states.append(tensor.new_zeros(shape))
                continue
            if not isinstance(state, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(state).__name__}")
            if tuple(state.shape) != (shape[1], shape[0], shape[2]):
                raise ValueError(f"{name} must have shape {(shape[1], batch, shape[2])}, got {tuple(state.shape)}")
            states.append(state.transpose(0, 1))
        return DecoderState(states[0], states[1] if lstm else None, tensor.new_zeros(batch, self.memory_size))

    def forward(
        self,
        input: Tensor,
        memory: Tensor | PreparedMemory,
        state: Any = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """All steps of known inputs (teacher forcing).

        Args:
            input: [N, T, input_size]. N is B, or a multiple of it: N / B neighbours share a memory.
            memory: [B, Tk, memory_size], or what ``attention.prepare`` has made of it.
            state: what the call before returned, or the hidden of :meth:`initial_state`; by default zeros.
            lengths: [B] integers in 0..Tk: the memory from there on is not seen. By default those of a prepared memory.
            mask: [B, Tk] bool: True where the memory is seen.
            need_weights: whether the third result is wanted.

        Returns:
            [h_t, c_t] of all steps [N, T, hidden_size + memory_size], the state after them, and the weights [N, T, Tk]
            or None.

        Raises:
            ValueError, TypeError: naming the argument, what was wanted and what came.
            NotImplementedError: a back end that was asked for cannot compute the call; with all reasons.
        """
        prepared = self._prepare(memory, lengths, mask)
        self._check_input(input, 3, prepared)
        if not isinstance(state, DecoderState):
            beams = input.shape[0] // max(1, prepared.memory.shape[0])
            state = self.initial_state(prepared, state, beams)
        self._check_state(state, input.shape[0])
        if not self.input_feeding:
            return self._ask_at_once(input, prepared, state, mask, need_weights)
        call = self._loop_call(input, prepared, state, mask)
        if call is not None:
            return self._run_loop(call, state, prepared, mask, need_weights)
        outputs, weights = [], []
        for x in input.unbind(1):
            output, state, seen = self._step(x, state, prepared, mask, need_weights)
            outputs.append(output)
            weights.append(seen)
        if not outputs:
            size = self.rnn.hidden_size + self.memory_size
            nothing = input.new_empty(input.shape[0], 0, prepared.memory.shape[1]) if need_weights else None
            return input.new_empty(input.shape[0], 0, size), state, nothing
        return torch.stack(outputs, 1), state, torch.stack(weights, 1) if need_weights else None  # type: ignore[arg-type]

    def step(
        self,
        input: Tensor,
        state: DecoderState,
        memory: Tensor | PreparedMemory,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """One step: as :meth:`forward` with input [N, input_size], for search.

        Give a prepared memory, so that it is not prepared again at each step.

        Returns:
            [h, c] [N, hidden_size + memory_size], the state after the step, and the weights [N, Tk] or None.
        """
        prepared = self._prepare(memory, lengths, mask)
        self._check_input(input, 2, prepared)
        if not isinstance(state, DecoderState):
            raise TypeError(f"state must be a DecoderState, as initial_state gives, got {type(state).__name__}")
        self._check_state(state, input.shape[0])
        return self._step(input, state, prepared, mask, need_weights)

    def _prepare(self, memory: Tensor | PreparedMemory, lengths: Tensor | None, mask: Tensor | None) -> PreparedMemory:
        tensor = _tensor_of(memory)
        if not (mask is None or isinstance(mask, Tensor)):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if mask is not None and (mask.dtype is not torch.bool or mask.shape != tensor.shape[:2]):
            raise ValueError(
                f"mask must be torch.bool of shape {tuple(tensor.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        if not isinstance(memory, PreparedMemory):
            seen = memory if mask is None else memory.masked_fill(~mask.unsqueeze(-1), 0)
            prepared = self.attention.prepare(seen, lengths)
        elif lengths is None:
            prepared = memory
        else:
            prepared = memory._replace(lengths=checked_lengths(tensor, lengths))
        if prepared.memory.shape[-1] != self.memory_size:
            raise ValueError(
                f"memory must have vectors of size {self.memory_size}, got shape {tuple(prepared.memory.shape)}"
            )
        return prepared

    def _check_input(self, input: Tensor, dimensions: int, prepared: PreparedMemory) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
        if input.dim() != dimensions or input.shape[-1] != self.input_size:
            raise ValueError(
                f"input must have {dimensions} dimensions, the last of size {self.input_size}, "
                f"got shape {tuple(input.shape)}"
            )
        batch, memories = input.shape[0], prepared.memory.shape[0]
        if batch % memories if memories else batch:
            raise ValueError(f"input must have a batch that is a multiple of the memory's {memories}, got {batch}")

    def _check_state(self, state: DecoderState, batch: int) -> None:
        of_layers = (batch, self.rnn.num_layers, self.rnn.hidden_size)
        cell = of_layers if self.rnn.mode == "LSTM" else None
        for name, shape in (("hidden", of_layers), ("cell", cell), ("context", (batch, self.memory_size))):
            tensor = getattr(state, name)
            got = None if tensor is None else tuple(tensor.shape)
            if got != shape:
                wanted = "None" if shape is None else f"of shape {shape}"
                raise ValueError(f"state must have {name} {wanted}, got {got}")

    def _step(
        self, x: Tensor, state: DecoderState, prepared: PreparedMemory, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        context, of_attention, weights = state.context, state.attention, None
        if self.attend == "before":
            context, weights, of_attention = self._ask(state.hidden[:, -1], prepared, mask, of_attention, need_weights)
        y, hidden, cell = self._layers(torch.cat([x, context], -1) if self.input_feeding else x, state)
        if self.attend == "after":
            context, weights, of_attention = self._ask(y, prepared, mask, of_attention, need_weights)
        return torch.cat([y, context], -1), DecoderState(hidden, cell, context, of_attention), weights

    def _layers(self, x: Tensor, state: DecoderState) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of the layers: the top one's h, and all of h and c with the sequences first."""
        hidden = state.hidden.transpose(0, 1)
        if state.cell is None:
            y, hidden = self.rnn(x.unsqueeze(0), hidden.contiguous())
            return y.squeeze(0), hidden.transpose(0, 1), None
        states = (hidden.contiguous(), state.cell.transpose(0, 1).contiguous())
        y, (hidden, cell) = self.rnn(x.unsqueeze(0), states)
        return y.squeeze(0), hidden.transpose(0, 1), cell.transpose(0, 1)

    def _ask(
        self, query: Tensor, prepared: PreparedMemory, mask: Tensor | None, state: Any, need_weights: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        found: tuple[Tensor, Tensor | None, Any] = self.attention(
            query, prepared, mask=mask, state=state, need_weights=need_weights
        )
        return found

    def _ask_at_once(
        self, input: Tensor, prepared: PreparedMemory, state: DecoderState, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        """Without input feeding: all steps of the layers, then all queries."""
        if input.shape[1] == 0:
            weights = input.new_empty(input.shape[0], 0, prepared.memory.shape[1]) if need_weights else None
            return input.new_empty(input.shape[0], 0, self.rnn.hidden_size + self.memory_size), state, weights
        states: Any = state.hidden.transpose(0, 1).contiguous()
        if state.cell is not None:
            states = (states, state.cell.transpose(0, 1).contiguous())
        y, states = self.rnn(input.transpose(0, 1), states)
        y = y.transpose(0, 1)
        query = y if self.attend == "after" else torch.cat([state.hidden[:, -1:], y[:, :-1]], 1)
        context, weights, of_attention = self._ask(query, prepared, mask, state.attention, need_weights)
        hidden, cell = (states, None) if state.cell is None else states
        cell = None if cell is None else cell.transpose(0, 1)
        after = DecoderState(hidden.transpose(0, 1), cell, context[:, -1], of_attention)
        return torch.cat([y, context], -1), after, weights

    def _loop_call(
        self, input: Tensor, prepared: PreparedMemory, state: DecoderState, mask: Tensor | None
    ) -> DecoderCall | None:
        """The whole loop as one operator call, or None where it is not to be had."""
        terms = self.attention._loop_terms(self.rnn.hidden_size)
        rnn, asked = self.rnn, {self.rnn.backend, self.attention.backend}
        layers = plain_layers(rnn)
        if (
            terms is None
            or layers is None
            or state.attention is not None
            or (terms.v is not None and prepared.keys is None)
            or not asked <= {"auto", "cpu"}
            or backends.transform_reasons()
            or torch.is_autocast_enabled(input.device.type)
        ):
            return None
        query_weight, v, scale, normalize = terms
        keys, values = (
            (prepared.memory, None) if v is None or prepared.keys is None else (prepared.keys, prepared.memory)
        )
        # The kernels take sizes and lengths as they come.
        size = self.rnn.hidden_size if query_weight is None else query_weight.shape[0]
        query = keys.new_zeros(()).expand(keys.shape[0], 1, size)
        factors = None if v is None else prepared.factors
        seen = AttentionCall(query, keys, values, v, factors=factors, lengths=prepared.lengths, mask=mask)
        check(seen)
        dropout_mask = None
        if rnn.training and rnn.dropout and rnn.num_layers > 1:
            ones = input.new_ones(rnn.num_layers - 1, input.shape[1], input.shape[0], rnn.hidden_size)
            dropout_mask = torch.dropout(ones, rnn.dropout, True)
        call = DecoderCall(
            cell_of(rnn),
            input.transpose(0, 1),
            layers,
            state.hidden.transpose(0, 1),
            None if state.cell is None else state.cell.transpose(0, 1),
            state.context,
            query_weight,
            keys,
            values,
            v,
            seen.factors,
            seen.lengths,
            seen.mask,
            dropout_mask,
            scale,
            normalize,
        )
        return None if call.reasons_against() else call

    def _run_loop(
        self,
        call: DecoderCall,
        state: DecoderState,
        prepared: PreparedMemory,
        mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, DecoderState, Tensor | None]:
        first = None
        if self.attend == "before":
            call.context0, first, _ = self._ask(state.hidden[:, -1], prepared, mask, None, need_weights)
        backends.record(str(call), "cpu", self.rnn.backend)
        h, contexts, weights, hidden, cell = run_loop(call, "cpu")
        of_steps, seen = contexts, weights
        if self.attend == "before":
            of_steps = torch.cat([call.context0.unsqueeze(0), contexts[:-1]])
            if first is not None:
                seen = torch.cat([first.unsqueeze(1), weights[:, :-1]], 1)
        after = DecoderState(hidden.transpose(0, 1), None if cell is None else cell.transpose(0, 1), of_steps[-1])
        output = torch.cat([h, of_steps], -1).transpose(0, 1)
        return output, after, seen if need_weights else None


def cell_of(rnn: Layers) -> str:
    """Of native.CELL_INDEX."""
    return "gru_reset_before" if rnn._cell == "gru" and not rnn.reset_after else rnn._cell


def plain_layers(rnn: Layers) -> list[LayerWeights] | None:
    """The weights of each layer; None with options that a loop of several layers' steps does not have."""
    allowed = ("_cell", "backend", "forget_bias", "reset_after", "return_cell_states")
    names = [name for name in WithOptions.__annotations__ if name not in allowed]
    if any(getattr(rnn, name) != getattr(WithOptions, name) for name in names):
        return None
    layers = []
    for of_layer in rnn._all_weights:
        weights = [getattr(rnn, name) for name in of_layer]
        layers.append((weights[0], weights[1], *(weights[2:] if rnn.bias else (None, None))))
    return layers


def _tensor_of(memory: Tensor | PreparedMemory) -> Tensor:
    tensor = memory.memory if isinstance(memory, PreparedMemory) else memory
    if not isinstance(tensor, Tensor):
        raise TypeError(f"memory must be a torch.Tensor or a PreparedMemory, got {type(memory).__name__}")
    return tensor
