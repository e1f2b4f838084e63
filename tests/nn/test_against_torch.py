"""Layers and cells against torch.nn's with the same parameters: outputs, states and all gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils import _pytree

import fastrnn
from tests.accuracy import assert_as_accurate_over

FORMS = ("batched", "unbatched", "packed", "packed, unsorted")


def differentiated(module: torch.nn.Module, inputs: tuple[Any, Any], seed: int) -> tuple[Any, list[Tensor]]:
    """Outputs, and the gradients of a random combination of them in every input and parameter."""
    leaves = [leaf for leaf in _pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    leaves += list(module.parameters())
    outputs = module(*inputs)
    generator = torch.Generator().manual_seed(seed)
    floating = [o for o in _pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.is_floating_point()]
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in floating)
    return floating, list(torch.autograd.grad(loss, leaves))


def to_fp64(inputs: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.detach().double().requires_grad_()
        return leaf

    return _pytree.tree_map(convert, inputs)


def compare(
    make: Callable[[Any], torch.nn.Module], draw_inputs: Callable[[], tuple[Any, Any]], units: int, seed: int
) -> None:
    """`make` builds a module from fastrnn.nn or torch.nn, `draw_inputs` draws what it is called with.

    The fewer units there are, the more draws are taken together.
    """
    torch.manual_seed(seed)
    draws = []
    for draw in range(max(4, min(16, 128 // units))):
        state = torch.get_rng_state()
        ours = make(fastrnn.nn)
        torch.set_rng_state(state)
        theirs = make(torch.nn)
        inputs = draw_inputs()
        exact = copy.deepcopy(theirs).double(), to_fp64(inputs)
        draws.append(
            (
                differentiated(ours, inputs, draw),
                differentiated(theirs, inputs, draw),
                differentiated(*exact, draw),
            )
        )
    assert_as_accurate_over(draws)


def layer_inputs(
    input_size: int, features: tuple[int, ...], steps: int, batch: int, form: str, batch_first: bool, states: int
) -> tuple[Any, Any]:
    """`features` are the sizes of h0 and, for the LSTM, c0; `states` is the number of layers times directions or, for
    zero initial states, 0."""
    x = torch.randn(steps, input_size) if form == "unbatched" else torch.randn(steps, batch, input_size)
    if form.startswith("packed"):
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths = lengths if "unsorted" in form else lengths.sort(descending=True).values
        given = pack_padded_sequence(x, lengths, enforce_sorted="unsorted" not in form)
        given = PackedSequence(given.data.requires_grad_(), *given[1:])
    else:
        given = (x.transpose(0, 1).contiguous() if batch_first and form == "batched" else x).requires_grad_()
    if not states:
        return given, None
    middle = () if form == "unbatched" else (batch,)
    hx = tuple(torch.randn(states, *middle, size, requires_grad=True) for size in features)
    return given, hx if len(hx) == 2 else hx[0]


@settings(max_examples=50)  # each takes up to 16 draws
@given(
    kind=st.sampled_from(["tanh", "relu", "GRU", "LSTM"]),
    input_size=st.sampled_from([1, 2, 7, 16, 33]),
    hidden_size=st.sampled_from([1, 3, 8, 17, 40]),
    proj_size=st.sampled_from([0, 0, 0, 2, 5]),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    steps=st.sampled_from([1, 2, 7, 13]),
    batch=st.sampled_from([0, 1, 2, 5, 17]),
    form=st.sampled_from(FORMS),
    with_state=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_layers(
    kind: str,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    steps: int,
    batch: int,
    form: str,
    with_state: bool,
    training: bool,
    seed: int,
) -> None:
    assume(batch > 0 or not form.startswith("packed"))
    arguments: dict[str, Any] = {"nonlinearity": kind} if kind in ("tanh", "relu") else {}
    features: tuple[int, ...] = (hidden_size,)
    if kind == "LSTM":
        assume(proj_size < hidden_size)
        arguments["proj_size"] = proj_size
        features = (proj_size or hidden_size, hidden_size)

    def make(library: Any) -> torch.nn.Module:
        return getattr(library, "RNN" if arguments.get("nonlinearity") else kind)(
            input_size,
            hidden_size,
            num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            bias=bias,
            **arguments,
        ).train(training)

    states = num_layers * (1 + bidirectional) * with_state
    compare(
        make,
        lambda: layer_inputs(input_size, features, steps, batch, form, batch_first, states),
        hidden_size,
        seed,
    )


@settings(max_examples=50)
@given(
    kind=st.sampled_from(["tanh", "relu", "GRUCell", "LSTMCell"]),
    input_size=st.sampled_from([1, 2, 7, 33]),
    hidden_size=st.sampled_from([1, 3, 8, 17, 130]),
    bias=st.booleans(),
    batch=st.sampled_from([None, 0, 1, 2, 5, 17]),
    with_state=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_cells(
    kind: str, input_size: int, hidden_size: int, bias: bool, batch: int | None, with_state: bool, seed: int
) -> None:
    shape = () if batch is None else (batch,)

    def make(library: Any) -> torch.nn.Module:
        if kind in ("tanh", "relu"):
            return library.RNNCell(input_size, hidden_size, bias, nonlinearity=kind)
        return getattr(library, kind)(input_size, hidden_size, bias)

    def draw_inputs() -> tuple[Any, Any]:
        states = [torch.randn(*shape, hidden_size, requires_grad=True) for _ in range(2 if kind == "LSTMCell" else 1)]
        hx = (tuple(states) if len(states) == 2 else states[0]) if with_state else None
        return torch.randn(*shape, input_size, requires_grad=True), hx

    compare(make, draw_inputs, hidden_size, seed)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_dropout_drops_the_units_that_torch_drops(kind: str, batch_first: bool) -> None:
    arguments = {"num_layers": 3, "dropout": 0.5, "bidirectional": True, "batch_first": batch_first}
    ours, theirs = (getattr(library, kind)(6, 9, **arguments) for library in (fastrnn.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    packed = pack_padded_sequence(torch.randn(5, 4, 6), torch.tensor([2, 5, 3, 5]), enforce_sorted=False)
    for x in (torch.randn(5, 4, 6), torch.randn(5, 6), packed):
        found = []
        for module in (ours, theirs):
            torch.manual_seed(1)
            found.append(module(x))
        torch.testing.assert_close(*found)
        assert not torch.equal(ours(x)[0][0], found[0][0][0])  # The masks are random.


def message(function: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function()
    return type(caught.value), str(caught.value)


X, H = torch.zeros(5, 2, 3), torch.zeros(1, 2, 4)
LAYER_ERRORS: dict[str, tuple[Any, Any]] = {
    "no time step": (X[:0], None),
    "one dimension": (X[0, 0], None),
    "four dimensions": (X[None], None),
    "features": (X[..., :2], None),
    "dtype": (X.double(), None),
    "integers": (X.long(), None),
    "no tensor": ([1.0], None),
    "state of another batch": (X, H[:, :1]),
    "state of two layers": (X, H.repeat(2, 1, 1)),
    "state of another size": (X, H[..., :3]),
    "state without batch": (X, H[0]),
    "state with batch": (X[:, 0], H),
    "state of another dtype": (X, H.double()),
    "packed state of another batch": (pack_padded_sequence(X, torch.tensor([5, 2])), H[:, :1]),
    "packed features": (pack_padded_sequence(X[..., :2], torch.tensor([5, 2])), None),
}


@pytest.mark.parametrize("case", LAYER_ERRORS)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_errors_of_layers_are_torchs(kind: str, case: str) -> None:
    x, state = LAYER_ERRORS[case]
    hx = (state, state) if kind == "LSTM" and state is not None else state
    ours, theirs = getattr(fastrnn.nn, kind)(3, 4), getattr(torch.nn, kind)(3, 4)
    assert message(lambda: ours(x, hx)) == message(lambda: theirs(x, hx))


CELL_ERRORS: dict[str, tuple[Any, Any]] = {
    "features": (X[0, :, :2], None),
    "three dimensions": (X, None),
    "dtype": (X[0].double(), None),
    "no tensor": (None, None),
    "state of another batch": (X[0], H[0, :1]),
    "state of another size": (X[0], H[0, :, :3]),
    "state without batch": (X[0], H[0, 0]),
    "state with batch": (X[0, 0], H[0]),
    "state of three dimensions": (X[0], H),
    "state of another dtype": (X[0], H[0].double()),
}


@pytest.mark.parametrize("case", CELL_ERRORS)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_errors_of_cells_are_torchs(kind: str, case: str) -> None:
    x, state = CELL_ERRORS[case]
    hx = (state, state) if kind == "LSTMCell" and state is not None else state
    ours, theirs = getattr(fastrnn.nn, kind)(3, 4), getattr(torch.nn, kind)(3, 4)
    assert message(lambda: ours(x, hx)) == message(lambda: theirs(x, hx))


def test_lstm_state_of_wrong_length() -> None:
    for library in (fastrnn.nn, torch.nn):
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            library.LSTM(3, 4)(X, (H, H, H))
        with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
            library.LSTMCell(3, 4)(X[0], (H[0], H[0], H[0]))


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_hidden_size_0(kind: str) -> None:
    found = [getattr(library, kind)(3, 0)(X[0]) for library in (fastrnn.nn, torch.nn)]
    torch.testing.assert_close(*found)


def test_constructor_errors_are_torchs() -> None:
    for kind, arguments in (
        ("RNN", {"nonlinearity": "sigmoid"}),
        ("GRU", {"proj_size": 2}),
        ("LSTM", {"proj_size": 4}),
        ("LSTM", {"dropout": 2}),
        ("LSTM", {"unknown": 1}),
        ("GRUCell", {"nonlinearity": "tanh"}),
    ):
        ours, theirs = getattr(fastrnn.nn, kind), getattr(torch.nn, kind)
        assert message(lambda: ours(3, 4, **arguments)) == message(lambda: theirs(3, 4, **arguments))  # noqa: B023
