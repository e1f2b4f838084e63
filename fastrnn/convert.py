"""accelerate() and restore(): the recurrent modules of an existing model, converted in place and back."""

from __future__ import annotations

import copyreg
import functools
import types
from typing import Any, TypeVar, cast

import torch
from torch.nn.utils.parametrize import is_parametrized

from fastrnn import nn
from fastrnn.nn.options import check_backend

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
_OURS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in NAMES}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}

# What torch's forward passes call and ours do not: a subclass with its own version wants it called.
_FORWARD_PATH = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


def accelerate(module: ModuleT, backend: str = "auto") -> ModuleT:
    """Turns every torch.nn.RNN, LSTM, GRU and cell of a model, the model itself included, into fastrnn's.

    Only the modules' classes change: parameters, hooks, parametrizations, optimizers and references to the modules stay
    as they are. Subclasses are converted too: where a forward pass of their own calls ``super().forward()``, it gets
    ours. ``fastrnn.explain`` names the modules that were left alone, and why. A second call changes the back end.
    ``restore`` undoes it all.

    Args:
        module: the model; it is changed, and returned.
        backend: ``"auto"``, or the name of the back end that shall compute every call.

    Raises:
        ValueError: there is no such back end.
    """
    check_backend(backend)
    for part in module.modules():
        if torch_class(part) is not None and not reasons_against(part):
            part.__class__ = _accelerated(type(part), is_parametrized(part) and len(type(part).__bases__) == 1)
            part.__dict__["_accelerated"] = True
        if is_accelerated(part):
            part.__dict__["backend"] = backend
    return module


def restore(module: ModuleT) -> ModuleT:
    """Undoes ``accelerate``, in copies and unpickled models too. Modules that were made as fastrnn's stay so."""
    for part in module.modules():
        if is_accelerated(part):
            part.__class__ = _restored(type(part))
            del part.__dict__["_accelerated"], part.__dict__["backend"]
    return module


def is_accelerated(module: torch.nn.Module) -> bool:
    return "_accelerated" in module.__dict__


def torch_class(module: torch.nn.Module) -> type | None:
    """Which of torch.nn's recurrent classes a module is; None for others and where fastrnn has taken over."""
    if isinstance(module, tuple(_TORCHS)):
        return None
    return next((base for base in type(module).__mro__ if base in _OURS), None)


def reasons_against(module: torch.nn.Module) -> list[str]:
    """Why accelerate() leaves a torch.nn recurrent module as it is."""
    torchs = torch_class(module)
    assert torchs is not None
    name = type(module).__name__
    reasons = ["its forward() was replaced"] if "forward" in module.__dict__ else []
    for method in _FORWARD_PATH:
        if getattr(type(module), method, None) is not getattr(torchs, method, None) or method in module.__dict__:
            reasons.append(f"{name} has its own {method}()")
    added = set(dir(_OURS[torchs])) - set(dir(torchs))
    reasons += [f"{name} has an attribute {attribute}" for attribute in sorted(added) if hasattr(module, attribute)]
    return reasons


def _accelerated(cls: type, parametrized: bool = False) -> type:
    if parametrized:
        return _with_base(cls, _accelerated(cls.__bases__[0]))
    return _OURS.get(cls) or _accelerated_subclass(cls)


def _restored(cls: type) -> type:
    if cls in _TORCHS:
        return _TORCHS[cls]
    if "_original" in cls.__dict__:
        return cls.__dict__["_original"]
    return _with_base(cls, _restored(cls.__bases__[0]))


def _with_base(parametrized: type, base: type) -> type:
    """The class that torch.nn.utils.parametrize made for one module, on another base.

    It cannot stay a base itself: `remove_parametrizations` looks for its properties in the module's class and puts
    that class's base in its place.
    """
    namespace = {name: value for name, value in vars(parametrized).items() if name not in ("__dict__", "__weakref__")}
    return type(parametrized.__name__, (base,), namespace)


@functools.cache
def _accelerated_subclass(cls: type) -> type:
    ours = next(_OURS[base] for base in cls.__mro__ if base in _OURS)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Pickles by the name of the original class."""
        function, arguments, *state = cast(Any, cls).__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function, arguments = _new, (cls,)
        return (function, arguments, *state)

    namespace = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace |= {"_original": cls, "__reduce_ex__": reduce_ex}
    # The original comes first, so that the new class has its layout: Python changes the class of an object to no other.
    return types.new_class(cls.__name__, (cls, ours), exec_body=lambda body: body.update(namespace))


def _new(original: type) -> Any:
    cls = _accelerated_subclass(original)
    return cls.__new__(cls)  # type: ignore[call-overload]
