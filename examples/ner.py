"""Named entities of types that no list holds all of, persons, places, products, works and so on, in BIO tags.

A word, its own embedding next to what a small LSTM makes of its letters, goes through an LSTM that reads the sentence
in both directions and tells for each word whether it begins an entity (B-person), goes on with one (I-person) or is in
none (O); of the tags that may follow each other those with the best sum of scores are taken. An entity counts as found
when its first word, its last word and its type are right (entity F1, by seqeval). The data is that of the workshop on
noisy user-generated text of 2017 (WNUT 2017, Derczynski et al.), whose test entities are mostly new ones.

    python examples/ner.py
    python examples/ner.py --models bidirectional unidirectional
    python examples/ner.py --data path/to/emerging_entities_17
"""

import argparse
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _data import data_files
from _tagging import Sentence, Tags, add_tagger_arguments, align, gold, make_corpus, read_conll, train_taggers
from _trainer import Parser, markdown, run_main, write_json
from matplotlib.figure import Figure
from seqeval.metrics import classification_report, f1_score
from seqeval.metrics.sequence_labeling import get_entities

URL = "https://raw.githubusercontent.com/leondz/emerging_entities_17/e52a2d2a71ac1a051ca2d532eef28653c5c02603/"
HASHES = {
    "wnut17train.conll": "731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5",
    "emerging.dev.conll": "e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8",
    "emerging.test.annotated": "2aa79b764e56ec9264a1b30fdd9b70195bd00ff400b62edd8f399d5f13c178f0",
}
VALIDATION = 10  # every so manieth sentence of what is not for the test
SHOWN_WORDS = 20  # of the sentence that is printed, at most


def split_words(words: list[str], tags: list[str]) -> Sentence:
    """The words as the dev and test parts are cut, at every sign but hyphens and within addresses.

    The train part has "I'm", "@name" and "..." as one word each, they have "I", "'", "m" and "@", "name".
    """
    split: Sentence = ([], [])
    for word, tag in zip(words, tags, strict=True):
        pieces = [word] if "://" in word else re.findall(r"[\w-]+|[^\w-]", word)
        tags_of_pieces = [tag] * len(pieces)
        if tag.startswith("B-"):
            first = next((i for i, piece in enumerate(pieces) if piece[0].isalnum()), 0)  # not the sign of "@name"
            tags_of_pieces = ["O"] * first + [tag] + [f"I-{tag[2:]}"] * (len(pieces) - first - 1)
        split[0].extend(pieces)
        split[1].extend(tags_of_pieces)
    return split


def read_sentences(data: Path | None) -> dict[str, list[Sentence]]:
    """The parts; train and dev are of different web sites, the test of further ones, so both are trained on."""
    paths = data_files(data, "WNUT2017", URL, HASHES)
    train, dev, test = (read_conll(path, columns=2, word=0, tag=1) for path in paths)
    known = [split_words(*sentence) for sentence in train] + dev
    validation = known[::VALIDATION]
    del known[::VALIDATION]
    return {"train": known, "validation": validation, "test": test}


def may_follow(before: str, tag: str) -> bool:
    """I-x goes on with an entity, of the same type; all others may come anywhere."""
    return not tag.startswith("I-") or (before != "O" and before[2:] == tag[2:])


def entity_f1(true: Tags, found: Tags) -> float:
    return float(f1_score(true, found, zero_division=0))


def evaluate(true: Tags, found: dict[str, Tags]) -> dict[str, dict[str, Any]]:
    """Entity F1 of each model, and precision, recall and counts of entities by type."""
    results = {}
    for name, tags in found.items():
        report = classification_report(true, tags, output_dict=True, zero_division=0)
        predicted = Counter(kind for kind, _, _ in get_entities(tags))
        both = Counter(kind for kind, _, _ in {*get_entities(true)} & {*get_entities(tags)})
        micro = report["micro avg"]
        results[name] = {
            "entity_f1": entity_f1(true, tags),
            "precision": float(micro["precision"]),
            "recall": float(micro["recall"]),
            "by_type": {
                kind: {
                    "f1": float(scores["f1-score"]),
                    "true": int(scores["support"]),
                    "found": predicted[kind],
                    "right": both[kind],
                }
                for kind, scores in report.items()
                if not kind.endswith(" avg")
            },
        }
    return results


def choose_sentence(sentences: list[Sentence], found: Tags) -> int:
    """The short sentence with most entities that are found, a wrong one counted against them."""

    def rank(i: int) -> int:
        words, tags = sentences[i]
        true, predicted = set(get_entities(tags)), set(get_entities(found[i]))
        return 2 * len(true & predicted) - len(true ^ predicted) if len(words) <= SHOWN_WORDS else -len(words)

    return max(range(len(found)), key=rank)


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """How many entities of each type there are, how many each model found, and how many of them are right."""
    figure = Figure(figsize=(8, 3.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False)
    for ax, (name, result) in zip(axes[:, 0], results.items(), strict=True):
        kinds = sorted(result["by_type"], key=lambda kind: -result["by_type"][kind]["true"])
        colors = {"true": "#a8b5c5", "found": "#f4a259", "right": "#1d3557"}
        for i, (which, color) in enumerate(colors.items()):
            counts = [result["by_type"][kind][which] for kind in kinds]
            bars = ax.bar([x + 0.27 * (i - 1) for x in range(len(kinds))], counts, 0.25, label=which, color=color)
            ax.bar_label(bars, fontsize=7)
        labels = [f"{kind}\nF1 {result['by_type'][kind]['f1']:.2f}" for kind in kinds]
        ax.set_xticks(range(len(kinds)), labels)
        ax.set_ylabel("entities of the test part")
        ax.set_title(f"{name}, F1 {result['entity_f1']:.3f}", fontsize="medium")
        ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Find named entities with LSTMs.")
    add_tagger_arguments(
        parser,
        models=["bidirectional"],
        files=", ".join(HASHES),
        iterations=3000,
        batch=16,
        lr=5e-3,
        output="runs/ner",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning, "seqeval")
    corpus = make_corpus(str(args.data or "WNUT 2017"), read_sentences(args.data))
    allowed = torch.tensor([[may_follow(before, tag) for tag in corpus.tags] for before in [*corpus.tags, "O"]])
    trained = train_taggers(corpus, args, "entity F1", entity_f1, allowed)
    if trained is None:
        return 130

    found, metrics = trained
    results = evaluate(gold(corpus, "test"), found)
    sentences = corpus.parts["test"]
    i = choose_sentence(sentences, next(iter(found.values())))
    words, true = sentences[i]
    sample = {"words": words, "true": true, "found": {name: tags[i] for name, tags in found.items()}}
    write_json(args.output / "metrics.json", metrics | {"models": results, "sample": sample})
    draw(args.output / "entities.png", results)
    print("\n" + align({"": words, "true": true, **sample["found"]}))
    rows = [["model", "parameters", "entity F1", "precision", "recall"]]
    for name, result in results.items():
        scores = [f"{result[score]:.4f}" for score in ("entity_f1", "precision", "recall")]
        rows.append([name, f"{metrics['parameters'][name]:,}", *scores])
    by_type = [["type", "true", "found", "right", "F1"]]
    for kind, counts in next(iter(results.values()))["by_type"].items():
        by_type.append([kind, *(str(counts[which]) for which in ("true", "found", "right")), f"{counts['f1']:.4f}"])
    table = markdown(rows) + "\n\n" + markdown(by_type)
    (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nWrote metrics.json, table.md, entities.png and checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
