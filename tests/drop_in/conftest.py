"""Prints the times that the tests took down."""

import pytest

from tests.drop_in.comparison import TRAINING_TIMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("a training step, ms")
    terminalreporter.line(f"{'':50}{'torch.nn':>10}{'fastrnn':>10}{'ratio':>8}")
    for title, (torchs, ours) in TRAINING_TIMES.items():
        terminalreporter.line(f"{title:50}{1e3 * torchs:10.2f}{1e3 * ours:10.2f}{torchs / ours:8.2f}")
