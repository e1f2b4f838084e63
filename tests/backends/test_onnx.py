"""Layers and cells in torch.onnx.export: onnxruntime computes what the modules compute."""

import copy
import io
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree

import fastrnn
from tests.accuracy import assert_as_accurate_over

pytestmark = [
    # From torch's own code: _flat_weights that it sets anew, dropout that is exported in training mode, its pytrees.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
]
DYNAMIC = torch.export.Dim.DYNAMIC
RNN, LSTM, GRU = fastrnn.nn.RNN, fastrnn.nn.LSTM, fastrnn.nn.GRU


def export(module: nn.Module, *args: Any, shapes: Any = None, **kwargs: Any) -> Any:
    return torch.onnx.export(module, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]


def nodes(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type in ("RNN", "LSTM", "GRU")]


def run(model: Any, *given: Any) -> list[Tensor]:
    session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else model.SerializeToString())
    names = [each.name for each in session.get_inputs()]
    arrays = [tensor.numpy() for tensor in _pytree.tree_leaves(given) if tensor is not None]
    return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, arrays, strict=True)))]


def assert_reproduced(model: Any, module: nn.Module, draws: list[tuple[Any, ...]], names: list[str]) -> None:
    """Each draw: the values of the arguments with these names."""

    def results(module: nn.Module, draw: tuple[Any, ...]) -> list[Tensor]:
        with torch.no_grad():
            return _pytree.tree_leaves(module(**dict(zip(names, draw, strict=True))))

    def exactly(draw: tuple[Any, ...]) -> list[Tensor]:
        doubled = _pytree.tree_map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, draw)
        return results(copy.deepcopy(module).double(), doubled)

    assert_as_accurate_over([(run(model, *draw), results(module, draw), exactly(draw)) for draw in draws])


LAYERS = [
    (RNN, {}, False),
    (RNN, {"nonlinearity": "relu", "bidirectional": True, "bias": False}, True),
    (LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}, True),
    (LSTM, {"peephole": True, "bidirectional": True}, False),
    (LSTM, {"num_layers": 2, "residual": True, "dropout": 0.3, "bias": False}, True),
    (GRU, {}, True),
    (GRU, {"reset_after": False, "bidirectional": True, "batch_first": True}, True),
    (GRU, {"reset_after": False, "bias": False, "weight_dropout": 0.3, "recurrent_dropout": 0.3}, False),
]


