"""AttentionDecoder against its formula, step by step with torch.nn's layers; what it promises besides."""

import contextlib
import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn import backends
from fastrnn.backends import native
from fastrnn.nn import (
    AdditiveAttention,
    AttentionDecoder,
    DecoderState,
    DotAttention,
    GeneralAttention,
    LocationAttention,
    MeanContext,
    PositionalAttention,
    PreparedMemory,
    SelfAttention,
)
from fastrnn.nn.attention import MemoryAttention
from tests.accuracy import assert_as_accurate_over

B, T, TK, I, H, M = 3, 4, 5, 2, 6, 6
LENGTHS = torch.tensor([3, 5, 0])

ATTENTIONS: dict[str, Callable[[], MemoryAttention]] = {
    "mean": MeanContext,
    "positional": lambda: PositionalAttention(9, 7),
    "dot": DotAttention,
    "scaled_dot": lambda: DotAttention(scaled=True),
    "length": lambda: DotAttention("length"),
    "general": lambda: GeneralAttention(H, M),
    "additive": lambda: AdditiveAttention(H, M, 7),
    "normalised": lambda: AdditiveAttention(H, M, 7, True),
    "coverage": lambda: AdditiveAttention(H, M, 7, coverage=True),
    "location": lambda: LocationAttention(H, M, 7, 2, 3),
    "cumulative": lambda: LocationAttention(H, M, 7, 2, 3, cumulative=True),
}
LOOPED = ["dot", "scaled_dot", "length", "general", "additive", "normalised"]
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "rnn_tanh": ("rnn", {}),
    "rnn_relu": ("rnn", {"nonlinearity": "relu"}),
}
CELLS_OF_FASTRNN = CELLS | {"gru_reset_before": ("gru", {"reset_after": False})}
needs_loop = pytest.mark.skipif(native.load() is None, reason="no compiled extension")


