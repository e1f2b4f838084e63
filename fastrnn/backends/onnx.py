"""Takes the back ends' place in torch.onnx.export: a layer becomes one of ONNX's own nodes RNN, LSTM and GRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn.backends.call import RecurrenceCall
from fastrnn.backends.reference import Result

# In ONNX's order, where torch has each gate and peephole: i o f c, z r h.
GATES = {"rnn": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}
PEEPHOLES = (0, 2, 1)


def exporting() -> bool:
    """Whether torch.onnx.export is at work. Its older exporter records torch's own operators by itself."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


# TorchDynamo, which the exporter tries last, would take is_in_onnx_export for always False.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_node_for(call: RecurrenceCall) -> bool:
    """Whether there is a node that computes this; if not, the reference is exported, step by step.

    Raises NotImplementedError where that cannot be done either.
    """
    if call.batch_sizes is not None:
        raise NotImplementedError("a PackedSequence cannot be exported to ONNX: pass the padded batch and lengths")
    missing = [name for name in call.options() if name not in ("lengths", "peephole", "reset_after=False")]
    if call.weight_hr is not None:
        missing.append("proj_size")
    if torch.is_autocast_enabled(call.x.device.type):
        missing.append("autocast")
    steps: Any = call.x.shape[0]
    if missing and isinstance(steps, torch.SymInt):
        raise NotImplementedError(
            f"ONNX has no {call.cell.upper()} with {', '.join(missing)}, so every step is exported by itself: "
            "the number of time steps must not be dynamic"
        )
    return not missing


def run(calls: Sequence[RecurrenceCall]) -> list[Result]:
    """The node of one layer, from the calls of its directions; results as those of the back ends."""
    call = calls[0]
    kind = call.cell.partition("_")[0]
    (steps, batch, _), hidden, directions = call.x.shape, call.weight_hh.shape[1], len(calls)
    gates = GATES[kind]
    bias = None
    if call.bias_ih is not None:
        bias = torch.cat([_stack([c.bias_ih for c in calls], gates), _stack([c.bias_hh for c in calls], gates)], 1)
    inputs = [
        call.x,
        _stack([c.weight_ih for c in calls], gates),
        _stack([c.weight_hh for c in calls], gates),
        bias,
        None if call.lengths is None else call.lengths.to(torch.int32),
        None if call.h0 is None else _stack([c.h0 for c in calls]),
    ]
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if directions == 2:
        attributes["direction"] = "bidirectional"
    if kind == "lstm":
        inputs.append(None if call.c0 is None else _stack([c.c0 for c in calls]))
        inputs.append(None if call.peephole is None else _stack([c.peephole for c in calls], PEEPHOLES))
    elif kind == "gru":
        attributes["linear_before_reset"] = int(call.reset_after)
    elif call.cell == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    final = (directions, batch, hidden)
    shapes = [(steps, directions, batch, hidden), final, final][: 3 if kind == "lstm" else 2]
    y, h_n, *c_n = torch.onnx.ops.symbolic_multi_out(
        kind.upper(), inputs, attributes, dtypes=[call.x.dtype] * len(shapes), shapes=shapes
    )
    results: list[Result] = []
    for index, each in enumerate(calls):
        h, c = h_n[index], c_n[0][index] if c_n else None
        if call.lengths is not None and each.h0 is not None:
            # onnxruntime sets the state of an empty sequence to zero.
            empty = (call.lengths == 0)[:, None]
            h = torch.where(empty, each.h0, h)
            c = None if c is None or each.c0 is None else torch.where(empty, each.c0, c)
        results.append((y[:, index], h, c, None))
    return results


def _stack(tensors: list[Any], order: Sequence[int] = ()) -> Tensor:
    """[directions, ..], the second dimension cut into as many parts as `order` has, and put into that order."""
    stacked = torch.stack(tensors)
    if not order:
        return stacked
    size = stacked.shape[1] // len(order)
    return torch.cat([stacked.narrow(1, index * size, size) for index in order], 1)
