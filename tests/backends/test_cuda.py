"""The tile that the back end `cuda` picks; the kernels are tested in tests/cuda_emulator and tests/gpu."""

import itertools

import pytest

from fastrnn.backends.cuda import MATHS, ROW_TILE, UNIT_GROUP, Chip, Tile, pick

H200 = Chip(multiprocessors=132, shared_bytes=232448)
A100 = Chip(multiprocessors=108, shared_bytes=166912)
SLICE = Chip(multiprocessors=16, shared_bytes=232448)  # of a GPU that is shared out


@pytest.mark.parametrize("chip", [H200, A100, SLICE], ids=["H200", "A100", "slice"])
@pytest.mark.parametrize("math", MATHS)
def test_every_tile_runs_at_once(chip: Chip, math: str) -> None:
    sizes = (1, 7, 129, 256, 1000, 1024, 2048, 4096), (1, 2, 16, 17, 64, 128, 1000, 5000)
    for hidden, batch, gates, directions in itertools.product(*sizes, (1, 3, 4), (1, 2)):
        tile = pick(gates, math, hidden, batch, chip, directions=directions)
        blocks = -(-hidden // 32) * 32 // (UNIT_GROUP * 4) * directions  # of the widest tile
        assert (tile is None) == (blocks > chip.multiprocessors)
        if tile is not None:
            blocks = -(-hidden // 32) * 32 // (UNIT_GROUP * tile.unit_groups) * directions
            assert blocks <= chip.multiprocessors
            assert tile.unit_groups in (1, 2, 4) and tile.rows % ROW_TILE == 0 and tile.rows > 0


def test_a_small_batch_is_spread_and_a_large_one_reads_less() -> None:
    assert pick(4, "bfloat16", 1024, 1, H200) == Tile(unit_groups=1, rows=16)
    wide = pick(4, "bfloat16", 1024, 128, H200)
    assert wide is not None and wide.unit_groups > 1


def test_two_directions_share_the_chip() -> None:
    assert pick(4, "bfloat16", 1024, 1, H200, directions=2) == Tile(unit_groups=2, rows=16)


def test_states_and_sums_bound_the_rows() -> None:
    plain, normed = (pick(4, "bfloat16", 256, 10000, H200, states) for states in (2, 15))
    assert plain is not None and normed is not None
    for tile, states in ((plain, 2), (normed, 15)):
        assert 4 * states * tile.rows * UNIT_GROUP * tile.unit_groups <= 48 * 1024
