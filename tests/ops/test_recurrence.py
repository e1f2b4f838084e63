"""The CPU kernels against the fp64 reference: results and all gradients."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastrnn import backends
from fastrnn.backends import cpu
from fastrnn.ops import recurrence, recurrent_layer
from fastrnn.ops.recurrence import check, run_step
from fastrnn.reference import CELLS
from tests.accuracy import assert_as_accurate
from tests.ops.case import (
    ALL_CELLS,
    ARGUMENTS,
    CELLS_AND_ARGUMENTS,
    DTYPES,
    ISAS,
    LIBRARY,
    OPTIONS,
    Case,
    assert_kernels_as_accurate,
    cases,
    converted,
    forward,
    kernel_options,
    poison_scratch,
    run,
    using_isa,
    with_rows,
)

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")

SHAPES = [  # T, B, I, H
    (1, 1, 1, 1),
    (1, 3, 40, 70),
    (2, 1, 5, 300),  # the pointwise part of groups of panels
    (7, 3, 5, 9),
    (3, 2, 33, 129),
    (1, 129, 40, 7),
    (5, 129, 7, 17),
    (19, 19, 9, 24),  # long sums in the gradients of the weights
    (100, 4, 16, 40),
    (4, 30, 64, 96),  # hidden units dealt out to threads
    (9, 50, 300, 280),  # several chunks of steps
    (2, 3, 1030, 1040),  # many passes over the depth of each product
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_shapes(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int]) -> None:
    assert_kernels_as_accurate(Case(cell, *shape, options))


# bfloat16 has kernels of its own, whose products take two elements at once: odd sizes have half a word left over.
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_shapes_in_bfloat16(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int]) -> None:
    assert_kernels_as_accurate(Case(cell, *shape, options, dtype=torch.bfloat16), ISAS[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps(cell: str, dtype: torch.dtype) -> None:
    assert_kernels_as_accurate(Case(cell, 1000, 2, 3, 5, dtype=dtype))


@pytest.mark.parametrize("shape", [(7, 3, 5, 9), (1, 4, 20, 40)], ids=str)
@pytest.mark.parametrize("cell, arguments", CELLS_AND_ARGUMENTS)
def test_arguments(cell: str, arguments: str, shape: tuple[int, int, int, int]) -> None:
    assert_kernels_as_accurate(Case(cell, *shape, **ARGUMENTS[arguments]))


def _alone_and_together(cell: str) -> list[tuple[str, ...]]:
    options = kernel_options(cell) if LIBRARY else ()
    return [(option,) for option in options] + [options]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("shape", [(7, 5, 5, 9), (1, 4, 20, 40), (9, 40, 30, 70)], ids=str)
@pytest.mark.parametrize(
    "cell, options", [pytest.param(c, o, id=f"{c}-{'+'.join(o)}") for c in CELLS for o in _alone_and_together(c)]
)
def test_options(cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int], reverse: bool) -> None:
    assert_kernels_as_accurate(Case(cell, *shape, options, reverse=reverse))


@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_expectation(cell: str) -> None:
    if "zoneout" in kernel_options(cell):
        assert_kernels_as_accurate(Case(cell, 7, 3, 5, 9, ("zoneout",), zoneout_seed=None))


# Rows of the batch are dealt out to threads where there are few hidden units.
@pytest.mark.parametrize("longest", [13, 5])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("options", [(), ("lengths",), ("lengths", "resets")], ids="+".join)
@pytest.mark.parametrize("cell", CELLS)
def test_many_rows_of_few_units(cell: str, options: tuple[str, ...], reverse: bool, longest: int) -> None:
    assert_kernels_as_accurate(Case(cell, 13, 1000, 8, 8, options, reverse=reverse, longest=longest), ISAS[:1])


def test_every_option_is_tested() -> None:
    call, _ = Case("lstm", 2, 2, 2, 2, tuple(OPTIONS)).draw()
    assert set(call.options()) | {"proj_size"} == set(OPTIONS)
    assert cpu.KERNEL_OPTIONS <= set(OPTIONS)
    for option in cpu.KERNEL_OPTIONS:
        for cell in OPTIONS[option]:
            assert option in kernel_options(cell), f"{option} of {cell} is claimed, but not computed"


@pytest.mark.parametrize("cell", CELLS)
def test_no_combination_of_kernel_options_runs_elsewhere(cell: str) -> None:
    options = kernel_options(cell)
    for size in range(len(options) + 1):
        for combination in itertools.combinations(options, size):
            for dtype in DTYPES:
                call, _ = Case(cell, 2, 2, 2, 2, combination, dtype=dtype).draw()
                assert backends.choose(call) == "cpu", (combination, dtype)


@settings(max_examples=150)
@given(cases(kernel_options, DTYPES))
def test_drawn_calls(case: Case) -> None:
    assert_kernels_as_accurate(case)


# What is defined exactly


@pytest.mark.parametrize("cell", CELLS)
def test_after_the_end_of_a_sequence(cell: str, isa: str) -> None:
    call, gradients = Case(cell, 7, 5, 5, 9, ("lengths",)).draw()
    assert call.lengths is not None
    call.lengths = torch.tensor([3, 0, 7, 1, 5])
    results = run(call, "cpu", gradients)
    after = torch.arange(7)[:, None] >= call.lengths
    assert (results["y"][after] == 0).all()
    assert (results["dx"][after] == 0).all()
    assert torch.equal(results["h_n"][1], call.h0[1])
    assert torch.equal(results["dh0"][1], gradients["h_n"][1])
    last = results["y"][call.lengths - 1, torch.arange(5)]
    assert torch.equal(results["h_n"][call.lengths > 0], last[call.lengths > 0])


@pytest.mark.parametrize("cell", CELLS)
def test_all_lengths_zero(cell: str, isa: str) -> None:
    call, gradients = Case(cell, 7, 5, 5, 9, ("lengths",), longest=0).draw()
    results = run(call, "cpu", gradients)
    for name in ("y", "dx", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh"):
        assert (results[name] == 0).all(), name
    assert torch.equal(results["h_n"], call.h0)
    assert torch.equal(results["dh0"], gradients["h_n"])
    if cell == "lstm":
        assert torch.equal(results["c_n"], call.c0)
        assert torch.equal(results["dc0"], gradients["c_n"])


@pytest.mark.parametrize("cell", CELLS)
def test_no_gradient_passes_a_reset(cell: str, isa: str) -> None:
    case = Case(cell, 6, 3, 5, 9, ("resets",), outputs=("h_n", "c_n"))
    call, gradients = case.draw()
    call.resets = torch.zeros(6, 3, dtype=torch.bool)
    call.resets[4] = True
    results = run(call, "cpu", gradients)
    assert (results["dx"][:4] == 0).all() and (results["dh0"] == 0).all()
    assert (results["dx"][4:] != 0).any()


@pytest.mark.parametrize("shape", [(0, 3, 5, 9), (4, 0, 5, 9), (1, 0, 5, 9), (0, 0, 5, 9)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell: str, shape: tuple[int, int, int, int]) -> None:
    for options in ((), ("lengths", "resets")):
        assert_kernels_as_accurate(Case(cell, *shape, options))


# Bitwise


def _options_by_row(cell: str) -> tuple[str, ...]:
    """Options under which a row's result depends on the row alone; zoneout draws by its place in the batch."""
    return tuple(option for option in kernel_options(cell) if option != "zoneout") if LIBRARY else ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 7, 20, 40), (1, 30, 64, 96), (3, 2, 5, 9), (5, 7, 20, 40), (3, 30, 64, 96), (3, 5, 9, 300), (2, 14, 9, 1030)],
    ids=str,
)
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_does_not_depend_on_its_batch(
    cell: str, shape: tuple[int, int, int, int], dtype: torch.dtype, isa: str
) -> None:
    for options in dict.fromkeys([(), ("lengths",), _options_by_row(cell)]):
        call, _ = Case(cell, *shape, options, dtype=dtype).draw()
        together = forward(call, "cpu")
        for b in range(shape[1]):
            alone = forward(with_rows(call, [b]), "cpu")
            for name, result in alone.items():
                rows = together[name][:, b : b + 1] if result.dim() == 3 else together[name][b : b + 1]
                assert torch.equal(result, rows), (options, name, b)


