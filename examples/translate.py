"""Translation: by sub-words (byte pair encoding, Sennrich et al. 2016, arXiv 1508.07909) and by characters.

Two models of the same layers, encoder and decoder with additive attention, learn the same sentences: one as the tokens
of byte pair encoding, learned on the training part by the package tokenizers, the other as characters. Sentences that
neither has seen tell how they compare; a sentence is right when it is a known translation to the last letter.

By default the sentences are numbers below a million as words, which the package num2words writes. --data takes a file
with a sentence, a tab and its translation in each line; what follows a second tab is left out.

    python examples/translate.py
    python examples/translate.py --languages en fr
    python examples/translate.py --data sentences.tsv --vocabulary 4000 --hidden 512 --iterations 30000
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import time
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
from num2words import CONVERTER_CLASSES, num2words
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

import fastrnn
import fastrnn.plot
from fastrnn import nn

TOKENS = ("bpe", "characters")
NUMBERS = 1_000_000  # those below it are drawn from
TEST_SHARE, VALIDATION_SHARE = 0.10, 0.04  # of the sentences
VALIDATION_PAIRS = 1000
SPECIAL = ["<unk>", "<s>", "</s>"]
UNKNOWN, BEGIN, END = range(3)
SHOWN = 5  # translations printed
CURVE_OPTIONS = ("tokens", "languages", "sentences", "vocabulary", "hidden", "embedding", "dropout", "label_smoothing")
CURVE_OPTIONS += ("iterations", "batch", "lr", "clip", "seed")

Sentences = dict[str, list[str]]  # sentence: its known translations


@dataclass(frozen=True)
class Corpus:
    """Sentences with their translations, drawn into parts by their hash: a sentence is always in the same part."""

    description: str
    parts: dict[str, Sentences]
    digest: str

    def pairs(self, part: str) -> list[tuple[str, str]]:
        return [(sentence, target) for sentence, targets in self.parts[part].items() for target in targets]


class Tokens:
    """The two languages as tokens of one kind.

    Args:
        name: ``"bpe"`` or ``"characters"``, which is byte pair encoding without a merge.
        pairs: sentences and translations to learn from.
        vocabulary: tokens of each language at most, unless it has more characters.
    """

    def __init__(self, name: str, pairs: list[tuple[str, str]], vocabulary: int) -> None:
        sides = ([sentence for sentence, _ in pairs], [target for _, target in pairs])
        size = vocabulary if name == "bpe" else 0
        self.source, self.target = (train_tokenizer(sorted({*side}), size) for side in sides)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.source.get_vocab_size(), self.target.get_vocab_size()

    def encode(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        return pad([encoding.ids for encoding in self.source.encode_batch(sentences)], UNKNOWN)

    def encode_pairs(self, pairs: list[tuple[str, str]]) -> Pairs:
        targets = self.target.encode_batch([target for _, target in pairs])
        target = pad([encoding.ids + [END] for encoding in targets], END)
        return Pairs(*self.encode([sentence for sentence, _ in pairs]), *target)


def save_model(folder: Path, model: nn.Seq2Seq, tokens: Tokens) -> None:
    """Write what decode.py takes."""
    folder.mkdir(exist_ok=True)
    tokens.source.save(str(folder / "source.json"))
    tokens.target.save(str(folder / "target.json"))
    model.save(folder / "model.tmp")
    os.replace(folder / "model.tmp", folder / "model.pt")


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte pair encoding of a language; with a vocabulary of 0 nothing is merged and the tokens are characters."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.NFC()
    # A space is a mark on the word behind it, the first word's too so that it is the same token as elsewhere.
    first = "always" if vocabulary else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=first)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=first)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Learn to translate by sub-words and by characters.")
    add_arguments(parser, iterations=500, batch=64, lr=3e-3, clip=1.0, output="runs/translate")
    parser.add_argument(
        "--tokens", nargs="+", choices=TOKENS, default=list(TOKENS), help="a model for each: " + ", ".join(TOKENS)
    )
    parser.add_argument(
        "--languages",
        nargs=2,
        choices=sorted(CONVERTER_CLASSES),
        metavar=("FROM", "TO"),
        default=["de", "fr"],
        help="of the number words, as num2words names them (de fr)",
    )
    parser.add_argument("--sentences", type=positive_int, default=10000, help="at most (%(default)s)")
    parser.add_argument(
        "--vocabulary", type=positive_int, default=200, help="of byte pair encoding, per language (%(default)s)"
    )
    parser.add_argument("--hidden", type=positive_int, default=192, help="hidden units, even (%(default)s)")
    parser.add_argument("--embedding", type=positive_int, default=96, help="size of embeddings (%(default)s)")
    parser.add_argument("--dropout", type=probability, default=0.1, help="of embeddings and outputs (%(default)s)")
    parser.add_argument("--label-smoothing", type=probability, default=0.0, help="(%(default)s)")
    parser.add_argument(
        "--beams", type=positive_int, nargs="+", default=[1, 5], metavar="BEAM", help="sizes to search with (1 5)"
    )
    parser.add_argument("--data", type=Path, help="file of lines: sentence, tab, translation")
    args = parser.parse_args()
    if args.hidden % 2:
        fail(f"--hidden must be even, for the encoder has two directions, got {args.hidden}")
    if args.data is not None:
        args.languages = None
    return args


def number_words(languages: list[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Numbers, none of them twice, in two languages."""
    numbers = random.Random(seed).sample(range(NUMBERS), min(count, NUMBERS))
    sides = []
    for language in languages:
        try:
            sides.append([num2words(number, lang=language) for number in numbers])
        except Exception as error:  # languages raise one of many unrelated types
            fail(f"--languages: num2words cannot write these numbers in {language} ({type(error).__name__}: {error})")
    return list(zip(*sides, strict=True))


