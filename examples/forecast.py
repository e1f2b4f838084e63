"""The next value of a series from all values before it, x_{T+1} = f(x_1..x_T): one network for many series.

By default these are the yearly numbers of sunspots, whose cycle is about 11 years, and the monthly CO2 in the air of
Mauna Loa, which rises and has a season of 12 months. The network sees and forecasts changes, each series in its own
unit. On the last quarter of each series, which comes after everything that was learned from, it is compared with the
last value, with the value a season ago (seasonal naive), and with autoregressions of the values and of their changes.

    python examples/forecast.py
    python examples/forecast.py --cell lstm --data series.csv --season 24
"""

import argparse
import hashlib
import math
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _processes as processes
import numpy as np
import pandas
import torch
from _trainer import (
    Parser,
    add_arguments,
    choose_device,
    describe_environment,
    evenly,
    fail,
    make_trainer,
    markdown,
    positive_int,
    prepare_output,
    print_device,
    resume,
    run_main,
    train,
    write_json,
)
from matplotlib.figure import Figure
from statsmodels.datasets import co2, sunspots
from statsmodels.tools.eval_measures import meanabs, rmse
from statsmodels.tsa.ar_model import AutoReg, ar_select_order
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm import tqdm

from fastrnn import nn

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
TRAIN_SHARE = 0.75  # of each series, from its start; the rest is for the test
WINDOW = 6  # seasons that the network sees at once in training; it has no loss in the first of them
MOST_LAGS = 3  # seasons
DRAWN, SHOWN = 4, 6  # series of the picture, and seasons of each, or a third of its test part if that is more
ROWS = 10  # of the table that training prints
CURVE_OPTIONS = ("cell", "hidden", "iterations", "batch", "lr", "clip", "seed")


