"""from_keras() and from_onnx(): modules with the weights of Keras layers and of nodes of ONNX graphs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import nn
from fastrnn.backends.onnx import GATES, PEEPHOLES

Layer = nn.RNN | nn.LSTM | nn.GRU

_KERAS: dict[str, type[Layer]] = {"SimpleRNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
_ONNX: dict[str, type[Layer]] = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}


def from_keras(layer: Any) -> Layer:
    """The module that computes what a Keras layer computes, with a copy of its weights.

    ``return_sequences``, ``return_state`` and ``stateful`` have no meaning here: forward returns every output and the
    last state, and takes a state as ``hx``. In training ``recurrent_dropout`` drops the same units for all gates, where
    Keras may draw a mask for each.

    Args:
        layer: a built ``SimpleRNN``, ``LSTM``, ``GRU`` (either ``reset_after``) or ``Bidirectional`` of one. Keras
            itself is not imported.

    Returns:
        :class:`fastrnn.nn.RNN`, ``LSTM`` or ``GRU``, batch first.

    Raises:
        ValueError: the layer has no weights yet, or an option that no module here has; with the option's name.
    """
    bidirectional = type(layer).__name__ == "Bidirectional"
    parts = [layer.forward_layer, layer.backward_layer] if bidirectional else [layer]
    kind = type(parts[0]).__name__
    if kind not in _KERAS or type(parts[-1]) is not type(parts[0]):
        found = " and ".join(type(part).__name__ for part in parts)
        raise ValueError(f"layer must be a SimpleRNN, LSTM, GRU or Bidirectional of one, got {found}")
    if bidirectional and layer.merge_mode != "concat":
        raise ValueError(f"merge_mode must be 'concat', got {layer.merge_mode!r}")
    options = [_keras_options(part, backwards=index == 1) for index, part in enumerate(parts)]
    if options[0] != options[-1]:
        raise ValueError(f"both directions must have the same options, got {options[0]} and {options[1]}")
    directions = [_keras_weights(kind, part) for part in parts]
    shapes = [{name: tuple(weight.shape) for name, weight in direction.items()} for direction in directions]
    if shapes[0] != shapes[-1]:
        raise ValueError(f"both directions must have the same weights, got {shapes[0]} and {shapes[1]}")
    return _module(_KERAS[kind], directions, batch_first=True, **options[0])


def _keras_options(layer: Any, backwards: bool) -> dict[str, Any]:
    kind, config = type(layer).__name__, layer.get_config()
    expected: dict[str, tuple[Any, ...]] = {
        "activation": ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",),
        "recurrent_activation": ("sigmoid",),
        "dropout": (0,),
        "go_backwards": (backwards,),
        "time_major": (False,),  # up to Keras 2
    }
    for name, allowed in expected.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {config[name]!r}")
    options = {"recurrent_dropout": config["recurrent_dropout"]}
    if kind == "SimpleRNN":
        options["nonlinearity"] = config["activation"]
    elif kind == "GRU":
        options["reset_after"] = config["reset_after"]
    return options


def _keras_weights(kind: str, layer: Any) -> dict[str, Tensor]:
    weights = [torch.tensor(array) for array in layer.get_weights()]
    if not weights:
        raise ValueError("layer must be built, got one without weights")
    order = {"SimpleRNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}[kind]  # i f c o as torch, and z r h
    found = {"weight_ih": _in_order(weights[0].T, order), "weight_hh": _in_order(weights[1].T, order)}
    if len(weights) == 3:
        bias_ih, bias_hh = weights[2] if weights[2].dim() == 2 else (weights[2], torch.zeros_like(weights[2]))
        found |= {"bias_ih": _in_order(bias_ih, order), "bias_hh": _in_order(bias_hh, order)}
    return found


def from_onnx(model: Any, node: str | None = None) -> Layer:
    """The module that computes what a node RNN, LSTM or GRU of an ONNX model computes, with a copy of its weights.

    The node's further inputs are arguments of the call: ``sequence_lens`` is ``lengths``, initial states are ``hx``.

    Args:
        model: an ``onnx.ModelProto``, or the path of a file.
        node: the node's name; not needed where the model has only one such node.

    Returns:
        :class:`fastrnn.nn.RNN`, ``LSTM`` or ``GRU`` of one layer; time first, or batch first where ``layout`` is 1.

    Raises:
        ImportError: the package onnx is not installed.
        ValueError: there is no such node, its weights depend on the model's inputs, or it has an attribute that no
            module here has; with the attribute's name.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("fastrnn.from_onnx needs onnx: pip install onnx") from error
    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model)
    nodes = [each for each in model.graph.node if each.op_type in _ONNX and each.domain in ("", "ai.onnx")]
    matching = [each for each in nodes if node in (None, each.name)]
    if len(matching) != 1:
        known = ", ".join(f"{each.name!r} ({each.op_type})" for each in nodes) or "none"
        raise ValueError(f"node must name one of the model's recurrent nodes, which are {known}; got {node!r}")
    kind = matching[0].op_type
    options = _onnx_options(kind, {each.name: onnx.helper.get_attribute_value(each) for each in matching[0].attribute})
    names = ("x", "weight_ih", "weight_hh", "bias", "lengths", "h_0", "c_0", "weight_peephole")
    inputs = {name: source for name, source in zip(names, matching[0].input) if source}
    weights = _constants(model, {name: inputs[name] for name in inputs if name == "bias" or "weight" in name})
    if "weight_peephole" in weights:
        options["peephole"] = True
    directions = []
    for index in range(len(weights["weight_ih"])):
        parameters = {name: tensor[index] for name, tensor in weights.items()}
        if "bias" in parameters:
            parameters["bias_ih"], parameters["bias_hh"] = parameters.pop("bias").chunk(2)
        for name, tensor in parameters.items():
            order = PEEPHOLES if name == "weight_peephole" else GATES[kind.lower()]
            parameters[name] = _in_order(tensor, sorted(range(len(order)), key=order.__getitem__))
        directions.append(parameters)
    return _module(_ONNX[kind], directions, **options)


