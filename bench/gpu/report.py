"""Tables of bench/results/<gpu>.json: a summary for the README, and every row."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench import figures
from bench.gpu.registry import SEQUENCE_MODES, SUITES, GpuCase, all_cases
from bench.tables import markdown, three

Row = dict[str, Any]
Measured = list[tuple[GpuCase, Row]]

NAMES = {
    "torch": "cuDNN",
    "plain": "plain cell",
    "compiled_loop": "loop compiled by torch.compile",
    "flashrnn": "FlashRNN",
    "haste": "haste",
    "torchrl": "TorchRL",
}
VARIANTS = {"resets": "`resets`", "lengths": "`lengths`", "layer_norm": "`layer_norm`"}


def is_gpu(data: Mapping[str, Any]) -> bool:
    """Whether a results file is one of a GPU."""
    return data.get("kind") == "gpu"


def measured(data: Mapping[str, Any]) -> Measured:
    """The rows with their cases, in the order of the suites."""
    return [(case, data["rows"][case.id]) for case in all_cases() if case.id in data["rows"]]


def provenance(data: Mapping[str, Any]) -> str:
    """Device, versions, commits and dates of all rows, and the ceilings of the newest run that has some."""
    newest = data["runs"][max(data["runs"])]
    packages = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    commits = dict.fromkeys(f"{run['commit']} on {id[:10]}" for id, run in data["runs"].items())
    found = f"{newest['device']}, driver {newest['driver']}; {packages}; measured at {', '.join(commits)}."
    limits = next((run["ceilings"] for _, run in sorted(data["runs"].items(), reverse=True) if "ceilings" in run), None)
    if limits is not None:
        rates = ", ".join(f"{name} {three(rate)}" for name, rate in limits["tflops"].items())
        found += f" Ceilings of the same run: copy {three(limits['copy_gbytes'])} GB/s, products {rates} TFLOP/s"
        found += f", from launch to launch {three(limits['launch_us'])} µs"
        found += f", {three(limits['graph_launch_us'])} µs in a CUDA graph." if "graph_launch_us" in limits else "."
    return found


def _ratio_lines(rows: Measured) -> Iterator[tuple[str, str, Measured, Callable[[GpuCase], str]]]:
    """Title, peer, rows and what of a case makes a line, of everything that is compared by ratios."""

    def cell_and_dtype(case: GpuCase) -> str:
        return f"{case.cell.upper()} {case.dtype}"

    def of(suite: str, variants: bool) -> Measured:
        return [(case, row) for case, row in rows if case.suite == suite and bool(case.variant) == variants]

    yield "one layer, B 16, T 1024, H 768", "torch", of("headline", False), cell_and_dtype
    yield "B 1 to 128, H 256 to 2048, T 512", "torch", of("cudnn", False), cell_and_dtype
    yield "H up to 128, T 128", "torch", of("small", False), cell_and_dtype
    yield "layer norm", "compiled_loop", of("norm", True), cell_and_dtype
    for peer in ("flashrnn", "torchrl", "haste"):
        yield "all cases it has", peer, rows, cell_and_dtype


def _spread(values: Sequence[float], extreme: Callable[[Sequence[float]], float]) -> str:
    """Geometric mean, and the least or the most where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.geometric_mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({extreme(values):.2f})"


def _groups(rows: Measured, key: Callable[[GpuCase], str]) -> dict[str, Measured]:
    groups: dict[str, Measured] = {}
    for case, row in rows:
        groups.setdefault(key(case), []).append((case, row))
    return groups


def _ratios(rows: Measured, peer: str, mode: str) -> list[float]:
    return [row["ratios"][peer] for case, row in rows if case.mode == mode and peer in row["ratios"]]


def _backends(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(row["backend"] for row in rows if row["backend"]))


