"""What is defined bit for bit: in every order of the threads, whatever else is in the batch, and where there is NaN."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn.backends import cuda
from fastrnn.backends.gpu import Loop
from fastrnn.ops.recurrence import check, run_together
from fastrnn.reference import CELLS
from tests.cuda_emulator.recurrence.device import MATHS, cuda_options, dtype_of, emulated, products, tile
from tests.ops.case import ALL_CELLS, OUTPUTS, Case, run, with_rows


# Options under which a row's result depends on the row alone; zoneout draws by its place in the batch.
def _options_by_row(cell: str) -> tuple[str, ...]:
    return tuple(option for option in cuda_options(cell) if option not in ("zoneout", "reset_after=False"))


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, result in found.items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(
    "unit_groups, plain, with_options", [(1, "float32", "bfloat16"), (2, "bfloat16", "tf32"), (4, "tf32", "float16")]
)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_every_order_of_the_threads(
    cell: str, options: tuple[str, ...], unit_groups: int, plain: str, with_options: str
) -> None:
    """Blocks have two tiles of rows, so that a fast warp has more to do where it need not wait for others."""
    all_options = tuple(dict.fromkeys([*_options_by_row(cell), "zoneout", *options]))
    for arithmetic, used in ((plain, options), (with_options, all_options)):
        call, gradients = Case(cell, 3, 18, 3, 33, used, dtype=dtype_of(arithmetic)).draw()
        with products(arithmetic), tile(unit_groups, 32):
            first = run(call, "cuda", gradients)
            for policy, seed in [(0, 0), *itertools.product((1, 2, 3), (1, 2))]:
                with emulated(policy=policy, seed=seed):
                    assert_same_bits(run(call, "cuda", gradients), first)


WITH_OPTIONS = [(cell, (*_options_by_row(cell), *options)) for cell, options in ALL_CELLS]


@pytest.mark.parametrize("arithmetic", MATHS)
@pytest.mark.parametrize("cell, options", [*ALL_CELLS, *WITH_OPTIONS])
def test_a_row_does_not_depend_on_its_batch(cell: str, options: tuple[str, ...], arithmetic: str) -> None:
    """Nor does it on the shape of the blocks, which the batch decides."""
    # Torch's projection of x does depend on it.
    call, _ = Case(cell, 3, 19, 3, 33, options, project=False, dtype=dtype_of(arithmetic)).draw()
    order = [5, *reversed(range(5)), *range(6, 19)]
    with products(arithmetic):
        together = run(call, "cuda", {})
        for unit_groups, rows in ((1, [0]), (2, [17]), (4, [18]), (1, order)):
            with tile(unit_groups):
                alone = run(with_rows(call, rows), "cuda", {})
            expected = {name: out[:, rows] if out.dim() == 3 else out[rows] for name, out in together.items()}
            assert_same_bits(alone, expected)


# 150: several chunks of K in each part of a product.
@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "cell, options, hidden", [*((*kind, 33) for kind in WITH_OPTIONS), *((*kind, 150) for kind in ALL_CELLS)]
)
def test_gradients_do_not_depend_on_the_shape_of_the_blocks(
    cell: str, options: tuple[str, ...], hidden: int, arithmetic: str
) -> None:
    call, gradients = Case(cell, 2, 19, 3, hidden, options, dtype=dtype_of(arithmetic)).draw()
    with tile(1):
        expected = run(call, "cuda", gradients)
    for unit_groups, rows in ((2, 32), (4, 16)):
        with tile(unit_groups, rows):
            assert_same_bits(run(call, "cuda", gradients), expected)


def _norms(cell: str) -> tuple[str, ...]:
    return ("layer_norm", "layer_norm_c") if cell == "lstm" else ("layer_norm",)


@pytest.mark.parametrize("arithmetic", MATHS)
@pytest.mark.parametrize("cell, options", [*ALL_CELLS, *((cell, (*o, *_norms(cell))) for cell, o in ALL_CELLS)])
def test_nan_stays_in_its_row(cell: str, options: tuple[str, ...], arithmetic: str) -> None:
    """In the first row of a state, the second of an input, the third of a gradient, and the fourth has none.

    Its bits are those of a word that nobody has written yet: whoever handed it over would let others wait for ever.
    """
    call, gradients = Case(cell, 3, 4, 3, 33, options, project=False, dtype=dtype_of(arithmetic)).draw()
    with products(arithmetic):
        clean = run(call, "cuda", gradients, needs=("x", "h0"))
        for poisoned in (call.h0[0], call.x[1, 1], gradients["y"][1, 2]):
            poisoned.view(torch.int32 if poisoned.element_size() == 4 else torch.int16).fill_(-1)
        found = run(call, "cuda", gradients, needs=("x", "h0"))
    for name, result in found.items():
        rows, clean_rows = (r.transpose(0, 1) if r.dim() == 3 else r for r in (result, clean[name]))
        assert torch.equal(rows[3], clean_rows[3]), name
        if name in OUTPUTS:
            assert rows[0].isnan().all() and torch.equal(rows[2], clean_rows[2]), name
    assert found["y"][1:, 1].isnan().all() and torch.equal(found["y"][0, 1], clean["y"][0, 1])
    assert found["dx"][:2, 2].isnan().any() and torch.equal(found["dx"][2, 2], clean["dx"][2, 2])
    assert found["dh0"][2].isnan().any()


@pytest.mark.parametrize("cell", CELLS)
def test_both_directions_at_once(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for both gives the bits of two."""
    loops_of_launches = []

    def counted(name: str) -> None:
        launch = getattr(cuda, name)

        def count_and_launch(loops: Sequence[Loop], *rest: Any) -> Any:
            loops_of_launches.append(len(loops))
            return launch(loops, *rest)

        monkeypatch.setattr(cuda, name, count_and_launch)

    options = cuda_options(cell)
    draws = [
        Case(cell, 4, 18, 3, 40, options, reverse=reverse).draw(seed) for seed, reverse in enumerate((False, True))
    ]
    calls = [call for call, _ in draws]
    apart = [run(call, "cuda", gradients, needs=("weight_hh",)) for call, gradients in draws]
    for call in calls:
        call.weight_hh.requires_grad_()
    counted("loops_forward")
    counted("loops_backward")
    results = [dict(zip(OUTPUTS, r)) for r in run_together([check(call) for call in calls], ["cuda", "cuda"])]
    names = list(draws[0][1])
    torch.autograd.backward(
        [result[name] for result in results for name in names],
        [gradients[name] for _, gradients in draws for name in names],
    )
    assert loops_of_launches == [2, 2]
    for call, expected, result in zip(calls, apart, results, strict=True):
        found = {name: result[name].detach() for name in names}
        assert_same_bits({**found, "dweight_hh": call.weight_hh.grad}, expected)
