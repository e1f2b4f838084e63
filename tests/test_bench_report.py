"""The benchmarks' results files, tables and checks; the tables in the pages are what bench/results gives."""

import html.parser
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import check, machine, page, peers, registry, report, results, timing

LSTM, STEP = registry.Case("lstm", "c", "forward"), registry.Case("gru", "step1", "step")
BF16 = registry.Case("lstm", "c", "training", "bf16")
RESETS, PACKED = (registry.Case("gru", "c", "training", "fp32", variant) for variant in ("resets", "packed"))
RUN = {"device": "Some CPU", "threads": 2, "isa": "avx2", "versions": {"torch": "2.13.0"}, "commit": "abc"}


def row(case: registry.Case, ours: float = 0.010, torch: float = 0.013, neighbours: float | None = 0.01, backend="cpu"):
    times = {"fastrnn": [ours] * 7, "torch": [torch] * 7}
    if case.baseline:
        times[case.baseline[0]] = [0.008] * 7
    if case.variant == "resets":
        del times["torch"]
        times["loop"] = [0.1] * 7
    rates = {"gflops": [540.0] * 7} if case.bound == "arithmetic" else {}
    entries = check.Entries({}, dict.fromkeys(times, 1e-7), {"jax": "not installed: jax"}, backend)
    return timing.make_row(case, times, rates, entries, neighbours)


def measured(*cases: registry.Case, run_id: str = "2026-11-20T10:00:00Z", **figures) -> dict:
    data = {"machine": "some-cpu-2t", "runs": {}, "rows": {}}
    for case in cases:
        data = results.merge(data, run_id, RUN, case, row(case, **figures))
    return data


def test_tables_are_what_the_results_give():
    assert report.main(["--check"]) == 0


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """README.md, docs/variants.md, results and report in a folder of their own, the pages without a table."""
    monkeypatch.delenv("FASTRNN_BENCH_RESULTS", raising=False)
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "results")
    monkeypatch.setattr(report, "REPORT", tmp_path / "report")
    for name in ("README", "VARIANTS_PAGE"):
        page = tmp_path / getattr(report, name).name
        page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
        monkeypatch.setattr(report, name, page)
    return tmp_path


@pytest.mark.parametrize(("page", "figure"), [("README", "1.30"), ("VARIANTS_PAGE", "1.25")])
def test_check_finds_a_typed_figure(page, figure, pages, capsys):
    results.save(pages / "results" / "some-cpu-2t.json", measured(LSTM, RESETS))
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    path = getattr(report, page)
    text = path.read_text()
    assert text.count(figure) == 1
    path.write_text(text.replace(figure, "1.31"))
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    err = capsys.readouterr().err
    assert err == f"{path.name}'s table is not what bench/results gives: run python -m bench.report\n"


