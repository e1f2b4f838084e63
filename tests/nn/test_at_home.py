"""What projects do with torch.nn's modules, done with ours: copies, other weights, compilation, threads."""

import copy
import io
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.backends import native
from tests.accuracy import assert_as_accurate

LAYERS = [fastrnn.nn.RNN, fastrnn.nn.LSTM, fastrnn.nn.GRU]
CELLS = [fastrnn.nn.RNNCell, fastrnn.nn.LSTMCell, fastrnn.nn.GRUCell]


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def is_cell(cls: type[nn.Module]) -> bool:
    return issubclass(cls, nn.RNNCellBase)


def example(cls: type[nn.Module], steps: int = 5, batch: int = 2) -> torch.Tensor:
    """Input of three features."""
    return torch.randn(batch, 3) if is_cell(cls) else torch.randn(steps, batch, 3)


def arguments(
    cls: type[nn.Module], names: tuple[str, ...] = ("hx",), steps: int = 5, batch: int = 2
) -> tuple[Tensor, dict[str, Any]]:
    """Input, and the arguments that are named. A cell that is given no state makes no use of weight_hh."""
    given: dict[str, Any] = {}
    if "hx" in names:
        h = torch.randn(batch, 4) if is_cell(cls) else torch.randn(1, batch, 4)
        given["hx"] = (h, h.clone()) if issubclass(cls, (nn.LSTM, nn.LSTMCell)) else h
    if "lengths" in names:
        given |= {"lengths": torch.randint(0, steps + 1, (batch,)), "resets": torch.rand(steps, batch) < 0.3}
    return example(cls, steps, batch), given


def pair(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's of four units, of equal parameters."""
    ours, theirs = cls(3, 4), getattr(nn, cls.__name__)(3, 4)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, given: dict[str, Any]) -> None:
    """Outputs too. With gradients by backward(), as hooks and wrappers around a module need it."""
    y, expected = first(ours(x, **given)), first(theirs(x, **given))
    torch.testing.assert_close(y, expected)
    ours.zero_grad(), theirs.zero_grad()
    y.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


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
    module, x = cls(3, 4, layer_norm=True, zoneout=0.2).eval(), example(cls)
    module(x)  # leaves nothing behind that could not be copied

    def through_a_file(saved: Any, weights_only: bool) -> Any:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=weights_only)

    fresh = cls(3, 4, layer_norm=True, zoneout=0.2).eval()
    fresh.load_state_dict(through_a_file(module.state_dict(), weights_only=True))
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), through_a_file(module, weights_only=False)]
    for other in (fresh, *copies):
        assert type(other) is cls and other.zoneout == 0.2
        assert torch.equal(first(other(x)), first(module(x)))


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_made_on_meta_and_filled(cls: type[nn.Module]) -> None:
    source, x = cls(3, 4, layer_norm=True), example(cls)
    expected = first(source(x))
    for assign in (False, True):
        with torch.device("meta"):
            module = cls(3, 4, layer_norm=True)
        assert all(parameter.is_meta for parameter in module.parameters())
        if not assign:
            module.to_empty(device="cpu")
        module.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(first(module(x)), expected)


@pytest.mark.parametrize("cls", LAYERS)
def test_weights_replaced_by_plain_tensors(cls: type[nn.Module]) -> None:
    """As AWD-LSTM's weight drop does before each forward pass."""
    layer, plain, x = cls(3, 4), getattr(nn, cls.__name__)(3, 4), torch.randn(5, 2, 3)
    plain.load_state_dict(layer.state_dict())
    raw = nn.Parameter(layer.weight_hh_l0.detach().clone())
    for factor in (0.5, 2.0):
        delattr(layer, "weight_hh_l0")
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


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_precision_and_device_changes(cls: type[nn.Module]) -> None:
    module, x = cls(3, 4), example(cls)
    y = first(module(x))
    torch.testing.assert_close(first(module.double()(x.double())).float(), y)
    for convert in (nn.Module.half, nn.Module.bfloat16):
        converted = convert(copy.deepcopy(module))
        dtype = next(converted.parameters()).dtype
        found = first(converted(x.to(dtype)))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), y, rtol=0.05, atol=0.05)
        found.sum().backward()
    module.to(torch.float32).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(first(module(x)), y)
    found = first(module.to("meta")(x.to("meta")))
    assert found.is_meta and found.shape == y.shape
    assert all(parameter.is_meta for parameter in cls(3, 4, device="meta").parameters())


