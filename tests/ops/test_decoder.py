"""The loop of an attention decoder on the CPU: results and gradients, its contract, its place in torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends.decoder import DecoderCall
from fastrnn.ops import key_factors
from fastrnn.ops.decoder import run_loop
from tests.accuracy import assert_as_accurate_over
from tests.ops.case import LAYOUTS, LIBRARY, poison_scratch

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")
needs_isa = pytest.mark.usefixtures("isa")

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu")
SCORES = ("additive", "additive_unprojected", "general", "dot")
OUTPUTS = ("h", "contexts", "weights", "h_n", "c_n")
INPUTS = ("x", "h0", "c0", "context0", "query_weight", "keys", "values", "v")
OF_LAYERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class DecoderCase:
    """One loop but for its numbers, which `draw` gives."""

    cell: str = "lstm"
    score: str = "additive"
    layers: int = 1
    steps: int = 4
    memories: int = 3
    inputs: int = 4
    hidden: int = 6
    keys: int = 5
    size: int = 7  # of queries and keys, where the queries are projected
    value_size: int | None = None  # None: the values are the keys
    beams: int = 1
    factors: bool = False
    seen: str = "all"
    normalize: str = "softmax"
    dropout: bool = False
    biases: tuple[str, ...] = ("bias_ih", "bias_hh")
    layout: str = "contiguous"
    outputs: tuple[str, ...] = OUTPUTS  # that have a gradient
    needs: tuple[str, ...] | None = None  # inputs whose gradients are wanted; None: all
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(
            f"{field.name}={getattr(self, field.name)}".replace(" ", "")
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )

    def draw(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
        """Tensors that have gradients, the rest of the call, and gradients of the outputs."""
        generator = torch.Generator().manual_seed(seed)
        lay_out = LAYOUTS[self.layout]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return lay_out((scale * torch.randn(shape, generator=generator)).to(self.dtype))

        def uniform(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(self.hidden)
            return lay_out(((2 * torch.rand(shape, generator=generator) - 1) * bound).to(self.dtype))

        batch, hidden, rows = self.memories * self.beams, self.hidden, reference.CELLS[self.plain_cell].gates
        projected = self.score in ("additive", "general")
        size = self.size if projected else hidden
        width = size if self.value_size is None else self.value_size
        states = (self.layers, batch, hidden)
        tensors = {"x": normal(self.steps, batch, self.inputs), "h0": normal(*states, scale=0.5)}
        if self.cell == "lstm":
            tensors["c0"] = normal(*states)
        tensors["context0"] = normal(batch, width)
        if projected:
            tensors["query_weight"] = uniform(size, hidden)
        tensors["keys"] = normal(self.memories, self.keys, size)
        if self.value_size is not None:
            tensors["values"] = normal(self.memories, self.keys, width)
        if self.score.startswith("additive"):
            tensors["v"] = normal(size, scale=size**-0.5)
        for layer in range(self.layers):
            tensors[f"weight_ih_l{layer}"] = uniform(rows * hidden, hidden if layer else self.inputs + width)
            tensors[f"weight_hh_l{layer}"] = uniform(rows * hidden, hidden)
            for name in self.biases:
                tensors[f"{name}_l{layer}"] = uniform(rows * hidden)
        options: dict[str, Any] = {"normalize": self.normalize}
        if not self.score.startswith("additive"):
            options["scale"] = size**-0.5
        if self.dropout:
            kept = torch.rand(self.layers - 1, self.steps, batch, hidden, generator=generator) < 0.7
            options["dropout_mask"] = lay_out((kept / 0.7).to(self.dtype))
        # Not by the seed, so that all draws leave out the same keys.
        where = torch.Generator().manual_seed(1)
        if self.seen in ("lengths", "both"):
            options["lengths"] = torch.randint(0, self.keys + 1, (self.memories,), generator=where)
            options["lengths"][-1] = 0
            options["lengths"] = lay_out(options["lengths"])
        if self.seen in ("mask", "both"):
            options["mask"] = torch.rand(self.memories, 1, self.keys, generator=where) < 0.6
            options["mask"][0] = False
            options["mask"] = lay_out(options["mask"])
        gradients = {
            "h": normal(self.steps, batch, hidden),
            "contexts": normal(self.steps, batch, width),
            "weights": normal(batch, self.steps, self.keys),
            "h_n": normal(*states),
        }
        if self.cell == "lstm":
            gradients["c_n"] = normal(*states)
        return tensors, options, {name: gradient for name, gradient in gradients.items() if name in self.outputs}

    @property
    def plain_cell(self) -> str:
        return self.cell.removesuffix("_reset_before")

    def call(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> DecoderCall:
        layers = [tuple(tensors.get(f"{name}_l{layer}") for name in OF_LAYERS) for layer in range(self.layers)]
        given = {name: tensors.get(name) for name in INPUTS}
        factors = key_factors(tensors["keys"].detach()) if self.factors else None
        return DecoderCall(self.cell, layers=layers, factors=factors, **given, **options)  # type: ignore[arg-type]

    def run(self, backend: str, dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Outputs and gradients, of the same numbers in this dtype. No gradients where beams share a memory."""
        tensors, options, gradients = self.draw(seed)
        needs = tuple(tensors) if self.needs is None else self.needs
        tensors = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
        leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in tensors.items()}
        if "dropout_mask" in options and dtype is not None:
            options["dropout_mask"] = options["dropout_mask"].to(dtype)
        case = replace(self, factors=self.factors and backend == "cpu")
        if backend == "cpu":
            poison_scratch()
        if self.beams > 1:
            with torch.no_grad():
                return named(run_loop(case.call(leaves, options), backend))
        outputs = named(run_loop(case.call(leaves, options), backend))
        return {
            **{name: output.detach() for name, output in outputs.items()},
            **gradients_of(outputs, gradients, {name: leaf for name, leaf in leaves.items() if name in needs}),
        }


