"""The native CPU library by itself: activations, instruction sets, checksum, threads."""

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrnn.ops import recurrence
from tests.accuracy import assert_as_accurate
from tests.ops.case import ISAS, LIBRARY, Case, run, using_isa

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")

LANES = {"avx512": 16, "avx2": 8, "portable": 4}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with using_isa(request.param):
        yield request.param


# Activations, through units that compute little else


def through_tanh(x: Tensor, steps: int) -> Tensor:
    """tanh of each of the n numbers in x, by an RNN of one unit that does not see itself and a batch of n."""
    gates_x = x[:, None].expand(steps, len(x), 1)
    return recurrence("rnn_tanh", gates_x, x.new_zeros(1, 1), backend="cpu")[0][-1, :, 0]


def through_sigmoid(x: Tensor, steps: int) -> Tensor:
    """sigmoid of the same, as what the forget gate of an LSTM of one unit leaves of c = 1 in the last step."""
    gates_x = x.new_zeros(steps, len(x), 4)
    gates_x[:, :, 1] = 100
    gates_x[-1, :, 1] = x
    return recurrence("lstm", gates_x, x.new_zeros(4, 1), c0=x.new_ones(len(x), 1), backend="cpu")[2][:, 0]


# Both signs, 500 numbers in each decade.
DECADES = [10.0**exponent * torch.linspace(1, 10, 500).repeat(2) for exponent in range(-20, 3)]
for decade in DECADES:
    decade[:500] *= -1


@pytest.mark.parametrize("steps", [1, 2], ids=["one_step", "sequence"])
def test_tanh_is_as_accurate_as_torchs(steps: int, isa: str) -> None:
    """In each decade by itself: towards 0 the error is relative."""
    for x in DECADES:
        assert_as_accurate(through_tanh(x, steps), torch.tanh(x), torch.tanh(x.double()))


@pytest.mark.parametrize("steps", [1, 2], ids=["one_step", "sequence"])
def test_sigmoid_is_as_accurate_as_torchs(steps: int, isa: str) -> None:
    x = torch.cat(DECADES)
    assert_as_accurate(through_sigmoid(x, steps), torch.sigmoid(x), torch.sigmoid(x.double()))


@pytest.mark.parametrize("steps", [1, 2], ids=["one_step", "sequence"])
def test_activations_of_special_values(steps: int, isa: str) -> None:
    values = torch.tensor([0.0, 1e-40, 1e-20, 20.0, 88.0, 104.0, 1e4, 3e38, math.inf])
    x = torch.cat([values, -values])
    tanh = through_tanh(x, steps)
    assert torch.equal(tanh[x.abs() >= 20], x[x.abs() >= 20].sign())
    assert torch.equal(tanh[x.abs() <= 1e-20], x[x.abs() <= 1e-20])
    sigmoid = through_sigmoid(x, steps)
    assert (sigmoid[x >= 20] == 1).all() and (sigmoid[x.abs() <= 1e-20] == 0.5).all()
    assert (sigmoid[x <= -88] < 2e-38).all() and (sigmoid >= 0).all()
    nan = torch.tensor([math.nan])
    assert through_tanh(nan, steps).isnan() and through_sigmoid(nan, steps).isnan()


