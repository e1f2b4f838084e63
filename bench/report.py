"""Tables and figures of bench/results/*.json.

python -m bench.report                write bench/report/<machine>.html and the tables in README.md and docs/variants.md
python -m bench.report --check        fail where one of these tables is not what the results give
python -m bench.report --compare OLD  with an earlier results file beside the present one of the same machine
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import figures, results
from bench.gpu import report as gpu
from bench.machine import ROOT
from bench.page import page
from bench.registry import (
    DTYPES,
    GATES,
    MIDDLE,
    SCALING,
    SHAPES,
    SUITES,
    VARIANT_SHAPE,
    VARIANTS,
    AnyCase,
    AttentionCase,
    Case,
    SearchCase,
    scaling_case,
)
from bench.tables import markdown, three

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = ROOT / "README.md"
VARIANTS_PAGE = ROOT / "docs" / "variants.md"
REPORT = ROOT / "bench" / "report"
NAMES = {
    "plain": "plain cell",
    "tiled": "tiled memory",
    "model": "model alone",
    "live": "live steps alone",
    "fp32": "fastrnn fp32",
    "torch": "torch.nn",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "jax": "JAX",
    "loop": "Python loop",
    "compiled_loop": "compiled loop",
}
EXPLANATION = """
A time is the median over the rounds; "×" is a peer's time over fastrnn's, more than 1 where fastrnn is faster.
"Of limit" is fastrnn's share of what the machine can do, measured in the same rounds: its rate of FMA on registers,
or at B = 1 that of reading the weights over and over. bench/README.md says how all of it is measured.
""".strip()
# Rows where others had more than this share of the CPUs are named: torch.nn then takes up to a hundred times longer.
NEIGHBOURS_ALLOWED = 0.05
Row = dict[str, Any]


def _backend(rows: Iterable[Row | None]) -> str:
    """What fastrnn ran on, where it was not its CPU kernels alone."""
    backends = dict.fromkeys(row["backend"] for row in rows if row is not None)
    return "" if list(backends) == ["cpu"] else f" ({', '.join(backends)})"


def _times(row: Row | None, peers: Sequence[str], unit: float = 1.0) -> list[str]:
    """Our median, then by what factor each peer's is larger; a dash for what was not measured."""
    if row is None:
        return ["–"] * (1 + len(peers))
    ratios = [f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else "–" for peer in peers]
    return [three(unit * row["peers"]["fastrnn"]["median"]), *ratios]


def _fraction(row: Row | None) -> str:
    return "–" if row is None or "fraction" not in row else f"{row['fraction']:.0%}"


def _compared(rows: Iterable[Row | None]) -> list[str]:
    """The peers that any of these rows compares with, in the order of NAMES."""
    present = {peer for row in rows if row is not None for peer in row["ratios"]}
    return [peer for peer in NAMES if peer in present]


def label_of(case: AnyCase) -> str:
    """How tables and figures call a case."""
    if isinstance(case, AttentionCase):
        batch = f"{case.memories} × {case.beams}" if case.beams > 1 else f"{case.memories}"
        return f"{case.title} {batch}, {case.queries}, {case.keys}, {case.size}"
    if isinstance(case, SearchCase):
        return case.title
    if case.variant:
        return f"{case.cell.upper()}, {VARIANTS[case.variant].title}"
    if case.mode == "step":
        return f"{case.cell.upper()}Cell {case.size.batch}, {case.size.input_size}, {case.size.hidden_size}"
    return f"{case.cell.upper()} {', '.join(map(str, case.size))}"


def _cases(suite: str, **wanted: str) -> list[Any]:
    """The suite's cases with these properties, cell by cell."""
    cases = [case for case in SUITES[suite] if all(getattr(case, name) == value for name, value in wanted.items())]
    return sorted(cases, key=lambda case: list(GATES).index(case.cell) if isinstance(case, Case) else 0)


def _measured(suite: str, rows: dict[str, Row], **wanted: str) -> list[tuple[Any, Row]]:
    """These cases with their rows, where there are some."""
    return [(case, rows[case.id]) for case in _cases(suite, **wanted) if case.id in rows]


def _pairs(suite: str, rows: dict[str, Row], dtype: str) -> dict[str, list[Row | None]]:
    """By label: the rows in modes forward and training, where there is one of them."""
    lines = {}
    for case in _cases(suite, dtype=dtype):
        pair = [rows.get(replace(case, mode=mode).id) for mode in ("forward", "training")]
        if any(pair):
            lines[f"{label_of(case)}{_backend(pair)}"] = pair
    return lines


