"""Lets torch.compile trace our modules without a graph break."""

import functools
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from fastrnn.nn.options import WithOptions

_BUILDER = "torch._dynamo.variables.builder"


class _BuilderFinder(importlib.abc.MetaPathFinder):
    """Stands by for the first import of TorchDynamo, which takes a second that nobody else should pay."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _allow_ours(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _allow_ours(builder: ModuleType) -> None:
    wrap_module = builder.VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def allowing_ours(self: Any, value: Any) -> Any:
        if not isinstance(value, WithOptions):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = allowing_ours


def allow_tracing() -> None:
    """Has TorchDynamo trace our modules, now or when it is first imported.

    TorchDynamo breaks the graph at every instance of torch.nn.RNN, LSTM and GRU, subclasses with a forward of their own
    included, unless torch._dynamo.config.allow_rnn is set. Set for good, that would have torch's own modules traced as
    well, step by step (and in torch 2.13 fail to compile where an LSTM is trained); so it is set for ours alone.
    """
    if _BUILDER in sys.modules:
        _allow_ours(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _BuilderFinder())
