"""Classification of series as a user runs it, but tiny: only the end of a series, wherever that is, tells its label."""

import dataclasses
import random
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.accuracy import assert_as_accurate
from tests.examples.conftest import BAD_OPTIONS, Program, loss_curve

TRAIN, TEST = "JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"
TINY = ("--data", "series", "--hidden", 16, "--batch", 30, "--dropout", 0, "--lr", 0.02)
TINY += ("--device", "cpu")


def write_series(path: Path, count: int, seed: int) -> None:
    """Two channels; which of them is the larger at the last step, or neither, is the label."""
    draw = random.Random(seed)
    lines = ["# comment", "@problemName Invented", "@classLabel true first second", "@data"]
    for i in range(count):
        steps = draw.randint(3, 12)
        channels = [[draw.choice((-1.0, 1.0)) for _ in range(steps)] for _ in range(2)]
        channels[0][-1], channels[1][-1] = ((1.0, -1.0), (-1.0, 1.0), (1.0, 1.0))[i % 3]
        label = ("first", "second", "neither")[i % 3]
        lines.append(":".join([",".join(map(str, channel)) for channel in channels] + [label]))
    path.write_text("\n".join(lines) + "\n\n")


@pytest.fixture(autouse=True)
def series(folder: Path) -> None:
    (folder / "series").mkdir()
    write_series(folder / "series" / TRAIN, 90, 0)
    write_series(folder / "series" / TEST, 60, 1)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_end_is_found_by_lengths(program: Program, capsys: pytest.CaptureFixture[str], cell: str) -> None:
    written = program.run("--cell", cell, "--iterations", 60)
    assert (written["train_series"], written["test_series"]) == (90, 60)
    assert [row["iteration"] for row in written["history"]] == list(range(6, 61, 6))
    result = written["models"]["lengths"]
    assert result["accuracy"] > 0.95 and result["macro_f1"] > 0.95
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum(1).tolist() == [20, 20, 20]
    assert confusion.diagonal().sum().item() == round(result["accuracy"] * 60)
    assert matplotlib.image.imread("out/confusion.png").std() > 0.05
    printed = capsys.readouterr().out
    assert "90 series to learn, 60 to test, 2 channels, 3 to 12 steps, 3 labels" in printed
    assert f"{result['accuracy']:.4f}" in printed


def test_a_series_in_a_batch_is_as_alone(program: Program, example: ModuleType) -> None:
    """That is what lengths are for, in any order; the model that is not told them sees the zeros after the end."""
    args = program.parse()
    part = example.make_corpus(Path("series")).test
    assert part.lengths.tolist() != sorted(part.lengths.tolist(), reverse=True)
    for with_lengths in (True, False):
        model = example.Classifier(2, 3, args, with_lengths=with_lengths)
        with torch.no_grad():
            together = model(part.x, part.lengths)
            alone = torch.cat(
                [model(part.x[i : i + 1, :n], torch.tensor([n])) for i, n in enumerate(part.lengths.tolist())]
            )
        assert torch.allclose(together, alone, atol=1e-6) == with_lengths


def test_resume_after_interrupt_is_the_same_run(program: Program) -> None:
    options = ("--iterations", 20, "--dropout", 0.3)
    program.check_resume("_trainer.Trainer.step", *options, call=15, iteration=7)
    assert "the checkpoint was made with dropout 0.3, not 0.0" in program.error(*options, "--resume", "--dropout", 0)


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_kernels_agree_with_the_reference(program: Program, example: ModuleType, cell: str) -> None:
    """Both loss curves are as close to the one in fp64, and so are the scores after training."""
    curves, scores = {}, {}
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        args = program.parse("--cell", cell, "--backend", backend)
        train, test = (
            dataclasses.replace(part, x=part.x.to(dtype))
            for part in (example.make_corpus(args.data).train, example.make_corpus(args.data).test)
        )
        torch.manual_seed(0)
        model = example.Classifier(2, 3, args, with_lengths=True).to(dtype)
        losses = loss_curve(model, example.ClassificationLoss(train, args), 10, 0.01)
        curves[backend, dtype] = torch.tensor(losses, dtype=dtype)
        scores[backend, dtype] = model(test.x, test.lengths)
    assert_as_accurate(*curves.values())
    assert_as_accurate(*scores.values())


def test_packaged_data(example: ModuleType) -> None:
    corpus = example.make_corpus(None)
    assert corpus.names == list("123456789")
    assert corpus.train.x.shape[2] == corpus.test.x.shape[2] == 12
    assert (len(corpus.train.labels), len(corpus.test.labels)) == (270, 370)
    lengths = torch.cat([corpus.train.lengths, corpus.test.lengths])
    assert (int(lengths.min()), int(lengths.max())) == (7, 29)
    # 30 utterances of each speaker to learn from.
    assert corpus.train.labels.bincount().tolist() == [30] * 9


def test_channels_have_mean_0_and_variance_1(example: ModuleType) -> None:
    train = example.make_corpus(Path("series")).train
    steps = torch.cat([series[:n] for series, n in zip(train.x, train.lengths.tolist(), strict=True)])
    torch.testing.assert_close(steps.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(steps.var(0, correction=0), torch.ones(2))
    assert all(not series[n:].any() for series, n in zip(train.x, train.lengths.tolist(), strict=True))


BAD_INPUT = BAD_OPTIONS | {
    "missing": (("--data", "nowhere"), f"--data: nowhere/{TRAIN} cannot be read: No such file or directory"),
    "no data": ("text", "is not a .ts file: there is no line @data"),
    "no series": ("@data\n\n", "is not a .ts file: there are no series"),
    "no numbers": ("@data\n1,2:3,4:a\n1,x:3,4:a\n", "is not a .ts file: line 3 is no series of numbers"),
    "cut off": ("@data\n1,2:3,4:a\n1,2:3\n", "is not a .ts file: line 3 has missing values, or other channels than"),
    "unequal channels": ("@data\n1,2:3:a\n", "is not a .ts file: line 2 is no series of numbers"),
    "missing values": ("@data\n1,2:3,NaN:a\n", "is not a .ts file: line 2 has missing values, or other channels than"),
    "binary": (b"\xff\xfe\x00", "is not a .ts file: it is not UTF-8 text"),
    "other labels": ("@data\n1,2:3,4:first\n", f"{TEST} has the label 'neither', which {TRAIN} has not"),
    "other channels": ("@data\n1:first\n1:second\n1:neither\n", f"{TEST} has other channels than {TRAIN}"),
    "dropout": (("--dropout", 1), "argument --dropout: must be a number from 0 to below 1, got '1'"),
}


@pytest.mark.parametrize(("case", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, case: tuple[object, ...] | str | bytes, message: str) -> None:
    if not isinstance(case, tuple):
        Path("series", TRAIN).write_bytes(case.encode() if isinstance(case, str) else case)
    assert message in program.error(*(case if isinstance(case, tuple) else ()))
