"""bench/results/<machine>.json: what was measured, one file per machine.

    {"machine": "amd-epyc-2t",
     "runs": {"2026-11-20T19:40:12Z": {"device", "threads", "isa", "versions", "commit"}},
     "rows": {"lstm-c-forward-fp32": {"run", "peers": {"torch": {"median", "q20", "q80", "error"}}, ...}}}

Merging: a row replaces the row of the same id, whole, so that all its ratios come from one run; all other rows stay.
Each row names its run and thereby its commit and versions. Runs without rows and rows that left the registry are
dropped. Times are in milliseconds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.registry import AnyCase, all_cases

COMMITTED = ROOT / "bench" / "results"


def folder() -> Path:
    """FASTRNN_BENCH_RESULTS, or bench/results."""
    return Path(os.environ.get("FASTRNN_BENCH_RESULTS", COMMITTED))


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is no results file."""
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or not {"machine", "runs", "rows"} <= data.keys():
        raise ValueError(f"{path} must be a results file with machine, runs and rows")
    return data


def load_all(directory: Path) -> list[dict[str, Any]]:
    return [load(path) for path in sorted(directory.glob("*.json"))]


def merge(data: dict[str, Any], run_id: str, run: dict[str, Any], case: AnyCase, row: dict[str, Any]) -> dict[str, Any]:
    """The results with one more row, by the rule at the top of this file."""
    rows = data["rows"] | {case.id: {"run": run_id, **row}}
    rows = {c.id: rows[c.id] for c in all_cases() if c.id in rows}
    runs = data["runs"] | {run_id: run}
    used = {r["run"] for r in rows.values()}
    return data | {"runs": {id: r for id, r in sorted(runs.items()) if id in used}, "rows": rows}


def save(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
