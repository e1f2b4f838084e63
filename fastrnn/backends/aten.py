"""The back end `aten`: torch's own recurrent operators (cuDNN, oneDNN, or op by op), where they compute the same."""

import torch
from torch import _VF, Tensor

from fastrnn.backends.call import RecurrenceCall
from fastrnn.backends.reference import Result
from fastrnn.reference import CELLS


def reasons_against(call: RecurrenceCall) -> list[str]:
    reasons = [f"torch has no {option}" for option in call.options()]
    if call.weight_ih is None:
        reasons.append("torch's operator takes x and weight_ih, not gates_x")
    if (call.bias_ih is None) != (call.bias_hh is None):
        reasons.append("torch's operator takes both biases or none")
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if traced and call.cell == "lstm" and torch.is_grad_enabled() and call.x.dtype in (torch.float32, torch.bfloat16):
        reasons.append("torch.compile takes oneDNN's LSTM for torch's operator, whose gradients it cannot compile")
    return reasons


def run(call: RecurrenceCall) -> Result:
    hidden = call.weight_hh.shape[0] // CELLS[call.cell].gates
    batch = call.x.shape[1] if call.batch_sizes is None else int(call.batch_sizes[0])
    h0 = call.x.new_zeros(batch, call.weight_hh.shape[1]) if call.h0 is None else call.h0
    c0 = call.x.new_zeros(batch, hidden) if call.c0 is None else call.c0
    state = (h0[None], c0[None]) if call.cell == "lstm" else h0[None]
    weights = [call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh, call.weight_hr]
    weights = [weight for weight in weights if weight is not None]
    operator = getattr(_VF, call.cell)
    # train=True keeps what cuDNN's backward needs, in evaluation mode too; there is no dropout within one layer.
    settings = (call.bias_ih is not None, 1, 0.0, torch.is_grad_enabled(), False)
    if call.batch_sizes is None:
        x = call.x.flip(0) if call.reverse else call.x
        y, *states = operator(x, state, weights, *settings, False)
        y = y.flip(0) if call.reverse else y
    else:
        order = _reversed_rows(call.batch_sizes).to(call.x.device) if call.reverse else None
        x = call.x if order is None else call.x[order]
        y, *states = operator(x, call.batch_sizes, state, weights, *settings)
        y = y if order is None else y[order]
    return y, states[0][0], states[1][0] if len(states) > 1 else None, None


def _reversed_rows(batch_sizes: Tensor) -> Tensor:
    """For each row of packed data, the row that holds the same sequence's step counted from its end."""
    active = torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]  # [T, B]
    lengths = active.sum(0)
    t, b = active.nonzero(as_tuple=True)
    starts = torch.cumsum(batch_sizes, 0) - batch_sizes
    return starts[lengths[b] - 1 - t] + b