def decoder(kind: str = "additive", cell: str = "lstm", layers: int = 1, **options: Any) -> AttentionDecoder:
    """With parameters far from where they start: biases of zero would hide what they do."""
    name, own = CELLS_OF_FASTRNN[cell]
    module = AttentionDecoder(name, I, H, ATTENTIONS[kind](), layers, **own, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module


def draw(batch: int = B, layers: int = 1, lstm: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Inputs, memory, and the hidden state as torch.nn's layers return it."""
    states = [torch.randn(layers, batch, H, dtype=dtype).requires_grad_() for _ in range(2 if lstm else 1)]
    x, memory = torch.randn(batch, T, I, dtype=dtype), torch.randn(B, TK, M, dtype=dtype)
    return x.requires_grad_(), memory.requires_grad_(), tuple(states) if lstm else states[0]


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of nested tuples; what is no tensor is left out."""
    if isinstance(result, tuple):
        return [tensor for part in result for tensor in tensors_of(part)]
    return [result] if isinstance(result, Tensor) else []


def gradients(results: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum of all results with weights."""
    same = torch.Generator().manual_seed(9)
    pairs = [(out, torch.randn(out.shape, generator=same).to(out.dtype)) for out in tensors_of(results)]
    pairs = [(out, weight) for out, weight in pairs if out.requires_grad]
    outputs, directions = zip(*pairs)
    return torch.autograd.grad(outputs, inputs, directions, True, allow_unused=True, materialize_grads=True)


def oracle(
    module: AttentionDecoder,
    x: Tensor,
    memory: Tensor,
    hidden: Any,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """Outputs, state and weights, by torch.nn's layers and single calls of the attention module."""
    kind, settings = type(module.rnn).__name__, {}
    if kind == "RNN":
        settings["nonlinearity"] = module.rnn.nonlinearity
    layers = getattr(nn, kind)(module.rnn.input_size, H, module.rnn.num_layers, bias=module.rnn.bias, **settings)
    weights = dict(module.rnn.named_parameters())
    state, context, outputs, rows = None, memory.new_zeros(x.shape[0], memory.shape[-1]), [], []
    for t in range(x.shape[1]):
        top = hidden[0][-1] if kind == "LSTM" else hidden[-1]
        if module.attend == "before":
            context, row, state = module.attention(top, memory, lengths=lengths, mask=mask, state=state)
        seen = torch.cat([x[:, t], context], -1) if module.input_feeding else x[:, t]
        y, hidden = torch.func.functional_call(layers.to(x.dtype), weights, (seen[None], hidden))
        if module.attend == "after":
            context, row, state = module.attention(y[0], memory, lengths=lengths, mask=mask, state=state)
        outputs.append(torch.cat([y[0], context], -1))
        rows.append(row)
    h, c = hidden if kind == "LSTM" else (hidden, None)
    cell = None if c is None else c.transpose(0, 1)
    return torch.stack(outputs, 1), DecoderState(h.transpose(0, 1), cell, context, state), torch.stack(rows, 1)


@contextlib.contextmanager
def loops() -> Iterator[list[str]]:
    """The calls that were whole loops, once the block is left."""
    found: list[str] = []
    with backends.recorded_choices() as choices:
        yield found
        found += [choice.call for choice in choices if choice.call.startswith("decoder loop")]


# The formula


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize(
    ("kind", "cell", "layers"),
    [*((kind, "lstm", 1) for kind in ATTENTIONS), *(("additive", cell, 2) for cell in CELLS), ("location", "gru", 3)],
)
def test_the_formula_and_its_gradients(kind: str, cell: str, layers: int, attend: str, input_feeding: bool) -> None:
    """Whatever the memory that nobody sees holds: here NaN."""
    module = decoder(kind, cell, layers, attend=attend, input_feeding=input_feeding).double()
    x, memory, hidden = draw(layers=layers, lstm=cell == "lstm")
    mask = torch.rand(B, TK) < 0.7
    for options in ({}, {"lengths": LENGTHS}, {"mask": mask}, {"lengths": LENGTHS, "mask": mask}):
        seen = options.get("mask", torch.ones_like(mask)).clone()
        if "lengths" in options:
            seen &= torch.arange(TK) < LENGTHS[:, None]
        filled = memory.masked_fill(~seen[..., None], math.nan)
        found = module(x, filled, hidden, need_weights=True, **options)
        expected = oracle(module, x, filled, hidden, **options)
        torch.testing.assert_close(found, expected)
        leaves = [x, memory, *tensors_of(hidden), *module.parameters()]
        torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))
        alone = module(x, filled, hidden, **options)
        assert alone[2] is None
        torch.testing.assert_close(alone[:2], found[:2])


@needs_loop
@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize(
    ("kind", "cell", "layers"), [*((kind, "lstm", 1) for kind in LOOPED), *(("additive", c, 2) for c in CELLS)]
)
def test_the_loop_is_as_accurate_as_torch(kind: str, cell: str, layers: int, attend: str) -> None:
    draws = []
    for seed in range(6):
        torch.manual_seed(seed)
        module = decoder(kind, cell, layers, attend=attend)
        inputs = draw(layers=layers, lstm=cell == "lstm", dtype=torch.float32)

        def run(function: Any, module: nn.Module, dtype: torch.dtype, inputs: Any = inputs) -> Any:
            given = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors_of(inputs)]
            x, memory, *hidden = given
            result = function(x, memory, tuple(hidden) if len(hidden) == 2 else hidden[0], lengths=LENGTHS)
            found = result[0], result[1], result[2]
            return found, gradients(found, [*given, *module.parameters()])

        torchs, exact = copy.deepcopy(module), copy.deepcopy(module).double()
        torchs.attention.backend = "reference"
        with loops() as taken:
            ours = run(lambda *args, m=module, **opts: m(*args, need_weights=True, **opts), module, torch.float32)
        assert len(taken) == 1
        draws.append(
            (
                ours,
                run(lambda *args, m=torchs, **opts: oracle(m, *args, **opts), torchs, torch.float32),
                run(lambda *args, m=exact, **opts: oracle(m, *args, **opts), exact, torch.float64),
            )
        )
    assert_as_accurate_over(draws)