@pytest.mark.parametrize("cell", CELLS)
def test_a_row_of_one_step_with_lengths_equals_the_first_of_more(cell: str, isa: str) -> None:
    """Given lengths, one step adds up in the same order as a sequence; without them it need not (docs/numerics.md)."""
    call, _ = Case(cell, 4, 7, 20, 40).draw()
    first = replace(call, x=call.x[:1], lengths=torch.ones(7, dtype=torch.int64))
    assert torch.equal(forward(first, "cpu")["y"], forward(call, "cpu")["y"][:1])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_equal_padded_ones(cell: str, reverse: bool, isa: str) -> None:
    call, _ = Case(cell, 6, 5, 20, 40, packed=True, reverse=reverse).draw()
    padded, lengths = pad_packed_sequence(PackedSequence(call.x, call.batch_sizes))
    unpacked = forward(replace(call, x=padded, batch_sizes=None, lengths=lengths), "cpu")
    packed = forward(call, "cpu")
    valid = torch.arange(6)[:, None] < lengths
    assert torch.equal(packed["y"], unpacked["y"][valid])
    assert torch.equal(packed["h_n"], unpacked["h_n"])


def test_y_lies_in_memory_as_x_does() -> None:
    """So that batch_first costs no copy."""
    for layout in ("contiguous", "transposed"):
        call, gradients = Case("lstm", 6, 4, 5, 9, layout=layout).draw()
        results = run(call, "cpu", gradients)
        for name in ("y", "dx"):
            assert results[name].transpose(0, 1).is_contiguous() == (layout == "transposed"), name