def sequence_table(rows: dict[str, Row], dtype: str, suite: str = "recurrence") -> str | None:
    """Whole sequences, forward and training, a line for each cell and shape."""
    lines = _pairs(suite, rows, dtype)
    if not lines:
        return None
    forward, training = (_compared(pair[mode] for pair in lines.values()) for mode in (0, 1))
    header = [f"{dtype}; B, T, I, H", "forward, ms", *(f"{NAMES[peer]} ×" for peer in forward), "of limit"]
    header += ["training, ms", *(f"{NAMES[peer]} ×" for peer in training), "of limit"]
    return markdown(
        header,
        (
            [label, *_times(pair[0], forward), _fraction(pair[0]), *_times(pair[1], training), _fraction(pair[1])]
            for label, pair in lines.items()
        ),
    )


def scaling_table(rows: dict[str, Row], dtype: str) -> str | None:
    """The same of the shapes that costs are drawn against."""
    return sequence_table(rows, dtype, "scaling")


def variant_table(rows: dict[str, Row], dtype: str) -> str | None:
    """The variants, forward and training: our median, over that of the plain cell, and the peers' over ours."""
    lines = _pairs("variants", rows, dtype)
    if not lines:
        return None
    header = [f"{dtype}; B, T, I, H = {', '.join(map(str, SHAPES[VARIANT_SHAPE]))}"]
    body = [[label] for label in lines]
    for mode, name in enumerate(("forward", "training")):
        peers = [peer for peer in _compared(pair[mode] for pair in lines.values()) if peer != "plain"]
        header += [f"{name}, ms", "cost", *(f"{NAMES[peer]} ×" for peer in peers)]
        for line, pair in zip(body, lines.values(), strict=True):
            time, *ratios = _times(pair[mode], peers)
            line += [time, _cost(pair[mode]), *ratios]
    return markdown(header, body)


def _cost(row: Row | None) -> str:
    return "–" if row is None else f"{1 / row['ratios']['plain']:.2f}"


def step_table(rows: dict[str, Row], dtype: str) -> str | None:
    """Single calls of the cells."""
    lines = {
        f"{label_of(case)}{_backend([row])}": row for case in _cases("steps", dtype=dtype) if (row := rows.get(case.id))
    }
    if not lines:
        return None
    peers = _compared(lines.values())
    return markdown(
        [f"{dtype}; B, I, H", "one step, µs", *(f"{NAMES[peer]} ×" for peer in peers)],
        ([label, *_times(row, peers, unit=1e3)] for label, row in lines.items()),
    )


def attention_table(rows: dict[str, Row], dtype: str) -> str | None:
    """Attention: our median, torch's operators and the tiled memory over it, and the share of the reading bandwidth."""
    body = []
    for case, row in _measured("attention", rows, dtype=dtype):
        rate = f"{row['gbytes']:.0f}" if "gbytes" in row else "–"
        label = f"{case.title}{_backend([row])}{label_of(case).removeprefix(case.title)}"
        body.append([label, *_times(row, ["torch", "tiled"]), rate, _fraction(row)])
    header = [
        f"attention, {dtype}; B × beams, Tq, Tk, D",
        "ms",
        "torch's operators ×",
        "tiled memory ×",
        "GB/s",
        "of limit",
    ]
    return markdown(header, body) if body else None


def search_table(rows: dict[str, Row], dtype: str) -> str | None:
    """Search: our median, torch's operators over it, and what is not the model's own work."""
    body = []
    for case, row in _measured("search", rows, dtype=dtype):
        label = f"{case.title}{_backend([row])}" if row["backend"] else case.title
        rate = f"{row['gbytes']:.0f}" if "gbytes" in row else "–"
        time, ratio, of_model, of_live = _times(row, ["torch", "model", "live"])
        body.append([label, time, ratio, rate, of_model, of_live])
    header = [f"search, {dtype}, 5 beams", "ms", "torch's operators ×", "GB/s", "model alone ×", "live steps alone ×"]
    return markdown(header, body) if body else None


