"""The operator attention: results and gradients of the CPU's kernels, its contract and errors, its place in torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrnn import backends, reference
from fastrnn.ops import attention, key_factors
from tests.accuracy import assert_as_accurate_over
from tests.ops.case import LIBRARY, using_isa

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiled extension")
needs_isa = pytest.mark.usefixtures("isa")


SCORES = ("dot", "scaled_dot", "general", "additive", "location")
SEEN = ("all", "lengths", "mask", "mask_per_query", "causal")


@dataclass(frozen=True)
class OperatorCase:
    """A call as users make it, with beams and projections, but for its numbers, which `draw` gives."""

    score: str = "dot"
    memories: int = 2
    beams: int = 1  # batches of queries that share a memory
    queries: int = 3
    keys: int = 5
    size: int = 7
    value_size: int | None = 6  # None: the values are the keys
    channels: int = 3
    normalize: str = "softmax"
    seen: str = "all"
    factors: bool = False
    spread: float = 1.0  # of what tanh is taken of
    strided: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "-".join(
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        )

    def draw(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], tuple[Tensor, Tensor]]:
        """Tensors, options, and gradients of context and weights."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = (scale * torch.randn(shape, generator=generator)).to(self.dtype)
            return torch.stack([drawn, drawn], -1)[..., 0] if self.strided else drawn

        batch = self.memories * self.beams
        queries = self.keys if self.seen == "causal" else self.queries
        additive = self.score in ("additive", "location")
        spread = self.spread if additive else 1.0
        tensors = {
            "query": normal(batch, queries, self.size, scale=spread),
            "keys": normal(self.memories, self.keys, self.size, scale=spread),
        }
        if self.value_size is not None:
            tensors["values"] = normal(self.memories, self.keys, self.value_size)
        if self.score == "general":
            tensors["weight"] = normal(self.size, self.size, scale=self.size**-0.5)
        if additive:
            tensors["v"] = normal(self.size, scale=self.size**-0.5)
        if self.score == "location":
            tensors["features"] = normal(batch, queries, self.keys, self.channels)
            tensors["feature_weight"] = normal(self.size, self.channels, scale=spread)
        options: dict[str, Any] = {"score": self.score, "normalize": self.normalize}
        # Not by the seed, so that all draws leave out the same keys.
        where = torch.Generator().manual_seed(1)
        if self.seen == "lengths":
            options["lengths"] = torch.randint(0, self.keys + 1, (self.memories,), generator=where)
        elif self.seen == "mask":
            options["mask"] = torch.rand(self.memories, self.keys, generator=where) < 0.6
        elif self.seen == "mask_per_query":
            options["mask"] = torch.rand(batch, queries, self.keys, generator=where) < 0.6
        elif self.seen == "causal":
            options["causal"] = True
        width = self.size if self.value_size is None else self.value_size
        return tensors, options, (normal(batch, queries, width), normal(batch, queries, self.keys))

    def run(self, backend: str, dtype: torch.dtype | None = None, seed: int = 0) -> dict[str, Tensor]:
        """Context, weights and the gradients of all tensors, in this dtype, of the same numbers."""
        tensors, options, gradients = self.draw(seed)
        dtype = dtype or self.dtype
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        if self.factors and dtype is not torch.float64:
            options["factors"] = key_factors(leaves["keys"])
        results = attention(**leaves, **options, backend=backend)
        torch.autograd.backward(results, [gradient.to(dtype) for gradient in gradients])
        found = {"context": results[0].detach(), "weights": results[1].detach()}
        return found | {name: leaf.grad for name, leaf in leaves.items()}


def assert_accurate(case: OperatorCase, backend: str, draws: int = 5) -> None:
    """The back end's results and gradients against fp64, by the error that the reference has in the same dtype."""
    assert_as_accurate_over(
        [
            (case.run(backend, seed=seed), case.run("reference", seed=seed), case.run("reference", torch.float64, seed))
            for seed in range(draws)
        ]
    )


