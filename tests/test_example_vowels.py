"""Classification of series as a user runs it, but tiny: only the end of a series, wherever that is, tells its label."""

import dataclasses
import importlib
import itertools
import json
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.accuracy import assert_as_accurate

EXAMPLES = Path(__file__).parent.parent / "examples"
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


@pytest.fixture(scope="module")
def vowels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("vowels")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the programs run, one thread each: with more, tiny steps wait for other programs on the same cores."""
    (tmp_path / "series").mkdir()
    write_series(tmp_path / "series" / TRAIN, 90, 0)
    write_series(tmp_path / "series" / TEST, 60, 1)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run(vowels: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vowels.py", *map(str, (*TINY, *options))])
    return vowels.main()


def metrics(name: str) -> dict:
    return json.loads((Path(name) / "metrics.json").read_text())


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_end_is_found_by_lengths(
    vowels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    assert run(vowels, monkeypatch, "--cell", cell, "--iterations", 60, "--output", "out") == 0
    written = metrics("out")
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


def test_a_series_in_a_batch_is_as_alone(vowels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what lengths are for, in any order; the model that is not told them sees the zeros after the end."""
    monkeypatch.setattr(sys, "argv", ["vowels.py", *map(str, TINY)])
    args = vowels.parse_arguments()
    part = vowels.make_corpus(Path("series")).test
    assert part.lengths.tolist() != sorted(part.lengths.tolist(), reverse=True)
    for with_lengths in (True, False):
        model = vowels.Classifier(2, 3, args, with_lengths=with_lengths)
        with torch.no_grad():
            together = model(part.x, part.lengths)
            alone = torch.cat(
                [model(part.x[i : i + 1, :n], torch.tensor([n])) for i, n in enumerate(part.lengths.tolist())]
            )
        assert torch.allclose(together, alone, atol=1e-6) == with_lengths


def test_resume_after_interrupt_is_the_same_run(
    vowels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--iterations", 20, "--dropout", 0.3, "--output")
    assert run(vowels, monkeypatch, *options, "whole") == 0

    step = vowels.Trainer.step
    calls = itertools.count()

    def interrupted(trainer: object) -> None:
        if next(calls) == 14:
            signal.raise_signal(signal.SIGINT)
        step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(vowels.Trainer, "step", interrupted)
        assert run(vowels, patch, *options, "parts") == 130
    assert "Stopped at iteration 7; go on with: python vowels.py" in capsys.readouterr().out
    assert not Path("parts/metrics.json").exists()
    assert run(vowels, monkeypatch, *options, "parts", "--resume") == 0
    whole, parts = metrics("whole"), metrics("parts")
    assert whole.pop("environment") and parts.pop("environment")  # with the load at the start
    assert whole == parts

    with pytest.raises(SystemExit, match="2"):
        run(vowels, monkeypatch, *options, "parts", "--resume", "--dropout", 0)
    assert "the checkpoint was made with dropout 0.3, not 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_kernels_agree_with_the_reference(vowels: ModuleType, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Both loss curves are as close to the one in fp64, and so are the scores after training."""
    curves, scores = {}, {}
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        options = (*TINY, "--cell", cell, "--backend", backend)
        monkeypatch.setattr(sys, "argv", ["vowels.py", *map(str, options)])
        args = vowels.parse_arguments()
        train, test = (
            dataclasses.replace(part, x=part.x.to(dtype))
            for part in (vowels.make_corpus(args.data).train, vowels.make_corpus(args.data).test)
        )
        torch.manual_seed(0)
        model = vowels.Classifier(2, 3, args, with_lengths=True).to(dtype)
        trainer = vowels.Trainer(model, vowels.ClassificationLoss(train, args), lr=0.01, clip=1.0)
        for _ in range(10):
            trainer.step()
        curves[backend, dtype] = torch.tensor(trainer.losses, dtype=dtype)
        scores[backend, dtype] = model(test.x, test.lengths)
    assert_as_accurate(*curves.values())
    assert_as_accurate(*scores.values())


def test_packaged_data(vowels: ModuleType) -> None:
    corpus = vowels.make_corpus(None)
    assert corpus.names == list("123456789")
    assert corpus.train.x.shape[2] == corpus.test.x.shape[2] == 12
    assert (len(corpus.train.labels), len(corpus.test.labels)) == (270, 370)
    lengths = torch.cat([corpus.train.lengths, corpus.test.lengths])
    assert (int(lengths.min()), int(lengths.max())) == (7, 29)
    # 30 utterances of each speaker to learn from.
    assert corpus.train.labels.bincount().tolist() == [30] * 9


def test_channels_have_mean_0_and_variance_1(vowels: ModuleType) -> None:
    train = vowels.make_corpus(Path("series")).train
    steps = torch.cat([series[:n] for series, n in zip(train.x, train.lengths.tolist(), strict=True)])
    torch.testing.assert_close(steps.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(steps.var(0, correction=0), torch.ones(2))
    assert all(not series[n:].any() for series, n in zip(train.x, train.lengths.tolist(), strict=True))


BAD_INPUT = {
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
    "back end": (("--backend", "fortran"), "--backend fortran: backend must be"),
    "no permission": (("--output", "/sys/fastrnn"), "--output /sys/fastrnn cannot be written:"),
    "nothing to resume": (("--resume", "--output", "new"), "--resume: there is no checkpoint new/checkpoint.pt"),
}


@pytest.mark.parametrize(("case", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(
    vowels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: tuple[object, ...] | str | bytes,
    message: str,
) -> None:
    if not isinstance(case, tuple):
        Path("series", TRAIN).write_bytes(case.encode() if isinstance(case, str) else case)
    with pytest.raises(SystemExit, match="2"):
        run(vowels, monkeypatch, *(case if isinstance(case, tuple) else ()))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("vowels: error: ") and message in printed.err and printed.err.count("\n") == 1
