"""The operator's kernels against the reference in fp64, with the reference in fp32 as the yardstick of accuracy."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrnn import backends
from fastrnn.backends import RecurrenceCall, cpu, native
from fastrnn.ops import recurrence, recurrent_layer
from fastrnn.ops.recurrence import check, run_on
from fastrnn.reference import CELLS
from tests.accuracy import assert_as_accurate_over

C: Any = native.load()
pytestmark = pytest.mark.skipif(C is None, reason="the compiled extension is not built")
ISAS = [] if C is None else C.cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = C.cpu_isa()
    C.use_cpu_isa(request.param)
    yield request.param
    C.use_cpu_isa(before)


def new_call(
    cell: str, t: int, b: int, i: int, h: int, *, bias: bool = True, h0: bool = True, c0: bool = True, **options: Any
) -> RecurrenceCall:
    rows = CELLS[cell].gates * h
    scale = h**-0.5

    def weight(*shape: int) -> Tensor:
        return (torch.rand(shape) * 2 - 1) * scale

    return RecurrenceCall(
        cell,
        torch.randn(t, b, i),
        weight(rows, i),
        weight(rows, h),
        weight(rows) if bias else None,
        weight(rows) if bias else None,
        torch.randn(b, h) if h0 else None,
        torch.randn(b, h) if c0 and cell == "lstm" else None,
        **options,
    )


DIFFERENTIABLE = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0", "c0")


def results(call: RecurrenceCall, backend: str, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Outputs and the gradients of a random function of them."""
    fields = {name: getattr(call, name) for name in call.__slots__}
    for name in (*DIFFERENTIABLE, "recurrent_mask"):
        if fields[name] is not None:
            fields[name] = fields[name].detach().to(dtype).requires_grad_(name != "recurrent_mask")
    converted = check(RecurrenceCall(**fields))
    assert backend != "cpu" or backends.choose(converted, "cpu") == "cpu"
    outputs = [output for output in run_on(converted, backend) if output is not None]
    if call.cell == "lstm" and not call.return_cell_states:
        outputs = outputs[:3]
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(dtype)).sum() for o in outputs)
    inputs = [fields[name] for name in DIFFERENTIABLE if fields[name] is not None]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(loss, inputs, allow_unused=True))


def assert_kernels_accurate(calls: list[RecurrenceCall]) -> None:
    assert_as_accurate_over(
        [
            (
                results(call, "cpu", torch.float),
                results(call, "reference", torch.float),
                results(call, "reference", torch.double),
            )
            for call in calls
        ]
    )


