"""The persistent kernels of csrc/cuda in a program: silent under sanitizers, and found out where a fault is planted.

Faults are planted in a copy of csrc, in one line of the very kernels.
"""

import functools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"]
RIGHT, WRONG, FAILED, RACES = 0, 1, 2, 66  # how the program ends, and how the thread sanitizer ends it
SCHEDULES = [{"policy": 0}, *({"policy": policy, "seed": seed} for policy in (1, 2, 3) for seed in (0, 1))]


class Fault(NamedTuple):
    file: str
    line: str  # a part of it, which the file has once
    planted: str  # in its place


FAULTS = {
    # Each step's parts of a product are read before all of them are there.
    "missing_barrier": Fault("forward.h", "sync_block();", ""),
    # The next product overwrites the parts that slow warps still read.
    "one_set_of_parts": Fault("forward.h", "parity ^= 1;", ""),
    "one_set_of_parts_backward": Fault("backward.h", "parity ^= 1;", ""),
    # A word is handed over before it has its value, and then again.
    "early_state": Fault(
        "forward.h",
        "const float h_next = reset ? 0 : h;",
        "const float h_next = reset ? 0 : h;\nif (!last) publish_state(time(step + 1), place, h_old);",
    ),
    "missing_state": Fault("forward.h", "if (!last) publish_state", "if (!last && step != 1) publish_state"),
    "missing_wait": Fault("product.h", "if (!is_written(b[i][n]))", "if (false)"),
    "unfilled_states": Fault("recurrence.cu", "error = fill(direction.h_in, 0xFF, values, stream);", ""),
    "swapped_words": Fault(
        "product.h",
        "multiply_words<math>(first, low.x, high.x, low.y, high.y, b.x, b.y);",
        "multiply_words<math>(first, low.x, low.y, high.x, high.y, b.x, b.y);",
    ),
    "shifted_activations": Fault(
        "forward.h",
        "static_cast<T*>(a.saved) + kept_row(problem, t, place.b) *",
        "static_cast<T*>(a.saved) + (kept_row(problem, t, place.b) + 1) *",
    ),
}


@functools.cache
def program(sanitizer: str | None = None, fault: str | None = None) -> Path:
    """All cells; with a fault the LSTM alone."""
    csrc, defines = build.CSRC, []
    if fault is not None:
        csrc, defines = planted(FAULTS[fault], build.CACHE / "planted" / fault), ["ONLY_CELL=lstm"]
    sources = [build.HERE / "recurrence_program.cpp", csrc / "cuda" / "recurrence.cu"]
    return build.program(sources, sanitizer=sanitizer, defines=defines, csrc=csrc)


def planted(fault: Fault, folder: Path) -> Path:
    for header in build.CSRC.glob("*.h"):
        _write(folder / header.name, header.read_text())
    for source in (build.CSRC / "cuda").iterdir():
        text = source.read_text()
        if source.name == fault.file:
            assert text.count(fault.line) == 1, f"{fault.file} has {text.count(fault.line)} times: {fault.line}"
            text = text.replace(fault.line, fault.planted)
        _write(folder / "cuda" / source.name, text)
    return folder


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(
    cell: str, sanitizer: str | None = None, fault: str | None = None, **settings: int
) -> subprocess.CompletedProcess[str]:
    done = build.run(program(sanitizer, fault), cell, env=build.environment(**settings))
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer finds no room among this system's randomised addresses")
    return done


@functools.cache
def right_result(cell: str) -> str:
    """What it prints, a line without norms and one with."""
    return run(cell).stdout


# Without a fault


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_in_every_schedule(cell: str) -> None:
    for schedule in SCHEDULES:
        done = run(cell, **schedule)
        assert (done.returncode, done.stdout, done.stderr) == (RIGHT, right_result(cell), ""), schedule


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("cell", CELLS)
def test_silent_under_sanitizers(cell: str, sanitizer: str) -> None:
    done = run(cell, sanitizer)
    assert (done.returncode, done.stdout, done.stderr) == (RIGHT, right_result(cell), "")


# With one


def outcomes(fault: str) -> list[tuple[bool, str]]:
    """Of each schedule: whether the results are right, and what the program printed."""
    right = right_result("lstm").splitlines()[0]
    ran = [run("lstm", fault=fault, **schedule) for schedule in SCHEDULES]
    assert all(done.stderr == "" for done in ran)
    return [(done.returncode == RIGHT and done.stdout.strip() == right, done.stdout) for done in ran]


@pytest.mark.parametrize(
    "fault", ["missing_barrier", "one_set_of_parts", "one_set_of_parts_backward", "early_state", "missing_wait"]
)
def test_some_schedule_makes_the_results_wrong(fault: str) -> None:
    assert not all(is_right for is_right, _ in outcomes(fault))


@pytest.mark.parametrize("fault", ["swapped_words", "unfilled_states"])
def test_every_schedule_makes_the_results_wrong(fault: str) -> None:
    assert not any(is_right for is_right, _ in outcomes(fault))


def test_a_state_that_is_not_handed_over_is_a_deadlock() -> None:
    for _, printed in outcomes("missing_state"):
        assert re.match(r"deadlock: .*\b128 in wait_exchanged \(product\.h:\d+\)", printed), printed


@pytest.mark.parametrize("fault", ["missing_barrier", "one_set_of_parts_backward"])
def test_the_thread_sanitizer_finds_races(fault: str) -> None:
    done = run("lstm", "thread", fault)
    assert done.returncode == RACES
    assert re.search(r"SUMMARY: ThreadSanitizer: data race \S*product\.h:\d+", done.stderr), done.stderr


def test_the_address_sanitizer_finds_a_row_too_many() -> None:
    done = run("lstm", "address", "shifted_activations")
    assert done.returncode == 1
    assert re.search(r"AddressSanitizer: heap-buffer-overflow \S*forward\.h:\d+", done.stderr), done.stderr
