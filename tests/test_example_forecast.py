"""Forecasts as a user runs them, but tiny, of series whose next value follows from those before."""

import importlib
import itertools
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import numpy as np
import pytest
import torch

from tests.accuracy import assert_as_accurate

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = (
    "--data",
    "series.csv",
    "--season",
    4,
    "--hidden",
    16,
    "--members",
    2,
    "--batch",
    16,
    "--lr",
    0.02,
    "--noise",
    0,
)
TINY += ("--device", "cpu")


@pytest.fixture(scope="module")
def forecast() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("forecast")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs run, one thread each: with more, tiny steps wait for other programs on the same cores."""
    steps = np.arange(120)
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 120))
    columns = {
        "when": [f"day {step}" for step in steps],
        "long": 3 + np.sin(steps * 1.3) + noise[0],
        "short": 100 + 5 * (np.cos(steps * 1.1) + noise[1]),
    }
    lines = [",".join(columns)]
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        when, *values = map(str, row)
        # A gap within, and an end before the other's.
        lines.append(f"{when},{values[0]},{'' if i == 7 or i >= 90 else values[1]}")
    (tmp_path / "series.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run(forecast: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["forecast.py", *map(str, (*TINY, *options))])
    return forecast.main()


def metrics(name: str) -> dict:
    return json.loads((Path(name) / "metrics.json").read_text())


@pytest.mark.parametrize("difference", [(), ("--difference",)], ids=["values", "changes"])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_learns(
    forecast: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cell: str,
    difference: tuple[str, ...],
) -> None:
    assert run(forecast, monkeypatch, "--cell", cell, *difference, "--iterations", 80, "--output", "out") == 0
    written = metrics("out")
    assert [row["iteration"] for row in written["history"]] == list(range(4, 81, 4))
    result = written["groups"]["series"]
    assert (result["series"], result["season"]) == (2, 4)
    methods = result["methods"]
    assert methods["fastrnn"]["relative_mae"] < 0.3
    assert methods["seasonal naive"]["relative_mae"] == pytest.approx(1)
    assert methods["last value"]["mae"] > methods["fastrnn"]["mae"]
    errors = [row["validation_error"]["series"] for row in written["history"]]
    best = [written["history"][int(i)]["iteration"] for i in np.argmin(errors, 0)]
    assert result["best_iterations"] == best
    assert matplotlib.image.imread("out/forecast.png").std() > 0.05
    table = Path("out/table.md").read_text()
    assert len(table.splitlines()) == 2 + len(methods)
    assert table in capsys.readouterr().out


def test_no_forecast_sees_what_it_forecasts(forecast: ModuleType) -> None:
    """A value changed changes no forecast of itself or of anything before it, but those after it."""
    torch.manual_seed(0)
    model = forecast.Forecaster("gru", 8, "auto")
    for difference in (False, True):
        group = forecast.read_group(Path("series.csv"), 4, difference)
        before = forecast.forecast(model, group, torch.device("cpu"))
        baselines = [forecast.autoregression(group, series)[0] for series in group.series]
        for series in group.series:
            series.values[-5] += 1
        after = forecast.forecast(model, group, torch.device("cpu"))
        changed = [forecast.autoregression(group, series)[0] for series in group.series]
        for pairs, after_it in ((zip(before, after, strict=True), 4), (zip(baselines, changed, strict=True), 1)):
            for old, new in pairs:
                np.testing.assert_array_equal(old[:-4], new[:-4])
                assert (old[-4 : len(old) - 4 + after_it] != new[-4 : len(new) - 4 + after_it]).all()


def test_forecasts_of_many_series_are_those_of_each_alone(forecast: ModuleType) -> None:
    torch.manual_seed(0)
    model = forecast.Forecaster("lstm", 8, "auto")
    group = forecast.read_group(Path("series.csv"), 4, True)
    together = forecast.forecast(model, group, torch.device("cpu"))
    assert [len(found) for found in together] == [118, 88]
    for series, found in zip(group.series, together, strict=True):
        alone = forecast.Group(group.name, group.season, group.difference, [series])
        np.testing.assert_allclose(forecast.forecast(model, alone, torch.device("cpu"))[0], found, rtol=1e-6)


def test_changes_are_added_to_the_value_before(forecast: ModuleType) -> None:
    """A model that always says 0 forecasts the mean of the training part, or the mean change since the last value."""
    model = forecast.Forecaster("rnn", 4, "auto")
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()
    for difference in (False, True):
        group = forecast.read_group(Path("series.csv"), 4, difference)
        for series, found in zip(group.series, forecast.forecast(model, group, torch.device("cpu")), strict=True):
            known = series.values[: int(0.6 * len(series.values))]
            expected = series.values[1:-1] + np.diff(known).mean() if difference else np.full(len(found), known.mean())
            np.testing.assert_allclose(found, expected)


def test_autoregression_is_least_squares(forecast: ModuleType) -> None:
    draw = np.random.default_rng(0)
    values = np.zeros(200)
    for t in range(2, 200):
        values[t] = 1 + 1.2 * values[t - 1] - 0.6 * values[t - 2] + draw.normal()
    group = forecast.Group("series", 4, False, [forecast.Series("series", np.arange(200), values)])
    found, order = forecast.autoregression(group, group.series[0])
    rows = np.array([[1, *values[t - order : t][::-1]] for t in range(order, 200)])
    learned = 150 - order
    weights = np.linalg.lstsq(rows[:learned], values[order:150], rcond=None)[0]
    np.testing.assert_allclose(found, rows[learned:] @ weights, rtol=1e-6)
    assert order >= 2


def test_resume_after_interrupt_is_the_same_run(
    forecast: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--iterations", 40, "--noise", 0.1, "--output")
    assert run(forecast, monkeypatch, *options, "whole") == 0

    step = forecast.Trainer.step
    calls = itertools.count()

    def interrupted(trainer: object) -> None:
        if next(calls) == 29:
            signal.raise_signal(signal.SIGINT)
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(forecast.Trainer, "step", interrupted)
        assert run(forecast, patch, *options, "parts") == 130
    assert "Stopped at iteration 14; go on with: python forecast.py" in capsys.readouterr().out
    assert not Path("parts/metrics.json").exists()
    assert run(forecast, monkeypatch, *options, "parts", "--resume") == 0
    assert metrics("parts") == metrics("whole")

    with pytest.raises(SystemExit, match="2"):
        run(forecast, monkeypatch, *options, "parts", "--resume", "--difference")
    assert "the checkpoint was made with data" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_kernels_agree_with_the_reference(forecast: ModuleType, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Both loss curves are as close to the one in fp64."""
    monkeypatch.setattr(sys, "argv", ["forecast.py", *map(str, TINY)])
    args = forecast.parse_arguments()
    group = forecast.read_group(args.data, args.season, args.difference)
    curves = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        model = forecast.Forecaster(cell, args.hidden, backend).to(dtype)
        compute_loss = forecast.ForecastLoss(group, 0, args, torch.device("cpu"))
        compute_loss.windows = compute_loss.windows.to(dtype)
        trainer = forecast.Trainer(model, compute_loss, lr=0.01, clip=1.0)
        for _ in range(10):
            trainer.step()
        curves.append(torch.tensor(trainer.losses, dtype=dtype))
    assert_as_accurate(*curves)


