"""Tables and pictures of bench/results/*.json.

python -m bench.report                    write bench/report/ and the tables in README.md and docs/variants.md
python -m bench.report --check            fail where one of these is not what the results give
python -m bench.report --compare OLD      an earlier results file beside the present one of the same machine
python -m bench.report --compare OLD NEW
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import results
from bench.gpu import report as gpu
from bench.machine import ROOT
from bench.registry import (
    ATTENTION_CASES,
    DTYPES,
    GATES,
    SEARCH_CASES,
    SHAPES,
    STEP_SHAPES,
    VARIANT_SHAPE,
    VARIANTS,
    AnyCase,
    Case,
    all_cases,
    plain_cases,
    variant_cases,
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
# Rows where others had more than this share of the CPUs are named: torch.nn then takes up to a hundred times longer.
NEIGHBOURS_ALLOWED = 0.05
Row = dict[str, Any]
Maker = Callable[[dict[str, Row], str], str | None]


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


def _pairs(cases: Mapping[str, Case], rows: dict[str, Row]) -> dict[str, list[Row | None]]:
    """By label: the case's rows in modes forward and training, where there is one of them."""
    lines = {}
    for label, case in cases.items():
        pair = [rows.get(replace(case, mode=mode).id) for mode in ("forward", "training")]
        if any(pair):
            lines[f"{label}{_backend(pair)}"] = pair
    return lines


def sequence_table(rows: dict[str, Row], dtype: str) -> str | None:
    """Whole sequences, forward and training, a line for each cell and shape."""
    cases = {
        f"{cell.upper()} {', '.join(map(str, shape))}": Case(cell, name, "forward", dtype)
        for cell in GATES
        for name, shape in SHAPES.items()
    }
    lines = _pairs(cases, rows)
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


def variant_table(rows: dict[str, Row], dtype: str) -> str | None:
    """The variants, forward and training: our median, over that of the plain cell, and the peers' over ours."""
    cases = {
        f"{cell.upper()}, {variant.title}": Case(cell, VARIANT_SHAPE, "forward", dtype, name)
        for cell in GATES
        for name, variant in VARIANTS.items()
    }
    lines = _pairs(cases, rows)
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
        f"{cell.upper()}Cell {shape.batch}, {shape.input_size}, {shape.hidden_size}{_backend([row])}": row
        for cell in GATES
        for name, shape in STEP_SHAPES.items()
        if (row := rows.get(Case(cell, name, "step", dtype).id))
    }
    if not lines:
        return None
    peers = _compared(lines.values())
    return markdown(
        [f"{dtype}; B, I, H", "one step, µs", *(f"{NAMES[peer]} ×" for peer in peers)],
        ([label, *_times(row, peers, unit=1e3)] for label, row in lines.items()),
    )


def attention_table(rows: dict[str, Row]) -> str | None:
    """Attention: our median, torch's operators and the tiled memory over it, and the share of the reading bandwidth."""
    lines = [(case, rows[case.id]) for case in ATTENTION_CASES if case.id in rows]
    if not lines:
        return None
    header = [
        "attention, fp32; B × beams, Tq, Tk, D",
        "ms",
        "torch's operators ×",
        "tiled memory ×",
        "GB/s",
        "of limit",
    ]
    body = []
    for case, row in lines:
        batch = f"{case.memories} × {case.beams}" if case.beams > 1 else f"{case.memories}"
        label = f"{case.title}{_backend([row])} {batch}, {case.queries}, {case.keys}, {case.size}"
        rate = f"{row['gbytes']:.0f}" if "gbytes" in row else "–"
        body.append([label, *_times(row, ["torch", "tiled"]), rate, _fraction(row)])
    return markdown(header, body)


def search_table(rows: dict[str, Row]) -> str | None:
    """Search: our median, torch's operators over it, and what is not the model's own work."""
    lines = [(case, rows[case.id]) for case in SEARCH_CASES if case.id in rows]
    if not lines:
        return None
    body = []
    for case, row in lines:
        label = f"{case.title}{_backend([row])}" if row["backend"] else case.title
        rate = f"{row['gbytes']:.0f}" if "gbytes" in row else "–"
        time, ratio, of_model, of_live = _times(row, ["torch", "model", "live"])
        body.append([label, time, ratio, rate, of_model, of_live])
    header = ["search, fp32, 5 beams", "ms", "torch's operators ×", "GB/s", "model alone ×", "live steps alone ×"]
    return markdown(header, body)