@st.composite
def operator_cases(draw: Any) -> OperatorCase:
    score = draw(st.sampled_from(SCORES))
    seen = draw(st.sampled_from(SEEN))
    return OperatorCase(
        score,
        memories=draw(st.integers(1, 5)),
        beams=1 if seen == "causal" else draw(st.integers(1, 3)),
        queries=draw(st.integers(1, 9)),
        keys=draw(st.integers(1, 40)),
        size=draw(st.integers(1, 40)),
        value_size=draw(st.one_of(st.none(), st.integers(1, 40))),
        channels=draw(st.integers(1, 5)),
        normalize=draw(st.sampled_from(("softmax", "length"))),
        seen=seen,
        factors=score == "additive" and draw(st.booleans()),
        spread=draw(st.sampled_from((0.1, 1.0, 30.0))),
        strided=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
    )


def additive(memories: int, queries: int, keys: int, size: int, value_size: int, **tensors: Any) -> dict[str, Any]:
    drawn = {
        "query": torch.randn(memories, queries, size),
        "keys": torch.randn(memories, keys, size),
        "values": torch.randn(memories, keys, value_size),
        "v": torch.randn(size) / size**0.5,
    }
    return {**drawn, "score": "additive", "backend": "cpu", **tensors}


# Results and gradients


@needs_isa
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("normalize", ["softmax", "length"])
@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, normalize: str, seen: str) -> None:
    assert_accurate(OperatorCase(score, normalize=normalize, seen=seen, keys=19, size=21, value_size=37), "cpu")


@needs_isa
@pytest.mark.parametrize(
    "case",
    [
        OperatorCase(memories=1, queries=1, keys=1, size=1, value_size=1),
        OperatorCase(memories=3, beams=5, queries=1, keys=129, size=129, value_size=None),
        OperatorCase("additive", memories=1, queries=1, keys=129, size=33),
        OperatorCase("additive", memories=1, queries=7, keys=129, size=33, factors=True, seen="lengths"),
        OperatorCase("additive", beams=3, queries=2, keys=7, size=129, value_size=None, strided=True),
        OperatorCase("additive", queries=9, keys=33, size=64, value_size=130, spread=0.1),
        OperatorCase("additive", queries=9, keys=33, size=64, value_size=130, spread=30.0, factors=True),
        OperatorCase("additive", queries=9, keys=33, size=64, spread=100.0, seen="mask_per_query"),
        OperatorCase("location", memories=3, beams=2, queries=1, keys=65, size=40, channels=32, value_size=None),
        OperatorCase("location", memories=1, queries=1, keys=7, size=7, channels=1, spread=30.0),
    ],
    ids=str,
)
def test_shapes_and_spreads(case: OperatorCase) -> None:
    assert_accurate(case, "cpu")


