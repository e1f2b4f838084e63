"""What the examples share: options, error reporting, the training step, checkpoints and the training loop."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

BLOCK = 10  # iterations that one model trains before the next has its turn


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and leave the program."""
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a program to its exit status; Ctrl-C and a closed pipe end it without a traceback."""
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout as it leaves
        raise SystemExit(141) from None


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


def seed_number(text: str) -> int:
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")
    return value


def non_negative_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def add_arguments(
    parser: argparse.ArgumentParser, *, iterations: int, batch: int, lr: float, clip: float, output: str
) -> None:
    """Add the options that every example has, with this example's defaults."""
    parser.add_argument("--iterations", type=positive_int, default=iterations, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=positive_int, default=batch, help="sequences per step (%(default)s)")
    parser.add_argument("--lr", type=non_negative_float, default=lr, help="learning rate of Adam (%(default)s)")
    parser.add_argument(
        "--clip", type=non_negative_float, default=clip, help="largest gradient norm, 0 for any (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=seed_number, default=0, help="of parameters, data order and samples (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one")
    parser.add_argument("--backend", default="auto", help="fastrnn's back end (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of all results (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")


def choose_device(name: str) -> torch.device:
    """The torch device of that name, proved to work; fails with one line if it does not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"


def prepare_output(folder: Path) -> None:
    """Create the folder and prove that files can be written there; fails with one line if not."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(f"--output {folder} cannot be written: {error.strerror}")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint such that a crash in between leaves the old one whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint whose ``settings`` must equal the given ones; fails with one line if it cannot go on."""
    if not path.is_file():
        fail(f"--resume: there is no checkpoint {path}")
    try:
        # On the CPU first, so that a run can go on with another device than it began with.
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["settings"]
    except Exception as error:  # a damaged file raises one of many unrelated types
        fail(f"--resume: {path} is not a checkpoint of this program ({type(error).__name__})")
    for name, value in settings.items():
        if saved.get(name) != value:
            fail(f"--resume: the checkpoint was made with {name} {saved.get(name)}, not {value}")
    return state


def _move(carry: Any, device: torch.device) -> Any:
    if isinstance(carry, tuple):
        return tuple(_move(item, device) for item in carry)
    return carry if carry is None else carry.to(device)


class Trainer:
    """One model in training with Adam: its optimizer, carried state, losses and times.

    Args:
        model: any module.
        compute_loss: ``compute_loss(model, iteration, carry)`` returns the scalar loss of that iteration's minibatch
            and the carry of the next one: a detached tensor, a tuple of them, or None. It must depend on its
            arguments alone, so that several trainers see the same minibatches and a resumed one goes on as before.
        lr: learning rate.
        clip: largest norm of all gradients together, larger ones are scaled down to it; 0 leaves them as they are.
        schedule: ``schedule(iteration)`` is what the learning rate is multiplied with; by default it stays.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_loss: Callable[[nn.Module, int, Any], tuple[Tensor, Any]],
        *,
        lr: float,
        clip: float,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.model = model
        self.compute_loss = compute_loss
        self.lr = lr
        self.clip = clip
        self.schedule = schedule
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.carry: Any = None
        self.losses: list[float] = []
        self.seconds: list[float] = []

    @property
    def iteration(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        """Train on the next minibatch and note its loss and the seconds it took."""
        start = time.perf_counter()
        if self.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.schedule(self.iteration)
        loss, self.carry = self.compute_loss(self.model, self.iteration, self.carry)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device, hence inside the measured time
        self.seconds.append(time.perf_counter() - start)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "carry": self.carry,
            "losses": self.losses,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.carry = _move(state["carry"], next(self.model.parameters()).device)
        self.losses = state["losses"]
        self.seconds = state["seconds"]


class Interrupt:
    """Within this context the first SIGINT or SIGTERM only sets ``requested``; a second one acts as usual."""

    def __enter__(self) -> "Interrupt":
        self.requested = False
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()


def train(runs: dict[str, Trainer], iterations: int, pauses: Iterable[int], on_pause: Callable[[int], None]) -> bool:
    """Train the runs side by side, in alternating blocks so that the machine's noise hits all of them alike.

    Args:
        runs: trainers by name.
        iterations: where all of them end, counted from the start of training, not from this call.
        pauses: iterations after which ``on_pause`` is called, once all runs have done them.
        on_pause: called with the iteration; its output must go through ``tqdm.write``.

    Returns:
        True when all iterations are done, False after Ctrl-C or SIGTERM.
    """
    pauses = {*pauses, iterations}
    done = min(run.iteration for run in runs.values())
    with Interrupt() as interrupt, tqdm(total=iterations, initial=done, unit="it", disable=None, leave=False) as bar:
        while done < iterations and not interrupt.requested:
            stop = min((done // BLOCK + 1) * BLOCK, *(pause for pause in pauses if pause > done))
            for run in runs.values():
                while run.iteration < stop and not interrupt.requested:
                    run.step()
            done = min(run.iteration for run in runs.values())
            if done:
                bar.set_postfix_str("loss " + ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items()))
                bar.update(done - bar.n)
            if done == stop and done in pauses:
                on_pause(done)
    return done >= iterations