def provenance(data: dict[str, Any]) -> str:
    """Device, instruction set, versions, commits and dates of all rows of one machine."""
    newest = data["runs"][max(data["runs"])]
    packages = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    commits = dict.fromkeys(f"{run['commit']} on {id[:10]}" for id, run in data["runs"].items())
    disturbed = [id for id, row in data["rows"].items() if (row["neighbours"] or 0) > NEIGHBOURS_ALLOWED]
    warning = f" Other processes took part of the CPU during {', '.join(disturbed)}." if disturbed else ""
    device = f"{newest['device']}, {newest['threads']} threads, {newest['isa']}"
    return f"{device}; {packages}; measured at {', '.join(commits)}.{warning}"


def _of(data: dict[str, Any], cases: Iterable[AnyCase]) -> dict[str, Any]:
    """The results of these cases only."""
    rows = {case.id: data["rows"][case.id] for case in cases if case.id in data["rows"]}
    used = {row["run"] for row in rows.values()}
    return data | {"rows": rows, "runs": {id: run for id, run in data["runs"].items() if id in used}}


def _tables(files: Sequence[dict[str, Any]], cases: Sequence[Case], makers: Sequence[Maker]) -> str:
    parts = []
    for data in (_of(data, cases) for data in files):
        if data["rows"]:
            tables = [maker(data["rows"], dtype) for dtype in DTYPES for maker in makers]
            parts += [provenance(data), *(table for table in tables if table)]
    return "\n\n".join(parts) if parts else "No results yet: `make bench` measures them."


def readme_table(files: Sequence[dict[str, Any]]) -> str:
    """What stands between README.md's markers."""
    cpus = [data for data in files if not gpu.is_gpu(data)]
    parts = [_tables(cpus, plain_cases(), [sequence_table, step_table])]
    for cases, maker in ((ATTENTION_CASES, attention_table), (SEARCH_CASES, search_table)):
        for data in (_of(data, cases) for data in cpus):
            if table := maker(data["rows"]):
                parts += [provenance(data), table]
    return "\n\n".join([*parts, *(gpu.summary(data) for data in files if gpu.is_gpu(data))])


def variants_page_table(files: Sequence[dict[str, Any]]) -> str:
    """What stands between the markers of docs/variants.md."""
    return _tables([data for data in files if not gpu.is_gpu(data)], variant_cases(), [variant_table])


def with_table(text: str, table: str, page: str) -> str:
    """The page's text with the table between its markers; ValueError where it does not have both once, in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"{page} must have {BEGIN} and after it {END}, each once")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def details(data: dict[str, Any]) -> str:
    """Every row with every peer's median, spread and error, and who was left out why."""
    lines = []
    left_out: dict[str, list[str]] = {}
    for id, row in data["rows"].items():
        rate = ""
        for unit, name in (("gflops", "GFLOP/s"), ("gbytes", "GB/s")):
            if unit in row:
                rate = f"{row[unit]:.0f}" + (f" of {row['limit']:.0f}" if "limit" in row else "") + f" {name}"
        for peer, figures in row["peers"].items():
            median, low, high = (f"{figures[key]:.4g}" for key in ("median", "q20", "q80"))
            ratio = f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else ""
            error = f"{figures['error']:.1e}"
            name = f"fastrnn, {row['backend']}" if peer == "fastrnn" else peer
            lines.append([id, name, median, f"{low} to {high}", ratio, rate, error, row["run"]])
            rate = ""
        for peer, reason in row["left_out"].items():
            left_out.setdefault(f"{peer}, {reason}", []).append(id)
    header = ["case", "peer", "median, ms", "20 to 80 %", "× ours", "rate", "largest error", "run"]
    missing = "".join(f"* {reason}: {', '.join(ids)}\n" for reason, ids in left_out.items())
    return f"# {data['machine']}\n\n{provenance(data)}\n\n{markdown(header, lines)}\n\nLeft out:\n\n{missing}"


