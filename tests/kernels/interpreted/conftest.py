"""Runs this folder's tests in one process of its own, with Triton's interpreter, and reports each of them here.

Triton decides as it is imported whether kernels run in Python, on CPU tensors, or are compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_REPORT = "FASTRNN_INTERPRETER_REPORT"  # Set in the interpreting process: where its results go.


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if _REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with open(os.environ[_REPORT], "a") as file:
            print(json.dumps([report.nodeid, report.outcome, reason]), file=file)


@pytest.fixture(scope="session")
def interpreted_results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    report = tmp_path_factory.mktemp("interpreter") / "report"
    report.touch()
    root = request.config.rootpath
    tests = [item.nodeid for item in request.session.items if item.path.is_relative_to(_HERE)]
    # The selection goes by a file: it may be longer than a command line.
    selection = report.with_name("selection")
    selection.write_text("\n".join(tests))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", _REPORT: str(report)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{selection}"]
    run = subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found = {nodeid: (outcome, reason) for nodeid, outcome, reason in map(json.loads, report.read_text().splitlines())}
    missing = (None, f"the interpreting process ended with {run.returncode}:\n{run.stdout[-4000:]}")
    return {test: found.get(test, missing) for test in tests}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    outcome, reason = pyfuncitem.funcargs["interpreted_results"][pyfuncitem.nodeid]
    if outcome == "skipped":
        pytest.skip(reason)
    if outcome != "passed":
        pytest.fail(reason, pytrace=False)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="triton is not installed")
    for item in items:
        if item.path.is_relative_to(_HERE) and isinstance(item, pytest.Function):
            if importlib.util.find_spec("triton") is None:
                item.add_marker(absent)
            elif os.environ.get("TRITON_INTERPRET") != "1":
                item.fixturenames.insert(0, "interpreted_results")
