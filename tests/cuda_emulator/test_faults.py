"""Kernels with a planted fault: each is found, and the same kernels without it pass in every schedule."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

SOURCE = build.HERE / "faults.cu"
CASES = [
    *("block_sums", "opposite_lanes", "relay", "exchange"),
    *("copies", "cluster_neighbours", "vectors", "parting"),
]
RIGHT, WRONG, FAILED = range(3)  # how faults.cu ends


@functools.cache
def program(sanitizer: str | None = None) -> Path:
    return build.program([SOURCE], sanitizer=sanitizer)


def run(case: str, fault: str, sanitizer: str | None = None, **settings: int | str) -> subprocess.CompletedProcess[str]:
    done = build.run(program(sanitizer), case, fault, env=build.environment(**settings))
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer finds no room among this system's randomised addresses")
    return done


def line_of(fault: str) -> int:
    lines = SOURCE.read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"// line of {fault}"))
    return number


# Without a fault


@pytest.mark.parametrize("copy", ["early", "late"])
@pytest.mark.parametrize("policy", range(4))
@pytest.mark.parametrize("case", CASES)
def test_right_kernels_pass_in_every_schedule(case: str, policy: int, copy: str) -> None:
    for seed in range(3):
        done = run(case, "none", policy=policy, copy=copy, seed=seed)
        assert (done.returncode, done.stdout, done.stderr) == (RIGHT, "", ""), f"seed {seed}"


@pytest.mark.parametrize("policy", [0, 3])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("case", CASES)
def test_right_kernels_are_silent_under_sanitizers(case: str, sanitizer: str, policy: int) -> None:
    done = run(case, "none", sanitizer, policy=policy, copy="late")
    assert (done.returncode, done.stdout, done.stderr) == (RIGHT, "", "")


# Found by their results


@pytest.mark.parametrize(
    "case,fault",
    [
        ("block_sums", "missing_barrier"),
        ("block_sums", "missing_reuse_barrier"),
        ("opposite_lanes", "missing_sync_warp"),
        ("relay", "early_flag"),
        ("relay", "missing_sync_after_wait"),
        ("exchange", "unchecked_load"),
        ("exchange", "relaxed_flag"),  # stores that nothing orders arrive in another order
        ("copies", "missing_sync_after_copy"),
    ],
)
def test_some_schedule_makes_the_result_wrong(case: str, fault: str) -> None:
    assert WRONG in [run(case, fault, policy=policy, seed=seed).returncode for policy in range(4) for seed in range(3)]


@pytest.mark.parametrize("policy", range(4))
@pytest.mark.parametrize("fault", ["missing_copy_wait", "missing_commit"])
def test_late_copies_find_a_missing_wait_and_early_ones_hide_it(fault: str, policy: int) -> None:
    assert run("copies", fault, policy=policy, copy="late").returncode == WRONG
    assert run("copies", fault, policy=policy, copy="early").returncode == RIGHT


# Found by the emulator

AT = r"thread \d+ of block \d at faults\.cu:\d+: "
OTHER = r"thread \d+ of block \d"


@pytest.mark.parametrize("sanitizer", [None, "address", "thread"])
@pytest.mark.parametrize(
    "case,fault,report",
    [
        (
            *("relay", "silent_block"),
            r"deadlock: 4 in wait_acquire \(faults\.cu:\d+\), first thread 0 of block \d, "
            r"252 in sync_block \(faults\.cu:\d+\), first thread 1 of block \d, 0 exited",
        ),
        ("exchange", "endless_loads", r"deadlock: 256 in load_exchanged \(faults\.cu:\d+\), .*, 0 exited"),
        ("relay", "too_many_blocks", "too many blocks in cooperative launch"),
        ("relay", "not_cooperative", r"deadlock: 2 in wait_acquire .*, 126 in sync_block .*"),
        ("block_sums", "partial_warp", AT + "shuffle_xor in a warp of 16 threads"),
        ("copies", "misaligned_copy", AT + "misaligned address: copy_async of 0x[0-9a-f]+"),
        ("copies", "copy_beyond_shared", AT + "copy_async of 0x[0-9a-f]+, outside the block's shared memory"),
        ("cluster_neighbours", "missing_sync_cluster", AT + "store_cluster to block [01] of the cluster, .* exited"),
        (
            *("parting", "diverged_warp"),
            AT + rf"diverged: this thread is in shuffle_xor, {OTHER} in shuffle_xor \(faults\.cu:\d+\)",
        ),
        (
            *("parting", "mixed_operations"),
            AT + rf"diverged: this thread is in (ballot, {OTHER} in sync_warp|sync_warp, {OTHER} in ballot) .*",
        ),
        (
            *("parting", "diverged_block"),
            AT + rf"diverged: this thread is in sync_block, {OTHER} in sync_block \(faults\.cu:\d+\)",
        ),
        (
            *("parting", "exited_thread"),
            AT + rf"(sync_block where 1 of 64 threads have exited|has exited while {OTHER} is in sync_block)",
        ),
        (
            *("parting", "exiting_thread"),
            AT + rf"(sync_block where 1 of 64 threads have exited|has exited while {OTHER} is in sync_block)",
        ),
    ],
)
def test_the_emulator_reports(case: str, fault: str, report: str, sanitizer: str | None) -> None:
    done = run(case, fault, sanitizer, policy=3, multiprocessors=2)
    assert (done.returncode, done.stderr) == (FAILED, "")
    assert re.fullmatch(report, done.stdout.strip()), done.stdout


def test_a_store_beside_shared_memory_is_reported_without_a_sanitizer() -> None:
    done = run("block_sums", "shared_overrun")
    assert (done.returncode, done.stdout) == (FAILED, "a store beside the 8 bytes of a block's shared memory\n")


def test_a_stack_that_is_overrun_is_reported() -> None:
    done = run("large_frame", "none")
    assert done.returncode < 0 and "a thread of the kernel has overrun its stack" in done.stderr
    assert "stack-overflow" in run("large_frame", "none", "address").stderr


# Found by sanitizers


@pytest.mark.parametrize(
    "case,fault,report",
    [
        ("block_sums", "shared_overrun", "SUMMARY: AddressSanitizer: use-after-poison {} in block_sums"),
        ("block_sums", "global_overrun", "SUMMARY: AddressSanitizer: heap-buffer-overflow {} in block_sums"),
        ("vectors", "misaligned_vector", "{}.*: runtime error: .* misaligned address .* requires 16 byte alignment"),
    ],
)
def test_the_address_sanitizer_names_the_line(case: str, fault: str, report: str) -> None:
    done = run(case, fault, "address")
    assert done.returncode == 1
    assert re.search(report.format(rf"\S*faults\.cu:{line_of(fault)}"), done.stderr), done.stderr


@pytest.mark.parametrize("policy", [0, 3])
@pytest.mark.parametrize(
    "case,fault",
    [
        ("block_sums", "missing_barrier"),
        ("block_sums", "missing_reuse_barrier"),
        ("opposite_lanes", "missing_sync_warp"),
        ("relay", "early_flag"),
        ("relay", "missing_sync_after_wait"),
        ("exchange", "plain_store"),
        ("copies", "missing_sync_after_copy"),
    ],
)
def test_the_thread_sanitizer_finds_races(case: str, fault: str, policy: int) -> None:
    """Whatever the schedule: it goes by what orders two accesses, not by which comes first."""
    done = run(case, fault, "thread", policy=policy, copy="late")
    assert done.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    lines = {int(line) for line in re.findall(rf"{case}\b.* \S*faults\.cu:(\d+)", done.stderr)}
    assert lines and (fault != "plain_store" or line_of(fault) in lines), done.stderr