@dataclass(frozen=True)
class Series:
    name: str
    season: int
    times: np.ndarray  # [n], for the picture
    values: np.ndarray  # [n]

    @property
    def test_begin(self) -> int:
        return int(TRAIN_SHARE * len(self.values))

    def changes(self) -> tuple[Tensor, float, float]:
        """As the network knows them [n - 1], of mean 0 and variance 1 in the training part; that mean and deviation."""
        changes = np.diff(self.values)
        known = changes[: self.test_begin - 1]
        mean, deviation = float(known.mean()), float(known.std())
        return torch.tensor((changes - mean) / deviation, dtype=torch.float32), mean, deviation


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Forecast the next value of sunspots, of CO2 in the air, or of any series.")
    add_arguments(parser, iterations=600, batch=32, lr=5e-3, clip=1.0, output="runs/forecast")
    parser.add_argument("--cell", choices=CELLS, default="gru", help="recurrent cell (%(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=32, help="hidden units (%(default)s)")
    parser.add_argument("--data", type=Path, help="CSV file, a column of numbers per series (package statsmodels)")
    parser.add_argument("--season", type=positive_int, default=12, help="of --data, in steps (%(default)s)")
    return parser.parse_args()


def packaged_series() -> list[Series]:
    spots = sunspots.load_pandas().data
    monthly = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    years = (monthly.index.year + (monthly.index.month - 1) / 12).to_numpy()
    return [
        Series("sunspots", 11, spots["YEAR"].to_numpy(), spots["SUNACTIVITY"].to_numpy()),
        Series("CO2", 12, years, monthly.to_numpy()),
    ]


def read_series(path: Path, season: int) -> list[Series]:
    """Every column of numbers of a CSV file, gaps filled; fails with one line if one cannot be learned from."""
    try:
        columns = pandas.read_csv(path).select_dtypes("number")
    except OSError as error:
        fail(f"--data {path} cannot be read: {error.strerror}")
    except ValueError as error:  # what pandas raises for a file of another kind
        fail(f"--data {path} is not a CSV file: {str(error).splitlines()[0]}")
    if columns.empty:
        fail(f"--data {path} has no column of numbers")
    shortest = math.ceil((WINDOW * season + 2) / TRAIN_SHARE)
    found = []
    for name in columns:
        values = columns[name].interpolate(limit_area="inside").dropna().to_numpy(float)
        series = Series(str(name), season, np.arange(len(values)), values)
        if len(values) < shortest:
            fail(f"--data {path}: series {name!r} has {len(values)} values, but --season {season} takes {shortest}")
        if not np.isfinite(values).all():
            fail(f"--data {path}: series {name!r} has infinite values")
        if np.ptp(np.diff(values)[: series.test_begin - 1]) == 0:
            fail(f"--data {path}: series {name!r} changes by the same at each step")
        found.append(series)
    return found


class Forecaster(torch.nn.Module):
    """A recurrent layer, and a linear one that forecasts the next element from the state."""

    def __init__(self, cell: str, hidden: int, backend: str) -> None:
        super().__init__()
        self.rnn = CELLS[cell](1, hidden, batch_first=True, backend=backend)
        self.output = torch.nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T] -> forecasts [B, T] of the element after each, from all up to it."""
        return self.output(self.rnn(x.unsqueeze(-1))[0]).squeeze(-1)


class ForecastLoss:
    """The squared error in a minibatch of windows from anywhere in the training parts."""

    def __init__(self, many: list[Series], batch: int, seed: int, device: torch.device) -> None:
        self.skipped = max(series.season for series in many)  # to get to know a series
        parts = [series.changes()[0][: series.test_begin - 1] for series in many]
        self.windows = torch.cat([part.unfold(0, WINDOW * self.skipped + 1, 1) for part in parts]).to(device)
        self.batch = batch
        self.seed = seed

    def __call__(self, model: torch.nn.Module, iteration: int, carry: None) -> tuple[Tensor, None]:
        generator = torch.Generator().manual_seed((self.seed << 20) + iteration)
        rows, number = processes.shard(torch.randint(len(self.windows), (self.batch,), generator=generator))
        windows = self.windows[rows.to(self.windows.device)]
        loss = mse_loss(model(windows[:, :-1])[:, self.skipped :], windows[:, self.skipped + 1 :])
        return processes.mean_over_all(loss, number), None


@torch.no_grad()
def forecast(model: torch.nn.Module, series: Series, device: torch.device) -> np.ndarray:
    """Forecasts of the test part, each from all true values before it."""
    changes, mean, deviation = series.changes()
    begin = series.test_begin
    found = model(changes[None, :-1].to(device))[0, begin - 2 :].double().cpu().numpy()
    return series.values[begin - 1 : -1] + found * deviation + mean


def autoregression(values: np.ndarray, begin: int, most_lags: int) -> tuple[np.ndarray, int]:
    """One-step forecasts of values[begin:], and how many values before it each is made from.

    The autoregression learns from everything before ``begin``, and has as many lags as Akaike's criterion wants.
    """
    lags = ar_select_order(values[:begin], min(most_lags, begin // 4), ic="aic").ar_lags or [1]
    fitted = AutoReg(values[:begin], lags).fit().append(values[begin:])
    return np.asarray(fitted.predict(begin, len(values) - 1)), max(lags)


def compare(model: torch.nn.Module, series: Series, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """All methods' forecasts of the test part, and their errors."""
    begin, season, values = series.test_begin, series.season, series.values
    last = values[begin - 1 : -1]
    of_values, lags = autoregression(values, begin, MOST_LAGS * season)
    of_changes, lags_of_changes = autoregression(np.diff(values), begin - 1, MOST_LAGS * season)
    forecasts = {
        "fastrnn": forecast(model, series, device),
        "last value": last,
        "seasonal naive": values[begin - season : -season],
        "AR": of_values,
        "AR of changes": last + of_changes,
    }
    true = values[begin:]
    errors = {name: {"mae": float(meanabs(f, true)), "rmse": float(rmse(f, true))} for name, f in forecasts.items()}
    result = {
        "values": len(values),
        "test_values": len(true),
        "season": season,
        "lags": {"AR": lags, "AR of changes": lags_of_changes},
        "errors": errors,
    }
    return forecasts, result


