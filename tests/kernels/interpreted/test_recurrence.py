"""The Triton kernels of the recurrence against the fp64 reference: results and all gradients.

The grid is thin, since the interpreter takes 0.05 s for a sequence and more for one that goes step by step: options
alone and all at once, the other dimensions in combination with all.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import RecurrenceCall, triton
from fastrnn.ops import recurrent_layer
from fastrnn.ops.recurrence import run_on
from fastrnn.reference import CELLS
from tests.ops.case import (
    ALL_CELLS,
    LAYOUTS,
    Case,
    assert_results_as_accurate,
    forward,
    options_of,
    run,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["at_once", "by_steps"])
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A hidden size. Going by steps is forced upon a small one: those that do by themselves take much longer."""
    if request.param == "at_once":
        return 25
    monkeypatch.setattr(triton, "pick", lambda *_: None)
    return 40


def _triton(call: RecurrenceCall, gradients: Mapping[str, Tensor], needs: Any) -> dict[str, Tensor]:
    return run(call, "triton", gradients, needs)


def assert_triton_as_accurate(case: Case, most_draws: int = 3) -> None:
    assert_results_as_accurate(case, {"triton": _triton}, most_draws)


ALL_OPTIONS = [pytest.param(cell, options_of(cell), id=cell) for cell in CELLS]
# A GRU with every option has its reset gate before the product: another time without.
EVERY_KIND = [*ALL_OPTIONS, pytest.param("gru", options_of("gru")[:-1], id="gru_reset_after")]
# What RNNs do with an option is what GRUs do with it.
EACH_OPTION = [pytest.param(cell, (o,), id=f"{cell}-{o}") for cell in ("lstm", "gru") for o in options_of(cell)]


@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (2, 33, 40, 20), (2, 2, 5, 70)], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_shapes(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int]) -> None:
    assert_triton_as_accurate(Case(cell, *shape, options))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_dtypes(cell: str, options: tuple[str, ...], dtype: torch.dtype, hidden: int) -> None:
    assert_triton_as_accurate(Case(cell, 2, 9, 40, hidden, options, dtype=dtype), most_draws=2)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_hundred_steps(cell: str) -> None:
    assert_triton_as_accurate(Case(cell, 100, 3, 3, 16), most_draws=1)


@pytest.mark.parametrize("cell, options", [*EACH_OPTION, *EVERY_KIND])
def test_options(cell: str, options: tuple[str, ...], hidden: int) -> None:
    assert_triton_as_accurate(Case(cell, 3, 9, 20, hidden, options), most_draws=2)


@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_all_options_in_reverse(cell: str, options: tuple[str, ...], hidden: int) -> None:
    assert_triton_as_accurate(Case(cell, 3, 6, 20, hidden, options, reverse=True), most_draws=1)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_all_options_packed(cell: str, reverse: bool, hidden: int) -> None:
    options = options_of(cell)[1:]  # without lengths
    assert_triton_as_accurate(Case(cell, 3, 6, 20, hidden, options, packed=True, reverse=reverse), most_draws=1)


@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_all_options_in_bfloat16(cell: str, options: tuple[str, ...], hidden: int) -> None:
    assert_triton_as_accurate(Case(cell, 3, 9, 20, hidden, options, dtype=BF16), most_draws=2)


@pytest.mark.parametrize("cell, options", [*ALL_CELLS, *EVERY_KIND])
def test_a_single_step(cell: str, options: tuple[str, ...], hidden: int) -> None:
    assert_triton_as_accurate(Case(cell, 1, 18, 20, hidden, options))


