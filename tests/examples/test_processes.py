"""The examples under torchrun: two processes learn what one does, stop, go on and die as they should."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.conftest import EXAMPLES

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
CHAR_LM = ("char_lm.py", "--batch", 5, "--sequence", 8, "--hidden", 12, "--cell", "lstm", "--layers", 2)
CHAR_LM += ("--data", EXAMPLES / "char_lm.py", "--device", "cpu")
TRANSLATE = ("translate.py", "--data", "pairs.tsv", "--hidden", 16, "--embedding", 8, "--batch", 7, "--dropout", 0)
TRANSLATE += ("--vocabulary", 24, "--iterations", 30, "--beams", 1, "--device", "cpu")
# Two processes add up the same numbers in another order; over these few iterations that grows to 1e-6 (measured).
SAME = 1e-5


def torchrun(*options: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, options)]


def run(*commands: tuple[object, ...]) -> str:
    """What two processes print as they run the examples one after another."""
    texts = json.dumps([list(map(str, command)) for command in commands])
    program = torchrun(Path(__file__).with_name("run_examples.py"), texts)
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def pairs(folder: Path) -> None:
    draw = random.Random(0)
    sentences = {"".join(draw.choices(["ba", "ki", "lo"], k=draw.randint(1, 9))) for _ in range(200)}
    lines = [f"{sentence}\t{sentence[::-1]}\n" for sentence in sorted(sentences)]
    (folder / "pairs.tsv").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs an example in this process alone."""

    def call(program: str, *options: object) -> None:
        monkeypatch.setattr(sys, "argv", [program, *map(str, options)])
        assert importlib.import_module(Path(program).stem).main() == 0

    return call


def metrics_of(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "metrics.json").read_text())


def test_two_processes_learn_what_one_does(here: Callable[..., None]) -> None:
    """Checkpoints go from one way of training to another; minibatches are no multiples of two.

    Those of translate.py have pairs of different lengths, and at an epoch's end a single one for both processes.
    """
    printed = run(
        (*CHAR_LM, "--iterations", 10, "--output", "mixed"),
        (*CHAR_LM, "--iterations", 15, "--output", "mixed", "--resume", "--parallel", "fsdp"),
        *((*TRANSLATE, "--output", parallel, "--parallel", parallel) for parallel in ("ddp", "fsdp")),
    )
    assert printed.count("Wrote curves.png") == 2 and printed.count("Wrote metrics.json") == 2

    here(*CHAR_LM, "--iterations", 20, "--output", "mixed", "--resume")
    here(*CHAR_LM, "--iterations", 20, "--output", "one")
    one, mixed = (
        torch.tensor([result["losses"] for result in metrics_of(folder)["runs"].values()])
        for folder in ("one", "mixed")
    )
    assert one.shape == (2, 20) and one[0, -1] < one[0, 0] - 0.1
    assert (mixed - one).abs().max() < SAME

    here(*TRANSLATE, "--output", "single")
    single = metrics_of("single")
    for parallel in ("ddp", "fsdp"):
        found = metrics_of(parallel)
        for name, result in single["models"].items():
            assert found["models"][name]["training_loss"] == pytest.approx(result["training_loss"], abs=SAME)
            assert found["models"][name]["beams"]["1"]["character_error_rate"] == pytest.approx(
                result["beams"]["1"]["character_error_rate"]
            )
        for two, one in zip(found["history"], single["history"], strict=True):
            assert two["validation_loss"] == pytest.approx(one["validation_loss"], abs=SAME)


