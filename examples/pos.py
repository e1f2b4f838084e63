"""Part-of-speech tagging: which of 17 universal tags each word of an English sentence has, many-to-many.

A word, its own embedding next to what a small LSTM makes of its letters, goes through an LSTM that reads the sentence
in both directions. Another one that reads it in one direction, with as many units in all, sees the same minibatches:
how they compare on sentences that none of them has seen tells what the words to the right are worth. The data is the
English Web Treebank of Universal Dependencies (Silveira et al. 2014), release 2.16.

    python examples/pos.py
    python examples/pos.py --models bidirectional --layers 2 --iterations 10000
    python examples/pos.py --data path/to/UD_English-EWT
"""

import argparse
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from _data import data_files
from _tagging import (
    PARTS,
    Corpus,
    Sentence,
    Tags,
    add_tagger_arguments,
    align,
    gold,
    make_corpus,
    read_conll,
    train_taggers,
)
from _trainer import Parser, markdown, run_main, write_json
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, confusion_matrix

TREEBANK = "UD English EWT 2.16"
URL = "https://raw.githubusercontent.com/UniversalDependencies/UD_English-EWT/r2.16/"
HASHES = {
    "en_ewt-ud-train.conllu": "3fb78e2b55482c8ee00caa653af436c88c9e5bc9a73ce26e4ae3ddc79d2b7e7b",
    "en_ewt-ud-dev.conllu": "531a54ff90d6ab12201c5a50c3e78e6ddac4de69abc4bce5d275d3cd29efe2b6",
    "en_ewt-ud-test.conllu": "e266e515a0a7547657ed3d90d9ba46487d6bd251f27ad4269d4e8a427c8555cd",
}
NO_WORD = r"#|\d+[-.]"  # comments, two words written as one (1-2), words left out (1.1): they have no tag of their own
BASELINE = "most frequent tag"
SHOWN_WORDS = 20  # of the sentence that is printed, at most


def read_treebank(data: Path | None) -> dict[str, list[Sentence]]:
    paths = data_files(data, "UD_English-EWT-2.16", URL, HASHES)
    return {part: read_conll(path, 10, 1, 3, NO_WORD) for part, path in zip(PARTS, paths, strict=True)}


def flat(tags: Tags) -> list[str]:
    return [tag for of_sentence in tags for tag in of_sentence]


def accuracy(true: Tags, found: Tags) -> float:
    return float(accuracy_score(flat(true), flat(found)))


def most_frequent_tags(corpus: Corpus) -> Tags:
    """Of the test part's words the tag that each has most often in training, for unseen ones the most frequent one."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in corpus.parts["train"]:
        for word, tag in zip(words, tags, strict=True):
            seen[word.lower()][tag] += 1
    of_word = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
    unseen = statistics.mode(flat(gold(corpus, "train")))
    return [[of_word.get(word.lower(), unseen) for word in words] for words, _ in corpus.parts["test"]]


def evaluate(corpus: Corpus, found: dict[str, Tags]) -> dict[str, dict[str, Any]]:
    """Accuracy on the test part, also of words that are not in the train part, and by tag."""
    true = flat(gold(corpus, "test"))
    unseen = [word.lower() not in corpus.words for words, _ in corpus.parts["test"] for word in words]
    results = {}
    for name, tags in found.items():
        right = [a == b for a, b in zip(true, flat(tags), strict=True)]
        of_tag = {tag: [ok for ok, of in zip(right, true, strict=True) if of == tag] for tag in sorted(set(true))}
        of_unseen = [ok for ok, new in zip(right, unseen, strict=True) if new]
        results[name] = {
            "accuracy": statistics.mean(right),
            "accuracy_of_unseen_words": statistics.mean(of_unseen) if of_unseen else None,
            "accuracy_by_tag": {tag: statistics.mean(oks) for tag, oks in of_tag.items()},
        }
    return results


def choose_sentence(corpus: Corpus, found: dict[str, Tags]) -> int:
    """The first short sentence that the first model has right and the last one not, if there is one."""
    models = list(found.values())
    for i, (words, tags) in enumerate(corpus.parts["test"]):
        if len(words) <= SHOWN_WORDS and models[0][i] == tags and (models[-1][i] != tags or len(models) == 1):
            return i
    return 0


def draw(path: Path, corpus: Corpus, found: dict[str, Tags], results: dict[str, dict[str, Any]]) -> None:
    """Accuracy by tag of each model, and what the first one takes for what."""
    true = flat(gold(corpus, "test"))
    counts = Counter(true)
    tags = [tag for tag, _ in counts.most_common()]
    figure = Figure(figsize=(13, 6), layout="constrained")
    bars, matrix = figure.subplots(1, 2)
    height = 0.8 / len(found)
    for i, name in enumerate(found):
        by_tag = results[name]["accuracy_by_tag"]
        positions = [row + (i - (len(found) - 1) / 2) * height for row in range(len(tags))]
        label = f"{name}: {results[name]['accuracy']:.4f}"
        bars.barh(positions, [by_tag[tag] for tag in tags], height, label=label, color=("#1d3557", "#f4a259")[i % 2])
    bars.set_yticks(range(len(tags)), [f"{tag} ({counts[tag]:,})" for tag in tags])
    bars.invert_yaxis()
    bars.set_xlabel("share of the tag's words that are right")
    bars.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    bars.grid(axis="x", alpha=0.3)

    name = next(iter(found))
    shares = confusion_matrix(true, flat(found[name]), labels=tags, normalize="true")
    matrix.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1)  # the root shows small shares
    for row, values in enumerate(100 * shares):
        for column, percent in enumerate(values):
            if percent >= 0.5:
                color = "white" if percent > 40 else "black"
                matrix.text(column, row, f"{percent:.0f}", ha="center", va="center", fontsize=7, color=color)
    matrix.set_xticks(range(len(tags)), tags, rotation=90)
    matrix.set_yticks(range(len(tags)), tags)
    matrix.set_xlabel("found")
    matrix.set_ylabel("true")
    matrix.set_title(f"{name}, per cent of the true tag's words", fontsize="medium")
    figure.savefig(path, dpi=90)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Tag parts of speech with LSTMs of two directions and of one.")
    add_tagger_arguments(
        parser,
        models=["bidirectional", "unidirectional"],
        files=", ".join(HASHES),
        iterations=1600,
        batch=32,
        lr=4e-3,
        output="runs/pos",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    corpus = make_corpus(str(args.data or TREEBANK), read_treebank(args.data))
    trained = train_taggers(corpus, args, "accuracy", accuracy)
    if trained is None:
        return 130

    found, metrics = trained
    results = evaluate(corpus, {**found, BASELINE: most_frequent_tags(corpus)})
    i = choose_sentence(corpus, found)
    words, true = corpus.parts["test"][i]
    sample = {"words": words, "true": true, "found": {name: tags[i] for name, tags in found.items()}}
    test_words = len(flat(gold(corpus, "test")))
    write_json(args.output / "metrics.json", metrics | {"test_words": test_words, "models": results, "sample": sample})
    draw(args.output / "tags.png", corpus, found, results)
    print("\n" + align({"": words, "true": true, **sample["found"]}))
    rows = [["model", "parameters", "test accuracy", "of unseen words"]]
    for name, result in results.items():
        unseen = result["accuracy_of_unseen_words"]
        size = f"{metrics['parameters'][name]:,}" if name in found else ""
        rows.append([name, size, f"{result['accuracy']:.4f}", "" if unseen is None else f"{unseen:.4f}"])
    table = markdown(rows)
    (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nWrote metrics.json, table.md, tags.png and checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
