"""Interleaved timing: every contender in every round, so that a drifting clock or a busy neighbour hits all alike."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.check import Entries
from bench.registry import AnyCase, Case

Call = Callable[[], Any]

# Untimed calls that start each turn: the pools of the contender before go on spinning after their last call, libgomp's
# for 8 ms and ONNX Runtime's for 30 ms, meanwhile OpenVINO takes 1.7 times its time (LSTM a, 2 cores).
SETTLE_SECONDS = 0.040
# One timed turn makes as many calls as fill this, at least one.
TURN_SECONDS = 0.010
MIN_ROUNDS, MAX_ROUNDS = 7, 40


def _run(call: Call, calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleave(
    benchmark: Any,
    contenders: Mapping[str, Call],
    rates: Mapping[str, Call],
    seconds: float,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time all contenders turn by turn for about `seconds`, at least 7 rounds.

    The first contender is the one that pytest-benchmark itself times and shows; the others take their turns in its
    teardown, in an order that rotates. `rates` are called once per round and return a measured rate.
    Returns the seconds per call of each contender, one figure per round, and the rates of each round.
    """
    first, *others = contenders
    estimate = {}
    for name, call in contenders.items():
        _run(call, 1)
        estimate[name] = max(min(_run(call, 1) for _ in range(2)), 1e-7)
    settle = {name: math.ceil(SETTLE_SECONDS / t) for name, t in estimate.items()}
    turn = {name: math.ceil(TURN_SECONDS / t) for name, t in estimate.items()}
    per_round = sum(t * (settle[name] + turn[name]) for name, t in estimate.items())
    rounds = min(max(math.ceil(seconds / per_round), MIN_ROUNDS), MAX_ROUNDS)

    times: dict[str, list[float]] = {name: [] for name in contenders}
    measured: dict[str, list[float]] = {name: [] for name in rates}

    def take_turns() -> None:
        others.append(others.pop(0))
        for name in others:
            _run(contenders[name], settle[name])
            times[name].append(_run(contenders[name], turn[name]))
        # Rates too wait for the other pools to stop; a turn after them brings the weights back into the cache.
        _run(contenders[first], settle[first])
        for name, rate in rates.items():
            measured[name].append(rate())
        _run(contenders[first], turn[first])

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(
            contenders[first], teardown=take_turns, rounds=rounds, iterations=turn[first], warmup_rounds=1
        )
    finally:
        gc.enable()
    if not benchmark.enabled:
        return times, measured
    times[first] = list(benchmark.stats.stats.data)
    # pytest-benchmark also calls the teardown after its warm-up, and after one last call where iterations > 1.
    cut = slice(1, 1 + rounds)
    return (
        {name: samples if name == first else samples[cut] for name, samples in times.items()},
        {name: samples[cut] for name, samples in measured.items()},
    )


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the quantiles at 20 and 80 %."""
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "q20": cuts[0], "q80": cuts[-1]}


def figures(times: Mapping[str, list[float]], entries: Entries) -> dict[str, Any]:
    """What every row of results has: who took how long, erred by how much, and who was left out why."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    others = {name: median for name, median in medians.items() if name != "fastrnn"} if "fastrnn" in medians else {}
    return {
        "backend": entries.backend,
        "rounds": max(map(len, times.values()), default=0),
        "peers": {
            name: {key: digits(1e3 * value) for key, value in summary(samples).items()}
            | {"error": digits(entries.errors[name])}
            for name, samples in times.items()
        },
        "ratios": {name: digits(median / medians["fastrnn"]) for name, median in others.items()},
        "left_out": entries.left_out,
    }


def make_row(
    case: AnyCase,
    times: Mapping[str, list[float]],  # seconds per call, one figure per round
    rates: Mapping[str, list[float]],
    entries: Entries,
    neighbours: float | None,
) -> dict[str, Any]:
    """One row of the results file: medians in milliseconds, ratios of medians, the rate and the machine's limit."""
    ours = statistics.median(times["fastrnn"])
    row = figures(times, entries) | {"neighbours": None if neighbours is None else round(neighbours, 3)}
    if case.bound in ("arithmetic", "weights"):
        arithmetic = isinstance(case, Case) and case.bound == "arithmetic"
        unit, amount = ("gflops", case.flops) if arithmetic else ("gbytes", case.streamed_bytes)
        rate = amount / ours / 1e9
        row[unit] = digits(rate)
        if unit in rates:
            # Whatever disturbs a limit lowers it, so its median would flatter the fraction.
            limit = summary(rates[unit])["q80"]
            row |= {"limit": digits(limit), "fraction": digits(rate / limit)}
    return row


def digits(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")
