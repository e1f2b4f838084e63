"""What the examples share: options, error reporting, the training step, checkpoints and the training loop."""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import _processes as processes
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import fastrnn

LOAD_AT_START = os.getloadavg()[0]
WHOLE = StateDictOptions(full_state_dict=True)  # of several processes' parts
BLOCK = 10  # iterations that one model trains before the next has its turn


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and leave the program."""
    print(f"{Path(sys.argv[0]).stem}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a program to its exit status; Ctrl-C, a closed pipe and a lost process end it without a traceback."""
    try:
        status = main()
        processes.leave()
        raise SystemExit(status)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except RuntimeError as error:
        if processes.count() == 1 or "onnection" not in str(error):  # what gloo and NCCL call a peer that is gone
            raise
        fail("another process has died; what is written is whole, go on from it (a training: with --resume)", 1)
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


def probability(text: str) -> float:
    value = non_negative_float(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
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
    parser.add_argument(
        "--parallel", choices=processes.KINDS, default="ddp", help="what torchrun's processes do (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of all results (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")


def choose_device(name: str) -> torch.device:
    """The torch device of that name, proved to work; fails with one line if it does not. Meets other processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        processes.join()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    return device


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    each = f", {processes.count()} processes" if processes.count() > 1 else ""
    return f"{device} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}{each}"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What the results were computed with, for metrics.json."""
    return {
        "device": describe_device(device),
        "torch": torch.__version__,
        "fastrnn": fastrnn.__version__,
        "load_average_at_start": LOAD_AT_START,
    }


def print_device(device: torch.device) -> None:
    print(f"device    {describe_device(device)}, torch {torch.__version__}, fastrnn {fastrnn.__version__}")
    if device.type == "cpu" and torch.get_num_threads() / 2 < LOAD_AT_START:
        print(f"note      load average {LOAD_AT_START:.1f} at the start: programs that share the cores spoil all times")


def prepare_output(folder: Path) -> None:
    """Create the folder and prove that files can be written there; fails with one line if not."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        fail(f"--output {folder} cannot be written: {error.strerror}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file such that a crash in between leaves no half of it."""
    temporary = path.with_suffix(".tmp")
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head, numbers to the right."""
    head, *others = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *others]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cosine(iteration: int, iterations: int, warm_up: int = 0) -> float:
    """A schedule: linear up to 1 in ``warm_up`` iterations (a tenth of all at most), half a cosine down to 0."""
    warm_up = min(warm_up, iterations // 10)
    if iteration < warm_up:
        return (iteration + 1) / warm_up
    return (1 + math.cos(math.pi * (iteration - warm_up) / (iterations - warm_up))) / 2


class Trainer:
    """One model in training: its optimizer, carried state, losses, gradient norms and times.

    Args:
        model: any module; trained in place.
        compute_loss: ``compute_loss(model, iteration, carry)`` returns the scalar loss of that iteration's minibatch
            and the carry of the next one: a detached tensor [., B, .], a tuple of them, or None. It must depend on its
            arguments alone, so that several trainers see the same minibatches and a resumed one goes on as before. To
            train in several processes it takes its rows by ``processes.shard``, and weighs by
            ``processes.mean_over_all`` where processes may have different numbers of items.
        lr: learning rate.
        clip: largest norm of all gradients together, larger ones are scaled down to it; 0 leaves them as they are.
        schedule: ``schedule(iteration)`` is what the learning rate is multiplied with; by default it stays.
        optimizer: class of the optimizer.
        parallel: "ddp" or "fsdp", what several processes do.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_loss: Callable[[nn.Module, int, Any], tuple[Tensor, Any]],
        *,
        lr: float,
        clip: float,
        schedule: Callable[[int], float] = lambda iteration: 1.0,
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        parallel: str = "ddp",
    ) -> None:
        self.model = model
        self.lr = lr
        self.clip = clip
        self.schedule = schedule
        self.loss = processes.parallelize(processes.Loss(model, compute_loss), parallel)
        self.optimizer = optimizer(self.loss.parameters(), lr=lr)
        self.carry: Any = None
        self.losses: list[float] = []
        self.norms: list[float] = []  # of all gradients together, before they are clipped
        self.seconds: list[float] = []

    @property
    def iteration(self) -> int:
        return len(self.losses)

    def step(self) -> None:
        """Train on the next minibatch and note its loss and the seconds it took."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(self.iteration)
        loss, self.carry = self.loss(self.iteration, self.carry)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for parameter in self.loss.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optimizer.step()
        self.losses.append(processes.average(loss.detach()))  # waits for the device, hence inside the measured time
        self.norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        self.seconds.append(time.perf_counter() - start)

    def gather(self) -> None:
        """Bring ``model`` up to date where the processes train split copies of it."""
        if isinstance(self.loss, FSDPModule):
            self.model.load_state_dict(get_model_state_dict(self.loss.model, options=WHOLE))

    def state_dict(self) -> dict[str, Any]:
        """The whole state, from which any number of processes can go on."""
        optimizer = get_optimizer_state_dict(self.loss, self.optimizer, options=WHOLE) if self.iteration else None
        return {
            "model": get_model_state_dict(self.loss, options=WHOLE),
            "optimizer": optimizer,
            "carry": processes.gather_state(self.carry),
            "losses": self.losses,
            "norms": self.norms,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.loss, state["model"], options=WHOLE)
        if state["optimizer"] and state["optimizer"]["state"]:  # torch cannot set the empty state of plain SGD
            set_optimizer_state_dict(self.loss, self.optimizer, state["optimizer"], options=WHOLE)
        self.gather()
        self.carry = processes.shard_state(state["carry"], next(self.model.parameters()).device)
        self.losses = state["losses"]
        self.norms = state["norms"]
        self.seconds = state["seconds"]


def make_trainer(
    make_model: Callable[[], nn.Module],
    compute_loss: Callable[[nn.Module, int, Any], tuple[Tensor, Any]],
    args: argparse.Namespace,
    device: torch.device,
    warm_up: int = 0,
) -> Trainer:
    """A trainer as the options say, by the schedule ``cosine``; fails with one line if --backend cannot compute it."""
    torch.manual_seed(args.seed)
    try:
        model = make_model().to(device)
        with torch.no_grad():
            compute_loss(model, 0, None)
    except (ValueError, NotImplementedError) as error:
        fail(f"--backend {args.backend}: {error}")
    return Trainer(
        model,
        compute_loss,
        lr=args.lr,
        clip=args.clip,
        schedule=lambda iteration: cosine(iteration, args.iterations, warm_up),
        parallel=args.parallel,
    )


def resume(runs: dict[str, Trainer], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Set the runs to where the checkpoint in that folder left them; fails with one line if that cannot be.

    Args:
        runs: trainers by name.
        folder: of the checkpoint.
        settings: must equal those that it was made with.

    Returns:
        What was saved beside the runs.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume: there is no checkpoint {path}")
    try:
        # On the CPU first, so that a run can go on with another device than it began with.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        made_with = saved["settings"]
    except Exception as error:  # a damaged file raises one of many unrelated types
        fail(f"--resume: {path} is not a checkpoint of this program ({type(error).__name__})")
    for name, value in settings.items():
        if made_with.get(name) != value:
            fail(f"--resume: the checkpoint was made with {name} {made_with.get(name)}, not {value}")
    for name, run in runs.items():
        run.load_state_dict(saved["runs"][name])
    return saved["state"]


def save_checkpoint(folder: Path, runs: dict[str, Trainer], settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write the checkpoint such that a crash in between leaves the old one whole."""
    states = {name: run.state_dict() for name, run in runs.items()}
    if processes.rank() == 0:
        temporary = folder / "checkpoint.tmp"
        torch.save({"settings": settings, "runs": states, "state": state}, temporary)
        os.replace(temporary, folder / "checkpoint.pt")


