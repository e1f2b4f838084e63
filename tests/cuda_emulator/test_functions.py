"""What the emulated functions of csrc/cuda/device.h and launch.h compute and report."""

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

POLICIES = range(4)


@pytest.fixture(scope="module")
def call() -> Callable[..., str | None]:
    """Calls a function of functions.cu; tensors are passed by address. Returns its error."""
    library = ctypes.CDLL(str(build.shared_library([build.HERE / "functions.cu"])))

    def run(name: str, *arguments: Any) -> str | None:
        function = library[name]
        function.restype = ctypes.c_char_p
        passed = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        error = function(*passed)
        return error and error.decode()

    return run


# Tensor cores

# Where the elements of a fragment lie: a [M, K], b [N, K] and d [M, N], each stored by columns, at the sum of these
# strides. Lane l has the coordinates (l % 4, l // 4), of its elements the first coordinate counts fastest. From
# cutlass, include/cute/atom/mma_traits_sm80.hpp: SM80_16x8x16_F32F16F16F32_TN and SM80_16x8x8_F32TF32TF32F32_TN.
D_STRIDES = ((32, 1), (16, 8))
STRIDES_16_BIT = {"a": ((32, 1), (16, 8, 128)), "b": ((16, 1), (8, 64)), "d": D_STRIDES}
STRIDES_TF32 = {"a": ((16, 1), (8, 64)), "b": ((8, 1), (32,)), "d": D_STRIDES}