CHANGES: dict[str, Callable[[nn.Module, str], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda module, name: prune.l1_unstructured(module, name, amount=0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_parametrized_and_pruned(cls: type[nn.Module], change: str) -> None:
    ours, theirs = pair(cls)
    (x, given), name = arguments(cls), "weight_hh" if is_cell(cls) else "weight_hh_l0"
    before = first(ours(x, **given))
    for module in (ours, theirs):
        CHANGES[change](module, name)
        module.eval()  # spectral_norm refines its estimate at each use in training
    theirs.load_state_dict(ours.state_dict())
    assert_same_gradients(ours, theirs, x, given)
    if change != "weight_norm":  # which changes nothing at first
        assert not torch.allclose(first(ours(x, **given)), before)
    if change == "prune":
        prune.remove(ours, name)
    else:
        assert_same_gradients(copy.deepcopy(ours), theirs, x, given)
        parametrize.remove_parametrizations(ours, name)
    assert type(ours) is cls
    torch.testing.assert_close(first(ours(x, **given)), first(theirs(x, **given)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_checkpointed_and_off_loaded(cls: type[nn.Module], reentrant: bool) -> None:
    ours, theirs = pair(cls)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ours

        def forward(self, x: torch.Tensor, **given: Any) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(lambda x: first(ours(x, **given)), x, use_reentrant=reentrant)

    x, given = arguments(cls)
    x.requires_grad_()
    assert_same_gradients(Checkpointed(), theirs, x, given)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.clone(), lambda t: t):
        assert_same_gradients(ours, theirs, x, given)
    assert kept


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(options: dict[str, Any], tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for cls in (*LAYERS, *CELLS):
            ours, theirs = pair(cls)
            wrapped = nn.parallel.DistributedDataParallel(ours, **options)
            for _ in range(2):
                assert_same_gradients(wrapped, theirs, *arguments(cls))
    finally:
        torch.distributed.destroy_process_group()


class Encoded(torch.utils.data.Dataset):
    """Samples that a model computes, in the worker of a DataLoader."""

    def __init__(self, model: nn.Module, samples: torch.Tensor) -> None:
        self.model, self.samples = model, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        y = first(self.model(self.samples[index]))
        y.sum().backward()
        return y.detach()


@pytest.mark.parametrize("cls", LAYERS)
def test_in_a_forked_worker_after_threads_were_used(cls: type[nn.Module]) -> None:
    """With one thread, as DataLoader sets it. With more, OpenMP itself hangs after a fork, and torch.nn with it."""
    layer, samples = cls(64, 256), torch.randn(2, 10, 8, 64)
    expected = [first(layer(sample)) for sample in samples]
    expected[0].sum().backward()
    loader = torch.utils.data.DataLoader(
        Encoded(layer, samples), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(first(layer(samples[0])), expected[0])


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
def test_parameters_can_be_swapped_after_use(cls: type[nn.Module]) -> None:
    layer, x = cls(3, 4), torch.randn(5, 2, 3)
    with torch.no_grad():
        layer(x)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert first(layer(x.double())).dtype == torch.float64


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


def uses(cls: type[nn.Module]) -> list[Any]:
    """Two for each class: as torch.nn's, and with options and arguments of ours."""
    options: dict[str, Any] = {"zoneout": 0.2}
    if issubclass(cls, (nn.GRU, nn.GRUCell)):
        options["reset_after"] = False
    if issubclass(cls, (nn.LSTM, nn.LSTMCell)):
        options["peephole"] = True
    names = ("hx",) if is_cell(cls) else ("hx", "lengths")
    return [
        pytest.param(cls, {}, ("hx",), id=cls.__name__),
        pytest.param(cls, options, names, id=f"{cls.__name__}-options"),
    ]


all_uses = pytest.mark.parametrize(("cls", "options", "names"), [use for cls in (*LAYERS, *CELLS) for use in uses(cls)])


@all_uses
def test_one_graph_serves_all_sizes(cls: type[nn.Module], options: dict[str, Any], names: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    module = cls(3, 4, **options)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # None equal to the input size: torch.compile takes equal sizes for one and the same.
        for steps, batch in ((5, 2), (7, 8), (40, 9)):
            x, given = arguments(cls, names, steps, batch)
            found = []
            for called in (compiled, module):
                torch.manual_seed(1)
                y = first(called(x, **given))
                found.append((y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))))
            assert all(map(torch.equal, *found))


@pytest.mark.skipif(native.load() is None, reason="no compiled extension")
@pytest.mark.parametrize("cls", LAYERS)
def test_the_graph_does_not_grow_with_the_number_of_steps(cls: type[nn.Module]) -> None:
    sizes, seconds = [], []

    def backend(module: Any, inputs: Any) -> Any:
        sizes.append(len(module.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    for steps in (3, 200, 1000):
        torch._dynamo.reset()
        layer, x = cls(3, 4), torch.randn(steps, 2, 3)
        start = time.process_time()
        first(torch.compile(layer, fullgraph=True, backend=backend)(x)).sum().backward()
        seconds.append(time.process_time() - start)
    assert len(sizes) == 3 and len(set(sizes)) == 1
    assert min(seconds) < 2  # 0.25 seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_compiled_training_in_other_precisions(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer, x = fastrnn.nn.LSTM(3, 4, dtype=dtype), torch.randn(2, 2, 3, dtype=dtype)
    found = []
    for called in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        y = called(x)[0]
        found.append((y, *torch.autograd.grad(y.sum(), list(layer.parameters()))))
    tolerance = {} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(*found, **tolerance)


def test_torchs_own_modules_are_compiled_as_without_fastrnn() -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        torch.compile(nn.LSTM(3, 4), fullgraph=True, backend="eager")(torch.randn(5, 2, 3))
    torch._dynamo.reset()
    model = nn.ModuleList([nn.LSTM(3, 4), fastrnn.nn.LSTM(4, 4)])

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in model:
            x = layer(x)[0]
        return x

    x = torch.randn(5, 2, 3)
    y = torch.compile(run, backend="aot_eager")(x)
    torch.testing.assert_close(y, run(x))
    y.sum().backward()  # torch 2.13 fails here where it was made to trace its own LSTM


def test_compiles_whole_when_torchdynamo_was_there_first() -> None:
    code = (
        "import torch._dynamo, fastrnn; layer = torch.compile(fastrnn.nn.GRU(3, 4), fullgraph=True, backend='eager');"
        "assert layer(torch.zeros(5, 2, 3))[0].shape == (5, 2, 4); assert not torch._dynamo.config.allow_rnn"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("cls", [*LAYERS, *CELLS])
def test_compiled_transforms(cls: type[nn.Module]) -> None:
    torch._dynamo.reset()
    ours, theirs = pair(cls)
    parameters = dict(ours.named_parameters())
    xs = torch.stack([example(cls, steps=2) for _ in range(2)])

    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return first(torch.func.functional_call(ours, parameters, (x,))).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))
    found = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(parameters, xs)
    for index, x in enumerate(xs):
        expected = torch.autograd.grad(first(theirs(x)).square().sum(), list(theirs.parameters()))
        torch.testing.assert_close([value[index] for value in found.values()], list(expected))

    def moved(x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda x: first(ours(x)), (x,), (tangent,))[1]

    x, tangent = example(cls, steps=2), example(cls, steps=2)
    found = torch.compile(moved, fullgraph=True, backend="aot_eager")(x, tangent)
    torch.testing.assert_close(found, moved(x, tangent))


def recurrences(program: Any) -> int:
    """How many of our operators a program holds."""
    graphs = [module.graph for module in program.graph_module.modules() if hasattr(module, "graph")]
    return sum("recurrence_forward" in str(node.target) for graph in graphs for node in graph.nodes)


@pytest.mark.parametrize("strict", [False, True], ids=["trace", "dynamo"])
@all_uses
def test_exports(cls: type[nn.Module], options: dict[str, Any], names: tuple[str, ...], strict: bool) -> None:
    module = cls(3, 4, **options).eval()
    steps, batch = torch.export.Dim("steps", min=2), torch.export.Dim("batch", min=2)
    x, given = arguments(cls, names, 5, 3)
    shapes = {
        "input": {0: batch} if is_cell(cls) else {0: steps, 1: batch},
        "hx": {0: batch} if is_cell(cls) else {1: batch},
        "lengths": {0: batch},
        "resets": {0: steps, 1: batch},
    }
    if isinstance(given.get("hx"), tuple):
        shapes["hx"] = (shapes["hx"], shapes["hx"])  # type: ignore[assignment]
    dynamic_shapes = {name: shapes[name] for name in ("input", *given)}
    program = torch.export.export(module, (x,), given, dynamic_shapes=dynamic_shapes, strict=strict)
    if native.load() is not None:  # one operator a layer, however many steps
        assert recurrences(program) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in ((5, 3), (9, 7)):
        x, given = arguments(cls, names, *size)
        assert torch.equal(first(loaded(x, **given)), first(module(x, **given)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # from torch's own code
def test_compiles_ahead_of_time(tmp_path: Path) -> None:
    layer = fastrnn.nn.GRU(3, 4).eval()
    steps, batch = torch.export.Dim("steps", min=2, max=100), torch.export.Dim("batch", min=2, max=100)
    x, given = arguments(fastrnn.nn.GRU, ("lengths",), batch=3)
    shapes = {"input": {0: steps, 1: batch}, "lengths": {0: batch}, "resets": {0: steps, 1: batch}}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), given, dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        compiled = torch._inductor.aoti_load_package(package)
        for size in ((5, 3), (9, 7)):
            x, given = arguments(fastrnn.nn.GRU, ("lengths",), *size)
            torch.testing.assert_close(compiled(x, **given), layer(x, **given), rtol=0, atol=0)


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