@pytest.mark.parametrize("steps", [1, 2], ids=["one_step", "sequence"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_nan_passes_and_stays_in_its_row(cell: str, steps: int, isa: str) -> None:
    call, _ = Case(cell, steps, 5, 4, 37).draw()
    call.x[0, 2, 1] = math.nan
    y = run(call, "cpu", {})["y"]
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_infinity_gives_what_the_reference_gives(cell: str, isa: str) -> None:
    call, _ = Case(cell, 3, 4, 4, 21, states=()).draw()
    call.x[0, 0] = math.inf
    call.x[0, 1] = -math.inf
    ours, theirs = run(call, "cpu", {})["y"], run(call, "reference", {})["y"]
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("steps", [1, 2], ids=["one_step", "sequence"])
def test_relu_keeps_nan_infinity_and_zero(steps: int, isa: str) -> None:
    x = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-40, 2.5])
    gates_x = torch.zeros(steps, 8, 1)
    gates_x[-1, :, 0] = x
    y = recurrence("rnn_relu", gates_x, torch.zeros(1, 1), backend="cpu")[0][-1, :, 0]
    assert torch.equal(y.nan_to_num(nan=-7), torch.relu(x).nan_to_num(nan=-7))
    # At 0 and below the gradient is 0, as in torch.
    given = torch.tensor([-1.0, 0.0, 1e-30, 2.0]).expand(steps, 1, 4).clone().requires_grad_()
    recurrence("rnn_relu", given, torch.zeros(4, 4), backend="cpu")[0].sum().backward()
    assert torch.equal(given.grad[-1, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


# Instruction sets


def test_instruction_sets_of_this_machine() -> None:
    assert ISAS[-1] == "portable" and set(ISAS) <= set(LANES)
    for name in ISAS:
        with using_isa(name):
            assert LIBRARY.cpu_isa() == name
            assert LIBRARY.lanes() == LANES[name]
    with pytest.raises(ValueError, match="instruction set must be one that this machine can run, got 'sse9'"):
        LIBRARY.use_cpu_isa("sse9")


@pytest.mark.parametrize("name", ISAS)
def test_environment_caps_the_instruction_set(name: str) -> None:
    code = "from fastrnn.backends import native; print(native.load().cpu_isa())"
    env = {**os.environ, "FASTRNN_CPU_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name]


def test_an_unknown_instruction_set_in_the_environment_is_named() -> None:
    env = {**os.environ, "FASTRNN_CPU_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", "import fastrnn"], env=env, capture_output=True, text=True, check=True)
    assert f"'portable', got 'sse9'; using '{ISAS[0]}'" in done.stderr


# Checksum


def checksum(data: Tensor, threads: int = 1) -> int:
    assert data.is_contiguous()
    return LIBRARY.checksum(data.data_ptr(), data.numel(), threads)


@pytest.mark.parametrize("size", [1, 2, 15, 63, 64, 65, 4095, 4096, 4097, 100_003])
def test_checksum_sees_every_element(size: int, isa: str) -> None:
    data = torch.randn(size)
    before = checksum(data)
    assert checksum(data.clone()) == before
    places = range(size) if size < 100 else {0, 1, size // 2, size - 65, size - 17, size - 2, size - 1}
    for place in places:
        changed = data.clone()
        changed.view(torch.int32)[place] ^= 1  # the last bit of the mantissa
        assert checksum(changed) != before, place
    changed = data.clone()
    changed.view(torch.int32)[0] ^= -(2**31)  # the sign
    assert checksum(changed) != before


@pytest.mark.parametrize("distance", [1, 2, 16, 64, 4096])
def test_checksum_sees_two_elements_swapped(distance: int, isa: str) -> None:
    data = torch.randn(20_000)
    for place in (0, 5, 4090, 12_000):
        swapped = data.clone()
        swapped[[place, place + distance]] = data[[place + distance, place]]
        assert checksum(swapped) != checksum(data)


def test_checksum_tells_zero_from_zero_and_the_sizes_of_zeros(isa: str) -> None:
    zeros = [torch.zeros(size) for size in (1, 2, 64, 128, 4096, 8192)]
    assert len({checksum(data) for data in zeros}) == len(zeros)
    assert checksum(-zeros[3]) != checksum(zeros[3])


def test_checksum_does_not_depend_on_threads(isa: str) -> None:
    data = torch.randn(1_000_003)
    assert len({checksum(data, threads) for threads in (1, 2, 3, 8)}) == 1


def test_no_two_checksums_in_a_thousand_are_equal(isa: str) -> None:
    base = torch.zeros(1000)
    seen = set()
    for place in range(1000):
        data = base.clone()
        data[place] = 1.0
        seen.add(checksum(data))
    assert len(seen) == 1000


# Threads


PARALLEL_BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


def test_inside_a_parallel_region_of_torch() -> None:
    """A nested team has one thread, which then stands for all slots."""
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    cases = [Case("gru", 5, 32, 64, 96).draw(seed) for seed in range(2)]
    alone = [run(call, "cpu", gradients) for call, gradients in cases]
    nested: dict[int, dict[str, Tensor]] = {}

    @PARALLEL_BODY
    def body(begin: int, end: int, _: int) -> None:
        for index in range(begin, end):
            nested[index] = run(cases[index][0], "cpu", cases[index][1])

    parallel_for = library.torch_parallel_for
    parallel_for.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, PARALLEL_BODY, ctypes.c_void_p]
    parallel_for(0, 2, 1, body, None)
    for index, expected in enumerate(alone):
        for name, result in nested[index].items():
            assert torch.equal(result, expected[name]), name


def test_more_threads_than_cores() -> None:
    """The barrier must yield: eight threads on fewer cores, a hundred steps."""
    case = Case("lstm", 100, 16, 64, 128)
    call, gradients = case.draw()
    expected = run(call, "cpu", gradients)
    torch.set_num_threads(8)
    for name, result in run(call, "cpu", gradients).items():
        torch.testing.assert_close(result, expected[name])


def test_fma_ceiling_is_a_rate() -> None:
    assert LIBRARY.fma_ceiling(1, 5.0) > 0.1
