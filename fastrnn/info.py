"""``python -m fastrnn.info`` prints back ends, the instruction set in use, versions and build flags."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from fastrnn.backends import native


def version(package: str) -> str:
    """Version of an installed distribution, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu(library: Any) -> str:
    if library is None:
        return f"not available: {native.load_error()}"
    capped = f", FASTRNN_CPU_ISA={os.environ['FASTRNN_CPU_ISA']}" if "FASTRNN_CPU_ISA" in os.environ else ""
    return f"available: {library.cpu_isa()} (this machine runs {', '.join(library.cpu_isas())}{capped})"


def _triton() -> str:
    if version("triton") == "not installed":
        return "not available: triton is not installed"
    if not torch.cuda.is_available():
        return "not available: torch sees no CUDA device"
    return f"available: {torch.cuda.get_device_name()}"


def _cuda(library: Any) -> str:
    if library is None:
        return f"not available: {native.load_error()}"
    if library.cuda_device_count() == 0:
        return f"not available: {library.cuda_status()}"
    return f"available: {library.cuda_device_count()} device(s) of compute capability 8.0 or later"


def report() -> str:
    """The text that ``python -m fastrnn.info`` prints."""
    library = native.load()
    return "\n".join(
        [
            f"fastrnn {version('fastrnn')}, torch {version('torch')}, triton {version('triton')}, "
            f"Python {platform.python_version()}, {platform.machine()}",
            "back ends",
            "  reference  available: any device and dtype",
            "  aten       available: torch's own operator",
            f"  cpu        {_cpu(library)}",
            f"  triton     {_triton()}",
            f"  cuda       {_cuda(library)}",
            "build",
            *(f"  {line}" for line in (library.build_info().splitlines() if library else ["no compiled extension"])),
        ]
    )


if __name__ == "__main__":
    print(report())