SHAPES = [
    (1, 1, 1, 1),
    (7, 3, 5, 9),
    (5, 129, 7, 17),
    (3, 2, 33, 129),
    (100, 4, 16, 40),
    (1, 5, 7, 129),
    (1, 129, 40, 7),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cell", [*CELLS, "gru reset before"])
def test_values_and_gradients(isa: str, cell: str, shape: tuple[int, int, int, int]) -> None:
    name = cell.removesuffix(" reset before")
    draws = 10 if shape[3] < 16 else 3
    assert_kernels_accurate([new_call(name, *shape, reset_after=cell == name) for _ in range(draws)])


@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps(cell: str) -> None:
    assert_kernels_accurate([new_call(cell, 1000, 3, 8, 32)])


def test_wide_layers_and_deep_sums() -> None:
    """More than one pass over k, several panels to a thread, several chunks of steps."""
    for cell in ("lstm", "gru"):
        assert_kernels_accurate([new_call(cell, 9, 50, 300, 280)])
    assert_kernels_accurate([new_call("gru", 9, 50, 300, 280, reset_after=False)])


def test_many_rows_and_few_units() -> None:
    """Dealt out by rows of the batch, with more rows in a step than a chunk holds."""
    for cell in CELLS:
        assert_kernels_accurate([new_call(cell, 3, 1000, 4, 10)])


@st.composite
def calls(draw: st.DrawFn) -> RecurrenceCall:
    cell = draw(st.sampled_from([*CELLS]))
    t, b = draw(st.sampled_from([1, 2, 3, 8, 30])), draw(st.sampled_from([1, 2, 3, 17, 65]))
    i, h = draw(st.sampled_from([1, 5, 16, 33])), draw(st.sampled_from([1, 7, 16, 33, 64]))
    seed = draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    options: dict[str, Any] = {"reverse": draw(st.booleans())}
    wanted = {
        "lengths": lambda: torch.randint(0, t + 1, (b,)),
        "resets": lambda: torch.rand(t, b) < 0.3,
        "zoneout": lambda: 0.3,
        "recurrent_mask": lambda: (torch.rand(b, h) < 0.7).float() / 0.7,
        "return_cell_states": lambda: cell == "lstm",
        "reset_after=False": lambda: False,
    }
    assert wanted.keys() >= cpu.KERNEL_OPTIONS, "an option that kernels have is not tested"
    for option in sorted(cpu.KERNEL_OPTIONS):
        if draw(st.booleans()) and (option != "reset_after=False" or cell == "gru"):
            options[option.removesuffix("=False")] = wanted[option]()
    if "zoneout" in options and draw(st.booleans()):
        options["zoneout_seed"] = seed << 20
    given_states = {name: draw(st.booleans()) for name in ("bias", "h0", "c0")}
    return new_call(cell, t, b, i, h, **given_states, **options)


@hypothesis.given(st.sampled_from(ISAS or ["none"]), st.lists(calls(), min_size=1, max_size=1))
@hypothesis.settings(max_examples=150)
def test_options_together(isa: str, drawn: list[RecurrenceCall]) -> None:
    """All drawn together. Single small cases are a matter of luck, so the bound is that of fp32 at eight roundings."""
    before = C.cpu_isa()
    C.use_cpu_isa(isa)
    try:
        for call in drawn:
            exact, torchs, ours = (
                results(call, backend, dtype)
                for backend, dtype in (("reference", torch.double), ("reference", torch.float), ("cpu", torch.float))
            )
            for a, b, c in zip(ours, torchs, exact, strict=True):
                assert (a is None) == (c is None)
                if a is None or not a.numel():
                    continue
                scale = float(c.abs().max())
                error, torchs_error = (float((v.double() - c).abs().max()) for v in (a, b))
                assert error <= 4 * torchs_error + 8 * 1.2e-7 * scale + 1e-30, (call, error, torchs_error, scale)
    finally:
        C.use_cpu_isa(before)


def layer_arguments(call: RecurrenceCall) -> tuple[Any, ...]:
    return tuple(getattr(call, name) for name in ("cell", *DIFFERENTIABLE))


@pytest.mark.parametrize("cell", CELLS)
def test_packed_rows_equal_lengths(isa: str, cell: str) -> None:
    lengths = torch.tensor([6, 4, 4, 1])
    call = new_call(cell, 6, 4, 5, 20, lengths=lengths)
    valid = torch.arange(6)[:, None] < lengths
    packed = new_call(cell, 6, 4, 5, 20, batch_sizes=valid.sum(1))
    for name in DIFFERENTIABLE:
        setattr(packed, name, getattr(call, name))
    packed.x = call.x[valid]
    for reverse in (False, True):
        call.reverse = packed.reverse = reverse
        assert_kernels_accurate([packed])
        y, h_n, _, _ = run_on(check(call), "cpu")
        y_packed, h_packed, _, _ = run_on(check(packed), "cpu")
        assert torch.equal(y[valid], y_packed)
        assert torch.equal(h_n, h_packed)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("steps", [1, 6])
def test_from_the_pre_activations(isa: str, cell: str, steps: int) -> None:
    call = new_call(cell, steps, 3, 5, 20)
    assert call.weight_ih is not None
    call.x = call.x @ call.weight_ih.T
    call.weight_ih = call.bias_ih = None
    assert_kernels_accurate([call])


@pytest.mark.parametrize("view", ["batch-major", "every second column", "expanded", "offset"])
def test_strided_input(view: str) -> None:
    call = new_call("gru", 6, 4, 5, 20)
    if view == "batch-major":
        call.x = torch.randn(4, 6, 5).transpose(0, 1)
    elif view == "every second column":
        call.x = torch.randn(6, 4, 10)[..., ::2]
    elif view == "expanded":
        call.x = torch.randn(6, 1, 5).expand(6, 4, 5)
    else:
        call.x = torch.randn(9, 6, 8)[2:8, 1:5, 3:]
    y = run_on(call, "cpu")[0]
    assert torch.equal(y, recurrent_layer("gru", call.x.contiguous(), *layer_arguments(call)[2:7], backend="cpu")[0])
    assert y.transpose(0, 1).is_contiguous() == (view == "batch-major")
    assert_kernels_accurate([call])


@pytest.mark.parametrize("wanted", ["y", "h_n", "c_n"])
@pytest.mark.parametrize("steps", [1, 5])
def test_loss_of_one_output_only(wanted: str, steps: int) -> None:
    gradients = []
    call = new_call("lstm", steps, 3, 5, 20)
    for backend in ("reference", "cpu"):
        arguments = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in layer_arguments(call)]
        outputs = dict(zip(("y", "h_n", "c_n"), recurrent_layer(*arguments, backend=backend), strict=True))
        gradients.append(torch.autograd.grad(outputs[wanted].square().sum(), arguments[1:]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", range(7))
def test_gradient_of_one_input_only(position: int) -> None:
    call = new_call("lstm", 5, 3, 5, 20)
    arguments = list(layer_arguments(call))
    every = [a.clone().requires_grad_() if isinstance(a, Tensor) else a for a in arguments]
    expected = torch.autograd.grad(recurrent_layer(*every, backend="cpu")[0].sum(), every[1:])[position]
    arguments[position + 1] = arguments[position + 1].clone().requires_grad_()
    y = recurrent_layer(*arguments, backend="cpu")[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), arguments[position + 1])[0], expected)