ARGUMENTS = {
    "no_states": {"states": ()},
    "h0_only": {"states": ("h0",)},
    "c0_only": {"states": ("c0",)},
    "bias_ih_only": {"biases": ("bias_ih",)},
    "bias_hh_only": {"biases": ("bias_hh",)},
    "reverse": {"reverse": True},
    "gates_x": {"project": False},
    "dy_only": {"outputs": ("y",)},
    "dh_n_only": {"outputs": ("h_n",)},
    "dc_n_only": {"outputs": ("c_n",)},
    "needs_h0": {"needs": ("h0",)},
    "needs_weight_hh": {"needs": ("weight_hh",)},
    "zoneout_expected": {"options": ("zoneout",), "zoneout_seed": None},
    "short_lengths_reverse": {"options": ("lengths", "resets"), "longest": 2, "reverse": True},
    **{layout: {"layout": layout} for layout in LAYOUTS if layout != "contiguous"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_of_an_lstm(arguments: str, hidden: int) -> None:
    assert_triton_as_accurate(Case("lstm", 3, 9, 20, hidden, **ARGUMENTS[arguments]), most_draws=2)


@pytest.mark.parametrize("arguments", [name for name in ARGUMENTS if name not in ("c0_only", "dc_n_only")])
def test_arguments_of_a_gru(arguments: str) -> None:
    assert_triton_as_accurate(Case("gru", 3, 9, 20, 25, **ARGUMENTS[arguments]), most_draws=2)


@pytest.mark.parametrize("shape", [(0, 3, 5, 9), (4, 0, 5, 9), (0, 0, 5, 9)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, shape: tuple[int, int, int, int]) -> None:
    assert_triton_as_accurate(Case(cell, *shape, ("lengths", "resets")), most_draws=1)


# Exactly


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_after_the_end_of_a_sequence(reverse: bool, hidden: int) -> None:
    call, gradients = Case("lstm", 5, 4, 5, hidden, ("lengths",), reverse=reverse).draw()
    call.lengths = torch.tensor([3, 0, 9, -1], dtype=torch.int32)  # clamped to 0..5, where values cannot be looked at
    x = call.x.requires_grad_()
    y, h_n, c_n, _ = run_on(call, "triton")
    (dx,) = torch.autograd.grad(y, x, gradients["y"])
    after = torch.arange(5)[:, None] >= torch.tensor([3, 0, 5, 0])
    assert (y[after] == 0).all() and (dx[after] == 0).all() and (y[~after] != 0).any()
    for b in (1, 3):
        assert torch.equal(h_n[b], call.h0[b]) and torch.equal(c_n[b], call.c0[b])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cell, options", [*ALL_CELLS, *EVERY_KIND])
def test_forward_is_the_same_with_and_without_gradients(
    cell: str, options: tuple[str, ...], steps: int, hidden: int
) -> None:
    call, _ = Case(cell, steps, 3, 20, hidden, options).draw()
    with torch.no_grad():
        inference = forward(call, "triton")
    call.weight_hh.requires_grad_()
    for name, result in forward(call, "triton").items():
        assert torch.equal(result, inference[name]), name


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_repeats_bitwise(cell: str, options: tuple[str, ...], steps: int, hidden: int) -> None:
    call, gradients = Case(cell, steps, 3, 20, hidden, options).draw()
    first = run(call, "triton", gradients)
    for name, result in run(call, "triton", gradients).items():
        assert torch.equal(result, first[name]), name


# The projection of the input is left out: it is torch's product, which may add in another order for another batch.
@pytest.mark.parametrize("steps, dtype", [(2, FP32), (1, BF16)], ids=str)
@pytest.mark.parametrize("cell, options", [*ALL_CELLS, *EVERY_KIND])
def test_a_row_does_not_depend_on_its_batch(
    cell: str, options: tuple[str, ...], steps: int, hidden: int, dtype: torch.dtype
) -> None:
    options = tuple(option for option in options if option != "zoneout")  # which draws by a row's place in the batch
    call, _ = Case(cell, steps, 19, 1, hidden, options, project=False, dtype=dtype).draw()
    together = forward(call, "triton")
    for b in (0, 18):
        row = slice(b, b + 1)
        parts = {name: getattr(call, name) for name in ("h0", "c0", "recurrent_mask", "lengths")}
        parts = {name: None if tensor is None else tensor[row] for name, tensor in parts.items()}
        resets = None if call.resets is None else call.resets[:, row]
        for name, result in forward(replace(call, x=call.x[:, row], resets=resets, **parts), "triton").items():
            rows = together[name][:, row] if result.dim() == 3 else together[name][row]
            assert torch.equal(result, rows), name


def test_y_lies_in_memory_as_x_does(hidden: int) -> None:
    for layout in ("contiguous", "transposed"):
        call, gradients = Case("lstm", 3, 4, 5, hidden, layout=layout).draw()
        results = run(call, "triton", gradients)
        for name in ("y", "dx"):
            assert results[name].transpose(0, 1).is_contiguous() == (layout == "transposed"), name


# As an operator of torch


@pytest.mark.parametrize("cell, options", ALL_OPTIONS)
def test_registered_operator(cell: str, options: tuple[str, ...]) -> None:
    # So many rows that nothing lies between saved tensors, and no ended sequences: what is not written may differ.
    call, gradients = Case(cell, 1, 64, 5, 8, options).draw()
    call.lengths = torch.full_like(call.lengths, 1)
    inputs = call.inputs()
    name = cell if call.reset_after else "gru_reset_before"
    scalars = (call.lengths, None, call.resets, call.recurrent_mask, call.zoneout, call.zoneout_seed, call.reverse)
    arguments = ("triton", name, *inputs[:7], list(inputs[7:]), *scalars, True, cell == "lstm")
    torch.library.opcheck(torch.ops.fastrnn.recurrence_forward.default, arguments)
    y, _, _, saved, c_all = torch.ops.fastrnn.recurrence_forward(*arguments)
    given = (gradients["y"], gradients["h_n"], gradients.get("c_n"), None)
    kept = (y, saved, c_all, [tensor is not None for tensor in inputs])
    arguments = ("triton", name, *given, *inputs[:3], *inputs[5:7], list(inputs[7:]), *scalars, *kept)
    torch.library.opcheck(torch.ops.fastrnn.recurrence_backward.default, arguments)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_compiles_as_one_graph(cell: str) -> None:
    call, gradients = Case(cell, 3, 3, 5, 9).draw()

    def run_layer(x: Tensor, weight_ih: Tensor, weight_hh: Tensor) -> Tensor:
        return recurrent_layer(cell, x, weight_ih, weight_hh, backend="triton")[0]

    inputs = [tensor.requires_grad_() for tensor in (call.x, call.weight_ih, call.weight_hh)]
    results = []
    for function in (run_layer, torch.compile(run_layer, fullgraph=True, backend="aot_eager")):
        y = function(*inputs)
        results.append((y, *torch.autograd.grad(y, inputs, gradients["y"])))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_double_backward_by_way_of_the_reference() -> None:
    call, _ = Case("gru", 3, 2, 4, 5).draw()
    call.x.requires_grad_()
    gradients = []
    for backend in ("triton", "reference"):
        y = forward(call, backend)["y"]
        (first,) = torch.autograd.grad(y.square().sum(), call.x, create_graph=True)
        gradients += torch.autograd.grad(first.square().sum(), call.x)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, hidden: int) -> None:
    call, _ = Case(cell, 2, 3, 5, hidden).draw()
    call.weight_hh.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        results = forward(call, "triton")
        expected = forward(call, "cpu")
    for name, result in results.items():
        assert result.dtype == expected[name].dtype
        torch.testing.assert_close(result, expected[name], atol=2e-2, rtol=0)
    results["y"].sum().backward()
    assert call.weight_hh.grad is not None and call.weight_hh.grad.dtype is torch.float32


def test_the_choice() -> None:
    """In the interpreter the kernels take CPU tensors, as they take those on a GPU elsewhere."""
    call, _ = Case("lstm", 3, 2, 4, 300).draw()
    with backends.recorded_choices() as choices:
        assert backends.choose(call, "triton") == "triton"
    assert triton.why_later(call) is not None
    assert triton.why_later(replace(call, x=call.x[:1])) is None
    assert "not aten: 'triton' was asked for" in str(choices[0])
    assert triton.why_later(Case("lstm", 3, 2, 4, 64).draw()[0]) is None