@settings(max_examples=60)
@given(operator_cases())
def test_drawn(case: OperatorCase) -> None:
    for isa in LIBRARY.cpu_isas():
        with using_isa(isa):
            assert_accurate(case, "cpu", draws=8)


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_long_memories(score: str) -> None:
    assert_accurate(OperatorCase(score, memories=1, queries=2, keys=4096, size=64, value_size=64), "cpu", draws=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_sixteen_bits(score: str, dtype: torch.dtype) -> None:
    case = OperatorCase(score, keys=33, size=40, dtype=dtype)
    assert_accurate(case, "cpu")
    context, weights = attention(*(case.draw()[0][name] for name in ("query", "keys", "values")), backend="cpu")
    assert context.dtype == dtype and weights is not None and weights.dtype == dtype


@needs_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits_is_read(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1, 1)
    nothing = torch.zeros_like(values).nan_to_num()
    context = attention(nothing, nothing, values, backend="cpu")[0]
    assert torch.equal(context.nan_to_num(7.0), values.nan_to_num(7.0))
    assert torch.equal(context.isnan(), values.isnan()) and torch.equal(context.isinf(), values.isinf())


def test_factors_out_of_range() -> None:
    keys = torch.tensor([[[-60.0, 0.5], [50.0, 1.0], [29.0, 0.0]]])
    query = torch.tensor([[[60.1, 0.2], [-30.0, 0.1], [-49.5, 3.0]]])
    v = torch.tensor([1.0, 0.5])
    assert key_factors(keys).isnan().tolist() == [[[True, False], [True, False], [False, False]]]
    exact = reference.attention(query.double(), keys.double(), keys.double(), v.double())[1]
    for factors in (None, key_factors(keys)):
        weights = attention(query, keys, score="additive", v=v, factors=factors, backend="cpu")[1]
        torch.testing.assert_close(weights, exact.float(), rtol=1e-6, atol=1e-7)


def test_infinite_and_nan_keys_that_are_seen_reach_the_result() -> None:
    arguments = additive(1, 2, 3, 4, 5)
    arguments["keys"][0, 1, 2] = torch.nan
    for factors in (None, key_factors(arguments["keys"])):
        assert attention(**arguments, factors=factors)[0].isnan().all()
    arguments["keys"][0, 1, 2] = torch.inf  # tanh is 1
    context = attention(**arguments, factors=key_factors(arguments["keys"]))[0]
    expected = reference.attention(*(arguments[name].double() for name in ("query", "keys", "values", "v")))[0]
    torch.testing.assert_close(context, expected.float())


def test_minus_infinite_scores_have_no_weight() -> None:
    keys = torch.tensor([[[1.0], [-torch.inf], [2.0]]])
    weights = attention(torch.ones(1, 1, 1), keys, torch.randn(1, 3, 4), backend="cpu")[1]
    assert weights is not None and weights[0, 0, 1] == 0 and weights.sum() == 1


# What is not seen


@needs_isa
@pytest.mark.parametrize("seen", ["lengths", "mask"])
@pytest.mark.parametrize("score", SCORES)
def test_hidden_nan_does_not_leak(score: str, seen: str) -> None:
    case = OperatorCase(score, seen=seen, keys=21, size=17)
    tensors, options, gradients = case.draw()
    hidden = ~reference.attended_keys(1, tensors["keys"], options.get("lengths"), _expanded(options.get("mask")))[:, 0]
    results = []
    for filling in (0.0, torch.nan):
        leaves = {name: tensor.clone() for name, tensor in tensors.items()}
        for name in ("keys", "values"):
            leaves[name][hidden] = filling
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        outputs = attention(**leaves, **options, backend="cpu")
        torch.autograd.backward(outputs, gradients)
        results.append([*outputs, *(leaf.grad for leaf in leaves.values())])
    for clean, filled in zip(*results, strict=True):
        assert torch.equal(clean, filled) and not filled.isnan().any()
    assert (results[1][3][hidden] == 0).all() and (results[1][4][hidden] == 0).all()


@pytest.mark.parametrize("score", ["dot", "additive"])
def test_nan_that_one_query_sees_leaves_the_others_alone(score: str) -> None:
    tensors, options, gradients = OperatorCase(score, memories=1, queries=3, keys=20).draw()
    mask = torch.ones(1, 3, 20, dtype=torch.bool)
    mask[0, 1:, 4] = False
    for name in ("keys", "values"):
        tensors[name][0, 4] = torch.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    context, _ = attention(**leaves, **options, mask=mask, backend="cpu")
    assert context[0, 0].isnan().all() and not context[0, 1:].isnan().any()
    torch.autograd.backward(context[0, 1:], gradients[0][0, 1:])
    query = leaves["query"].grad
    assert query is not None and not query[0, 1:].isnan().any()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalize", ["softmax", "length"])
def test_queries_that_see_nothing(score: str, normalize: str) -> None:
    tensors, options, gradients = OperatorCase(score, normalize=normalize).draw()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    outputs = attention(**leaves, **options, lengths=torch.tensor([0, 5]), backend="cpu")
    torch.autograd.backward(outputs, gradients)
    assert not outputs[0][0].any() and not outputs[1][0].any() and outputs[0][1].all()
    for name in ("query", "keys", "values"):
        gradient = leaves[name].grad
        assert gradient is not None and not gradient[0].any() and gradient[1].any()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_at_all(shape: tuple[int, int, int]) -> None:
    memories, queries, keys = shape
    leaves = [torch.randn(memories, n, 6).requires_grad_() for n in (queries, keys)]
    context, weights = attention(*leaves)
    assert weights is not None
    assert context.shape == (memories, queries, 6) and weights.shape == shape and not context.any()
    context.sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def _expanded(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.unsqueeze(1)


# The contract


# The projection of "general" is torch's matrix product, whose result depends on the number of rows.
@needs_isa
@pytest.mark.parametrize(
    ("score", "factors"),
    [("dot", False), ("scaled_dot", False), ("additive", False), ("additive", True), ("location", False)],
)
def test_repeatable_and_independent_of_the_batch(score: str, factors: bool) -> None:
    case = OperatorCase(score, memories=7, queries=5, keys=37, size=100, value_size=70, seen="lengths", factors=factors)
    first, second = case.run("cpu"), case.run("cpu")
    assert all(torch.equal(first[name], second[name]) for name in first)
    tensors, options, _ = case.draw()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for b in range(case.memories):
            alone = {name: t[b : b + 1] if t.dim() > 2 else t for name, t in tensors.items()}
            if factors:
                alone["factors"] = key_factors(alone["keys"])
            rest = {**options, "lengths": options["lengths"][b : b + 1]}
            context, weights = attention(**alone, **rest, backend="cpu")
            assert torch.equal(context[0], first["context"][b])
            assert weights is not None and torch.equal(weights[0], first["weights"][b])


@pytest.mark.parametrize("score", SCORES)
def test_beams_share_a_memory(score: str) -> None:
    case = OperatorCase(score, memories=3, beams=4, keys=20, seen="lengths")
    tensors, options, gradients = case.draw()
    shared = case.run("cpu")
    tiled = {
        name: tensor.repeat_interleave(4, 0) if name in ("keys", "values") else tensor
        for name, tensor in tensors.items()
    }
    leaves = {name: tensor.requires_grad_() for name, tensor in tiled.items()}
    options["lengths"] = options["lengths"].repeat_interleave(4, 0)
    outputs = attention(**leaves, **options, backend="cpu")
    torch.autograd.backward(outputs, gradients)
    assert torch.equal(outputs[0], shared["context"])
    for name, leaf in leaves.items():
        gradient = leaf.grad
        assert gradient is not None
        if name in ("keys", "values"):
            gradient = gradient.unflatten(0, (3, 4)).sum(1)
        torch.testing.assert_close(gradient, shared[name], rtol=1e-4, atol=1e-5)


def test_single_queries_have_no_dimension() -> None:
    query, keys = torch.randn(6, 8), torch.randn(3, 5, 8)
    context, weights = attention(query, keys, mask=torch.rand(6, 1, 5) < 0.8)
    assert weights is not None and context.shape == (6, 8) and weights.shape == (6, 5)
    both = attention(query.unsqueeze(1), keys)
    assert torch.equal(attention(query, keys)[0], both[0].squeeze(1))
    assert attention(query, keys, need_weights=False)[1] is None


def test_memory_of_additive_training() -> None:
    """Under 20 MB beyond inputs, results and gradients; the [B, Tq, Tk, D] tensor alone would take 82."""
    program = """
import resource, torch
from fastrnn.ops import attention
torch.set_num_threads(2)
def train(batch, queries, keys, size):
    leaves = [torch.randn(batch, n, size).requires_grad_() for n in (queries, keys, keys)]
    v = torch.randn(size, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    context, weights = attention(*leaves, score="additive", v=v, backend="cpu")
    context.sum().backward()
    known = sum(t.numel() * 4 for t in (context, weights, v, *leaves))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024 - known
train(1, 2, 3, 4)
print(train(16, 50, 50, 512))
"""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0  # in kilobytes on Linux
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20e6


# Inside torch


@pytest.mark.parametrize("score", SCORES)
def test_double_backward(score: str) -> None:
    tensors, options, _ = OperatorCase(score, memories=1, queries=2, keys=3, size=2, value_size=2).draw()
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def second(backend: str, *given: Tensor) -> list[Tensor]:
        outputs = attention(**dict(zip(tensors, given)), **options, backend=backend)
        first = torch.autograd.grad([o.square().sum() for o in outputs], given, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), given))

    for ours, expected in zip(second("cpu", *leaves), second("reference", *leaves), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("score", SCORES)
def test_double_backward_where_an_input_depends_on_another(score: str) -> None:
    """The keys are made of the values, as those of additive attention are."""

    def both(backend: str, dtype: torch.dtype, seed: int) -> list[Tensor]:
        tensors, options, gradients = OperatorCase(score, size=6, queries=2).draw(seed)
        leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
        keys = torch.tanh(leaves["keys"] * leaves["values"])
        outputs = attention(**leaves | {"keys": keys}, **options, backend=backend)
        first = torch.autograd.grad(outputs, list(leaves.values()), [g.to(dtype) for g in gradients], create_graph=True)
        loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return [*first, *torch.autograd.grad(loss, list(leaves.values()))]

    backends_and_dtypes = (("cpu", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    draws = [[both(*given, seed) for given in backends_and_dtypes] for seed in range(4)]
    assert_as_accurate_over([(ours, torchs, exact) for ours, torchs, exact in draws])


def test_double_backward_of_the_values_alone() -> None:
    """On which the weights do not depend."""
    query, keys, values = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6, requires_grad=True)
    context, weights = attention(query, keys, values, backend="cpu")
    assert weights is not None
    (gradient,) = torch.autograd.grad(weights.sum() + context.sum(), values, create_graph=True)
    torch.testing.assert_close(gradient, weights.sum(1)[..., None].expand(2, 5, 6))
    assert torch.autograd.grad(weights.sum(), values, create_graph=True, allow_unused=True) == (None,)


@pytest.mark.parametrize("score", SCORES)
def test_gradcheck_of_the_reference(score: str) -> None:
    tensors, options, _ = OperatorCase(score, memories=1, queries=2, keys=3, size=2, value_size=2).draw()
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(lambda *given: attention(**dict(zip(tensors, given)), **options), leaves)


@pytest.mark.parametrize("score", SCORES)
def test_compiled(score: str) -> None:
    case = OperatorCase(score, seen="lengths")
    tensors, options, gradients = case.draw()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    compiled = torch.compile(lambda **given: attention(**given, **options), fullgraph=True, backend="aot_eager")
    outputs = compiled(**leaves)
    torch.autograd.backward(outputs, gradients)
    eager = case.run("cpu")
    assert torch.equal(outputs[0], eager["context"]) and torch.equal(outputs[1], eager["weights"])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, eager[name])


@pytest.mark.parametrize("case", [OperatorCase("dot", value_size=None), OperatorCase("location")], ids=str)
def test_opcheck(case: OperatorCase) -> None:
    tensors, _, gradients = case.draw()
    names = ("query", "keys", "values", "v", "features", "feature_weight")
    inputs = [tensors.get(name) for name in names]
    options = (None, torch.tensor([3, 5]), None)
    scalars = (False, 1.0, "softmax")
    torch.library.opcheck(torch.ops.fastrnn.attention_forward, ("cpu", *inputs, *options, *scalars))
    weights = torch.ops.fastrnn.attention_forward("cpu", *inputs, *options, *scalars)[1]
    needs = [tensor is not None for tensor in inputs]
    arguments = ("cpu", *gradients, *inputs, *options, weights, *scalars, needs)
    torch.library.opcheck(torch.ops.fastrnn.attention_backward, arguments)


def test_transforms_run_on_the_reference() -> None:
    query, keys = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 5, 8)
    mapped = torch.vmap(lambda q, k: attention(q, k)[0])(query, keys)
    torch.testing.assert_close(mapped, torch.stack([attention(q, k)[0] for q, k in zip(query, keys)]))
    tangent = torch.randn_like(query[0])
    _, moved = torch.func.jvp(lambda q: attention(q, keys[0])[0], (query[0],), (tangent,))
    step = 1e-3
    difference = attention(query[0] + step * tangent, keys[0])[0] - attention(query[0] - step * tangent, keys[0])[0]
    torch.testing.assert_close(moved, difference / (2 * step), rtol=1e-2, atol=1e-3)


