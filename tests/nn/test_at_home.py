"""What projects do with torch.nn's modules, done with ours: copies, other weights, compilation, threads."""

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.backends import native
from tests.accuracy import assert_as_accurate

LAYERS = [fastrnn.nn.RNN, fastrnn.nn.LSTM, fastrnn.nn.GRU]
CELLS = [fastrnn.nn.RNNCell, fastrnn.nn.LSTMCell, fastrnn.nn.GRUCell]


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_is_a_torch_module_with_its_parameters(cls: type[nn.Module]) -> None:
    torchs = getattr(nn, cls.__name__)
    torch.manual_seed(1)
    ours = cls(3, 4)
    torch.manual_seed(1)
    theirs = torchs(3, 4)
    assert isinstance(ours, torchs)
    assert str(ours) == str(theirs)
    theirs_state = theirs.state_dict()
    assert list(ours.state_dict()) == list(theirs_state)
    assert all(torch.equal(value, theirs_state[name]) for name, value in ours.state_dict().items())
    torchs(3, 4).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_copies(cls: type[nn.Module]) -> None:
    module, x = cls(3, 4), torch.randn(2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for other in copies:
        assert type(other) is cls
        assert torch.equal(first(other(x)), first(module(x)))


@pytest.mark.parametrize("cls", LAYERS)
def test_weights_replaced_by_plain_tensors(cls: type[nn.Module]) -> None:
    """As AWD-LSTM's weight drop does before each forward pass."""
    layer, plain, x = cls(3, 4), getattr(nn, cls.__name__)(3, 4), torch.randn(5, 2, 3)
    plain.load_state_dict(layer.state_dict())
    raw = nn.Parameter(layer.weight_hh_l0.detach().clone())
    del layer._parameters["weight_hh_l0"]
    for factor in (0.5, 2.0):
        layer.weight_hh_l0 = raw * factor
        with torch.no_grad():
            plain.weight_hh_l0.copy_(raw * factor)
        torch.testing.assert_close(layer(x)[0], plain(x)[0])
    layer(x)[0].sum().backward()
    assert raw.grad is not None


@pytest.mark.parametrize("cls", LAYERS)
def test_weights_written_through_data_are_seen(cls: type[nn.Module]) -> None:
    layer, x = cls(3, 4).eval(), torch.randn(5, 2, 3)
    with torch.no_grad():
        before = layer(x)[0]
        for parameter in layer.parameters():
            parameter.data *= 0.5
        plain = getattr(nn, cls.__name__)(3, 4)
        plain.load_state_dict(layer.state_dict())
        after = layer(x)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, plain(x)[0])


def test_functional_call_and_tied_weights() -> None:
    layer, x = fastrnn.nn.GRU(4, 4, num_layers=2), torch.randn(5, 2, 4)
    weights = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    plain = nn.GRU(4, 4, num_layers=2)
    expected = torch.func.functional_call(plain, weights, x)[0]
    torch.testing.assert_close(torch.func.functional_call(layer, weights, x)[0], expected)
    layer.weight_hh_l1 = layer.weight_hh_l0
    layer(x)[0].sum().backward()
    plain.load_state_dict(layer.state_dict())
    plain.weight_hh_l1 = plain.weight_hh_l0
    plain(x)[0].sum().backward()
    torch.testing.assert_close(layer.weight_hh_l0.grad, plain.weight_hh_l0.grad)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_outputs_may_be_changed_in_place(cls: type[nn.Module], steps: int) -> None:
    gradients = []
    for in_place in (False, True):
        torch.manual_seed(0)
        layer, x = cls(3, 4), torch.randn(steps, 2, 3)
        y = layer(x)[0]
        y = y.mul_(2).relu_() if in_place else (y * 2).relu()
        gradients.append(torch.autograd.grad(y.sum(), list(layer.parameters())))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("cls", LAYERS)
def test_backward_in_evaluation_mode(cls: type[nn.Module]) -> None:
    layer, x = cls(3, 4, dropout=0.5, num_layers=2), torch.randn(5, 2, 3, requires_grad=True)
    layer.eval()
    layer(x)[0].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_precision_and_device_changes() -> None:
    layer, x = fastrnn.nn.LSTM(3, 4), torch.randn(5, 2, 3)
    y = layer(x)[0]
    torch.testing.assert_close(layer.double()(x.double())[0].float(), y)
    torch.testing.assert_close(layer.to(torch.bfloat16)(x.bfloat16())[0].float(), y, rtol=0.05, atol=0.05)
    assert layer.to("meta")(x.to("meta").bfloat16())[0].shape == y.shape
    assert fastrnn.nn.GRU(3, 4, device="meta").weight_hh_l0.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("cls", [nn.RNN, nn.LSTM, nn.GRU])
