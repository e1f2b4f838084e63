"""The persistent kernels of csrc/cuda against the fp64 reference: results and all gradients."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import RecurrenceCall, gpu, native
from fastrnn.reference import CELLS
from tests.cuda_emulator.recurrence.device import MATHS, cuda_options, dtype_of, emulated, products, tile
from tests.ops.case import (
    ALL_CELLS,
    ARGUMENTS,
    CELLS_AND_ARGUMENTS,
    LIBRARY,
    Case,
    assert_results_as_accurate,
    cases,
    run,
)


def _cuda(call: RecurrenceCall, gradients: Mapping[str, Tensor], needs: Any) -> dict[str, Tensor]:
    return run(call, "cuda", gradients, needs)


def assert_cuda_as_accurate(case: Case, math: str = "float32", most_draws: int = 4) -> None:
    """Each draw takes 0.01 to 1 s, by the number of threads that it emulates."""
    with products(math):
        assert_results_as_accurate(replace(case, dtype=dtype_of(math)), {"cuda": _cuda}, most_draws)


def fit(
    cell: str, options: tuple[str, ...], math: str, hidden: int, tile: tuple[int, int], *, backward: bool
) -> tuple[int, int, int, int]:
    """Blocks needed, blocks at once, bytes of shared memory of each, bytes of weights that each streams."""
    index = native.CELL_INDEX["gru_reset_before" if "reset_after=False" in options else cell]
    found: tuple[int, int, int, int] = LIBRARY.cuda_fit(index, MATHS.index(math), hidden, tile, False, backward)
    return found


# Sizes. T = 1, B = 1, 17 and 33 (more than one tile of 16 rows), H that is no multiple of anything.


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 3, 4, 7), (3, 17, 3, 33)], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_shapes(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int], math: str) -> None:
    assert_cuda_as_accurate(Case(cell, *shape, options), math)


@pytest.mark.parametrize("math", ["float32", "bfloat16"])  # The other two differ in the size of no loop.
@pytest.mark.parametrize("shape", [(2, 5, 4, 129), (1, 3, 4, 300), (40, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_larger_shapes(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int], math: str) -> None:
    assert_cuda_as_accurate(Case(cell, *shape, options), math, most_draws=2)


@pytest.mark.parametrize("math", ["float32", "bfloat16"])
@pytest.mark.parametrize("unit_groups", [1, 2, 4])
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_units_of_a_block(cell: str, options: tuple[str, ...], unit_groups: int, math: str) -> None:
    with tile(unit_groups):
        assert_cuda_as_accurate(Case(cell, 3, 9, 4, 40, options), math, most_draws=2)


@pytest.mark.parametrize("unit_groups, rows", [(1, 48), (2, 32), (4, 16)])
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_more_rows_than_run_at_once(cell: str, options: tuple[str, ...], unit_groups: int, rows: int) -> None:
    """150 rows take several launches, of one group of blocks each or of several."""
    case = Case(cell, 2, 150, 3, 20, (*options, "lengths"))
    with emulated(multiprocessors=1), tile(unit_groups, rows):
        needed, at_once, *_ = fit(cell, options, "float32", case.hidden, (unit_groups, rows), backward=True)
        assert rows <= at_once // needed * rows < case.batch
        assert_cuda_as_accurate(case, most_draws=1)


# Hidden sizes of which the registers of a tile of four unit groups do not hold all weights.
BEYOND_REGISTERS = [
    *(("float32", cell, options, 300) for cell, options in ALL_CELLS),
    *(("bfloat16", cell, options, 430) for cell, options in ALL_CELLS if not cell.startswith("rnn")),
    *(("tf32", cell, (), 300) for cell in ("lstm", "gru")),
    ("tf32", "rnn_tanh", (), 530),
    ("bfloat16", "rnn_relu", (), 1030),
    ("float16", "lstm", (), 430),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["shared", "streamed"])
@pytest.mark.parametrize("math, cell, options, hidden", BEYOND_REGISTERS)
def test_weights_beyond_registers(math: str, cell: str, options: tuple[str, ...], hidden: int, streamed: bool) -> None:
    """They lie in shared memory, and what has no room there is read from L2 at every step."""

    def needs(hidden: int) -> list[tuple[int, int]]:
        return [fit(cell, options, math, hidden, (4, 16), backward=backward)[2:] for backward in (False, True)]

    without, with_weights = needs(32), needs(hidden)
    for (least, _), (most, rest) in zip(without, with_weights, strict=True):
        assert least < most and rest == 0
    half = min((least + most) // 2 for (least, _), (most, _) in zip(without, with_weights, strict=True))
    with emulated(**({"shared_bytes": half} if streamed else {})), tile(4):
        assert all(rest > 0 for _, rest in needs(hidden)) == streamed
        assert_cuda_as_accurate(Case(cell, 2, 3, 2, hidden, options), math, most_draws=1)


# Options and arguments


def _alone_and_together(cell: str) -> list[tuple[str, ...]]:
    return [*((option,) for option in cuda_options(cell)), cuda_options(cell)]


CELLS_AND_OPTIONS = [
    pytest.param(cell, options, id=f"{cell}-{'+'.join(options)}")
    for cell in CELLS
    for options in _alone_and_together(cell)
]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell, options", CELLS_AND_OPTIONS)
def test_options(cell: str, options: tuple[str, ...], reverse: bool) -> None:
    with tile(2 if reverse else 4):  # The fewer threads, the faster; all options together have other tiles below.
        assert_cuda_as_accurate(Case(cell, 5, 18, 4, 40, options, reverse=reverse), most_draws=2)


# A GRU with every option has its reset before the product: another time without. In float16 torch's layer norm
# overflows at times.
EVERY_KIND = [
    *(pytest.param(cell, cuda_options(cell), id=cell) for cell in CELLS),
    pytest.param("gru", tuple(o for o in cuda_options("gru") if o != "reset_after=False"), id="gru_reset_after"),
]


@pytest.mark.parametrize(
    "math, packed, reverse",
    [("bfloat16", False, False), ("bfloat16", True, False), ("bfloat16", True, True), ("tf32", False, True)],
)
@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_all_options_together(cell: str, options: tuple[str, ...], math: str, packed: bool, reverse: bool) -> None:
    used = tuple(option for option in options if not (packed and option == "lengths"))
    assert_cuda_as_accurate(Case(cell, 4, 18, 4, 33, used, packed=packed, reverse=reverse), math)


@pytest.mark.parametrize("cell, arguments", CELLS_AND_ARGUMENTS)
def test_arguments(cell: str, arguments: str) -> None:
    assert_cuda_as_accurate(Case(cell, 5, 9, 20, 25, **ARGUMENTS[arguments]))


@pytest.mark.parametrize("shape", [(0, 3, 5, 9), (4, 0, 5, 9), (0, 0, 5, 9)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, shape: tuple[int, int, int, int]) -> None:
    assert_cuda_as_accurate(Case(cell, *shape, ("lengths", "resets")))


@settings(max_examples=40)
@given(cases(cuda_options, gpu.DTYPES))
def test_drawn_calls(case: Case) -> None:
    assert_cuda_as_accurate(case, str(case.dtype).removeprefix("torch."))


@pytest.mark.parametrize("cell", CELLS)
def test_no_combination_of_options_runs_elsewhere(cell: str) -> None:
    options = cuda_options(cell)
    for size in range(len(options) + 1):
        for combination in itertools.combinations(options, size):
            for dtype in gpu.DTYPES:
                call, _ = Case(cell, 2, 2, 2, 2, combination, dtype=dtype).draw()
                assert backends.choose(call, "cuda") == "cuda", (combination, dtype)


def test_tf32_is_another_product() -> None:
    call, gradients = Case("lstm", 3, 2, 4, 40).draw()
    plain = run(call, "cuda", gradients)
    with products("tf32"):
        rounded = run(call, "cuda", gradients)
    assert (plain["y"] - rounded["y"]).abs().max() > 100 * torch.finfo(torch.float32).eps
