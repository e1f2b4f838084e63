"""RNN, LSTM and GRU: torch.nn's modules with a forward pass of our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastrnn.backends import RecurrenceCall, onnx
from fastrnn.nn.options import WithOptions, draw_seed
from fastrnn.ops.dropout import dropout
from fastrnn.ops.recurrence import check, decide, run_together


class Layers(WithOptions, torch.nn.RNNBase):
    """The forward pass that RNN, LSTM and GRU share. Their other base, torch.nn's class, brings everything else."""

    def __init__(
        self,
        *args: Any,
        backend: str = "auto",
        layer_norm: bool = False,
        residual: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self._set_options(
            backend=backend,
            layer_norm=layer_norm,
            residual=residual,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout,
        )
        super().__init__(*args, **kwargs)
        self._add_parameters([names[0].removeprefix("weight_ih") for names in self._all_weights])

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return self.mode.lower()

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Any, ...]:
        """As torch.nn's forward, and

        Args:
            lengths: [B] integers in 0..T. Steps from lengths[b] on leave sequence b's state alone and output zeros.
            resets: [T, B] bool, [B, T] with batch_first. Where true, the state before that step is zero.
        """
        try:
            return self._forward(input, hx, lengths, resets)
        except (ValueError, TypeError) as error:
            objection = error
        super().forward(input, hx)  # Where torch objects as well, its own words are raised.
        raise objection

    def _forward(self, input: Any, hx: Any, lengths: Tensor | None, resets: Tensor | None) -> tuple[Any, ...]:
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, sorted_indices, unsorted_indices = input if packed else (input, None, None, None)
        if x.dim() != 2 and (packed or x.dim() != 3):
            raise ValueError(f"input must have 3 dimensions, or 2 without a batch, got shape {tuple(x.shape)}")
        unbatched = not packed and x.dim() == 2
        batch_first = self.batch_first and not packed and not unbatched
        x = x.unsqueeze(1) if unbatched else x.transpose(0, 1) if batch_first else x
        if x.shape[0] == 0:  # len(x) would make the number of steps a constant of an exported program.
            raise ValueError(f"input must have at least one time step, got shape {tuple(input.shape)}")
        if isinstance(lengths, Tensor) and unbatched:
            lengths = lengths.reshape(1)
        if isinstance(resets, Tensor):
            if resets.dim() != (1 if unbatched else 2):
                raise ValueError(
                    f"resets must have {1 if unbatched else 2} dimensions, got shape {tuple(resets.shape)}"
                )
            resets = resets.unsqueeze(1) if unbatched else resets.T if self.batch_first else resets
            resets = resets if sorted_indices is None else resets.index_select(1, sorted_indices)
        states = self._states(hx, unbatched, sorted_indices)

        directions = 2 if self.bidirectional else 1
        finals: list[tuple[Any, Any]] = []
        y: Any
        c_all: Any
        sequence: Any
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                # Drawn in the order of time steps, as torch does, so that the same seed drops the same units.
                x = torch.dropout(x.contiguous(), self.dropout, True)
            indices = range(layer * directions, (layer + 1) * directions)
            calls = [self._call(index, x, states[index], lengths, batch_sizes, resets) for index in indices]
            if onnx.exporting() and onnx.has_node_for(calls[0]):
                results = onnx.run([check(call) for call in calls])
            else:
                picked = [decide(call, self.backend) for call in calls]
                if picked[0] == "aten" and layer == 0 and not self.residual and not self.weight_dropout:
                    return super().forward(input, hx)
                results = run_together(calls, picked)
            finals += [(h_n, c_n) for _, h_n, c_n, _ in results]
            outputs = [(y, c_all) for y, _, _, c_all in results]
            y, c_all = outputs[0] if directions == 1 else map(_concatenate, *outputs)
            x = y + x if self.residual and layer else y

        returned: list[Any] = []
        for sequence in (x, c_all) if self.return_cell_states else (x,):
            if packed:
                sequence = PackedSequence(sequence, batch_sizes, sorted_indices, unsorted_indices)
            elif unbatched:
                sequence = sequence.squeeze(1)
            elif batch_first:
                sequence = sequence.transpose(0, 1)
            returned.append(sequence)
        stacked = [_stack(final, unbatched, unsorted_indices) for final in zip(*finals) if final[0] is not None]
        returned.insert(1, tuple(stacked) if len(stacked) > 1 else stacked[0])
        return tuple(returned)

    def _states(self, hx: Any, unbatched: bool, sorted_indices: Tensor | None) -> list[tuple[Any, Any]]:
        """h0 [B, P] and c0 [B, H] (or None) of each layer and direction."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        if hx is None:
            return [(None, None)] * count
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        if len(given) != (2 if self.mode == "LSTM" else 1):
            raise ValueError(f"hx must hold h_0 and c_0, got {len(given)} tensors")
        per_state = []
        for name, state in zip(("h_0", "c_0"), given):
            if state.dim() != (2 if unbatched else 3) or state.shape[0] != count:
                raise ValueError(
                    f"{name} must have {2 if unbatched else 3} dimensions, the first of size {count}, "
                    f"got shape {tuple(state.shape)}"
                )
            state = state.unsqueeze(1) if unbatched else state
            state = state if sorted_indices is None else state.index_select(1, sorted_indices)
            per_state.append(state.unbind(0))
        return list(zip(*per_state)) if len(per_state) == 2 else [(h0, None) for h0 in per_state[0]]

    def _call(
        self,
        index: int,  # of the layer and direction
        x: Tensor,  # [T, B, I], or [N, I] when packed
        state: tuple[Any, Any],
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
    ) -> RecurrenceCall:
        # By attribute, at every call: parametrizations, functional_call and replaced weights are all seen.
        weights = [getattr(self, name) for name in self._all_weights[index]]
        weight_ih, weight_hh = weights[:2]
        bias_ih, bias_hh = weights[2:4] if self.bias else (None, None)
        h0, c0 = state
        recurrent_mask = None
        if self.training and self.weight_dropout:
            weight_hh = dropout(weight_hh, self.weight_dropout, draw_seed())
        if self.training and self.recurrent_dropout:
            batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
            recurrent_mask = dropout(x.new_ones(batch, weight_hh.shape[1]), self.recurrent_dropout, draw_seed())
        suffix = self._all_weights[index][0].removeprefix("weight_ih")
        norm_ih, norm_hh, norm_c = self._norms(suffix)
        return RecurrenceCall(
            self._cell,
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            h0,
            c0,
            weights[-1] if self.proj_size else None,
            lengths,
            batch_sizes,
            resets,
            self.zoneout,
            self._zoneout_seed(),
            recurrent_mask,
            norm_ih,
            norm_hh,
            norm_c,
            self._peephole(suffix),
            self.reset_after,
            self.bidirectional and index % 2 == 1,
            self.return_cell_states,
        )


def _concatenate(forward: Tensor | None, reverse: Tensor | None) -> Tensor | None:
    return None if forward is None or reverse is None else torch.cat([forward, reverse], -1)


def _stack(states: tuple[Tensor, ...], unbatched: bool, unsorted_indices: Tensor | None) -> Tensor:
    """[layers * directions, B, P], without B when unbatched."""
    stacked = states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)
    if unbatched:
        return stacked.squeeze(1)
    return stacked if unsorted_indices is None else stacked.index_select(1, unsorted_indices)


class RNN(Layers, torch.nn.RNN):
    """:class:`torch.nn.RNN`, and what it has not, keyword-only.

    Args:
        backend: ``"auto"``, or the name of the back end that shall compute every call.
        layer_norm: layer norm of W_ih x and of W_hh h, and in the LSTM of c_t before its tanh, each with parameters of
            its own (Ba et al. 2016, arXiv 1607.06450).
        residual: each layer but the first adds its input to its output.
        zoneout: probability with which each unit keeps its previous h (and c); in evaluation the expectation is taken
            (Krueger et al. 2016, arXiv 1606.01305).
        recurrent_dropout: probability with which a unit of h_{t-1} is dropped where it meets weight_hh, the same units
            at all steps of a sequence (Gal and Ghahramani 2016, arXiv 1512.05287).
        weight_dropout: probability with which an element of weight_hh is dropped, once per call (Merity et al. 2017,
            arXiv 1708.02182).

    Raises:
        NotImplementedError: in forward, where ``backend`` cannot compute the call; with all reasons.
    """


class LSTM(Layers, torch.nn.LSTM):
    """:class:`torch.nn.LSTM`, the options of :class:`RNN`, and

    Args:
        forget_bias: initial value of the forget gate's bias, 1.0 for instance (Jozefowicz et al. 2015); None sets
            it as torch.nn does.
        return_cell_states: forward returns output, (h_n, c_n) and every c_t of the last layer, shaped as the output is,
            with H in place of proj_size.
        peephole: the gates see the cell state through diagonal weights, i and f that of the step before, o the new one
            (Gers et al. 2002, JMLR 3). A parameter more per layer and direction, weight_peephole_l0 [3*H], gates i f o.
    """

    def __init__(
        self,
        *args: Any,
        forget_bias: float | None = None,
        return_cell_states: bool = False,
        peephole: bool = False,
        **kwargs: Any,
    ) -> None:
        self._set_options(forget_bias=forget_bias, return_cell_states=return_cell_states, peephole=peephole)
        super().__init__(*args, **kwargs)


class GRU(Layers, torch.nn.GRU):
    """:class:`torch.nn.GRU`, the options of :class:`RNN`, and

    Args:
        reset_after: True: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), as torch.nn; False:
            n = tanh(W_in x + b_in + W_hn (r * h) + b_hn) (Cho et al. 2014, arXiv 1406.1078).
    """

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        self._set_options(reset_after=reset_after)
        super().__init__(*args, **kwargs)
