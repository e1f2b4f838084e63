"""What the examples with an encoder and a decoder share: pairs of sequences, minibatches, parts of data, training."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _processes as processes
import torch
from _trainer import Trainer, evenly, train
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from tqdm import tqdm

from fastrnn import nn

BUCKET = 50  # minibatches among whose pairs those of similar length are put together
WARM_UP = 200  # iterations of the learning rate
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


def count_errors(found: Sequence[Sequence[str]], known: Sequence[Sequence[Sequence[str]]]) -> tuple[int, int, int]:
    """Edits from each sequence found to the closest one known, the elements of those, and the sequences with edits."""
    errors = elements = wrong = 0
    for sequence, others in zip(found, known, strict=True):
        distance, length = min((Levenshtein.distance(sequence, other), len(other)) for other in others)
        errors += distance
        elements += length
        wrong += distance > 0
    return errors, elements, wrong


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
        processes.seed_iteration(self.seed, iteration)
        mine, number = processes.shard(self.order[position])
        batch = [tensor.to(self.device) for tensor in self.pairs.take(mine)]
        loss = model.loss(*batch, label_smoothing=self.label_smoothing)
        return processes.mean_over_all(loss, int(self.pairs.target_lengths[mine[:number]].sum())), None


@torch.no_grad()
def validation_loss(model: nn.Seq2Seq, pairs: Pairs, device: torch.device) -> float:
    """Nats per target token, the end among them."""
    model.eval()
    total = 0.0
    for rows in pairs.source_lengths.argsort().split(EVALUATION_BATCH):
        total += model.loss(*(tensor.to(device) for tensor in pairs.take(rows)), reduction="sum").item()
    model.train()
    return total / int(pairs.target_lengths.sum())


def train_pairs(
    runs: dict[str, Trainer],
    iterations: int,
    measure: Callable[[], dict[str, float]],
    unit: str,
    batches: int,
    *,
    folder: Path,
    settings: dict[str, Any],
    state: dict[str, Any],
) -> bool:
    """Train the runs like ``_trainer.train``, with rows of losses in ``state["history"]`` and on the screen.

    Args:
        measure: returns the validation losses by name.
        unit: of those.
        batches: in an epoch.
    """
    widths = {name: max(10, len(name) + 2) for name in runs}

    def pause(iteration: int) -> None:
        losses = measure()
        state["history"].append({"iteration": iteration, "validation_loss": losses})
        columns = "".join(f"{loss:>{widths[name]}.4f}" for name, loss in losses.items())
        tqdm.write(f"{iteration:>9}{iteration / batches:>7.1f}{columns}")

    print(f"{'':>18}validation loss, {unit}")
    print(f"{'iteration':>9}{'epoch':>7}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    return train(runs, iterations, evenly(iterations, ROWS), pause, folder=folder, settings=settings, state=state)
