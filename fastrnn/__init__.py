"""Exact recurrent networks for PyTorch, fast: modules in ``fastrnn.nn``; ``accelerate`` converts a model in place.

``fastrnn.search`` has beam search, ``fastrnn.plot`` pictures of attention, ``fastrnn.ops`` the operators that modules
call, and ``fastrnn.reference`` their executable specification. ``python -m fastrnn.info`` says what the machine offers.
"""

from importlib import metadata

from fastrnn import nn, plot, search
from fastrnn.convert import accelerate, restore
from fastrnn.explain import explain
from fastrnn.importers import from_keras, from_onnx

__all__ = ["accelerate", "explain", "from_keras", "from_onnx", "nn", "plot", "restore", "search"]

try:
    __version__ = metadata.version("fastrnn")
except metadata.PackageNotFoundError:  # Run from a source tree that was never installed.
    __version__ = "0+unknown"