def ratio_table(rows: Measured) -> str | None:
    """How many times longer others take: mean and least over the cases."""
    lines = []
    for title, peer, chosen, key in _ratio_lines(rows):
        for label, group in _groups(chosen, key).items():
            forward, training = (_ratios(group, peer, mode) for mode in SEQUENCE_MODES)
            if forward or training:
                timed = [row for _, row in group if peer in row["ratios"]]
                figures = [_spread(values, min) for values in (forward, training)]
                lines.append([f"{NAMES[peer]}: {label}, {title}", *figures, str(len(timed)), _backends(timed)])
    header = ["time over fastrnn's: mean (least)", "forward", "training", "cases", "back end"]
    return markdown(header, lines) if lines else None


def cost_table(rows: Measured) -> str | None:
    """What options cost: our time over the plain cell's, mean and most over the cases."""
    lines = []
    with_variant = [(case, row) for case, row in rows if case.variant and "plain" in row["ratios"]]
    for suite, title in (("small", "H up to 128"), ("masks", "H 512 and 1024"), ("norm", "H 512 and 1024")):
        chosen = [(case, row) for case, row in with_variant if case.suite == suite]
        for label, group in _groups(
            chosen, lambda case: f"{case.cell.upper()}, {VARIANTS[case.variant or '']}"
        ).items():
            costs = [[1 / ratio for ratio in _ratios(group, "plain", mode)] for mode in SEQUENCE_MODES]
            figures = [_spread(values, max) for values in costs]
            lines.append([f"{label}, {title}", *figures, str(len(group)), _backends(row for _, row in group)])
    header = ["time over the plain cell's: mean (most)", "forward", "training", "cases", "back end"]
    return markdown(header, lines) if lines else None


def step_table(rows: Measured) -> str | None:
    """One step: called from Python and replayed in a CUDA graph, ours and torch's, beside the floor."""
    lines = []
    for case, row in rows:
        if case.mode == "step":
            names = ("fastrnn", "fastrnn, graph", "torch", "torch, graph")
            times = [three(1e3 * row["peers"][name]["median"]) if name in row["peers"] else "–" for name in names]
            label = f"{case.cell.upper()}Cell {case.dtype}, B {case.size.batch}, I = H = {case.size.hidden_size}"
            lines.append([label, *times, three(1e3 * row["floor"]), row["backend"] or "–"])
    header = ["one step, weights from memory, µs", "fastrnn", "in a graph", "torch", "in a graph", "floor", "back end"]
    return markdown(header, lines) if lines else None


# NVIDIA's GNMT v2 on an A100 of 40 GB in FP16, 5 beams, by B (DeepLearningExamples, PyTorch 20.06): tokens/s.
PUBLISHED = {1: 848, 32: 11803, 128: 28201}


def search_table(rows: Measured) -> str | None:
    """Whole searches: tokens of the best hypotheses per second."""
    lines = []
    for case, row in rows:
        if case.mode == "search":
            tokens, times = case.size.batch * case.size.steps, {name: f["median"] for name, f in row["peers"].items()}
            rates = [three(1e3 * tokens / times[name]) if name in times else "–" for name in ("fastrnn", "torch")]
            published = PUBLISHED.get(case.size.batch)
            ceiling = three(1e3 * tokens / row["floor"])
            lines.append([f"{case.dtype}, B {case.size.batch}", *rates, ceiling, f"{published}" if published else "–"])
    header = ["search by a model of GNMT's size, 5 beams, 40 steps, tokens/s", "fastrnn", "torch's operators"]
    return markdown([*header, "at the floor", "GNMT v2 as published, A100"], lines) if lines else None


def summary(data: Mapping[str, Any]) -> str:
    """What the README shows of a GPU."""
    rows = measured(data)
    tables = (ratio_table(rows), cost_table(rows), step_table(rows), search_table(rows))
    return "\n\n".join([provenance(data), *filter(None, tables)])


