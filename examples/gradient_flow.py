"""How gradients vanish and explode on their way back through time, and the two cures: clipping and truncation.

The gradient of a loss at step T with respect to the state at step s goes through dh_T/dh_s, a product of T - s
Jacobians. The first row of the picture shows its norm against T - s for cells as they are initialised: with small,
orthogonal and large recurrent weights without biases, and for the LSTM with several biases of the forget gate.

The second row trains a tanh RNN to repeat its input of a few steps ago:

* by gradient descent with a large learning rate, with and without clipping of the gradient's norm;
* by Adam with truncated backpropagation through time, in which the state goes on over a cut and its gradient does not.
  Whatever is further back than the cuts are apart cannot be learned.

    python examples/gradient_flow.py
    python examples/gradient_flow.py --delay 20 --truncate 10 20 25 50
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import _processes as processes
import torch
from _trainer import (
    Parser,
    Trainer,
    add_arguments,
    choose_device,
    describe_environment,
    evenly,
    fail,
    markdown,
    non_negative_float,
    positive_int,
    prepare_output,
    print_device,
    resume,
    run_main,
    train,
    write_json,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from fastrnn import nn

CELLS = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
INITIALISATIONS: dict[str, Callable[[Tensor], Any]] = {  # of a gate's recurrent weights
    "small": lambda weight: weight.normal_(0, 0.5 / math.sqrt(len(weight))),  # a spectral radius of about 0.5
    "orthogonal": torch.nn.init.orthogonal_,
    "large": lambda weight: weight.normal_(0, 2.0 / math.sqrt(len(weight))),
}
FORGET_BIASES = (0.0, 1.0, 5.0)
INPUT_DEVIATION = 0.1  # so small that the states stay where tanh is steep
SEQUENCES = 4  # whose norms are averaged
ROWS = 10  # of the table
LAST = 50  # iterations that the final loss is the mean of
EVERY = 10  # of how many iterations metrics.json has one
CURVE_OPTIONS = ("steps", "hidden", "delay", "truncate", "iterations", "batch", "lr", "descent_lr", "clip", "seed")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Vanishing and exploding gradients, clipping and truncated backpropagation.")
    add_arguments(parser, iterations=500, batch=32, lr=3e-3, clip=0.3, output="runs/gradient_flow")
    parser.add_argument("--steps", type=positive_int, default=60, help="that gradients go back (%(default)s)")
    parser.add_argument("--hidden", type=positive_int, default=64, help="hidden units (%(default)s)")
    parser.add_argument("--delay", type=positive_int, default=10, help="of what is to be repeated (%(default)s)")
    parser.add_argument(
        "--truncate",
        type=positive_int,
        nargs="+",
        default=[5, 10, 20, 40],
        metavar="STEPS",
        help="steps from cut to cut; the last is also the length of a minibatch (5 10 20 40)",
    )
    parser.add_argument(
        "--descent-lr", type=non_negative_float, default=3.0, help="learning rate without Adam (%(default)s)"
    )
    args = parser.parse_args()
    if not args.clip:
        fail("--clip must be above 0: without clipping is what it is compared with")
    if any(args.truncate[-1] % steps for steps in args.truncate):
        fail(f"--truncate: all must divide the last, {args.truncate[-1]}, got {' '.join(map(str, args.truncate))}")
    if args.delay >= args.truncate[-1]:
        fail(f"--delay must be below the last of --truncate, {args.truncate[-1]}, got {args.delay}")
    return args


def initialise(cell: torch.nn.RNNCellBase, fill: Callable[[Tensor], Any]) -> None:
    """Fill the recurrent weights gate by gate, and zero the biases."""
    for weight in cell.weight_hh.detach().split(cell.hidden_size):
        fill(weight)
    torch.nn.init.zeros_(cell.bias_ih)
    torch.nn.init.zeros_(cell.bias_hh)


def jacobian_norms(cell: torch.nn.RNNCellBase, x: Tensor) -> Tensor:
    """The largest singular value of dh_T/dh_s, for T - s = 0 .. T - 1.

    The LSTM's c_s is held fixed, that is, dh_T/dh_s has all ways from h_s on and through later cell states.

    Args:
        cell: RNNCell, GRUCell or LSTMCell.
        x: [T, B, I], sequences of inputs after a state of zeros.

    Returns:
        [T, B]
    """
    steps, batch, hidden = len(x), x.shape[1], cell.hidden_size
    # Each sequence as often as there are units: one backward pass of unit i of copy i gives all rows of the Jacobians.
    copies = x.repeat_interleave(hidden, 1)
    h = torch.zeros(batch * hidden, hidden, device=x.device)
    state: Any = (h, h) if isinstance(cell, torch.nn.LSTMCell) else h
    states = []
    for x_t in copies:
        state = cell(x_t, state)
        states.append(state[0] if isinstance(state, tuple) else state)
    rows = torch.eye(hidden, device=x.device).repeat(batch, 1)
    jacobians = torch.autograd.grad(states[-1], states, rows)
    return torch.linalg.matrix_norm(torch.stack(jacobians).view(steps, batch, hidden, hidden), 2).flip(0)


def measure_flow(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Geometric means of the norms over a few sequences, for T - s = 0 .. steps, by panel and curve."""

    def norms(name: str, fill: Callable[[Tensor], Any] | None = None, **options: float) -> list[float]:
        torch.manual_seed(args.seed)
        cell = CELLS[name](args.hidden, args.hidden, backend=args.backend, **options)
        if fill:
            initialise(cell, fill)
        x = INPUT_DEVIATION * torch.randn(args.steps + 1, SEQUENCES, args.hidden)
        # Below what fp32 holds a norm is zero.
        found = jacobian_norms(cell.to(device), x.to(device)).clamp_min(torch.finfo(torch.float32).tiny)
        return found.log().mean(1).exp().tolist()

    flow = {name: {curve: norms(name, fill) for curve, fill in INITIALISATIONS.items()} for name in CELLS}
    flow["LSTM's forget bias"] = {f"{bias:g}": norms("LSTM", forget_bias=bias) for bias in FORGET_BIASES}
    return flow


