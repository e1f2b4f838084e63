"""The GPU suites as far as they go without a GPU: what is timed when, the budget, results, tables, adapters."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch

from bench import check, peers, report, results
from bench.gpu import __main__ as suites
from bench.gpu import ceilings, contenders, exchange, registry, sanitize, search, timing
from bench.gpu import report as gpu_report
from bench.gpu import results as gpu_results

LIMITS = {
    "copy_gbytes": 4000.0,
    "tflops": {"fp32": 50.0, "bf16": 800.0, "fp16": 800.0, "tf32": 400.0},
    "launch_us": 4.0,
    "graph_launch_us": 1.5,
}
RUN = {"device": "NVIDIA H200", "driver": "580.1", "versions": {"torch": "2.11.0"}, "commit": "abc", "ceilings": LIMITS}
ID = "2026-11-20T10:00:00Z"


def case_of(suite: str, **wanted: object) -> registry.GpuCase:
    """The suite's first case with these properties."""
    return next(c for c in registry.SUITES[suite]() if all(getattr(c, name) == value for name, value in wanted.items()))


def row(case: registry.GpuCase, **seconds: float) -> dict:
    """A row of these times; "fastrnn_graph" stands for the contender "fastrnn, graph"."""
    times = {name.replace("_graph", ", graph"): [value] * 7 for name, value in seconds.items()}
    ready = {name: peers.Contender(lambda: None, dict) for name in times}
    entries = check.Entries(ready, dict.fromkeys(times, 1e-3), {"haste": "not installed: haste_pytorch"}, "cuda")
    return suites.make_row(case, times, entries, LIMITS)


def measured(*rows: tuple[registry.GpuCase, dict]) -> dict:
    return {
        "machine": "nvidia-h200",
        "kind": "gpu",
        "runs": {ID: RUN | {"seconds": 60.0, "not_run": ["gru-late"], "failures": {"lstm-bad": "OSError: no"}}},
        "rows": {case.id: {"run": ID, **row} for case, row in rows},
    }


# What is timed


def test_cases():
    ids = [case.id for case in registry.all_cases()]
    assert len(set(ids)) == len(ids)
    assert "lstm-16x1024x768x768-forward-fp16" in ids and "gru-128x512x2048x2048-training-fp32" in ids
    assert not [id for id in ids if id.startswith("lstm") and id.endswith("fp32")]
    pairs = {(case.size.batch, case.size.hidden_size) for case in registry.cudnn()}
    assert pairs == {(batch, hidden) for batch in (1, 16, 64, 128) for hidden in (256, 512, 1024, 2048)}
    assert case_of("masks").baseline[1] == registry.GpuCase(
        "lstm", "16x512x1024x1024", "forward", "bf16", None, "masks"
    )
    assert case_of("cudnn").baseline is None


