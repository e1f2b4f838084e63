"""A character-level language model, trained with torch.nn and with fastrnn side by side.

Two copies of one model start from the same parameters and see the same minibatches; one of them goes through
``fastrnn.accelerate``. The program prints both losses as they go, the tokens per second of each and text that the
model writes along the way, and leaves a picture of both loss curves, samples, metrics and a checkpoint in ``--output``.

Rounding grows as training goes on: at the defaults two runs of torch.nn whose parameters differ in the last bit of one
weight are 4e-7 apart after 200 iterations and 3e-3 after 400. So far torch.nn and fastrnn may part as well.

    python examples/char_lm.py
    python examples/char_lm.py --cell lstm --layers 1 --hidden 512 --data path/to/shakespeare.txt
"""

import argparse
import contextlib
import copy
import hashlib
import io
import platform
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass
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
    fail,
    non_negative_float,
    positive_int,
    prepare_output,
    print_device,
    resume,
    run_main,
    train,
    write_json,
)
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import fastrnn

CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
EMBEDDING_SIZE = 64
MAX_CHARACTERS = 4_000_000
RARE = "\N{REPLACEMENT CHARACTER}"
RARE_SHARE = 1e-5  # characters with a smaller share of the text than this become RARE
ROW_EVERY = 50
SAME_LOSS = 1e-4
SAMPLE_AT = (100, 300, 500, 700, 1200, 2000)
SAMPLE_EVERY = 1000  # from the last of SAMPLE_AT on
SAMPLE_LENGTH = 300
CURVE_OPTIONS = ("cell", "layers", "hidden", "batch", "sequence", "lr", "clip", "seed")  # that set the loss curve


@dataclass(frozen=True)
class Corpus:
    """A text as indices into its vocabulary, cut into ``batch`` streams that are read in parallel."""

    description: str
    vocabulary: str
    streams: Tensor  # [stream length, batch], int64
    rare: int  # different characters that became RARE
    digest: str  # of the text, to notice a resume on another one


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Train a character-level language model with torch.nn and with fastrnn side by side.")
    add_arguments(parser, iterations=1200, batch=32, lr=2e-3, clip=1.0, output="runs/char_lm")
    parser.add_argument("--cell", choices=CELLS, default="gru", help="recurrent cell (%(default)s)")
    parser.add_argument("--layers", type=positive_int, default=1, help="recurrent layers (%(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=512, help="hidden units per layer (%(default)s)")
    parser.add_argument("--sequence", type=positive_int, default=64, help="steps of truncated BPTT (%(default)s)")
    parser.add_argument(
        "--temperature", type=non_negative_float, default=0.7, help="of samples, 0 is greedy (%(default)s)"
    )
    parser.add_argument("--data", type=Path, help="text file or folder of them (Python's standard library)")
    return parser.parse_args()


def read_file(path: Path, limit: int) -> str:
    """At most ``limit`` characters of a text file; raises ValueError if it is not text."""
    with path.open(encoding="utf-8-sig") as file:
        text = file.read(limit)
    if "\0" in text:
        raise ValueError("it contains null characters")
    return text


def visible_files(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts))


def read_text(data: Path | None) -> tuple[str, str]:
    """The text to learn and a description of it; fails with one line if there is none."""
    if data is None:
        name = f"standard library of Python {platform.python_version()}"
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    else:
        name = str(data)
        try:
            if data.is_file():
                return read_file(data, MAX_CHARACTERS), name
            if not data.is_dir():
                fail(f"--data {data} is not a file or folder")
            paths = visible_files(data)
        except ValueError as error:
            fail(f"--data {data} is not UTF-8 text: {error}")
        except OSError as error:
            fail(f"--data {data} cannot be read: {error.strerror}")
    texts: list[str] = []
    size = 0
    for path in paths:
        if size == MAX_CHARACTERS:
            break
        try:
            texts.append(read_file(path, MAX_CHARACTERS - size))
        except (ValueError, OSError):  # pictures, archives and the like among the texts
            continue
        size += len(texts[-1])
    return "".join(texts), f"{name}, {len(texts)} files"


