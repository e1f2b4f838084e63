"""The benchmarks' results files, tables and checks; README.md's table is what bench/results gives."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import check, machine, peers, registry, report, results, timing

LSTM, STEP = registry.Case("lstm", "c", "forward"), registry.Case("gru", "step1", "step")
RUN = {"device": "Some CPU", "threads": 2, "isa": "avx2", "versions": {"torch": "2.13.0"}, "commit": "abc"}


def row(case: registry.Case, ours: float = 0.010, torch: float = 0.013, neighbours: float | None = 0.01, backend="cpu"):
    times = {"fastrnn": [ours] * 7, "torch": [torch] * 7}
    rates = {"gflops": [540.0] * 7} if case.bound == "arithmetic" else {}
    entries = check.Entries({}, dict.fromkeys(times, 1e-7), {"jax": "not installed: jax"}, backend)
    return timing.make_row(case, times, rates, entries, neighbours)


def measured(*cases: registry.Case, run_id: str = "2026-11-20T10:00:00Z", **figures) -> dict:
    data = {"machine": "some-cpu-2t", "runs": {}, "rows": {}}
    for case in cases:
        data = results.merge(data, run_id, RUN, case, row(case, **figures))
    return data


def test_readme_table_is_what_the_results_give():
    assert report.main(["--check"]) == 0


def test_check_finds_a_typed_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTRNN_BENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    results.save(tmp_path / "results" / "some-cpu-2t.json", measured(LSTM))
    text = report.with_table(f"# x\n{report.BEGIN}{report.END}\nend\n", report.readme_table([measured(LSTM)]))
    report.README.write_text(text)
    assert report.main(["--check"]) == 0
    report.README.write_text(text.replace("1.30", "1.31"))
    assert report.main(["--check"]) == 1
    assert "run python -m bench.report" in capsys.readouterr().err


def test_report_writes_table_details_and_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRNN_BENCH_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "REPORT", tmp_path / "report")
    results.save(tmp_path / "results" / "some-cpu-2t.json", measured(LSTM, STEP))
    report.README.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    assert report.main([]) == 0
    readme = report.README.read_text()
    assert readme.startswith("above\n") and readme.endswith("\nbelow\n") and "old" not in readme
    # 2*T*B*4H*(I+H) operations in 10 ms are 671 GFLOP/s, of a limit of 540.
    assert "| LSTM 16, 100, 512, 512 | 10 | 1.30 | 124% | – | – |" in readme
    assert "| GRUCell 1, 256, 256 | 10000 | 1.30 |" in readme
    assert "Some CPU, 2 threads, avx2; torch 2.13.0; measured at abc on 2026-11-20." in readme
    details = (tmp_path / "report" / "some-cpu-2t.md").read_text()
    assert "| lstm-c-forward-fp32 | fastrnn, cpu | 10 | 10 to 10 |  | 671 of 540 GFLOP/s | 1.0e-07 |" in details
    assert "* jax, not installed: jax: lstm-c-forward-fp32, gru-step1-step-fp32\n" in details
    assert (tmp_path / "report" / "some-cpu-2t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "text",
    ["", report.BEGIN, f"{report.END} {report.BEGIN}", 2 * f"{report.BEGIN}{report.END}"],
    ids=["none", "begin only", "wrong order", "twice"],
)
def test_readme_without_its_markers_is_an_error(text):
    with pytest.raises(ValueError, match=r"README\.md must have <!-- bench:begin --> and after it"):
        report.with_table(text, "table")


def test_no_results_yet():
    assert "make bench" in report.readme_table([])


def test_merging_replaces_whole_rows_and_drops_what_nothing_names():
    data = measured(LSTM, STEP)
    data["rows"]["lstm-gone-forward-fp32"] = {"run": "2026-11-20T10:00:00Z"}
    merged = results.merge(data, "2026-11-21T10:00:00Z", RUN | {"commit": "def"}, LSTM, row(LSTM, ours=0.005))
    assert list(merged["rows"]) == [LSTM.id, STEP.id]
    assert merged["rows"][LSTM.id] == {"run": "2026-11-21T10:00:00Z"} | row(LSTM, ours=0.005)
    assert merged["rows"][STEP.id] == data["rows"][STEP.id]
    assert "abc on 2026-11-20, def on 2026-11-21" in report.provenance(merged)
    merged = results.merge(merged, "2026-11-21T10:00:00Z", RUN | {"commit": "def"}, STEP, row(STEP))
    assert list(merged["runs"]) == ["2026-11-21T10:00:00Z"]


def test_disturbed_rows_are_named():
    assert "Other processes" not in report.provenance(measured(LSTM, neighbours=None))
    assert report.provenance(measured(LSTM, neighbours=0.3)).endswith("of the CPU during lstm-c-forward-fp32.")


def test_another_back_end_is_named():
    table = report.readme_table([measured(LSTM, STEP, backend="reference")])
    assert "| LSTM 16, 100, 512, 512 (reference) |" in table
    assert "| GRUCell 1, 256, 256 (reference) |" in table


def test_neighbours_are_seen():
    alone = machine.Neighbours()
    if alone.share() is None:
        pytest.skip("no /proc/stat")
    others = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        seen = machine.Neighbours()
        time.sleep(1.0)
        share = seen.share()
    finally:
        others.kill()
        others.wait()
    assert 0.2 / os.cpu_count() < share <= 1.05


def test_compare(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results.save(old, measured(LSTM, STEP, ours=0.010, torch=0.02))
    results.save(new, measured(LSTM, ours=0.005, torch=0.01))
    assert report.main(["--compare", str(old), str(new)]) == 0
    assert "| lstm-c-forward-fp32 | 10 | 5 | 2.00 | 2.00 | 2.00 | 2.00 |" in capsys.readouterr().out
    assert "no case in common" in report.compare(measured(STEP), measured(LSTM))


def test_a_file_that_is_no_results_file(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": {}}))
    with pytest.raises(ValueError, match="must be a results file with machine, runs and rows"):
        results.load(path)


@pytest.mark.parametrize(
    ("device", "cap", "name"),
    [
        ("AMD EPYC", None, "amd-epyc-2t"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", None, "intel-xeon-platinum-8481c-2t"),
        ("AMD EPYC 9B14 96-Core Processor", "avx2", "amd-epyc-9b14-2t-avx2"),
    ],
)
def test_machine_slug(device, cap, name):
    assert machine.slug(device, 2, cap) == name


@pytest.mark.parametrize(("variable", "choose"), [("SHAPES", registry.chosen_cases), ("PEERS", peers.chosen_peers)])
def test_unknown_selection_is_an_error(variable, choose, monkeypatch):
    monkeypatch.setenv(f"FASTRNN_BENCH_{variable}", "nonsense")
    with pytest.raises(ValueError, match=f"FASTRNN_BENCH_{variable} must name .*, got 'nonsense'"):
        choose()


def test_operations_and_bytes():
    assert LSTM.flops == 2 * 100 * 16 * 4 * 512 * (512 + 512)
    assert registry.Case("lstm", "c", "training").flops == 3 * LSTM.flops
    assert registry.Case("gru", "b", "forward").streamed_bytes == 100 * 3 * 1024 * 1024 * 4
    assert [registry.Case("rnn", shape, "forward").bound for shape in "abcde"] == ["weights"] * 2 + ["arithmetic"] * 3
    assert STEP.bound == "latency"


SMALL = registry.Shape(3, 5, 4, 6)


@pytest.mark.parametrize("peer", [name for name in peers.PEERS if name != "compiled_loop"])
@pytest.mark.parametrize("mode", registry.MODES)
@pytest.mark.parametrize("cell", registry.GATES)
def test_peers_agree_with_fp64(cell, mode, peer, monkeypatch):
    monkeypatch.setitem(registry.SHAPES, "small", SMALL)
    monkeypatch.setitem(registry.STEP_SHAPES, "small", SMALL)
    monkeypatch.setenv("FASTRNN_BENCH_PEERS", peer)
    problem = peers.Problem(registry.Case(cell, "small", mode))
    entries = check.enter(problem)
    assert entries.backend in ("cpu", "reference")
    if peer in entries.left_out:
        assert not entries.left_out[peer].startswith("wrong")
        pytest.skip(entries.left_out[peer])
    assert set(entries.contenders) == {"fastrnn", "torch", peer}
    assert all(error < 1e-5 for error in entries.errors.values())


def test_a_wrong_peer_is_not_timed(monkeypatch):
    """Wrong in one weight of gate g: too little to see in a time, far more than rounding."""

    def tampered(problem: peers.Problem) -> peers.Contender:
        layer = peers.make_layer(torch.nn, problem.case)
        layer.load_state_dict(problem.layer.state_dict())
        with torch.no_grad():
            layer.weight_hh_l0[2 * SMALL.hidden_size, 0] += 0.01
        return peers.torch_contender(layer, problem.case.mode, problem.x, problem.state, problem.grad_y)

    monkeypatch.setitem(registry.SHAPES, "small", SMALL)
    problem = peers.Problem(registry.Case("lstm", "small", "training"))
    monkeypatch.setitem(peers.PEERS, "jax", tampered)
    monkeypatch.setenv("FASTRNN_BENCH_PEERS", "jax")
    entries = check.enter(problem)
    assert "jax" not in entries.contenders
    assert entries.left_out["jax"].startswith("wrong result: y is off by")
    monkeypatch.setitem(peers.PEERS, "fastrnn", tampered)
    with pytest.raises(check.WrongResult, match="lstm-small-training-fp32: fastrnn is not timed: y is off by"):
        check.enter(problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_no_rounding(value):
    reference = {"y": torch.ones(2, dtype=torch.float64)}
    found = check.errors({"y": torch.tensor([1.0, value])}, reference)
    with pytest.raises(check.WrongResult, match="y is off by"):
        check.check("torch", found, {}, reference, torch.finfo(torch.float32).eps)
    with pytest.raises(check.WrongResult, match="y is off by"):
        check.check("fastrnn", found, {"y": 1e-7}, reference, torch.finfo(torch.float32).eps)


def test_a_missing_or_misshapen_result_is_wrong():
    reference = {"y": torch.ones(2), "h_n": torch.ones(1)}
    with pytest.raises(check.WrongResult, match="results must be y, h_n, got y"):
        check.errors({"y": torch.ones(2)}, reference)
    with pytest.raises(check.WrongResult, match=r"h_n must have shape \(1,\), got \(2,\)"):
        check.errors({"y": torch.ones(2), "h_n": torch.ones(2)}, reference)


class Benchmark:
    """pytest-benchmark's fixture as far as it matters: a round of target calls, then the teardown."""

    enabled = True

    def pedantic(self, target, *, teardown, rounds, iterations, warmup_rounds):
        self.rounds = rounds
        for _ in range(warmup_rounds + rounds + (iterations > 1)):
            for _ in range(iterations):
                target()
            teardown()

    @property
    def stats(self):
        class Stats:
            data = [0.5] * self.rounds

        Stats.stats = Stats
        return Stats


def test_every_contender_takes_its_turn_in_every_round():
    turns = []
    contenders = {name: (lambda name=name: turns.append(name)) for name in ("ours", "one", "two", "three")}
    counter = itertools.count()
    times, rates = timing.interleave(Benchmark(), contenders, {"rate": lambda: next(counter)}, seconds=0.01)
    assert all(len(samples) == timing.MIN_ROUNDS for samples in times.values())
    assert rates["rate"] == list(range(1, 1 + timing.MIN_ROUNDS))
    order = [name for name, _ in itertools.groupby(turns)]
    rounds = [set(order[i : i + 4]) for i in range(len(order) - 4 * timing.MIN_ROUNDS, len(order), 4)]
    assert all(names == set(contenders) for names in rounds)


def test_results_in_the_repository_are_complete():
    for data in results.load_all(Path(report.ROOT) / "bench" / "results"):
        assert all(r["run"] in data["runs"] and "fastrnn" in r["peers"] for r in data["rows"].values())
        assert not [run for run in data["runs"].values() if run["isa"] == "none"]
