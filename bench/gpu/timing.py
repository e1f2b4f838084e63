"""Timing of GPU work: device events around calls that follow each other without a pause, contenders by turns."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Protocol

import torch

from bench.timing import Call

TURN_SECONDS = 0.005  # a timed turn makes as many calls as fill this, at least one
MIN_ROUNDS, MAX_ROUNDS = 7, 25


class Timer(Protocol):
    def time(self, call: Call, calls: int) -> float:
        """Seconds per call."""


class EventTimer:
    """On the GPU's own clock, from the first call's start to the last one's end."""

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Call, calls: int) -> float:
        torch.cuda.synchronize()
        self._start.record()
        for _ in range(calls):
            call()
        self._end.record()
        self._end.synchronize()
        return 1e-3 * self._start.elapsed_time(self._end) / calls


class HostTimer:
    """For a trial of the suites on a CPU."""

    def time(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


def timer_for(device: str) -> Timer:
    return HostTimer() if device == "cpu" else EventTimer()


def interleave(contenders: Mapping[str, Call], timer: Timer, seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each contender, one figure a round, in about `seconds` but at least 7 rounds.

    All take a turn in every round, in an order that rotates. Each turn starts with an untimed call, which brings the
    contender's weights back into the cache.
    """
    estimate = {}
    for name, call in contenders.items():
        timer.time(call, 1)  # the first calls load kernels and grow memory pools
        estimate[name] = max(min(timer.time(call, 1) for _ in range(2)), 1e-7)
    turn = {name: math.ceil(TURN_SECONDS / t) for name, t in estimate.items()}
    per_round = sum(t * (1 + turn[name]) for name, t in estimate.items())
    rounds = min(max(math.ceil(seconds / per_round), MIN_ROUNDS), MAX_ROUNDS) if contenders else 0
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            contenders[name]()
            times[name].append(timer.time(contenders[name], turn[name]))
        order.append(order.pop(0))
    return times


class Budget:
    """Seconds that may still be spent."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()