def test_every_suite_has_had_its_share_whenever_the_time_is_up():
    cases = registry.ordered(list(registry.SUITES))
    assert sorted(case.id for case in cases) == sorted(case.id for case in registry.all_cases())
    assert [case.suite for case in cases[:2]] == ["headline"] * 2
    assert [case.suite for case in cases[-3:]] == ["search"] * 3
    half = Counter(case.suite for case in cases[: len(cases) // 2])
    for name, suite in registry.SUITES.items():
        if name not in ("headline", "search"):
            assert abs(half[name] / len(suite()) - 0.5) < 0.1
    assert {case.suite for case in registry.ordered(["norm", "step"])} == {"norm", "step"}


def test_least_bytes_and_floors():
    forward, training = (case_of("headline", mode=mode) for mode in registry.SEQUENCE_MODES)
    weights = 2 * 4 * 768 * 768 * 2
    assert forward.all_weight_bytes == weights
    assert forward.least_bytes == weights + 2 * 16 * 1024 * 2 * 768
    assert training.least_bytes == 3 * forward.least_bytes
    assert ceilings.floor_seconds(forward, LIMITS) == pytest.approx(2 * 16 * 1024 * 4 * 768 * 1536 / 800e12)
    one, *_, many = registry.search()
    weights = 12 * 1024**2 + 3 * 8 * 1024**2 + 1024**2 + 32000 * 2048
    assert ceilings.floor_seconds(one, LIMITS) == pytest.approx(40 * 2 * weights / 4000e9)
    assert ceilings.floor_seconds(many, LIMITS) == pytest.approx(2 * 40 * 128 * 5 * weights / 800e12)
    step = case_of("step", cell="lstm", dtype="bf16")
    assert ceilings.floor_seconds(step, LIMITS) == pytest.approx(2 * 4 * 1024 * 1024 * 2 / 4000e9 + 1.5e-6)


def test_precision_of_products_is_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with ceilings.precision("tf32"):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    with ceilings.precision("fp32"):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# A run


@pytest.fixture
def one_case_each(monkeypatch):
    """Of every suite that needs no compiler and no large vocabulary, its first case."""
    chosen = {name: suite for name, suite in registry.SUITES.items() if name not in ("norm", "search")}
    shortened = {name: lambda suite=suite: suite()[:1] for name, suite in chosen.items()}
    monkeypatch.setattr(registry, "SUITES", shortened)
    monkeypatch.setattr(suites, "SUITES", shortened)


TRIAL = ["--device", "cpu", "--smoke", "--seconds-each", "0.001"]


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    status = suites.main([*TRIAL, "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.json")
    return status, results.load(path)


def test_a_trial_on_the_cpu_writes_a_row_of_every_suite(tmp_path, one_case_each, capsys):
    status, data = run(tmp_path)
    assert status == 0 and data["kind"] == "cpu"
    (written,) = data["runs"].values()
    assert {"device", "versions", "commit", "ceilings", "seconds"} <= written.keys()
    assert written["not_run"] == [] and written["failures"] == {}
    assert {row["suite"] for row in data["rows"].values()} == {"headline", "step", "cudnn", "small", "masks"}
    for found in data["rows"].values():
        assert {"run", "suite", "backend", "rounds", "peers", "ratios", "left_out", "floor", "fraction"} <= found.keys()
        assert found["backend"] == "cpu" and found["rounds"] >= timing.MIN_ROUNDS
        assert found["peers"]["fastrnn"]["error"] < 0.05
    masked = data["rows"]["lstm-3x5x8x8-forward-bf16-resets"]
    assert "plain" in masked["ratios"] and masked["left_out"]["torch"] == "has no resets"
    step = data["rows"]["lstm-1x1x8x8-step-bf16"]
    assert step["left_out"]["torch, graph"] == "CUDA graphs need CUDA" and step["l2"] == "weights from memory"
    assert "5 of 5 cases" in capsys.readouterr().out


def test_what_the_time_did_not_reach_is_said(tmp_path, one_case_each, capsys):
    status, data = run(tmp_path, "--seconds", "0")
    assert status == 0 and data["rows"] == {}
    assert len(next(iter(data["runs"].values()))["not_run"]) == 5
    assert "left out: 1 of headline, 1 of step, 1 of cudnn, 1 of small, 1 of masks" in capsys.readouterr().out


def test_baselines_stand_apart(tmp_path, one_case_each):
    status, data = run(tmp_path, "--baselines", "--suites", "headline,masks")
    assert status == 0 and data["rows"] == {}
    assert {tuple(row["peers"]) for row in data["baselines"].values()} == {("torch",), ()}


def test_a_failure_costs_one_case_and_the_exit_status(tmp_path, one_case_each, monkeypatch, capsys):
    measure = suites.measure

    def fails_at_steps(case, *others):
        if case.mode == "step":
            raise RuntimeError("an illegal memory access")
        return measure(case, *others)

    monkeypatch.setattr(suites, "measure", fails_at_steps)
    status, data = run(tmp_path)
    assert status == 1 and len(data["rows"]) == 4
    assert next(iter(data["runs"].values()))["failures"] == {
        "lstm-1x1x8x8-step-bf16": "RuntimeError: an illegal memory access"
    }
    assert "an illegal memory access" in capsys.readouterr().err


def test_a_wrong_fastrnn_is_left_out_and_fails_the_run(tmp_path, one_case_each, monkeypatch):
    def wrong(problem, backend="auto"):
        contender = peers.torch_nn(problem)
        return contender._replace(named=lambda out: {k: v + 0.1 for k, v in contender.named(out).items()})

    monkeypatch.setattr(peers, "fastrnn", wrong)
    status, data = run(tmp_path, "--suites", "headline")
    assert status == 1
    (found,) = data["rows"].values()
    assert found["left_out"]["fastrnn"].startswith("wrong result: y is off by") and list(found["peers"]) == ["torch"]
    assert found["ratios"] == {} and "fraction" not in found


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_a_search_is_checked_by_what_its_tokens_are_worth(factor, monkeypatch):
    monkeypatch.setattr(search, "VOCABULARY", 50)
    of_fastrnn = search.BUILDERS["fastrnn"]

    def times_factor(problem):
        contender = of_fastrnn(problem)

        def call():
            tokens, scores = contender.call()
            return tokens, factor * scores

        return contender._replace(call=call)

    monkeypatch.setitem(search.BUILDERS, "fastrnn", times_factor)
    case = registry.shrunk(registry.search()[1])
    options = argparse.Namespace(backends=["cpu"], baselines=False, device="cpu", seconds_each=0.001)
    found = suites.measure(case, options, timing.HostTimer(), LIMITS, left=1.0)
    assert case.id == "lstm-3x5x8x8-search-fp16" and found["suite"] == "search"
    if factor == 1:
        assert list(found["peers"]) == ["fastrnn", "torch"] and found["left_out"] == {}
    else:
        assert found["left_out"]["fastrnn"].startswith("wrong result: score is off by 2.0") and suites.wrong_results(
            found
        )


def test_back_ends_asked_for_by_name():
    """One that cannot run says why; the one that fastrnn chose itself is not timed twice."""
    assert not {"cpu", "aten", "reference"} & set(contenders.gpu_backends())
    case = registry.shrunk(case_of("masks"))
    options = argparse.Namespace(
        backends=["cpu", "aten", "reference"], baselines=False, device="cpu", seconds_each=0.001
    )
    found = suites.measure(case, options, timing.HostTimer(), LIMITS, left=1.0)
    assert list(found["peers"]) == ["fastrnn", "fastrnn reference", "plain"]
    assert found["left_out"]["fastrnn aten"] == "backend 'aten' cannot compute this call: torch has no resets"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--suites", "cudnn,nonsense"],
            "must be out of headline, step, cudnn, small, masks, norm, search, got 'nonsense'",
        ),
        (["--backends", "cpu"], "got 'cpu'"),
    ],
    ids=["suite", "back end"],
)
def test_unknown_names_are_errors(arguments, message, capsys):
    with pytest.raises(SystemExit):
        suites.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", ["bench.gpu", "bench.gpu.exchange", "bench.gpu.sanitize"])