def test_autocast_gives_torchs_dtypes_and_is_as_accurate(cls: type[nn.Module], given: bool, dtype: torch.dtype) -> None:
    plain = cls(20, 30)
    layer = fastrnn.accelerate(copy.deepcopy(plain))
    x, grad = torch.randn(9, 5, 20), torch.randn(9, 5, 30)
    h = torch.randn(1, 5, 30)
    hx = None if not given else (h, h) if cls is nn.LSTM else h

    def run(module: nn.Module) -> tuple[Any, ...]:
        kind = next(module.parameters()).dtype
        state = tuple(h.to(kind) for h in hx) if isinstance(hx, tuple) else None if hx is None else hx.to(kind)
        leaf = x.to(kind).requires_grad_()
        y, final = module(leaf, state)
        return y, final, torch.autograd.grad(y, [leaf, *module.parameters()], grad.to(y.dtype))

    exact = run(copy.deepcopy(plain).double())
    with torch.autocast("cpu", dtype):
        ours = run(layer)
        # oneDNN's LSTM has no float16; its dtypes are those of its bfloat16.
        assert ours[0].dtype == (dtype if cls is not nn.GRU else torch.float32)
        if cls is not nn.LSTM or dtype is torch.bfloat16:
            torchs = run(plain)
            assert_as_accurate(ours, torchs, exact)
    assert "cpu (backend" in fastrnn.explain(layer, x)


def test_double_backward_under_autocast() -> None:
    layer, x = fastrnn.nn.GRU(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (dx,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.square().sum(), x)
    assert dx.dtype == ddx.dtype == torch.float32 and ddx.abs().sum() > 0


@pytest.mark.parametrize("cls", LAYERS)
def test_lengths_are_a_packed_sequence_without_the_packing(cls: type[nn.Module]) -> None:
    layer, lengths = cls(3, 4, num_layers=2, bidirectional=True, batch_first=True), torch.tensor([2, 5, 1])
    x = torch.randn(3, 5, 3)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    expected = torch.nn.utils.rnn.pad_packed_sequence(layer(packed)[0], batch_first=True)[0]
    y = layer(x, lengths=lengths)[0]
    torch.testing.assert_close(y, expected)


def test_wrong_options_name_the_argument() -> None:
    layer, x = fastrnn.nn.GRU(3, 4), torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.5"):
        layer(x, lengths=torch.tensor([6, 1]))
    with pytest.raises(ValueError, match=r"resets must be bool of shape \(5, 2\)"):
        layer(x, resets=torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="zoneout"):
        fastrnn.nn.GRU(3, 4, zoneout=1.5)
    with pytest.raises(ValueError, match="backend"):
        fastrnn.nn.GRU(3, 4, backend="fast")
    with pytest.raises(NotImplementedError, match=r"torch\.float64"):
        fastrnn.nn.GRU(3, 4, backend="cpu", dtype=torch.double)(x.double())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"zoneout": 0.2, "recurrent_dropout": 0.2, "weight_dropout": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", LAYERS)
def test_compiles_whole(cls: type[nn.Module], options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layer = cls(6, 8, **options)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, steps in ((3, 5), (4, 7)):
            x = torch.randn(batch, steps, 6)
            y = compiled(x)[0]
            if not layer.__dict__.get("zoneout"):
                assert torch.equal(y, layer(x)[0])
            y.sum().backward()


@pytest.mark.parametrize("cls", LAYERS)
def test_exports(cls: type[nn.Module]) -> None:
    layer, x = cls(3, 4, num_layers=2).eval(), torch.randn(5, 2, 3)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x)[0], layer(x)[0])
    if native.load() is not None:  # one operator a layer, however many steps
        assert sum("recurrence_forward" in str(node.target) for node in exported.graph.nodes) == 2


def test_models_and_samples_at_once_by_vmap() -> None:
    models = [fastrnn.nn.GRU(3, 4) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), torch.randn(5, 2, 3)
    ys = torch.vmap(lambda p, b: torch.func.functional_call(base, (p, b), (x,))[0])(parameters, buffers)
    torch.testing.assert_close(ys, torch.stack([model(x)[0] for model in models]))


def test_random_options_follow_the_seed() -> None:
    layer, x = fastrnn.nn.LSTM(3, 8, zoneout=0.3, recurrent_dropout=0.3, weight_dropout=0.3), torch.randn(5, 2, 3)
    ys = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        ys.append(layer(x)[0])
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_several_threads_and_one() -> None:
    layer, x = fastrnn.nn.GRU(64, 256), torch.randn(10, 8, 64)
    expected = layer(x)[0]
    found: list[Any] = [None] * 3

    def work(index: int) -> None:
        found[index] = layer(x)[0]

    workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert all(torch.equal(y, expected) for y in found)
    torch.set_num_threads(1)
    assert torch.equal(layer(x)[0], expected)
