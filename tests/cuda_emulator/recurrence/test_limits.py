"""Devices that are too small say so."""

import pytest

from fastrnn import backends
from tests.cuda_emulator.recurrence.device import emulated, tile
from tests.ops.case import Case, forward


def test_too_few_multiprocessors_are_a_reason_against() -> None:
    call, _ = Case("lstm", 2, 3, 4, 300).draw()
    reason = "hidden size 300 needs more blocks than the device runs at once"
    with emulated(multiprocessors=9):
        with pytest.raises(NotImplementedError, match=reason):
            backends.choose(call, "cuda")
    with emulated(multiprocessors=10):
        assert backends.choose(call, "cuda") == "cuda"
        forward(call, "cuda")


def test_the_launcher_refuses_blocks_that_do_not_run_at_once() -> None:
    call, _ = Case("lstm", 2, 3, 4, 300).draw()
    with emulated(multiprocessors=5), tile(1):
        with pytest.raises(
            RuntimeError, match=r"hidden size 300 needs 40 blocks at once; the device holds [1-3]?[0-9]$"
        ):
            forward(call, "cuda")


def test_the_launcher_refuses_blocks_without_room_for_their_states() -> None:
    call, _ = Case("lstm", 2, 3, 4, 20).draw()
    with emulated(shared_bytes=30000), tile(2, 32):
        reason = r"32 rows of 16 units need \d+ bytes of shared memory; a block has 30000"
        with pytest.raises(RuntimeError, match=reason):
            forward(call, "cuda")
