"""Forecasts as a user runs them, but tiny, of series whose next value follows from those before."""

import dataclasses
from pathlib import Path
from types import ModuleType

import matplotlib.image
import numpy as np
import pytest
import torch

from tests.accuracy import assert_as_accurate
from tests.examples.conftest import BAD_OPTIONS, Program, loss_curve

TINY = ("--data", "series.csv", "--season", 4, "--hidden", 16, "--batch", 16, "--lr", 0.02, "--device", "cpu")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def series(folder: Path) -> None:
    steps = np.arange(120)
    noise = np.random.default_rng(0).normal(0, 0.02, (2, 120))
    long = 3 + np.sin(steps * 1.3) + noise[0]
    short = 100 + 5 * (np.cos(steps * 1.1) + noise[1])
    lines = ["when,long,short"]
    for i in range(120):
        # A gap within, and an end before the other's.
        lines.append(f"day {i},{long[i]},{'' if i == 7 or i >= 90 else short[i]}")
    (folder / "series.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_learns_two_series(program: Program, capsys: pytest.CaptureFixture[str], cell: str) -> None:
    written = program.run("--cell", cell, "--iterations", 100)
    assert [row["iteration"] for row in written["history"]] == list(range(10, 101, 10))
    assert [(result["values"], result["test_values"]) for result in written["series"].values()] == [(120, 30), (90, 23)]
    printed = capsys.readouterr().out
    for name, result in written["series"].items():
        error = {method: errors["mae"] for method, errors in result["errors"].items()}
        assert error["fastrnn"] < 0.4 * min(error["seasonal naive"], error["last value"])
        assert all(errors["mae"] <= errors["rmse"] for errors in result["errors"].values())
        assert f"| {name} | {error['fastrnn']:.3f} | {error['last value']:.3f} |" in printed
    assert matplotlib.image.imread("out/forecast.png").std() > 0.05


def test_no_forecast_sees_what_it_forecasts(example: ModuleType) -> None:
    """A value changed changes no forecast of itself or of anything before it, but of all that come after it."""
    torch.manual_seed(0)
    model = example.Forecaster("gru", 8, "auto")
    series = example.read_series(Path("series.csv"), 4)[0]
    values = series.values.copy()
    values[-5] += 1
    before, _ = example.compare(model, series, CPU)
    after, _ = example.compare(model, dataclasses.replace(series, values=values), CPU)
    for method, forecasts in before.items():
        assert len(forecasts) == 30
        np.testing.assert_array_equal(forecasts[:-4], after[method][:-4])
        changed = forecasts[-4:] != after[method][-4:]
        assert changed.tolist() == [True, True, True, True] if method == "fastrnn" else changed.any()


def test_baselines(example: ModuleType) -> None:
    """And the network: one that always says 0 forecasts the last value and the mean change of the training part."""
    model = example.Forecaster("rnn", 4, "auto")
    torch.nn.init.zeros_(model.output.weight)
    torch.nn.init.zeros_(model.output.bias)
    for series in example.read_series(Path("series.csv"), 4):
        forecasts, _ = example.compare(model, series, CPU)
        values, begin = series.values, series.test_begin
        assert begin == int(0.75 * len(values))
        np.testing.assert_allclose(forecasts["fastrnn"], values[begin - 1 : -1] + np.diff(values[:begin]).mean())
        np.testing.assert_array_equal(forecasts["last value"], [values[t - 1] for t in range(begin, len(values))])
        np.testing.assert_array_equal(forecasts["seasonal naive"], [values[t - 4] for t in range(begin, len(values))])


def test_autoregression_is_least_squares(example: ModuleType) -> None:
    draw = np.random.default_rng(0)
    values = np.zeros(200)
    for t in range(2, 200):
        values[t] = 1 + 1.2 * values[t - 1] - 0.6 * values[t - 2] + draw.normal()
    found, lags = example.autoregression(values, 150, 12)
    rows = np.array([[1, *values[t - lags : t][::-1]] for t in range(lags, 200)])
    learned = 150 - lags
    weights = np.linalg.lstsq(rows[:learned], values[lags:150], rcond=None)[0]
    np.testing.assert_allclose(found, rows[learned:] @ weights, rtol=1e-6)
    assert 2 <= lags <= 12


def test_windows_end_where_the_test_part_begins(example: ModuleType) -> None:
    series = example.read_series(Path("series.csv"), 4)
    windows = example.ForecastLoss(series, 16, 0, CPU).windows
    # Of 89 and 66 changes between the 90 and 67 values of the training parts; 25 in each window.
    assert windows.shape == ((89 - 24) + (66 - 24), 25)
    changes, mean, deviation = series[0].changes()
    torch.testing.assert_close(windows[64], changes[64:89])
    np.testing.assert_allclose(windows[64] * deviation + mean, np.diff(series[0].values)[64:89], rtol=1e-5)
    torch.testing.assert_close(torch.std_mean(changes[:89], correction=0), (torch.tensor(1.0), torch.tensor(0.0)))


def test_resume_after_interrupt_is_the_same_run(program: Program) -> None:
    options = ("--iterations", 40)
    program.check_resume("_trainer.Trainer.step", *options, call=14, iteration=14)
    assert "the checkpoint was made with data" in program.error(*options, "--resume", "--season", 5)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_kernels_agree_with_the_reference(example: ModuleType, cell: str) -> None:
    """Both loss curves are as close to the one in fp64."""
    series = example.read_series(Path("series.csv"), 4)
    curves = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(0)
        model = example.Forecaster(cell, 16, backend).to(dtype)
        compute_loss = example.ForecastLoss(series, 16, 0, CPU)
        compute_loss.windows = compute_loss.windows.to(dtype)
        curves.append(torch.tensor(loss_curve(model, compute_loss, 10, 0.01), dtype=dtype))
    assert_as_accurate(*curves)


def test_packaged_data(example: ModuleType) -> None:
    spots, air = example.packaged_series()
    assert (len(spots.values), len(air.values)) == (309, 526)
    assert spots.times[[0, -1]].tolist() == [1700, 2008]
    np.testing.assert_allclose(air.times[[0, -1]], [1958 + 2 / 12, 2001 + 11 / 12])
    assert np.isfinite(spots.values).all() and np.isfinite(air.values).all()


BAD_INPUT = BAD_OPTIONS | {
    "missing": (("--data", "nowhere.csv"), "--data nowhere.csv cannot be read: No such file or directory"),
    "empty": ("", "--data bad.csv is not a CSV file: "),
    "binary": (b"\xff\xfe\x00\x89", "--data bad.csv is not a CSV file: "),
    "ragged": ("a,b\n1,2\n1,2,3\n", "--data bad.csv is not a CSV file: "),
    "no numbers": ("a,b\nx,y\n", "--data bad.csv has no column of numbers"),
    "too short": ("a\n" + "1\n2\n" * 10, "--data bad.csv: series 'a' has 20 values, but --season 4 takes 35"),
    "infinite": ("a\n" + "1\n2\n" * 25 + "inf\n", "--data bad.csv: series 'a' has infinite values"),
    "constant": ("a\n" + "1\n" * 50, "--data bad.csv: series 'a' changes by the same at each step"),
    "season": (("--season", 0), "argument --season: must be a positive integer, got '0'"),
}


@pytest.mark.parametrize(("case", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, case: tuple[object, ...] | str | bytes, message: str) -> None:
    options = case if isinstance(case, tuple) else ("--data", "bad.csv")
    if not isinstance(case, tuple):
        Path("bad.csv").write_bytes(case.encode() if isinstance(case, str) else case)
    assert message in program.error(*options)