def test_autocast() -> None:
    query, keys = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        context, _ = attention(query, keys, backend="cpu")
    assert context.dtype == torch.bfloat16
    expected = attention(query.bfloat16(), keys.bfloat16(), backend="cpu")[0]
    assert torch.equal(context, expected)
    context.sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32


def test_torchs_operator_computes_the_same() -> None:
    query, keys, values = torch.randn(3, 7, 16), torch.randn(3, 7, 16), torch.randn(3, 7, 16)
    for options in ({"score": "dot"}, {"score": "scaled_dot", "causal": True}):
        ours = attention(query, keys, values, need_weights=False, backend="cpu", **options)[0]
        torchs = attention(query, keys, values, need_weights=False, backend="aten", **options)[0]
        torch.testing.assert_close(ours, torchs)


def test_choice_and_its_reasons() -> None:
    query, keys = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with backends.recorded_choices() as choices:
        attention(query, keys)
    text = str(choices[0])
    assert text.startswith("attention, inner product, 2x3 queries of 8 on 5 keys float32: cpu (backend='auto')")
    assert "not cuda: it has no kernels for attention" in text
    assert "not aten: torch's operator does not return the weights" in text
    with pytest.raises(NotImplementedError, match="float64; the kernels are for"):
        attention(query.double(), keys.double(), backend="cpu")
    with pytest.raises(NotImplementedError, match=r"no additive score.*lets NaN in masked values through"):
        attention(query, keys, score="additive", v=keys[0, 0], lengths=torch.tensor([1, 2]), backend="aten")


