"""bench/results/<gpu>.json: what was measured on a GPU, one file for each kind of GPU.

    {"machine": "nvidia-h200", "kind": "gpu",
     "runs": {"2026-11-20T19:40:12Z": {"device", "driver", "versions", "commit", "ceilings", "not_run", ...}},
     "rows": {"lstm-16x1024x768x768-forward-fp16": {"run", "suite", "backend", "peers", "ratios", "left_out", ...}},
     "baselines": the same of cuDNN alone,
     "exchange": {"run", "rows"}}

Merging is as in bench/results.py: a row replaces the row of the same id, whole, and names its run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench import results as files

Row = dict[str, Any]


def parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with the option that all commands of the GPU suites have."""
    found = argparse.ArgumentParser(prog=program, description=description)
    found.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or files.folder()),
        help="folder of the results file; by default $OUT, else bench/results",
    )
    return found


def slug(device: str) -> str:
    """File name for a GPU's results: nvidia-h200 for "NVIDIA H200"."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def describe(device: str) -> dict[str, Any]:
    """What a run is measured on and with."""
    found: dict[str, Any] = {"versions": machine.versions(), "commit": machine.commit()}
    if device == "cpu":
        return {"device": machine.cpu_model(), **found}
    properties = torch.cuda.get_device_properties(0)
    found["versions"] |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": _driver(),
        **found,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


class Session:
    """One run, which writes what it has at once, so that an interrupted run keeps what it has measured."""

    def __init__(self, path: Path, data: dict[str, Any], run_id: str) -> None:
        self.path, self.data, self.run_id = path, data, run_id

    @classmethod
    def start(cls, folder: Path, device: str = "cuda") -> Session:
        """Goes on with the file in `folder`, or else with the one in bench/results.

        Raises RuntimeError where torch sees no such device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        run = describe(device)
        path = folder / f"{slug(run['device'])}.json"
        earlier = [p for p in (path, files.folder() / path.name) if p.exists() and device == "cuda"]
        empty = {"machine": path.stem, "kind": "gpu" if device == "cuda" else device, "runs": {}, "rows": {}}
        data = files.load(earlier[0]) if earlier else empty
        run_id = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        data["runs"][run_id] = run
        return cls(path, data, run_id)

    @property
    def run(self) -> dict[str, Any]:
        return self.data["runs"][self.run_id]

    def note(self, **facts: Any) -> None:
        """Adds to what the run says of itself."""
        self.run.update(facts)
        self._save()

    def add(self, id: str, row: Row, table: str = "rows") -> None:
        """Adds to the rows, or to "baselines", where cuDNN stands alone."""
        self.data.setdefault(table, {})[id] = {"run": self.run_id, **row}
        self._save()

    def add_exchange(self, rows: list[Row]) -> None:
        self.data["exchange"] = {"run": self.run_id, "rows": rows}
        self._save()

    def _save(self) -> None:
        named = [*self.data["rows"].values(), *self.data.get("baselines", {}).values()]
        named += [self.data["exchange"]] if "exchange" in self.data else []
        used = {self.run_id, *(row["run"] for row in named)}
        self.data["runs"] = {id: run for id, run in sorted(self.data["runs"].items()) if id in used}
        files.save(self.path, self.data)