def provenance(data: dict[str, Any]) -> str:
    """Device, instruction set, versions, commits and dates of all rows of one machine."""
    newest = data["runs"][max(data["runs"])]
    versions: dict[str, str] = {}  # a run of some suites has others than one of all; of each package the newest
    for _, run in sorted(data["runs"].items()):
        versions |= run["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    commits = dict.fromkeys(f"{run['commit']} on {id[:10]}" for id, run in data["runs"].items())
    disturbed = [id for id, row in data["rows"].items() if (row["neighbours"] or 0) > NEIGHBOURS_ALLOWED]
    warning = f" Other processes took part of the CPU during {', '.join(disturbed)}." if disturbed else ""
    device = f"{newest['device']}, {newest['threads']} threads, {newest['isa']}"
    return f"{device}; {packages}; measured at {', '.join(commits)}.{warning}"


def _of(data: dict[str, Any], suites: Iterable[str]) -> dict[str, Any]:
    """The results of these suites only."""
    rows = {case.id: data["rows"][case.id] for name in suites for case in SUITES[name] if case.id in data["rows"]}
    used = {row["run"] for row in rows.values()}
    return data | {"rows": rows, "runs": {id: run for id, run in data["runs"].items() if id in used}}


# By suite, of the rows of one dtype; None where there are none.
TABLES: dict[str, Callable[[dict[str, Row], str], str | None]] = {
    "recurrence": sequence_table,
    "steps": step_table,
    "variants": variant_table,
    "attention": attention_table,
    "search": search_table,
    "scaling": scaling_table,
}


def _tables(files: Sequence[dict[str, Any]], suites: Sequence[str]) -> str:
    parts = []
    for data in (_of(data, suites) for data in files):
        if data["rows"]:
            tables = [TABLES[suite](data["rows"], dtype) for dtype in DTYPES for suite in suites]
            parts += [provenance(data), *(table for table in tables if table)]
    return "\n\n".join(parts) if parts else "No results yet: `make bench` measures them."


def readme_table(files: Sequence[dict[str, Any]]) -> str:
    """What stands between README.md's markers."""
    cpus = [data for data in files if not gpu.is_gpu(data)]
    parts = [_tables(cpus, ["recurrence", "steps"])]
    parts += [
        _tables([data], [suite]) for suite in ("attention", "search") for data in cpus if _of(data, [suite])["rows"]
    ]
    return "\n\n".join([*parts, *(gpu.summary(data) for data in files if gpu.is_gpu(data))])


def variants_page_table(files: Sequence[dict[str, Any]]) -> str:
    """What stands between the markers of docs/variants.md."""
    return _tables([data for data in files if not gpu.is_gpu(data)], ["variants"])


def with_table(text: str, table: str, page: str) -> str:
    """The page's text with the table between its markers; ValueError where it does not have both once, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"{page} must have {BEGIN} and after it {END}, each once")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def _figures(suite: str, rows: dict[str, Row]) -> list[str]:
    if suite == "scaling":
        return cost_figures(rows)
    groups: dict[str, dict[str, Row]] = {}
    for case, row in _measured(suite, rows):
        title = f"{case.mode}, {case.dtype}" if isinstance(case, Case) else suite
        groups.setdefault(title, {})[label_of(case).replace("`", "")] = row
    of_torch = {} if suite in ("recurrence", "steps", "variants") else {"torch": "torch's operators"}
    return figures.of_rows(groups, NAMES | of_torch)


def cost_figures(rows: dict[str, Row]) -> list[str]:
    """Time against T, B and H, fastrnn's and torch.nn's."""
    drawn = []
    for mode in ("forward", "training"):
        for size, shapes in SCALING.items():
            curves = {}
            for cell, colour in (("lstm", figures.COLOURS[6]), ("gru", figures.COLOURS[5])):
                found = {x: rows.get(scaling_case(cell, shape, mode).id) for x, shape in shapes.items()}
                for peer, name in (("fastrnn", "fastrnn"), ("torch", NAMES["torch"])):
                    points = {x: row["peers"][peer]["median"] for x, row in found.items() if row}
                    curves[f"{cell.upper()}, {name}"] = figures.Line(colour, peer == "torch", points)
            if all(len(line.points) > 1 for line in curves.values()):
                sizes = {"B": MIDDLE.batch, "T": MIDDLE.steps, "H": MIDDLE.hidden_size}
                others = ", ".join(f"{name} {value}" for name, value in sizes.items() if name != size)
                drawn.append(figures.lines(f"{mode}, ms against {size}; {others}", curves, three))
    return drawn


def _all_rows(data: dict[str, Any]) -> list[str]:
    """Every row with every peer's median, spread and error, and who was left out why."""
    lines = []
    left_out: dict[str, list[str]] = {}
    for id, row in data["rows"].items():
        rate = ""
        for unit, name in (("gflops", "GFLOP/s"), ("gbytes", "GB/s")):
            if unit in row:
                rate = f"{row[unit]:.0f}" + (f" of {row['limit']:.0f}" if "limit" in row else "") + f" {name}"
        for peer, times in row["peers"].items():
            median, low, high = (f"{times[key]:.4g}" for key in ("median", "q20", "q80"))
            ratio = f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else ""
            error = f"{times['error']:.1e}"
            name = f"fastrnn, {row['backend']}" if peer == "fastrnn" else peer
            lines.append([id, name, median, f"{low} to {high}", ratio, rate, error, row["run"]])
            rate = ""
        for peer, reason in row["left_out"].items():
            left_out.setdefault(f"{peer}, {reason}", []).append(id)
    header = ["case", "peer", "median, ms", "20 to 80 %", "× ours", "rate", "largest error", "run"]
    missing = "\n".join(f"* {reason}: {', '.join(ids)}" for reason, ids in left_out.items())
    return ["## All rows", markdown(header, lines), *(["## Left out", missing] if missing else [])]


def details(data: dict[str, Any]) -> list[str]:
    """The blocks of a CPU's page."""
    blocks = [f"# fastrnn on {data['machine']}", provenance(data), EXPLANATION]
    for suite in SUITES:
        rows = _of(data, [suite])["rows"]
        if rows:
            blocks += [f"## {suite.capitalize()}", _tables([data], [suite]), figures.beside(_figures(suite, rows))]
    runs = [
        [id, run["commit"], ", ".join(f"{name} {version}" for name, version in run["versions"].items())]
        for id, run in data["runs"].items()
    ]
    return [*blocks, *_all_rows(data), "## Runs", markdown(["run", "commit", "versions"], runs)]


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Cases of both files, the largest loss first: our medians, by what factor ours is shorter now, the wider of the
    two spreads from the quantile at 20 to that at 80 %, and the same factor of torch, or of another peer where torch
    took no part, which tells how much the machine changed."""
    lines = []
    # A row of the same run was not measured again.
    for id in (id for id, row in new["rows"].items() if id in old["rows"] and row["run"] != old["rows"][id]["run"]):
        before, after = (data["rows"][id]["peers"] for data in (old, new))
        if "fastrnn" not in before or "fastrnn" not in after:
            continue
        gain = before["fastrnn"]["median"] / after["fastrnn"]["median"]
        spread = max((found["q80"] - found["q20"]) / found["median"] for found in (before["fastrnn"], after["fastrnn"]))
        noise = ", noise" if abs(math.log(gain)) <= spread else ""
        other = next((peer for peer in ("torch", *NAMES) if peer in before and peer in after), None)
        its_gain = f"{before[other]['median'] / after[other]['median']:.2f}" if other else "–"
        medians = [f"{peers['fastrnn']['median']:.4g}" for peers in (before, after)]
        lines.append((gain, [id, *medians, f"{gain:.2f}", f"{spread:.0%}{noise}", other or "–", its_gain]))
    header = ["case", "old, ms", "new, ms", "speed-up", "spread", "other", "its speed-up"]
    ordered = [line for _, line in sorted(lines, key=lambda entry: entry[0])]
    return markdown(header, ordered) if lines else "No case of the older results was measured again."


def _stale(files: Sequence[dict[str, Any]]) -> dict[Path, str]:
    """The pages whose table is not what the results give, and what they ought to be."""
    wanted = {
        path: with_table(path.read_text(), table, path.name)
        for path, table in ((README, readme_table(files)), (VARIANTS_PAGE, variants_page_table(files)))
    }
    return {path: text for path, text in wanted.items() if text != path.read_text()}


def write(old: dict[str, Any] | None = None) -> None:
    """Rewrites the reports, and of bench/results the tables in README.md and docs/variants.md; of results elsewhere,
    which are trials, not these. Where there are old results, prints how the present ones compare.

    Raises ValueError where there are no present ones of the same machine.
    """
    files = results.load_all(results.folder())
    if old is not None and old["machine"] not in [data["machine"] for data in files]:
        raise ValueError(f"there are no results of {old['machine']} to compare with")
    for path, text in _stale(files).items() if results.folder() == results.COMMITTED else ():
        path.write_text(text)
        print(f"wrote {path}")
    REPORT.mkdir(exist_ok=True)
    for data in files:
        blocks = gpu.details(data) if gpu.is_gpu(data) else details(data)
        if old is not None and old["machine"] == data["machine"]:
            compared = compare(old, data)
            first = next(i for i, block in enumerate(blocks) if block.startswith("## "))
            source = (gpu.provenance if gpu.is_gpu(old) else provenance)(old)
            blocks[first:first] = ["## Compared", f"Older results: {source}", compared]
            print(compared)
        path = REPORT / f"{data['machine']}.html"
        path.write_text(page("\n\n".join(blocks)))
        print(f"wrote {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and figures of bench/results.")
    parser.add_argument("--check", action="store_true", help="only tell whether the tables are what the results give")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="an earlier results file of the same machine")
    options = parser.parse_args(arguments)
    if not options.check:
        write(options.compare and results.load(options.compare))
        return 0
    stale = _stale(results.load_all(results.COMMITTED))
    for path in stale:
        print(f"{path.name}'s table is not what bench/results gives: run python -m bench.report", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"bench.report: {error}")