def start(*options: object) -> subprocess.Popen[str]:
    """Two processes, once they have written a checkpoint."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = subprocess.Popen(torchrun(EXAMPLES / "char_lm.py", *options), env=ENVIRONMENT, text=True, **pipes)
    end = time.monotonic() + 90
    while not Path("out/checkpoint.pt").exists():
        assert time.monotonic() < end and started.poll() is None
        time.sleep(0.1)
    return started


def test_stopped_processes_leave_a_checkpoint() -> None:
    started = start(*CHAR_LM[1:], "--iterations", 100_000, "--output", "out")
    started.send_signal(signal.SIGINT)
    printed, _ = started.communicate(timeout=120)
    assert printed.count("Stopped at iteration") == 1
    assert "go on with: torchrun --nproc-per-node 2 " in printed and printed.rstrip().endswith("--resume")
    saved = torch.load("out/checkpoint.pt", weights_only=True)
    iterations = int(printed.rsplit("Stopped at iteration ", 1)[1].split(";")[0])
    assert min(len(run["losses"]) for run in saved["runs"].values()) == iterations > 0


def test_a_dead_process_ends_the_other_with_one_line() -> None:
    started = start(*CHAR_LM[1:], "--iterations", 100_000, "--output", "out")
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    of_rank = {Path(f"/proc/{child}/environ").read_bytes().split(b"\0RANK=")[1][:1]: int(child) for child in children}
    os.kill(of_rank[b"1"], signal.SIGKILL)
    _, errors = started.communicate(timeout=120)
    ours = [line for line in errors.splitlines() if line.startswith("char_lm: error: ")]
    assert ours == [
        "char_lm: error: another process has died; what is written is whole, go on from it (a training: with --resume)"
    ]
    assert torch.load("out/checkpoint.pt", weights_only=True)["runs"]


DECODE = ("decode.py", "--model", "model/bpe", "--input", "lines.txt", "--chunk", 7, "--batch", 3, "--longest", 12)


@pytest.fixture
def lines(folder: Path, here: Callable[..., None]) -> list[str]:
    """Sentences to decode, with a model that has seen the like a few times."""
    here(*TRANSLATE, "--iterations", 200, "--lr", 0.02, "--tokens", "bpe", "--output", "model")
    draw = random.Random(1)
    lines = ["".join(draw.choices(["ba", "ki", "lo"], k=draw.randint(1, 12))) for _ in range(50)]
    lines[13] = ""
    (folder / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    return lines


def test_decode_keeps_the_order(folder: Path, here: Callable[..., None], lines: list[str]) -> None:
    printed = run((*DECODE, "--output", "two.txt"))
    assert printed == "Wrote 50 translations to two.txt.\n"
    here(*DECODE, "--output", "one.txt")
    written = (folder / "two.txt").read_text()
    assert written == (folder / "one.txt").read_text()
    of_line = dict(zip(lines, written.splitlines(), strict=True))
    assert of_line[""] == "" and len({*of_line.values()}) > 20
    (folder / "lines.txt").write_text("\n".join(reversed(lines)))
    here(*DECODE, "--output", "reversed.txt")
    assert (folder / "reversed.txt").read_text().splitlines() == [of_line[line] for line in reversed(lines)]
    assert not list(folder.glob("*.parts"))


@pytest.mark.usefixtures("lines")
def test_decode_goes_on_where_it_stopped(
    folder: Path, here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = importlib.import_module("decode")
    chunks = []
    translate = decode.translate

    def stops(*arguments: Any) -> list[str]:
        chunks.append(arguments[3])
        if len(chunks) == 4:
            raise KeyboardInterrupt
        return translate(*arguments)

    monkeypatch.setattr(decode, "translate", stops)
    with pytest.raises(KeyboardInterrupt):
        here(*DECODE, "--output", "out.txt")
    assert not (folder / "out.txt").exists()
    here(*DECODE, "--output", "out.txt")
    assert len(chunks) == 4 + 5 and chunks[3] == chunks[4]  # of eight chunks three were there
    here(*DECODE, "--output", "again.txt")
    assert (folder / "out.txt").read_text() == (folder / "again.txt").read_text()


def test_decode_errors(
    folder: Path, here: Callable[..., None], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "model.pt").write_bytes(b"not a model")
    (folder / "old.txt.parts").mkdir()
    (folder / "old.txt.parts" / "job.json").write_text("{}")
    for options, message in (
        (("--input", "none"), "--input none cannot be read: No such file"),
        (("--input", "model/bpe/model.pt"), "is not UTF-8 text"),
        (("--model", "none"), "--model none: none/model.pt cannot be read: No such file"),
        (("--model", "other"), "--model other is not a model of translate.py: other/model.pt must be"),
        (("--output", "lines.txt/out.txt"), "cannot be used: "),
        (("--output", "old.txt", "--beam", 2), "old.txt.parts is of another input, model or options"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            here(*DECODE, "--output", "out.txt", *options)
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
        assert not (folder / "out.txt").exists()