def places(strides: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """[32, elements of a lane]: the place of each element in the matrix."""
    of_lane, of_element = strides
    rows = []
    for lane in range(32):
        start = lane % 4 * of_lane[0] + lane // 4 * of_lane[1]
        bits = itertools.product(range(2), repeat=len(of_element))
        rows.append([start + sum(b * s for b, s in zip(reversed(bit), of_element)) for bit in bits])
    return torch.tensor(rows)


def fragment(matrix: Tensor, strides: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """The words [32, n] of a matrix, two elements each where they have 16 bits."""
    return matrix.t().contiguous().flatten()[places(strides)].view(torch.int32)


ELEMENTS = {
    "half": (torch.float16, STRIDES_16_BIT),
    "bfloat16": (torch.bfloat16, STRIDES_16_BIT),
    "tf32": (torch.float32, STRIDES_TF32),
}


def multiply_add(call: Callable[..., str | None], element: str, words: Tensor, d: Tensor) -> Tensor:
    """d [16, 8] plus the product of the fragments in words [32, 6]."""
    place = places(D_STRIDES)
    fragments = d.t().contiguous().flatten()[place]
    assert call("run_multiply_add", element.encode(), 1, words.contiguous(), fragments) is None
    result = torch.full((128,), math.nan)
    result[place.flatten()] = fragments.flatten()
    return result.view(8, 16).t()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("element", ELEMENTS)
def test_multiply_add_has_the_layout_of_the_hardware(
    element: str, policy: int, call: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whole numbers, whose sums are exact; each two of the six words changed for each other give something else."""
    monkeypatch.setenv("FASTRNN_EMULATOR_POLICY", str(policy))
    dtype, strides = ELEMENTS[element]
    depth = 8 if element == "tf32" else 16
    a, b = (torch.randint(-99, 100, (rows, depth)).to(dtype) for rows in (16, 8))
    d = torch.randint(-99, 100, (16, 8)).float()
    words = torch.cat([fragment(a, strides["a"]), fragment(b, strides["b"])], 1)
    expected = d + a.float() @ b.float().t()
    assert torch.equal(multiply_add(call, element, words, d), expected)
    for i, j in itertools.combinations(range(6), 2):
        order = list(range(6))
        order[i], order[j] = j, i
        assert not torch.equal(multiply_add(call, element, words[:, order], d), expected)


@pytest.mark.parametrize("element", ELEMENTS)
def test_multiply_add_is_exact_to_the_sum_in_float(element: str, call: Callable[..., str | None]) -> None:
    """Products of numbers of every size, denormal ones too, are exact: one in each sum, it comes out unrounded."""
    dtype, strides = ELEMENTS[element]
    depth = 8 if element == "tf32" else 16
    smallest = {"half": -24, "bfloat16": -60, "tf32": -60}[element]
    a, b = torch.zeros(16, depth), torch.zeros(8, depth)
    a[:, 3] = torch.randn(16) * 2.0 ** torch.linspace(smallest, 10, 16)
    b[:, 3] = torch.randn(8)
    if element == "tf32":
        a, b = (x.view(torch.int32).bitwise_and(-(2**13)).view(torch.float32) for x in (a, b))
    a, b = a.to(dtype), b.to(dtype)
    words = torch.cat([fragment(a, strides["a"]), fragment(b, strides["b"])], 1)
    assert torch.equal(multiply_add(call, element, words, torch.zeros(16, 8)), a.float() @ b.float().t())


def test_multiply_add_of_floats_ignores_the_low_13_bits(call: Callable[..., str | None]) -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    words = torch.cat([fragment(a, STRIDES_TF32["a"]), fragment(b, STRIDES_TF32["b"])], 1)
    d = torch.zeros(16, 8)
    assert torch.equal(multiply_add(call, "tf32", words, d), multiply_add(call, "tf32", words & -(2**13), d))


# Lanes


@pytest.mark.parametrize("policy", POLICIES)
def test_shuffles_and_ballot(policy: int, call: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_EMULATOR_POLICY", str(policy))
    values = torch.randint(0, 2**31, (64,), dtype=torch.int32)
    warps, lane = values.view(2, 32), torch.arange(32)
    odd = ((warps % 2 == 1).long() << lane).sum(1, keepdim=True)
    for mask, source in [(1, 0), (16, 31), (31, 7), (0, 30)]:
        out = torch.zeros(64, 5, dtype=torch.int32)
        assert call("run_lanes", values, mask, source, out) is None
        swapped, next_lane = warps[:, lane ^ mask], warps[:, (lane + 1) % 32]
        expected = [swapped, swapped, warps[:, [source] * 32], next_lane, odd.expand(2, 32).to(torch.int32)]
        assert torch.equal(out.view(2, 32, 5), torch.stack(expected, 2))


# Numbers

# Every exponent with random mantissas, both signs, what lies around the limits of the 16-bit types, and ties.
LIMITS = [65504.0, 65519.99, 65520.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-40, 3.3895314e38, 1.0 + 2.0**-11]


def all_sizes() -> Tensor:
    bits = torch.arange(0, 2**31, 2**21, dtype=torch.int64) + torch.randint(0, 2**21, (1024,))
    ties = torch.arange(0, 2**31, 2**12, dtype=torch.int64)  # every tie of every type, and the number itself
    bits = torch.cat([bits, ties]).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([*LIMITS, math.inf, math.nan])])
    return torch.cat([x, -x])


def convert(x: Tensor, call: Callable[..., str | None]) -> dict[str, Tensor]:
    n = len(x)
    result = {
        "float16": torch.empty(n, dtype=torch.int16),
        "bfloat16": torch.empty(n, dtype=torch.int16),
        "tf32": torch.empty(n, dtype=torch.int32),
        "functions": torch.empty(n, 4),
    }
    assert call("run_floats", x, ctypes.c_int64(n), *result.values()) is None
    return result


def test_conversions_to_16_bits_equal_torchs_and_nan_is_canonical(call: Callable[..., str | None]) -> None:
    x = all_sizes()
    result = convert(x, call)
    for name, dtype in [("float16", torch.float16), ("bfloat16", torch.bfloat16)]:
        expected = x.to(dtype).view(torch.int16)
        assert torch.equal(result[name][~x.isnan()], expected[~x.isnan()])
        assert (result[name][x.isnan()] == 0x7FFF).all()


def test_rounding_to_tf32(call: Callable[..., str | None]) -> None:
    """To the nearest of 10 bits of mantissa, ties away from 0."""
    x = all_sizes()
    rounded = convert(x, call)["tf32"]
    assert (rounded[x.isnan()] == 0x7FFFFFFF).all()
    x, rounded = x[~x.isnan()], rounded[~x.isnan()]
    assert (rounded & 0x1FFF == 0).all()
    found, exact = rounded.view(torch.float32).double(), x.double()
    step = 2.0 ** (torch.frexp(exact)[1].clamp(min=-125).double() - 11)
    overflow = x.abs() >= 2.0**128 - 2.0**116
    assert torch.equal(found[overflow], x[overflow].sign() * math.inf)
    away = exact.sign() * torch.floor(exact.abs() / step + 0.5) * step
    assert torch.equal(found[~overflow], away[~overflow])


def test_16_bit_numbers_as_floats(call: Callable[..., str | None]) -> None:
    bits = torch.arange(65536).to(torch.int16)
    results = [torch.empty(65536) for _ in range(2)]
    assert call("run_widen", *results) is None
    for result, dtype in zip(results, [torch.float16, torch.bfloat16]):
        torch.testing.assert_close(result, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_functions_are_within_what_the_device_promises(call: Callable[..., str | None]) -> None:
    x = torch.cat([torch.linspace(-80, 80, 4001), torch.tensor([1e-30, 1e30])])
    x = x[x != 0]
    found = convert(x, call)["functions"]
    exact = torch.stack([f(x.double()) for f in (torch.exp, torch.tanh, torch.reciprocal, torch.rsqrt)], 1)
    ulp = 2.0 ** (torch.frexp(exact)[1].double() - 24)
    error = (found.double() - exact).abs() / ulp
    defined = torch.stack([exact[:, 0] < 3e38, *[torch.ones(len(x), dtype=torch.bool)] * 2, x > 0], 1)
    assert (error[defined] <= 2).all()
    assert found[x < 0, 3].isnan().all()


# Launches


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("blocks,threads", [(1, 1), (3, 33), (70, 96), (2, 1024)])
def test_every_thread_runs_once(
    blocks: int, threads: int, policy: int, call: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than run at once, too: 70 blocks of 96 threads."""
    monkeypatch.setenv("FASTRNN_EMULATOR_POLICY", str(policy))
    out = torch.full((blocks, threads, 4), -1, dtype=torch.int32)
    assert call("run_indices", blocks, threads, out) is None
    block, thread = torch.meshgrid(torch.arange(blocks), torch.arange(threads), indexing="ij")
    expected = [block, thread, torch.full_like(block, blocks), torch.full_like(block, threads)]
    assert torch.equal(out, torch.stack(expected, 2).to(torch.int32))


def launch_error(
    call: Callable[..., str | None], blocks: int, threads: int, shared: int, cooperative: bool, cluster: int
):
    return call("run_empty", blocks, threads, ctypes.c_int64(shared), cooperative, cluster)


def test_launches_that_cuda_refuses(call: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRNN_EMULATOR_MULTIPROCESSORS", "4")
    assert launch_error(call, 4, 128, 232448, True, 1) is None
    assert launch_error(call, 5, 128, 232448, True, 1) == "too many blocks in cooperative launch"
    assert launch_error(call, 5, 128, 232448, False, 1) is None
    assert launch_error(call, 4, 128, 232449, False, 1) == "invalid argument"
    for blocks, threads in [(0, 32), (1, 0), (1, 1025)]:
        assert launch_error(call, blocks, threads, 0, False, 1) == "invalid configuration argument"
    misconfigured = "a kernel launch error has occurred due to cluster misconfiguration"
    assert launch_error(call, 8, 64, 0, False, 4) is None
    assert launch_error(call, 9, 64, 0, False, 4) == misconfigured
    assert launch_error(call, 16, 64, 0, False, 16) == misconfigured
    monkeypatch.setenv("FASTRNN_EMULATOR_CAPABILITY", "80")
    assert launch_error(call, 8, 64, 0, False, 4) == misconfigured


def test_more_threads_than_the_emulator_runs(call: Callable[..., str | None]) -> None:
    expected = "the emulator runs at most 30000 threads at once, not 264 blocks of 1024"
    assert launch_error(call, 264, 1024, 0, True, 1) == expected
    assert launch_error(call, 264, 1024, 0, False, 1) is None


def test_limits_and_resident_blocks(call: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    def resident(threads: int, shared: int) -> int | str | None:
        blocks = ctypes.c_int(-1)
        error = call("query_resident_blocks", threads, ctypes.c_int64(shared), ctypes.byref(blocks))
        return error or blocks.value

    found = torch.zeros(3, dtype=torch.int64)
    assert call("query_limits", found) is None
    assert found.tolist() == [132, 232448, 90]
    assert [resident(256, 232448), resident(256, 100_000), resident(256, 0), resident(32, 0)] == [132, 264, 1056, 4224]
    assert [resident(1024, 0), resident(1025, 0), resident(256, 232449)] == [264, 0, "invalid argument"]
    monkeypatch.setenv("FASTRNN_EMULATOR_MULTIPROCESSORS", "2")
    monkeypatch.setenv("FASTRNN_EMULATOR_SHARED_BYTES", "101376")
    monkeypatch.setenv("FASTRNN_EMULATOR_CAPABILITY", "86")
    assert call("query_limits", found) is None
    assert found.tolist() == [2, 101376, 86]
    assert [resident(256, 101376), resident(256, 101377)] == [2, "invalid argument"]


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("POLICY", "4", "must be from 0 to 3, got '4'"),
        ("SEED", "x", "must be from 0 to 9223372036854775807, got 'x'"),
        ("COPY", "never", "must be 'early' or 'late'"),
        ("MULTIPROCESSORS", "", "must be from 1 to 1024, got ''"),
    ],
)
def test_wrong_settings_are_named(
    name: str, value: str, message: str, call: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FASTRNN_EMULATOR_{name}", value)
    assert launch_error(call, 1, 32, 0, False, 1) == f"FASTRNN_EMULATOR_{name} {message}"


def test_fill(call: Callable[..., str | None]) -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    assert call("run_fill", memory, 0xAB, ctypes.c_int64(99)) is None
    assert memory.tolist() == [0xAB] * 99 + [0]
