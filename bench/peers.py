"""fastrnn and the libraries that it is compared with: each builds the same layer from the same weights."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.registry import DTYPES, GATES, Case

THREADS = os.cpu_count() or 1
Results = dict[str, Tensor]


class Unsupported(Exception):
    """Why a peer does not take part in a case."""


class Contender(NamedTuple):
    """One peer ready to be timed: `named` turns what `call` returned into tensors, so that what is timed is checked."""

    call: Callable[[], Any]
    named: Callable[[Any], Results]


class Problem:
    """One case's layer (torch.nn's, in the case's dtype), its input, and the gradient of its output."""

    def __init__(self, case: Case) -> None:
        batch, steps, input_size, hidden_size = case.size
        dtype = DTYPES[case.dtype]
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.case = case
        self.layer = make_layer(nn, case).to(dtype)
        leading = (batch,) if case.mode == "step" else (steps, batch)
        self.x = torch.randn(*leading, input_size, generator=generator).to(dtype)
        # A single step continues a sequence, so its state is not zero; a sequence starts from no state.
        self.state: Any = None
        if case.mode == "step":
            h, c = (0.5 * torch.randn(batch, hidden_size, generator=generator).to(dtype) for _ in range(2))
            self.state = (h, c) if case.cell == "lstm" else h
        # Random, as a gradient of all ones could be special-cased.
        self.grad_y = torch.randn(*leading, hidden_size, generator=generator).to(dtype)

    def reference(self) -> Results:
        """What torch.nn computes in fp64 from the same, rounded, weights and input."""
        double = make_layer(nn, self.case).double()
        double.load_state_dict(self.layer.state_dict())
        state = _map(self.state, Tensor.double)
        contender = torch_contender(double, self.case.mode, self.x.double(), state, self.grad_y.double())
        return contender.named(contender.call())


def make_layer(library: Any, case: Case) -> nn.Module:
    """The layer, or for mode "step" the cell, out of torch.nn or a module with the same classes."""
    name = case.cell.upper() + ("Cell" if case.mode == "step" else "")
    return getattr(library, name)(case.size.input_size, case.size.hidden_size)