@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize(
    ("kind", "cell"), [*((kind, "lstm") for kind in ATTENTIONS), *(("general", cell) for cell in CELLS_OF_FASTRNN)]
)
def test_steps_equal_all_at_once(kind: str, cell: str, input_feeding: bool, attend: str) -> None:
    module = decoder(kind, cell, 2, input_feeding=input_feeding, attend=attend)
    x, memory, hidden = draw(layers=2, lstm=cell == "lstm", dtype=torch.float32)
    mask = torch.rand(B, TK) < 0.7
    prepared = module.attention.prepare(memory, LENGTHS)
    state, outputs, rows = module.initial_state(prepared, hidden), [], []
    for t in range(T):
        output, state, row = module.step(x[:, t], state, prepared, mask=mask, need_weights=True)
        outputs.append(output)
        rows.append(row)
    stepwise = torch.stack(outputs, 1), state, torch.stack(rows, 1)
    leaves = [x, memory, *tensors_of(hidden), *module.parameters()]
    for given, options in ((prepared, {}), (memory, {"lengths": LENGTHS})):
        together = module(x, given, hidden, mask=mask, need_weights=True, **options)
        torch.testing.assert_close(together, stepwise)
        torch.testing.assert_close(gradients(together, leaves), gradients(stepwise, leaves), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_two_calls_equal_one(kind: str, input_feeding: bool, attend: str) -> None:
    module = decoder(kind, "lstm", 2, input_feeding=input_feeding, attend=attend)
    x, memory, hidden = draw(layers=2, dtype=torch.float32)
    whole = module(x, memory, hidden, need_weights=True)
    first = module(x[:, :1], memory, hidden, need_weights=True)
    rest = module(x[:, 1:], memory, first[1], need_weights=True)
    parts = torch.cat([first[0], rest[0]], 1), rest[1], torch.cat([first[2], rest[2]], 1)
    torch.testing.assert_close(parts, whole)
    leaves = [x, memory, *hidden, *module.parameters()]
    torch.testing.assert_close(gradients(parts, leaves), gradients(whole, leaves), rtol=1e-4, atol=1e-5)


# Beams and search


@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_beams_that_share_a_memory_equal_copies_of_it(kind: str, attend: str) -> None:
    module, beams = decoder(kind, "gru", 2, attend=attend), 3
    x, memory, hidden = draw(B * beams, 2, False, torch.float32)
    tiled, lengths = memory.repeat_interleave(beams, 0), LENGTHS.repeat_interleave(beams)
    mask = torch.rand(B, TK) < 0.7
    copies = {"lengths": lengths, "mask": mask.repeat_interleave(beams, 0), "need_weights": True}
    with loops() as taken:
        shared = module(x, memory, hidden, lengths=LENGTHS, mask=mask, need_weights=True)
        assert not taken
        copied = module(x, tiled, hidden, **copies)
    torch.testing.assert_close(shared, copied)
    leaves = [x, memory, hidden, *module.parameters()]
    torch.testing.assert_close(gradients(shared, leaves), gradients(copied, leaves), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), loops() as taken:
        torch.testing.assert_close(module(x, memory, hidden, lengths=LENGTHS, mask=mask, need_weights=True), shared)
    if native.load() is not None:
        # One loop for these beams and, above, one for the copies.
        assert len(taken) == (kind in LOOPED)
    zeros = module.initial_state(memory, beams=beams)
    torch.testing.assert_close(module(x, memory, zeros), module(x, memory))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_states_are_selected_by_sequence(kind: str, cell: str) -> None:
    """As a beam search does: the rows of every tensor, whichever the module."""
    module, beams = decoder(kind, cell, 2), 2
    x, memory, hidden = draw(B * beams, 2, cell == "lstm", torch.float32)
    rows = torch.tensor([1, 1, 2, 3, 5, 4])  # within each memory's beams
    prepared = module.attention.prepare(memory)

    def select(part: Any) -> Any:
        if isinstance(part, DecoderState):
            return DecoderState(*map(select, part))
        return part.index_select(0, rows) if isinstance(part, Tensor) else part

    state = module.initial_state(prepared, hidden, beams)
    for t in range(2):
        _, state, _ = module.step(x[:, t], state, prepared)
        assert all(tensor.shape[0] == B * beams for tensor in tensors_of(state))
        assert (state.cell is None) == (cell == "gru")
    expected = module.step(x[:, 2], state, prepared, need_weights=True)
    found = module.step(x[rows, 2], select(state), prepared, need_weights=True)
    for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
        torch.testing.assert_close(ours, theirs[rows])


def test_the_state_of_an_encoder() -> None:
    encoder, module = nn.LSTM(I, H, 2, batch_first=True), decoder(layers=2)
    source, x = torch.randn(B, TK, I), torch.randn(B, T, I)
    memory, (h, c) = encoder(source)
    state = module.initial_state(memory, (h, c))
    assert torch.equal(state.hidden, h.transpose(0, 1)) and torch.equal(state.cell, c.transpose(0, 1))
    assert state.context.shape == (B, M) and not state.context.any() and state.attention is None
    torch.testing.assert_close(module(x, memory, state), module(x, memory, (h, c)))
    only_h = module.initial_state(memory, (h, None))
    assert torch.equal(only_h.hidden, state.hidden) and only_h.cell is not None and not only_h.cell.any()
    module(x, memory, (h, c))[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


# Options of the layers


@needs_loop
@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("lstm", {"layer_norm": True}),
        ("gru", {"layer_norm": True}),
        ("lstm", {"peephole": True}),
        ("lstm", {"residual": True}),
        ("gru", {"zoneout": 0.3}),
        ("rnn_tanh", {"zoneout": 0.3}),
    ],
)
def test_options_run_step_by_step(cell: str, options: dict[str, Any]) -> None:
    """Of the mean alone the contexts are known beforehand, and so are the layers' inputs."""
    module = decoder("mean", cell, 2, **options).eval()
    x, memory, _ = draw(dtype=torch.float32)
    mean = memory.mean(1, keepdim=True).expand(-1, T, -1)
    fed = torch.cat([torch.zeros(B, 1, M), mean[:, 1:]], 1)
    y = module.rnn(torch.cat([x, fed], -1).transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(module(x, memory)[0], torch.cat([y, mean], -1))
    with loops() as taken:
        decoder("additive", cell, 2, **options).eval()(x, memory)
    assert not taken


@needs_loop
@pytest.mark.parametrize("options", [{"reset_after": False}, {"bias": False}, {"dropout": 0.5}])
def test_options_of_the_loop(options: dict[str, Any]) -> None:
    cell = "gru_reset_before" if options.pop("reset_after", None) is False else "gru"
    module = decoder("additive", cell, 2, **options).eval()
    inputs = draw(layers=2, lstm=False, dtype=torch.float32)
    exact = copy.deepcopy(module).double()
    with loops() as taken:
        found = module(*inputs)
    assert taken == [f"decoder loop, 2 x {cell} of 6, 3x4 steps, float32"]
    expected = exact(*(tensor.double() for tensor in inputs))
    torch.testing.assert_close(tensors_of(found), [tensor.float() for tensor in tensors_of(expected)])


def test_the_forget_bias_is_an_initial_value() -> None:
    module = AttentionDecoder("lstm", I, H, DotAttention(), forget_bias=1.0)
    assert (module.rnn.bias_ih_l0.chunk(4)[1] == 1).all()
    with loops() as taken:
        module(torch.randn(B, T, I), torch.randn(B, TK, M))
    assert len(taken) == (native.load() is not None)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("input_feeding", [True, False])
def test_dropout_between_the_layers(input_feeding: bool, backend: str) -> None:
    """The second layer hands on what it sees, and the first one's outputs are positive."""
    module = AttentionDecoder(
        "rnn", I, H, DotAttention(), 2, input_feeding, dropout=0.3, backend=backend, nonlinearity="relu"
    )
    with torch.no_grad():
        for name in ("weight_hh_l1", "bias_ih_l1", "bias_hh_l1", "weight_hh_l0", "weight_ih_l0"):
            getattr(module.rnn, name).zero_()
        module.rnn.weight_ih_l1.copy_(torch.eye(H))
        module.rnn.bias_ih_l0.fill_(2.0)
        module.rnn.bias_hh_l0.zero_()
    x, memory = torch.randn(40, 30, I), torch.randn(40, TK, M)
    torch.manual_seed(3)
    with loops() as taken:
        output, state, _ = module(x, memory)
    assert len(taken) == (native.load() is not None and input_feeding and backend == "auto")
    y = output[..., :H]
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], torch.full_like(y[~dropped], 2 / 0.7))
    # Standard deviations: 0.0054 of all 7200, of each step 0.03, of each unit 0.013.
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert (dropped.float().mean((0, 2)) - 0.3).abs().max() < 0.12
    assert (dropped.float().mean((0, 1)) - 0.3).abs().max() < 0.05
    assert not torch.equal(dropped[:, 0], dropped[:, 1])
    assert (state.hidden[:, 0] == 2).all() and torch.equal(state.hidden[:, 1], y[:, -1])
    torch.manual_seed(3)
    assert torch.equal(module(x, memory)[0], output)
    assert not torch.equal(module(x, memory)[0], output)
    assert (module.eval()(x, memory)[0][..., :H] == 2).all()


