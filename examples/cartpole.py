"""Balancing a pole without seeing velocities: recurrent policies, with and without memory.

CartPole-v1 of gymnasium shows a policy the cart's position and the pole's angle only, so that it has to remember what
it saw to know how fast they change. A policy acts in --batch environments side by side, one step of its recurrent layer
at a time, and learns by proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) from rollouts of --steps
steps: the layer reads a whole rollout in one call, in which ``resets`` says where episodes begin. Beside it learns a
policy with a feed-forward layer in the recurrent one's place.

Usually such a policy is trained by a loop over time: one step of torch.nn's layer per call, and the state multiplied by
zero where an episode begins. The program checks that loss and gradients are the same that way, and times both.

A resumed run goes on with the parameters and optimizers of the checkpoint, but in fresh episodes: it is not the run
that it would have been without the interruption.

    python examples/cartpole.py
    python examples/cartpole.py --cells gru lstm --hidden 128
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _processes as processes
import gymnasium
import numpy as np
import torch
from _trainer import (
    Parser,
    Trainer,
    add_arguments,
    choose_device,
    cosine,
    describe_environment,
    evenly,
    fail,
    positive_int,
    prepare_output,
    print_device,
    resume,
    run_main,
    train,
    write_json,
)
from gymnasium.vector import VectorEnv
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical
from tqdm import tqdm

from fastrnn import nn

SEEN = [0, 2]  # position and angle of gymnasium's observations
LIMITS = np.array([2.4, math.radians(12)], dtype=np.float32)  # of what is seen, beyond which an episode ends
ACTIONS = 2
SOLVED = 475  # mean return, by gymnasium
EPISODES = 100  # of an evaluation
DISCOUNT, TRACE = 0.99, 0.95  # gamma, and lambda of generalized advantage estimation (arXiv 1506.02438)
RATIO_CLIP = 0.2
VALUE_WEIGHT = 0.5
ROWS = 20
TIMED = 3  # updates of each way per row of the table
CELLS = ("lstm", "gru", "none")
CURVE_OPTIONS = ("cells", "hidden", "steps", "epochs", "iterations", "batch", "lr", "clip", "seed")


class Memoryless(torch.nn.Module):
    """A feed-forward layer in a recurrent one's place."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_size, hidden_size)

    def forward(self, x: Tensor, state: None, resets: Tensor | None) -> tuple[Tensor, None]:
        return self.linear(x).tanh(), None


