"""Text character by character as a user runs it, but tiny; also in processes of its own, one of which is stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import torch

from tests.examples.conftest import BAD_OPTIONS, EXAMPLES, Program, loss_curve

CHAR_LM = EXAMPLES / "char_lm.py"
TEXT = CHAR_LM  # real text that is always there
BATCH, SEQUENCE, HIDDEN = 4, 8, 16
TINY = ("--batch", BATCH, "--sequence", SEQUENCE, "--hidden", HIDDEN, "--data", TEXT)
# Threads of OpenMP that spin while they wait make tiny steps 25 times slower when other programs want the cores (seen).
ENVIRONMENT = os.environ | {"OMP_WAIT_POLICY": "passive"}


def command(*options: object) -> list[str]:
    return [sys.executable, str(CHAR_LM), *map(str, options)]


def run(*options: object) -> None:
    subprocess.run(command(*options), env=ENVIRONMENT, check=True, capture_output=True, timeout=60)


def losses(folder: Path | str) -> tuple[list[float], list[float]]:
    runs = json.loads(Path(folder, "metrics.json").read_text())["runs"]
    return runs["torch.nn"]["losses"], runs["fastrnn"]["losses"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    run(*TINY, "--iterations", 400, "--output", folder)
    return folder


def test_results(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [sample["iteration"] for sample in metrics["samples"]] == [100, 300, 400]
    assert metrics["iterations"] == 400
    for run in metrics["runs"].values():
        assert len(run["losses"]) == len(run["step_seconds"]) == 400
        assert run["losses"][-1] < run["losses"][0] - 1
        assert run["training_seconds"] == pytest.approx(sum(run["step_seconds"]))
    picture = matplotlib.image.imread(finished / "curves.png", format="png")
    assert picture.shape[0] > 400 and picture.shape[1] > 800 and picture.std() > 0.05
    assert metrics["samples"][0]["text"]["fastrnn"] in (finished / "samples.txt").read_text()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_same_loss_curve(program: Program, example: ModuleType, cell: str, layers: int) -> None:
    """Both curves are as close to the exact one (fp64) as the contract asks of a single operator.

    Rounding grows from step to step through the parameters, for both implementations alike, so the error of
    torch.nn's own fp32 curve is the measure; no fixed tolerance would hold for every number of steps.
    """
    iterations = 40
    program.run("--iterations", iterations, "--cell", cell, "--layers", layers)

    corpus = example.make_corpus(TEXT, BATCH, SEQUENCE)
    torch.manual_seed(0)
    model = example.CharacterModel(cell, len(corpus.vocabulary), HIDDEN, layers).double()
    exact = loss_curve(model, example.NextCharacterLoss(corpus.streams, SEQUENCE), iterations, 2e-3)

    torch_error, fastrnn_error = (max(abs(a - b) for a, b in zip(curve, exact, strict=True)) for curve in losses("out"))
    assert fastrnn_error <= 2 * (torch_error + torch.finfo(torch.float32).eps * max(exact))


def test_resume_after_interrupt_is_the_same_run(finished: Path, tmp_path: Path) -> None:
    options = (*TINY, "--iterations", 400, "--output", tmp_path)
    with subprocess.Popen(command(*options), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.split()[:1] == ["50"]:
                    process.send_signal(signal.SIGINT)
                    break
            output = process.stdout.read()
        except BaseException:
            process.kill()  # or the timeout of this test would wait for it
            raise
    assert process.returncode == 130
    assert "Stopped at iteration" in output and "--resume" in output
    assert not (tmp_path / "metrics.json").exists()

    run(*options, "--resume")
    assert losses(tmp_path) == losses(finished)


def test_resume_of_another_run_is_refused(program: Program, finished: Path) -> None:
    for options, message in (
        (("--iterations", 500, "--lr", 0.5), "the checkpoint was made with lr 0.002, not 0.5"),
        (("--iterations", 400), "the checkpoint is at iteration 400 already"),
    ):
        assert message in program.error("--resume", *options, output=finished)


def test_one_line_from_the_command_line(tmp_path: Path) -> None:
    result = subprocess.run(
        command("--data", tmp_path / "missing"), cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"char_lm: error: --data {tmp_path / 'missing'} is not a file or folder\n"


BAD_INPUT = BAD_OPTIONS | {
    "empty": (("--data", "empty.txt"), "--data empty.txt contains no text"),
    "binary": (("--data", "picture.png"), "--data picture.png is not UTF-8 text: 'utf-8' codec can't decode byte 0x89"),
    "null characters": (("--data", "null.txt"), "--data null.txt is not UTF-8 text: it contains null characters"),
    "folder without text": (("--data", "binaries"), "--data binaries contains no text"),
    "too short": (("--data", "short.txt"), "--data short.txt is too short: 30 characters, but one batch takes 36"),
    "output is a file": (("--output", "empty.txt"), "--output empty.txt cannot be written: File exists"),
    "output inside a file": (("--output", "empty.txt/a"), "--output empty.txt/a cannot be written: Not a directory"),
    "batch": (("--batch", "0"), "argument --batch: must be a positive integer, got '0'"),
    "clip": (("--clip", "nan"), "argument --clip: must be a number of at least 0, got 'nan'"),
    "cell": (("--cell", "qrnn"), "argument --cell: invalid choice: 'qrnn'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, options: tuple[str, ...], message: str) -> None:
    Path("empty.txt").touch()
    Path("short.txt").write_text("too short for four streams. " + "\n" * 2)
    Path("null.txt").write_bytes(b"text\0" * 100)
    Path("binaries").mkdir()
    for picture in (Path("picture.png"), Path("binaries/picture.png")):
        picture.write_bytes(b"\x89PNG\r\n\x1a\n" * 100)
    assert message in program.error(*options)