def _onnx_options(kind: str, attributes: dict[str, Any]) -> dict[str, Any]:
    direction = attributes.get("direction", b"forward").decode()
    if direction not in ("forward", "bidirectional"):
        raise ValueError(f"direction must be 'forward' or 'bidirectional', got {direction!r}")
    for name in ("clip", "input_forget"):
        if attributes.get(name):
            raise ValueError(f"{name} must not be set, got {attributes[name]}")
    allowed = {"RNN": (["tanh"], ["relu"]), "LSTM": (["sigmoid", "tanh", "tanh"],), "GRU": (["sigmoid", "tanh"],)}[kind]
    count = 2 if direction == "bidirectional" else 1
    activations = [name.decode().lower() for name in attributes.get("activations", ())] or allowed[0] * count
    if activations not in [each * count for each in allowed]:
        raise ValueError(f"activations must be {' or '.join(map(str, allowed))} per direction, got {activations}")
    options: dict[str, Any] = {"batch_first": bool(attributes.get("layout"))}
    if kind == "RNN":
        options["nonlinearity"] = activations[0]
    elif kind == "GRU":
        options["reset_after"] = bool(attributes.get("linear_before_reset"))
    return options


def _constants(model: Any, names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors that a graph computes from its initializers alone."""
    import onnx.reference

    graph, wanted = model.graph, set(names.values())
    nodes: list[Any] = []
    for node in reversed(graph.node):  # which are in the order of computation
        if wanted.intersection(node.output):
            nodes.insert(0, node)
            wanted.update(node.input)
    initializers = [each for each in graph.initializer if each.name in wanted]
    variable = wanted.intersection(each.name for each in graph.input).difference(each.name for each in initializers)
    if variable:
        raise ValueError(
            f"the node's weights must be constants, got {', '.join(sorted(variable))} among what they depend on"
        )
    outputs = [onnx.helper.make_empty_tensor_value_info(source) for source in names.values()]
    part = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "weights", [], outputs, initializers), opset_imports=model.opset_import
    )
    arrays = onnx.reference.ReferenceEvaluator(part).run(None, {})
    return {name: torch.tensor(array) for name, array in zip(names, arrays, strict=True)}


def _in_order(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The first dimension cut into as many parts as `order` has, and put into that order."""
    parts = tensor.chunk(len(order))
    return torch.cat([parts[index] for index in order])


def _module(cls: type[Layer], directions: list[dict[str, Tensor]], **options: Any) -> Layer:
    """A module of one layer from each direction's parameters, in torch's layout, without the suffix of their names."""
    weight_ih, weight_hh = directions[0]["weight_ih"], directions[0]["weight_hh"]
    with torch.device("meta"):  # draws nothing from the random number generator
        module = cls(
            weight_ih.shape[1],
            weight_hh.shape[1],
            bias="bias_ih" in directions[0],
            bidirectional=len(directions) == 2,
            dtype=weight_ih.dtype,
            **options,
        )
    state: dict[str, Tensor] = {}
    for suffix, parameters in zip(("l0", "l0_reverse"), directions):
        state |= {f"{name}_{suffix}": value.contiguous() for name, value in parameters.items()}
    module.load_state_dict(state, assign=True)
    return module
