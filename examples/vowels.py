"""Who says it: series of different lengths to one label each, by the state after the last step of each series.

JapaneseVowels (Kudo et al. 1999, Pattern Recognition Letters 20) has 640 utterances of two vowels by nine men: 12
coefficients a step, 7 to 29 steps. The minibatches are neither sorted nor packed: ``lengths`` tells the recurrent layer
where each series ends. Beside it a second model, ``padded``, is not told, and reads the zeros after the end as if they
were data.

    python examples/vowels.py
    python examples/vowels.py --cell lstm --data folder/with/the/two/ts/files
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _processes as processes
import numpy as np
import torch
from _trainer import (
    Parser,
    Trainer,
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
    probability,
    resume,
    run_main,
    train,
    write_json,
)
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, confusion_matrix, f1_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fastrnn import nn

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
MODELS = ("lengths", "padded")
FILES = {"train": "JapaneseVowels_TRAIN.ts", "test": "JapaneseVowels_TEST.ts"}
ROWS = 10  # of the table
CURVE_OPTIONS = ("cell", "hidden", "dropout", "iterations", "batch", "lr", "clip", "seed")


@dataclass(frozen=True)
class Part:
    x: Tensor  # [N, T, channels], zeros after the end of each series
    lengths: Tensor  # [N]
    labels: Tensor  # [N]

    def to(self, device: torch.device) -> "Part":
        return Part(self.x.to(device), self.lengths.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Corpus:
    """Labelled series, each channel of mean 0 and variance 1 in the training part."""

    description: str
    names: list[str]  # of the labels
    train: Part
    test: Part
    digest: str


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Tell nine speakers apart by short series of different lengths.")
    add_arguments(parser, iterations=400, batch=32, lr=3e-3, clip=1.0, output="runs/vowels")
    parser.add_argument("--cell", choices=CELLS, default="gru", help="recurrent cell (%(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=64, help="units per direction (%(default)s)")
    parser.add_argument("--dropout", type=probability, default=0.3, help="of the last states (%(default)s)")
    parser.add_argument("--data", type=Path, help=f"folder of {' and '.join(FILES.values())} (package sktime)")
    return parser.parse_args()


def packaged_folder() -> Path:
    """Where sktime keeps the files. The package itself, slow to import, is not needed."""
    spec = find_spec("sktime")
    if spec is None or not spec.submodule_search_locations:
        fail("the data come with the package sktime: pip install sktime, or give a folder by --data")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"


def parse_series(text: str) -> tuple[list[Tensor], list[str]]:
    """Series [T, channels] and labels of a .ts file: a line each, channels and label separated by colons.

    Raises:
        ValueError: with the line's number.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines, 1) if line.strip().lower() == "@data"), None)
    if begin is None:
        raise ValueError("there is no line @data")
    series: list[Tensor] = []
    labels: list[str] = []
    for number, line in enumerate(lines[begin:], begin + 1):
        if not line.strip():
            continue
        *channels, label = line.strip().split(":")
        try:
            values = torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]).T
        except ValueError:  # no number, or channels of different lengths
            raise ValueError(f"line {number} is no series of numbers") from None
        if values.dim() != 2 or (series and values.shape[1] != series[0].shape[1]) or not values.isfinite().all():
            raise ValueError(f"line {number} has missing values, or other channels than the first")
        series.append(values)
        labels.append(label)
    if not series:
        raise ValueError("there are no series")
    return series, labels


