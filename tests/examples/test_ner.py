"""Named entities as a user runs it, but tiny, on an invented language; more on taggers is in test_pos.py."""

import importlib
import itertools
import random
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.examples.conftest import Program

TINY = ("--data", "tweets", "--hidden", 16, "--embedding", 8, "--letter-hidden", 8, "--batch", 16, "--dropout", 0)
TINY += ("--lr", 0.02, "--device", "cpu")
FILES = ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")


def sentences(count: int, seed: int) -> str:
    """Names of one or two capitalised words, of persons after "mr" and of places after "in"."""
    draw = random.Random(seed)
    text = ""
    for _ in range(count):
        for _ in range(draw.randint(1, 4)):
            text += "".join(f"{''.join(draw.choices('bdgklm', k=3))}\tO\n" for _ in range(draw.randint(0, 3)))
            lead, kind = draw.choice((("mr", "person"), ("in", "location")))
            text += f"{lead}\tO\n"
            for place in "BI"[: draw.randint(1, 2)]:
                text += f"{''.join(draw.choices('bdgklm', k=4)).title()}\t{place}-{kind}\n"
            text += "#end\tO\n"
        text += draw.choice(("\n", "\t\n"))
    return text


@pytest.fixture(autouse=True)
def tweets(folder: Path) -> None:
    (folder / "tweets").mkdir()
    for seed, (name, count) in enumerate(zip(FILES, (150, 40, 40), strict=True)):
        (folder / "tweets" / name).write_text(sentences(count, seed))


def test_finds_new_names(program: Program, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = program.run("--iterations", 100)
    result = metrics["models"]["bidirectional"]
    true = (folder / "tweets" / FILES[2]).read_text()
    assert result["entity_f1"] > 0.9
    assert {kind: counts["true"] for kind, counts in result["by_type"].items()} == {
        kind: true.count(f"B-{kind}") for kind in ("location", "person")
    }
    for counts in result["by_type"].values():
        assert counts["right"] <= min(counts["true"], counts["found"])
        assert counts["f1"] == pytest.approx(2 * counts["right"] / (counts["true"] + counts["found"]))
    sample = metrics["sample"]
    assert sample["found"]["bidirectional"] == sample["true"]
    assert len({*sample["true"]} - {"O"}) >= 2
    printed = capsys.readouterr().out
    assert Path("out/table.md").read_text() in printed
    assert all(part in printed for part in sample["words"] + sample["true"])
    assert matplotlib.image.imread("out/entities.png").std() > 0.05


def test_back_ends_agree(program: Program) -> None:
    histories = (program.run("--iterations", 20, "--backend", name)["history"] for name in ("cpu", "reference"))
    for a, b in zip(*histories, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_parts(example: ModuleType) -> None:
    """The test part is left as it is, of the others' sentences every tenth is for validation."""
    parts = example.read_sentences(Path("tweets"))
    assert {name: len(part) for name, part in parts.items()} == {"train": 171, "validation": 19, "test": 40}
    words = [word for sentence, _ in parts["test"] for word in sentence]
    assert words == [line.split("\t")[0] for line in Path("tweets", FILES[2]).read_text().split("\n") if line.strip()]


def test_words_are_cut_as_in_the_test_part(example: ModuleType) -> None:
    words, tags = ["I'm", "@Ann", "http://a.b/c", "in", "St.", "Paul", "t-shirt", "..."], ["O", "B-person", "O", "O"]
    found = example.split_words(words, [*tags, "B-location", "I-location", "O", "O"])
    assert " ".join(found[0]) == "I ' m @ Ann http://a.b/c in St . Paul t-shirt . . ."
    assert " ".join(found[1]) == "O O O O B-person O O B-location I-location I-location O O O O"


def test_best_paths_are_the_best_of_all() -> None:
    """Against every sequence of tags, in sentences of all lengths."""
    best_paths = importlib.import_module("_tagging").best_paths
    tags, lengths = 4, torch.tensor([3, 1, 5, 2])
    scores = torch.randn(4, 5, tags)
    allowed = torch.ones(tags + 1, tags, dtype=torch.bool)
    allowed[1, 2] = allowed[0, 1] = allowed[4, 3] = False
    found = best_paths(scores, lengths, allowed)
    for row, length in enumerate(lengths.tolist()):

        def total(path: tuple[int, ...], row: int = row) -> float:
            return float(sum(scores[row, t, tag] for t, tag in enumerate(path)))

        paths = itertools.product(range(tags), repeat=length)
        best = max((path for path in paths if all(allowed[step] for step in zip((tags, *path), path))), key=total)
        assert tuple(found[row, :length].tolist()) == best


def test_what_may_follow(example: ModuleType) -> None:
    assert [example.may_follow(before, "I-person") for before in ("O", "B-person", "I-person", "B-group")] == [
        False,
        True,
        True,
        False,
    ]
    assert example.may_follow("I-group", "B-group") and example.may_follow("I-group", "O")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing", "--data missing is not a folder; it must hold wnut17train.conll, emerging.dev.conll, emerging.te"),
        ("empty", "empty/wnut17train.conll cannot be read: No such file or directory"),
        ("columns", "columns/wnut17train.conll, line 2: not a word and its tag in 2 columns parted by tabs"),
    ],
)
def test_bad_data_gets_one_line(program: Program, data: str, message: str) -> None:
    Path("empty").mkdir()
    Path("columns").mkdir()
    Path("columns", FILES[0]).write_text("in\tO\nParis\n")
    assert program.error("--data", data).startswith(message)
