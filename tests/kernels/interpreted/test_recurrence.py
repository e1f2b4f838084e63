"""The Triton kernels of the recurrence against the fp64 reference: results and all gradients."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn.backends import RecurrenceCall
from fastrnn.reference import CELLS
from tests.ops.case import LAYOUTS, OPTIONS, Case, assert_results_as_accurate, run

BF16, FP16 = torch.bfloat16, torch.float16


def _triton(call: RecurrenceCall, gradients: Mapping[str, Tensor], needs: Any) -> dict[str, Tensor]:
    return run(call, "triton", gradients, needs)


def assert_triton_as_accurate(case: Case) -> None:
    # Four draws at most: the interpreter takes 0.1 s for each.
    assert_results_as_accurate(case, {"triton": _triton}, most_draws=4)


def _options(cell: str) -> tuple[str, ...]:
    return tuple(option for option, cells in OPTIONS.items() if cell in cells)


CELLS_AND_OPTIONS = [
    pytest.param(cell, options, id=f"{cell}-{'+'.join(options)}")
    for cell in CELLS
    for options in [*((option,) for option in _options(cell)), _options(cell)]
]
ALL_CELLS = [*((cell, ()) for cell in CELLS), ("gru", ("reset_after=False",))]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 3, 5, 9), (2, 33, 40, 20), (3, 17, 3, 64)], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_shapes(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int]) -> None:
    assert_triton_as_accurate(Case(cell, *shape, options))


@pytest.mark.parametrize("dtype, hidden", [(BF16, 100), (FP16, 33)], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_dtypes(cell: str, options: tuple[str, ...], dtype: torch.dtype, hidden: int) -> None:
    assert_triton_as_accurate(Case(cell, 5, 9, 40, hidden, options, dtype=dtype))


@pytest.mark.parametrize("cell, options", CELLS_AND_OPTIONS)
def test_options(cell: str, options: tuple[str, ...]) -> None:
    assert_triton_as_accurate(Case(cell, 6, 18, 20, 25, options))


@pytest.mark.parametrize("cell, options", CELLS_AND_OPTIONS)
def test_options_in_reverse_and_bfloat16(cell: str, options: tuple[str, ...]) -> None:
    assert_triton_as_accurate(Case(cell, 4, 18, 20, 33, options, reverse=True, dtype=BF16))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell, options", [(cell, _options(cell)[1:]) for cell in CELLS], ids=list(CELLS))
def test_all_options_packed(cell: str, options: tuple[str, ...], reverse: bool) -> None:
    assert_triton_as_accurate(Case(cell, 6, 18, 20, 25, options, packed=True, reverse=reverse))


ARGUMENTS = {
    "no_states": {"states": ()},
    "h0_only": {"states": ("h0",)},
    "c0_only": {"states": ("c0",)},
    "bias_ih_only": {"biases": ("bias_ih",)},
    "bias_hh_only": {"biases": ("bias_hh",)},
    "no_biases": {"biases": ()},
    "reverse": {"reverse": True},
    "gates_x": {"project": False},
    "packed": {"packed": True},
    "packed_reverse": {"packed": True, "reverse": True},
    "dy_only": {"outputs": ("y",)},
    "dh_n_only": {"outputs": ("h_n",)},
    "dc_n_only": {"outputs": ("c_n",)},
    "needs_h0": {"needs": ("h0",)},
    "needs_weight_hh": {"needs": ("weight_hh",)},
    "zoneout_expected": {"options": ("zoneout",), "zoneout_seed": None},
    "short_lengths_reverse": {"options": ("lengths", "resets"), "longest": 3, "reverse": True},
    **{layout: {"layout": layout} for layout in LAYOUTS if layout != "contiguous"},
}
ONLY_LSTM = ("c0_only", "dc_n_only")


@pytest.mark.parametrize(
    "cell, arguments", [(cell, name) for cell in CELLS for name in ARGUMENTS if cell == "lstm" or name not in ONLY_LSTM]
)
def test_arguments(cell: str, arguments: str) -> None:
    assert_triton_as_accurate(Case(cell, 5, 9, 20, 25, **ARGUMENTS[arguments]))


@pytest.mark.parametrize("shape", [(0, 3, 5, 9), (4, 0, 5, 9), (0, 0, 5, 9)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, shape: tuple[int, int, int, int]) -> None:
    assert_triton_as_accurate(Case(cell, *shape, ("lengths", "resets")))
