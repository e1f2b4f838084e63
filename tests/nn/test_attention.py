"""The attention modules against their formulas, query by query; what they promise besides."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.nn import (
    AdditiveAttention,
    DotAttention,
    GeneralAttention,
    LocationAttention,
    MeanContext,
    PositionalAttention,
    PreparedMemory,
    SelfAttention,
)
from fastrnn.ops import key_factors
from tests.accuracy import assert_as_accurate_over

B, TQ, TK, DQ, DK, H = 3, 4, 5, 3, 3, 6
LENGTHS = torch.tensor([3, 5, 0])

MODULES: dict[str, Callable[..., nn.Module]] = {
    "mean": lambda **_: MeanContext(),
    "positional": lambda **options: PositionalAttention(9, 7, **options),
    "dot": lambda **_: DotAttention(),
    "scaled_dot": lambda **_: DotAttention(scaled=True),
    "length": lambda **_: DotAttention("length"),
    "general": lambda **options: GeneralAttention(DQ, DK, **options),
    "additive": lambda **options: AdditiveAttention(DQ, DK, H, **options),
    "normalised": lambda **options: AdditiveAttention(DQ, DK, H, True, **options),
    "coverage": lambda **options: AdditiveAttention(DQ, DK, H, coverage=True, **options),
    "location": lambda **options: LocationAttention(DQ, DK, H, 2, 3, **options),
    "cumulative": lambda **options: LocationAttention(DQ, DK, H, 2, 3, cumulative=True, **options),
}
ADDITIVE = ["additive", "normalised", "coverage", "location", "cumulative"]
STATEFUL = ["coverage", "location", "cumulative"]
KERNELS = [kind for kind in MODULES if kind not in ("mean", "positional")]
SELF: dict[str, Callable[..., SelfAttention]] = {
    "plain": lambda **_: SelfAttention(8, projections=False),
    "plain_causal": lambda **_: SelfAttention(8, projections=False, causal=True),
    "one_head": lambda **options: SelfAttention(8, **options),
    "heads": lambda **options: SelfAttention(8, 2, **options),
    "heads_causal": lambda **options: SelfAttention(8, 4, causal=True, **options),
}


def double(kind: str) -> nn.Module:
    """In fp64, its parameters far from where they start: biases of zero would hide what they do."""
    module = (MODULES | SELF)[kind](dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def randn(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def masks(given: str, batch: int) -> dict[str, Tensor]:
    found = {
        "mask": torch.rand(B, TK) < 0.6,
        "query_mask": torch.rand(batch, TQ, TK) < 0.5,
        "lengths": LENGTHS,
    }
    found["query_mask"][0, 1] = False
    names = {"none": [], "all": ["lengths", "query_mask"]}.get(given, [given])
    return {name.removeprefix("query_"): found[name] for name in names}


def seen_by(batch: int, lengths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """bool [N, Tq, Tk]."""
    seen = torch.ones(batch, TQ, TK, dtype=torch.bool)
    for n in range(batch):
        b = n // (batch // B)
        if lengths is not None:
            seen[n, :, lengths[b] :] = False
        if mask is not None:
            seen[n] &= mask[b] if mask.dim() == 2 else mask[n]
    return seen


# The formulas, one query and one place at a time.


def score(module: Any, query: Tensor, place: Tensor, feature: Tensor | None) -> Tensor:
    if isinstance(module, DotAttention):
        return (query * place).sum() / (math.sqrt(len(query)) if module.scaled else 1)
    if isinstance(module, GeneralAttention):
        return query @ module.weight @ place
    summed = module.query_weight @ query + module.memory_weight @ place
    v = module.v
    if module.bias is not None:
        summed = summed + module.bias
    if feature is not None:
        summed = summed + module.feature_weight @ feature
    if getattr(module, "g", None) is not None:
        v = module.g * v / v.square().sum().sqrt()
    return v @ torch.tanh(summed)


def feature_of(module: Any, previous: Tensor, total: Tensor, s: int) -> Tensor | None:
    if isinstance(module, LocationAttention):
        half = module.kernel_size // 2
        tracks = [previous, total] if module.cumulative else [previous]
        taps = range(max(0, s - half), min(TK, s + half + 1))
        parts = [module.conv_weight[:, c, j - s + half] * track[j] for c, track in enumerate(tracks) for j in taps]
        return torch.stack(parts).sum(0)
    return total[s : s + 1] if getattr(module, "coverage", False) else None


def oracle(module: Any, queries: Tensor, memory: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    contexts, all_weights = [], []
    for n in range(len(queries)):
        h = memory[n // (len(queries) // len(memory))]
        previous = total = torch.zeros(TK, dtype=torch.float64)
        for t in range(TQ):
            places = [s for s in range(TK) if seen[n, t, s]]
            weights = [torch.zeros((), dtype=torch.float64)] * TK
            context = torch.zeros(DK, dtype=torch.float64)
            if isinstance(module, MeanContext):
                found = [torch.tensor(1 / len(places), dtype=torch.float64) for _ in places]
            elif isinstance(module, PositionalAttention):
                found = [module.table[t, s] for s in places]
            else:
                found = [score(module, queries[n, t], h[s], feature_of(module, previous, total, s)) for s in places]
                if getattr(module, "normalize", "softmax") == "softmax":
                    found = [e.exp() / sum(other.exp() for other in found) for e in found]
                else:
                    found = [e / len(places) for e in found]
            for s, weight in zip(places, found, strict=True):
                weights[s] = weight
                context = context + weight * h[s]
            previous = torch.stack(weights)
            total = total + previous
            contexts.append(context)
            all_weights.append(previous)
    shape = (*queries.shape[:2], -1)
    return torch.stack(contexts).reshape(shape), torch.stack(all_weights).reshape(shape)


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], retain: bool = True) -> tuple[Tensor, ...]:
    """Of a sum with weights of every output; zeros where there is none."""
    same = torch.Generator().manual_seed(9)
    loss = sum((output * randn(*output.shape, generator=same).to(output.dtype)).sum() for output in outputs)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return tuple(map(torch.zeros_like, inputs))
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=retain)
    return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))


def drawn(batch: int = B) -> tuple[Tensor, Tensor]:
    return randn(batch, TQ, DQ).requires_grad_(), randn(B, TK, DK).requires_grad_()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("given", ["none", "lengths", "mask", "query_mask", "all"])
@pytest.mark.parametrize("kind", MODULES)
def test_the_formula_and_its_gradients(kind: str, given: str, beams: int) -> None:
    """Whatever the places that nobody sees hold: here NaN."""
    module = double(kind)
    options = masks(given, B * beams)
    query, memory = drawn(B * beams)
    seen = seen_by(B * beams, **options)
    with torch.no_grad():
        memory[~seen.reshape(B, -1, TK).any(1)] = math.nan
    inputs = [query, memory, *module.parameters()]
    expected = oracle(module, query, memory, seen)
    context, weights, _ = module(query, memory, **options)
    torch.testing.assert_close((context, weights), expected)
    torch.testing.assert_close(gradients((context, weights), inputs), gradients(expected, inputs))
    torch.testing.assert_close(gradients((context,), inputs), gradients(expected[:1], inputs))
    assert (context[~seen.any(-1)] == 0).all() and (weights[~seen] == 0).all()


@pytest.mark.parametrize("kind", MODULES)
def test_a_query_that_sees_nothing_gives_zero_gradients(kind: str) -> None:
    module = double(kind)
    query, memory = drawn()
    inputs = [query, memory, *module.parameters()]
    for options in ({"lengths": torch.zeros(B, dtype=torch.int64)}, {"mask": torch.zeros(B, TQ, TK).bool()}):
        context, weights, _ = module(query, memory, **options)
        assert (context == 0).all() and (weights == 0).all()
        assert all((gradient == 0).all() for gradient in gradients((context, weights), inputs))


@pytest.mark.parametrize("kind", MODULES)
def test_beams_that_share_a_memory_equal_copies_of_it(kind: str) -> None:
    module, beams = double(kind), 3
    query, memory = drawn(B * beams)
    tiled, lengths = memory.repeat_interleave(beams, 0), LENGTHS.repeat_interleave(beams)
    for prepared in (memory, module.prepare(memory, LENGTHS)):
        shared = module(query, prepared, lengths=LENGTHS)
        copied = module(query, tiled, lengths=lengths)
        torch.testing.assert_close(shared, copied)
        inputs = [query, memory, *module.parameters()]
        torch.testing.assert_close(gradients(shared[:2], inputs), gradients(copied[:2], inputs))


@pytest.mark.parametrize("kind", MODULES)
def test_a_prepared_memory_equals_the_memory(kind: str) -> None:
    module = double(kind)
    query, memory = drawn()
    with torch.no_grad():
        memory[0, LENGTHS[0] :] = math.nan
    inputs = [query, memory, *module.parameters()]
    prepared = module.prepare(memory, LENGTHS)
    assert prepared.memory is memory and torch.equal(prepared.lengths, LENGTHS)
    assert (prepared.keys is None) == (kind not in ADDITIVE) and prepared.factors is None
    found, expected = module(query, prepared), module(query, memory, lengths=LENGTHS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found[:2], inputs), gradients(expected[:2], inputs))
    shorter = torch.tensor([1, 2, 0])
    torch.testing.assert_close(module(query, prepared, lengths=shorter), module(query, memory, lengths=shorter))
    mask = torch.rand(B, TQ, TK) < 0.5
    torch.testing.assert_close(module(query, prepared, mask=mask), module(query, memory, lengths=LENGTHS, mask=mask))


def test_factors_are_prepared_where_kernels_take_them() -> None:
    memory = torch.randn(B, TK, DK, requires_grad=True)
    for kind in ADDITIVE:
        prepared = MODULES[kind]().prepare(memory)
        if kind in STATEFUL:
            assert prepared.factors is None
        else:
            assert torch.equal(prepared.factors, key_factors(prepared.keys)) and not prepared.factors.requires_grad
        assert prepared.keys.requires_grad
    for dtype in (torch.float64, torch.bfloat16):
        assert AdditiveAttention(DQ, DK, H, dtype=dtype).prepare(memory.to(dtype)).factors is None
    module = AdditiveAttention(DQ, DK, H)

    def transformed(memory: Tensor) -> Tensor:
        prepared = module.prepare(memory)
        assert prepared.factors is None
        return prepared.keys

    torch.testing.assert_close(torch.vmap(transformed)(memory.unsqueeze(1)).squeeze(1), module.prepare(memory).keys)


@pytest.mark.parametrize("kind", ["additive", "normalised"])
def test_prepared_float32_is_as_accurate_as_torch(kind: str) -> None:
    def run(module: Any, query: Tensor, memory: Any) -> tuple[Any, ...]:
        outputs = module(query, memory)[:2]
        return *outputs, *gradients(outputs, [query, *module.parameters()])

    draws = []
    for _ in range(5):
        ours = double(kind).float()
        torchs, exact = copy.deepcopy(ours), copy.deepcopy(ours).double()
        torchs.backend = "reference"
        query, memory = (x.detach().float() for x in drawn())
        small = query.requires_grad_(), memory
        large = query.detach().double().requires_grad_(), memory.double()
        draws.append((run(ours, small[0], ours.prepare(memory)), run(torchs, *small), run(exact, *large)))
    assert_as_accurate_over(draws)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_step_by_step_equals_many_queries(kind: str, beams: int) -> None:
    module = double(kind)
    query, memory = drawn(B * beams)
    mask = torch.rand(B * beams, TQ, TK) < 0.7
    together = module(query, memory, lengths=LENGTHS, mask=mask)
    prepared, state, steps = module.prepare(memory, LENGTHS), None, []
    for t in range(TQ):
        context, weights, state = module(query[:, t], prepared, mask=mask[:, t : t + 1], state=state)
        assert context.shape == (B * beams, DK) and weights.shape == (B * beams, TK)
        steps.append((context, weights))
    stepwise = tuple(torch.stack(parts, 1) for parts in zip(*steps))
    torch.testing.assert_close(stepwise, together[:2])
    inputs = [query, memory, *module.parameters()]
    torch.testing.assert_close(gradients(stepwise, inputs), gradients(together[:2], inputs))
    if kind in STATEFUL:
        torch.testing.assert_close(state, together[2])
        torch.testing.assert_close(gradients((state,), inputs), gradients((together[2],), inputs))
    else:
        assert state == together[2] == (TQ if kind == "positional" else None)
    # The rest of the queries, after some.
    first = module(query[:, :3], prepared, mask=mask[:, :3])
    rest = module(query[:, 3:], prepared, mask=mask[:, 3:], state=first[2], need_weights=False)
    torch.testing.assert_close(torch.cat([first[0], rest[0]], 1), together[0])
    assert rest[1] is None
    torch.testing.assert_close(rest[2], together[2])


def test_what_the_states_are() -> None:
    query, memory = drawn()
    for kind in STATEFUL:
        module = double(kind)
        _, weights, state = module(query, memory)
        total = weights.sum(1)
        torch.testing.assert_close(
            state,
            {
                "coverage": total,
                "location": weights[:, -1],
                "cumulative": torch.stack([weights[:, -1], total], 1),
            }[kind],
        )
        small = module.to(torch.bfloat16)(query.bfloat16(), memory.bfloat16())
        assert small[0].dtype == torch.bfloat16 and small[2].dtype == torch.float32


def test_coverage_starts_as_attention_without() -> None:
    with_coverage, without = double("coverage"), double("additive")
    without.load_state_dict({name: with_coverage.state_dict()[name] for name in without.state_dict()})
    nn.init.zeros_(with_coverage.bias)
    query, memory = drawn()
    torch.testing.assert_close(with_coverage(query[:, 0], memory)[:2], without(query[:, 0], memory)[:2])
    assert not torch.allclose(with_coverage(query, memory)[0], without(query, memory)[0])


def test_raw_products_grow_with_the_memory_and_softmax_does_not() -> None:
    """The scale of A3's context: c^2 for a memory c times as large, c^3 where the query is as well."""
    query, memory = drawn()
    raw = DotAttention("length")
    context = raw(query, memory)[0]
    for c in (10, 1000):
        torch.testing.assert_close(raw(query, c * memory)[0], c**2 * context)
        torch.testing.assert_close(raw(c * query, c * memory)[0], c**3 * context)
        assert DotAttention()(c * query, c * memory)[0].abs().max() <= c * memory.abs().max()