class Policy(torch.nn.Module):
    """Scores of the actions and an estimate of the return, both from the output of one layer."""

    def __init__(self, layer: torch.nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.layer = layer
        self.actor = torch.nn.Linear(hidden_size, ACTIONS)
        self.critic = torch.nn.Linear(hidden_size, 1)

    def forward(self, seen: Tensor, state: Any = None, starts: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """seen [T, B, 2], the state before, starts [T, B] -> logits [T, B, ACTIONS], values [T, B], the state after."""
        y, state = self.unroll(seen, state, starts)
        return self.actor(y), self.critic(y).squeeze(-1), state

    def unroll(self, seen: Tensor, state: Any, starts: Tensor | None) -> tuple[Tensor, Any]:
        return self.layer(seen, state, resets=starts)


class LoopPolicy(Policy):
    """The same by the usual loop over torch.nn's layer."""

    def unroll(self, seen: Tensor, state: Any, starts: Tensor) -> tuple[Tensor, Any]:
        outputs = []
        for x, keep in zip(seen.split(1), (~starts).to(seen.dtype).unsqueeze(-1)):
            if state is not None:
                state = tuple(keep * s for s in state) if isinstance(state, tuple) else keep * state
            y, state = self.layer(x, state)
            outputs.append(y)
        return torch.cat(outputs), state


@dataclass(frozen=True)
class Rollout:
    """What happened in T steps of B environments, and what PPO makes of it; [T, B] but for the state."""

    seen: Tensor  # [T, B, 2]
    starts: Tensor  # bool, where an episode begins
    state: Any  # of the layer, before the first step
    real: Tensor  # bool, false for the one step after an episode in which gymnasium begins the next
    actions: Tensor
    log_probs: Tensor  # of the actions, by the policy that chose them
    advantages: Tensor
    returns: Tensor


def ppo_loss(policy: Policy, rollout: Rollout) -> Tensor:
    logits, values, _ = policy(rollout.seen, rollout.state, rollout.starts)
    chosen = Categorical(logits=logits)
    ratio = (chosen.log_prob(rollout.actions) - rollout.log_probs).exp()
    clipped = ratio.clamp(1 - RATIO_CLIP, 1 + RATIO_CLIP)
    gain = torch.minimum(ratio * rollout.advantages, clipped * rollout.advantages)
    error = (values - rollout.returns).square()
    return (VALUE_WEIGHT * error - gain)[rollout.real].mean()


def make_environments(number: int) -> VectorEnv:
    return gymnasium.make_vec("CartPole-v1", num_envs=number, vectorization_mode="vector_entry_point")


def hide_velocities(observations: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(observations[:, SEEN] / LIMITS).to(device)


class RolloutLoss:
    """The loss of PPO on a rollout, a new one every ``epochs`` iterations, each going on where the last one ended."""

    def __init__(self, batch: int, steps: int, epochs: int, seed: int, device: torch.device) -> None:
        self.environments = make_environments(batch)
        self.batch = batch
        self.steps = steps
        self.epochs = epochs
        self.seed = seed
        self.device = device
        self.rollout: Rollout | None = None
        self.seconds = 0.0  # that the last rollout took

    def __call__(self, policy: torch.nn.Module, iteration: int, carry: None) -> tuple[Tensor, None]:
        if self.rollout is None or iteration % self.epochs == 0:
            processes.seed_iteration(self.seed, iteration)
            if self.rollout is None:
                observations, _ = self.environments.reset(seed=torch.initial_seed())
                self.seen = hide_velocities(observations, self.device)
                self.starts = torch.ones(self.batch, dtype=torch.bool, device=self.device)
                self.ended = ~self.starts
                self.state = None
            start = time.perf_counter()
            self.rollout = self.collect(policy)
            self.seconds = time.perf_counter() - start
        return ppo_loss(policy, self.rollout), None

    @torch.no_grad()
    def collect(self, policy: Policy) -> Rollout:
        first_state = self.state
        steps = []
        for _ in range(self.steps):
            logits, values, self.state = policy(self.seen[None], self.state, self.starts[None])
            actions = logits[0].softmax(-1).multinomial(1).squeeze(-1)
            observations, reward, terminated, truncated, _ = self.environments.step(actions.cpu().numpy())
            terminated, truncated = (torch.from_numpy(flags).to(self.device) for flags in (terminated, truncated))
            # Scaled to make returns of at most 1.
            reward = (1 - DISCOUNT) * torch.from_numpy(reward).to(self.device)
            ended = terminated | truncated
            steps.append(
                (self.seen, self.starts, ~self.ended, logits[0], values[0], actions, reward, terminated, ended)
            )
            # To an episode's last observation any action is the answer: what follows is the next episode's first one.
            self.seen, self.starts, self.ended = hide_velocities(observations, self.device), self.ended, ended
        seen, starts, real, logits, values, actions, rewards, terminated, ended = map(torch.stack, zip(*steps))

        _, next_value, _ = policy(self.seen[None], self.state, self.starts[None])
        following = torch.cat([values[1:], next_value])
        errors = rewards + DISCOUNT * following * ~terminated - values
        advantages = torch.empty_like(errors)
        advantage = torch.zeros_like(errors[0])
        for t in reversed(range(self.steps)):
            advantage = errors[t] + DISCOUNT * TRACE * advantage * ~ended[t]
            advantages[t] = advantage
        std, mean = torch.std_mean(advantages[real], correction=0)
        log_probs = Categorical(logits=logits).log_prob(actions)
        normalized = (advantages - mean) / (std + 1e-8)
        return Rollout(seen, starts, first_state, real, actions, log_probs, normalized, advantages + values)


@torch.no_grad()
def evaluate(policy: Policy, seed: int, device: torch.device) -> np.ndarray:
    """The returns of EPISODES episodes in which the policy takes the more probable action."""
    environments = make_environments(EPISODES)
    observations, _ = environments.reset(seed=seed)
    returns = np.zeros(EPISODES)
    going = np.ones(EPISODES, dtype=bool)
    state = None
    while going.any():
        logits, _, state = policy(hide_velocities(observations, device)[None], state)
        observations, reward, terminated, truncated, _ = environments.step(logits[0].argmax(-1).cpu().numpy())
        returns += reward * going
        going &= ~(terminated | truncated)
    return returns


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Balance a pole without seeing velocities, by policies with and without memory.")
    add_arguments(parser, iterations=1000, batch=32, lr=2e-3, clip=0.5, output="runs/cartpole")
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=CELLS,
        default=["lstm", "none"],
        metavar="CELL",
        help="lstm, gru, none (lstm none)",
    )
    parser.add_argument("--hidden", type=positive_int, default=64, help="units of the layer (%(default)s)")
    parser.add_argument("--steps", type=positive_int, default=64, help="of an environment in a rollout (%(default)s)")
    parser.add_argument("--epochs", type=positive_int, default=5, help="iterations on each rollout (%(default)s)")
    return parser.parse_args()


def make_policy(cell: str, args: argparse.Namespace) -> Policy:
    if cell == "none":
        return Policy(Memoryless(len(SEEN), args.hidden), args.hidden)
    return Policy(getattr(nn, cell.upper())(len(SEEN), args.hidden, backend=args.backend), args.hidden)


def make_loop(policy: Policy) -> LoopPolicy:
    """A copy of a recurrent policy."""
    layer = policy.layer
    loop = LoopPolicy(getattr(torch.nn, layer.mode)(layer.input_size, layer.hidden_size), layer.hidden_size)
    loop.load_state_dict(policy.state_dict())
    return loop.to(policy.actor.weight.device)


def compare(policy: Policy, rollout: Rollout) -> dict[str, Any]:
    """A recurrent policy's update beside the usual loop's: the differences of loss and gradients, and the seconds.

    The largest difference of a gradient is divided by the norm of all.
    """
    seconds: dict[str, list[float]] = {"loop": [], "fastrnn": []}
    results = {}
    loop = make_loop(policy)
    for _ in range(TIMED):
        for name, each in (("loop", loop), ("fastrnn", policy)):
            start = time.perf_counter()
            loss = ppo_loss(each, rollout)
            gradients = torch.autograd.grad(loss, list(each.parameters()))
            norm = torch.nn.utils.get_total_norm(gradients).item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
            results[name] = loss.item(), gradients
    (loop_loss, theirs), (loss, ours) = results.values()
    return {
        "loss_difference": abs(loss - loop_loss),
        "gradient_difference": max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / norm,
        "seconds": seconds,
    }


def summarize(cell: str, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of the table say about one policy, times as medians in milliseconds."""
    rows = [row["policies"][cell] for row in history]
    result = {
        "return": rows[-1]["return"],
        "rollout_ms": 1e3 * statistics.median(row["rollout_seconds"] for row in rows),
    }
    if cell != "none":
        updates = [row["update"] for row in rows]
        for name in ("loop", "fastrnn"):
            result[f"{name}_ms"] = 1e3 * statistics.median(s for update in updates for s in update["seconds"][name])
        result["speed_up"] = result["loop_ms"] / result["fastrnn_ms"]
        result["loss_difference"] = max(update["loss_difference"] for update in updates)
        result["gradient_difference"] = max(update["gradient_difference"] for update in updates)
    return result


def draw_returns(path: Path, history: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Mean returns over the environments' steps, within the range of all episodes."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    ax = figure.subplots()
    x = [-(-row["iteration"] // args.epochs) * args.steps * args.batch for row in history]
    for cell in args.cells:
        returns = [row["policies"][cell]["return"] for row in history]
        label = "without memory" if cell == "none" else cell.upper()
        (line,) = ax.plot(x, [r["mean"] for r in returns], marker=".", label=label)
        ax.fill_between(
            x, [r["least"] for r in returns], [r["most"] for r in returns], color=line.get_color(), alpha=0.15, lw=0
        )
    ax.axhline(SOLVED, color="gray", linewidth=1, linestyle="--", label=f"solved: {SOLVED}")
    ax.set_xlabel("steps of all environments in training")
    ax.set_ylabel(f"return: mean and range of {EPISODES} episodes")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> int:
    args = parse_arguments()
    if args.steps < 2:  # of which one may be between two episodes
        fail(f"--steps must be at least 2, got {args.steps}")
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    device = choose_device(args.device)
    prepare_output(args.output)

    runs: dict[str, Trainer] = {}
    losses: dict[str, RolloutLoss] = {}
    for cell in args.cells:
        torch.manual_seed(args.seed)
        try:
            policy = make_policy(cell, args).to(device)
            policy(torch.zeros(1, 1, len(SEEN), device=device), None, torch.ones(1, 1, dtype=torch.bool, device=device))
        except (ValueError, NotImplementedError) as error:
            fail(f"--backend {args.backend}: {error}")
        losses[cell] = RolloutLoss(args.batch, args.steps, args.epochs, args.seed, device)
        runs[cell] = Trainer(
            policy,
            losses[cell],
            lr=args.lr,
            clip=args.clip,
            schedule=lambda iteration: cosine(iteration, args.iterations),
            parallel=args.parallel,
        )
    settings = {name: getattr(args, name) for name in CURVE_OPTIONS}
    state: dict[str, Any] = resume(runs, args.output, settings) if args.resume else {"history": []}
    history = state["history"]

    print(f"task      CartPole-v1 without velocities, {args.batch} environments at a time")
    print(f"policies  {', '.join(args.cells)}; {args.hidden} units")
    print(
        f"training  {args.iterations} iterations, {args.epochs} on each rollout of {args.steps} steps,"
        f" Adam lr {args.lr:g}, clip {args.clip:g}, seed {args.seed}"
    )
    print_device(device)
    print(f"\nMean return of {EPISODES} episodes; by how much the gradients of the usual loop differ, as a share of")
    print("their norm, and how many times as long it takes for an update:\n")
    print(f"{'':>9}" + "".join(f"{cell:>10}" + " " * 20 * (cell != "none") for cell in args.cells))
    heads = "".join(f"{'return':>10}" + f"{'difference':>12}{'loop ×':>8}" * (cell != "none") for cell in args.cells)
    print(f"{'iteration':>9}{heads}")

    def pause(iteration: int) -> None:
        row: dict[str, Any] = {}
        columns = f"{iteration:>9}"
        for cell, run in runs.items():
            returns = evaluate(run.model, args.seed, device)
            row[cell] = {
                "return": {"mean": float(returns.mean()), "least": float(returns.min()), "most": float(returns.max())},
                "rollout_seconds": losses[cell].seconds,
            }
            columns += f"{returns.mean():>10.1f}"
            if cell != "none":
                row[cell]["update"] = update = compare(run.model, losses[cell].rollout)
                loop, fastrnn = (statistics.median(seconds) for seconds in update["seconds"].values())
                columns += f"{update['gradient_difference']:>12.1e}{loop / fastrnn:>8.1f}"
        history.append({"iteration": iteration, "policies": row})
        tqdm.write(columns)

    saved = {"folder": args.output, "settings": settings, "state": state}
    if not train(runs, args.iterations, [1, *evenly(args.iterations, ROWS)], pause, **saved):
        return 130

    results = {cell: summarize(cell, history) for cell in args.cells}
    metrics = {
        "settings": settings,
        "environment": describe_environment(device) | {"gymnasium": gymnasium.__version__},
        "policies": results,
        "history": history,
    }
    write_json(args.output / "metrics.json", metrics)
    draw_returns(args.output / "returns.png", history, args)
    print()
    for cell, result in results.items():
        print(f"{cell:6}mean return {result['return']['mean']:.1f}; a rollout takes {result['rollout_ms']:.1f} ms")
        if cell != "none":
            print(
                f"{'':6}an update takes {result['fastrnn_ms']:.2f} ms, by the usual loop {result['loop_ms']:.2f} ms,"
                f" {result['speed_up']:.1f} times as long;\n{'':6}their gradients are at most"
                f" {result['gradient_difference']:.1e} of the norm apart, their losses {result['loss_difference']:.1e}"
            )
    print(f"\nWrote metrics.json, returns.png, checkpoint.pt to {args.output}.")
    return 0


if __name__ == "__main__":
    run_main(main)