class Outline(html.parser.HTMLParser):
    """Fails where an element is not closed in its turn, or loads anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.anchors, self.links, self.lines, self.rows = [], set(), set(), [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag not in ("script", "link", "img", "iframe", "object") and "src" not in given
        self.anchors.add(given.get("id"))
        self.links |= {given["href"]} if "href" in given else set()
        if tag == "tr":
            self.rows.append([])
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "polyline")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open and self.open[-1] != "tr":
            self.rows[-1].append(data)


def read_page(pages, name: str = "some-cpu-2t") -> Outline:
    text = (pages / "report" / f"{name}.html").read_text()
    outline = Outline(text)
    assert text.startswith("<!DOCTYPE html>") and "url(" not in text and "@import" not in text and "http" not in text
    assert outline.links and outline.links <= {f"#{anchor}" for anchor in outline.anchors}
    outline.text = text
    return outline


def test_report_writes_tables_and_page(pages):
    tmp_path = pages
    results.save(tmp_path / "results" / "some-cpu-2t.json", measured(LSTM, STEP))
    assert report.main([]) == 0
    readme = report.README.read_text()
    assert readme.startswith("above\n") and readme.endswith("\nbelow\n") and "old" not in readme
    assert "No results yet" in report.VARIANTS_PAGE.read_text()
    # 2*T*B*4H*(I+H) operations in 10 ms are 671 GFLOP/s, of a limit of 540.
    assert "| LSTM 16, 100, 512, 512 | 10 | 1.30 | 124% | – | – |" in readme
    assert "| GRUCell 1, 256, 256 | 10000 | 1.30 |" in readme
    assert "Some CPU, 2 threads, avx2; torch 2.13.0; measured at abc on 2026-11-20." in readme
    found = read_page(pages)
    assert ["LSTM 16, 100, 512, 512", "10", "1.30", "124%", "–", "–"] in found.rows
    run = "2026-11-20T10:00:00Z"
    assert ["lstm-c-forward-fp32", "fastrnn, cpu", "10", "10 to 10", "671 of 540 GFLOP/s", "1.0e-07", run] in found.rows
    assert [run, "abc", "torch 2.13.0"] in found.rows
    assert "<li>jax, not installed: jax: lstm-c-forward-fp32, gru-step1-step-fp32</li>" in found.text
    assert "<title>LSTM 16, 100, 512, 512: torch.nn 1.30</title>" in found.text
    assert "<title>LSTM 16, 100, 512, 512: fastrnn 124%</title>" in found.text
    assert {"recurrence", "steps"} < found.anchors and "search" not in found.anchors


def test_trials_elsewhere_leave_the_tables_alone(pages, monkeypatch):
    monkeypatch.setenv("FASTRNN_BENCH_RESULTS", str(pages / "trial"))
    results.save(pages / "trial" / "some-cpu-2t.json", measured(LSTM))
    report.write()
    assert "lstm-c-forward-fp32" in (pages / "report" / "some-cpu-2t.html").read_text()
    assert "\nold\n" in (pages / "README.md").read_text() and "\nold\n" in (pages / "variants.md").read_text()


def test_the_page_has_every_row_and_is_light(pages):
    """Of the results in the repository, and of costs that grow with the size."""
    run_id, data = "2026-11-22T10:00:00Z", results.load(report.ROOT / "bench" / "results" / "amd-epyc-2t.json")
    for case in registry.SUITES["scaling"]:
        data = results.merge(data, run_id, RUN, case, row(case, ours=case.flops / 5e11, torch=case.flops / 4e11))
    results.save(pages / "results" / "amd-epyc-2t.json", data)
    assert report.main([]) == 0
    found = read_page(pages, "amd-epyc-2t")
    assert len(found.text) < 1_000_000
    assert data["rows"].keys() <= {line[0] for line in found.rows}
    assert set(registry.SUITES) < found.anchors
    assert found.text.count("<polyline") == 2 * 3 * 2 * 2
    # 2*T*B*3H*(I+H) operations at 500 GFLOP/s; the middle is in all three figures.
    assert found.text.count("<title>GRU, fastrnn, 1024: 25.8</title>") == 2
    assert "forward, ms against T; B 16, H 256" in found.text


def test_figures_of_few_points(pages):
    """A lone size is no line, equal times have bars of no length."""
    case = registry.SUITES["scaling"][0]
    results.save(pages / "results" / "some-cpu-2t.json", measured(case, LSTM, ours=0.01, torch=0.01))
    assert report.main([]) == 0
    found = read_page(pages)
    assert "<polyline" not in found.text and 'width="0.0"' in found.text


def test_page_escapes_text():
    text = page.page("# a < b\n\n`x` & y\n\n## One, two\n\n| < | b |\n| :--- | ---: |\n| `c` |  |\n\n<p>as it is</p>")
    assert Outline(text).links == {"#one-two"}
    assert "<h1>a &lt; b</h1>" in text and "<p><code>x</code> &amp; y</p>" in text and "<p>as it is</p>" in text
    assert '<th scope="row"><code>c</code></th><td></td>' in text


def test_variants_have_a_table_of_their_own(pages):
    """8 ms the plain cell, 10 ms ours, 13 ms torch.nn's and 100 ms the loop's."""
    data = measured(LSTM, BF16, RESETS, PACKED, neighbours=0.3)
    results.save(pages / "results" / "some-cpu-2t.json", data)
    assert report.main([]) == 0
    readme, page = report.README.read_text(), report.VARIANTS_PAGE.read_text()
    assert "| fp32; B, T, I, H = 16, 100, 512, 512 | forward, ms | cost | training, ms | cost | torch.nn × |" in page
    assert "| GRU, `resets` at 2 % of the steps | – | – | 10 | 1.25 | – | 10.00 |\n" in page
    assert "| GRU, `PackedSequence`, lengths of 1 to T | – | – | 10 | 1.25 | 1.30 | – |\n" in page
    assert page.count("\n| GRU") == 2 and "LSTM" not in page and "plain" not in page
    assert "during gru-c-training-fp32-packed, gru-c-training-fp32-resets." in page
    assert "| bf16; B, T, I, H | forward, ms | of limit | training, ms | fastrnn fp32 × | torch.nn × |" in readme
    assert "| LSTM 16, 100, 512, 512 | – | – | 10 | 0.80 | 1.30 | 373% |\n" in readme
    assert "GRU" not in readme and "during lstm-c-forward-fp32, lstm-c-training-bf16." in readme
    found = read_page(pages)
    assert ["gru-c-training-fp32-resets", "plain", "8", "8 to 8", "0.80"] in [line[:5] for line in found.rows]
    assert "<title>GRU, resets at 2 % of the steps: plain cell 0.80</title>" in found.text


def test_a_variant_on_another_back_end_is_named():
    assert "| GRU, `resets` at 2 % of the steps (reference) |" in report.variants_page_table(
        [measured(RESETS, backend="reference")]
    )


def test_tables_name_the_runs_of_their_rows_only():
    data = results.merge(measured(LSTM), "2026-11-21T10:00:00Z", RUN | {"commit": "def"}, RESETS, row(RESETS))
    assert "measured at abc on 2026-11-20." in report.readme_table([data])
    assert "measured at def on 2026-11-21." in report.variants_page_table([data])


@pytest.mark.parametrize(
    "text",
    ["", report.BEGIN, f"{report.END} {report.BEGIN}", 2 * f"{report.BEGIN}{report.END}"],
    ids=["none", "begin only", "wrong order", "twice"],
)
def test_readme_without_its_markers_is_an_error(text):
    with pytest.raises(ValueError, match=r"README\.md must have <!-- bench:begin --> and after it"):
        report.with_table(text, "table", "README.md")


def test_no_results_yet():
    assert "make bench" in report.readme_table([])
    assert "make bench" in report.variants_page_table([measured(LSTM)])


def test_merging_replaces_whole_rows_and_drops_what_nothing_names():
    data = measured(LSTM, STEP)
    data["rows"]["lstm-gone-forward-fp32"] = {"run": "2026-11-20T10:00:00Z"}
    merged = results.merge(data, "2026-11-21T10:00:00Z", RUN | {"commit": "def"}, LSTM, row(LSTM, ours=0.005))
    assert list(merged["rows"]) == [LSTM.id, STEP.id]
    assert merged["rows"][LSTM.id] == {"run": "2026-11-21T10:00:00Z"} | row(LSTM, ours=0.005)
    assert merged["rows"][STEP.id] == data["rows"][STEP.id]
    assert "abc on 2026-11-20, def on 2026-11-21" in report.provenance(merged)
    first, second = merged["runs"].values()
    first["versions"], second["versions"] = {"torch": "2.12", "jax": "0.10"}, {"torch": "2.13"}
    assert "; torch 2.13, jax 0.10; measured" in report.provenance(merged)
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


def test_compare(pages, capsys):
    """LSTM in half the time, the variant in three times; torch and the plain cell as before; the step not anew."""
    old = measured(LSTM, RESETS, STEP)
    path = pages / "old.json"
    results.save(path, old)
    new, run_id = old, "2026-11-21T10:00:00Z"
    new = results.merge(new, run_id, RUN, LSTM, row(LSTM, ours=0.005))
    noisy = row(RESETS, ours=0.03)
    noisy["peers"]["fastrnn"] |= {"q20": 10.0, "q80": 60.0}
    new = results.merge(new, run_id, RUN, RESETS, noisy)
    results.save(pages / "results" / "some-cpu-2t.json", new)
    assert report.main(["--compare", str(path)]) == 0
    worse = ["gru-c-training-fp32-resets", "10", "30", "0.33", "167%, noise", "plain", "1.00"]
    better = ["lstm-c-forward-fp32", "10", "5", "2.00", "0%", "torch", "1.00"]
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[2:] == [worse, better]
    found = read_page(pages)
    assert found.rows[1:3] == [worse, better] and "compared" in found.anchors
    assert "measured again" in report.compare(old, old)
    with pytest.raises(ValueError, match="there are no results of another to compare with"):
        report.write(old | {"machine": "another"})


def test_options_name_what_exists():
    ids = [case.id for case in registry.chosen("steps,search", "step1,select-40")]
    assert ids == ["rnn-step1-step-fp32", "lstm-step1-step-fp32", "gru-step1-step-fp32", "search-select-40"]
    assert registry.chosen(None, None) == registry.all_cases()
    with pytest.raises(ValueError, match=r"^--suite must name some of recurrence, steps, .*, got 'nonsense'$"):
        command.main(["--suite", "steps,nonsense"])
    with pytest.raises(ValueError, match=r"^--shapes must name some of step1, step16, got 'a'$"):
        command.main(["--suite", "steps", "--shapes", "a"])


def test_interrupted_run_keeps_its_rows(tmp_path):
    """Progress in lines, since there is no terminal; no report, which would rewrite the pages."""
    environment = os.environ | {"FASTRNN_BENCH_RESULTS": str(tmp_path), "FASTRNN_BENCH_SECONDS": "0.5"}
    environment["OMP_WAIT_POLICY"] = "passive"  # beside other tests, threads that spin take a hundred times longer
    arguments = [sys.executable, "-m", "bench", "--suite", "steps", "-k", "rnn or lstm"]

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells have their background commands ignore it

    pipe = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": listen}
    run = subprocess.Popen(arguments, cwd=report.ROOT, env=environment, **pipe)
    for line in run.stdout:
        if "1/4" in line:
            run.send_signal(signal.SIGINT)
            break
    rest = run.stdout.read()
    assert run.wait() == pytest.ExitCode.INTERRUPTED
    assert re.match(r"lstm-step1-step-fp32: .* 1/4 \[\d+:\d+<\d+:\d+", line) and "wrote" not in rest
    (path,) = tmp_path.iterdir()
    assert list(results.load(path)["rows"]) == ["rnn-step1-step-fp32"]


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


def test_unknown_peer_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTRNN_BENCH_PEERS", "nonsense")
    with pytest.raises(ValueError, match=r"FASTRNN_BENCH_PEERS must name .*, got 'nonsense'"):
        peers.chosen_peers(LSTM)


def test_loops_run_where_they_are_wanted(monkeypatch):
    monkeypatch.delenv("FASTRNN_BENCH_PEERS", raising=False)
    assert "loop" not in peers.chosen_peers(LSTM) and "loop" in peers.chosen_peers(RESETS)
    monkeypatch.setenv("FASTRNN_BENCH_PEERS", "compiled_loop")
    for case in (LSTM, RESETS):
        assert peers.chosen_peers(case) == ["fastrnn", "torch", "compiled_loop"]


def test_cases():
    ids = [case.id for case in registry.all_cases()]
    assert len(set(ids)) == len(ids)
    assert {"rnn-a-forward-fp32", "gru-e-training-bf16", "lstm-step16-step-fp32"} < set(ids)
    assert "lstm-c-training-fp32-layer_norm" in ids
    assert "lstm-c-forward-fp32-peephole" in ids and "gru-c-forward-fp32-peephole" not in ids
    assert "gru-c-forward-fp32-reset_before" in ids and "lstm-c-forward-fp32-reset_before" not in ids
    assert not [id for id in ids if "forward" in id and id.endswith("dropout")]
    assert LSTM.baseline is None
    assert BF16.baseline == ("fp32", registry.Case("lstm", "c", "training"))
    assert RESETS.baseline == ("plain", registry.Case("gru", "c", "training"))


def test_operations_and_bytes():
    assert LSTM.flops == 2 * 100 * 16 * 4 * 512 * (512 + 512)
    assert registry.Case("lstm", "c", "training").flops == 3 * LSTM.flops
    assert registry.Case("gru", "b", "forward").streamed_bytes == 100 * 3 * 1024 * 1024 * 4
    assert [registry.Case("rnn", shape, "forward").bound for shape in "abcde"] == ["weights"] * 2 + ["arithmetic"] * 3
    assert STEP.bound == "latency"
    assert BF16.weight_bytes == 4 * 512 * 512 * 2
    assert (RESETS.lengths == 100).all() and RESETS.flops == registry.Case("gru", "c", "training").flops
    assert 1 <= PACKED.lengths.min() and PACKED.lengths.max() <= 100 and len(PACKED.lengths.unique()) > 8
    assert PACKED.flops == RESETS.flops * PACKED.lengths.sum().item() // 1600


SMALL = registry.Shape(3, 11, 4, 6)


@pytest.fixture
def small(monkeypatch):
    """Every case at one small shape."""
    monkeypatch.setitem(registry.SHAPES, "small", SMALL)
    monkeypatch.setitem(registry.STEP_SHAPES, "small", SMALL)
    monkeypatch.setattr(registry, "VARIANT_SHAPE", "small")


@pytest.mark.parametrize("peer", [name for name in peers.PEERS if name != "compiled_loop"])
@pytest.mark.parametrize("mode", registry.MODES)
@pytest.mark.parametrize("cell", registry.GATES)
def test_peers_agree_with_fp64(cell, mode, peer, small, monkeypatch):
    monkeypatch.setenv("FASTRNN_BENCH_PEERS", peer)
    problem = peers.Problem(registry.Case(cell, "small", mode))
    entries = check.enter(problem)
    assert entries.backend in ("cpu", "reference")
    if peer in entries.left_out:
        assert not entries.left_out[peer].startswith("wrong")
        pytest.skip(entries.left_out[peer])
    assert set(entries.contenders) == {"fastrnn", "torch", peer}
    assert all(error < 1e-5 for error in entries.errors.values())


@pytest.mark.parametrize("id", [case.id for case in registry.variant_cases()])
def test_variants_agree_with_fp64(id, small, monkeypatch):
    monkeypatch.delenv("FASTRNN_BENCH_PEERS", raising=False)
    case = next(case for case in registry.variant_cases() if case.id == id.replace("-c-", "-small-"))
    problem = peers.Problem(case)
    if case.variant == "resets":
        assert problem.arguments["resets"].any()
    with torch.set_grad_enabled(case.mode == "training"):
        entries = check.enter(problem)
    assert not [reason for reason in entries.left_out.values() if reason.startswith("wrong")]
    assert next(iter(entries.contenders)) == "fastrnn" and {"plain", "loop"} < set(entries.contenders)
    assert ("torch" in entries.contenders) == (case.variant in ("lengths", "full_lengths", "packed"))
    assert all(error < 1e-5 for error in entries.errors.values())


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("cell", registry.GATES)
def test_bf16_agrees_with_fp64(cell, mode, small, monkeypatch):
    monkeypatch.delenv("FASTRNN_BENCH_PEERS", raising=False)
    with torch.set_grad_enabled(mode == "training"):
        entries = check.enter(peers.Problem(registry.Case(cell, "small", mode, "bf16")))
    assert not [reason for reason in entries.left_out.values() if reason.startswith("wrong")]
    assert list(entries.contenders)[:2] == ["fastrnn", "torch"] and "fp32" in entries.contenders
    assert entries.errors["fp32"] < 1e-5 < entries.errors["torch"] < 0.05


def test_variants_are_not_the_plain_cell(small):
    """Each option makes a difference to what is checked, so that a peer without it would be found wrong."""
    for case in registry.variant_cases():
        with torch.set_grad_enabled(case.mode == "training"):
            variant, plain = (peers.Problem(c).reference() for c in (case, case.baseline[1]))
        if case.variant == "packed":
            assert len(variant["y"]) == case.lengths.sum()
        else:
            difference = (variant["y"] - plain["y"]).abs().max().item()
            assert difference < 1e-12 if case.variant == "full_lengths" else difference > 1e-3


def test_a_loop_with_other_masks_is_left_out(small, monkeypatch):
    masks = peers.Problem.zoneout_masks
    monkeypatch.setattr(peers.Problem, "zoneout_masks", lambda problem: ~masks(problem))
    monkeypatch.setenv("FASTRNN_BENCH_PEERS", "loop")
    entries = check.enter(peers.Problem(registry.Case("gru", "small", "training", "fp32", "zoneout")))
    assert entries.left_out["loop"].startswith("wrong result: y is off by")


def test_compiling_has_a_limit():
    """The limit goes off on an alarm, and gives back the alarm that it found."""
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with pytest.raises(peers.Unsupported, match=r"torch\.compile takes more than 0\.1 s"):
            peers._compile(peers.Contender(lambda: time.sleep(10), dict), 0.1)
        with pytest.raises(peers.Unsupported, match=r"torch\.compile failed: ZeroDivisionError"):
            peers._compile(peers.Contender(lambda: 1 / 0, dict), 10)
        peers._compile(peers.Contender(lambda: None, dict), 10)
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        signal.raise_signal(signal.SIGALRM)
        assert rung == [True]
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, handler)


def test_a_wrong_peer_is_not_timed(small, monkeypatch):
    """Wrong in one weight of gate g: too little to see in a time, far more than rounding."""

    def tampered(problem: peers.Problem) -> peers.Contender:
        layer = peers.make_layer(torch.nn, problem.case)
        layer.load_state_dict(problem.layer.state_dict())
        with torch.no_grad():
            layer.weight_hh_l0[2 * SMALL.hidden_size, 0] += 0.01
        return peers.torch_contender(layer, problem.case.mode, problem.x, problem.state, problem.grad_y, {})

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
        assert all(r["run"] in data["runs"] for r in data["rows"].values())
        if data.get("kind") != "gpu":
            assert all("fastrnn" in r["peers"] for r in data["rows"].values())
            assert not [run for run in data["runs"].values() if run["isa"] == "none"]
