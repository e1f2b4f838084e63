"""LSTMModule and GRUModule of TorchRL in a recurrent value network."""

import copy
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import Compose, GymEnv, InitTracker, TransformedEnv
from torchrl.modules import MLP, GRUModule, LSTMModule, QValueModule, set_recurrent_mode
from torchrl.objectives import DQNLoss

import fastrnn
from tests.drop_in.comparison import compare


def made(kind: Any) -> TensorDictSequential:
    states = ["h", "c"] if kind is LSTMModule else ["h"]
    recurrent = kind(
        input_size=32,
        hidden_size=64,
        num_layers=2,
        in_keys=["embed", *states],
        out_keys=["features", *[("next", state) for state in states]],
    )
    return TensorDictSequential(
        TensorDictModule(MLP(in_features=4, out_features=32, num_cells=[]), ["observation"], ["embed"]),
        recurrent,
        TensorDictModule(nn.Linear(64, 2), ["features"], ["action_value"]),
        QValueModule(action_space="one-hot"),
    )


def values(network: TensorDictSequential, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with set_recurrent_mode(True):
        found = network(TensorDict(batch, batch["is_init"].shape[:2]))["action_value"]
    return found, (found * batch["wanted"]).sum()


def drawn() -> dict[str, Tensor]:
    """Sequences in which episodes start."""
    starts = torch.rand(16, 50, 1) < 0.05
    return {"observation": torch.randn(16, 50, 4), "is_init": starts, "wanted": torch.randn(16, 50, 2)}


@pytest.mark.parametrize("kind", [LSTMModule, GRUModule])
def test_outputs_and_gradients(kind: Any) -> None:
    model = made(kind)
    ours = fastrnn.accelerate(copy.deepcopy(model))
    batches = [drawn() for _ in range(3)]
    compare(f"torchrl {kind.__name__}", model, ours, values, batches)
    with set_recurrent_mode(True):
        text = fastrnn.explain(ours, TensorDict(batches[0], [16, 50]))
    assert "layer 1" in text and "cpu (backend='auto')" in text


@pytest.mark.parametrize("kind", [LSTMModule, GRUModule])
def test_acting_and_learning(kind: Any) -> None:
    """The loss calls the network with other parameters in place, through tensordict."""
    model = made(kind)
    ours = fastrnn.accelerate(copy.deepcopy(model))
    losses: list[list[float]] = []
    for network in (model, ours):
        torch.manual_seed(0)
        environment = GymEnv("CartPole-v1", categorical_action_encoding=False)
        environment = TransformedEnv(environment, Compose(InitTracker(), network[1].make_tensordict_primer()))
        environment.set_seed(0)
        with torch.no_grad():
            played = environment.rollout(100, network, break_when_any_done=False).unsqueeze(0)
        objective = DQNLoss(network, action_space="one-hot", delay_value=True)
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
        losses.append([])
        for _ in range(3):
            with set_recurrent_mode(True):
                loss = objective(played.clone())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
