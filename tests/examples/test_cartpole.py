"""The example of recurrent policies as a user runs it, but tiny."""

import copy
import dataclasses
from types import ModuleType

import matplotlib.image
import pytest
import torch

import fastrnn
from tests.accuracy import assert_as_accurate_over
from tests.examples.conftest import BAD_OPTIONS, Program

TINY = ("--hidden", 16, "--batch", 8, "--steps", 32, "--epochs", 2, "--device", "cpu")


@pytest.fixture(autouse=True)
def few_episodes(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "EPISODES", 10)


def checkpoint() -> dict:
    return torch.load("out/checkpoint.pt", weights_only=True)


def make_loss(example: ModuleType, batch: int = 16, steps: int = 40, seed: int = 0):
    return example.RolloutLoss(batch, steps, 1, seed, torch.device("cpu"))


def make_policy(example: ModuleType, cell: str, hidden: int = 16):
    return example.Policy(getattr(fastrnn.nn, cell)(2, hidden), hidden)


def test_memory_balances_the_pole(
    program: Program, example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without memory a policy returns 45 at most, however long it learns; with it five seeds returned over 160."""
    monkeypatch.setattr(example, "ROWS", 2)
    options = ("--cells", "lstm", "--lr", 0.01, "--hidden", 32, "--batch", 32, "--epochs", 8, "--iterations", 160)
    metrics = program.run(*options)
    assert [row["iteration"] for row in metrics["history"]] == [1, 80, 160]
    assert metrics["history"][0]["policies"]["lstm"]["return"]["mean"] < 45
    result = metrics["policies"]["lstm"]
    assert result["return"]["mean"] > 100
    assert 0 < result["gradient_difference"] < 1e-5 and result["loss_difference"] < 1e-5
    assert result["speed_up"] == pytest.approx(result["loop_ms"] / result["fastrnn_ms"])
    assert matplotlib.image.imread("out/returns.png").std() > 0.05
    assert f"lstm  mean return {result['return']['mean']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_as_accurate_as_the_loop(example: ModuleType, cell: str) -> None:
    """The loss and its gradients, on rollouts that begin amid episodes."""
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        policy = make_policy(example, cell)
        compute_loss = make_loss(example, seed=seed)
        for iteration in range(2):
            compute_loss(policy, iteration, None)
        rollout = compute_loss.rollout
        assert rollout.starts[1:].any() and not rollout.starts[0].all()
        loop = example.make_loop(policy)
        double = example.LoopPolicy(copy.deepcopy(loop.layer), 16)
        double.load_state_dict(loop.state_dict())
        tensors = vars(rollout) | {"state": torch.utils._pytree.tree_map(lambda s: s.double(), rollout.state)}
        exact = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in tensors.items()
        }
        found = []
        for each, of in ((policy, rollout), (loop, rollout), (double.double(), dataclasses.replace(rollout, **exact))):
            loss = example.ppo_loss(each, of)
            names, parameters = zip(*each.named_parameters())
            found.append({"loss": loss} | dict(zip(names, torch.autograd.grad(loss, parameters))))
        draws.append(tuple(found))
    assert len(draws[0][0]) == 9
    assert_as_accurate_over(draws)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_rollouts(example: ModuleType, monkeypatch: pytest.MonkeyPatch, cell: str) -> None:
    """Where episodes begin and end; what was seen and chosen; and the returns, which are known with lambda 1."""
    monkeypatch.setattr(example, "TRACE", 1.0)
    policy = make_policy(example, cell)
    compute_loss = make_loss(example)
    compute_loss(policy, 0, None)
    rollout = compute_loss.rollout
    assert rollout.starts[0].all() and rollout.state is None
    assert torch.equal(rollout.starts[2:], ~rollout.real[1:-1])
    assert (rollout.seen[rollout.starts].abs() <= 0.05 / torch.from_numpy(example.LIMITS)).all()
    within = rollout.seen.abs().amax(-1) < 1
    assert torch.equal(within, rollout.real)

    logits, _, state = policy(rollout.seen, rollout.state, rollout.starts)
    log_probs = logits.log_softmax(-1).gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs, rollout.log_probs)
    torch.testing.assert_close(state, compute_loss.state)

    checked = 0
    for b in range(16):
        ends = (~rollout.real[:, b]).nonzero().flatten().tolist()
        for t in rollout.real[:, b].nonzero().flatten().tolist():
            end = next((end for end in ends if end > t), None)
            if end is not None:
                assert rollout.returns[t, b].item() == pytest.approx(1 - example.DISCOUNT ** (end - t), abs=1e-5)
                checked += 1
    assert checked > 200

    # The second one goes on where the first one ended.
    compute_loss(policy, 1, None)
    torch.testing.assert_close(compute_loss.rollout.state, state)
    assert torch.equal(compute_loss.rollout.starts[0], ~rollout.real[-1])


def test_episodes_that_are_cut_have_a_value(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "TRACE", 1.0)
    policy = make_policy(example, "GRU")
    compute_loss = make_loss(example, steps=6)
    compute_loss.environments.unwrapped.max_episode_steps = 5
    compute_loss(policy, 0, None)
    rollout = compute_loss.rollout
    assert rollout.real[:5].all() and not rollout.real[5].any()
    _, values, _ = policy(rollout.seen, None, rollout.starts)
    for t in range(5):
        discount = example.DISCOUNT ** (5 - t)
        torch.testing.assert_close(rollout.returns[t], 1 - discount + discount * values[5])


def test_resume_goes_on_with_the_parameters(
    program: Program, example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--cells", "gru", "none", "--iterations", 6)
    program.interrupt("cartpole.evaluate", *options, call=8, iteration=4)
    saved = checkpoint()
    collect, seen = example.RolloutLoss.collect, []

    def watched(self, policy: torch.nn.Module):
        seen.append((copy.deepcopy(policy.state_dict()), self.starts.all().item()))
        return collect(self, policy)

    with monkeypatch.context() as patch:
        patch.setattr(example.RolloutLoss, "collect", watched)
        history = program.run(*options, "--resume")["history"]
    for (parameters, fresh), cell in zip(seen, ("gru", "none")):
        expected = {name.removeprefix("model."): value for name, value in saved["runs"][cell]["model"].items()}
        torch.testing.assert_close(parameters, expected, rtol=0, atol=0)
        assert fresh
    assert [row["iteration"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[:4] == saved["state"]["history"]

    assert "the checkpoint was made with hidden 16, not 8" in program.error(*options, "--resume", "--hidden", 8)


def test_reference_agrees(program: Program) -> None:
    losses = []
    for backend in ("auto", "reference"):
        program.run("--cells", "lstm", "--iterations", 6, "--backend", backend)
        losses.append(checkpoint()["runs"]["lstm"]["losses"])
    ours, theirs = losses
    assert len(ours) == 6
    assert ours == pytest.approx(theirs, rel=1e-4)


BAD_INPUT = BAD_OPTIONS | {
    "steps": (("--steps", 1), "--steps must be at least 2, got 1"),
    "cell": (("--cells", "qrnn"), "argument --cells: invalid choice: 'qrnn'"),
    "no resets": (("--backend", "aten"), "--backend aten: backend 'aten' cannot compute this call"),
}


@pytest.mark.parametrize(("options", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_line(program: Program, options: tuple[object, ...], message: str) -> None:
    assert message in program.error(*options)
