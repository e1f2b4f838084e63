"""DeepAR of pytorch-forecasting, whose LSTM and GRU are subclasses of torch.nn's with a forward pass of their own."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from pytorch_forecasting import DeepAR, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastrnn
from tests.drop_in.comparison import compare

DATA = generate_ar_data(n_series=16, timesteps=120, seed=0)


@pytest.fixture(scope="module")
def series() -> TimeSeriesDataSet:
    return TimeSeriesDataSet(
        DATA,
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        min_encoder_length=5,
        max_encoder_length=60,
        max_prediction_length=20,
        time_varying_unknown_reals=["value"],
    )


def batches(series: TimeSeriesDataSet) -> DataLoader:
    return series.to_dataloader(batch_size=64, shuffle=True)


def made(series: TimeSeriesDataSet, cell: str) -> DeepAR:
    return DeepAR.from_dataset(series, cell_type=cell, hidden_size=64, rnn_layers=2, dropout=0.0, optimizer="sgd")


def likelihood(model: DeepAR, batch: Any) -> tuple[Any, Tensor]:
    x, y = batch
    parameters = model(x).prediction
    return parameters, model.loss(parameters, y)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_outputs_and_gradients(series: TimeSeriesDataSet, cell: str) -> None:
    model = made(series, cell)
    ours = fastrnn.accelerate(copy.deepcopy(model))
    drawn = [batch for _, batch in zip(range(3), batches(series))]
    compare(f"pytorch-forecasting DeepAR, {cell}", model, ours, likelihood, drawn)
    text = fastrnn.explain(ours, drawn[0][0])
    assert f"rnn ({cell}), layer 1: {cell.lower()}" in text and "cpu (backend='auto')" in text


def test_training_saving_and_sampling(series: TimeSeriesDataSet, tmp_path: Path) -> None:
    model = made(series, "LSTM")
    ours = fastrnn.accelerate(copy.deepcopy(model))
    for trained in (model, ours):
        lightning.seed_everything(0)
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
        )
        trainer.fit(trained, batches(series))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name), msg=name)
    trainer.save_checkpoint(tmp_path / "ours.ckpt")
    loaded = DeepAR.load_from_checkpoint(tmp_path / "ours.ckpt", weights_only=False)
    assert isinstance(loaded.rnn, nn.LSTM) and not isinstance(loaded.rnn, fastrnn.nn.LSTM)
    last = TimeSeriesDataSet.from_dataset(series, DATA, predict=True).to_dataloader(train=False, batch_size=16)
    forecasts = []
    for forecaster in (ours, loaded):
        lightning.seed_everything(0)
        forecasts.append(forecaster.predict(last, n_samples=10, trainer_kwargs={"logger": False}))
    torch.testing.assert_close(*forecasts)