@pytest.mark.parametrize("kind", [*MODULES, *SELF])
def test_derivatives_of_both_orders(kind: str) -> None:
    module = double(kind)
    parameters = dict(module.named_parameters())
    if kind in SELF:
        inputs, options = [randn(2, 3, 8).requires_grad_()], {"lengths": torch.tensor([2, 3]), "need_weights": True}
    else:
        inputs = [randn(2, 2, DQ).requires_grad_(), randn(2, 3, DK).requires_grad_()]
        options = {"lengths": torch.tensor([2, 3])}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(parameters, tensors[len(inputs) :]))
        result = torch.func.functional_call(module, given, tensors[: len(inputs)], options)
        return tuple(x for x in result if isinstance(x, Tensor) and x.requires_grad)

    # In random directions; element by element the gradients are tested against the formulas.
    assert torch.autograd.gradcheck(run, (*inputs, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*inputs, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("kind", [*MODULES, *SELF])
def test_compiled_whole(kind: str) -> None:
    torch._dynamo.reset()
    module: Any = (MODULES | SELF)[kind]()
    inputs = [torch.randn(2 * B, 2, DQ), torch.randn(B, TK, DK)] if kind in MODULES else [torch.randn(B, TK, 8)]
    for x in inputs:
        x.requires_grad_()

    def run(query: Tensor, memory: Tensor | None = None) -> tuple[Any, ...]:
        if memory is None:
            return module(query, lengths=LENGTHS, need_weights=True)[:2]
        context, weights, state = module(query, memory, lengths=LENGTHS)
        return context, weights, *module(query[:, 0], module.prepare(memory, LENGTHS), state=state)

    found, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
    torch.testing.assert_close(found, expected)
    leaves = [*inputs, *module.parameters()]
    # A compiled backward pass cannot be run again.
    torch.testing.assert_close(gradients(found[:4], leaves, False), gradients(expected[:4], leaves))


def test_a_compiled_module_takes_a_prepared_memory() -> None:
    torch._dynamo.reset()
    module = AdditiveAttention(DQ, DK, H)
    query, prepared = torch.randn(B, DQ), module.prepare(torch.randn(B, TK, DK), LENGTHS)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, prepared), module(query, prepared))


