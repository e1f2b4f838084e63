"""RNNCell, LSTMCell and GRUCell: torch.nn's modules on the layers' operator, one step at a time."""

from __future__ import annotations

from typing import Any

import torch

from fastrnn.backends import RecurrenceCall
from fastrnn.nn.options import WithOptions
from fastrnn.ops.recurrence import decide, run_step


class OneStep(WithOptions, torch.nn.RNNCellBase):
    """The forward pass that the three cells share. Their other base, torch.nn's class, brings everything else."""

    def __init__(
        self, *args: Any, backend: str = "auto", layer_norm: bool = False, zoneout: float = 0.0, **kwargs: Any
    ) -> None:
        self._set_options(backend=backend, layer_norm=layer_norm, zoneout=zoneout)
        super().__init__(*args, **kwargs)
        self._add_parameters([""])

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch.nn's forward."""
        try:
            return self._forward(input, hx)
        except (ValueError, TypeError) as error:
            objection = error
        super().forward(input, hx)  # Where torch objects as well, its own words are raised.
        raise objection

    def _forward(self, input: Any, hx: Any) -> Any:
        cell = self._cell
        h0, c0 = (None, None) if hx is None else hx if cell == "lstm" else (hx, None)
        unbatched = input.dim() == 1
        x = input.unsqueeze(0)
        if unbatched:
            x = x.unsqueeze(0)
            h0 = None if h0 is None else h0.unsqueeze(0)
            c0 = None if c0 is None else c0.unsqueeze(0)
        call = RecurrenceCall(
            cell,
            x,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            h0,
            c0,
            zoneout=self.zoneout,
            zoneout_seed=self._zoneout_seed(),
            peephole=self._peephole(""),
            reset_after=self.reset_after,
        )
        if self.layer_norm:
            call.layer_norm_ih, call.layer_norm_hh, call.layer_norm_c = self._norms("")
        picked = decide(call, self.backend)
        if picked == "aten":
            return super().forward(input, hx)
        h1, c1 = run_step(call, picked)
        if unbatched:
            h1 = h1.squeeze(0)
            c1 = None if c1 is None else c1.squeeze(0)
        return h1 if c1 is None else (h1, c1)


class RNNCell(OneStep, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell`, and what it has not, keyword-only.

    Args:
        backend: ``"auto"``, or the name of the back end that shall compute every call.
        layer_norm: as in :class:`fastrnn.nn.RNN`.
        zoneout: as in :class:`fastrnn.nn.RNN`.

    Raises:
        NotImplementedError: in forward, where ``backend`` cannot compute the call; with all reasons.
    """

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"rnn_{self.nonlinearity}"


class LSTMCell(OneStep, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell`, the options of :class:`RNNCell`, and

    Args:
        forget_bias: as in :class:`fastrnn.nn.LSTM`.
        peephole: as in :class:`fastrnn.nn.LSTM`; the parameter is weight_peephole.
    """

    _cell = "lstm"

    def __init__(self, *args: Any, forget_bias: float | None = None, peephole: bool = False, **kwargs: Any) -> None:
        self._set_options(forget_bias=forget_bias, peephole=peephole)
        super().__init__(*args, **kwargs)


class GRUCell(OneStep, torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell`, the options of :class:`RNNCell`, and

    Args:
        reset_after: as in :class:`fastrnn.nn.GRU`.
    """

    _cell = "gru"

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        self._set_options(reset_after=reset_after)
        super().__init__(*args, **kwargs)
