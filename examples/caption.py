"""Captions under pictures: a picture's vector is the state that a recurrent decoder starts from.

A small convolutional network makes a vector of a picture of a handwritten digit, and that vector is h_0 of the layer
that writes the caption word by word (Vinyals et al. 2015, arXiv 1411.4555, where it is the first input). Every picture
has several captions, made from its label by templates; in the longer ones the words must agree: "a seven, which is odd
and larger than four". A caption that is found is right when it is one of those of the picture's label.

The pictures are those of scikit-learn. --data takes a file of the UCI repository's "optical recognition of handwritten
digits", optdigits.tra for one: in each line 64 grey values from 0 to 16 and the label, separated by commas.

    python examples/caption.py
    python examples/caption.py --cell lstm --data optdigits.tra
"""

import argparse
import hashlib
import json
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _seq2seq import (
    EVALUATION_BATCH,
    WARM_UP,
    PairLoss,
    Pairs,
    pad,
    part_of,
    train_pairs,
    validation_loss,
)
from _trainer import (
    Parser,
    add_arguments,
    choose_device,
    describe_environment,
    fail,
    make_trainer,
    positive_int,
    prepare_output,
    print_device,
    probability,
    resume,
    run_main,
    write_json,
)
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from fastrnn import nn

SIDE, GREYS = 8, 16  # pictures are SIDE x SIDE of 0 to GREYS
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEST_SHARE, VALIDATION_SHARE = 0.20, 0.10  # of the pictures
CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
COLUMNS, SHOWN = 3, 9  # of the picture with captions; the last row is for wrong ones
PRINTED = 3  # pictures
CURVE_OPTIONS = ("cell", "hidden", "embedding", "dropout", "label_smoothing", "iterations", "batch", "lr", "clip")
CURVE_OPTIONS += ("seed",)


def captions_of(label: int) -> list[list[str]]:
    """All captions of a digit, in words."""
    name = NAMES[label]
    article = "an" if name == "eight" else "a"
    parity = "odd" if label % 2 else "even"
    size = "larger than four" if label > 4 else "smaller than five"
    neighbour = f"one more than {NAMES[label - 1]}" if label else "one less than one"
    captions = [
        f"the digit {name}",
        f"{article} {name} , which is {parity} and {size}",
        f"this is {name} , {neighbour}",
        f"an {parity} number , {size} : {name}",
    ]
    return [caption.split() for caption in captions]


CAPTIONS = [captions_of(label) for label in range(len(NAMES))]
WORDS = sorted({word for captions in CAPTIONS for caption in captions for word in caption})
BEGIN, END = len(WORDS), len(WORDS) + 1
LONGEST = max(len(caption) for captions in CAPTIONS for caption in captions) + 1  # with the end token


@dataclass(frozen=True)
class Pictures:
    grey: Tensor  # [N, SIDE * SIDE], integers
    labels: list[int]

    def pairs(self) -> Pairs:
        """Every picture with each of its captions."""
        index = {word: i for i, word in enumerate(WORDS)}
        captions = [[index[word] for word in caption] + [END] for label in self.labels for caption in CAPTIONS[label]]
        grey = self.grey.repeat_interleave(len(CAPTIONS[0]), 0)
        return Pairs(grey, torch.full((len(grey),), SIDE * SIDE), *pad(captions, END))