@pytest.mark.parametrize("kind", [*MODULES, *SELF])
def test_copies_pickles_and_state_dicts(kind: str) -> None:
    module = (MODULES | SELF)[kind]()
    inputs = [torch.randn(2, 5, 8)] if kind in SELF else [torch.randn(B, TQ, DQ), torch.randn(B, TK, DK)]
    expected = module(*inputs)
    fresh = (MODULES | SELF)[kind]()
    fresh.load_state_dict(module.state_dict())
    for other in (fresh, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        found = other(*inputs)
        assert torch.equal(found[0], expected[0]) and repr(other) == repr(module)
    assert not list(module.buffers())
    if kind not in SELF:
        again = pickle.loads(pickle.dumps(module.prepare(inputs[1])))
        assert isinstance(again, PreparedMemory)
        torch.testing.assert_close(module(inputs[0], again)[0], expected[0])


@pytest.mark.parametrize("kind", [*MODULES, *SELF])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    module = (MODULES | SELF)[kind]()
    inputs = [torch.randn(2, 5, 8)] if kind in SELF else [torch.randn(B, TQ, DQ), torch.randn(B, TK, DK)]
    for x in inputs:
        x.requires_grad_()
    leaves = [*inputs, *module.parameters()]
    with torch.autocast("cpu", dtype):
        context, _, state = module(*inputs)
        assert context.dtype == dtype
        if kind in STATEFUL:
            assert state.dtype == torch.float32
        if kind not in SELF:
            torch.testing.assert_close(module(inputs[0], module.prepare(inputs[1]))[0], context)
    expected = module(*inputs)[0]
    found, wanted = gradients((context,), leaves), gradients((expected,), leaves)
    assert all(gradient.dtype == torch.float32 for gradient in found)
    # All gradients as one: that of a scalar may be what is left of large terms.
    flat = [torch.cat([gradient.flatten() for gradient in every]) for every in (found, wanted)]
    for result, exact in ((context, expected), flat):
        assert (result - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("kind", KERNELS)
def test_gradients_per_sample_and_forward_mode(kind: str) -> None:
    module = double(kind)
    query, memory = drawn()
    parameters = dict(module.named_parameters())

    def loss(parameters: Any, query: Tensor, memory: Tensor) -> Tensor:
        context, weights, _ = torch.func.functional_call(module, parameters, (query, memory))
        return context.square().sum() + weights.square().sum()

    per_sample = torch.vmap(torch.func.grad(loss, (0, 1)), (None, 0, 0))(
        parameters, query.detach().unsqueeze(1), memory.detach().unsqueeze(1)
    )
    for b in range(B):
        single = query.detach()[b : b + 1].requires_grad_()
        value = loss(parameters, single, memory.detach()[b : b + 1])
        expected = torch.autograd.grad(value, [single, *parameters.values()])
        torch.testing.assert_close((per_sample[1][b], *(g[b] for g in per_sample[0].values())), expected)
    direction = randn(B, TK, DK)
    _, along = torch.func.jvp(lambda m: loss(parameters, query.detach(), m), (memory.detach(),), (direction,))
    (gradient,) = torch.autograd.grad(loss(parameters, query, memory), memory)
    torch.testing.assert_close(along, (gradient * direction).sum())


@pytest.mark.parametrize("kind", MODULES)
def test_nothing_to_do(kind: str) -> None:
    module = MODULES[kind]()
    for batch, queries, places in ((0, TQ, TK), (2, 0, TK), (2, TQ, 0)):
        query, memory = torch.randn(batch, queries, DQ, requires_grad=True), torch.randn(batch, places, DK)
        for given in (memory, module.prepare(memory)):
            context, weights, state = module(query, given)
            assert context.shape == (batch, queries, DK) and weights.shape == (batch, queries, places)
            assert (context == 0).all()
            assert not isinstance(state, Tensor) or state.shape[-1] == places
        context.sum().backward() if context.requires_grad else None


# Self-attention


def self_oracle(module: SelfAttention, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Step by step; the padding of x is not among what is seen, and has no query."""
    batch, steps, size = x.shape
    heads, dim = module.num_heads, size // module.num_heads
    contexts = torch.zeros(batch, steps, size, dtype=x.dtype)
    weights = torch.zeros(batch, heads, steps, steps, dtype=x.dtype)
    rows = torch.eye(size, dtype=x.dtype)
    w_q, w_k, w_v = (rows,) * 3 if module.in_proj_weight is None else module.in_proj_weight.split(size)
    for b, t in [(b, t) for b in range(batch) for t in range(steps)]:
        places = [s for s in range(steps) if seen[b, t, s] and (s <= t or not module.causal)]
        parts = []
        for head in range(heads):
            of_head = slice(head * dim, (head + 1) * dim)
            part = torch.zeros(dim, dtype=x.dtype)
            if places:
                q = (w_q @ x[b, t])[of_head]
                e = torch.stack([q @ (w_k @ x[b, s])[of_head] for s in places])
                a = torch.softmax(e / math.sqrt(dim) if module.projections else e, 0)
                for s, weight in zip(places, a):
                    weights[b, head, t, s] = weight
                    part = part + weight * (w_v @ x[b, s])[of_head]
            parts.append(part)
        context = torch.cat(parts)
        contexts[b, t] = context if module.out_proj is None else module.out_proj.weight @ context
    return contexts, weights if heads > 1 else weights.squeeze(1)


@pytest.mark.parametrize("given", ["none", "lengths", "mask", "query_mask", "lengths+mask", "lengths+query_mask"])
@pytest.mark.parametrize("kind", SELF)
def test_self_attention(kind: str, given: str) -> None:
    """A8 and A9. Padding is neither seen nor computed, and may hold NaN."""
    module, steps = double(kind), 5
    x = randn(3, steps, 8).requires_grad_()
    names = given.split("+")
    options = {}
    present = torch.ones(3, steps, dtype=torch.bool)
    if "lengths" in names:
        options["lengths"] = torch.tensor([5, 2, 0])
        present = torch.arange(steps) < options["lengths"][:, None]
    if "mask" in names:
        options["mask"] = torch.rand(3, steps) < 0.6
        present = present & options["mask"]
    seen = present[:, None] & present[:, :, None]
    if "query_mask" in names:
        options["mask"] = torch.rand(3, steps, steps) < 0.6
        seen = seen & options["mask"]
    with torch.no_grad():
        x[~present] = math.nan
    inputs = [x, *module.parameters()]
    expected = self_oracle(module, x, seen)
    context, weights, state = module(x, need_weights=True, **options)
    assert state is None
    torch.testing.assert_close((context, weights), expected)
    torch.testing.assert_close(gradients((context, weights), inputs), gradients(expected, inputs))
    alone, nothing, _ = module(x, **options)
    torch.testing.assert_close(alone, context)
    assert nothing is None
    assert (context[~present] == 0).all()


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_are_those_of_torch(heads: int) -> None:
    theirs = nn.MultiheadAttention(8, heads, bias=False, batch_first=True, dtype=torch.float64)
    ours = SelfAttention(8, heads, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, lengths = randn(3, 5, 8), torch.tensor([5, 2, 4])
    padding = torch.arange(5) >= lengths[:, None]
    expected = theirs(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    found = ours(x, lengths=lengths, need_weights=True)
    torch.testing.assert_close(found[0][~padding], expected[0][~padding])
    torch.testing.assert_close(found[1].transpose(1, 2)[~padding], expected[1].transpose(1, 2)[~padding])


@pytest.mark.parametrize("kind", SELF)
def test_self_attention_of_nothing(kind: str) -> None:
    for batch, steps in ((0, 5), (2, 0)):
        context, weights, _ = SELF[kind]()(torch.randn(batch, steps, 8), need_weights=True)
        assert context.shape == (batch, steps, 8)
        assert weights.shape == (batch, *([SELF[kind]().num_heads] if "heads" in kind else []), steps, steps)


# Parameters


def test_initial_values() -> None:
    def spread(weight: Tensor, inputs: int) -> None:
        bound = 1 / math.sqrt(inputs)
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)

    additive = AdditiveAttention(100, 400, 300, normalize_v=True, coverage=True)
    location = LocationAttention(100, 400, 300, 50, 7, cumulative=True)
    for module in (additive, location):
        for _ in range(2):
            spread(module.query_weight, 100)
            spread(module.memory_weight, 400)
            spread(module.v, 300)
            assert module.bias.shape == (300,) and (module.bias == 0).all()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(7)
            module.reset_parameters()
    assert additive.g.shape == () and additive.g.item() == pytest.approx(300**-0.5)
    spread(additive.feature_weight, 1)
    spread(location.feature_weight, 50)
    spread(location.conv_weight, 14)
    spread(GeneralAttention(100, 400).weight, 400)
    spread(PositionalAttention(100, 400).table, 400)
    spread(SelfAttention(100).in_proj_weight, 100)
    spread(SelfAttention(100, 2).out_proj.weight, 100)


def test_names_and_shapes_of_the_parameters() -> None:
    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in module.state_dict().items()}

    plain = {"query_weight": (5, 3), "memory_weight": (5, 4), "v": (5,)}
    assert shapes(AdditiveAttention(3, 4, 5)) == plain
    assert shapes(AdditiveAttention(3, 4, 5, True)) == plain | {"bias": (5,), "g": ()}
    assert shapes(AdditiveAttention(3, 4, 5, coverage=True)) == plain | {"bias": (5,), "feature_weight": (5, 1)}
    location = {"bias": (5,), "conv_weight": (6, 1, 7), "feature_weight": (5, 6)}
    assert shapes(LocationAttention(3, 4, 5, 6, 7)) == plain | location
    location["conv_weight"] = (6, 2, 7)
    assert shapes(LocationAttention(3, 4, 5, 6, 7, cumulative=True)) == plain | location
    assert shapes(GeneralAttention(3, 4)) == {"weight": (3, 4)}
    assert shapes(PositionalAttention(3, 4)) == {"table": (3, 4)}
    assert shapes(MeanContext()) == shapes(DotAttention()) == shapes(SelfAttention(4, projections=False)) == {}
    assert shapes(SelfAttention(4)) == {"in_proj_weight": (12, 4)}


def test_repr_shows_the_settings() -> None:
    assert repr(MeanContext()) == "MeanContext(backend='auto')"
    assert repr(DotAttention("length", scaled=True, backend="cpu")) == (
        "DotAttention(normalize='length', scaled=True, backend='cpu')"
    )
    assert "query_size=3, memory_size=4, hidden_size=5, normalize_v=False, coverage=True" in repr(
        AdditiveAttention(3, 4, 5, coverage=True)
    )
    assert "channels=6, kernel_size=7, cumulative=False" in repr(LocationAttention(3, 4, 5, 6, 7))
    assert "embed_dim=4, num_heads=2, projections=True, causal=False" in repr(SelfAttention(4, 2))


def test_parametrized_weights() -> None:
    module = AdditiveAttention(DQ, DK, H, dtype=torch.float64)
    query, memory = drawn()
    before = module(query, memory)
    torch.nn.utils.parametrizations.weight_norm(module, "memory_weight")
    torch.testing.assert_close(module(query, memory), before)
    with torch.no_grad():
        module.parametrizations.memory_weight.original0.mul_(2)
    assert not torch.allclose(module(query, memory)[1], before[1])


# Errors


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: DotAttention("sigmoid"), ValueError, r"normalize must be one of 'softmax', 'length', got 'sigmoid'"),
        (lambda: DotAttention(scaled=1), TypeError, r"scaled must be a bool, got int"),
        (lambda: MeanContext(backend="gpu"), ValueError, r"backend must be one of .* got 'gpu'"),
        (lambda: SelfAttention(4, backend="gpu"), ValueError, r"backend must be one of .* got 'gpu'"),
        (lambda: GeneralAttention(0, 4), ValueError, r"query_size must be positive, got 0"),
        (lambda: GeneralAttention(4, 2.0), TypeError, r"memory_size must be an int, got float"),
        (lambda: AdditiveAttention(3, 4, -1), ValueError, r"hidden_size must be positive, got -1"),
        (lambda: AdditiveAttention(3, 4, 5, 6), TypeError, r"normalize_v must be a bool, got int"),
        (lambda: AdditiveAttention(3, 4, 5, coverage=1), TypeError, r"coverage must be a bool, got int"),
        (lambda: LocationAttention(3, 4, 5, True, 3), TypeError, r"channels must be an int, got bool"),
        (lambda: LocationAttention(3, 4, 5, 6, 4), ValueError, r"kernel_size must be odd, got 4"),
        (lambda: LocationAttention(3, 4, 5, 6, 3, cumulative=0), TypeError, r"cumulative must be a bool, got int"),
        (lambda: PositionalAttention(0, 3), ValueError, r"max_queries must be positive, got 0"),
        (lambda: PositionalAttention(3, 0), ValueError, r"max_memory must be positive, got 0"),
        (lambda: SelfAttention(6, 4), ValueError, r"num_heads must divide embed_dim 6, got 4"),
        (lambda: SelfAttention(6, 2, projections=False), ValueError, r"num_heads must be 1 without projections, got 2"),
        (lambda: SelfAttention(6, causal=0), TypeError, r"causal must be a bool, got int"),
    ],
)
def test_bad_settings(build: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        build()


ZEROS = torch.zeros
Q, M = ZEROS(2, 4, DQ), ZEROS(2, TK, DK)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(
    ("query", "memory", "options", "error", "text"),
    [
        ([1.0], M, {}, TypeError, r"query must be a torch.Tensor, got list"),
        (Q.long(), M, {}, TypeError, r"query must have a floating dtype, got torch.int64"),
        (Q[0, 0], M, {}, ValueError, r"query must have 2 or 3 dimensions, got shape \(3,\)"),
        (Q, None, {}, TypeError, r"memory must be a torch.Tensor or a PreparedMemory, got NoneType"),
        (Q, M[0], {}, ValueError, r"memory must have 3 dimensions, got shape \(5, 3\)"),
        (Q, M.long(), {}, TypeError, r"memory must have a floating dtype, got torch.int64"),
        (Q[:1], M, {}, ValueError, r"query must have a batch that is a multiple of the keys' 2, got 1"),
        (Q.double(), M, {}, ValueError, r"query must have the dtype of memory, torch.float32, got torch.float64"),
        (Q, M.to("meta"), {}, ValueError, r"(query|memory) must be on (cpu|meta), got (cpu|meta)"),
        (Q, M, {"lengths": [1, 2]}, TypeError, r"lengths must be a torch.Tensor, got list"),
        (Q, M, {"lengths": ZEROS(3).long()}, ValueError, r"lengths must be int64 or int32 of shape \(2,\)"),
        (Q, M, {"lengths": torch.tensor([6, 0])}, ValueError, r"lengths must lie in 0..5, got values in 0..6"),
        (Q, M, {"mask": ZEROS(2, TK)}, ValueError, r"mask must be torch.bool of shape \(2, 5\) or \(2, 4, 5\)"),
        (
            Q,
            M,
            {"mask": ZEROS(2, 3, TK).bool()},
            ValueError,
            r"mask must be torch.bool of shape .*, got .* \(2, 3, 5\)",
        ),
        (Q, M, {"mask": ZEROS(2, 6).bool()}, ValueError, r"mask must be torch.bool of shape .*, got .* \(2, 6\)"),
        (Q, M, {"state": "none"}, (TypeError, ValueError), r"state must be "),
    ],
)
def test_bad_calls(kind: str, query: Any, memory: Any, options: dict[str, Any], error: Any, text: str) -> None:
    module = MODULES[kind]()
    with pytest.raises(error, match=text):
        module(query, memory, **options)
    if isinstance(memory, Tensor) and memory.shape == M.shape and memory.dtype == M.dtype and memory.device == M.device:
        with pytest.raises(error, match=text):
            module(query, module.prepare(memory), **options)


@pytest.mark.parametrize("kind", ["general", *ADDITIVE])
def test_sizes_of_the_vectors(kind: str) -> None:
    module = MODULES[kind]()
    with pytest.raises(ValueError, match=r"query must have vectors of size 3, got shape \(2, 1, 7\)"):
        module(ZEROS(2, 7), M)
    for call in (lambda: module(Q, ZEROS(2, TK, 7)), lambda: module.prepare(ZEROS(2, TK, 7))):
        with pytest.raises(ValueError, match=r"memory must have vectors of size 3, got shape \(2, 5, 7\)"):
            call()
    with pytest.raises(ValueError, match=r"must have the dtype of \w+, torch.float32, got torch.float64"):
        module(Q.double(), M.double())


@pytest.mark.parametrize("kind", MODULES)
def test_lengths_are_checked_when_they_are_prepared(kind: str) -> None:
    with pytest.raises(ValueError, match=r"lengths must lie in 0..5, got values in 1..9"):
        MODULES[kind]().prepare(M, torch.tensor([1, 9]))


def test_errors_of_single_modules() -> None:
    with pytest.raises(ValueError, match=r"query must have vectors of the keys' size 3, got shape \(2, 4, 7\)"):
        DotAttention()(ZEROS(2, 4, 7), M)
    with pytest.raises(ValueError, match=r"memory must be prepared by this module, got a PreparedMemory whose keys"):
        AdditiveAttention(DQ, DK, H)(Q, DotAttention().prepare(M))
    with pytest.raises(ValueError, match=r"state must be None, DotAttention has none, got int"):
        DotAttention()(Q, M, state=3)
    positional = PositionalAttention(6, 7)
    with pytest.raises(ValueError, match=r"query positions must lie in 0..5, got 3 to 6"):
        positional(Q, M, state=3)
    with pytest.raises(ValueError, match=r"query positions must lie in 0..5, got -1 to 2"):
        positional(Q, M, state=-1)
    with pytest.raises(TypeError, match=r"state must be an int, the number of queries so far, or None, got float"):
        positional(Q, M, state=1.0)
    with pytest.raises(ValueError, match=r"memory must have at most 7 places, got 8"):
        positional(Q, ZEROS(2, 8, DK))
    with pytest.raises(ValueError, match=r"memory must have the dtype of table"):
        positional(Q.double(), M.double())
    location = MODULES["cumulative"]()
    with pytest.raises(ValueError, match=r"state must be floating of shape \(2, 2, 5\), got torch.float32 \(2, 5\)"):
        location(Q, M, state=ZEROS(2, TK))
    with pytest.raises(ValueError, match=r"state must be floating of shape \(2, 5\), got torch.int64 \(2, 5\)"):
        MODULES["coverage"]()(Q, M, state=ZEROS(2, TK).long())
    with pytest.raises(TypeError, match=r"state must be a torch.Tensor or None, got int"):
        location(Q, M, state=0)


@pytest.mark.parametrize("kind", SELF)
def test_errors_of_self_attention(kind: str) -> None:
    module, x = SELF[kind](), ZEROS(2, 5, 8)
    for given, options, error, text in [
        (None, {}, TypeError, r"x must be a torch.Tensor, got NoneType"),
        (x[0], {}, ValueError, r"x must have 3 dimensions, got shape \(5, 8\)"),
        (x[..., :3], {}, ValueError, r"x must have vectors of size 8, got shape \(2, 5, 3\)"),
        (x, {"lengths": torch.tensor([6, 0])}, ValueError, r"lengths must lie in 0..5, got values in 0..6"),
        (x, {"mask": ZEROS(2, 4).bool()}, ValueError, r"mask must be torch.bool of shape \(2, 5\) or \(2, 5, 5\)"),
    ]:
        with pytest.raises(error, match=text):
            module(given, **options)
    if module.projections:
        with pytest.raises(ValueError, match=r"x must have the dtype of in_proj_weight, torch.float32"):
            module(x.double())


@pytest.mark.parametrize("kind", MODULES)
def test_a_back_end_that_cannot_says_so(kind: str) -> None:
    module = MODULES[kind]()
    module.backend = "cuda"
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' cannot compute this call: .*has no kernels"):
        module(Q, M)
    module.backend = "reference"
    module(Q, M)


def test_torchs_operator_is_taken_where_it_computes_the_same() -> None:
    x = torch.randn(2, 5, 8)
    for kind in SELF:
        module = SELF[kind]()
        expected = module(x)[0]
        module.backend = "aten"
        torch.testing.assert_close(module(x)[0], expected)
        with pytest.raises(NotImplementedError, match=r"torch's operator does not return the weights"):
            module(x, need_weights=True)


def test_explain_names_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = AdditiveAttention(DQ, DK, H)
            self.mean = MeanContext()

        def forward(self, query: Tensor, memory: Tensor) -> Tensor:
            prepared = self.scores.prepare(memory)
            for t in range(TQ):
                self.scores(query[:, t], prepared)
            return self.mean(query, memory)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = fastrnn.explain(Model(), Q, M)
    assert f"{TQ} calls of scores (AdditiveAttention): attention, additive score, 2x1 queries of 6 on 5 keys" in text
    assert "not aten: torch has inner products only" in text
    assert "mean (MeanContext): torch's own operations" in text
