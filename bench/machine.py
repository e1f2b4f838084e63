"""What a result was measured on and with: device, versions, commit, and the machine's own limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.peers import THREADS
from bench.registry import AnyCase, Case

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fastrnn", "torch", "triton", "onnxruntime", "openvino", "jax", "flashrnn", "haste_pytorch", "torchrl")


def cpu_model() -> str:
    """The processor's name as its vendor gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def slug(device: str, threads: int, isa_cap: str | None) -> str:
    """File name for a machine's results, as amd-epyc-2t; a capped instruction set counts as a machine of its own."""
    name = re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", device, flags=re.IGNORECASE)
    return "-".join([*re.findall(r"[a-z0-9]+", name.lower()), f"{threads}t", *([isa_cap] if isa_cap else [])])


def machine() -> str:
    return slug(cpu_model(), THREADS, os.environ.get("FASTRNN_CPU_ISA"))


def commit() -> str:
    """git describe, ending in -dirty where anything but the results and pages that a run rewrites is changed.

    FASTRNN_BENCH_COMMIT says it for a copy without its history.
    """
    if given := os.environ.get("FASTRNN_BENCH_COMMIT"):
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        described = subprocess.run([*git, "describe", "--always", "--tags"], capture_output=True, text=True, check=True)
        rewritten = [":!bench/results", ":!README.md", ":!docs/variants.md"]
        status = [*git, "status", "--porcelain", "--", ".", *rewritten]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip() + ("-dirty" if changed else "")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Neighbours:
    """How much of the CPUs' time other processes, and other guests of the host, take from now on."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:2]), time.perf_counter()

    def share(self) -> float | None:
        """Between 0 and 1; None where the system does not tell."""
        now = self._now()
        if now is None or self._start is None:
            return None
        others, elapsed = (after - before for after, before in zip(now, self._start, strict=True))
        return max(others, 0.0) / (elapsed * (os.cpu_count() or 1))


def native() -> Any | None:
    """fastrnn's compiled module, or None where fastrnn was built without it."""
    from fastrnn.backends import native

    return native.load()


def isa() -> str:
    """The instruction set that fastrnn's CPU kernels use here."""
    module = native()
    return "none" if module is None else module.cpu_isa()


def limits(case: AnyCase) -> dict[str, Callable[[], float]]:
    """The rate that bounds a case, measured anew by each call: "gflops" of the dtype's FMA on registers, or "gbytes"
    per second of reading as many bytes as weight_hh has. Empty for a single step, for arithmetic in a dtype that the
    CPU does not have, and without the compiled module."""
    module = native()
    if module is None or case.bound == "latency":
        return {}
    if case.bound == "arithmetic":
        bf16 = isinstance(case, Case) and case.dtype == "bf16"
        return {} if bf16 and not module.has_bf16() else {"gflops": lambda: module.fma_ceiling(THREADS, 10, bf16)}
    return {"gbytes": lambda: module.stream_bandwidth(case.weight_bytes, THREADS)}
