"""The recurrent layers, their variants and the cells against their peers, one benchmark per case with all peers
interleaved in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine
from bench.check import enter
from bench.conftest import Record
from bench.peers import Problem
from bench.registry import Case, chosen, plain_cases, variant_cases
from bench.timing import interleave, make_row


@pytest.mark.parametrize("case", chosen(plain_cases()), ids=lambda case: case.id)
def test_recurrence(case: Case, benchmark: Any, threads: int, seconds: float, record: Record) -> None:
    benchmark.group = f"{case.mode}, {case.dtype}"
    run(case, benchmark, seconds, record)


@pytest.mark.parametrize("case", chosen(variant_cases()), ids=lambda case: case.id)
def test_variant(case: Case, benchmark: Any, threads: int, seconds: float, record: Record) -> None:
    benchmark.group = f"{case.mode}, {case.dtype}, variants"
    run(case, benchmark, seconds, record)


def run(case: Case, benchmark: Any, seconds: float, record: Record) -> None:
    with torch.set_grad_enabled(case.mode == "training"):
        entries = enter(Problem(case))
        calls = {name: contender.call for name, contender in entries.contenders.items()}
        neighbours = machine.Neighbours()
        times, rates = interleave(benchmark, calls, machine.limits(case), seconds)
    if benchmark.enabled:
        benchmark.extra_info.update(samples=times, rates=rates)
        record(case, make_row(case, times, rates, entries, neighbours.share()))