class Repeater(torch.nn.Module):
    """A tanh RNN with orthogonal weights, and a linear layer that scores a yes."""

    def __init__(self, hidden: int, backend: str) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, hidden, batch_first=True, backend=backend)
        torch.nn.init.orthogonal_(self.rnn.weight_hh_l0)
        self.output = torch.nn.Linear(hidden, 1)

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T] of -1 and 1 -> scores [B, T] and the state."""
        y, state = self.rnn(x.unsqueeze(-1), state)
        return self.output(y).squeeze(-1), state


class RepetitionLoss:
    """The loss of the next stretch of endless streams of random signs, backpropagated between the cuts only.

    The scores at each step are of the sign ``delay`` steps before it.
    """

    def __init__(self, truncate: int, args: argparse.Namespace, device: torch.device) -> None:
        self.truncate = truncate
        self.delay = args.delay
        self.length = args.truncate[-1]
        self.batch = args.batch
        self.seed = args.seed
        self.device = device

    def signs(self, iteration: int) -> Tensor:
        """That minibatch [B, length], -1 and 1."""
        generator = torch.Generator().manual_seed((self.seed << 20) + iteration)
        return torch.randint(2, (self.batch, self.length), generator=generator).float().to(self.device) * 2 - 1

    def __call__(self, model: torch.nn.Module, iteration: int, state: Any) -> tuple[Tensor, Any]:
        x, number = processes.shard(self.signs(iteration))
        # Of nothing before the first stretch: these few signs cannot be known.
        before = processes.shard(self.signs(iteration - 1))[0] if iteration else torch.ones_like(x)
        target = torch.cat([before, x], 1)[:, self.length - self.delay : -self.delay]
        scores = []
        for part in x.split(self.truncate, 1):
            score, state = model(part, state)
            state = state.detach()  # truncated backpropagation through time
            scores.append(score)
        loss = binary_cross_entropy_with_logits(torch.cat(scores, 1), (target + 1) / 2)
        return processes.mean_over_all(loss, number), state


def make_runs(args: argparse.Namespace, device: torch.device) -> dict[str, Trainer]:
    def make(truncate: int, lr: float, clip: float, optimizer: type[torch.optim.Optimizer]) -> Trainer:
        torch.manual_seed(args.seed)
        model = Repeater(args.hidden, args.backend).to(device)
        compute_loss = RepetitionLoss(truncate, args, device)
        return Trainer(model, compute_loss, lr=lr, clip=clip, optimizer=optimizer, parallel=args.parallel)

    longest = args.truncate[-1]
    runs = {
        "not clipped": make(longest, args.descent_lr, 0.0, torch.optim.SGD),
        "clipped": make(longest, args.descent_lr, args.clip, torch.optim.SGD),
    }
    return runs | {f"cut every {steps}": make(steps, args.lr, args.clip, torch.optim.Adam) for steps in args.truncate}


def rate(norms: list[float]) -> float:
    """The factor by which a norm changes per step, from the first step to the last that is not zero."""
    tiny = torch.finfo(torch.float32).tiny
    last = max((i for i, norm in enumerate(norms) if norm > tiny), default=0)
    return (norms[last] / norms[0]) ** (1 / max(last, 1))


def thin(values: list[float]) -> list[float | None]:
    """Some of the values; JSON has no infinity and no NaN."""
    return [value if math.isfinite(value) else None for value in values[EVERY - 1 :: EVERY]]


def summary(run: Trainer) -> dict[str, Any]:
    loss = mean(run.losses[-LAST:])
    return {
        "final_loss": loss if math.isfinite(loss) else None,
        "largest_norm": max((norm for norm in run.norms if math.isfinite(norm)), default=None),
        "losses": thin(run.losses),
        "norms": thin(run.norms),
    }


def smooth(losses: list[float]) -> list[float]:
    """At each iteration the mean of the last ten."""
    return [mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]


def draw(
    path: Path, flow: dict[str, dict[str, list[float]]], runs: dict[str, Trainer], args: argparse.Namespace
) -> None:
    figure = Figure(figsize=(15, 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for ax, (name, curves) in zip(above.subplots(1, len(flow), sharey=True), flow.items(), strict=True):
        for curve, norms in curves.items():
            ax.semilogy(norms, label=curve)
        ax.axhline(1, color="0.6", linewidth=0.8)
        ax.set_ylim(1e-12, 1e6)
        ax.set_title(name, fontsize="medium")
        ax.set_xlabel("$T - s$")
    above.supylabel(r"norm of $\partial h_T\,/\,\partial h_s$", fontsize="medium")
    losses, norms, truncated = below.subplots(1, 3)
    for color, name in (("C3", "not clipped"), ("C0", "clipped")):
        losses.semilogy(smooth(runs[name].losses), color=color, label=name)
        norms.semilogy(runs[name].norms, color=color, linewidth=0.7, label=name)
    norms.axhline(args.clip, color="0.4", linestyle=":", label=f"clipped to {args.clip:g}")
    losses.set_title(f"loss of gradient descent, rate {args.descent_lr:g}", fontsize="medium")
    norms.set_title("norm of its gradient before clipping", fontsize="medium")
    for name in runs:
        if name.startswith("cut"):
            truncated.semilogy(smooth(runs[name].losses), label=name)
    truncated.set_title(f"loss of truncated backpropagation, delay {args.delay}", fontsize="medium")
    for ax in (losses, truncated):
        ax.axhline(math.log(2), color="0.4", linestyle=":", label="guessing")
    for ax in (losses, norms, truncated):
        ax.set_xlabel("iterations")
    for ax in (*above.axes, *below.axes):
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=70)


def main() -> int:
    args = parse_arguments()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    prepare_output(args.output)
    try:
        runs = make_runs(args, device)
        flow = measure_flow(args, device)
    except (ValueError, NotImplementedError) as error:
        fail(f"--backend {args.backend}: {error}")
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {}

    print_device(device)
    points = [steps for steps in (1, 10, 20, 40) if steps < args.steps] + [args.steps]
    rows = [["norm of dh_T/dh_s", *(f"T - s = {point}" for point in points), "per step"]]
    for name, curves in flow.items():
        for curve, norms in curves.items():
            values = [f"{norms[point]:.1e}" for point in points]
            rows.append([f"{name}, {curve}", *values, f"{rate(norms):.3f}"])
    print(f"\n{markdown(rows)}")
    widths = {name: max(10, len(name) + 2) for name in runs}
    print(f"\nloss of repeating the input of {args.delay} steps ago, guessing has {math.log(2):.4f}\n")
    print(f"{'iteration':>9}" + "".join(f"{name:>{width}}" for name, width in widths.items()))

    def pause(iteration: int) -> None:
        losses = (f"{run.losses[-1]:>{widths[name]}.3g}" for name, run in runs.items())
        tqdm.write(f"{iteration:>9}" + "".join(losses))

    pauses = evenly(args.iterations, ROWS)
    if not train(runs, args.iterations, pauses, pause, folder=args.output, settings=settings, state=state):
        return 130

    training = {name: summary(run) for name, run in runs.items()}
    metrics = {
        "settings": settings,
        "environment": describe_environment(device),
        "flow": {
            name: {curve: {"per_step": rate(norms), "norms": norms} for curve, norms in curves.items()}
            for name, curves in flow.items()
        },
        "training": training,
    }
    write_json(args.output / "metrics.json", metrics)
    draw(args.output / "gradient_flow.png", flow, runs, args)
    rows = [["training", f"loss of the last {LAST}", "largest norm"]]
    for name, result in training.items():
        rows.append([name, *("diverged" if value is None else f"{value:.3g}" for value in list(result.values())[:2])])
    print(f"\n{markdown(rows)}\n\nWrote metrics.json, gradient_flow.png, checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
