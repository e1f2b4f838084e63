"""python -m bench.gpu: times the suites until the time is up and writes bench/results/<gpu>.json."""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from bench import timing
from bench.check import WRONG, Entries, enter
from bench.gpu import ceilings, contenders, results
from bench.gpu.registry import SUITES, GpuCase, ordered, shrunk
from bench.gpu.report import progress
from bench.gpu.search import SearchProblem
from bench.gpu.timing import Budget, Timer, interleave, timer_for
from bench.peers import Problem

COMPILE_SECONDS = 30.0  # what torch.compile may take for a loop


def parser() -> argparse.ArgumentParser:
    found = results.parser("python -m bench.gpu", "The GPU suites: fastrnn, cuDNN and peers, case by case.")
    found.add_argument("--seconds", type=float, default=240, help="time for everything; what is left out is said")
    found.add_argument("--seconds-each", type=float, default=0.3, help="time for the rounds of a case, at least 7")
    found.add_argument("--suites", type=_names, default=list(SUITES), help=f"out of {','.join(SUITES)}")
    found.add_argument(
        "--backends",
        type=_names,
        default=contenders.gpu_backends(),
        help="fastrnn's back ends to time beside its own choice, by default all for GPUs",
    )
    found.add_argument("--baselines", action="store_true", help="cuDNN alone")
    found.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: only to try the suites out")
    found.add_argument("--smoke", action="store_true", help="every case at a size that takes no time")
    return found


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def measure(case: GpuCase, options: argparse.Namespace, timer: Timer, limits: ceilings.Ceilings, left: float) -> Any:
    """A row of results."""
    cache = 0 if options.device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size
    chosen = contenders.builders(case, options.backends, options.baselines, min(COMPILE_SECONDS, left), cache)
    with ceilings.precision(case.dtype), torch.set_grad_enabled(case.mode == "training"):
        problem: Any = SearchProblem if case.mode == "search" else Problem
        entries = enter(problem(case, options.device), chosen, strict=False)
        # What fastrnn chose itself is timed once.
        for kind in ("", ", graph"):
            entries.contenders.pop(f"fastrnn {entries.backend}{kind}", None)
        times = interleave(
            {name: contender.call for name, contender in entries.contenders.items()}, timer, options.seconds_each
        )
    return make_row(case, times, entries, limits)


def make_row(
    case: GpuCase,
    times: dict[str, list[float]],  # seconds per call, one figure per round
    entries: Entries,
    limits: ceilings.Ceilings,
) -> results.Row:
    counts = {name: contender.count for name, contender in entries.contenders.items()}
    times = {name: [sample / counts[name] for sample in samples] for name, samples in times.items()}
    floor = ceilings.floor_seconds(case, limits)
    row = {
        "suite": case.suite,
        **timing.figures(times, entries),
        "l2": "weights from memory" if case.mode == "step" else "warm",
        "floor": timing.digits(1e3 * floor),
    }
    if "fastrnn" in times:
        ours = statistics.median(times["fastrnn"])
        row |= {"us_per_step": timing.digits(1e6 * ours / case.size.steps), "fraction": timing.digits(floor / ours)}
    return row


def wrong_results(row: results.Row) -> list[str]:
    """fastrnn's contenders that were left out as wrong, and the reasons."""
    ours = {name: reason for name, reason in row["left_out"].items() if name.startswith(("fastrnn", "plain"))}
    return [f"{name}: {reason}" for name, reason in ours.items() if reason.startswith(WRONG)]


def run(cases: Sequence[GpuCase], options: argparse.Namespace, session: results.Session) -> dict[str, str]:
    """Measures the cases until the time is up. Returns what failed and how, by case."""
    budget = Budget(options.seconds)
    timer = timer_for(options.device)
    small = {"copy_bytes": 2**20, "product_size": 128} if options.smoke else {}
    limits = ceilings.measure(options.device, timer, **small)
    session.note(ceilings=limits)
    failures: dict[str, str] = {}
    done = 0
    for case in cases:
        if budget.left() <= 0:
            break
        done += 1
        try:
            row = measure(case, options, timer, limits, budget.left())
        except Exception as error:  # one case that fails must not cost the others
            failures[case.id] = f"{type(error).__name__}: {error}"
            print(f"{case.id}: FAILED: {failures[case.id]}", flush=True)
            if options.device == "cuda" and not _alive():
                break
        else:
            session.add(case.id, row, "baselines" if options.baselines else "rows")
            if wrong := wrong_results(row):
                failures[case.id] = "; ".join(wrong)
            print(progress(case.id, row), flush=True)
        gc.collect()
    session.note(seconds=options.seconds, not_run=[case.id for case in cases[done:]], failures=failures)
    return failures


def _alive() -> bool:
    """Whether the device takes more work: after some errors it takes none from this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    own = parser()
    options = own.parse_args(arguments)
    for given, known in ((options.suites, list(SUITES)), (options.backends, contenders.gpu_backends())):
        if unknown := [name for name in given if name not in known]:
            own.error(f"must be out of {', '.join(known) or 'none'}, got {unknown[0]!r}")
    cases = ordered(options.suites)
    if options.smoke:
        cases = [shrunk(case) for case in cases]
    session = results.Session.start(options.out, options.device)
    failures = run(cases, options, session)
    left = Counter(case.suite for case in cases[len(cases) - len(session.run["not_run"]) :])
    print(f"wrote {session.path}: {len(cases) - left.total()} of {len(cases)} cases")
    if left:
        print("left out: " + ", ".join(f"{count} of {suite}" for suite, count in left.items()))
    for id, reason in failures.items():
        print(f"{id}: {reason}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"bench.gpu: {error}")