# Errors

Q, K = torch.zeros(4, 3, 8), torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score": "cosine"}, ValueError, "score must be one of 'dot', .*, got 'cosine'"),
        ({"score": "additive"}, ValueError, "v must be given with score 'additive', got None"),
        ({"v": Q[0, 0]}, ValueError, "v does not belong to score 'dot'"),
        ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"keys": K.long()}, TypeError, "keys must have a floating dtype, got torch.int64"),
        ({"query": Q[0, 0]}, ValueError, r"query must have 2 or 3 dimensions, got shape \(8,\)"),
        ({"keys": K[0]}, ValueError, r"keys must have 3 dimensions, got shape \(5, 8\)"),
        ({"values": K.double()}, ValueError, "values must have the dtype of query, torch.float32, got torch.float64"),
        ({"values": K.to("meta")}, ValueError, "values must be on the device of query, cpu, got meta"),
        ({"query": Q[:3]}, ValueError, "query must have a batch that is a multiple of the keys' 2, got 3"),
        ({"query": Q[..., 1:]}, ValueError, r"query must have vectors of the keys' size 8, got shape \(4, 3, 7\)"),
        ({"values": K[:, 1:]}, ValueError, r"values must have shape \(2, 5, 8\), got \(2, 4, 8\)"),
        ({"score": "additive", "v": Q[0, 0, 1:]}, ValueError, r"v must have shape \(8,\), got \(7,\)"),
        (
            {"score": "general", "weight": torch.zeros(8, 7)},
            ValueError,
            r"weight must have shape \(8, 8\), got \(8, 7\)",
        ),
        (
            {"score": "location", "v": Q[0, 0], "features": torch.zeros(4, 3, 4, 2), "feature_weight": K[0, :, :2]},
            ValueError,
            r"features must have shape \(4, 3, 5, 2\), got \(4, 3, 4, 2\)",
        ),
        (
            {"score": "additive", "v": Q[0, 0], "factors": K.double()},
            ValueError,
            "factors must be torch.float32, got torch.float64",
        ),
        ({"score": "additive", "v": Q[0, 0], "scale": 2.0}, ValueError, "scale is for inner products"),
        ({"normalize": "max"}, ValueError, "normalize must be one of 'softmax', 'length', got 'max'"),
        ({"lengths": torch.tensor([1, 6])}, ValueError, r"lengths must lie in 0..5, got values in 1..6"),
        ({"lengths": torch.tensor([-1, 2])}, ValueError, r"lengths must lie in 0..5, got values in -1..2"),
        ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths must be int64 or int32 of shape \(2,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, ValueError, "lengths must be int64 or int32"),
        ({"lengths": [1, 2]}, TypeError, "lengths must be a torch.Tensor, got list"),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask must be torch.bool of shape \(2, 5\) or \(4, 3, 5\), got torch.bool \(2, 4\)",
        ),
        ({"mask": torch.ones(2, 5)}, ValueError, r"mask must be torch.bool .*, got torch.float32 \(2, 5\)"),
        ({"mask": True}, TypeError, "mask must be a torch.Tensor, got bool"),
        ({"causal": True}, ValueError, "causal needs as many queries as keys"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**{"query": Q, "keys": K, **arguments})
