"""Attention against torch's operators, one benchmark per case with all contenders interleaved in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import machine
from bench.attention import entries
from bench.conftest import Record
from bench.registry import ATTENTION_CASES, AttentionCase
from bench.timing import interleave, make_row


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.id)
def test_attention(case: AttentionCase, benchmark: Any, threads: int, seconds: float, record: Record) -> None:
    benchmark.group = f"attention, {case.mode}"
    with torch.set_grad_enabled(case.mode in ("training", "loop")):
        entered = entries(case)
        calls = {name: contender.call for name, contender in entered.contenders.items()}
        neighbours = machine.Neighbours()
        times, rates = interleave(benchmark, calls, machine.limits(case), seconds)
    if benchmark.enabled:
        benchmark.extra_info.update(samples=times, rates=rates)
        record(case, make_row(case, times, rates, entered, neighbours.share()))
