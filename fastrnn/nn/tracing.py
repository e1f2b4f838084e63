"""Lets torch.compile trace our modules without a graph break."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

_CONFIG = "torch._dynamo.config"


class _ConfigFinder(importlib.abc.MetaPathFinder):
    """Stands by for the first import of TorchDynamo's settings, which takes a second that nobody else should pay."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.allow_rnn = True  # type: ignore[attr-defined]

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def allow_tracing() -> None:
    """Sets torch._dynamo.config.allow_rnn, now or when TorchDynamo is first imported.

    TorchDynamo breaks the graph at every instance of torch.nn.RNN, LSTM and GRU unless this is set, subclasses with a
    forward of their own included. Whoever wants the graph break back sets it to False.
    """
    if _CONFIG in sys.modules:
        sys.modules[_CONFIG].allow_rnn = True  # type: ignore[attr-defined]
    else:
        sys.meta_path.insert(0, _ConfigFinder())