@needs_loop
def test_gradients_under_dropout() -> None:
    """By differences, of the same masks."""
    module = decoder("additive", "lstm", 3, dropout=0.4)
    x, memory, hidden = draw(layers=3, dtype=torch.float32)
    direction = torch.randn_like(memory)

    def loss(memory: Tensor) -> Tensor:
        torch.manual_seed(5)
        return module(x, memory, hidden)[0].square().mean()

    (gradient,) = torch.autograd.grad(loss(memory), memory)
    difference = (loss(memory + 1e-2 * direction) - loss(memory - 1e-2 * direction)) / 2e-2
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-2, atol=1e-4)


# A module among others


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_copies_pickles_and_state_dicts(kind: str) -> None:
    module = decoder(kind, "gru", 2)
    x, memory, _ = draw(dtype=torch.float32)
    expected, state, _ = module(x, memory)
    fresh = decoder(kind, "gru", 2)
    assert not torch.equal(fresh(x, memory)[0], expected)
    fresh.load_state_dict(module.state_dict())
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x, memory)[0], expected) and repr(other) == repr(module)
    torch.testing.assert_close(pickle.loads(pickle.dumps(state)), state)
    names = [f"rnn.{name}" for name, _ in nn.GRU(I + M, H, 2).named_parameters()]
    assert list(module.state_dict()) == names + [f"attention.{name}" for name in module.attention.state_dict()]
    assert "input_size=2, input_feeding=True, attend='after'" in repr(module)