def test_windows_end_where_the_validation_part_begins(forecast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["forecast.py", *map(str, TINY)])
    group = forecast.read_group(Path("series.csv"), 4, True)
    windows = forecast.ForecastLoss(group, 0, forecast.parse_arguments(), torch.device("cpu")).windows
    # Of changes: 71 and 53 in the training parts, of 72 and 54 values; 25 in each window.
    assert windows.shape == ((71 - 24) + (53 - 24), 25)
    torch.testing.assert_close(windows[46], group.inputs(group.series[0])[46:71])


def test_packaged_data(forecast: ModuleType) -> None:
    spots, air = forecast.packaged_groups()
    assert (len(spots.series[0].values), len(air.series[0].values)) == (309, 526)
    assert spots.series[0].times[[0, -1]].tolist() == [1700, 2008]
    np.testing.assert_allclose(air.series[0].times[[0, -1]], [1958 + 2 / 12, 2001 + 11 / 12])
    assert all(np.isfinite(group.series[0].values).all() for group in (spots, air))


BAD_INPUT = {
    "missing": (("--data", "nowhere.csv"), "--data nowhere.csv cannot be read: No such file or directory"),
    "empty": ("", "--data bad.csv is not a CSV file: "),
    "binary": (b"\xff\xfe\x00\x89", "--data bad.csv is not a CSV file: "),
    "ragged": ("a,b\n1,2\n1,2,3\n", "--data bad.csv is not a CSV file: "),
    "no numbers": ("a,b\nx,y\n", "--data bad.csv has no column of numbers"),
    "too short": ("a\n" + "1\n" * 20, "--data bad.csv: series 'a' has 20 values, but --season 4 takes 44"),
    "infinite": ("a\n" + "1\n" * 50 + "inf\n", "--data bad.csv: series 'a' has infinite values"),
    "season": (("--season", 0), "argument --season: must be a positive integer, got '0'"),
    "back end": (("--backend", "fortran"), "--backend fortran: backend must be"),
    "no permission": (("--output", "/sys/fastrnn"), "--output /sys/fastrnn cannot be written:"),
    "nothing to resume": (("--resume", "--output", "new"), "--resume: there is no checkpoint new/checkpoint.pt"),
}


@pytest.mark.parametrize(("case", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(
    forecast: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: tuple[object, ...] | str | bytes,
    message: str,
) -> None:
    options = case if isinstance(case, tuple) else ("--data", "bad.csv")
    if not isinstance(case, tuple):
        Path("bad.csv").write_bytes(case.encode() if isinstance(case, str) else case)
    with pytest.raises(SystemExit, match="2"):
        run(forecast, monkeypatch, *options)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("forecast: error: ") and message in printed.err and printed.err.count("\n") == 1
