"""The back ends of a GPU, on one, against the fp64 reference: results and all gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import RecurrenceCall, gpu
from fastrnn.nn import GRU, LSTM, LSTMCell
from fastrnn.ops.recurrence import run_on
from fastrnn.reference import CELLS
from tests.ops.case import ALL_CELLS, Case, assert_results_as_accurate, forward, on_device, options_of, run

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=gpu.NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def _on_gpu(call: RecurrenceCall, gradients: Mapping[str, Tensor]) -> tuple[RecurrenceCall, dict[str, Tensor]]:
    return on_device(call, "cuda"), {name: gradient.cuda() for name, gradient in gradients.items()}


def assert_accurate(case: Case, backend: str, most_draws: int = 4) -> None:
    call, _ = case.draw()
    reasons = backends.reasons_against(backend, on_device(call, "cuda"))
    if reasons:
        pytest.skip("; ".join(reasons))

    def runner(call: RecurrenceCall, gradients: Mapping[str, Tensor], needs: Any) -> dict[str, Tensor]:
        moved, given = _on_gpu(call, gradients)
        found = run(moved, backend, given, needs)
        return {name: result.cpu() for name, result in found.items()}

    assert_results_as_accurate(case, {backend: runner}, most_draws)


EVERY_KIND = [
    *(pytest.param(cell, options_of(cell), id=cell) for cell in CELLS),
    pytest.param("gru", options_of("gru")[:-1], id="gru_reset_after"),
]
EACH_OPTION = [pytest.param(cell, (o,), id=f"{cell}-{o}") for cell in CELLS for o in options_of(cell)]

SHAPES = [  # T, B, I, H: resident in Triton up to 64 or 128, by steps beyond
    (1, 1, 1, 1),
    (1, 64, 128, 512),
    (7, 3, 5, 9),
    (100, 33, 40, 64),
    (17, 129, 64, 128),
    (5, 7, 300, 280),
    (30, 16, 128, 1024),
    (1000, 2, 3, 16),
]


# Compiling takes most of the time, so that float16, which differs in nothing but the conversions, has few shapes.
@pytest.mark.parametrize(
    "shape, dtype", [*((shape, dtype) for dtype in (FP32, BF16) for shape in SHAPES), (SHAPES[3], FP16)], ids=str
)
@pytest.mark.parametrize("cell, options", ALL_CELLS)
def test_shapes(
    cell: str, options: tuple[str, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    assert_accurate(Case(cell, *shape, options, dtype=dtype), backend, most_draws=2)


@pytest.mark.parametrize("hidden", [25, 200])
@pytest.mark.parametrize("cell, options", [*EACH_OPTION, *EVERY_KIND])
def test_options(cell: str, options: tuple[str, ...], hidden: int, backend: str) -> None:
    assert_accurate(Case(cell, 7, 18, 20, hidden, options, reverse=len(options) > 1), backend)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("hidden", [25, 200])
@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_all_options_packed_in_bfloat16(
    cell: str, options: tuple[str, ...], hidden: int, reverse: bool, backend: str
) -> None:
    assert_accurate(Case(cell, 7, 18, 20, hidden, options[1:], packed=True, reverse=reverse, dtype=BF16), backend)


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset", "expanded"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_layouts(cell: str, layout: str, backend: str) -> None:
    assert_accurate(Case(cell, 7, 5, 20, 40, layout=layout), backend)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("hidden", [64, 256])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_tf32_is_used_where_torch_is_told_to(cell: str, hidden: int, backend: str) -> None:
    call = on_device(Case(cell, 20, 64, 64, hidden).draw()[0], "cuda")
    exact = forward(on_device(call, "cpu"), "reference")["y"].cuda()
    plain = forward(call, backend)["y"]
    with _tf32():
        fast = forward(call, backend)["y"]
    assert (plain - exact).abs().max() < 1e-5 < (fast - exact).abs().max() < 1e-2


@pytest.mark.parametrize("steps, hidden", [(7, 25), (3, 200), (1, 200)])
@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_repeats_bitwise(cell: str, options: tuple[str, ...], steps: int, hidden: int, backend: str) -> None:
    call, gradients = _on_gpu(*Case(cell, steps, 40, 20, hidden, options).draw())
    if backends.reasons_against(backend, call):
        pytest.skip("not one of this back end's calls")
    first = run(call, backend, gradients)
    for _ in range(5):
        for name, result in run(call, backend, gradients).items():
            assert torch.equal(result, first[name]), name


@pytest.mark.parametrize("steps, hidden", [(7, 25), (3, 200), (1, 200)])
@pytest.mark.parametrize("cell", CELLS)
def test_a_row_does_not_depend_on_its_batch(cell: str, steps: int, hidden: int, backend: str) -> None:
    call = on_device(Case(cell, steps, 70, 1, hidden, ("lengths",), project=False, dtype=BF16).draw()[0], "cuda")
    if backends.reasons_against(backend, call):
        pytest.skip("not one of this back end's calls")
    together = forward(call, backend)
    for b in (0, 17, 69):
        row = slice(b, b + 1)
        names = ("h0", "c0", "lengths")
        parts = {name: None if getattr(call, name) is None else getattr(call, name)[row] for name in names}
        for name, result in forward(replace(call, x=call.x[:, row], **parts), backend).items():
            assert torch.equal(result, together[name][:, row] if result.dim() == 3 else together[name][row]), name


@pytest.mark.parametrize("steps, hidden", [(7, 25), (3, 200), (1, 200)])
@pytest.mark.parametrize("cell, options", EVERY_KIND)
def test_the_host_never_waits(cell: str, options: tuple[str, ...], steps: int, hidden: int, backend: str) -> None:
    case = Case(cell, steps, 40, 20, hidden, options)
    call, gradients = _on_gpu(*case.draw())
    if backends.reasons_against(backend, call):
        pytest.skip("not one of this back end's calls")
    run(call, backend, gradients)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call, backend, gradients)
        run(replace(call, lengths=None if call.lengths is None else call.lengths.cpu()), backend, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("steps, hidden", [(7, 25), (3, 200), (1, 200)])
@pytest.mark.parametrize("cell, options", [*ALL_CELLS, *EVERY_KIND])
def test_cuda_graphs(cell: str, options: tuple[str, ...], steps: int, hidden: int, backend: str) -> None:
    call = on_device(Case(cell, steps, 40, 20, hidden, options).draw()[0], "cuda")
    if backends.reasons_against(backend, call):
        pytest.skip("not one of this back end's calls")
    call.x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def step() -> tuple[Tensor, Tensor]:
        y, h_n, _, _ = run_on(call, backend)
        return y, torch.autograd.grad([y, h_n], call.x, [torch.ones_like(y), torch.ones_like(h_n)])[0]

    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        call.x.copy_(torch.randn_like(call.x))
    expected = step()
    for _ in range(2):
        graph.replay()
        for found, wanted in zip(captured, expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("hidden", [25, 200])
def test_the_current_stream_is_used(hidden: int, backend: str) -> None:
    call = on_device(Case("lstm", 5, 8, 20, hidden).draw()[0], "cuda")
    if backends.reasons_against(backend, call):
        pytest.skip("not one of this back end's calls")
    expected = forward(call, backend)["y"]
    late = torch.zeros_like(call.x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(call.x)
        y = forward(replace(call, x=late), backend)["y"]
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("hidden", [64, 200])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, hidden: int, backend: str) -> None:
    call = on_device(Case(cell, 5, 8, 20, hidden).draw()[0], "cuda")
    if backends.reasons_against(backend, call):
        pytest.skip("not one of this back end's calls")
    call.weight_hh.requires_grad_()
    exact = forward(call, "reference")["y"]
    (wanted,) = torch.autograd.grad(exact.sum(), call.weight_hh)
    with torch.autocast("cuda", BF16):
        y = forward(call, backend)["y"]
    (found,) = torch.autograd.grad(y.sum(), call.weight_hh)
    assert found.dtype is FP32
    torch.testing.assert_close(y.float(), exact, atol=3e-2, rtol=0)
    torch.testing.assert_close(found, wanted, atol=3e-2 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("module", [LSTM, GRU])
def test_modules_equal_torchs(module: type[torch.nn.Module]) -> None:
    ours = module(20, 48, num_layers=2, bidirectional=True, device="cuda")
    torchs = getattr(torch.nn, module.__name__)(20, 48, num_layers=2, bidirectional=True, device="cuda")
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(9, 6, 20, device="cuda", requires_grad=True)
    results = []
    for layer in (ours, torchs):
        y = layer(x)[0]
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_auto_picks() -> None:
    single, _ = Case("lstm", 1, 4, 20, 512).draw()
    small, _ = Case("lstm", 9, 4, 20, 64).draw()
    large, _ = Case("lstm", 9, 4, 20, 512, ("zoneout",)).draw()
    for call in (single, small, large):
        assert backends.choose(on_device(call, "cuda")) in gpu.NAMES


def test_a_cell_is_one_launch() -> None:
    cell = LSTMCell(20, 96, device="cuda", backend="triton")
    x = torch.randn(5, 20, device="cuda")
    torch.use_deterministic_algorithms(False)  # which would fill empty tensors, a launch each
    with torch.no_grad():
        cell(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            cell(x)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    assert [name for name in launched if "step_forward" in name] and len(launched) == 1, launched