def exchange_table(rows: Sequence[Row]) -> str:
    """Microseconds of a round: a line for each method and number of blocks, a column for each vector."""
    sizes = list(dict.fromkeys((row["batch"], row["hidden"]) for row in rows))
    lines: dict[str, dict[tuple[int, int], str]] = {}
    for row in rows:
        clusters = f"{row['blocks'] // row['cluster']} clusters of {row['cluster']}"
        blocks = clusters if row["method"] == "cluster" else f"{row['blocks']} blocks"
        time = three(row["median"]) if "median" in row else "failed" if "failed" in row else "–"
        lines.setdefault(f"{row['method']}, {blocks}", {})[row["batch"], row["hidden"]] = time
    header = ["one round, µs; B, H", *(f"{batch}, {hidden}" for batch, hidden in sizes)]
    return markdown(header, ([label, *(times.get(size, "–") for size in sizes)] for label, times in lines.items()))


def _case_table(rows: Measured) -> str:
    """A line for every contender of every case."""
    lines = []
    for case, row in rows:
        for name, times in row["peers"].items():
            median, low, high = (three(1e3 * times[key]) for key in ("median", "q20", "q80"))
            step = three(1e3 * times["median"] / case.size.steps)
            ratio = f"{row['ratios'][name]:.2f}" if name in row["ratios"] else ""
            of_floor = f"{row['floor'] / times['median']:.0%}"
            label = f"{name}, {row['backend']}" if name == "fastrnn" else name
            error = f"{times['error']:.1e}"
            lines.append([case.id, label, median, f"{low} to {high}", step, ratio, of_floor, error, row["run"]])
    header = ["case", "contender", "median, µs", "20 to 80 %", "µs per step", "× ours", "floor", "largest error", "run"]
    return markdown(header, lines)


def _figure_groups(rows: Measured) -> dict[str, dict[str, Row]]:
    """By what one figure shows, and by what it calls the row."""
    groups: dict[str, dict[str, Row]] = {}
    for case, row in rows:
        batch, steps, _, hidden = case.size
        label = f"B {batch}, T {steps}, H {hidden}" + (f", {case.variant}" if case.variant else "")
        groups.setdefault(f"{case.cell.upper()} {case.dtype}, {case.mode}", {})[label] = row
    return groups


def details(data: Mapping[str, Any]) -> list[str]:
    """The blocks of a GPU's page: every row, who was left out why, what was not run, the exchange between blocks."""
    parts = [f"# fastrnn on {data['machine']}", summary(data)]
    rows = measured(data)
    for suite, function in SUITES.items():
        chosen = [(case, row) for case, row in rows if case.suite == suite]
        if chosen:
            names = NAMES | ({"torch": "torch's operators"} if suite == "search" else {})
            drawn = figures.beside(figures.of_rows(_figure_groups(chosen), names))
            parts += [f"## {suite}", function.__doc__ or "", drawn, _case_table(chosen)]
    if "exchange" in data:
        parts += ["## Exchange between blocks", exchange_table(data["exchange"]["rows"])]
        reasons = dict.fromkeys(row["left_out"] for row in data["exchange"]["rows"] if "left_out" in row)
        parts += [f"Left out: {reason}." for reason in reasons]
    left_out: dict[str, list[str]] = {}
    for case, row in rows:
        for name, reason in row["left_out"].items():
            left_out.setdefault(f"{name}, {reason}", []).append(case.id)
    if left_out:
        parts += ["## Left out", "\n".join(f"* {reason}: {', '.join(ids)}" for reason, ids in left_out.items())]
    for id, run in sorted(data["runs"].items()):
        failures = "\n".join(f"* {case}: {reason}" for case, reason in run.get("failures", {}).items())
        parts += [f"## Failed in {id}", failures] if failures else []
        missing = [case for case in run.get("not_run", []) if case not in data["rows"]]
        parts += [f"## Not run in {id}, which had {run['seconds']:g} s", ", ".join(missing)] if missing else []
    return parts


def progress(id: str, row: Row) -> str:
    """A line for a case that has just been measured."""
    times = ", ".join(f"{name} {three(1e3 * found['median'])}" for name, found in row["peers"].items())
    wrong = [f"{name} {reason}" for name, reason in row["left_out"].items() if reason.startswith("wrong result")]
    return f"{id}: {times} µs" + "".join(f"; {reason}" for reason in wrong)