@pytest.mark.parametrize("shape", [(1, 4, 20, 40), (9, 5, 20, 40), (6, 32, 64, 96), (8, 400, 8, 8)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_repeats_bitwise(cell: str, shape: tuple[int, int, int, int], isa: str) -> None:
    call, gradients = Case(cell, *shape, kernel_options(cell)).draw()
    first = run(call, "cpu", gradients)
    for _ in range(3):
        poison_scratch()
        for name, result in run(call, "cpu", gradients).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_forward_is_the_same_with_and_without_gradients(cell: str, isa: str) -> None:
    for shape in [(1, 3, 20, 40), (5, 3, 20, 40)]:
        call, _ = Case(cell, *shape).draw()
        with torch.no_grad():
            inference = forward(call, "cpu")
        call.weight_hh.requires_grad_()
        for name, result in forward(call, "cpu").items():
            assert torch.equal(result, inference[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_the_short_way_of_one_step(cell: str) -> None:
    call, _ = Case(cell, 1, 4, 20, 40).draw()
    h, c = run_step(check(call), "cpu")
    expected = forward(call, "cpu")
    assert torch.equal(h, expected["h_n"])
    assert c is None if cell != "lstm" else torch.equal(c, expected["c_n"])


# Threads


@pytest.mark.parametrize("shape", [(1, 60, 64, 96), (6, 32, 64, 96), (8, 600, 8, 8), (5, 2, 100, 200)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_any_number_of_threads(cell: str, shape: tuple[int, int, int, int]) -> None:
    options = set(kernel_options(cell))
    if shape[-1] < 16:  # Among so many rows of so few units there are some which layer norm magnifies at will.
        options -= {"layer_norm", "layer_norm_c"}
    case = Case(cell, *shape, tuple(sorted(options)))
    results = {}
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_kernels_as_accurate(case, ISAS[:1])
        results[threads] = forward(case.draw()[0], "cpu")["y"]
    assert all(torch.equal(y, results[1]) for y in results.values())


def test_more_threads_than_a_team_can_have() -> None:
    torch.set_num_threads(150)
    assert_kernels_as_accurate(Case("gru", 3, 500, 64, 64), ISAS[:1])


@pytest.mark.parametrize("cell", CELLS)
def test_several_python_threads_at_once(cell: str) -> None:
    shared, gradients = Case(cell, 6, 8, 30, 40).draw(0)
    others = [Case(cell, 6, 8, 30, 40).draw(seed)[0] for seed in range(1, 4)]
    calls = [shared, *(replace(other, weight_hh=shared.weight_hh) for other in others)]
    alone = [run(call, "cpu", gradients) | forward(call, "cpu") for call in calls]
    start = threading.Barrier(len(calls))

    def work(index: int) -> bool:
        start.wait()
        return all(
            torch.equal(result, alone[index][name])
            for _ in range(20)
            for name, result in (run(calls[index], "cpu", gradients) | forward(calls[index], "cpu")).items()
        )

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(work, range(len(calls))))


# Instruction sets


@pytest.mark.parametrize("cell", CELLS)
def test_instruction_sets_agree(cell: str) -> None:
    call, gradients = Case(cell, 9, 5, 20, 40, kernel_options(cell)).draw()
    results = {}
    for isa in ISAS:
        with using_isa(isa):
            results[isa] = run(call, "cpu", gradients)
    exact = run(converted(call, torch.float64), "reference", {k: g.double() for k, g in gradients.items()})
    for isa, other in itertools.permutations(ISAS, 2):
        assert_as_accurate(results[isa], results[other], exact)


# The cache of packed weights


@pytest.mark.parametrize("change", ["in_place", "data", "numpy", "swap"])
def test_a_changed_weight_is_seen(change: str) -> None:
    call, _ = Case("gru", 4, 3, 5, 9).draw()
    forward(call, "cpu")
    forward(call, "cpu")
    if change == "in_place":
        call.weight_hh.mul_(2)
    elif change == "data":
        call.weight_hh.data[0, 0] += 1
    elif change == "numpy":
        call.weight_hh.numpy()[3] = 0
    else:
        call.weight_hh.set_(call.weight_hh.flip(0))
    expected = forward(replace(call, weight_hh=call.weight_hh.clone()), "cpu")
    assert torch.equal(forward(call, "cpu")["y"], expected["y"])


def test_training_between_two_inferences_is_seen() -> None:
    call, gradients = Case("lstm", 4, 3, 5, 9).draw()
    weight = call.weight_hh
    forward(call, "cpu")
    trained = replace(call, weight_hh=weight.requires_grad_())
    y = forward(trained, "cpu")["y"]
    y.backward(gradients["y"])
    with torch.no_grad():
        weight.sub_(weight.grad)
        assert torch.equal(forward(trained, "cpu")["y"], forward(replace(call, weight_hh=weight.clone()), "cpu")["y"])


def test_one_weight_in_several_roles() -> None:
    """Packed once per cell and role: the same tensor as weight_ih and weight_hh, of an RNN and of another."""
    weight = torch.randn(8, 8) / 8
    x = torch.randn(3, 2, 8)
    for cell in ("rnn_tanh", "rnn_relu", "rnn_tanh"):
        y = recurrent_layer(cell, x, weight, weight, backend="cpu")[0]
        torch.testing.assert_close(y, recurrent_layer(cell, x, weight, weight, backend="reference")[0])


# The public functions hand every argument on


def _options_of_the_functions(cell: str) -> tuple[str, ...]:
    return tuple(option for option, cells in OPTIONS.items() if cell in cells and option != "return_cell_states")


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_layer_passes_every_argument(cell: str) -> None:
    call, _ = Case(cell, 5, 4, 6, 7, _options_of_the_functions(cell), reverse=True).draw()
    others = ("cell", "x", "return_cell_states", "weight_ih", "weight_hh", "remembered")
    names = [name for name in call.__slots__ if name not in others]
    arguments = {name: getattr(call, name) for name in names}
    y, h_n, c_n = recurrent_layer(cell, call.x, call.weight_ih, call.weight_hh, **arguments, backend="reference")
    expected = forward(call, "reference")
    assert torch.equal(y, expected["y"]) and torch.equal(h_n, expected["h_n"])
    assert torch.equal(c_n, expected["c_n"]) if cell == "lstm" else c_n is None


@pytest.mark.parametrize("cell", CELLS)
def test_recurrence_passes_every_argument(cell: str) -> None:
    call, _ = Case(cell, 5, 4, 6, 7, _options_of_the_functions(cell), reverse=True, project=False).draw()
    passed = ("bias_hh", "h0", "c0", "lengths", "resets", "zoneout", "zoneout_seed", "recurrent_mask", "layer_norm_hh")
    passed += ("layer_norm_c", "peephole", "reset_after", "weight_hr", "reverse")
    arguments = {name: getattr(call, name) for name in passed}
    y, h_n, c_n = recurrence(cell, call.x, call.weight_hh, **arguments, backend="reference")
    expected = forward(call, "reference")
    assert torch.equal(y, expected["y"]) and torch.equal(h_n, expected["h_n"])
    assert torch.equal(c_n, expected["c_n"]) if cell == "lstm" else c_n is None
