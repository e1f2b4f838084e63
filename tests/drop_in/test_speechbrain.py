"""Encoder and attention decoder of a speech recogniser of SpeechBrain."""

import copy
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastrnn
from tests.drop_in.comparison import compare

try:
    import torchaudio  # noqa: F401
except OSError:  # Its wheels load torch's CUDA libraries. SpeechBrain imports it, but needs it only for audio itself.
    sys.modules["torchaudio"] = stand_in = ModuleType("torchaudio")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    stand_in.__version__ = "2.11.0"

from speechbrain import Brain
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.nnet.RNN import GRU, LSTM, AttentionalRNNDecoder
from speechbrain.utils.checkpoints import Checkpointer

Batch = tuple[Tensor, Tensor, Tensor]


class Recogniser(nn.Module):
    def __init__(self, rnn: Any) -> None:
        super().__init__()
        self.encoder = CRDNN(
            input_size=20,
            rnn_class=rnn,
            rnn_layers=2,
            rnn_neurons=128,
            dnn_neurons=64,
            cnn_channels=[4, 8],
            dropout=0.0,
        )
        self.embedding = nn.Embedding(30, 16)
        self.decoder = AttentionalRNNDecoder(rnn.__name__.lower(), "content", 256, 64, 1, enc_dim=64, input_size=16)
        self.output = nn.Linear(256, 30)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, L, 30] and alignments [B, L, T] of features [B, T, 20], relative lengths [B] and tokens [B, L]."""
        features, lengths, tokens = batch
        decoded, alignments = self.decoder(self.embedding(tokens), self.encoder(features), lengths)
        return self.output(decoded), alignments


def drawn() -> Batch:
    return (
        torch.randn(8, 64, 20),
        torch.tensor([1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        torch.randint(30, (8, 16)),
    )


def likelihood(model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
    logits, alignments = model(batch)
    return (logits, alignments), nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[2][:, 1:].flatten())


class Training(Brain):
    def compute_forward(self, batch: Batch, stage: Any) -> Tensor:
        return likelihood(self.modules["model"], batch)[1]

    def compute_objectives(self, predictions: Tensor, batch: Batch, stage: Any) -> Tensor:
        return predictions


@pytest.mark.parametrize("rnn", [LSTM, GRU], ids=["LSTM", "GRU"])
def test_outputs_and_gradients(rnn: Any) -> None:
    model = Recogniser(rnn)
    ours = fastrnn.accelerate(copy.deepcopy(model))
    batches = [drawn() for _ in range(3)]
    compare(f"speechbrain CRDNN and attention decoder, {rnn.__name__}", model, ours, likelihood, batches)
    text = fastrnn.explain(ours, batches[0])
    assert "encoder.RNN" in text and "16 calls of decoder.rnn" in text and "cpu (backend='auto')" in text


def test_training_and_checkpoints(tmp_path: Path) -> None:
    model = Recogniser(GRU)
    ours = fastrnn.accelerate(copy.deepcopy(model))
    batches = DataLoader([drawn() for _ in range(3)], batch_size=None)
    for trained in (model, ours):
        brain = Training(
            {"model": trained},
            opt_class=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            run_opts={"device": "cpu", "noprogressbar": True},
            checkpointer=Checkpointer(tmp_path / type(trained).__name__, {"model": trained}),
        )
        brain.fit(range(1), batches)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), msg=name)
    brain.checkpointer.save_checkpoint()
    recovered = Recogniser(GRU)
    Checkpointer(tmp_path / "Recogniser", {"model": recovered}).recover_if_possible()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in recovered.state_dict().items())