@pytest.mark.parametrize("steps", [0, 3])
def test_no_steps_no_sequences_and_sequences_of_length_0(steps: int) -> None:
    for batch, lengths in ((0, None), (4, None), (4, torch.zeros(4, dtype=torch.long))):
        call = new_call("lstm", steps, batch, 5, 20, lengths=lengths)
        exact, ours = results(call, "reference", torch.double), results(call, "cpu", torch.float)
        for a, b in zip(ours, exact, strict=True):
            # Where nothing was computed the reference has no gradient, the kernels have zeros.
            b = torch.zeros_like(a) if b is None else b.float()
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", [*CELLS, "gru reset before"])
@pytest.mark.parametrize("steps", [1, 9])
def test_bitwise_repeatable_and_independent_of_batch_mates(isa: str, cell: str, steps: int) -> None:
    name = cell.removesuffix(" reset before")
    call = new_call(name, steps, 37, 21, 70, reset_after=cell == name)
    y, h_n, _, _ = run_on(call, "cpu")
    first = results(call, "cpu", torch.float)
    assert all(torch.equal(a, b) for a, b in zip(first, results(call, "cpu", torch.float), strict=True))
    for chosen in ([5], [36, 0], [3, 4, 5], list(range(10, 30))):
        fields = {field: getattr(call, field) for field in call.__slots__}
        fields["x"] = call.x[:, chosen]
        fields["h0"] = None if call.h0 is None else call.h0[chosen]
        fields["c0"] = None if call.c0 is None else call.c0[chosen]
        y_alone, h_alone, _, _ = run_on(RecurrenceCall(**fields), "cpu")
        assert torch.equal(y_alone, y[:, chosen])
        assert torch.equal(h_alone, h_n[chosen])


def test_number_of_threads() -> None:
    call = new_call("gru", 9, 40, 64, 256)
    two = results(call, "cpu", torch.float)
    torch.set_num_threads(1)
    one = results(call, "cpu", torch.float)
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_several_python_threads_at_once() -> None:
    call = new_call("lstm", 20, 16, 64, 256)
    expected = results(call, "cpu", torch.float)
    found: list[Any] = [None] * 4

    def work(index: int) -> None:
        for _ in range(5):
            found[index] = results(call, "cpu", torch.float)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_weights_written_behind_the_version_counter_are_seen() -> None:
    call = new_call("gru", 4, 3, 5, 20)
    before = run_on(call, "cpu")[0]
    call.weight_hh.data[7, 3] += 1
    after = run_on(call, "cpu")[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, run_on(call, "reference")[0], rtol=1e-4, atol=1e-5)