def read_pairs(data: Path, count: int) -> list[tuple[str, str]]:
    """The first pairs of a file; fails with one line if it cannot be read or has others."""
    pairs: list[tuple[str, str]] = []
    try:
        for number, line in enumerate(data.read_text(encoding="utf-8-sig").split("\n"), 1):
            columns = [" ".join(column.split()) for column in line.split("\t")[:2]]
            if len(columns) == 2 and all(columns):
                pairs.append((columns[0], columns[1]))
            elif any(columns):
                fail(f"--data {data} has no sentence, tab and translation in line {number}")
            if len(pairs) == count:
                break
    except OSError as error:
        fail(f"--data {data} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"--data {data} is not UTF-8 text: {error}")
    return pairs


def make_corpus(args: argparse.Namespace) -> Corpus:
    if args.data is None:
        pairs = number_words(args.languages, args.sentences, args.seed)
        description = f"number words, {' to '.join(args.languages)} (num2words {version('num2words')})"
        name = f"--sentences {args.sentences}"
    else:
        pairs = read_pairs(args.data, args.sentences)
        description = str(args.data)
        name = f"--data {args.data}"
    parts: dict[str, dict[str, dict[str, None]]] = {"train": {}, "validation": {}, "test": {}}
    for sentence, target in pairs:
        part = part_of(sentence.encode(), TEST_SHARE, VALIDATION_SHARE)
        parts[part].setdefault(sentence, {})[target] = None
    for part, found in parts.items():
        if not found:
            fail(f"{name}: none of {len(pairs)} sentences falls into the {part} part, give more")
    return Corpus(
        description=description,
        parts={part: {sentence: list(targets) for sentence, targets in found.items()} for part, found in parts.items()},
        digest=hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
    )


def make_model(tokens: Tokens, args: argparse.Namespace) -> nn.Seq2Seq:
    hidden, embedding, backend = args.hidden, args.embedding, args.backend
    source, target = tokens.sizes
    encoder = nn.LSTM(embedding, hidden // 2, batch_first=True, bidirectional=True, backend=backend)
    attention = nn.AdditiveAttention(hidden, hidden, hidden // 2, backend=backend)
    decoder = nn.AttentionDecoder("lstm", embedding, hidden, attention, backend=backend)
    return nn.Seq2Seq(
        nn.TokenEncoder(source, embedding, encoder, dropout=args.dropout),
        nn.TokenDecoder(target, embedding, decoder, bos=BEGIN, eos=END, dropout=args.dropout),
    )


@torch.no_grad()
def translate(
    model: nn.Seq2Seq, tokens: Tokens, sentences: list[str], beam: int, longest: int, device: torch.device
) -> tuple[list[str], list[tuple[list[str], list[str], Tensor]]]:
    """What search makes of each sentence; and source tokens, target tokens and attention's weights [target, source]."""
    found: dict[str, str] = {}
    alignments: dict[str, tuple[list[str], list[str], Tensor]] = {}
    by_length = sorted(sentences, key=len)
    model.eval()
    for start in range(0, len(sentences), EVALUATION_BATCH):
        chunk = by_length[start : start + EVALUATION_BATCH]
        source, lengths = (tensor.to(device) for tensor in tokens.encode(chunk))
        result = model.generate(source, lengths, beam_size=beam, max_length=longest, need_alignments=True)
        for i, sentence in enumerate(chunk):
            written = result.tokens[i, 0, : int(result.lengths[i, 0])].tolist()
            read = source[i, : int(lengths[i])].tolist()
            found[sentence] = tokens.target.decode(written)
            alignments[sentence] = (
                [tokens.source.id_to_token(token) for token in read],
                [tokens.target.id_to_token(token) for token in written],
                result.alignments[i, 0, : len(written), : len(read)].cpu(),
            )
    model.train()
    return [found[sentence] for sentence in sentences], [alignments[sentence] for sentence in sentences]


def scores(found: list[str], references: list[list[str]]) -> dict[str, float]:
    """The share of sentences that are a known translation, and errors per character against the closest one."""
    errors, characters, wrong = count_errors(found, references)
    return {"sentence_accuracy": (len(found) - wrong) / len(found), "character_error_rate": errors / characters}


def evaluate(
    runs: dict[str, Trainer],
    tokens: dict[str, Tokens],
    corpus: Corpus,
    longest: dict[str, int],
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, tuple[list[str], list[str], Tensor]]]:
    """How right each model is, a few of its translations, and where it looked in one of them."""
    sentences = list(corpus.parts["test"])
    references = list(corpus.parts["test"].values())
    shown = random.Random(args.seed).sample(range(len(sentences)), min(SHOWN, len(sentences)))
    drawn = min(shown, key=lambda i: len(sentences[i]))
    samples = [{"sentence": sentences[i], "known": references[i], "found": {}} for i in shown]
    results: dict[str, Any] = {}
    pictures: dict[str, tuple[list[str], list[str], Tensor]] = {}
    with tqdm(total=len(runs) * len(args.beams), unit="search", disable=None, leave=False) as bar:
        for name, run in runs.items():
            beams = {}
            for beam in args.beams:
                start = time.perf_counter()
                found, alignments = translate(run.model, tokens[name], sentences, beam, longest[name], device)
                beams[beam] = scores(found, references) | {"seconds": time.perf_counter() - start}
                bar.update()
            for i, sample in zip(shown, samples, strict=True):  # by the last of the beams
                sample["found"][name] = found[i]
            pictures[name] = alignments[drawn]
            test = tokens[name].encode_pairs(corpus.pairs("test"))
            results[name] = {
                "vocabulary": tokens[name].sizes,
                "source_tokens_per_sentence": test.source_lengths.float().mean().item(),
                "target_tokens_per_sentence": test.target_lengths.float().mean().item() - 1,  # without the end
                "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
                "seconds_per_iteration": statistics.median(run.seconds),
                "training_loss": statistics.mean(run.losses[-100:]),
                "beams": beams,
            }
    return results, samples, pictures


def table_of(results: dict[str, Any], history: list[dict[str, Any]]) -> str:
    """A table of the results, accuracies and error rates in per cent."""
    beams = list(next(iter(results.values()))["beams"])
    head = ["tokens", "vocabularies", "tokens per sentence", "parameters", "ms per step", "validation loss"]
    head += [f"{figure}, beam {beam}" for beam in beams for figure in ("right", "CER")]
    rows = [head]
    for name, result in results.items():
        lengths = (result[f"{side}_tokens_per_sentence"] for side in ("source", "target"))
        rates = [
            f"{100 * result['beams'][beam][rate]:.2f}"
            for beam in beams
            for rate in ("sentence_accuracy", "character_error_rate")
        ]
        rows.append(
            [
                name,
                " to ".join(map(str, result["vocabulary"])),
                " to ".join(f"{length:.1f}" for length in lengths),
                f"{result['parameters']:,}",
                f"{1000 * result['seconds_per_iteration']:.0f}",
                f"{history[-1]['validation_loss'][name]:.3f}",
                *rates,
            ]
        )
    return markdown(rows)


def draw_alignments(path: Path, pictures: dict[str, tuple[list[str], list[str], Tensor]]) -> None:
    """Where each model looked in one sentence."""
    widths = [max(4.0, 1.5 + 0.18 * len(source)) for source, _, _ in pictures.values()]
    height = max(4.0, 1.5 + 0.15 * max(len(target) for _, target, _ in pictures.values()))
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    axes = figure.subplots(1, len(pictures), squeeze=False, width_ratios=widths)[0]
    for ax, (name, (source, target, weights)) in zip(axes, pictures.items(), strict=True):
        fastrnn.plot.alignment(weights, source, target, ax=ax)
        ax.tick_params(labelsize=8)
        ax.set_xlabel(name)
    figure.savefig(path, dpi=80)


def print_header(
    corpus: Corpus, tokens: dict[str, Tokens], args: argparse.Namespace, pairs: int, device: torch.device
) -> None:
    parts = ", ".join(f"{len(found):,} {part}" for part, found in corpus.parts.items())
    vocabularies = ", ".join(f"{name} {' to '.join(map(str, each.sizes))}" for name, each in tokens.items())
    print(f"data      {corpus.description}, sentences: {parts}")
    print(f"tokens    {vocabularies}")
    print(f"models    LSTM of {args.hidden} units, encoder of two directions, additive attention")
    print(
        f"training  {args.iterations} iterations of {args.batch} of {pairs:,} pairs"
        f" ({args.iterations * args.batch / pairs:.1f} epochs), Adam lr {args.lr:g}, clip {args.clip:g},"
        f" seed {args.seed}"
    )
    print_device(device)
    print()


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    corpus = make_corpus(args)
    prepare_output(args.output)

    training, held_out = corpus.pairs("train"), corpus.pairs("validation")[:VALIDATION_PAIRS]
    tokens = {name: Tokens(name, training, args.vocabulary) for name in args.tokens}
    validation = {name: each.encode_pairs(held_out) for name, each in tokens.items()}
    runs: dict[str, Trainer] = {}
    longest: dict[str, int] = {}  # that a translation may be
    for name, each in tokens.items():
        pairs = each.encode_pairs(training)
        longest[name] = 2 * pairs.target.shape[1]
        compute_loss = PairLoss(pairs, args.batch, args.label_smoothing, args.seed, device)
        runs[name] = make_trainer(partial(make_model, each, args), compute_loss, args, device, WARM_UP)
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS} | {"data": corpus.digest}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}

    def measure() -> dict[str, float]:
        losses = {name: validation_loss(run.model, validation[name], device) for name, run in runs.items()}
        # Per sentence, for tokens of the one are longer than those of the other.
        return {name: loss * validation[name].target_lengths.float().mean().item() for name, loss in losses.items()}

    print_header(corpus, tokens, args, len(training), device)
    saved = {"folder": args.output, "settings": settings, "state": state}
    if not train_pairs(runs, args.iterations, measure, "nats per sentence", compute_loss.batches, **saved):
        return 130

    results, samples, pictures = evaluate(runs, tokens, corpus, longest, args, device)
    metrics = {
        "settings": settings,
        "environment": describe_environment(device),
        "test_sentences": len(corpus.parts["test"]),
        "models": results,
        "history": state["history"],
        "samples": samples,
    }
    write_json(args.output / "metrics.json", metrics)
    for name, run in runs.items():
        save_model(args.output / name, run.model, tokens[name])
    table = table_of(results, state["history"])
    (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_alignments(args.output / "alignments.png", pictures)
    for sample in samples:
        print(f"\n{'':12}{sample['sentence']}\n{'known':12}{' or '.join(sample['known'])}")
        for name, found in sample["found"].items():
            print(f"{name:12}{found}" + ("" if found in sample["known"] else "  (wrong)"))
    print(
        f"\nIn per cent of {len(corpus.parts['test']):,} sentences those right, and of their characters errors (CER):\n"
    )
    print(table)
    files = ["metrics.json", "table.md", "alignments.png", "checkpoint.pt", *(f"{name}/model.pt" for name in runs)]
    print(f"\nWrote {', '.join(files)} to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