class Interrupt:
    """Within this context the first SIGINT or SIGTERM only asks to stop; a second one acts as usual."""

    def __enter__(self) -> "Interrupt":
        self._requested = False
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def requested(self) -> bool:
        """Whether this or another process was asked to stop; all must call it alike."""
        return processes.any_of(self._requested)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()


def evenly(iterations: int, number: int) -> Iterable[int]:
    """About that many iterations, at equal distances."""
    every = max(1, iterations // number)
    return range(every, iterations, every)


def train(
    runs: dict[str, Trainer],
    iterations: int,
    pauses: Iterable[int],
    on_pause: Callable[[int], None],
    *,
    folder: Path,
    settings: dict[str, Any],
    state: dict[str, Any],
) -> bool:
    """Train the runs side by side, in alternating blocks so that the machine's noise hits all of them alike.

    Of several processes only the first one returns; the others end here when all iterations are done.

    Args:
        runs: trainers by name.
        iterations: where all of them end, counted from the start of training, not from this call.
        pauses: iterations after which ``on_pause`` is called and a checkpoint written, once all runs have done them.
        on_pause: called with the iteration; its output must go through ``tqdm.write``.
        folder: of the checkpoint.
        settings: what a run that goes on from it must have alike.
        state: is saved with the runs; ``on_pause`` may change it.

    Returns:
        True when all iterations are done; False after Ctrl-C or SIGTERM, with a checkpoint and a line on how to go on.
    """
    pauses = {*pauses, iterations}
    done = min(run.iteration for run in runs.values())
    silent = processes.rank() > 0 or None  # None: where there is no terminal
    with Interrupt() as interrupt, tqdm(total=iterations, initial=done, unit="it", disable=silent, leave=False) as bar:
        while done < iterations and not interrupt.requested():
            stop = min((done // BLOCK + 1) * BLOCK, *(pause for pause in pauses if pause > done))
            for run in runs.values():
                while run.iteration < stop and not interrupt.requested():
                    run.step()
            done = min(run.iteration for run in runs.values())
            if done:
                bar.set_postfix_str("loss " + ", ".join(f"{name} {run.losses[-1]:.4f}" for name, run in runs.items()))
                bar.update(done - bar.n)
            if done == stop and done in pauses:
                for run in runs.values():
                    run.gather()
                on_pause(done)
                save_checkpoint(folder, runs, settings, state)
        if done < iterations:
            save_checkpoint(folder, runs, settings, state)
    if done < iterations:
        program = ["torchrun", "--nproc-per-node", str(processes.count())] if processes.count() > 1 else ["python"]
        command = shlex.join([*program, *(argument for argument in sys.argv if argument != "--resume"), "--resume"])
        print(f"Stopped at iteration {done}; go on with: {command}")
        return False
    if processes.rank():
        processes.leave()
        raise SystemExit(0)
    return True