def named(results: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {name: result for name, result in zip(OUTPUTS, results, strict=True) if result is not None}


def gradients_of(
    outputs: dict[str, Tensor], gradients: dict[str, Tensor], leaves: dict[str, Tensor], retain: bool = False
) -> dict[str, Tensor]:
    """By the names of the inputs, with a "d" in front; zeros where an output does not depend on an input."""
    given = [name for name in gradients if outputs[name].requires_grad]
    found = torch.autograd.grad(
        [outputs[name] for name in given],
        list(leaves.values()),
        [gradients[name].to(outputs[name].dtype) for name in given],
        allow_unused=True,
        retain_graph=retain,
    )
    return {
        f"d{name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def assert_accurate(case: DecoderCase, draws: int = 5) -> None:
    """Results and gradients against fp64, by the error that the reference has in the same dtype."""
    assert_as_accurate_over(
        [
            (case.run("cpu", seed=seed), case.run("reference", seed=seed), case.run("reference", torch.float64, seed))
            for seed in range(draws)
        ]
    )


# Results and gradients


@needs_isa
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("score", SCORES)
def test_cells_and_scores(cell: str, score: str) -> None:
    assert_accurate(DecoderCase(cell, score, layers=2, dropout=True, hidden=17, size=19, seen="lengths"))


@needs_isa
@pytest.mark.parametrize(
    "case",
    [
        DecoderCase(memories=1, steps=1, inputs=1, hidden=1, keys=1, size=1),
        DecoderCase("gru", "dot", memories=1, steps=1, inputs=1, hidden=1, keys=1),
        DecoderCase(memories=7, steps=7, inputs=7, hidden=129, keys=7, size=33, value_size=65),
        DecoderCase("gru", "general", memories=2, steps=7, hidden=33, keys=129, size=129, value_size=1),
        DecoderCase("rnn_tanh", "dot", memories=129, steps=3, hidden=7, keys=3, value_size=7),
        DecoderCase("lstm", layers=3, steps=40, memories=2, hidden=16, dropout=True, factors=True),
        DecoderCase("gru_reset_before", layers=3, steps=40, hidden=9, value_size=12),
    ],
    ids=str,
)
def test_shapes(case: DecoderCase) -> None:
    assert_accurate(case)


@pytest.mark.parametrize("steps", [1, 7, 40])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("score", SCORES)
def test_layers_and_steps(score: str, layers: int, steps: int) -> None:
    cell = CELLS[(layers + steps) % len(CELLS)]
    assert_accurate(DecoderCase(cell, score, layers, steps, hidden=15, value_size=9), 3 if steps == 40 else 5)


@pytest.mark.parametrize("seen", ["all", "lengths", "mask", "both"])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("value_size", [None, 9])
def test_additive_scores(value_size: int | None, factors: bool, seen: str) -> None:
    assert_accurate(DecoderCase(keys=21, size=17, value_size=value_size, factors=factors, seen=seen))


@pytest.mark.parametrize("seen", ["lengths", "mask", "both"])
@pytest.mark.parametrize("normalize", ["softmax", "length"])
@pytest.mark.parametrize("score", ["general", "dot"])
def test_inner_products(score: str, normalize: str, seen: str) -> None:
    assert_accurate(DecoderCase("gru", score, keys=21, hidden=9, value_size=5, seen=seen, normalize=normalize))


@pytest.mark.parametrize("biases", [(), ("bias_ih",), ("bias_hh",)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_biases(cell: str, biases: tuple[str, ...]) -> None:
    assert_accurate(DecoderCase(cell, layers=2, biases=biases))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(
    ("cell", "output"), [*(("lstm", output) for output in OUTPUTS), *(("gru", output) for output in OUTPUTS[:-1])]
)
def test_gradient_of_one_output(cell: str, output: str, steps: int) -> None:
    assert_accurate(DecoderCase(cell, layers=2, steps=steps, value_size=5, outputs=(output,)), draws=8)


@pytest.mark.parametrize(
    "needs",
    [(name,) for name in (*INPUTS, *(f"{name}_l{layer}" for name in OF_LAYERS for layer in (0, 1)))],
    ids="+".join,
)
def test_gradients_of_one_input(needs: tuple[str]) -> None:
    score = "additive" if needs == ("v",) else "general"
    case = DecoderCase(score=score, layers=2, value_size=5, needs=needs)
    everything = replace(case, needs=None).run("cpu")
    found = case.run("cpu")
    assert [name for name in found if name not in OUTPUTS] == [f"d{name}" for name in needs]
    for name, tensor in found.items():
        assert torch.equal(tensor, everything[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sixteen_bits(cell: str, score: str, dtype: torch.dtype) -> None:
    case = DecoderCase(cell, score, layers=2, hidden=16, dropout=True, dtype=dtype)
    assert_accurate(case)
    assert all(tensor.dtype is dtype for tensor in case.run("cpu").values())


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_layouts(score: str, layout: str) -> None:
    case = DecoderCase("lstm", score, layers=3, dropout=True, value_size=5, seen="both", layout=layout)
    assert_accurate(replace(case, factors=score == "additive"), draws=8)


@needs_isa
@pytest.mark.parametrize("seen", ["all", "lengths", "mask"])
@pytest.mark.parametrize("score", SCORES)
def test_beams_share_a_memory(score: str, seen: str) -> None:
    case = DecoderCase("gru", score, layers=2, steps=7, beams=3, hidden=16, value_size=9, seen=seen)
    assert_accurate(case)
    # Without factors the kernels compute their own where a memory has several queries.
    case = replace(case, factors=score.startswith("additive"))
    tensors, options, _ = case.draw()
    for name in ("keys", "values"):
        tensors[name] = tensors[name].repeat_interleave(3, 0)
    for name in options.keys() & {"lengths", "mask"}:
        options[name] = options[name].repeat_interleave(3, 0)
    with torch.no_grad():
        tiled = named(run_loop(case.call(tensors, options), "cpu"))
    for name, shared in case.run("cpu").items():
        assert torch.equal(shared, tiled[name]), name


# The contract


@needs_isa
@pytest.mark.parametrize("seen", ["lengths", "mask"])
@pytest.mark.parametrize("score", SCORES)
def test_hidden_nan_does_not_leak(score: str, seen: str) -> None:
    case = DecoderCase(score=score, layers=2, keys=21, size=17, value_size=9, seen=seen)
    tensors, options, gradients = case.draw()
    hidden = ~reference.attended_keys(1, tensors["keys"], options.get("lengths"), options.get("mask"))[:, 0]
    assert hidden.any() and not hidden.all()
    found = []
    for factors in (False, True) if score.startswith("additive") else (False,):
        for filling in (0.0, math.nan):
            leaves = {name: tensor.clone() for name, tensor in tensors.items()}
            for name in ("keys", "values"):
                leaves[name][hidden] = filling
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
            outputs = named(run_loop(replace(case, factors=factors).call(leaves, options), "cpu"))
            found.append({**outputs, **gradients_of(outputs, gradients, leaves)})
        clean, filled = found[-2:]
        for name in clean:
            assert torch.equal(clean[name], filled[name]) and not filled[name].isnan().any(), name
        assert not filled["dkeys"][hidden].any() and not filled["dvalues"][hidden].any()


@needs_isa
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_repeatable(cell: str, score: str) -> None:
    case = DecoderCase(cell, score, 2, 7, memories=9, hidden=65, keys=37, seen="lengths", dropout=True)
    first, second = case.run("cpu"), case.run("cpu")
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_isa
@pytest.mark.parametrize(
    ("score", "factors"), [*((score, False) for score in SCORES), *((score, True) for score in SCORES[:2])]
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sequences_are_independent_of_each_other_and_of_threads(cell: str, score: str, factors: bool) -> None:
    case = DecoderCase(
        cell, score, 2, 5, memories=9, hidden=65, keys=37, size=33, value_size=40, factors=factors, dropout=True
    )
    case = replace(case, seen="lengths")
    together = case.run("cpu")
    tensors, options, _ = case.draw()
    dimension = {"x": 1, "h0": 1, "c0": 1, "context0": 0, "keys": 0, "values": 0, "lengths": 0, "dropout_mask": 2}
    of_outputs = {"h": 1, "contexts": 1, "weights": 0, "h_n": 1, "c_n": 1}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in ([3], [1, 7], list(range(9))):
            some, rest = (
                {
                    name: given.index_select(dimension[name], torch.tensor(rows)) if name in dimension else given
                    for name, given in whole.items()
                }
                for whole in (tensors, options)
            )
            with torch.no_grad():
                found = named(run_loop(case.call(some, rest), "cpu"))
            for name, output in found.items():
                expected = together[name].index_select(of_outputs[name], torch.tensor(rows))
                assert torch.equal(output, expected), (name, threads, rows)


def test_gradients_are_independent_of_the_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(DecoderCase(layers=2, steps=7, memories=9, hidden=65, keys=37, value_size=40).run("cpu"))
    for name, expected in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-5, atol=1e-5)


def test_inputs_and_results_are_left_alone() -> None:
    case = DecoderCase(layers=2, value_size=5, factors=True, dropout=True, seen="both")
    tensors, options, gradients = case.draw()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    call = case.call(leaves, options)
    given = [*leaves.values(), call.factors, call.lengths, call.mask, call.dropout_mask, *gradients.values()]
    before = [tensor.detach().clone() for tensor in given]  # type: ignore[union-attr]
    outputs = named(run_loop(call, "cpu"))
    results = [output.detach().clone() for output in outputs.values()]
    gradients_of(outputs, gradients, leaves)
    for tensor, value in zip([*given, *outputs.values()], [*before, *results], strict=True):
        assert torch.equal(tensor, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice(cell: str) -> None:
    case = DecoderCase(cell, layers=2, value_size=5, dropout=True)
    tensors, options, gradients = case.draw()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = named(run_loop(case.call(leaves, options), "cpu"))
    first = gradients_of(outputs, gradients, leaves, retain=True)
    # What is done in place to the results, which are the caller's, does not reach the backward pass.
    with torch.no_grad():
        for output in outputs.values():
            output.data.fill_(math.nan)
    second = gradients_of(outputs, gradients, leaves)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# Inside torch


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell: str, score: str) -> None:
    case = DecoderCase(cell, score, layers=2, steps=3, value_size=3, seen="lengths", dropout=True)

    def second(backend: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        tensors, options, _ = case.draw(seed)
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        options["dropout_mask"] = options["dropout_mask"].to(dtype)
        outputs = named(run_loop(case.call(leaves, options), backend))
        loss = torch.stack([output.square().sum() for output in outputs.values()]).sum()
        first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        assert all(gradient.any() for gradient in found)
        return dict(zip(leaves, found, strict=True))

    draws = []
    for seed in range(4):
        small = (second(backend, torch.float32, seed) for backend in ("cpu", "reference"))
        draws.append((*small, second("reference", torch.float64, seed)))
    assert_as_accurate_over(draws)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_double_backward_where_an_input_depends_on_another(cell: str) -> None:
    """The keys are made of the values, as in additive attention, and a second call starts where the first ended."""
    case = DecoderCase(cell, layers=2, steps=2, size=5, value_size=5)

    def both(backend: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
        tensors, options, _ = case.draw(seed)
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        made = {**leaves, "keys": torch.tanh(leaves["keys"] * leaves["values"])}
        first = named(run_loop(case.call(made, options), backend))
        made |= {"h0": first["h_n"], "context0": first["contexts"][-1]}
        if cell == "lstm":
            made["c0"] = first["c_n"]
        outputs = named(run_loop(case.call(made, options), backend))
        loss = torch.stack([output.square().sum() for output in outputs.values()]).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        loss = torch.stack([gradient.square().sum() for gradient in found]).sum()
        return [*found, *torch.autograd.grad(loss, list(leaves.values()))]

    backends = (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    draws = [[both(*given, seed) for given in backends] for seed in range(5)]
    assert_as_accurate_over([(ours, torchs, exact) for ours, torchs, exact in draws])


def test_double_backward_where_a_result_does_not_depend_on_what_is_differentiated() -> None:
    case = DecoderCase(steps=1, value_size=5, needs=("values",))
    tensors, options, gradients = case.draw()
    values = tensors["values"].requires_grad_()
    outputs = named(run_loop(case.call(tensors, options), "cpu"))
    loss = sum((outputs[name] * gradient).sum() for name, gradient in gradients.items())
    (found,) = torch.autograd.grad(loss, values, create_graph=True)
    torch.testing.assert_close(found, case.run("cpu")["dvalues"])


@pytest.mark.parametrize(
    "case",
    [
        DecoderCase(layers=2, value_size=5, factors=True, seen="both", dropout=True),
        DecoderCase("gru", "dot", seen="lengths", needs=("x", "keys")),
        DecoderCase("gru_reset_before", "general", 3, dtype=torch.bfloat16),
        DecoderCase("rnn_relu", steps=1, memories=1, biases=()),
    ],
    ids=str,
)
def test_compiled(case: DecoderCase) -> None:
    torch._dynamo.reset()
    tensors, options, gradients = case.draw()
    needs = case.needs or tuple(tensors)
    leaves = {name: tensor.requires_grad_(name in needs) for name, tensor in tensors.items()}
    factors = key_factors(leaves["keys"].detach()) if case.factors else None

    def program(leaves: dict[str, Tensor], factors: Tensor | None) -> tuple[Any, ...]:
        call = replace(case, factors=False).call(leaves, options)
        call.factors = factors
        return run_loop(call, "cpu")

    outputs = named(torch.compile(program, fullgraph=True, backend="aot_eager")(leaves, factors))
    found = {**outputs, **gradients_of(outputs, gradients, {name: leaves[name] for name in needs})}
    eager = case.run("cpu")
    assert found.keys() == eager.keys()
    for name in eager:
        assert torch.equal(found[name], eager[name]), name


@pytest.mark.parametrize(
    "case",
    [
        DecoderCase(layers=2, value_size=5, factors=True, seen="both", dropout=True),
        DecoderCase("gru", "dot", seen="lengths", outputs=("h",)),
        DecoderCase("rnn_tanh", "general", steps=1, memories=1, biases=(), outputs=("contexts", "h_n")),
        DecoderCase("lstm", layers=2, dtype=torch.bfloat16, value_size=3),
        DecoderCase("gru", beams=2),
    ],
    ids=str,
)
def test_opcheck(case: DecoderCase) -> None:
    tensors, options, gradients = case.draw()
    call = case.call(tensors, options)
    x, h0, c0, context0, *rest = call.inputs()[:8]
    weights = list(call.inputs()[8:])
    others = (call.factors, call.lengths, call.mask, call.dropout_mask, call.scale, call.normalize)
    for save in (False, True):
        arguments = (case.cell, x, h0, c0, context0, *rest, weights, *others, save)
        torch.library.opcheck(torch.ops.fastrnn.decoder_forward, arguments)
    if case.beams > 1:
        return  # no gradients
    outputs = torch.ops.fastrnn.decoder_forward(*arguments)
    given = [gradients.get(name) for name in OUTPUTS]
    for needs in (
        [tensor is not None for tensor in call.inputs()],
        [False, True] + [False] * len(weights) + [True] * 6,
    ):
        arguments = (*given, case.cell, x, h0, *rest, weights, *others, *outputs, needs)
        torch.library.opcheck(torch.ops.fastrnn.decoder_backward, arguments)
