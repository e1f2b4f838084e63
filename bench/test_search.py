"""Search against torch's operators and its own model, one benchmark per case, all contenders interleaved in it."""

from __future__ import annotations

from typing import Any

import pytest

from bench import machine
from bench.conftest import Record
from bench.registry import SEARCH_CASES, SearchCase
from bench.search import entries
from bench.timing import interleave, make_row


@pytest.mark.parametrize("case", SEARCH_CASES, ids=lambda case: case.id)
def test_search(case: SearchCase, benchmark: Any, threads: int, seconds: float, record: Record) -> None:
    benchmark.group = f"search, {case.mode}"
    entered = entries(case)
    calls = {name: contender.call for name, contender in entered.contenders.items()}
    neighbours = machine.Neighbours()
    times, rates = interleave(benchmark, calls, machine.limits(case), seconds)
    if benchmark.enabled:
        benchmark.extra_info.update(samples=times, rates=rates)
        record(case, make_row(case, times, rates, entered, neighbours.share()))
