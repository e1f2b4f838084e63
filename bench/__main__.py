"""python -m bench: measures the suites, then writes the report."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from bench import report, results
from bench.machine import ROOT
from bench.registry import SUITES, AnyCase, chosen


class Chosen:
    """A plugin of pytest: it runs these cases only, and says which one runs and how much time is left."""

    def __init__(self, cases: Sequence[AnyCase]) -> None:
        self.cases = cases
        self.drawn = sys.stderr.isatty()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.callspec.params["case"] in self.cases]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        # smoothing: the time left is as many cases at the average time of all so far.
        self.bar = tqdm(
            total=len(session.items), unit="case", smoothing=0, file=sys.stderr if self.drawn else io.StringIO()
        )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_description_str(nodeid.partition("[")[2].rstrip("]"), refresh=self.drawn)
        if not self.drawn:
            print(self.bar, flush=True)

    def pytest_runtest_logfinish(self) -> None:
        self.bar.update()

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """No dots between the lines of progress."""
        return ("passed", "", "") if report.passed and report.when == "call" else None

    def pytest_sessionfinish(self) -> None:
        self.bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures the suites, then writes the report. Interrupted, it keeps what it has measured.",
        epilog="All other options go to pytest, as -k 'lstm and forward'.",
    )
    parser.add_argument("--suite", metavar="NAMES", help=f"only these, with commas: {', '.join(SUITES)}")
    parser.add_argument("--shapes", metavar="NAMES", help="only these, as a,c or select-40,decode-1")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="with an earlier results file beside the new results"
    )
    options, others = parser.parse_known_args(arguments)
    plugin = Chosen(chosen(options.suite, options.shapes))
    # Read first: it may be the file that the run rewrites.
    old = results.load(options.compare) if options.compare else None
    flags = ["--benchmark-only", "--benchmark-quiet", "-q", *others]
    status = pytest.main([str(ROOT / "bench"), *flags], plugins=[plugin])
    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        report.write(old)
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"bench: {error}")