def draw(data: dict[str, Any], path: Path) -> None:
    """Bars: how many times longer each peer takes than fastrnn, and fastrnn's share of the machine's limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[str, dict[str, Row]] = {}
    for case in all_cases():
        if case.id in data["rows"]:
            title = f"{case.mode}, {case.dtype}{', variants' if case.variant else ''}"
            label = f"{case.cell} {case.variant or case.shape}"
            groups.setdefault(title, {})[label] = data["rows"][case.id]
    figure, axes = plt.subplots(len(groups), 2, figsize=(14, 4 * len(groups)), squeeze=False, layout="constrained")
    for (title, shown), (left, right) in zip(groups.items(), axes, strict=True):
        peers = _compared(shown.values())
        width = 0.8 / max(len(peers), 1)
        for i, peer in enumerate(peers):
            heights = [row["ratios"].get(peer, 1.0) - 1 for row in shown.values()]
            places = [x + (i - len(peers) / 2) * width for x in range(len(shown))]
            left.bar(places, heights, width, 1.0, label=NAMES[peer])
        left.axhline(1.0, color="black", linewidth=0.8)
        left.set(yscale="log", title=f"{title}: time over fastrnn's")
        left.set_xticks(range(len(shown)), list(shown), rotation=60, ha="right")
        left.legend()
        if not any("fraction" in row for row in shown.values()):
            right.set_axis_off()
            continue
        right.bar(range(len(shown)), [row.get("fraction", 0.0) for row in shown.values()])
        right.set(title=f"{title}: fastrnn's share of the machine's limit", ylim=(0, 1.05))
        right.set_xticks(range(len(shown)), list(shown), rotation=60, ha="right")
    figure.suptitle(provenance(data), fontsize=9, wrap=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Cases of both files: our medians, their ratio, and that of torch.nn, or for a variant that torch.nn does not have
    of the plain cell, which tells how much the machine changed."""
    lines = []
    for id in (id for id in new["rows"] if id in old["rows"]):
        rows = [data["rows"][id] for data in (old, new)]
        other = "torch" if all("torch" in row["peers"] for row in rows) else "plain"
        if not all({"fastrnn", other} <= row["peers"].keys() for row in rows):
            continue
        ours, others = ([row["peers"][peer]["median"] for row in rows] for peer in ("fastrnn", other))
        lines.append(
            [id, f"{ours[0]:.4g}", f"{ours[1]:.4g}", f"{ours[0] / ours[1]:.2f}"]
            + [NAMES[other], f"{others[0] / others[1]:.2f}", *(f"{row['ratios'][other]:.2f}" for row in rows)]
        )
    header = ["case", "old, ms", "new, ms", "speed-up", "other", "its speed-up", "other × old", "other × new"]
    return markdown(header, lines) if lines else "The two files have no case in common."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and pictures of bench/results.")
    parser.add_argument("--check", action="store_true", help="only tell whether the pages are what the results give")
    parser.add_argument("--compare", nargs="+", type=Path, metavar="FILE", help="OLD, or OLD and NEW results files")
    options = parser.parse_args(arguments)
    if options.compare:
        if len(options.compare) > 2:
            parser.error(f"--compare takes one or two files, got {len(options.compare)}")
        old = results.load(options.compare[0])
        new = options.compare[1] if len(options.compare) == 2 else results.folder() / f"{old['machine']}.json"
        print(compare(old, results.load(new)))
        return 0

    files = results.load_all(results.folder())
    stale = {}
    for page, table in ((README, readme_table(files)), (VARIANTS_PAGE, variants_page_table(files))):
        present = page.read_text()
        wanted = with_table(present, table, page.name)
        if present != wanted:
            stale[page] = wanted
    if options.check:
        for page in stale:
            print(f"{page.name}'s table is not what bench/results gives: run python -m bench.report", file=sys.stderr)
        return int(bool(stale))
    for page, wanted in stale.items():
        page.write_text(wanted)
    REPORT.mkdir(exist_ok=True)
    for data in files:
        page = REPORT / f"{data['machine']}.md"
        if gpu.is_gpu(data):
            page.write_text(gpu.details(data))
        else:
            page.write_text(details(data))
            draw(data, page.with_suffix(".png"))
    print(f"wrote {README}, {VARIANTS_PAGE} and {REPORT}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"bench.report: {error}")
