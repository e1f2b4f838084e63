"""What the taggers share: CoNLL files, words and their letters as tensors, the network, its loss and its training."""

import argparse
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _processes as processes
import torch
from _seq2seq import pad
from _trainer import (
    Parser,
    add_arguments,
    choose_device,
    describe_environment,
    evenly,
    fail,
    make_trainer,
    positive_int,
    prepare_output,
    print_device,
    probability,
    resume,
    train,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding
from tqdm import tqdm

from fastrnn import nn

PARTS = ("train", "validation", "test")
MODELS = ("bidirectional", "unidirectional")
UNKNOWN = 0  # word or letter
NO_TAG = -100  # past a sentence's end, and what is in no training data
RARE_WORD = 2.0  # a word seen n times in training is read as unknown with probability RARE_WORD / (RARE_WORD + n)
LONGEST_WORD = 24  # letters; of longer ones, mostly addresses, the middle is left out
EVALUATION_BATCH = 128
WARM_UP = 100  # iterations
ROWS = 10  # of the table, each with a checkpoint
CURVE_OPTIONS = ("models", "layers", "hidden", "embedding", "letter_hidden", "dropout", "iterations", "batch")
CURVE_OPTIONS += ("lr", "clip", "seed")

Sentence = tuple[list[str], list[str]]  # words and their tags
Tags = list[list[str]]  # of sentences


class Batch(NamedTuple):
    """Sentences, padded, and each of their distinct words once."""

    letters: Tensor  # [U, S], of the distinct words
    spelled: Tensor  # [U], how many letters each has
    words: Tensor  # [U]
    rows: Tensor  # [B, T], of the distinct words
    lengths: Tensor  # [B]
    tags: Tensor  # [B, T]


@dataclass(frozen=True)
class Corpus:
    description: str
    parts: dict[str, list[Sentence]]
    counts: Counter[str]  # of the training words in lower case
    words: dict[str, int]
    letters: dict[str, int]
    tags: list[str]

    def batch(self, sentences: Sequence[Sentence], device: torch.device) -> Batch:
        distinct = sorted({word for words, _ in sentences for word in words})
        row = {word: i for i, word in enumerate(distinct)}
        tag = {tag: i for i, tag in enumerate(self.tags)}
        spellings = [[self.letters.get(letter, UNKNOWN) for letter in shorten(word)] for word in distinct]
        letters, spelled = pad(spellings, UNKNOWN)
        rows, lengths = pad([[row[word] for word in words] for words, _ in sentences], 0)
        tags, _ = pad([[tag.get(name, NO_TAG) for name in names] for _, names in sentences], NO_TAG)
        words = torch.tensor([self.words.get(word.lower(), UNKNOWN) for word in distinct])
        return Batch(*(tensor.to(device) for tensor in (letters, spelled, words, rows, lengths, tags)))


def shorten(word: str) -> str:
    half = LONGEST_WORD // 2
    return word if len(word) <= LONGEST_WORD else word[:half] + word[-half:]


def read_conll(path: Path, columns: int, word: int, tag: int, skip: str | None = None) -> list[Sentence]:
    """The sentences of a file: a word a line, an empty line after each sentence.

    Args:
        path: of the file; fails with one line if it is no such file.
        columns: of each line, parted by tabs.
        word: column of the word.
        tag: column of its tag.
        skip: regular expression of how lines begin that are no words.
    """
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 text: {error}")
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    for number, line in enumerate([*lines, ""], 1):
        row = line.split("\t")
        if not line.strip():
            if words:
                sentences.append((words, tags))
            words, tags = [], []
        elif skip and re.match(skip, line):
            continue
        elif len(row) != columns or not row[word] or not row[tag].strip():
            fail(f"{path}, line {number}: not a word and its tag in {columns} columns parted by tabs")
        else:
            words.append(row[word])
            tags.append(row[tag].strip())
    if not sentences:
        fail(f"{path} contains no sentences")
    return sentences


def make_corpus(description: str, parts: dict[str, list[Sentence]]) -> Corpus:
    """The corpus of the parts named in PARTS; the words, letters and tags that it knows are those of training."""
    trained = [word for words, _ in parts["train"] for word in words]
    counts = Counter(word.lower() for word in trained)
    seen = Counter("".join(trained))
    return Corpus(
        description,
        parts,
        counts,
        {word: i for i, word in enumerate(counts, 1)},
        {letter: i for i, letter in enumerate(sorted(letter for letter in seen if seen[letter] > 1), 1)},
        sorted({tag for _, tags in parts["train"] for tag in tags}),
    )


class Tagger(torch.nn.Module):
    """Each word, as it is and as its letters spell it, goes through LSTM layers to the scores of its tags."""

    def __init__(self, corpus: Corpus, args: argparse.Namespace, *, bidirectional: bool) -> None:
        super().__init__()
        letter_hidden = args.letter_hidden
        counts = torch.tensor([0, *corpus.counts.values()])
        self.register_buffer("hide", RARE_WORD / (RARE_WORD + counts), persistent=False)
        self.word_embedding = torch.nn.Embedding(len(counts), args.embedding)
        self.letter_embedding = torch.nn.Embedding(len(corpus.letters) + 1, letter_hidden)
        self.letter_rnn = nn.LSTM(
            letter_hidden, letter_hidden, batch_first=True, bidirectional=True, backend=args.backend
        )
        self.rnn = nn.LSTM(
            args.embedding + 2 * letter_hidden,
            # One direction has twice the units, so that either way as many tell about a word.
            args.hidden if bidirectional else 2 * args.hidden,
            args.layers,
            batch_first=True,
            bidirectional=bidirectional,
            dropout=args.dropout if args.layers > 1 else 0.0,
            backend=args.backend,
        )
        self.dropout = torch.nn.Dropout(args.dropout)
        self.output = torch.nn.Linear(2 * args.hidden, len(corpus.tags))

    def forward(self, batch: Batch) -> Tensor:
        """Scores [B, T, tags]; past a sentence's end they mean nothing."""
        words = batch.words
        if self.training:
            words = words.masked_fill(torch.rand(words.shape, device=words.device) < self.hide[words], UNKNOWN)
        _, (ends, _) = self.letter_rnn(self.letter_embedding(batch.letters), lengths=batch.spelled)
        vectors = torch.cat((self.word_embedding(words), ends[0], ends[1]), dim=1)
        y, _ = self.rnn(self.dropout(embedding(batch.rows, vectors)), lengths=batch.lengths)
        return self.output(self.dropout(y))


class TaggingLoss:
    """Cross entropy per word of an epoch's next minibatch, of sentences as they come, whatever their length."""

    def __init__(self, corpus: Corpus, batch: int, seed: int, device: torch.device) -> None:
        self.corpus = corpus
        self.batch = batch
        self.seed = seed
        self.device = device
        self.sentences = corpus.parts["train"]
        self.batches = -(-len(self.sentences) // batch)  # in an epoch
        self.epoch = -1

    def __call__(self, model: torch.nn.Module, iteration: int, carry: None) -> tuple[Tensor, None]:
        epoch, position = divmod(iteration, self.batches)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self.order = torch.randperm(len(self.sentences), generator=generator).split(self.batch)
            self.epoch = epoch
        processes.seed_iteration(self.seed, iteration)
        mine, number = processes.shard(self.order[position])
        batch = self.corpus.batch([self.sentences[row] for row in mine], self.device)
        loss = cross_entropy(model(batch).flatten(0, 1), batch.tags.flatten())
        return processes.mean_over_all(loss, int(batch.lengths[:number].sum())), None


def best_paths(scores: Tensor, lengths: Tensor, allowed: Tensor) -> Tensor:
    """The tags with the largest sum of scores of those that may follow each other, by Viterbi's algorithm.

    Args:
        scores: [B, T, tags].
        lengths: [B].
        allowed: [tags + 1, tags], whether a tag, the second index, may come after another one; in the last row,
            whether a sentence may begin with it.

    Returns:
        [B, T] tags; past a sentence's end they mean nothing.
    """
    penalties = torch.zeros(allowed.shape, device=scores.device).masked_fill(~allowed, float("-inf"))
    stay = torch.arange(scores.shape[2], device=scores.device)
    best = scores[:, 0] + penalties[-1]
    before = []
    for t in range(1, scores.shape[1]):
        within = (t < lengths).unsqueeze(1)
        value, index = (best.unsqueeze(2) + penalties[:-1]).max(1)
        best = torch.where(within, value + scores[:, t], best)
        before.append(torch.where(within, index, stay))
    path = [best.argmax(1, keepdim=True)]
    for index in reversed(before):
        path.append(index.gather(1, path[-1]))
    return torch.cat(path[::-1], dim=1)


@torch.no_grad()
def predict(model: Tagger, corpus: Corpus, part: str, device: torch.device, allowed: Tensor | None) -> Tags:
    """Each word's tag with the best score, or the best tags together that may follow each other."""
    found = []
    model.eval()
    sentences = corpus.parts[part]
    for start in range(0, len(sentences), EVALUATION_BATCH):
        batch = corpus.batch(sentences[start : start + EVALUATION_BATCH], device)
        scores = model(batch)
        best = scores.argmax(2) if allowed is None else best_paths(scores, batch.lengths, allowed.to(device))
        for tags, length in zip(best.tolist(), batch.lengths.tolist(), strict=True):
            found.append([corpus.tags[tag] for tag in tags[:length]])
    model.train()
    return found


def gold(corpus: Corpus, part: str) -> Tags:
    return [tags for _, tags in corpus.parts[part]]


def add_tagger_arguments(
    parser: Parser, *, models: Sequence[str], files: str, iterations: int, batch: int, lr: float, output: str
) -> None:
    """Add the options of a tagger, with this example's defaults."""
    add_arguments(parser, iterations=iterations, batch=batch, lr=lr, clip=1.0, output=output)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(models), help=" ".join(MODELS))
    parser.add_argument("--layers", type=positive_int, default=1, help="of the sentence's LSTM (%(default)s)")
    parser.add_argument(
        "--hidden", type=positive_int, default=128, help="units of each of two directions, half of one's (%(default)s)"
    )
    parser.add_argument("--embedding", type=positive_int, default=100, help="size of a word's (%(default)s)")
    parser.add_argument(
        "--letter-hidden", type=positive_int, default=48, help="units per direction of a word's LSTM (%(default)s)"
    )
    parser.add_argument("--dropout", type=probability, default=0.3, help="of inputs and outputs (%(default)s)")
    parser.add_argument("--data", type=Path, help=f"folder with {files} (fetched)")


def train_taggers(
    corpus: Corpus,
    args: argparse.Namespace,
    score_name: str,
    score: Callable[[Tags, Tags], float],
    allowed: Tensor | None = None,
) -> tuple[dict[str, Tags], dict[str, Any]] | None:
    """Train the models of ``--models``, with a table of their scores on the validation part, and tag the test part.

    Args:
        corpus: what to learn.
        args: the options.
        score_name: what the table calls the score.
        score: ``score(true, found)``, by the tags of all sentences.
        allowed: which tags may follow each other, for :func:`best_paths`; all by default.

    Returns:
        The test part's tags by each model, and what metrics.json tells of the training; None after an interruption.
    """
    device = choose_device(args.device)
    prepare_output(args.output)
    compute_loss = TaggingLoss(corpus, args.batch, args.seed, device)
    runs = {}
    for name in args.models:
        runs[name] = make_trainer(
            partial(Tagger, corpus, args, bidirectional=name == "bidirectional"),
            compute_loss,
            args,
            device,
            WARM_UP,
        )
    digest = hashlib.sha256(json.dumps(corpus.parts).encode()).hexdigest()
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": digest}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}

    sizes = ", ".join(f"{len(sentences):,} {part}" for part, sentences in corpus.parts.items())
    print(f"data      {corpus.description}, sentences: {sizes}")
    print(
        f"models    LSTM, {args.layers} layer{'s' * (args.layers > 1)} of 2 x {args.hidden} units, words of"
        f" {args.embedding} and letters of 2 x {args.letter_hidden}: {', '.join(runs)}"
    )
    print(
        f"training  {args.iterations} iterations of {args.batch} sentences"
        f" ({args.iterations / compute_loss.batches:.1f} epochs), Adam lr {args.lr:g}, clip {args.clip:g},"
        f" dropout {args.dropout:g}, seed {args.seed}"
    )
    print_device(device)
    widths = {name: max(10, len(name) + 2) for name in runs}
    print(f"\n{'':>18}{score_name} on the validation part")
    print(f"{'iteration':>9}{'epoch':>7}" + "".join(f"{name:>{width}}" for name, width in widths.items()))

    def pause(iteration: int) -> None:
        scores = {
            name: score(gold(corpus, "validation"), predict(run.model, corpus, "validation", device, allowed))
            for name, run in runs.items()
        }
        losses = {name: run.losses[-1] for name, run in runs.items()}
        state["history"].append({"iteration": iteration, "score": scores, "loss": losses})
        columns = "".join(f"{value:>{widths[name]}.4f}" for name, value in scores.items())
        tqdm.write(f"{iteration:>9}{iteration / compute_loss.batches:>7.1f}{columns}")

    pauses = evenly(args.iterations, ROWS)
    if not train(runs, args.iterations, pauses, pause, folder=args.output, settings=settings, state=state):
        return None
    found = {name: predict(run.model, corpus, "test", device, allowed) for name, run in runs.items()}
    return found, {
        "settings": settings,
        "environment": describe_environment(device),
        "parameters": {name: sum(map(torch.numel, run.model.parameters())) for name, run in runs.items()},
        "seconds_per_iteration": {name: statistics.median(run.seconds) for name, run in runs.items()},
        "history": state["history"],
    }


def align(rows: dict[str, list[str]]) -> str:
    """Words with their tags below them, as lines of at most 100 characters."""
    margin = max(map(len, rows)) + 2
    widths = [max(map(len, column)) + 1 for column in zip(*rows.values(), strict=True)]
    lines, start = [], 0
    while start < len(widths):
        stop = start + 1
        while stop < len(widths) and margin + sum(widths[start : stop + 1]) <= 100:
            stop += 1
        for name, cells in rows.items():
            line = "".join(f"{cell:{width}}" for cell, width in zip(cells[start:stop], widths[start:stop], strict=True))
            lines.append(f"{name:{margin}}{line}".rstrip())
        start = stop
    return "\n".join(lines)
