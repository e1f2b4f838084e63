"""Every case of every suite, one benchmark each with all contenders interleaved in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import attention, machine, search
from bench.check import Entries, enter
from bench.conftest import Record
from bench.peers import Problem
from bench.registry import SUITES, AnyCase, AttentionCase, SearchCase
from bench.timing import interleave, make_row


def entries_of(case: AnyCase) -> Entries:
    if isinstance(case, AttentionCase):
        return attention.entries(case)
    if isinstance(case, SearchCase):
        return search.entries(case)
    return enter(Problem(case))


@pytest.mark.parametrize(
    ("suite", "case"), [pytest.param(suite, case, id=case.id) for suite, cases in SUITES.items() for case in cases]
)
def test_case(suite: str, case: AnyCase, benchmark: Any, seconds: float, record: Record) -> None:
    benchmark.group = f"{suite}, {case.mode}"
    with torch.set_grad_enabled(case.mode in ("training", "loop")):
        entries = entries_of(case)
        calls = {name: contender.call for name, contender in entries.contenders.items()}
        neighbours = machine.Neighbours()
        times, rates = interleave(benchmark, calls, machine.limits(case), seconds)
    if benchmark.enabled:
        benchmark.extra_info.update(samples=times, rates=rates)
        record(case, make_row(case, times, rates, entries, neighbours.share()))
