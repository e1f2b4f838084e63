"""Captions as a user runs it, but tiny, under invented pictures: a digit is a light square at a place of its own."""

import itertools
import random
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest

from tests.examples.conftest import BAD_OPTIONS, Program

TINY = ("--data", "pictures.csv", "--hidden", 32, "--embedding", 16, "--dropout", 0, "--lr", 0.01, "--device", "cpu")


@pytest.fixture(autouse=True)
def pictures(folder: Path) -> None:
    draw = random.Random(0)
    lines = []
    for label in [*range(10)] * 20:
        grey = [draw.randint(0, 4) for _ in range(64)]
        row, column = divmod(label, 4)
        for y, x in itertools.product((0, 1), repeat=2):
            grey[8 * (2 * row + y) + 2 * column + x] = draw.randint(12, 16)
        lines.append(",".join(map(str, [*grey, label])))
    (folder / "pictures.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_captions_are_learned(program: Program, capsys: pytest.CaptureFixture[str], cell: str) -> None:
    metrics = program.run("--cell", cell, "--iterations", 200)
    assert [row["iteration"] for row in metrics["history"]] == list(range(10, 201, 10))
    assert list(metrics["beams"]) == ["1", "5"]
    for beam, result in metrics["beams"].items():
        assert result["right"] > 0.9, beam
        assert result["right_for_some_digit"] > 0.9
        assert result["right_of_n_best"] > (0.3 if beam == "5" else 0.9)
    assert matplotlib.image.imread("out/captions.png").std() > 0.05
    sample = metrics["captions"][0]
    assert len({*sample["captions"]}) == 4
    printed = capsys.readouterr().out
    assert sample["captions"][0] in printed
    assert f"beam 1: {100 * metrics['beams']['1']['right']:.1f} % of {metrics['test_pictures']} captions" in printed


def test_resume_after_interrupt_is_the_same_run(program: Program) -> None:
    options = ("--iterations", 20, "--dropout", 0.3, "--beams", 2)
    program.check_resume("caption.validation_loss", *options, call=7, iteration=7)
    assert "the checkpoint was made with cell gru, not lstm" in program.error(*options, "--resume", "--cell", "lstm")


def test_reference_agrees(program: Program) -> None:
    options = ("--iterations", 20, "--batch", 16, "--backend")
    kernels, reference = (program.run(*options, backend)["history"] for backend in ("auto", "reference"))
    assert len(kernels) == 20
    for ours, theirs in zip(kernels, reference, strict=True):
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-4)


def test_captions_of_a_digit_are_of_no_other(example: ModuleType) -> None:
    every = [tuple(caption) for captions in example.CAPTIONS for caption in captions]
    assert len({*every}) == len(every) == 40
    spelled = {label: [example.spelled(caption) for caption in example.CAPTIONS[label]] for label in (0, 8)}
    assert spelled[0] == [
        "the digit zero",
        "a zero, which is even and smaller than five",
        "this is zero, one less than one",
        "an even number, smaller than five: zero",
    ]
    assert spelled[8][1:3] == ["an eight, which is even and larger than four", "this is eight, one more than seven"]


def test_digits_of_scikit_learn(example: ModuleType) -> None:
    _, parts, _ = example.make_parts(None)
    assert sum(len(pictures.labels) for pictures in parts.values()) == 1797
    seen = [{tuple(grey) for grey in pictures.grey.tolist()} for pictures in parts.values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert all({*pictures.labels} == {*range(10)} for pictures in parts.values())
    assert 0.17 < len(parts["test"].labels) / 1797 < 0.23
    pairs = parts["test"].pairs()
    words = [[example.WORDS[token] for token in row if token != example.END] for row in pairs.target[:4].tolist()]
    assert words == example.CAPTIONS[parts["test"].labels[0]]
    assert (pairs.source[:4] == parts["test"].grey[0]).all()


def test_rates(example: ModuleType) -> None:
    three, odd = "the digit three".split(), "a three , which is even and smaller than five".split()
    rates = example.rates([[three, odd], [odd, three], [three, three]], [3, 3, 2])
    assert rates == {
        "right": pytest.approx(1 / 3),
        "right_for_some_digit": pytest.approx(2 / 3),
        "right_of_n_best": pytest.approx(2 / 6),
    }


GREY = ",".join(["0"] * 64)
BAD_INPUT = BAD_OPTIONS | {
    "missing": (("--data", "missing"), "--data missing cannot be read: No such file or directory"),
    "words": (("--data", "words"), "--data words must have 64 grey values from 0 to 16 and a label from 0 to 9"),
    "columns": (("--data", "columns"), "in each line, but line 2 has not"),
    "label": (("--data", "label"), "in each line, but line 1 has not"),
    "grey": (("--data", "grey"), "in each line, but line 1 has not"),
    "binary": (("--data", "binary"), "--data binary is not text"),
    "one": (("--data", "one"), "--data one: none of 1 pictures falls into the"),
    "cell": (("--cell", "qrnn"), "argument --cell: invalid choice: 'qrnn'"),
}
FILES = {
    "words": "No pictures.\n",
    "columns": f"{GREY},1\n{GREY}\n",
    "label": f"{GREY},10\n",
    "grey": f"17,{GREY[2:]},1\n",
    "one": f"{GREY},1\n",
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, folder: Path, options: tuple[object, ...], message: str) -> None:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "binary").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert message in program.error(*options)