@needs_loop
def test_weights_are_seen_as_they_are() -> None:
    module = decoder()
    x, memory, hidden = draw(dtype=torch.float32)
    before = module(x, memory, hidden)[0]
    nn.utils.parametrizations.weight_norm(module.rnn, "weight_hh_l0")
    nn.utils.parametrizations.weight_norm(module.attention, "query_weight")
    torch.testing.assert_close(module(x, memory, hidden)[0], before)
    with torch.no_grad():
        module.rnn.parametrizations.weight_hh_l0.original0.mul_(2)
        module.attention.v.mul_(3)
    expected = copy.deepcopy(module).double()(x.double(), memory.double(), tuple(h.double() for h in hidden))[0]
    with loops() as taken:
        torch.testing.assert_close(module(x, memory, hidden)[0], expected.float())
    assert len(taken) == 1
    replaced = {name: torch.zeros_like(value) for name, value in module.named_parameters() if "bias" in name}
    found = torch.func.functional_call(module, replaced, (x, memory, hidden))[0]
    assert not torch.allclose(found, expected.float())


@pytest.mark.parametrize(
    ("kind", "layers", "options"),
    [
        ("dot", 1, {}),
        ("general", 3, {}),
        ("additive", 2, {"attend": "before"}),
        ("normalised", 1, {"input_feeding": False}),
        ("positional", 1, {}),
        ("coverage", 1, {"layer_norm": True}),
    ],
)
def test_compiled_whole(kind: str, layers: int, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    module = decoder(kind, "lstm", layers, **options)
    x, memory, hidden = draw(layers=layers, dtype=torch.float32)
    x = x.detach()[:, :2].requires_grad_()

    def program(x: Tensor, memory: Tensor, hidden: Any) -> tuple[Any, ...]:
        output, state, weights = module(x, memory, hidden, lengths=LENGTHS, need_weights=True)
        last = module.step(x[:, 0], state, module.attention.prepare(memory, LENGTHS))
        return output, weights, state.context, last[0]

    found = torch.compile(program, fullgraph=True, backend="aot_eager")(x, memory, hidden)
    expected = program(x, memory, hidden)
    torch.testing.assert_close(found, expected)
    leaves = [x, memory, *hidden, *module.parameters()]
    loss = torch.stack([out.square().sum() for out in found]).sum()
    ours = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
    loss = torch.stack([out.square().sum() for out in expected]).sum()
    theirs = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["dot", "general", "additive", "coverage"])
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    module = decoder(kind)
    x, memory, hidden = draw(dtype=torch.float32)
    with torch.autocast("cpu", dtype), loops() as taken:
        output, state, _ = module(x, memory, hidden)
        assert output.dtype is dtype
        carried = module(x, memory, state)[0]
    assert not taken
    leaves = [x, memory, *hidden, *module.parameters()]
    expected, state, _ = module(x, memory, hidden)
    found, wanted = gradients(output, leaves), gradients(expected, leaves)
    assert all(gradient.dtype is torch.float32 for gradient in found)
    flat = [torch.cat([gradient.flatten() for gradient in every]) for every in (found, wanted)]
    for result, exact in ((output, expected), (carried, module(x, memory, state)[0]), flat):
        assert (result - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@needs_loop
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    module = decoder("additive", "gru", 2).to(dtype)
    x, memory, hidden = draw(layers=2, lstm=False, dtype=dtype)
    with loops() as taken:
        result = module(x, memory, hidden, need_weights=True)
    assert len(taken) == (dtype is not torch.float64)
    assert all(tensor.dtype is dtype for tensor in tensors_of(result))
    exact = copy.deepcopy(module).double()(x.double(), memory.double(), hidden.double(), need_weights=True)
    for ours, theirs in zip(tensors_of(result), tensors_of(exact), strict=True):
        assert (ours - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize("kind", ["dot", "additive", "location"])
def test_derivatives_of_both_orders(kind: str, attend: str) -> None:
    module = decoder(kind, "gru", attend=attend).double()
    x, memory, hidden = draw(lstm=False)
    parameters = dict(module.named_parameters())

    def run(x: Tensor, memory: Tensor, hidden: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(parameters, given))
        result = torch.func.functional_call(
            module, found, (x, memory, hidden), {"lengths": LENGTHS, "need_weights": True}
        )
        return tuple(tensors_of(result))

    inputs = (x[:, :2].detach().requires_grad_(), memory, hidden, *parameters.values())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@needs_loop
@pytest.mark.parametrize("attend", ["after", "before"])
def test_double_backward_through_the_loop(attend: str) -> None:
    def penalty(module: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, memory, *hidden = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors_of(inputs))
        output = module(x, memory, tuple(hidden), lengths=LENGTHS)[0]
        leaves = [x, memory, *hidden, *module.parameters()]
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)

    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        module, inputs = decoder("additive", "lstm", 2, attend=attend), draw(layers=2, dtype=torch.float32)
        torchs, exact = copy.deepcopy(module), copy.deepcopy(module).double()
        torchs.rnn.backend = torchs.attention.backend = "reference"
        with loops() as taken:
            ours = penalty(module, inputs, torch.float32)
        assert len(taken) == 1
        draws.append((ours, penalty(torchs, inputs, torch.float32), penalty(exact, inputs, torch.float64)))
    assert_as_accurate_over(draws)


@pytest.mark.parametrize("kind", ["general", "additive", "cumulative"])
def test_gradients_per_sample_and_forward_mode(kind: str) -> None:
    module = decoder(kind, "gru")
    x, memory = (tensor.detach() for tensor in draw(lstm=False, dtype=torch.float32)[:2])
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, x: Tensor, memory: Tensor) -> Tensor:
        output, state, _ = torch.func.functional_call(module, parameters, (x, memory))
        return output.square().sum() + state.hidden.sum()

    per_sample = torch.vmap(torch.func.grad(loss, (0, 1)), (None, 0, 0))(parameters, x[:, None], memory[:, None])
    for b in range(B):
        single = x[b : b + 1].clone().requires_grad_()
        expected = torch.autograd.grad(loss(parameters, single, memory[b : b + 1]), [single, *parameters.values()])
        found = (per_sample[1][b], *(gradient[b] for gradient in per_sample[0].values()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(memory)
    _, along = torch.func.jvp(lambda m: loss(parameters, x, m), (memory,), (direction,))
    (gradient,) = torch.autograd.grad(loss(parameters, x, memory.requires_grad_()), memory)
    torch.testing.assert_close(along, (gradient * direction).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("attend", ["after", "before"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_nothing_to_do(kind: str, attend: str, input_feeding: bool) -> None:
    module = decoder(kind, attend=attend, input_feeding=input_feeding)
    for batch, steps, places in ((0, T, TK), (B, 0, TK), (B, T, 0), (0, 0, TK)):
        x, memory = torch.randn(batch, steps, I, requires_grad=True), torch.randn(batch, places, M)
        before = module.initial_state(memory)
        output, state, weights = module(x, memory, before, need_weights=True)
        assert output.shape == (batch, steps, H + M) and weights.shape == (batch, steps, places)
        assert state.hidden.shape == state.cell.shape == (batch, 1, H) and state.context.shape == (batch, M)
        if steps == 0:
            assert state is before
        elif places == 0:
            assert not output[..., H:].any() and output[..., :H].any()
            output.sum().backward()
            assert x.grad is not None and x.grad.any()


# Errors

X, MEMORY = torch.zeros(4, 3, I), torch.zeros(2, TK, M)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cell": "LSTM"}, ValueError, r"cell must be one of 'lstm', 'gru', 'rnn', got 'LSTM'"),
        ({"attend": "during"}, ValueError, r"attend must be 'after' or 'before', got 'during'"),
        ({"attention": SelfAttention(H)}, TypeError, r"attention must be a module of .* a memory, got SelfAttention"),
        ({"attention": nn.Linear(2, 2)}, TypeError, r"attention must be a module of fastrnn.nn .*, got Linear"),
        ({"attention": GeneralAttention(5, M)}, ValueError, r"queries of hidden_size 6, got query_size 5"),
        ({"attention": GeneralAttention(H, 4), "memory_size": 5}, ValueError, r"memory_size must be .*'s 4, got 5"),
        ({"input_feeding": 1}, TypeError, r"input_feeding must be a bool, got int"),
        ({"recurrent_dropout": 0.1}, ValueError, r"recurrent_dropout needs input_feeding=False"),
        ({"weight_dropout": 0.1}, ValueError, r"weight_dropout needs input_feeding=False"),
        ({"batch_first": True}, ValueError, r"batch_first does not go with a decoder"),
        ({"bidirectional": True}, ValueError, r"bidirectional does not go with a decoder"),
        ({"proj_size": 2}, ValueError, r"proj_size does not go with a decoder"),
        ({"cell": "lstm", "return_cell_states": True}, ValueError, r"return_cell_states does not go with a decoder"),
        ({"backend": "gpu"}, ValueError, r"backend must be one of .* got 'gpu'"),
        ({"zoneout": 2}, ValueError, r"zoneout must be a probability"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        AttentionDecoder(**{"cell": "gru", "input_size": I, "hidden_size": H, "attention": DotAttention(), **options})


@pytest.mark.parametrize("input_feeding", [True, False])
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"input": [1.0]}, TypeError, r"input must be a torch.Tensor, got list"),
        ({"input": X[0, 0]}, ValueError, r"input must have [23] dimensions, the last of size 2, got shape \(2,\)"),
        ({"input": X[..., :1]}, ValueError, r"input must have [23] dimensions, .*, got shape \(4, .*1\)"),
        ({"input": X[:3]}, ValueError, r"input must have a batch that is a multiple of the memory's 2, got 3"),
        ({"memory": None}, TypeError, r"memory must be a torch.Tensor or a PreparedMemory, got NoneType"),
        ({"memory": MEMORY[0]}, ValueError, r"memory must have 3 dimensions, got shape \(5, 6\)"),
        ({"memory": MEMORY[..., 1:]}, ValueError, r"memory must have vectors of size 6, got shape \(2, 5, 5\)"),
        ({"lengths": [1, 2]}, TypeError, r"lengths must be a torch.Tensor, got list"),
        ({"lengths": torch.tensor([6, 0])}, ValueError, r"lengths must lie in 0..5, got values in 0..6"),
        ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths must be int64 or int32 of shape \(2,\)"),
        ({"mask": [True]}, TypeError, r"mask must be a torch.Tensor, got list"),
        (
            {"mask": MEMORY[..., 0]},
            ValueError,
            r"mask must be torch.bool of shape \(2, 5\), got torch.float32 \(2, 5\)",
        ),
        ({"mask": X.bool()}, ValueError, r"mask must be torch.bool of shape \(2, 5\), got torch.bool \(4, 3, 2\)"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_bad_calls(kind: str, given: dict[str, Any], error: type[Exception], text: str, input_feeding: bool) -> None:
    module = decoder(kind, input_feeding=input_feeding)
    state = module.initial_state(MEMORY, beams=2)
    given = {"input": X, "memory": MEMORY, **given}
    x, memory = given.pop("input"), given.pop("memory")
    with pytest.raises(error, match=text):
        module(x, memory, **given)
    with pytest.raises(error, match=text):
        module.step(x[:, 0] if isinstance(x, Tensor) and x.dim() == 3 else x, state, memory, **given)
    if memory is MEMORY:
        with pytest.raises(error, match=text):
            module(x, module.attention.prepare(memory), **given)


@torch.no_grad()  # With gradients sequences that share a memory are never in a loop.
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bad_states(cell: str) -> None:
    module = decoder(cell=cell, layers=2)
    good = module.initial_state(MEMORY, beams=2)
    zeros = torch.zeros
    bad = [
        ({"hidden": zeros(1, 2, H)}, r"state must have hidden of shape \(4, 2, 6\), got \(1, 2, 6\)"),
        ({"hidden": zeros(4, 1, H)}, r"state must have hidden of shape \(4, 2, 6\), got \(4, 1, 6\)"),
        ({"context": zeros(1, M)}, r"state must have context of shape \(4, 6\), got \(1, 6\)"),
        ({"context": zeros(4, M + 1)}, r"state must have context of shape \(4, 6\), got \(4, 7\)"),
        ({"attention": zeros(4, TK)}, r"state must be None, AdditiveAttention has none, got Tensor"),
    ]
    if cell == "lstm":
        bad.append(({"cell": None}, r"state must have cell of shape \(4, 2, 6\), got None"))
        bad.append(({"cell": zeros(4, 2, 1)}, r"state must have cell of shape \(4, 2, 6\), got \(4, 2, 1\)"))
    else:
        bad.append(({"cell": zeros(4, 2, H)}, r"state must have cell None, got \(4, 2, 6\)"))
    for changed, text in bad:
        with pytest.raises(ValueError, match=text):
            module(X, MEMORY, good._replace(**changed))
        with pytest.raises(ValueError, match=text):
            module.step(X[:, 0], good._replace(**changed), MEMORY)
    with pytest.raises(TypeError, match=r"state must be a DecoderState, as initial_state gives, got NoneType"):
        module.step(X[:, 0], None, MEMORY)
    wrong = zeros(2, 3, H)
    for hidden, error, text in (
        ((wrong, wrong) if cell == "lstm" else wrong, ValueError, r"h_0 must have shape \(2, 4, 6\), got \(2, 3, 6\)"),
        ((zeros(2, 4, H), wrong), ValueError, r"c_0 must have shape \(2, 4, 6\), got \(2, 3, 6\)"),
        ((wrong,), ValueError, r"hidden must hold h_0 and c_0, got 1 tensors"),
        (wrong, TypeError, r"hidden must hold h_0 and c_0, got Tensor"),
        ([1, 2], TypeError, r"h_0 must be a torch.Tensor, got "),
    )[: None if cell == "lstm" else 1]:
        for call in (lambda h: module(X, MEMORY, h), lambda h: module.initial_state(MEMORY, h, 2)):
            with pytest.raises(error, match=text):
                call(hidden)
    if cell == "gru":
        with pytest.raises(TypeError, match=r"h_0 must be a torch.Tensor, got tuple"):
            module(X, MEMORY, (zeros(2, 4, H),))
    with pytest.raises(TypeError, match=r"memory must be a torch.Tensor or a PreparedMemory, got int"):
        module.initial_state(3)


@torch.no_grad()
def test_what_does_not_fit_is_told_before_the_loop() -> None:
    """Sizes that the kernels would take as they come."""
    additive, other = decoder(), AdditiveAttention(H, M, 3)
    with pytest.raises(ValueError, match=r"query must have vectors of the keys' size 3, got shape \(2, 1, 7\)"):
        additive(X, other.prepare(MEMORY))
    with pytest.raises(ValueError, match=r"memory must be prepared by this module, got a PreparedMemory whose keys"):
        additive(X, DotAttention().prepare(MEMORY))
    prepared = additive.attention.prepare(MEMORY)
    with pytest.raises(ValueError, match=r"lengths must lie in 0..5, got values in 1..50"):
        additive(X, prepared._replace(lengths=torch.tensor([50, 1])))
    with pytest.raises(ValueError, match=r"values must have shape \(2, 5, 6\), got \(2, 4, 6\)"):
        additive(X, prepared._replace(memory=MEMORY[:, 1:]))
    lengths = torch.tensor([3, 1])
    short = additive(X, prepared._replace(lengths=lengths.int()))
    torch.testing.assert_close(short, additive(X, MEMORY, lengths=lengths))
    dot = AttentionDecoder("gru", I, H, DotAttention(), memory_size=8)
    with pytest.raises(ValueError, match=r"query must have vectors of the keys' size 8, got shape \(.*6\)"):
        dot(X, torch.zeros(2, TK, 8))
    x, memory = torch.randn(4, 3, I), torch.randn(2, TK, M)
    dot = decoder("dot")
    torch.testing.assert_close(dot(x, other.prepare(memory)), dot(x, PreparedMemory(memory)))


def test_a_memory_of_another_size_where_the_module_takes_any() -> None:
    module = AttentionDecoder("gru", I, H, MeanContext(), memory_size=8)
    assert module(X, torch.zeros(2, TK, 8))[0].shape == (4, 3, H + 8)


@needs_loop
def test_back_ends() -> None:
    x, memory, hidden = draw(lstm=False, dtype=torch.float32)
    expected = decoder("additive", "gru")
    for layers, attention, looped in (
        ("auto", "auto", 1),
        ("cpu", "auto", 1),
        ("auto", "cpu", 1),
        ("aten", "auto", 0),
        ("reference", "reference", 0),
        ("auto", "reference", 0),
    ):
        module = copy.deepcopy(expected)
        module.rnn.backend, module.attention.backend = layers, attention
        with loops() as taken:
            torch.testing.assert_close(module(x, memory, hidden), expected(x, memory, hidden))
        assert len(taken) == looped + 1
    module = decoder("additive", "gru", backend="cuda")
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' cannot compute this call"):
        module(x, memory, hidden)
    module = decoder("additive", "gru", backend="cpu").double()
    with pytest.raises(NotImplementedError, match=r"backend 'cpu' cannot compute this call: .*float64"):
        module(x.double(), memory.double(), hidden.double())


@needs_loop
def test_explain() -> None:
    class Model(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.decoder = decoder(kind, "gru", 2)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.decoder(x, memory)[0]

    x, memory, _ = draw(dtype=torch.float32)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        looped, stepwise = (fastrnn.explain(Model(kind), x, memory) for kind in ("additive", "coverage"))
    assert printed.getvalue() == f"{looped}\n{stepwise}\n"
    line = "decoder (AttentionDecoder): decoder loop, 2 x gru of 6, 3x4 steps, float32: cpu (backend='auto')"
    assert looped.startswith(line) and "decoder.rnn" not in looped and "decoder.attention" not in looped
    assert "decoder loop" not in stepwise
    assert "4 calls of decoder.rnn (GRU)" in stepwise and "4 calls of decoder.attention (Additive" in stepwise