class PictureEncoder(torch.nn.Module):
    """Makes a vector of hidden_size elements of a picture, as an encoder of :class:`fastrnn.nn.Seq2Seq`."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, SIDE, SIDE)),
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(32 * (SIDE // 2) ** 2, hidden_size, bias=False),
            torch.nn.BatchNorm1d(hidden_size),  # at first pictures hardly differ in what the convolutions make of them
            torch.nn.Tanh(),
        )

    def forward(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Of grey values [B, SIDE * SIDE] a memory [B, 1, hidden_size] and the decoder's h_0 [1, B, hidden_size]."""
        vector = self.layers(source / GREYS)
        return vector.unsqueeze(1), vector.unsqueeze(0)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Learn to write captions under pictures of digits.")
    add_arguments(parser, iterations=1200, batch=64, lr=3e-3, clip=1.0, output="runs/caption")
    parser.add_argument("--cell", choices=CELLS, default="gru", help="the decoder's (%(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=128, help="hidden units, the vector's (%(default)s)")
    parser.add_argument("--embedding", type=positive_int, default=32, help="size of embeddings (%(default)s)")
    parser.add_argument("--dropout", type=probability, default=0.2, help="in encoder and decoder (%(default)s)")
    parser.add_argument("--label-smoothing", type=probability, default=0.0, help="(%(default)s)")
    parser.add_argument(
        "--beams", type=positive_int, nargs="+", default=[1, 5], metavar="BEAM", help="sizes to search with (1 5)"
    )
    parser.add_argument("--data", type=Path, help="file of lines: 64 grey values from 0 to 16 and the label")
    return parser.parse_args()


def read_pictures(data: Path | None) -> tuple[str, list[list[int]]]:
    """A description, and rows of grey values and label; fails with one line if there are others."""
    if data is None:
        digits = load_digits()
        rows = [[*map(int, grey), int(label)] for grey, label in zip(digits.data, digits.target, strict=True)]
        return f"digits of scikit-learn {version('scikit-learn')}", rows
    try:
        lines = data.read_text(encoding="ascii").splitlines()
    except OSError as error:
        fail(f"--data {data} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"--data {data} is not text")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = [int(value) for value in line.split(",")]
        except ValueError:
            row = []
        if len(row) != SIDE**2 + 1 or min(row) < 0 or max(row[:-1]) > GREYS or row[-1] >= len(NAMES):
            fail(
                f"--data {data} must have {SIDE**2} grey values from 0 to {GREYS} and a label from 0 to"
                f" {len(NAMES) - 1} in each line, but line {number} has not"
            )
        rows.append(row)
    return str(data), rows


def make_parts(data: Path | None) -> tuple[str, dict[str, Pictures], str]:
    """A description of the data, its parts by the pictures' hash, and a digest."""
    description, rows = read_pictures(data)
    parts: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for row in rows:
        parts[part_of(bytes(row[:-1]), TEST_SHARE, VALIDATION_SHARE)].append(row)
    for part, found in parts.items():
        if not found:
            fail(f"--data {data}: none of {len(rows)} pictures falls into the {part} part, give more")
    pictures = {
        part: Pictures(torch.tensor([row[:-1] for row in found]), [row[-1] for row in found])
        for part, found in parts.items()
    }
    return description, pictures, hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def make_model(args: argparse.Namespace) -> nn.Seq2Seq:
    layers = CELLS[args.cell](args.embedding, args.hidden, batch_first=True, backend=args.backend)
    decoder = nn.TokenDecoder(len(WORDS) + 2, args.embedding, layers, bos=BEGIN, eos=END, dropout=args.dropout)
    return nn.Seq2Seq(PictureEncoder(args.hidden, args.dropout), decoder, bridge="copy")


@torch.no_grad()
def write_captions(model: nn.Seq2Seq, grey: Tensor, beam: int, device: torch.device) -> list[list[list[str]]]:
    """The best captions of each picture, the most probable one first: as many as a picture has, or the beam holds."""
    captions = []
    model.eval()
    for chunk in grey.to(device).split(EVALUATION_BATCH):
        found = model.generate(chunk, beam_size=beam, n_best=min(beam, len(CAPTIONS[0])), max_length=LONGEST)
        for tokens, lengths in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True):
            best = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            captions.append([[WORDS[token] for token in row if token < len(WORDS)] for row in best])
    model.train()
    return captions


def rates(found: list[list[list[str]]], labels: list[int]) -> dict[str, float]:
    """The shares of best captions that are right, and right for some digit; and of right ones among all found."""
    right = [
        [caption in CAPTIONS[label] for caption in captions] for captions, label in zip(found, labels, strict=True)
    ]
    return {
        "right": statistics.mean(row[0] for row in right),
        "right_for_some_digit": statistics.mean(any(best in known for known in CAPTIONS) for best, *_ in found),
        "right_of_n_best": statistics.mean(of_picture for row in right for of_picture in row),
    }


def spelled(words: list[str]) -> str:
    return " ".join(words).replace(" ,", ",").replace(" :", ":")


def draw_captions(path: Path, pictures: Pictures, captions: list[list[list[str]]], rows: list[int]) -> None:
    """These pictures with all their captions, the wrong ones red."""
    lines = -(-len(rows) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, row in zip(axes, rows):
        ax.imshow(pictures.grey[row].view(SIDE, SIDE).numpy(), cmap="gray_r", vmin=0, vmax=GREYS)
        ax.set_title(NAMES[pictures.labels[row]], fontsize=9, color="gray")
        known = CAPTIONS[pictures.labels[row]]
        for i, caption in enumerate(captions[row]):
            color = "black" if caption in known else "red"
            place = {"xy": (0.5, 0), "xycoords": "axes fraction", "ha": "center", "va": "top"}
            offset = {"xytext": (0, -4 - 12 * i), "textcoords": "offset points"}
            ax.annotate(spelled(caption), **place, **offset, color=color, fontsize=9)
    figure.savefig(path, dpi=90)


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    description, parts, digest = make_parts(args.data)
    prepare_output(args.output)

    pairs, validation, test = parts["train"].pairs(), parts["validation"].pairs(), parts["test"]
    compute_loss = PairLoss(pairs, args.batch, args.label_smoothing, args.seed, device)
    run = make_trainer(partial(make_model, args), compute_loss, args, device, WARM_UP)
    model = run.model
    runs = {args.cell: run}
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": digest}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}

    counts = ", ".join(f"{len(pictures.labels):,} {part}" for part, pictures in parts.items())
    print(f"data      {description}, pictures: {counts}, each with {len(CAPTIONS[0])} captions")
    print(f"model     convolutions, {args.cell.upper()} of {args.hidden} units, {len(WORDS)} words")
    print(
        f"training  {args.iterations} iterations of {args.batch} of {len(pairs.source):,} captions"
        f" ({args.iterations / compute_loss.batches:.1f} epochs), Adam lr {args.lr:g}, clip {args.clip:g},"
        f" seed {args.seed}"
    )
    print_device(device)
    print()

    def measure() -> dict[str, float]:
        return {args.cell: validation_loss(model, validation, device)}

    saved = {"folder": args.output, "settings": settings, "state": state}
    if not train_pairs(runs, args.iterations, measure, "nats per word", compute_loss.batches, **saved):
        return 130

    results = {}
    for beam in args.beams:
        found = write_captions(model, test.grey, beam, device)
        results[beam] = rates(found, test.labels)
    best = [captions[0] for captions in found]  # by the last of the beams
    wrong = [row for row, caption in enumerate(best) if caption not in CAPTIONS[test.labels[row]]]
    metrics = {
        "settings": settings,
        "environment": describe_environment(device),
        "test_pictures": len(test.labels),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_per_iteration": statistics.median(run.seconds),
        "training_loss": statistics.mean(run.losses[-100:]),
        "beams": results,
        "history": state["history"],
        "captions": [
            {"label": label, "captions": [spelled(caption) for caption in captions]}
            for label, captions in list(zip(test.labels, found, strict=True))[:SHOWN]
        ],
        "wrong": [{"label": test.labels[row], "caption": spelled(best[row])} for row in wrong],
    }
    write_json(args.output / "metrics.json", metrics)
    shown = [row for row in range(len(best)) if row not in wrong][: SHOWN - min(len(wrong), COLUMNS)]
    draw_captions(args.output / "captions.png", test, found, shown + wrong[:COLUMNS])

    for sample in metrics["captions"][:PRINTED]:
        print(f"\n{NAMES[sample['label']]:8}" + f"\n{'':8}".join(sample["captions"]))
    for sample in metrics["wrong"]:
        print(f"\n{NAMES[sample['label']]:8}{sample['caption']}  (wrong)")
    print()
    for beam, result in results.items():
        count = min(beam, len(CAPTIONS[0]))
        of_best = f"; {100 * result['right_of_n_best']:.1f} % of the best {count} right" if count > 1 else ""
        print(
            f"beam {beam}: {100 * result['right']:.1f} % of {len(best)} captions right,"
            f" {100 * result['right_for_some_digit']:.1f} % for some digit{of_best}"
        )
    print(f"\nWrote metrics.json, captions.png, checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
