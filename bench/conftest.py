"""Options and fixtures of the suites; see bench/README.md for the environment variables."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tqdm import tqdm

from bench import machine, results
from bench.gpu.report import progress
from bench.peers import THREADS
from bench.registry import AnyCase

Record = Callable[[AnyCase, dict[str, Any]], None]


@pytest.fixture(scope="session")
def threads() -> int:
    torch.set_num_threads(THREADS)
    return THREADS


@pytest.fixture(scope="session")
def seconds() -> float:
    """Time for the rounds of one case; the 36 plain cases of fp32 then take about five minutes."""
    return float(os.environ.get("FASTRNN_BENCH_SECONDS", "4"))


@pytest.fixture(scope="session")
def record(threads: int, pytestconfig: pytest.Config) -> Record:
    """Writes a row at once, so that an interrupted run keeps what it has measured, and says what it is."""
    name = machine.machine()
    path = results.folder() / f"{name}.json"
    run_id = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    run = {
        "device": machine.cpu_model(),
        "threads": threads,
        "isa": machine.isa(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }

    def write(case: AnyCase, row: dict[str, Any]) -> None:
        data = results.load(path) if path.exists() else {"machine": name, "runs": {}, "rows": {}}
        results.save(path, results.merge(data, run_id, run, case, row))
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            tqdm.write(progress(case.id, row))

    return write
