"""One small case of every kernel under compute-sanitizer: memcheck and racecheck.

python -m bench.gpu.sanitize            both tools; says so where compute-sanitizer is not on PATH
python -m bench.gpu.sanitize --cases    the cases alone, as the tools run them
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.gpu.ceilings import precision
from bench.gpu.contenders import gpu_backends
from bench.gpu.exchange import METHODS, Exchange, Prepared, check
from bench.machine import ROOT
from bench.registry import DTYPES
from fastrnn import nn

TOOLS = ("memcheck", "racecheck")
DEVICE = "cuda"
ERROR = 99  # the tools' exit status where they found something
SIZES = ((3, 4, 24), (17, 3, 136))  # B, T, H: neither fills its tiles
OPTIONS: dict[str, dict[str, Any]] = {
    "RNN": {"plain": {}, "relu": {"nonlinearity": "relu"}},
    "LSTM": {
        "plain": {},
        "layer norm": {"layer_norm": True},
        "zoneout": {"zoneout": 0.3},
        "peephole": {"peephole": True},
    },
    "GRU": {
        "plain": {},
        "layer norm": {"layer_norm": True},
        "zoneout": {"zoneout": 0.3},
        "reset first": {"reset_after": False},
    },
}


def kernel_names() -> list[str]:
    """Parts of the names of fastrnn's kernels: its namespace in CUDA C++, and the functions of kernels/ that no other
    one there calls."""
    source = "".join(path.read_text() for path in sorted((ROOT / "kernels").rglob("*.py")))
    jitted = re.findall(r"@triton\.jit.*?\ndef (\w+)", source, re.DOTALL)
    return ["fastrnn", *(name for name in jitted if len(re.findall(rf"\b{name}\(", source)) == 1)]


def command(sanitizer: str, tool: str) -> list[str]:
    """Other kernels than fastrnn's, those of cuBLAS for example, are run unchecked."""
    filters = itertools.chain.from_iterable(("--kernel-name", f"kns={name}") for name in kernel_names())
    program = (sys.executable, "-m", "bench.gpu.sanitize", "--cases")
    return [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR), *filters, *program]


def run_tools(sanitizer: str, seconds: float) -> list[str]:
    """Runs both tools and returns what they have against the kernels."""
    end = time.monotonic() + seconds
    # Out of a pool's memory, a tensor's overrun would still lie in memory that is allocated.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = []
    for tool in TOOLS:
        print(f"-- {tool}", flush=True)
        try:
            status = subprocess.run(
                command(sanitizer, tool), cwd=ROOT, env=env, timeout=max(end - time.monotonic(), 1)
            ).returncode
        except subprocess.TimeoutExpired:
            found.append(f"{tool} was not done in the {seconds:g} s that there were")
        else:
            if status != 0:
                found.append(f"{tool} found errors" if status == ERROR else f"{tool} ended with status {status}")
    return found


def cases() -> Iterator[tuple[str, Any]]:
    """Names, and functions that run each."""
    for method in METHODS:
        exchange = Exchange(method, 4, 36, rounds=3, cluster=2)
        yield f"exchange, {method}", lambda exchange=exchange: check(exchange, Prepared(exchange).launch())
    for backend in gpu_backends():
        # Triton compiles its kernels anew for every dtype and option: one dtype and size must do.
        dtypes, sizes = (["bf16"], SIZES[:1]) if backend == "triton" else (list(DTYPES), SIZES)
        for (name, options), dtype, size in itertools.product(OPTIONS.items(), dtypes, sizes):
            label = f"{backend}, {name} {dtype}, B, T, H = {size}"
            for option, given in options.items():
                yield f"{label}, {option}", lambda a=(backend, name, dtype, size, given): layer(*a)
            yield f"{label}, cell", lambda a=(backend, name, dtype, size): cell(*a)


def layer(backend: str, name: str, dtype: str, size: tuple[int, int, int], options: dict[str, Any]) -> None:
    """Forward and backward, plain, then with lengths and resets."""
    batch, steps, hidden = size
    with torch.device(DEVICE):
        module = getattr(nn, name)(hidden, hidden, backend=backend, **options).to(DTYPES[dtype])
        x = torch.randn(steps, batch, hidden, dtype=DTYPES[dtype], requires_grad=True)
        masks = {"lengths": torch.arange(batch) % (steps + 1), "resets": torch.rand(steps, batch) < 0.3}
    with precision(dtype):
        for mask in ({}, masks):
            y, _ = module(x, **mask)
            y.float().square().sum().backward()
    _synchronize()


def cell(backend: str, name: str, dtype: str, size: tuple[int, int, int]) -> None:
    batch, _, hidden = size
    with torch.device(DEVICE):
        module = getattr(nn, f"{name}Cell")(hidden, hidden, backend=backend).to(DTYPES[dtype])
        x = torch.randn(batch, hidden, dtype=DTYPES[dtype], requires_grad=True)
    with precision(dtype):
        state = module(x)
        h = state[0] if isinstance(state, tuple) else state
        h.float().square().sum().backward()
    _synchronize()


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def run_cases() -> int:
    """How many cases ran; a back end that cannot run one says why."""
    ran = 0
    for name, run in cases():
        try:
            run()
        except NotImplementedError as reason:
            print(f"{name}: {reason}", flush=True)
        else:
            ran += 1
    print(f"{ran} cases ran", flush=True)
    return ran


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.sanitize", description="Kernels under compute-sanitizer."
    )
    parser.add_argument("--seconds", type=float, default=90, help="time for both tools")
    parser.add_argument("--cases", action="store_true", help="run the cases, without a tool")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    if options.cases:
        return int(run_cases() == 0)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH: nothing is checked")
        return 0
    found = run_tools(sanitizer, options.seconds)
    for problem in found:
        print(problem, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"bench.gpu.sanitize: {error}")
