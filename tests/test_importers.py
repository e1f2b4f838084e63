"""from_keras() and from_onnx(): the modules compute what Keras and onnxruntime compute, or say why they cannot."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx.reference
import pytest
import torch
from torch import Tensor

import fastrnn
from tests.accuracy import assert_as_accurate_over

RNN, LSTM, GRU = fastrnn.nn.RNN, fastrnn.nn.LSTM, fastrnn.nn.GRU


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
    return importlib.import_module("keras")


def built(layer: Any, input_size: int = 7) -> Any:
    """With weights that are all random, biases included."""
    layer.build((None, None, input_size))
    layer.set_weights([torch.randn(array.shape).numpy() / 3 for array in layer.get_weights()])
    return layer


def run(module: Any, x: Tensor, initial: Tensor) -> list[Tensor]:
    """The output and the last states, as `initial`: [states, directions, B, H]."""
    y, final = module(x, tuple(initial) if len(initial) == 2 else initial[0])
    return [y, torch.stack(final if len(initial) == 2 else [final])]


KERAS = [
    ("SimpleRNN", {}),
    ("SimpleRNN", {"activation": "relu", "use_bias": False}),
    ("LSTM", {}),
    ("LSTM", {"use_bias": False}),
    ("GRU", {"reset_after": True}),
    ("GRU", {"reset_after": True, "use_bias": False}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"reset_after": False, "use_bias": False}),
]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "bidirectional"])
@pytest.mark.parametrize(("kind", "options"), KERAS, ids=str)
def test_computes_what_the_keras_layer_computes(
    keras: ModuleType, kind: str, options: dict[str, Any], bidirectional: bool
) -> None:
    layer = getattr(keras.layers, kind)(5, return_sequences=True, return_state=True, **options)
    layer = built(keras.layers.Bidirectional(layer) if bidirectional else layer)
    before = torch.get_rng_state()
    module = fastrnn.from_keras(layer)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(module) is {"SimpleRNN": RNN, "LSTM": LSTM, "GRU": GRU}[kind]
    assert all(parameter.requires_grad for parameter in module.parameters())
    directions, states = 2 if bidirectional else 1, 2 if kind == "LSTM" else 1
    draws = []
    for steps, batch in [(6, 3), (1, 1), (13, 4)] * 2:
        x, initial = torch.randn(batch, steps, 7), torch.randn(states, directions, batch, 5)

        with torch.no_grad():
            # Keras has the states of one direction together.
            y, *finals = layer(x, initial_state=[state for each in initial.transpose(0, 1) for state in each])
            final = torch.stack(finals).unflatten(0, (directions, states)).transpose(0, 1)
            draws.append((run(module, x, initial), [y, final], run(module.double(), x.double(), initial.double())))
            module.float()
    assert_as_accurate_over(draws)


def test_recurrent_dropout_of_keras(keras: ModuleType) -> None:
    module = fastrnn.from_keras(built(keras.layers.LSTM(5, recurrent_dropout=0.25)))
    assert module.recurrent_dropout == 0.25 and module.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda layers: layers.Dense(5), "layer must be a SimpleRNN, .* got Dense"),
        (lambda layers: layers.RNN(layers.GRUCell(5)), "layer must be a SimpleRNN, .* got RNN"),
        (
            lambda layers: layers.Bidirectional(layers.GRU(5), backward_layer=layers.LSTM(5, go_backwards=True)),
            "layer must be a SimpleRNN, .* got GRU and LSTM",
        ),
        (lambda layers: layers.GRU(5, activation="relu"), "^activation must be 'tanh', got 'relu'"),
        (lambda layers: layers.SimpleRNN(5, activation="elu"), "^activation must be 'tanh' or 'relu', got 'elu'"),
        (
            lambda layers: layers.LSTM(5, recurrent_activation="hard_sigmoid"),
            "recurrent_activation must be 'sigmoid', got 'hard_sigmoid'",
        ),
        (lambda layers: layers.LSTM(5, dropout=0.5), r"dropout must be 0, got 0\.5"),
        (lambda layers: layers.LSTM(5, go_backwards=True), "go_backwards must be False, got True"),
        (
            lambda layers: layers.Bidirectional(layers.LSTM(5), merge_mode="sum"),
            "merge_mode must be 'concat', got 'sum'",
        ),
        (
            lambda layers: layers.Bidirectional(
                layers.GRU(5), backward_layer=layers.GRU(5, go_backwards=True, reset_after=False)
            ),
            "both directions must have the same options, .*'reset_after': False",
        ),
        (
            lambda layers: layers.Bidirectional(layers.GRU(5), backward_layer=layers.GRU(4, go_backwards=True)),
            r"both directions must have the same weights, .*'weight_ih': \(12, 7\)",
        ),
    ],
)
def test_what_keras_has_and_no_module_here(keras: ModuleType, make: Callable[[Any], Any], message: str) -> None:
    layer = make(keras.layers)
    layer.build((None, 4, 7))
    with pytest.raises(ValueError, match=message):
        fastrnn.from_keras(layer)


def test_a_keras_layer_without_weights(keras: ModuleType) -> None:
    with pytest.raises(ValueError, match="layer must be built, got one without weights"):
        fastrnn.from_keras(keras.layers.LSTM(5))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "module",
    [
        RNN(7, 5, nonlinearity="relu", bias=False),
        RNN(7, 5, bidirectional=True),
        LSTM(7, 5, bidirectional=True, peephole=True),
        LSTM(33, 129),  # torch folds the weights of small nodes alone
        GRU(7, 5, bidirectional=True),
        GRU(7, 5, reset_after=False),
        torch.nn.GRU(33, 65, bidirectional=True),
    ],
    ids=str,
)
def test_exported_and_imported(module: Any, tmp_path: Path) -> None:
    x = torch.randn(6, 3, module.input_size)
    torch.onnx.export(module.eval(), (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    imported = fastrnn.from_onnx(tmp_path / "layer.onnx")
    assert str(imported).replace("fastrnn", "") == str(module) and imported.mode == module.mode
    state = imported.state_dict()
    assert list(state) == list(module.state_dict())
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
    torch.testing.assert_close(imported(x), module(x))


def model_of(
    kind: str = "LSTM",
    constant: bool = True,
    count: int = 1,
    dtype: Any = "float32",
    **attributes: Any,
) -> Any:
    """A model with random nodes of this kind, of two units and three features."""
    helper, gates = onnx.helper, {"RNN": 1, "LSTM": 4, "GRU": 3}[kind]
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    shapes = {"W": (directions, 2 * gates, 3), "R": (directions, 2 * gates, 2), "B": (directions, 4 * gates)}
    arrays = {name: torch.randn(shape, dtype=getattr(torch, dtype)).numpy() for name, shape in shapes.items()}
    weights = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    nodes = [
        helper.make_node(kind, ["x", *shapes], [f"y{index}", f"h{index}"], f"n{index}", hidden_size=2, **attributes)
        for index in range(count)
    ]
    code = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", code, None)]
    if not constant:
        inputs.append(helper.make_tensor_value_info("R", code, shapes["R"]))
        del weights[1]
    outputs = [helper.make_tensor_value_info(f"{name}{index}", code, None) for index in range(count) for name in "yh"]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_computes_what_the_node_computes(kind: str) -> None:
    """Batch first, which onnxruntime has not, and in fp64."""

    activations = {"RNN": ["Tanh"], "LSTM": ["Sigmoid", "tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}[kind]
    model = model_of(kind, dtype="float64", layout=1, activations=activations)
    module, x = fastrnn.from_onnx(model), torch.randn(4, 6, 3, dtype=torch.float64)
    assert module.batch_first and module.weight_hh_l0.dtype == torch.float64
    y, _ = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    torch.testing.assert_close(module(x)[0], torch.from_numpy(y).squeeze(2))


def test_one_node_of_several() -> None:
    model = model_of("GRU", count=2)
    assert isinstance(fastrnn.from_onnx(model, "n1"), GRU)
    for name in (None, "n2"):
        with pytest.raises(ValueError, match=rf"node must name .* are 'n0' \(GRU\), 'n1' \(GRU\); got {name!r}"):
            fastrnn.from_onnx(model, name)
    with pytest.raises(ValueError, match="recurrent nodes, which are none; got None"):
        fastrnn.from_onnx(model_of(count=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "reverse"}, "direction must be 'forward' or 'bidirectional', got 'reverse'"),
        ({"clip": 3.0}, r"clip must not be set, got 3\.0"),
        ({"input_forget": 1}, "input_forget must not be set, got 1"),
        (
            {"activations": ["HardSigmoid", "Tanh", "Tanh"]},
            r"activations must be \['sigmoid', 'tanh', 'tanh'\] per direction, got \['hardsigmoid', 'tanh', 'tanh'\]",
        ),
        ({"kind": "RNN", "direction": "bidirectional", "activations": ["Tanh", "Relu"]}, "activations must be"),
        ({"constant": False}, "the node's weights must be constants, got R among what they depend on"),
    ],
    ids=str,
)
def test_what_onnx_has_and_no_module_here(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastrnn.from_onnx(model_of(**options))


def test_without_the_package_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"from_onnx needs onnx: pip install onnx"):
        fastrnn.from_onnx("layer.onnx")