@pytest.mark.parametrize(("cls", "options", "more"), LAYERS, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_node_for_each_layer(cls: Any, options: dict[str, Any], more: bool) -> None:
    """`more`: with initial states and lengths, some of which are zero."""
    module = cls(7, 5, **options).eval()
    directions = 2 if module.bidirectional else 1
    first = module.batch_first

    def arguments(steps: int, batch: int) -> tuple[Any, ...]:
        x = torch.randn(*((batch, steps) if first else (steps, batch)), 7)
        h = torch.randn(module.num_layers * directions, batch, 5)
        lengths = torch.randint(0, steps + 1, (batch,))
        return (x, (h, h.flip(0)) if cls is LSTM else h, lengths) if more else (x,)

    names = ["input", "hx", "lengths"][: 3 if more else 1]
    state = ({1: DYNAMIC}, {1: DYNAMIC}) if cls is LSTM else {1: DYNAMIC}
    shapes = dict(zip(names, ({0: DYNAMIC, 1: DYNAMIC}, state, {0: DYNAMIC})))
    model = export(module, **dict(zip(names, arguments(6, 3))), shapes=shapes)
    assert nodes(model) == [cls.__name__] * module.num_layers
    assert_reproduced(model, module, [arguments(*size) for size in [(6, 3), (1, 1), (13, 4)] * 3], names)


def test_accelerated_models_and_weights_too_large_for_torch_to_fold() -> None:

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.linear = nn.GRU(129, 129, 2, batch_first=True), nn.Linear(129, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.layer(x)[1][-1])

    module = fastrnn.accelerate(Model().eval())
    model = export(module, torch.randn(2, 5, 129))
    assert nodes(model) == ["GRU", "GRU"]
    assert_reproduced(model, module, [(torch.randn(2, 5, 129),) for _ in range(3)], ["x"])


def test_without_a_batch_whatever_the_back_end() -> None:
    module = LSTM(7, 5, backend="cpu").eval()
    model = export(module, torch.randn(6, 7))
    module.backend = "auto"  # for fp64
    assert nodes(model) == ["LSTM"]
    assert_reproduced(model, module, [(torch.randn(6, 7),) for _ in range(5)], ["input"])


WITHOUT_NODE = [
    (LSTM, {"layer_norm": True}, []),
    (LSTM, {"proj_size": 3}, []),
    (LSTM, {"return_cell_states": True}, []),
    (GRU, {"zoneout": 0.2, "bidirectional": True}, ["lengths"]),
    (RNN, {}, ["resets"]),
]


@pytest.mark.parametrize(("cls", "options", "more"), WITHOUT_NODE, ids=str)
def test_step_by_step_where_there_is_no_node(cls: Any, options: dict[str, Any], more: list[str]) -> None:
    module = cls(7, 5, **options).eval()

    def arguments(batch: int) -> tuple[Any, ...]:
        given = {"lengths": torch.randint(0, 3, (batch,)), "resets": torch.rand(2, batch) < 0.4}
        return (torch.randn(2, batch, 7), *(given[name] for name in more))

    names = ["input", *more]
    batch_of = {"input": {1: DYNAMIC}, "lengths": {0: DYNAMIC}, "resets": {1: DYNAMIC}}
    shapes = {name: batch_of[name] for name in names}
    model = export(module, **dict(zip(names, arguments(3))), shapes=shapes)
    assert not nodes(model)
    assert_reproduced(model, module, [arguments(batch) for batch in (3, 1, 8) * 3], names)


def test_step_by_step_under_autocast() -> None:

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = GRU(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)[0].float()

    assert not nodes(export(Model().eval(), torch.randn(3, 2, 7)))


@pytest.mark.parametrize(
    ("module", "states"),
    [
        (fastrnn.nn.RNNCell(7, 5), 1),
        (fastrnn.nn.LSTMCell(7, 5, layer_norm=True), 2),
        (fastrnn.nn.GRUCell(7, 5, reset_after=False, zoneout=0.1), 1),
    ],
    ids=str,
)
def test_cells(module: nn.Module, states: int) -> None:
    module.eval()
    shapes = ({0: DYNAMIC}, {0: DYNAMIC} if states == 1 else ({0: DYNAMIC},) * 2)

    def arguments(batch: int) -> tuple[Any, ...]:
        h = tuple(torch.randn(batch, 5) for _ in range(states))
        return torch.randn(batch, 7), h[0] if states == 1 else h

    model = export(module, *arguments(3), shapes=shapes)
    assert_reproduced(model, module, [arguments(batch) for batch in (3, 1, 8) * 3], ["input", "hx"])


def test_attention_decoder() -> None:
    attention = fastrnn.nn.AdditiveAttention(5, 8, 6)
    module = fastrnn.nn.AttentionDecoder("lstm", 7, 5, attention).eval()
    model = export(module, torch.randn(3, 2, 7), torch.randn(3, 6, 8))
    draws = [(torch.randn(3, 2, 7), torch.randn(3, 6, 8)) for _ in range(5)]
    assert_reproduced(model, module, draws, ["input", "memory"])


class Wrapped(nn.Module):
    """torch's older exporter gives arguments that only have a name by their place to the module that it exports."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Any:
        return self.layer(input)


@pytest.mark.parametrize("module", [LSTM(7, 5, bidirectional=True), GRU(7, 5, reset_after=False)], ids=str)
def test_older_exporter(module: nn.Module) -> None:
    file, wrapped = io.BytesIO(), Wrapped(module).eval()
    torch.onnx.export(wrapped, (torch.randn(4, 3, 7),), file, dynamo=False)
    assert_reproduced(file.getvalue(), wrapped, [(torch.randn(4, 3, 7),) for _ in range(5)], ["input"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            LSTM(7, 5, return_cell_states=True, proj_size=3).eval(),
            "ONNX has no LSTM with return_cell_states, proj_size, so .* steps must not be dynamic",
        ),
        (GRU(7, 5, zoneout=0.1), r"zoneout, .* cannot be exported to ONNX: call model\.eval\(\) first"),
        (GRU(7, 5, recurrent_dropout=0.1), r"recurrent_dropout .* call model\.eval\(\) first"),
        (GRU(7, 5, weight_dropout=0.1), r"weight_dropout .* call model\.eval\(\) first"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_says_why(module: nn.Module, message: str) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=message):
        export(module, torch.randn(4, 3, 7), shapes=({0: DYNAMIC},))


def test_packed_sequences_cannot_be_exported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = GRU(7, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[1]

    with pytest.raises(torch.onnx.OnnxExporterError, match="pass the padded batch and lengths"):
        export(Model().eval(), torch.randn(4, 3, 7), torch.tensor([4, 2, 1]))
