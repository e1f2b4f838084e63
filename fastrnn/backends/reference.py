"""The back end `reference`: fastrnn.reference behind the interface of a call."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastrnn import reference
from fastrnn.backends.call import RecurrenceCall

Result = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def reasons_against(call: RecurrenceCall) -> list[str]:
    return []


def run(call: RecurrenceCall) -> Result:
    """y, h_n, c_n and every c_t, by plain differentiable PyTorch."""
    if call.batch_sizes is not None:
        return _run_packed(call)
    gates_x = call.x
    if call.weight_ih is not None:
        gates_x = gates_x @ call.weight_ih.T
        if call.layer_norm_ih is not None:
            gates_x = reference.layer_norm(gates_x, reference.CELLS[call.cell].norm_groups, *call.layer_norm_ih)
    if call.bias_ih is not None:
        gates_x = gates_x + call.bias_ih
    return reference.recurrence(
        call.cell,
        gates_x,
        call.weight_hh,
        call.bias_hh,
        call.h0,
        call.c0,
        lengths=call.lengths,
        resets=call.resets,
        zoneout=call.zoneout,
        zoneout_seed=call.zoneout_seed,
        recurrent_mask=call.recurrent_mask,
        layer_norm_hh=call.layer_norm_hh,
        layer_norm_c=call.layer_norm_c,
        peephole=call.peephole,
        reset_after=call.reset_after,
        weight_hr=call.weight_hr,
        reverse=call.reverse,
    )


def _run_packed(call: RecurrenceCall) -> Result:
    assert call.batch_sizes is not None
    padded, lengths = pad_packed_sequence(PackedSequence(call.x, call.batch_sizes))
    fields = {name: getattr(call, name) for name in call.__slots__}
    fields.update(x=padded, lengths=lengths.to(padded.device), batch_sizes=None)
    y, h_n, c_n, all_c = run(RecurrenceCall(**fields))
    valid = torch.arange(padded.shape[0])[:, None] < lengths
    return y[valid], h_n, c_n, None if all_c is None else all_c[valid]