def _map(state: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if state is None:
        return None
    return tuple(f(s) for s in state) if isinstance(state, tuple) else f(state)


def _flat(state: Any) -> dict[str, Tensor]:
    """(h, c) or h as named tensors without the leading dimension of layers."""
    tensors = state if isinstance(state, tuple) else (state,)
    return {name: t.detach() for name, t in zip(("h_n", "c_n"), tensors, strict=False)}


def torch_contender(layer: nn.Module, mode: str, x: Tensor, state: Any, grad_y: Tensor) -> Contender:
    """A contender of any module that is called as torch.nn's; gradients are on exactly in mode "training"."""
    layer.train(mode == "training")
    if mode == "step":
        return Contender(lambda: layer(x, state), _flat)
    if mode == "forward":
        return Contender(lambda: layer(x), lambda out: {"y": out[0]} | _flat(_map(out[1], lambda s: s[0])))

    x = x.clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    inputs = [x, *parameters.values()]

    def train() -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        # As after an optimizer's step, so that nothing derived from the weights may be kept from call to call.
        torch.autograd.graph.increment_version(parameters.values())
        y, state = layer(x)
        return y, state, torch.autograd.grad(y, inputs, grad_y)

    def named(out: tuple[Tensor, Any, tuple[Tensor, ...]]) -> Results:
        y, state, grads = out
        gradients = {f"grad {name}": grad for name, grad in zip(["x", *parameters], grads, strict=True)}
        return {"y": y.detach()} | _flat(_map(state, lambda s: s[0])) | gradients

    return Contender(train, named)


def _torch_like(library: Any, problem: Problem) -> Contender:
    layer = make_layer(library, problem.case).to(problem.x.dtype)
    layer.load_state_dict(problem.layer.state_dict())
    return torch_contender(layer, problem.case.mode, problem.x, problem.state, problem.grad_y)


def fastrnn(problem: Problem) -> Contender:
    import fastrnn.nn

    return _torch_like(fastrnn.nn, problem)


def torch_nn(problem: Problem) -> Contender:
    return _torch_like(nn, problem)


class _Loop(nn.Module):
    """A recurrent layer written as a Python loop, as users write the variants that torch.nn does not have."""

    def __init__(self, layer: nn.Module, cell: str, compiled: bool) -> None:
        super().__init__()
        self.layer = layer
        step = {"rnn": self._rnn, "lstm": self._lstm, "gru": self._gru}[cell]
        self.has_cell_state = cell == "lstm"
        self.step = torch.compile(step, fullgraph=True) if compiled else step

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.named_parameters(*args, **kwargs)

    def _rnn(self, gates_x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(gates_x + nn.functional.linear(h, weight, bias)), c

    def _lstm(self, gates_x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (gates_x + nn.functional.linear(h, weight, bias)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def _gru(self, gates_x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x_r, x_z, x_n = gates_x.chunk(3, -1)
        h_r, h_z, h_n = nn.functional.linear(h, weight, bias).chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return n + z * (h - n), c

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        layer: Any = self.layer
        gates_x = nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
        h = c = x.new_zeros(x.shape[1], layer.hidden_size)
        outputs = []
        for step_x in gates_x.unbind(0):
            h, c = self.step(step_x, h, c, layer.weight_hh_l0, layer.bias_hh_l0)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None]) if self.has_cell_state else h[None]


def _loop(problem: Problem, compiled: bool) -> Contender:
    if problem.case.mode == "step":
        raise Unsupported("a loop over time has no one-step form")
    layer = make_layer(nn, problem.case).to(problem.x.dtype)
    layer.load_state_dict(problem.layer.state_dict())
    loop = _Loop(layer, problem.case.cell, compiled)
    return torch_contender(loop, problem.case.mode, problem.x, None, problem.grad_y)


def loop(problem: Problem) -> Contender:
    return _loop(problem, compiled=False)


def compiled_loop(problem: Problem) -> Contender:
    """The step under torch.compile, called once per time step: compiling the whole loop takes minutes at T = 100."""
    return _loop(problem, compiled=True)


def _onnx_model(problem: Problem) -> bytes:
    """The layer as a single ONNX node. Gate order: LSTM i,o,f,g for torch's i,f,g,o; GRU z,r,n for torch's r,z,n."""
    from onnx import TensorProto, checker, helper, numpy_helper

    case = problem.case
    batch, steps, input_size, hidden_size = case.size
    order = {"rnn": [0], "lstm": [0, 3, 1, 2], "gru": [1, 0, 2]}[case.cell]
    weights = {name: value.detach().float() for name, value in problem.layer.named_parameters()}
    regate = lambda w: torch.cat([w.chunk(GATES[case.cell])[gate] for gate in order])  # noqa: E731
    bias = torch.cat([regate(weights["bias_ih_l0"]), regate(weights["bias_hh_l0"])])
    initializers = [
        numpy_helper.from_array(value[None].numpy(), name)
        for name, value in (
            ("W", regate(weights["weight_ih_l0"])),
            ("R", regate(weights["weight_hh_l0"])),
            ("B", bias),
        )
    ]
    outputs = {"Y": [steps, 1, batch, hidden_size], "Y_h": [1, batch, hidden_size]}
    if case.cell == "lstm":
        outputs["Y_c"] = [1, batch, hidden_size]
    attributes: dict[str, Any] = {"hidden_size": hidden_size}
    if case.cell == "gru":
        attributes["linear_before_reset"] = 1
    node = helper.make_node(case.cell.upper(), ["X", "W", "R", "B"], list(outputs), **attributes)
    graph = helper.make_graph(
        [node],
        case.cell,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, batch, input_size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    return model.SerializeToString()


def _onnx_named(out: Any) -> Results:
    y, *state = (torch.from_numpy(value).clone() for value in out)
    return {"y": y[:, 0]} | {name: s[0] for name, s in zip(("h_n", "c_n"), state, strict=False)}


def _forward_only(problem: Problem) -> None:
    if problem.case.mode != "forward":
        raise Unsupported("runs inference of whole sequences only")


def _installed(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unsupported(f"not installed: {', '.join(missing)}")


def onnxruntime(problem: Problem) -> Contender:
    _forward_only(problem)
    _installed("onnx", "onnxruntime")
    if problem.case.dtype != "fp32":
        raise Unsupported("its CPU provider has fp32 RNN, LSTM and GRU only")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(_onnx_model(problem), options, providers=["CPUExecutionProvider"])
    # Bound once: run() would look up and copy the input on every call.
    binding = session.io_binding()
    binding.bind_cpu_input("X", problem.x.numpy())
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return Contender(
        lambda: session.run_with_iobinding(binding),
        lambda _: _onnx_named(binding.copy_outputs_to_cpu()),
    )


def openvino(problem: Problem) -> Contender:
    _forward_only(problem)
    _installed("onnx", "openvino")
    import openvino as ov

    core = ov.Core()
    config = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}[problem.case.dtype],
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(_onnx_model(problem)), "CPU", config)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(problem.x.float().numpy(), shared_memory=True))
    return Contender(
        lambda: request.infer(share_outputs=True),
        lambda out: _onnx_named([out[i] for i in range(len(compiled.outputs))]),
    )


def jax(problem: Problem) -> Contender:
    """jax.lax.scan under jit, the input projection outside the loop; XLA takes its threads from the CPUs it may use."""
    if problem.case.mode == "step":
        raise Unsupported("has no cell of its own")
    _installed("jax")
    import jax
    import jax.numpy as jnp
    import numpy as np

    cell, hidden_size = problem.case.cell, problem.case.size.hidden_size
    array = lambda t: jnp.asarray(t.detach().numpy())  # noqa: E731
    names = [name for name, _ in problem.layer.named_parameters()]
    weights = [array(value) for _, value in problem.layer.named_parameters()]
    x, grad_y = array(problem.x), array(problem.grad_y)

    def layer(x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
        def step(carry: Any, gates_x: Any) -> Any:
            h, c = carry
            gates_h = h @ w_hh.T + b_hh
            if cell == "gru":
                (x_r, x_z, x_n), (h_r, h_z, h_n) = (jnp.split(gates, 3, -1) for gates in (gates_x, gates_h))
                z = jax.nn.sigmoid(x_z + h_z)
                n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
                h = (1 - z) * n + z * h
            elif cell == "lstm":
                i, f, g, o = jnp.split(gates_x + gates_h, 4, -1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
            else:
                h = jnp.tanh(gates_x + gates_h)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], hidden_size), x.dtype)
        state, y = jax.lax.scan(step, (zeros, zeros), x @ w_ih.T + b_ih)
        return y, state

    def train(*inputs: Any) -> Any:
        y, backward, state = jax.vjp(layer, *inputs, has_aux=True)
        return y, state, backward(grad_y)

    compiled = jax.jit(train if problem.case.mode == "training" else layer)

    def named(out: Any) -> Results:
        y, (h, c), *grads = out
        tensors = {"y": y, "h_n": h} | ({"c_n": c} if cell == "lstm" else {})
        if grads:
            tensors |= {f"grad {name}": grad for name, grad in zip(["x", *names], grads[0], strict=True)}
        return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}

    return Contender(lambda: jax.block_until_ready(compiled(x, *weights)), named)


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "fastrnn": fastrnn,
    "torch": torch_nn,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "jax": jax,
    "loop": loop,
    "compiled_loop": compiled_loop,
}
# The loops take ten times as long as everything else together, and plain cells have torch.nn to compare with.
DEFAULT_PEERS = [name for name in PEERS if name not in ("loop", "compiled_loop")]


def chosen_peers() -> list[str]:
    """The peers named by FASTRNN_BENCH_PEERS (fastrnn and torch always), or all but the Python loops.

    Raises ValueError where that variable names an unknown peer.
    """
    chosen = os.environ.get("FASTRNN_BENCH_PEERS")
    if chosen is None:
        return DEFAULT_PEERS
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"FASTRNN_BENCH_PEERS must name peers out of {', '.join(PEERS)}, got {name!r}")
    return [name for name in PEERS if name in ("fastrnn", "torch", *names)]
