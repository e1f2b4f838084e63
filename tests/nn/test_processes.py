"""Two processes train one model, as they would one of torch.nn: DistributedDataParallel and fully_shard (FSDP2)."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastrnn import nn
from tests.accuracy import assert_as_accurate_over

PROCESSES = 2
SEEDS = range(8)  # of small cases, whose largest error is a matter of luck
LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "rnn": lambda: nn.RNN(5, 6, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(5, 6, 2, bidirectional=True),
    "gru": lambda: nn.GRU(5, 7, 2, residual=True),
    "layer norm": lambda: nn.LSTM(5, 6, layer_norm=True),
    "projection": lambda: nn.LSTM(5, 6, proj_size=3),
}


class Model(torch.nn.Module):
    """Recurrent layers, a learned initial projection before and attention over their outputs behind them."""

    def __init__(self, layers: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.inputs = torch.nn.Linear(4, 5)
        self.layers = layers()
        size = self.layers(torch.zeros(1, 1, 5))[0].shape[-1]
        self.attention = nn.AdditiveAttention(size, size, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(self.inputs(x))[0].transpose(0, 1)
        return self.attention(y, y)[0]


def model_and_input(name: str, seed: int) -> tuple[Model, Tensor]:
    torch.manual_seed(seed)
    return Model(LAYERS[name]), torch.randn(6, 5, 4)


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def train(rank: int, folder: Path) -> None:
    """The gradients, and the outputs after a step, that each process has, as files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, kind, seed in itertools.product(LAYERS, ("ddp", "fsdp", "bfloat16"), SEEDS):
        model, x = model_and_input(name, seed)
        if kind == "ddp":
            model = DistributedDataParallel(model)
        else:
            policy = MixedPrecisionPolicy(torch.bfloat16) if kind == "bfloat16" else MixedPrecisionPolicy()
            for part in (*model.children(), model):
                fully_shard(part, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        mine = x[:, rank::PROCESSES]
        loss_of(model(mine)).backward()
        found = gradients(model)
        if kind != "ddp":
            found = {name: grad.full_tensor() for name, grad in found.items()}
        # Both ways average over the processes what one process adds up.
        found = {key.removeprefix("module."): PROCESSES * grad for key, grad in found.items()}
        optimizer.step()
        torch.save((found, model(mine).detach()), folder / f"{name}-{kind}-{seed}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(train, (folder,), nprocs=PROCESSES)
    return folder


def alone(name: str, seed: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """What the reference finds in one process with the whole batch."""
    model, x = model_and_input(name, seed)
    model.layers.backend = model.attention.backend = "reference"
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 / PROCESSES)
    loss_of(model(x.to(dtype))).backward()
    optimizer.step()
    return gradients(model), model(x.to(dtype)).detach()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", LAYERS)
def test_as_one_process(trained: Path, name: str, kind: str) -> None:
    draws = []
    for seed in SEEDS:
        plain, exact = alone(name, seed, torch.float32), alone(name, seed, torch.float64)
        for rank in range(PROCESSES):
            rows = slice(rank, None, PROCESSES)
            found = torch.load(trained / f"{name}-{kind}-{seed}-{rank}")
            draws.append((found, (plain[0], plain[1][rows]), (exact[0], exact[1][rows])))
    assert_as_accurate_over(draws)


@pytest.mark.parametrize("name", LAYERS)
def test_mixed_precision(trained: Path, name: str) -> None:
    """fully_shard computes in bfloat16 and keeps gradients in the parameters' float32."""
    draws = []
    for seed in SEEDS:
        grads, _ = torch.load(trained / f"{name}-bfloat16-{seed}-0")
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        rounded = {key: grad.bfloat16() for key, grad in grads.items()}
        draws.append((rounded, alone(name, seed, torch.bfloat16)[0], alone(name, seed, torch.float64)[0]))
    assert_as_accurate_over(draws)
