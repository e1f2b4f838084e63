"""The compiled extension fastrnn._C: loaded on first use, joined to torch's thread pool."""

import ctypes
import functools
import importlib
import os
import warnings
from types import ModuleType

import torch


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        library = importlib.import_module("fastrnn._C")
    except ImportError as error:
        return None, str(error)
    if torch.backends.openmp.is_available():
        # Threads come from torch's own pool, so that torch.set_num_threads holds and no second OpenMP runtime is loaded.
        # The address of torch_parallel_for (C ABI since torch 2.10) is all that the torch-free library needs. Without
        # OpenMP the pool may run ranges one after another, where a team that waits for each other would hang.
        path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
        function = ctypes.cast(ctypes.CDLL(path).torch_parallel_for, ctypes.c_void_p)
        library.set_parallel_for(function.value)
    return library, None


@functools.cache
def load() -> ModuleType | None:
    """The module fastrnn._C, or None, with one warning, where it was not built."""
    library, error = _load()
    if library is None:
        warnings.warn(
            f"fastrnn: the compiled extension fastrnn._C is not available ({error}); running on the reference, "
            "which is slow. Install fastrnn with a C++ compiler at hand to have the kernels.",
            stacklevel=2,
        )
    return library


def load_error() -> str | None:
    """Why the extension is not available, or None."""
    return _load()[1]