def make_corpus(data: Path | None, batch: int, sequence: int) -> Corpus:
    text, description = read_text(data)
    source = "--data" if data is None else f"--data {data}"
    if not text:
        fail(f"{source} contains no text")
    if len(text) < batch * (sequence + 1):
        fail(
            f"{source} is too short: {len(text):,} characters, but one batch takes {batch * (sequence + 1):,}"
            f" (--batch {batch} times --sequence {sequence} plus one)"
        )
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    points, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    common = counts >= RARE_SHARE * len(text)
    vocabulary = "".join(chr(point) for point in points[common]) + RARE
    index = np.where(common, np.cumsum(common) - 1, len(vocabulary) - 1)
    length = len(text) // batch
    streams = torch.from_numpy(index[inverse][: length * batch]).view(batch, length).t().contiguous()
    return Corpus(
        description=f"{description}, {len(text):,} characters",
        vocabulary=vocabulary,
        streams=streams,
        rare=int((~common).sum()),
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


class CharacterModel(nn.Module):
    """Embedding, recurrent layers, and a linear layer that scores the next character."""

    def __init__(self, cell: str, vocabulary_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, EMBEDDING_SIZE)
        self.rnn = CELLS[cell](EMBEDDING_SIZE, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, vocabulary_size)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """tokens [T, B] and the state after earlier ones -> logits [T, B, V] and the state after these."""
        y, state = self.rnn(self.embedding(tokens), state)
        return self.output(y), state


class NextCharacterLoss:
    """The loss of truncated BPTT: chunk after chunk of all streams, with the state carried over, never its gradient."""

    def __init__(self, streams: Tensor, sequence: int) -> None:
        self.streams = streams
        self.sequence = sequence
        self.chunks = (len(streams) - 1) // sequence
        self.columns = torch.arange(streams.shape[1], device=streams.device)

    def __call__(self, model: nn.Module, iteration: int, state: Any) -> tuple[Tensor, Any]:
        chunk = iteration % self.chunks
        if chunk == 0:
            state = None
        mine, number = processes.shard(self.columns)
        tokens = self.streams[chunk * self.sequence : (chunk + 1) * self.sequence + 1, mine]
        logits, state = model(tokens[:-1], state)
        loss = processes.mean_over_all(cross_entropy(logits.flatten(0, 1), tokens[1:].flatten()), number)
        return loss, tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


@torch.no_grad()
def sample(model: CharacterModel, vocabulary: str, temperature: float, seed: int) -> tuple[str, float]:
    """Text that the model writes after a line break, one step per call, and its characters per second (median step)."""
    device = model.output.weight.device
    uniform = torch.rand(SAMPLE_LENGTH, len(vocabulary), generator=torch.Generator().manual_seed(seed))
    # The argmax of logits / temperature + Gumbel noise is a draw from the softmax of logits / temperature.
    gumbel = -(-uniform.clamp_min(1e-9).log()).log().to(device)
    token = torch.full((1, 1), max(vocabulary.find("\n"), 0), device=device)
    state = None
    indices, seconds = [], []
    model.eval()
    for noise in gumbel:
        start = time.perf_counter()
        logits, state = model(token, state)
        token = (logits + temperature * noise).argmax(-1)
        indices.append(token.item())
        seconds.append(time.perf_counter() - start)
    model.train()
    return "".join(vocabulary[i] for i in indices), 1 / statistics.median(seconds)


def sample_points(iterations: int) -> list[int]:
    """The iterations that samples are taken at, the last one always."""
    later = range(SAMPLE_AT[-1] + SAMPLE_EVERY, iterations, SAMPLE_EVERY)
    return [point for point in (*SAMPLE_AT, *later) if point < iterations] + [iterations]


def common_prefix(first: str, second: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


class Report:
    """Prints the table and the samples during training, writes the results afterwards."""

    def __init__(
        self, runs: dict[str, Trainer], corpus: Corpus, args: argparse.Namespace, samples: list[dict[str, Any]]
    ) -> None:
        self.runs = runs
        self.corpus = corpus
        self.args = args
        self.samples = samples
        self.sample_points = sample_points(args.iterations)
        self.last_row = min(run.iteration for run in runs.values())
        self.tokens = args.batch * args.sequence  # per step

    def print_head(self) -> None:
        names = "".join(f"{name:>10}" for name in self.runs)
        print(f"{'':>9}{'loss':>20}{'':>12}{'tokens/s':>20}")
        print(f"{'iteration':>9}{names}{'difference':>12}{names}{'speed-up':>10}")

    def print_row(self, iteration: int) -> None:
        """Print the losses of this iteration and the speed since the last row, by the median step."""
        losses = [run.losses[iteration - 1] for run in self.runs.values()]
        seconds = [statistics.median(run.seconds[self.last_row : iteration]) for run in self.runs.values()]
        rates = "".join(f"{self.tokens / s:>10,.0f}" for s in seconds)
        tqdm.write(
            f"{iteration:>9}{losses[0]:>10.4f}{losses[1]:>10.4f}{abs(losses[0] - losses[1]):>12.1e}"
            f"{rates}{seconds[0] / seconds[1]:>10.2f}"
        )
        self.last_row = iteration

    def take_sample(self, iteration: int) -> None:
        """Let both models write with the same random numbers; print what fastrnn's wrote."""
        entry: dict[str, Any] = {"iteration": iteration, "text": {}, "characters_per_second": {}}
        for name, run in self.runs.items():
            text, rate = sample(run.model, self.corpus.vocabulary, self.args.temperature, self.args.seed + iteration)
            entry["text"][name] = text
            entry["characters_per_second"][name] = rate
        self.samples.append(entry)
        agreed = common_prefix(*entry["text"].values())
        verdict = "the same from both models" if agreed == SAMPLE_LENGTH else f"both agree up to character {agreed}"
        lines = "\n".join(f"    | {line}" for line in entry["text"]["fastrnn"].split("\n"))
        tqdm.write(f"\n  sample after {iteration} iterations ({verdict}):\n{lines}\n")

    def metrics(self) -> dict[str, Any]:
        """All that is measured, as it goes into metrics.json."""
        runs = {}
        for name, run in self.runs.items():
            rates = [entry["characters_per_second"][name] for entry in self.samples]
            runs[name] = {
                # By the median, as other programs on the same cores can make single steps ten times slower.
                "tokens_per_second": self.tokens / statistics.median(run.seconds),
                "sampled_characters_per_second": statistics.median(rates),
                "training_seconds": sum(run.seconds),
                "losses": run.losses,
                "step_seconds": run.seconds,
            }
        first, second = runs.values()
        differences = [abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True)]
        return {
            "iterations": len(differences),
            "speed_up": second["tokens_per_second"] / first["tokens_per_second"],
            "training_speed_up": first["training_seconds"] / second["training_seconds"],
            "sampling_speed_up": second["sampled_characters_per_second"] / first["sampled_characters_per_second"],
            "same_loss_until": next((i for i, d in enumerate(differences) if d > SAME_LOSS), len(differences)),
            "largest_loss_difference": max(differences),
            "largest_loss_difference_at": differences.index(max(differences)) + 1,
            "runs": runs,
            "samples": self.samples,
        }


def draw(path: Path, metrics: dict[str, Any], title: str) -> None:
    """Both loss curves, over steps and over seconds of training."""
    iterations = metrics["iterations"]
    window = max(1, iterations // 60)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    styles = {"torch.nn": {"color": "#f4a259", "linewidth": 4.0}, "fastrnn": {"color": "#1d3557", "linewidth": 1.5}}
    for name, run in metrics["runs"].items():
        smooth = np.convolve(run["losses"], np.full(window, 1 / window), mode="valid")
        steps = np.arange(window, iterations + 1)
        seconds = np.cumsum(run["step_seconds"])[window - 1 :]
        over_steps.plot(steps, smooth, label=name, **styles[name])
        label = f"{name}: {run['tokens_per_second']:,.0f} tokens/s"
        over_seconds.plot(seconds, smooth, label=label, color=styles[name]["color"], marker="o", markevery=[-1])
    over_steps.set_xlabel("training steps")
    over_steps.set_ylabel("loss, nats per character" + (f" (mean of {window} steps)" if window > 1 else ""))
    over_steps.set_title(
        f"less than {SAME_LOSS:g} apart for {metrics['same_loss_until']} steps,"
        f" {metrics['largest_loss_difference']:.1e} at most",
        fontsize="medium",
    )
    over_seconds.set_xlabel("seconds of training")
    over_seconds.set_title(f"median step {metrics['speed_up']:.2f} times as fast with fastrnn", fontsize="medium")
    for axes in (over_steps, over_seconds):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def write_results(folder: Path, metrics: dict[str, Any], title: str) -> None:
    draw(folder / "curves.png", metrics, title)
    write_json(folder / "metrics.json", metrics)
    with (folder / "samples.txt").open("w", encoding="utf-8") as file:
        for entry in metrics["samples"]:
            for name, text in entry["text"].items():
                file.write(f"--- {name} after {entry['iteration']} iterations\n{text}\n\n")


def print_summary(metrics: dict[str, Any], folder: Path) -> None:
    print(f"\n{'':12}{'final loss':>12}{'training':>12}{'tokens/s':>12}{'one-step sampling':>24}")
    for name, run in metrics["runs"].items():
        print(
            f"{name:12}{run['losses'][-1]:>12.4f}{run['training_seconds']:>10.1f} s{run['tokens_per_second']:>12,.0f}"
            f"{run['sampled_characters_per_second']:>12,.0f} characters/s"
        )
    print(
        f"{'speed-up':12}{'':12}{metrics['training_speed_up']:>12.2f}{metrics['speed_up']:>12.2f}"
        f"{metrics['sampling_speed_up']:>24.2f}"
    )
    print(
        f"\nThe two losses agree within {SAME_LOSS:g} up to iteration {metrics['same_loss_until']} of"
        f" {metrics['iterations']}; their largest difference, {metrics['largest_loss_difference']:.1e}, is at iteration"
        f" {metrics['largest_loss_difference_at']}."
    )
    print(f"Wrote curves.png, samples.txt, metrics.json and checkpoint.pt to {folder}.")


def explain(model: nn.Module, tokens: Tensor) -> str:
    """What fastrnn.explain tells, without printing it yet."""
    with contextlib.redirect_stdout(io.StringIO()):
        return fastrnn.explain(model, tokens)


def print_header(
    corpus: Corpus, model: CharacterModel, args: argparse.Namespace, device: torch.device, choices: str
) -> None:
    rare = f" ({corpus.rare} rare ones read as {RARE})" if corpus.rare else ""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"text      {corpus.description}, vocabulary {len(corpus.vocabulary)}{rare}")
    print(f"model     {describe_model(args)}, {parameters:,} parameters")
    print(
        f"training  {args.iterations} iterations of {args.batch} x {args.sequence} characters, Adam lr {args.lr:g},"
        f" clip {args.clip:g}, seed {args.seed}; twice, taking turns"
    )
    print_device(device)
    print("back end  " + choices.replace("\n", "\n" + " " * 10), end="\n\n")


def describe_model(args: argparse.Namespace) -> str:
    return f"{args.cell.upper()}, {args.layers} layer{'s' * (args.layers > 1)} of {args.hidden} units"


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    corpus = make_corpus(args.data, args.batch, args.sequence)
    prepare_output(args.output)

    torch.manual_seed(args.seed)
    model = CharacterModel(args.cell, len(corpus.vocabulary), args.hidden, args.layers).to(device)
    compute_loss = NextCharacterLoss(corpus.streams.to(device), args.sequence)
    try:
        accelerated = fastrnn.accelerate(copy.deepcopy(model), args.backend)
        choices = explain(accelerated, compute_loss.streams[: args.sequence])
    except (ValueError, NotImplementedError) as error:
        fail(f"--backend {args.backend}: {error}")
    runs = {
        name: Trainer(each, compute_loss, lr=args.lr, clip=args.clip, parallel=args.parallel)
        for name, each in (("torch.nn", model), ("fastrnn", accelerated))
    }
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": corpus.digest}
    state: dict[str, Any] = {"samples": []}
    if args.resume:
        state = resume(runs, args.output, settings)
        reached = sorted(run.iteration for run in runs.values())
        if reached[0] == args.iterations or reached[1] > args.iterations:
            fail(f"--resume: the checkpoint is at iteration {reached[1]} already, go on with larger --iterations")

    print_header(corpus, model, args, device, choices)
    report = Report(runs, corpus, args, state["samples"])

    def pause(iteration: int) -> None:
        report.print_row(iteration)
        if iteration in report.sample_points:
            report.take_sample(iteration)

    report.print_head()
    pauses = (*report.sample_points, *range(0, args.iterations, ROW_EVERY))
    if not train(runs, args.iterations, pauses, pause, folder=args.output, settings=settings, state=state):
        return 130
    environment = describe_environment(device) | {"back_end": choices}
    metrics = {"settings": settings, "environment": environment} | report.metrics()
    write_results(args.output, metrics, describe_model(args))
    print_summary(metrics, args.output)
    return 0


if __name__ == "__main__":
    run_main(main)
