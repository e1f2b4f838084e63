"""The Triton kernels compile for GPUs that need not be there, fit into shared memory and hardly spill registers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastrnn.backends import gpu, top_k  # noqa: E402
from fastrnn.backends import triton as backend  # noqa: E402
from fastrnn.backends.attention import triton as attention  # noqa: E402
from fastrnn.reference import CELLS  # noqa: E402
from tests.ops.attention_case import OUTPUTS, AttentionCase  # noqa: E402
from tests.ops.case import Case, options_of  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")

SHARED = {80: 166912, 90: 232448}  # bytes of shared memory that one block may have
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass
class Compiled:
    name: str
    shared: int
    spilled: int  # bytes, stores and loads


class Compiling:
    """Stands in for a kernel: compiles what it is launched with."""

    def __init__(self, function: Any, architecture: int, folder: Path, found: list[Compiled]) -> None:
        self.function, self.architecture, self.folder, self.found = function, architecture, folder, found

    def __getitem__(self, _: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        given = dict(zip(self.function.arg_names, arguments)) | keywords
        assert set(given) == set(self.function.arg_names)
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.function.params):
            name, value = parameter.name, given[parameter.name]
            general = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (general and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if general and value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.function, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        self.found.append(Compiled(self.function.__name__, kernel.metadata.shared, self.spilled(kernel.asm["ptx"])))

    def spilled(self, ptx: str) -> int:
        file = self.folder / "kernel.ptx"
        file.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)
        assert target
        assembler = get_ptxas(self.architecture)
        command = [getattr(assembler, "path", assembler), "-v", f"--gpu-name={target[1]}", file, "-o", os.devnull]
        said = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stderr
        return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A context in which launchers compile for an architecture; it gives what they do."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    real = backend._kernels

    @contextmanager
    def context(architecture: int) -> Iterator[list[Compiled]]:
        found: list[Compiled] = []

        def kernels(name: str) -> SimpleNamespace:
            functions = vars(real(name)).items()
            jitted = {key: value for key, value in functions if isinstance(value, triton.JITFunction)}
            return SimpleNamespace(**{k: Compiling(v, architecture, tmp_path, found) for k, v in jitted.items()})

        with monkeypatch.context() as patch:
            patch.setattr(backend, "_kernels", kernels)
            patch.setattr(backend, "_capability", lambda _: divmod(architecture, 10))
            yield found

    return context


@pytest.fixture
def launches(compiling: Any) -> Any:
    """A function that gives what the launchers of a case compile for an architecture."""

    def of(case: Case, architecture: int) -> list[Compiled]:
        call, gradients = case.draw()
        inputs, cell = call.inputs(), call.cell if call.reset_after else "gru_reset_before"
        options = (call.lengths, None, call.resets, call.recurrent_mask, call.zoneout, call.zoneout_seed, call.reverse)
        with compiling(architecture) as found:
            *_, saved, c_all = gpu.forward(
                "triton", cell, *inputs[:7], inputs[7:], *options, True, call.return_cell_states
            )
            given = [gradients.get(name) for name in ("y", "h_n", "c_n", "c_all")]
            needs = [tensor is not None for tensor in inputs]
            gpu.backward(
                "triton",
                cell,
                *given,
                *inputs[:3],
                *inputs[5:7],
                inputs[7:],
                *options,
                torch.zeros_like(gradients["y"]),
                saved,
                c_all,
                needs,
            )
        return found

    return of


def _assert_fit(found: list[Compiled], names: set[str], architecture: int, spilled: int) -> None:
    assert {kernel.name for kernel in found} == names
    for kernel in found:
        assert kernel.shared <= SHARED[architecture], kernel
        assert kernel.spilled <= spilled, kernel


AT_ONCE = {"recurrence_forward", "recurrence_backward"}
# rnn_relu differs from rnn_tanh, and float16 from bfloat16, in nothing that memory depends on.
KINDS = {"rnn_tanh": (), "lstm": (), "gru": (), "gru_reset_before": ("reset_after=False",)}


def _largest(cell: str, dtype: torch.dtype, architecture: int) -> int:
    sizes = [size for size in range(16, 1025, 16) if backend.pick(cell, size, dtype, divmod(architecture, 10), True)]
    return max(sizes)


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_resident_sizes(kind: str, dtype: torch.dtype, architecture: int, launches: Any) -> None:
    cell = kind.removesuffix("_reset_before")
    hidden = _largest(cell, dtype, architecture)
    case = Case(cell, 3, 16, 16, hidden, KINDS[kind], dtype=dtype)
    _assert_fit(launches(case, architecture), AT_ONCE, architecture, spilled=64)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_tf32(cell: str, launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "precision", lambda: "tf32")
    _assert_fit(launches(Case(cell, 3, 16, 16, 64), 90), AT_ONCE, 90, spilled=64)


# A kernel with every option at once spills: its parameters alone are a dozen vectors of units.
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_reset_before"])
def test_every_option_of_the_largest_resident_sizes(kind: str, launches: Any) -> None:
    cell = kind.removesuffix("_reset_before")
    options = options_of(cell)[: -1 if kind == "gru" else None]
    case = Case(cell, 3, 16, 16, _largest(cell, torch.bfloat16, 80), options, dtype=torch.bfloat16)
    _assert_fit(launches(case, 80), AT_ONCE, 80, spilled=2048)


STEPS = {"step_forward", "step_backward", "multiply"}


# In float32 the single steps below are compiled.
@pytest.mark.parametrize("kind, dtype", [*((kind, torch.bfloat16) for kind in KINDS), ("lstm", torch.float32)], ids=str)
def test_steps_of_large_sizes(kind: str, dtype: torch.dtype, launches: Any) -> None:
    case = Case(kind.removesuffix("_reset_before"), 2, 16, 16, 1024, KINDS[kind], dtype=dtype)
    _assert_fit(launches(case, 80), STEPS, 80, spilled=64)


@pytest.mark.parametrize("kind", ["lstm", "gru_reset_before"])
def test_steps_with_every_option(kind: str, launches: Any) -> None:
    cell = kind.removesuffix("_reset_before")
    options = options_of(cell)[: -1 if kind == "gru" else None]
    names = STEPS | ({"project_forward", "project_backward"} if cell == "lstm" else set())
    case = Case(cell, 2, 16, 16, 1024, options, dtype=torch.bfloat16)
    _assert_fit(launches(case, 90), names, 90, spilled=256)


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_single_steps_take_one_launch(kind: str, architecture: int, launches: Any) -> None:
    found = launches(Case(kind, 1, 16, 48, 512, states=("h0", "c0")), architecture)
    assert [kernel.name for kernel in found][:2] == ["step_forward", "step_backward"]
    _assert_fit(found, STEPS, architecture, spilled=64)


# Attention


def _compile_attention(case: AttentionCase, architecture: int, compiling: Any) -> list[Compiled]:
    call, gradients = case.draw()
    inputs, options = call.inputs(), (call.factors, call.lengths, call.mask)
    scalars = (call.causal, call.scale, call.normalize)
    given = [gradients.get(name) for name in OUTPUTS]
    with compiling(architecture) as found:
        _, weights = attention.forward(*inputs, *options, *scalars)
        attention.backward(*given, *inputs, *options, weights, *scalars, [tensor is not None for tensor in inputs])
    return found


ROWS = {"attention_context", "attention_score_gradients"}
PRODUCTS = ROWS | {"attention_inner_scores", "attention_product"}
ADDITIVE = ROWS | {"attention_additive_scores", "attention_additive_backward"}


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 64])
def test_attention_by_inner_products(queries: int, dtype: torch.dtype, architecture: int, compiling: Any) -> None:
    options = ("lengths", "query_mask", "causal") if queries == 64 else ("lengths", "query_mask")
    case = AttentionCase("inner", 2, queries, 64, 64, 64, options, dtype=dtype)
    _assert_fit(_compile_attention(case, architecture, compiling), PRODUCTS, architecture, spilled=64)


# Without a gradient of the contexts, the products are left out.
@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize("score, dtype", [("factors", torch.float32), ("additive", torch.bfloat16)], ids=str)
@pytest.mark.parametrize("queries", [1, 64])
def test_additive_attention(queries: int, score: str, dtype: torch.dtype, architecture: int, compiling: Any) -> None:
    case = AttentionCase(score, 2, queries, 64, 64, 64, ("lengths",), outputs=("weights",), dtype=dtype)
    _assert_fit(_compile_attention(case, architecture, compiling), ADDITIVE, architecture, spilled=64)


@pytest.mark.parametrize(
    "dtype, channels, architecture",
    [(torch.float32, 64, 80), (torch.float32, 64, 90), (torch.float32, 1, 80), (torch.bfloat16, 64, 90)],
    ids=str,
)
def test_attention_by_location(dtype: torch.dtype, channels: int, architecture: int, compiling: Any) -> None:
    options = ("lengths", "length")
    case = AttentionCase("location", 2, 4, 64, 64, 64, options, channels, outputs=("weights",), dtype=dtype)
    found = _compile_attention(case, architecture, compiling)
    _assert_fit(found, ADDITIVE | {"attention_feature_gradients"}, architecture, spilled=64)


# Which the compiler takes for constants.
@pytest.mark.parametrize("score", ["inner", "location"])
def test_attention_of_sizes_of_one(score: str, compiling: Any) -> None:
    case = AttentionCase(score, 1, 1, 1, 1, 1, ("lengths", "query_mask", "causal"), channels=1)
    names = PRODUCTS if score == "inner" else PRODUCTS | ADDITIVE | {"attention_feature_gradients"}
    _assert_fit(_compile_attention(case, 90, compiling), names, 90, spilled=64)


def test_attention_in_tf32(compiling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "precision", lambda: "tf32")
    found = _compile_attention(AttentionCase("inner", 2, 64, 64, 64), 90, compiling)
    _assert_fit(found, PRODUCTS, 90, spilled=64)


# top_k_log_softmax


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(
    "dtype, vocabulary, k, group_size, given",
    [
        (torch.float32, 50257, 10, 10, False),
        (torch.bfloat16, 32000, 20, 10, False),
        (torch.float16, 32000, 128, 5, True),
        (torch.float32, 9000, 5000, 2, True),
        (torch.float32, 1, 1, 1, False),
    ],
    ids=str,
)
def test_top_k(
    dtype: torch.dtype, vocabulary: int, k: int, group_size: int, given: bool, architecture: int, compiling: Any
) -> None:
    logits, scores = torch.zeros(2 * group_size, vocabulary, dtype=dtype), torch.zeros(2 * group_size)
    with compiling(architecture) as found:
        top_k._launch_triton(logits, k, scores, group_size, scores if given else None)
    names = {"top_k_parts", "top_k_rows", "top_k_groups"} if group_size > 1 else {"top_k_parts", "top_k_rows"}
    _assert_fit(found, names, architecture, spilled=0)
    assert all(kernel.shared <= 65536 for kernel in found)


# The choice of a launch


def test_a_choice_depends_on_the_size_alone() -> None:
    for cell in (*CELLS, "gru_reset_before"):
        for dtype in gpu.DTYPES:
            for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
                fits = [backend.pick(cell, hidden, dtype, capability, True) is not None for hidden in range(1, 600)]
                assert fits[15] and not fits[-1] and fits == sorted(fits, reverse=True)
    assert backend.pick("lstm", 16, torch.float32, (7, 5), True) is None


def test_more_shared_memory_takes_larger_sizes() -> None:
    assert backend.pick("lstm", 128, torch.bfloat16, (9, 0), True) is not None
    assert backend.pick("lstm", 128, torch.bfloat16, (8, 9), True) is None


def test_a_choice_for_attention_depends_on_the_size_alone() -> None:
    for dtype in gpu.DTYPES:
        assert attention.pick_product(1, dtype) == attention.pick_product(16, dtype)
        assert attention.pick_product(17, dtype) == attention.pick_product(1000, dtype)
    assert attention.pick_additive(2, False) == attention.pick_additive(1000, False)
    for features in (True, False):
        assert attention.pick_additive(1, features).rows == 1
    assert [attention.pick_features(count) for count in (1, 16, 17, 64, 1000)] == [16, 16, 32, 64, 64]


def test_a_choice_for_top_k_depends_on_the_sizes_of_a_row_alone() -> None:
    for vocabulary in (1, 100, 128, 129, 5000, 250000):
        reading = top_k.pick_parts(vocabulary)
        assert reading.tokens & (reading.tokens - 1) == 0 and 32 * reading.warps <= reading.tokens
        # Keys of float16 have 19 bits and the place in a part, as a signed number of 32 bits.
        assert reading.tokens <= 4096
    assert top_k.pick_places(32) != top_k.pick_places(33) == top_k.pick_places(10**6)
