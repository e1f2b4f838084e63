"""The example programs as a user runs them, but tiny and inside the tests' process."""

import importlib
import itertools
import json
import pkgutil
import signal
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
BAD_OPTIONS = {  # of every example
    "device": (("--device", "gpu"), "--device gpu cannot be used:"),
    "back end": (("--backend", "fortran"), "--backend fortran: backend must be"),
    # Not even root may create folders there, while a folder's own permissions do not bind root.
    "no permission": (("--output", "/sys/fastrnn"), "--output /sys/fastrnn cannot be written:"),
    "nothing to resume": (("--resume", "--output", "new"), "--resume: there is no checkpoint new/checkpoint.pt"),
    "damaged": (("--resume", "--output", "damaged"), "is not a checkpoint of this program"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the programs run, one thread each: with more, tiny steps wait for other programs on the same cores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.set_num_threads(1)
    return tmp_path


@pytest.fixture
def example(request: pytest.FixtureRequest) -> ModuleType:
    """The one that the file of tests is named after."""
    return importlib.import_module(request.path.stem.removeprefix("test_"))


@dataclass
class Program:
    """That example with the file's options TINY, before those of each run."""

    module: ModuleType
    tiny: tuple[object, ...]
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def set_arguments(self, *options: object, output: Path | str = "out") -> None:
        options = (*self.tiny, "--output", output, *options)
        self.monkeypatch.setattr(sys, "argv", [f"{self.module.__name__}.py", *map(str, options)])

    def parse(self, *options: object) -> Namespace:
        self.set_arguments(*options)
        return self.module.parse_arguments()

    def run(self, *options: object, output: Path | str = "out") -> dict[str, Any]:
        """What it writes to metrics.json."""
        self.set_arguments(*options, output=output)
        assert self.module.main() == 0
        return json.loads(Path(output, "metrics.json").read_text(encoding="utf-8"))

    def error(self, *options: object, output: Path | str = "out") -> str:
        """The only line that it prints."""
        self.capsys.readouterr()
        self.set_arguments(*options, output=output)
        with pytest.raises(SystemExit, match=r"^2$"):
            self.module.main()
        printed = self.capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        start = f"{self.module.__name__}: error: "
        assert printed.err.startswith(start)
        return printed.err.removeprefix(start)

    def interrupt(self, function: str, *options: object, call: int, iteration: int) -> None:
        """It stops at that iteration, for SIGINT comes when the function is called for the ``call``-th time."""
        original, calls = pkgutil.resolve_name(function), itertools.count(1)

        def interrupted(*arguments: object) -> Any:
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return original(*arguments)

        self.set_arguments(*options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function, interrupted)
            assert self.module.main() == 130
        message = f"Stopped at iteration {iteration}; go on with: python {self.module.__name__}.py"
        assert message in self.capsys.readouterr().out
        assert not Path("out/metrics.json").exists()

    def check_resume(self, function: str, *options: object, call: int, iteration: int) -> None:
        """A run that is interrupted and resumed is the same as one that is not."""
        whole = self.run(*options, output="whole")
        self.interrupt(function, *options, call=call, iteration=iteration)
        parts = self.run(*options, "--resume")
        assert whole["environment"] and parts["environment"]
        assert without_times(whole) == without_times(parts)


def without_times(metrics: Any) -> Any:
    """And without the environment, which has the load at the start."""
    if not isinstance(metrics, dict):
        return metrics
    dropped = {"environment", "seconds", "seconds_per_iteration"}
    return {name: without_times(value) for name, value in metrics.items() if name not in dropped}


@pytest.fixture
def program(
    example: ModuleType,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Program:
    """Beside a folder whose checkpoint is damaged."""
    Path("damaged").mkdir()
    Path("damaged/checkpoint.pt").write_bytes(b"not a checkpoint")
    return Program(example, request.module.TINY, monkeypatch, capsys)


def loss_curve(model: torch.nn.Module, compute_loss: Any, iterations: int, lr: float) -> list[float]:
    trainer = importlib.import_module("_trainer").Trainer(model, compute_loss, lr=lr, clip=1.0)
    for _ in range(iterations):
        trainer.step()
    return trainer.losses