def test_checksum() -> None:
    data = torch.randn(100_003)
    first = C.checksum(data.data_ptr(), data.numel(), 1)
    assert first == C.checksum(data.data_ptr(), data.numel(), 2)
    for index in (0, 4095, 50_000, 100_002):
        data[index] += 1e-3
        changed = C.checksum(data.data_ptr(), data.numel(), 2)
        assert changed != first
        first = changed


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-4, 0.3, 1.0, -9.0, 50.0, 1e4, float("inf"), float("-inf")])
def test_tanh_at_its_edges(isa: str, value: float) -> None:
    """A vanilla RNN of one unit is a tanh: both signs, infinities, and relative accuracy near 0."""
    y = recurrence("rnn_tanh", torch.full((2, 1, 1), value), torch.zeros(1, 1), backend="cpu")[0]
    expected = torch.tanh(torch.tensor(value, dtype=torch.double))
    assert torch.allclose(y.double(), expected, rtol=3e-7, atol=0)
    assert (torch.signbit(y) == torch.signbit(expected)).all()


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays(isa: str, cell: str) -> None:
    call = new_call(cell, 4, 3, 5, 20)
    call.x[1, 2] = float("nan")
    y = run_on(call, "cpu")[0]
    assert y[1:, 2].isnan().all()
    assert not y[:, :2].isnan().any()
    assert not y[0].isnan().any()


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell: str) -> None:
    call = new_call(cell, 4, 3, 5, 8)
    found = []
    for backend, dtype in (("reference", torch.double), ("cpu", torch.float)):
        arguments = [a.to(dtype).requires_grad_() if isinstance(a, Tensor) else a for a in layer_arguments(call)]
        given = [a for a in arguments if isinstance(a, Tensor)]
        y = recurrent_layer(*arguments, backend=backend)[0]
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        found.append([g.float() for g in torch.autograd.grad(penalty, given)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_transforms_run_on_the_reference() -> None:
    call = new_call("gru", 4, 3, 5, 8)
    weights = layer_arguments(call)[2:6]

    def layer(x: Tensor) -> Tensor:
        return recurrent_layer("gru", x, *weights)[0]

    xs = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(torch.vmap(layer)(xs), torch.stack([layer(x) for x in xs]))
    tangent = torch.randn_like(call.x)
    _, dy = torch.func.jvp(layer, (call.x,), (tangent,))
    moved = (layer(call.x + 1e-2 * tangent) - layer(call.x - 1e-2 * tangent)) / 2e-2
    torch.testing.assert_close(dy, moved, rtol=1e-2, atol=1e-3)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(call.x)
    x = call.x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", [*CELLS, "gru_reset_before"])
@pytest.mark.parametrize("steps", [1, 4])
def test_opcheck(cell: str, steps: int) -> None:
    call = new_call(cell.removesuffix("_reset_before"), steps, 3, 5, 6)
    inputs = [getattr(call, name) for name in DIFFERENTIABLE]
    options = (None, None, None, None, 0.0, None, False)
    forward = torch.ops.fastrnn.recurrence_forward.default
    torch.library.opcheck(forward, (cell, *inputs, *options, True, False))
    y, _, _, saved, c_all = forward(cell, *inputs, *options, True, False)
    x, weight_ih, weight_hh, _, _, h0, c0 = inputs
    torch.library.opcheck(
        torch.ops.fastrnn.recurrence_backward.default,
        (cell, torch.randn_like(y), None, None, None, x, weight_ih, weight_hh, h0, c0, *options, y, saved, c_all)
        + ([True] * 6 + [cell == "lstm"],),
    )


def test_compile_without_graph_break_or_recompilation() -> None:
    call = new_call("lstm", 4, 3, 5, 8)
    weights = [w.requires_grad_() for w in layer_arguments(call)[2:6]]

    def layer(x: Tensor) -> Tensor:
        return recurrent_layer("lstm", x, *weights)[0]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in ((4, 3), (9, 2), (5, 7)):
            x = torch.randn(steps, batch, 5)
            y = compiled(x)
            assert torch.equal(y, layer(x))
            found = torch.autograd.grad(y.square().sum(), weights)
            assert all(map(torch.equal, found, torch.autograd.grad(layer(x).square().sum(), weights)))


def test_fake_and_meta_tensors() -> None:
    call = new_call("lstm", 4, 3, 5, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in layer_arguments(call)]
        assert [tuple(o.shape) for o in recurrent_layer(*fake)] == [(4, 3, 8), (3, 8), (3, 8)]
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in layer_arguments(call)]
    assert [tuple(o.shape) for o in recurrent_layer(*meta)] == [(4, 3, 8), (3, 8), (3, 8)]


WRONG = {
    "cell must be one of": {"cell": "lstmm"},
    r"weight_hh must have shape \(32, 8\), got \(32, 9\)": {"weight_hh": torch.zeros(32, 9)},
    r"weight_ih must have shape \(32, 5\), got \(32, 4\)": {"weight_ih": torch.zeros(32, 4)},
    r"bias_ih must have shape \(32,\), got \(31,\)": {"bias_ih": torch.zeros(31)},
    r"h0 must have shape \(3, 8\), got \(2, 8\)": {"h0": torch.zeros(2, 8)},
    r"h0 must have the dtype of x, torch.float32, got torch.float64": {"h0": torch.zeros(3, 8).double()},
    "c0 must be on the device of x, cpu, got meta": {"c0": torch.zeros(3, 8, device="meta")},
    "x must have 3 dimensions": {"x": torch.zeros(3, 5)},
    "x must have a floating dtype": {"x": torch.zeros(4, 3, 5, dtype=torch.long)},
    "x must be a torch.Tensor, got list": {"x": [1.0]},
    r"lengths must be int64 or int32 of shape \(3,\)": {"lengths": torch.zeros(2, dtype=torch.long)},
    r"lengths must lie in 0\.\.4, got values in 0\.\.5": {"lengths": torch.tensor([0, 5, 1])},
    r"resets must be bool of shape \(4, 3\)": {"resets": torch.zeros(3, 4, dtype=torch.bool)},
    r"zoneout must be a probability in \[0, 1\], got 1.5": {"zoneout": 1.5},
    "reset_after=False is for the cell 'gru'": {"reset_after": False},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    call = new_call("lstm", 4, 3, 5, 8)
    for name, value in WRONG[message].items():
        setattr(call, name, value)
    with pytest.raises((ValueError, TypeError), match=message):
        check(call)


@pytest.mark.parametrize("sizes", [[3, 2, 3], [3, 2], [3, 3, 0]])
def test_wrong_batch_sizes(sizes: list[int]) -> None:
    call = new_call("lstm", 4, 3, 5, 8, h0=False, c0=False, batch_sizes=torch.tensor(sizes))
    call.x = torch.zeros(8, 5)
    with pytest.raises(ValueError, match="batch_sizes must be positive, must not increase and must add up"):
        check(call)


def test_an_explicit_back_end_that_cannot_run_says_why() -> None:
    arguments = [a.double() if isinstance(a, Tensor) else a for a in layer_arguments(new_call("lstm", 4, 3, 5, 8))]
    with pytest.raises(NotImplementedError, match=r"backend 'cpu' cannot compute this call: .*torch.float64"):
        recurrent_layer(*arguments, backend="cpu")
    with pytest.raises(NotImplementedError, match="torch has no resets"):
        recurrent_layer(*arguments, resets=torch.zeros(4, 3, dtype=torch.bool), backend="aten")
    with pytest.raises(ValueError, match="backend must be one of 'cpu', 'aten', 'reference', 'auto', got 'gpu'"):
        recurrent_layer(*arguments, backend="gpu")


@pytest.mark.parametrize("isa_name", ISAS)
def test_the_instruction_set_is_capped_by_the_environment(isa_name: str) -> None:
    program = "from fastrnn.backends import native; print(native.load().cpu_isa())"
    environment = {**os.environ, "FASTRNN_CPU_ISA": isa_name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == isa_name
