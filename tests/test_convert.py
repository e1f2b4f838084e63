"""accelerate() and restore() on models as they are found in other projects."""

import abc
import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastrnn


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.encoder = nn.GRU(6, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.stack = nn.ModuleList([nn.LSTM(14, 5), nn.RNN(5, 4, nonlinearity="relu")])
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.encoder(self.embedding(tokens))
        for layer in self.stack:
            x, _ = layer(x)
        return self.cell(x[0])[0]


class Named(nn.LSTM):
    """A subclass that adds something, but no forward pass."""

    def units(self) -> int:
        return self.hidden_size


class Calling(abc.ABC, nn.RNNBase):
    """As in packages that share a forward pass between subclasses of nn.LSTM and nn.GRU."""

    def forward(self, input, hx=None, *, times=1):  # type: ignore[no-untyped-def, override]
        for _ in range(times):
            input, hx = super().forward(input, hx)
        return input, hx


class CallingLSTM(Calling, nn.LSTM):
    pass


class CallingUnbound(nn.LSTM):
    def forward(self, input, hx=None):  # type: ignore[no-untyped-def, override]
        return nn.LSTM.forward(self, input, hx)


TOKENS = torch.randint(10, (3, 8), generator=torch.Generator().manual_seed(0))


def losses(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    found = []
    for _ in range(steps):
        loss = model(TOKENS).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_the_same_training_run() -> None:
    model = Tagger()
    accelerated = fastrnn.accelerate(copy.deepcopy(model))
    assert type(accelerated.encoder) is fastrnn.nn.GRU and isinstance(accelerated.encoder, nn.GRU)
    assert type(accelerated.cell) is fastrnn.nn.LSTMCell
    assert losses(accelerated) == pytest.approx(losses(model), rel=1e-4)


def test_in_place_and_undone() -> None:
    model = Tagger()
    parameters, keys = list(model.parameters()), list(model.state_dict())
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    expected = model(TOKENS)
    assert fastrnn.accelerate(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(TOKENS), expected)
    assert len(calls) == 2
    before = dict(Tagger().encoder.__dict__)
    assert fastrnn.restore(fastrnn.accelerate(model, backend="reference")) is model
    assert type(model.encoder) is nn.GRU and type(model.cell) is nn.LSTMCell
    assert model.encoder.__dict__.keys() == before.keys()
    torch.testing.assert_close(model(TOKENS), expected)


def test_the_root_itself() -> None:
    layer = nn.LSTM(3, 4)
    assert fastrnn.accelerate(layer) is layer
    assert type(layer) is fastrnn.nn.LSTM
    assert type(fastrnn.restore(layer)) is nn.LSTM


def test_restore_leaves_our_own_modules_alone() -> None:
    layer = fastrnn.nn.GRU(3, 4, reset_after=False)
    assert type(fastrnn.restore(layer)) is fastrnn.nn.GRU
    assert not layer.reset_after


def test_subclasses() -> None:
    named = fastrnn.accelerate(Named(3, 4))
    assert isinstance(named, Named) and isinstance(named, fastrnn.nn.LSTM) and named.units() == 4
    copied = pickle.loads(pickle.dumps(named))
    x = torch.randn(2, 1, 3)
    assert torch.equal(copied(x)[0], named(x)[0])
    assert type(fastrnn.restore(named)) is Named


def test_a_forward_pass_that_calls_torchs_gets_ours() -> None:
    layer = CallingLSTM(4, 4, num_layers=2, bidirectional=True, proj_size=2)
    x = torch.randn(5, 3, 4)
    expected = layer(x, times=2)
    gradients = torch.autograd.grad(expected[0].sum(), list(layer.parameters()))
    fastrnn.accelerate(layer, backend="reference")
    assert isinstance(layer, CallingLSTM) and isinstance(layer, fastrnn.nn.LSTM)
    text = fastrnn.explain(layer, x, times=2)
    assert all(f"2 calls of the module itself (CallingLSTM), layer {place}" in text for place in ("0 reverse:", "1:"))
    assert text.count("reference (backend='reference')") == 4
    found = pickle.loads(pickle.dumps(layer))(x, times=2)
    torch.testing.assert_close(found, expected)
    found = layer(x, times=2)
    torch.testing.assert_close(torch.autograd.grad(found[0].sum(), list(layer.parameters())), gradients)
    assert type(fastrnn.restore(layer)) is CallingLSTM
    assert torch.equal(layer(x, times=2)[0], expected[0])


def test_a_forward_pass_that_does_not_is_named() -> None:
    layer, x = CallingUnbound(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    assert torch.equal(fastrnn.accelerate(layer)(x)[0], expected)
    assert "its own forward(), which did not call super().forward()" in fastrnn.explain(layer, x)


def test_a_scripted_module_is_left_alone_and_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(nn.Sequential(nn.GRU(3, 4)))
    text = fastrnn.explain(fastrnn.accelerate(scripted), torch.randn(5, 2, 3))
    assert "computed by torch.nn" in text and "not fastrnn: torch.jit.script has compiled it" in text


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_accelerated(way: str) -> None:
    model = fastrnn.accelerate(Tagger())
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert type(fastrnn.restore(other).encoder) is nn.GRU
    assert type(model.encoder) is fastrnn.nn.GRU


def test_unknown_back_end() -> None:
    model = Tagger()
    with pytest.raises(ValueError, match="backend must be one of"):
        fastrnn.accelerate(model, backend="tpu")
    assert type(model.encoder) is nn.GRU


def test_parametrized_weights() -> None:
    layer = nn.LSTM(3, 4)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    expected = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    fastrnn.accelerate(layer)
    assert isinstance(layer, fastrnn.nn.LSTM)
    found = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(fastrnn.restore(layer)) is nn.LSTM


def test_pruned_weights() -> None:
    layer = fastrnn.accelerate(nn.GRU(3, 4))
    prune.l1_unstructured(layer, "weight_ih_l0", amount=0.5)
    plain = nn.GRU(3, 4)
    values = {name: getattr(layer, name) for name, _ in plain.named_parameters()}
    plain.load_state_dict({name: value.detach() for name, value in values.items()})
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_weight_norm_of_the_old_kind() -> None:
    """It removes the parameter and sets a plain tensor of its name before each call."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    expected = layer(x)[0]
    gradients = torch.autograd.grad(expected.sum(), list(layer.parameters()))
    y = fastrnn.accelerate(layer)(x)[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), list(layer.parameters())), gradients)


def test_parametrized_after_and_before() -> None:
    x = torch.randn(5, 2, 3)
    layer = fastrnn.accelerate(nn.GRU(3, 4))
    parametrizations.orthogonal(layer, "weight_hh_l0")
    expected = layer(x)[0]
    other = copy.deepcopy(layer)
    fastrnn.restore(layer)
    assert isinstance(layer, nn.GRU) and not isinstance(layer, fastrnn.nn.GRU)
    assert isinstance(other, fastrnn.nn.GRU)
    for module in (layer, other):
        torch.testing.assert_close(module(x)[0], expected)
        parametrize.remove_parametrizations(module, "weight_hh_l0")
        torch.testing.assert_close(module(x)[0], expected)
    assert type(layer) is nn.GRU and type(other) is fastrnn.nn.GRU


def test_a_second_call_changes_the_back_end_only() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    fastrnn.accelerate(fastrnn.accelerate(layer, backend="reference"), backend="aten")
    assert type(layer) is fastrnn.nn.LSTM and layer.backend == "aten"
    assert "aten (backend='aten')" in fastrnn.explain(layer, x)
    fastrnn.accelerate(layer)
    assert layer.backend == "auto"
    ours = fastrnn.nn.GRU(3, 4, backend="reference")
    assert fastrnn.accelerate(ours, backend="cpu").backend == "reference"  # asked for by name, not by accelerate


class ChecksItself(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):  # type: ignore[no-untyped-def, override]
        raise RuntimeError("checked")


class WithBackend(nn.LSTM):
    def __init__(self) -> None:
        super().__init__(3, 4)
        self.backend = "of its own"


def test_modules_that_are_left_alone_are_named() -> None:
    patched = nn.GRU(3, 4)
    patched.forward = lambda input: (input, None)  # type: ignore[method-assign]
    model = fastrnn.accelerate(nn.ModuleDict({"a": ChecksItself(3, 4), "b": WithBackend(), "c": patched}))
    assert [type(part) for part in model.values()] == [ChecksItself, WithBackend, nn.GRU]
    assert model["b"].backend == "of its own"
    reasons = [fastrnn.convert.reasons_against(part) for part in model.values()]
    assert reasons == [
        ["ChecksItself has its own check_forward_args()"],
        ["WithBackend has an attribute backend"],
        ["its forward() was replaced"],
    ]
    with pytest.raises(RuntimeError, match="checked"):
        model["a"](torch.zeros(5, 2, 3))


def test_data_parallel_replicas_and_lists_of_modules() -> None:
    shared = nn.GRU(3, 3)
    model = fastrnn.accelerate(nn.Sequential(shared, nn.ModuleList([shared])))
    assert model[0] is model[1][0] is shared and type(shared) is fastrnn.nn.GRU
    replica = shared._replicate_for_data_parallel()
    for name, parameter in shared.named_parameters():
        setattr(replica, name, parameter)
    x = torch.randn(5, 2, 3)
    assert torch.equal(replica(x)[0], shared(x)[0])
