"""Layers and cells against torch.nn's with the same parameters: outputs, states and all gradients."""

import copy
from collections.abc import Callable
from typing import Any

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
    for draw in range(max(4, min(32, 256 // units))):
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


@settings(max_examples=30)  # each takes up to 32 draws
@given(
    kind=st.sampled_from(["tanh", "relu", "GRU", "LSTM"]),
    input_size=st.sampled_from([1, 2, 7, 16, 33]),
    hidden_size=st.sampled_from([1, 3, 8, 17, 40]),
    proj_size=st.sampled_from([0, 0, 0, 2, 5]),
    num_layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    steps=st.sampled_from([1, 2, 7, 20]),
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
