"""For a conftest.py: the tests of each file in its folder run in a process of their own, each of them reported here."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

_REPORT = "FASTRNN_TESTS_REPORT"  # Set in the other process: where its results go.

Start = Callable[[list[str], Mapping[str, str]], "subprocess.CompletedProcess[str]"]


class OwnProcess:
    """Its methods are hooks of pytest.

    ``inside``: whether this is the other process; a run that is started as that process is needs no further one.
    ``start``: runs Python with these arguments and this environment, in the root of the sources.
    ``unavailable``: why the tests are skipped, or None.
    """

    def __init__(self, conftest: str, *, inside: bool, start: Start, unavailable: str | None) -> None:
        self.folder, self.inside, self.start, self.unavailable = Path(conftest).parent, inside, start, unavailable
        self.results: dict[str, tuple[str | None, str]] = {}

    def add_marks(self, items: list[pytest.Item]) -> None:
        for item in items:
            if not item.path.is_relative_to(self.folder):
                continue
            if self.unavailable:
                item.add_marker(pytest.mark.skip(reason=self.unavailable))
            elif not self.inside:
                item.add_marker(pytest.mark.timeout(1200))  # The first one waits for all of its file.

    @pytest.hookimpl(tryfirst=True)
    def report_result(self, pyfuncitem: pytest.Function) -> bool | None:
        if self.inside:
            return None
        if pyfuncitem.nodeid not in self.results:
            items = pyfuncitem.session.items
            self.results |= self._run([item.nodeid for item in items if item.path == pyfuncitem.path])
        outcome, reason = self.results[pyfuncitem.nodeid]
        if outcome == "skipped":
            pytest.skip(reason)
        if outcome != "passed":
            pytest.fail(reason, pytrace=False)
        return True

    def write_result(self, report: pytest.TestReport) -> None:
        if self.inside and _REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            with open(os.environ[_REPORT], "a") as file:
                print(json.dumps([report.nodeid, report.outcome, reason]), file=file)

    def _run(self, tests: list[str]) -> dict[str, tuple[str | None, str]]:
        with tempfile.TemporaryDirectory() as folder:
            report, selection = Path(folder) / "report", Path(folder) / "selection"
            report.touch()
            selection.write_text("\n".join(tests))  # A file: it may be longer than a command line.
            environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
            done = self.start(
                ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{selection}"],
                {**environment, _REPORT: str(report)},
            )
            results = [json.loads(line) for line in report.read_text().splitlines()]
        missing = (None, f"the tests' own process ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        return {test: missing for test in tests} | {test: (outcome, reason) for test, outcome, reason in results}