def draw(path: Path, many: list[Series], forecasts: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """A row for each of the first series: the last forecasts, and the errors of all methods."""
    many = many[:DRAWN]
    figure = Figure(figsize=(11, 3.4 * len(many)), layout="constrained")
    axes = figure.subplots(len(many), 2, squeeze=False, width_ratios=(3, 1))
    styles = {"fastrnn": ("C3", "-"), "seasonal naive": ("C0", ":"), "AR of changes": ("C2", "--")}
    for (curves, bars), series, found in zip(axes, many, forecasts):
        length = len(series.values) - series.test_begin
        length = min(length, max(SHOWN * series.season, length // 3))
        times = series.times[-length:]
        curves.plot(times, series.values[-length:], "k.", label="true")
        for name, (color, line) in styles.items():
            curves.plot(times, found[name][-length:], line, color=color, label=name)
        curves.set_title(f"{series.name}: each value forecast from all before it", fontsize="medium")
        curves.legend(frameon=False, fontsize="small")
        curves.grid(alpha=0.3)
        errors = {name: error["mae"] for name, error in results[series.name]["errors"].items()}
        colors = [styles[name][0] if name in styles else "0.6" for name in errors]
        bars.bar_label(bars.barh([*errors], [*errors.values()], color=colors), fmt="%.3g", padding=2)
        bars.margins(x=0.2)
        bars.invert_yaxis()
        bars.set_title("mean absolute error", fontsize="medium")
    figure.savefig(path, dpi=80)


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    many = packaged_series() if args.data is None else read_series(args.data, args.season)
    prepare_output(args.output)

    compute_loss = ForecastLoss(many, args.batch, args.seed, device)
    run = make_trainer(partial(Forecaster, args.cell, args.hidden, args.backend), compute_loss, args, device)
    model = run.model
    runs = {args.cell: run}
    digest = hashlib.sha256()
    for series in many:
        digest.update(repr((series.name, series.season)).encode() + series.values.tobytes())
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": digest.hexdigest()}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}

    for series in many:
        print(f"data      {series.name}: {len(series.values)} values, season {series.season}")
    print(f"model     {args.cell.upper()} of {args.hidden} units")
    print(
        f"training  {args.iterations} iterations of {args.batch} windows of {WINDOW * compute_loss.skipped} steps,"
        f" Adam lr {args.lr:g}, clip {args.clip:g}, seed {args.seed}"
    )
    print_device(device)
    print(f"\n{'iteration':>9}{'training loss':>15}")

    def pause(iteration: int) -> None:
        loss = statistics.mean(run.losses[state["history"][-1]["iteration"] if state["history"] else 0 :])
        state["history"].append({"iteration": iteration, "training_loss": loss})
        tqdm.write(f"{iteration:>9}{loss:>15.4f}")

    pauses = evenly(args.iterations, ROWS)
    if not train(runs, args.iterations, pauses, pause, folder=args.output, settings=settings, state=state):
        return 130

    forecasts, results = [], {}
    for series in many:
        found, results[series.name] = compare(model, series, device)
        forecasts.append(found)
    metrics = {
        "settings": settings,
        "environment": describe_environment(device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "series": results,
        "history": state["history"],
    }
    write_json(args.output / "metrics.json", metrics)
    draw(args.output / "forecast.png", many, forecasts, results)
    rows = [["mean absolute error", *forecasts[0]]]
    for name, result in results.items():
        rows.append([name, *(f"{error['mae']:.3f}" for error in result["errors"].values())])
    print(f"\nOn the last quarter of each series:\n\n{markdown(rows)}")
    print(f"\nWrote metrics.json, forecast.png, checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
