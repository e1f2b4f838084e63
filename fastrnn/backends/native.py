"""The compiled extension fastrnn._C, joined to torch's thread pool."""

import ctypes
import importlib
import os
import warnings
from types import ModuleType

import torch

# Cell of csrc/cell.h.
CELL_INDEX = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "gru_reset_before": 4}

_INSTRUCTION_SETS = ("avx512", "avx2", "portable")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        library = importlib.import_module("fastrnn._C")
    except ImportError as error:
        warnings.warn(
            f"fastrnn: the compiled extension fastrnn._C is not available ({error}); running on the reference, "
            "which is slow. Install fastrnn with a C++ compiler at hand to have the kernels.",
            stacklevel=2,
        )
        return None, str(error)
    cap = os.environ.get("FASTRNN_CPU_ISA")
    if cap and cap not in _INSTRUCTION_SETS:
        known = ", ".join(map(repr, _INSTRUCTION_SETS))
        warnings.warn(f"FASTRNN_CPU_ISA must be one of {known}, got {cap!r}; using {library.cpu_isa()!r}", stacklevel=2)
    if torch.backends.openmp.is_available():
        # Threads come from torch's own pool, so that torch.set_num_threads holds and no second OpenMP runtime is
        # loaded. The address of torch_parallel_for (C ABI since torch 2.10) is all that the torch-free library needs.
        # Without OpenMP the pool may run ranges one after another, where a team that waits for each other would hang.
        path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
        function = ctypes.cast(ctypes.CDLL(path).torch_parallel_for, ctypes.c_void_p)
        library.set_parallel_for(function.value)
    return library, None


# Loaded at import, so that torch.compile meets constants.
_LIBRARY, _ERROR = _load()


def load() -> ModuleType | None:
    """The module fastrnn._C, or None where it was not built."""
    return _LIBRARY


def load_error() -> str | None:
    """Why the extension is not available, or None."""
    return _ERROR
