"""The choice of a back end for a call, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from fastrnn.backends import aten, attention, cpu, cuda, onnx, reference, triton
from fastrnn.backends.attention.call import AttentionCall
from fastrnn.backends.call import Norm, RecurrenceCall

__all__ = [
    "NAMES",
    "AttentionCall",
    "Choice",
    "Norm",
    "RecurrenceCall",
    "choose",
    "reasons_against",
    "record",
    "recorded_choices",
    "recording",
    "transform_reasons",
    "transforming",
]

Call = RecurrenceCall | AttentionCall

# In the order in which "auto" asks them. The CPU kernels come before torch's operators wherever both compute the same:
# bench/results has the measurements. Those for GPUs are not measured yet.
NAMES = ("cpu", "cuda", "triton", "aten", "reference")

_MODULES: dict[type, dict[str, ModuleType]] = {
    RecurrenceCall: {"cpu": cpu, "cuda": cuda, "triton": triton, "aten": aten, "reference": reference},
    AttentionCall: {
        "cpu": attention.cpu,
        "triton": attention.triton,
        "aten": attention.aten,
        "reference": attention.reference,
    },
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What was picked for one call, and what spoke against each back end that was passed over."""

    call: str
    picked: str
    asked: str
    against: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.call}: {self.picked} (backend={self.asked!r})"]
        for name in NAMES:
            if name != self.picked:
                first = f"{self.picked!r} {'comes first' if self.asked == 'auto' else 'was asked for'}"
                reasons = self.against.get(name) or [first]
                lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


_records: list[Choice] | None = None


def recording() -> bool:
    """Whether choices are being collected."""
    return _records is not None


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Collects the choices that are made inside the block."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def record(call: str, picked: str, asked: str) -> None:
    """Notes a choice that was made without `choose`, where choices are being collected."""
    if _records is not None:
        _records.append(Choice(call, picked, asked, {}))


def transforming() -> bool:
    """Whether a torch.func transform is active, whose tensors may stand for many, so that their values are hidden."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compiler.assume_constant_result without the second that importing TorchDynamo takes. TorchDynamo has the traced
# transforms on this very stack, and a guard on it.
transforming._dynamo_marked_constant = True  # type: ignore[attr-defined]


def transform_reasons() -> list[str]:
    """What hides the tensors' memory from a kernel, or asks for derivatives that it does not have."""
    if onnx.exporting():
        return ["torch.onnx.export is at work, which knows no kernels; it can take the reference apart"]
    if transforming():
        return ["a torch.func transform is active; only the reference can be transformed"]
    if torch.autograd.forward_ad._current_level >= 0:
        return ["forward-mode differentiation is active; only the reference has it"]
    return []


def reasons_against(name: str, call: Call) -> list[str]:
    """Why the back end of this name cannot compute the call."""
    module = _MODULES[type(call)].get(name)
    if module is None:
        return ["it has no kernels for attention"]
    found: list[str] = module.reasons_against(call)
    return found if name == "reference" else transform_reasons() + found


def choose(call: Call, backend: str = "auto") -> str:
    """The name of the back end that computes this call.

    Raises ValueError for an unknown name, and NotImplementedError with all reasons where the named back end cannot
    compute the call.
    """
    if backend not in (*NAMES, "auto"):
        raise ValueError(f"backend must be one of {', '.join(map(repr, (*NAMES, 'auto')))}, got {backend!r}")
    against: dict[str, list[str]] = {}
    picked = backend
    if backend == "auto":
        picked = _first_without_reasons(call, against)
    else:
        reasons = reasons_against(backend, call)
        if reasons:
            raise NotImplementedError(f"backend {backend!r} cannot compute this call: " + "; ".join(reasons))
    if _records is not None:
        for name in NAMES:
            if name not in against:
                against[name] = reasons_against(name, call)
        _records.append(Choice(str(call), picked, backend, against))
    return picked


def _first_without_reasons(call: Call, against: dict[str, list[str]]) -> str:
    """What "auto" picks. A back end that is better asked later comes last but for the reference."""
    postponed = None
    for name in NAMES:
        if name == "reference" and postponed is not None:
            break
        against[name] = reasons_against(name, call)
        if not against[name]:
            why_later = getattr(_MODULES[type(call)][name], "why_later", None)
            later = None if why_later is None else why_later(call)
            if later is None:
                return name
            against[name] = [later]
            postponed = postponed or name
    assert postponed is not None  # The reference computes everything.
    return postponed