def test_without_a_device_every_command_says_so(module, tmp_path):
    command = [sys.executable, "-m", module, *(["--out", str(tmp_path)] if module != "bench.gpu.sanitize" else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=report.ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"{module}: torch sees no CUDA device"


def test_make_gpu_runs_every_part_also_after_one_that_failed(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make")
    for name in ("Makefile", "CMakeLists.txt", "setup.py", "pyproject.toml"):
        shutil.copy(report.ROOT / name, tmp_path)
    for name in ("fastrnn", "kernels"):
        (tmp_path / name).mkdir()
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *bench.gpu.exchange*) exit 1;; esac\n')
    interpreter.chmod(0o755)
    command = ["make", "gpu", f"PYTHON={interpreter}", "GPU_SECONDS=400", "ARGS="]
    # Not a part of the make that may have started these tests.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    ran = [line.removeprefix("ran -m ") for line in done.stdout.splitlines() if line.startswith("ran -m ")]
    assert ran[0].startswith("pip install") and "--no-index" in ran[0]
    attention, *search = (f"tests/gpu/test_{name}.py" for name in ("attention", "top_k", "search"))
    ignored = " ".join(f"--ignore={path}" for path in (attention, *search))
    tests = [f"pytest {paths}" for paths in (f"tests/gpu -q {ignored}", f"{attention} -v", f"{' '.join(search)} -v")]
    assert ran[1:6] == [*tests, "bench.gpu.exchange", "bench.gpu.sanitize --seconds 90"]
    assert ran[6].startswith("bench.gpu --seconds ") and 380 < int(ran[6].split()[-1]) <= 400
    assert done.returncode != 0 and "failed: gpu-exchange\n" in done.stdout


# Timing


def test_every_contender_takes_its_turn_in_every_round():
    class Counted:
        """A clock on which a call of `slow` takes 3 ms and any other 1 ms."""

        def time(self, call, calls):
            for _ in range(calls):
                call()
            return 0.003 if call is slow else 0.001

    turns = []
    fast, slow = (lambda: turns.append("fast")), (lambda: turns.append("slow"))
    times = timing.interleave({"fast": fast, "slow": slow}, Counted(), seconds=0.2)
    # A round is 1 + 5 calls of 1 ms and 1 + 2 of 3 ms, so 0.2 s hold 14 of them.
    assert times == {"fast": [0.001] * 14, "slow": [0.003] * 14}
    timed = turns[6:]
    assert timed[:12] == ["fast"] * 6 + ["slow"] * 6 and timed[12:18] == ["fast"] * 6
    assert Counter(timed) == {"fast": 14 * 6, "slow": 14 * 3}
    assert timing.interleave({}, Counted(), seconds=0.2) == {}


def test_copies_of_a_contender_take_turns():
    turns = []
    made = iter("abc")

    def build(problem):
        name = next(made)
        return peers.Contender(lambda: turns.append(name), dict)

    contender = contenders.rotated(build, 3)(None)
    for _ in range(4):
        contender.call()
    assert turns == ["a", "b", "c", "a"] and contender.count == 1


def test_a_call_that_makes_several_counts_as_several():
    case = case_of("step")
    ready = {"fastrnn": peers.Contender(lambda: None, dict), "fastrnn, graph": peers.Contender(lambda: None, dict, 10)}
    entries = check.Entries(ready, dict.fromkeys(ready, 1e-3), {}, "cuda")
    found = suites.make_row(case, {"fastrnn": [5e-5] * 7, "fastrnn, graph": [1e-4] * 7}, entries, LIMITS)
    assert found["peers"]["fastrnn, graph"]["median"] == 0.01 and found["ratios"] == {"fastrnn, graph": 0.2}


# Peers, through stand-ins of their interfaces


def flashrnn_function(gates_x, weight, bias, function, backend, dtype):
    """NX-AI/flashrnn: gates_x [B, T, G, heads, D], weight [G, heads, D, P], bias [G, heads, D]."""
    assert backend == "cuda_fused" and dtype == "float32"
    h = c = gates_x.new_zeros(gates_x.shape[0], *gates_x.shape[3:])
    states = []
    for x in gates_x.unbind(1):
        product = torch.einsum("bnp,gndp->bgnd", h, weight)
        if function == "lstm":
            i, f, z, o = (x + product + bias).unbind(1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            r, z = (torch.sigmoid(x[:, k] + product[:, k + 1] + bias[k + 1]) for k in (0, 1))
            h = z * h + (1 - z) * torch.tanh(x[:, 2] + bias[3] + r * (product[:, 0] + bias[0]))
        states.append(torch.stack([h, c] if function == "lstm" else [h]))
    return torch.stack(states, 2), states[-1][:, :, None]


def torchrl_function(cell):
    """pytorch/rl: x [B, T, I], the states that steps with `starts` [B, T] begin from [B, T, H]."""

    def run(x, *rest, input_precision):
        assert input_precision == "ieee"
        *states, w_ih, w_hh, b_ih, b_hh, starts = rest
        layer = getattr(torch.nn, f"{cell.upper()}Cell")(x.shape[-1], w_hh.shape[1])
        weights = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
        now, outputs = [state[:, 0] for state in states], []
        for t in range(x.shape[1]):
            now = [torch.where(starts[:, t, None], reset[:, t], s) for reset, s in zip(states, now, strict=True)]
            state = tuple(now) if cell == "lstm" else now[0]
            new = torch.func.functional_call(layer, weights, (x[:, t], state))
            now = list(new) if cell == "lstm" else [new]
            outputs.append(now)
        return (*(torch.stack(steps, 1) for steps in zip(*outputs, strict=True)), *now)

    return run


class HasteLayer(torch.nn.Module):
    """lmnt-com/haste: transposed weights, gates i, g, f, o with one bias, or z, r, n with two."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size

    def order(self, tensor, dim=-1):
        chunks = tensor.chunk(len(self.gates), dim)
        return torch.cat([chunks[gate] for gate in self.gates], dim)

    def from_native_weights(self, w_ih, w_hh, b_ih, b_hh):
        biases = {"bias": b_ih + b_hh} if self.cell == "LSTM" else {"bias": b_ih, "recurrent_bias": b_hh}
        for name, value in {"kernel": w_ih.T, "recurrent_kernel": w_hh.T, **biases}.items():
            setattr(self, name, torch.nn.Parameter(self.order(value).detach().clone()))

    def forward(self, x):
        layer = getattr(torch.nn, self.cell)(self.input_size, self.hidden_size)
        native = {"weight_ih_l0": self.order(self.kernel).T, "weight_hh_l0": self.order(self.recurrent_kernel).T}
        recurrent = torch.zeros_like(self.bias) if self.cell == "LSTM" else self.recurrent_bias
        native |= {"bias_ih_l0": self.order(self.bias), "bias_hh_l0": self.order(recurrent)}
        return torch.func.functional_call(layer, native, (x,))


STAND_INS = {
    "flashrnn": ("flashrnn", {"flashrnn": flashrnn_function}),
    "torchrl": (
        "torchrl.modules.tensordict_module._rnn_triton",
        {f"{cell}_triton": torchrl_function(cell) for cell in ("lstm", "gru")},
    ),
    "haste": (
        "haste_pytorch",
        {
            "LSTM": type("LSTM", (HasteLayer,), {"cell": "LSTM", "gates": [0, 2, 1, 3]}),
            "GRU": type("GRU", (HasteLayer,), {"cell": "GRU", "gates": [1, 0, 2]}),
        },
    ),
}


def peers_only(case: registry.GpuCase, mode: str) -> check.Entries:
    problem = peers.Problem(case)
    if case.variant == "resets":
        problem.arguments["resets"][3, 1] = True
    chosen = contenders.builders(case, [], False, 1.0, 0)
    with torch.set_grad_enabled(mode == "training"):
        return check.enter(problem, {name: chosen[name] for name in contenders.PEERS}, strict=False)


@pytest.mark.parametrize("variant", [None, "resets"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("mode", registry.SEQUENCE_MODES)
@pytest.mark.parametrize("peer", STAND_INS)
def test_peers_agree_with_fp64(peer, mode, cell, variant, monkeypatch):
    name, contents = STAND_INS[peer]
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(contenders, "gpu_backends", list)
    # FlashRNN multiplies fp32 in TF32, which the CPU does not: a case that is tf32 by name only.
    dtype = "tf32" if peer == "flashrnn" else "fp32"
    found = peers_only(registry.GpuCase(cell, "3x7x5x8", mode, dtype, variant, "small"), mode)
    if variant and peer != "torchrl":
        assert found.left_out[peer] == "has no resets"
    else:
        assert list(found.contenders) == [peer] and found.errors[peer] < 1e-6


def test_peers_say_why_they_do_not_take_part(monkeypatch):
    def fails(*_, **__):
        raise OSError("nvcc was not found\nand more")

    module = types.ModuleType("flashrnn")
    module.flashrnn = fails
    monkeypatch.setitem(sys.modules, "flashrnn", module)
    found = peers_only(registry.GpuCase("lstm", "3x7x5x8", "forward", "bf16", None, "cudnn"), "forward")
    assert found.left_out["flashrnn"] == "failed: OSError: nvcc was not found"
    assert found.left_out["haste"] == "not installed: haste_pytorch"
    assert found.left_out["torchrl"] == "not installed: torchrl"


# Exchange between blocks


@pytest.mark.parametrize(("words", "rounds"), [(4, 1), (36, 7), (1000, 20)])
def test_expected_sum(words, rounds):
    total = 0
    for t in range(1, rounds + 1):
        total = sum((i * 2654435761 + total + t) % 2**31 for i in range(words)) % 2**32
    assert exchange.expected_sum(words, rounds) == int(np.array([total], np.uint32).view(np.int32)[0])


def test_a_block_that_missed_a_word_is_found():
    one = exchange.Exchange("flags", 3, 4, rounds=2)
    sums = torch.full((3,), exchange.expected_sum(12, 2), dtype=torch.int32)
    exchange.check(one, sums)
    sums[1] += 1
    with pytest.raises(ValueError, match=r"method='flags'.*: wrong sum in blocks \[1\]"):
        exchange.check(one, sums)


def test_exchanges_hold_the_whole_vector():
    for (batch, hidden), of_size in exchange.exchanges(132).items():
        assert {e.method for e in of_size} == set(exchange.METHODS)
        for e in of_size:
            blocks = e.cluster if e.method == "cluster" else e.blocks
            assert e.slice % 4 == 0 and e.blocks % e.cluster == 0
            assert batch * hidden // 2 <= e.words < batch * hidden // 2 + 4 * blocks


def test_exchange_table():
    rows = [
        {"batch": 1, "hidden": 256, "method": "flags", "blocks": 132, "cluster": 1, "median": 1.234},
        {"batch": 16, "hidden": 768, "method": "flags", "blocks": 132, "cluster": 1, "failed": "wrong sum"},
        {"batch": 1, "hidden": 256, "method": "cluster", "blocks": 32, "cluster": 8, "left_out": "too large"},
    ]
    table = gpu_report.exchange_table(rows)
    assert "| one round, µs; B, H | 1, 256 | 16, 768 |" in table
    assert "| flags, 132 blocks | 1.23 | failed |" in table
    assert "| cluster, 4 clusters of 8 | – | – |" in table


# Results and tables


@pytest.mark.parametrize(
    ("device", "name"), [("NVIDIA H200", "nvidia-h200"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb")]
)
def test_file_of_a_gpu(device, name):
    assert gpu_results.slug(device) == name


def test_results_go_to_out_where_that_is_set(tmp_path, monkeypatch):
    parse = lambda: gpu_results.parser("x", "y").parse_args([]).out  # noqa: E731
    monkeypatch.delenv("OUT", raising=False)
    assert parse() == results.folder()
    monkeypatch.setenv("OUT", str(tmp_path))
    assert parse() == tmp_path


def test_a_session_goes_on_with_the_file_and_drops_runs_without_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRNN_BENCH_RESULTS", str(tmp_path / "committed"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_results, "describe", lambda device: RUN)
    first = gpu_results.Session.start(tmp_path / "committed")
    first.run_id = ID
    first.data["runs"] = {ID: RUN, "2026-01-01T00:00:00Z": RUN}
    first.add("a", {"suite": "step"})
    first.add("b", {"suite": "step"})
    second = gpu_results.Session.start(tmp_path / "out")
    second.add("b", {"suite": "norm"})
    second.add("b", {"suite": "norm"}, table="baselines")
    second.add_exchange([{"median": 1.0}])
    data = json.loads((tmp_path / "out" / "nvidia-h200.json").read_text())
    assert data["rows"] == {"a": {"run": ID, "suite": "step"}, "b": {"run": second.run_id, "suite": "norm"}}
    assert set(data["runs"]) == {ID, second.run_id} and data["exchange"]["run"] == second.run_id
    assert data["baselines"] == {"b": {"run": second.run_id, "suite": "norm"}}


def test_summary():
    """cuDNN twice and 4.5 times as slow: 3 on average; resets cost 10 and 21 %."""
    forward = [c for c in registry.cudnn() if (c.cell, c.dtype, c.mode) == ("gru", "bf16", "forward")][:2]
    masked = [c for c in registry.masks() if (c.variant, c.cell, c.mode) == ("resets", "lstm", "training")]
    data = measured(
        (case_of("headline"), row(case_of("headline"), fastrnn=0.001, torch=0.00215)),
        (forward[0], row(forward[0], fastrnn=0.001, torch=0.002)),
        (forward[1], row(forward[1], fastrnn=0.001, torch=0.0045, torchrl=0.02)),
        (masked[0], row(masked[0], fastrnn=0.0011, plain=0.001)),
        (masked[1], row(masked[1], fastrnn=0.00121, plain=0.001)),
        (case_of("step"), row(case_of("step"), fastrnn=2e-5, fastrnn_graph=8e-6, torch=4e-5)),
        (case_of("norm"), row(case_of("norm"), fastrnn=0.002, plain=0.001, compiled_loop=0.03)),
        (case_of("search"), row(case_of("search"), fastrnn=0.02, torch=0.05)),
    )
    text = gpu_report.summary(data)
    assert "NVIDIA H200, driver 580.1; torch 2.11.0; measured at abc on 2026-11-20." in text
    assert "copy 4000 GB/s, products fp32 50, bf16 800, fp16 800, tf32 400 TFLOP/s, from launch to launch 4 µs" in text
    assert "| cuDNN: LSTM fp16, one layer, B 16, T 1024, H 768 | 2.15 | – | 1 | cuda |" in text
    assert "| cuDNN: GRU bf16, B 1 to 128, H 256 to 2048, T 512 | 3.00 (2.00) | – | 2 | cuda |" in text
    assert "| loop compiled by torch.compile: LSTM bf16, layer norm | 15.00 | – | 1 | cuda |" in text
    assert "| TorchRL: GRU bf16, all cases it has | 20.00 | – | 1 | cuda |" in text
    assert "| LSTM, `resets`, H 512 and 1024 | – | 1.15 (1.21) | 2 | cuda |" in text
    assert "| LSTM, `layer_norm`, H 512 and 1024 | 2.00 | – | 1 | cuda |" in text
    assert "| LSTMCell bf16, B 1, I = H = 1024 | 20 | 8 | 40 | – | 5.69 | cuda |" in text
    assert "| fp16, B 1 | 2000 | 800 | 19166 | 848 |" in text
    details = "\n\n".join(gpu_report.details(data | {"exchange": {"run": ID, "rows": []}}))
    assert (
        "| lstm-16x1024x768x768-forward-fp16 | fastrnn, cuda | 1000 | 1000 to 1000 | 0.977 |  | 19% | 1.0e-03 |"
        in details
    )
    assert "* haste, not installed: haste_pytorch: lstm-16x1024x768x768-forward-fp16," in details
    assert f"## Failed in {ID}\n\n* lstm-bad: OSError: no" in details
    assert f"## Not run in {ID}, which had 60 s\n\ngru-late" in details


def test_a_gpu_has_its_tables_in_the_readme_only_when_it_has_results(tmp_path, monkeypatch):
    assert "GPU" not in report.readme_table([]) and "cuDNN" not in report.readme_table([])
    data = measured((case_of("headline"), row(case_of("headline"), fastrnn=0.001, torch=0.002)))
    text = report.readme_table([data])
    assert text.startswith("No results yet: `make bench` measures them.\n\nNVIDIA H200")
    assert "| cuDNN: LSTM fp16, one layer, B 16, T 1024, H 768 | 2.00 | – | 1 | cuda |" in text
    assert "NVIDIA" not in report.variants_page_table([data])
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "results")
    monkeypatch.setattr(report, "REPORT", tmp_path / "report")
    for name in ("README", "VARIANTS_PAGE"):
        page = tmp_path / getattr(report, name).name
        page.write_text(f"{report.BEGIN}\n{report.END}\n")
        monkeypatch.setattr(report, name, page)
    results.save(tmp_path / "results" / "nvidia-h200.json", data)
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    page = (tmp_path / "report" / "nvidia-h200.html").read_text()
    assert "<h1>fastrnn on nvidia-h200</h1>\n<p>NVIDIA H200" in page
    assert "<title>B 16, T 1024, H 768: cuDNN 2.00</title>" in page
    again = measured((case_of("headline"), row(case_of("headline"), fastrnn=0.0005, torch=0.002) | {"run": "later"}))
    compared = report.compare(data, again)
    assert "| lstm-16x1024x768x768-forward-fp16 | 1 | 0.5 | 2.00 | 0% | torch | 1.00 |" in compared


# Under compute-sanitizer


def test_tools_run_the_cases_with_fastrnns_kernels_alone(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cells.py").write_text("@triton.jit\ndef dot(x):\n    return x\n")
    (tmp_path / "kernels" / "step.py").write_text("@triton.jit\ndef fused_step(x):\n    dot(x)\n\ndef launch(): ...\n")
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    found = sanitize.command("/bin/sanitizer", "racecheck")
    assert found[:5] == ["/bin/sanitizer", "--tool", "racecheck", "--error-exitcode", "99"]
    assert found[5:9] == ["--kernel-name", "kns=fastrnn", "--kernel-name", "kns=fused_step"]
    assert found[9:] == [sys.executable, "-m", "bench.gpu.sanitize", "--cases"]


@pytest.mark.parametrize(
    ("script", "seconds", "problems"),
    [
        ("exit 0", 30, []),
        ("exit 99", 30, ["memcheck found errors", "racecheck found errors"]),
        ("exit 3", 30, ["memcheck ended with status 3", "racecheck ended with status 3"]),
        (
            "exec sleep 60",
            0,
            ["memcheck was not done in the 0 s that there were", "racecheck was not done in the 0 s that there were"],
        ),
    ],
    ids=["clean", "errors", "crash", "time is up"],
)
def test_what_the_tools_find(script, seconds, problems, tmp_path):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(f"#!/bin/sh\n{script}\n")
    sanitizer.chmod(0o755)
    assert sanitize.run_tools(str(sanitizer), seconds) == problems


def test_cases_under_the_tools_run(monkeypatch, capsys):
    """On the CPU's back end, without the exchange."""
    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    monkeypatch.setattr(sanitize, "METHODS", ())
    monkeypatch.setattr(sanitize, "gpu_backends", lambda: ["cpu", "aten"])
    assert sanitize.run_cases() > 60
    assert "aten, GRU fp16, B, T, H = (3, 4, 24), layer norm: backend 'aten' cannot compute" in capsys.readouterr().out
