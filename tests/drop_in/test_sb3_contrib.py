"""Recurrent PPO of sb3-contrib."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor, nn

import fastrnn
from tests.drop_in.comparison import compare


class ResettingPolicy(RecurrentActorCriticPolicy):
    """Hands the starts of episodes to fastrnn's layer, where sb3-contrib goes step by step through every sequence."""

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: tuple[Tensor, Tensor], episode_starts: Tensor, lstm: nn.LSTM
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sequences = lstm_states[0].shape[1]
        x = features.reshape(sequences, -1, lstm.input_size).transpose(0, 1)
        y, lstm_states = lstm(x, lstm_states, resets=episode_starts.reshape(sequences, -1).T.bool())
        return y.transpose(0, 1).flatten(0, 1), lstm_states


def made(policy: Any = RecurrentActorCriticPolicy) -> RecurrentPPO:
    environment = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    return RecurrentPPO(policy, environment, n_steps=64, batch_size=128, n_epochs=2, seed=0, device="cpu")


def in_own_dtype(layer: nn.LSTM, args: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """For the model in fp64: sb3-contrib makes every observation fp32."""
    return args[0].to(layer.weight_hh_l0.dtype), args[1]


def ppo_loss(policy: RecurrentActorCriticPolicy, batch: Any) -> tuple[Any, Tensor]:
    mask = batch.mask > 1e-8
    values, log_prob, entropy = policy.evaluate_actions(
        batch.observations, batch.actions.long().flatten(), batch.lstm_states, batch.episode_starts
    )
    gain = batch.advantages * torch.exp(log_prob - batch.old_log_prob)
    loss = ((values.flatten() - batch.returns) ** 2 - gain - 0.01 * entropy)[mask].mean()
    return (values, log_prob, entropy), loss


@pytest.mark.parametrize("policy", [RecurrentActorCriticPolicy, ResettingPolicy])
def test_outputs_and_gradients(policy: Any) -> None:
    played = made().learn(256)
    model, ours = made().policy, fastrnn.accelerate(made(policy).policy)
    for other in (model, ours):
        other.load_state_dict(played.policy.state_dict())
    for layer in (model.lstm_actor, model.lstm_critic):
        layer.register_forward_pre_hook(in_own_dtype)
    batches = list(played.rollout_buffer.get(64))
    compare(f"sb3-contrib {policy.__name__}", model, ours, ppo_loss, batches)
    text = fastrnn.explain(ours, batches[0].observations, batches[0].lstm_states, batches[0].episode_starts)
    assert "lstm_actor (LSTM), layer 0" in text and "cpu (backend='auto')" in text


@pytest.mark.parametrize("policy", [RecurrentActorCriticPolicy, ResettingPolicy])
def test_training_and_saving(policy: Any, tmp_path: Path) -> None:
    theirs = made().learn(256)
    ours = made(policy)
    fastrnn.accelerate(ours.policy)
    ours.learn(256)
    assert ours.rollout_buffer.actions.tolist() == theirs.rollout_buffer.actions.tolist()
    for name, value in theirs.policy.state_dict().items():
        torch.testing.assert_close(ours.policy.state_dict()[name], value, msg=name)
    ours.save(tmp_path / "ours")
    loaded = RecurrentPPO.load(tmp_path / "ours", device="cpu")
    for name, value in loaded.policy.state_dict().items():
        assert torch.equal(value, ours.policy.state_dict()[name])
    if policy is RecurrentActorCriticPolicy:
        assert type(loaded.policy.lstm_actor) is nn.LSTM
        observation = theirs.rollout_buffer.observations[0]
        for found, expected in zip(ours.predict(observation)[1], loaded.predict(observation)[1]):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