def make_corpus(data: Path | None) -> Corpus:
    """Read both parts; fails with one line if a file is missing or broken."""
    folder = packaged_folder() if data is None else data
    digest = hashlib.sha256()
    parts = {}
    for part, file in FILES.items():
        try:
            content = (folder / file).read_bytes()
            parts[part] = parse_series(content.decode())
        except OSError as error:
            fail(f"--data: {folder / file} cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            fail(f"--data: {folder / file} is not a .ts file: it is not UTF-8 text")
        except ValueError as error:
            fail(f"--data: {folder / file} is not a .ts file: {error}")
        digest.update(content)
    names = sorted(set(parts["train"][1]))
    unknown = sorted(set(parts["test"][1]) - set(names))
    if unknown:
        fail(f"--data: {FILES['test']} has the label {unknown[0]!r}, which {FILES['train']} has not")
    steps = torch.cat(parts["train"][0])
    if parts["test"][0][0].shape[1] != steps.shape[1]:
        fail(f"--data: {FILES['test']} has other channels than {FILES['train']}")
    mean, deviation = steps.mean(0), steps.std(0, correction=0).clamp_min(1e-6)
    made = {}
    for part, (series, labels) in parts.items():
        made[part] = Part(
            x=pad_sequence([(values - mean) / deviation for values in series], batch_first=True),
            lengths=torch.tensor([len(values) for values in series]),
            labels=torch.tensor([names.index(label) for label in labels]),
        )
    return Corpus("JapaneseVowels" if data is None else str(data), names, **made, digest=digest.hexdigest())


class Classifier(torch.nn.Module):
    """A recurrent layer of two directions, and a linear layer on their last states."""

    def __init__(self, channels: int, classes: int, args: argparse.Namespace, *, with_lengths: bool) -> None:
        super().__init__()
        self.with_lengths = with_lengths
        self.rnn = CELLS[args.cell](channels, args.hidden, batch_first=True, bidirectional=True, backend=args.backend)
        self.dropout = torch.nn.Dropout(args.dropout)
        self.output = torch.nn.Linear(2 * args.hidden, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B, T, channels] and lengths [B] in any order -> scores [B, classes]."""
        _, state = self.rnn(x, lengths=lengths if self.with_lengths else None)
        h_n = state[0] if isinstance(state, tuple) else state  # [2, B, hidden]
        return self.output(self.dropout(torch.cat([*h_n], -1)))


class ClassificationLoss:
    """The loss of a minibatch of any of the series."""

    def __init__(self, part: Part, args: argparse.Namespace) -> None:
        self.part = part
        self.batch = args.batch
        self.seed = args.seed

    def __call__(self, model: torch.nn.Module, iteration: int, carry: None) -> tuple[Tensor, None]:
        generator = torch.Generator().manual_seed((self.seed << 20) + iteration)
        rows, number = processes.shard(torch.randperm(len(self.part.labels), generator=generator)[: self.batch])
        processes.seed_iteration(self.seed, iteration)
        rows = rows.to(self.part.labels.device)
        lengths = self.part.lengths[rows]
        scores = model(self.part.x[rows, : int(lengths.max())], lengths)
        return processes.mean_over_all(cross_entropy(scores, self.part.labels[rows]), number), None


@torch.no_grad()
def evaluate(model: torch.nn.Module, part: Part, classes: int) -> dict[str, Any]:
    model.eval()
    labels, found = part.labels.cpu(), model(part.x, part.lengths).argmax(-1).cpu()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": float(accuracy_score(labels, found)),
        "macro_f1": float(f1_score(labels, found, average="macro")),
        "confusion": confusion_matrix(labels, found, labels=range(classes)).tolist(),
    }


def draw(path: Path, results: dict[str, Any], names: list[str]) -> None:
    """Which speakers each model takes for which others."""
    figure = Figure(figsize=(4.3 * len(results), 4.2), layout="constrained")
    for ax, (name, result) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        ConfusionMatrixDisplay(np.array(result["confusion"]), display_labels=names).plot(
            ax=ax, cmap="Blues", colorbar=False
        )
        ax.set_title(f"{name}: {result['accuracy']:.1%} right", fontsize="medium")
    figure.savefig(path, dpi=80)


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    corpus = make_corpus(args.data)
    prepare_output(args.output)

    learned, test = corpus.train.to(device), corpus.test.to(device)
    compute_loss = ClassificationLoss(learned, args)
    channels, classes = learned.x.shape[2], len(corpus.names)
    runs: dict[str, Trainer] = {}
    for name in MODELS:
        runs[name] = make_trainer(
            partial(Classifier, channels, classes, args, with_lengths=name == "lengths"),
            compute_loss,
            args,
            device,
        )
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": corpus.digest}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}

    steps = torch.cat([corpus.train.lengths, corpus.test.lengths])
    print(
        f"data      {corpus.description}: {len(learned.labels)} series to learn, {len(test.labels)} to test,"
        f" {channels} channels, {int(steps.min())} to {int(steps.max())} steps, {classes} labels"
    )
    print(f"models    {args.cell.upper()} of two directions, {args.hidden} units each, with and without lengths")
    print(
        f"training  {args.iterations} iterations of {args.batch} series, Adam lr {args.lr:g},"
        f" clip {args.clip:g}, seed {args.seed}"
    )
    print_device(device)
    print(f"\n{'':>9}{'training loss':>20}\n{'iteration':>9}" + "".join(f"{name:>10}" for name in runs))

    def pause(iteration: int) -> None:
        losses = {name: run.losses[-1] for name, run in runs.items()}
        state["history"].append({"iteration": iteration, "training_loss": losses})
        tqdm.write(f"{iteration:>9}" + "".join(f"{loss:>10.4f}" for loss in losses.values()))

    pauses = evenly(args.iterations, ROWS)
    if not train(runs, args.iterations, pauses, pause, folder=args.output, settings=settings, state=state):
        return 130

    results = {name: evaluate(run.model, test, classes) for name, run in runs.items()}
    metrics = {
        "settings": settings,
        "environment": describe_environment(device),
        "train_series": len(learned.labels),
        "test_series": len(test.labels),
        "models": results,
        "history": state["history"],
    }
    write_json(args.output / "metrics.json", metrics)
    draw(args.output / "confusion.png", results, corpus.names)
    rows = [["model", "parameters", "test accuracy", "macro F1"]]
    for name, result in results.items():
        rows.append([name, f"{result['parameters']:,}", f"{result['accuracy']:.4f}", f"{result['macro_f1']:.4f}"])
    print(f"\n{markdown(rows)}\n\nWrote metrics.json, confusion.png, checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
