"""What the examples with an encoder and a decoder share: pairs of sequences, minibatches, parts of data, training."""

import argparse
import hashlib
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _trainer import Trainer, load_checkpoint, non_negative_float, save_checkpoint, train
from torch import Tensor
from tqdm import tqdm

from fastrnn import nn

BUCKET = 50  # minibatches among whose pairs those of similar length are put together
WARM_UP = 200  # iterations
EVALUATION_BATCH = 512
ROWS = 20  # of the table that training prints, each with a checkpoint


@dataclass(frozen=True)
class Pairs:
    """Sources and their targets as tokens, the targets with the end token."""

    source: Tensor  # [N, S]
    source_lengths: Tensor  # [N]
    target: Tensor  # [N, T]
    target_lengths: Tensor  # [N]

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Source, its lengths, target and its lengths of these rows, as narrow as the longest of them."""
        source_lengths, target_lengths = self.source_lengths[rows], self.target_lengths[rows]
        source = self.source[rows, : int(source_lengths.max())]
        return source, source_lengths, self.target[rows, : int(target_lengths.max())], target_lengths


def pad(sequences: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Sequences as one tensor [N, longest], and their lengths [N]."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), int(lengths.max())), value)
    padded[torch.arange(padded.shape[1]) < lengths.unsqueeze(1)] = torch.tensor([i for row in sequences for i in row])
    return padded, lengths


def part_of(item: bytes, test: float, validation: float) -> str:
    """The part of the data that an item is drawn into by its hash, with these shares: always the same one."""
    share = int.from_bytes(hashlib.sha256(item).digest()[:8], "big") / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"


def probability(text: str) -> float:
    value = non_negative_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
    return value


def learning_rate(iteration: int, iterations: int) -> float:
    """Linear up to 1, then half a cosine down to 0."""
    warm_up = min(WARM_UP, iterations // 10)
    if iteration < warm_up:
        return (iteration + 1) / warm_up
    return (1 + math.cos(math.pi * (iteration - warm_up) / (iterations - warm_up))) / 2


class PairLoss:
    """The loss of an epoch's next minibatch, of pairs of similar length."""

    def __init__(self, pairs: Pairs, batch: int, label_smoothing: float, seed: int, device: torch.device) -> None:
        self.pairs = pairs
        self.batch = batch
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.device = device
        self.batches = -(-len(pairs.source) // batch)  # in an epoch
        self.epoch = -1

    def start(self, epoch: int) -> None:
        """Draw the order of an epoch."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        rows = torch.randperm(len(self.pairs.source), generator=generator)
        # One key, for a sort by both lengths; stable, for all processors to sort alike.
        key = self.pairs.source_lengths * (self.pairs.target.shape[1] + 1) + self.pairs.target_lengths
        buckets = [bucket[key[bucket].argsort(stable=True)] for bucket in rows.split(BUCKET * self.batch)]
        batches = [batch for bucket in buckets for batch in bucket.split(self.batch)]
        self.order = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        self.epoch = epoch

    def __call__(self, model: torch.nn.Module, iteration: int, carry: None) -> tuple[Tensor, None]:
        epoch, position = divmod(iteration, self.batches)
        if epoch != self.epoch:
            self.start(epoch)
        torch.manual_seed((self.seed << 20) + iteration)  # of dropout, for a resumed run to go on as before
        batch = (tensor.to(self.device) for tensor in self.pairs.take(self.order[position]))
        return model.loss(*batch, label_smoothing=self.label_smoothing), None


@torch.no_grad()
def validation_loss(model: nn.Seq2Seq, pairs: Pairs, device: torch.device) -> float:
    """Nats per target token, the end among them."""
    model.eval()
    total = 0.0
    for rows in pairs.source_lengths.argsort().split(EVALUATION_BATCH):
        total += model.loss(*(tensor.to(device) for tensor in pairs.take(rows)), reduction="sum").item()
    model.train()
    return total / int(pairs.target_lengths.sum())


def resume(runs: dict[str, Trainer], output: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Set the runs to where their checkpoint was, and return the history until then."""
    saved = load_checkpoint(output / "checkpoint.pt", settings)
    for name, run in runs.items():
        run.load_state_dict(saved["runs"][name])
    return saved["history"]


def train_with_checkpoints(
    runs: dict[str, Trainer],
    iterations: int,
    output: Path,
    settings: dict[str, Any],
    history: list[dict[str, Any]],
    measure: Callable[[], dict[str, float]],
    unit: str,
    batches: int,
) -> bool:
    """Train the runs, with a row of losses in ``history`` and on the screen and a checkpoint now and then.

    Args:
        runs: trainers by name.
        iterations: where they end.
        output: folder of the checkpoint.
        settings: what a run that goes on from it must have alike.
        history: gets a row for each checkpoint.
        measure: returns the validation losses by name.
        unit: of those.
        batches: in an epoch.

    Returns:
        True when all iterations are done; False after Ctrl-C or SIGTERM, having said how to go on.
    """
    widths = {name: max(10, len(name) + 2) for name in runs}

    def save() -> None:
        states = {name: run.state_dict() for name, run in runs.items()}
        save_checkpoint(output / "checkpoint.pt", {"settings": settings, "runs": states, "history": history})

    def pause(iteration: int) -> None:
        losses = measure()
        history.append({"iteration": iteration, "validation_loss": losses})
        columns = "".join(f"{loss:>{widths[name]}.4f}" for name, loss in losses.items())
        tqdm.write(f"{iteration:>9}{iteration / batches:>7.1f}{columns}")
        save()

    print(f"{'':>18}validation loss, {unit}")
    print(f"{'iteration':>9}{'epoch':>7}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    every = max(1, iterations // ROWS)
    if train(runs, iterations, range(every, iterations, every), pause):
        return True
    save()
    command = shlex.join(["python", *(argument for argument in sys.argv if argument != "--resume"), "--resume"])
    print(f"Stopped at iteration {min(run.iteration for run in runs.values())}; go on with: {command}")
    return False
