"""fastrnn and the libraries that it is compared with: each builds the same layer from the same weights."""

from __future__ import annotations

import copy
import importlib.util
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench.registry import DTYPES, GATES, VARIANTS, Case, SizedCase
from fastrnn import reference
from fastrnn.nn.options import draw_seed
from fastrnn.ops.dropout import dropout

THREADS = os.cpu_count() or 1
Results = dict[str, Tensor]
# Where the random numbers of a checked call start from: options that draw then draw the same in every peer.
SEED = 1


class Unsupported(Exception):
    """Why a peer does not take part in a case."""


class Contender(NamedTuple):
    """One peer ready to be timed: `named` turns what `call` returned into tensors, so that what is timed is checked."""

    call: Callable[[], Any]
    named: Callable[[Any], Results]
    count: int = 1  # how often `call` computes the case

    def checked(self) -> Results:
        """The results of one call whose random numbers start from SEED."""
        torch.manual_seed(SEED)
        return self.named(self.call())


class Problem:
    """One case's layer, its input and other arguments, and the gradient of its output, in the case's dtype."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        batch, steps, input_size, hidden_size = case.size
        self.case = case
        self.device = device
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(self.dtype)

        torch.manual_seed(0)
        with torch.device(device):
            self.layer = make_layer(nn if case.variant is None else _fastrnn(), case)
        leading = (batch,) if case.mode == "step" else (steps, batch)
        self.x: Any = randn(*leading, input_size)
        # A single step continues a sequence, so its state is not zero; a sequence starts from no state.
        self.state: Any = None
        if case.mode == "step":
            h, c = (0.5 * randn(batch, hidden_size) for _ in range(2))
            self.state = (h, c) if case.cell == "lstm" else h
        # Random, as a gradient of all ones could be special-cased.
        self.grad_y = randn(*leading, hidden_size)

        # With gains of 1, where they start, a random LSTM is chaotic: after 100 steps fp32 is 3e-4 away from fp64,
        # 500 times as far as without layer norm. Cooijmans et al. 2016 (arXiv 1603.09025) start from 0.1.
        for name, parameter in self.layer.named_parameters():
            if name.startswith("layer_norm"):
                parameter.data.normal_(0.1 if name.endswith("weight") else 0.0, 0.03, generator=generator)
        self.layer.to(self.dtype)
        self.arguments: dict[str, Tensor] = {}
        if case.given in ("lengths", "full_lengths"):
            self.arguments["lengths"] = case.lengths.to(device)
        elif case.given == "resets":
            self.arguments["resets"] = torch.rand(steps, batch, generator=generator, device=device) < 0.02
        elif case.given == "packed":
            self.x = pack_padded_sequence(self.x, case.lengths, enforce_sorted=False)
            self.grad_y = pack_padded_sequence(self.grad_y, case.lengths, enforce_sorted=False).data

    def reference(self) -> Results:
        """The standard in fp64, from the same, rounded, weights and input."""
        return self.standard(torch.float64).checked()

    def standard(self, dtype: torch.dtype) -> Contender:
        """What torch's own operators compute: torch.nn, or for a variant fastrnn's reference back end."""
        if self.case.variant is None:
            return _torch_like(nn, self, dtype)
        return _torch_like(_fastrnn(), self, dtype, backend="reference")

    def zoneout_masks(self) -> Tensor:
        """Which units of h, and of c, keep their value when fastrnn is called after manual_seed(SEED): [2, T, B, H]."""
        batch, steps, _, hidden_size = self.case.size
        torch.manual_seed(SEED)
        seed = int(torch.randint(2**63 - 1, ()))
        probability = VARIANTS["zoneout"].options["zoneout"]
        masks = [
            [reference.zoneout_mask(probability, seed, state, t, batch, hidden_size) for t in range(steps)]
            for state in (0, 1)
        ]
        return torch.stack([torch.stack(mask) for mask in masks])


def _fastrnn() -> Any:
    import fastrnn.nn

    return fastrnn.nn


def make_layer(library: Any, case: Case, **options: Any) -> nn.Module:
    """The layer, or for mode "step" the cell, out of torch.nn or a module with the same classes."""
    name = case.cell.upper() + ("Cell" if case.mode == "step" else "")
    options = {**options, **(VARIANTS[case.variant].options if case.variant else {})}
    return getattr(library, name)(case.size.input_size, case.size.hidden_size, **options)


def _map(state: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if state is None:
        return None
    return tuple(f(s) for s in state) if isinstance(state, tuple) else f(state)


def _flat(state: Any) -> dict[str, Tensor]:
    """(h, c) or h as named tensors without the leading dimension of layers."""
    tensors = state if isinstance(state, tuple) else (state,)
    return {name: t.detach() for name, t in zip(("h_n", "c_n"), tensors, strict=False)}


def _data(sequence: Any) -> Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def _layer_results(y: Any, state: Any) -> Results:
    return {"y": _data(y).detach()} | _flat(_map(state, lambda s: s[0]))


def torch_contender(
    layer: nn.Module, mode: str, x: Any, state: Any, grad_y: Tensor, arguments: dict[str, Tensor]
) -> Contender:
    """A contender of any module that is called as torch.nn's; gradients are on exactly in mode "training"."""
    layer.train(mode == "training")
    if mode == "step":
        return Contender(lambda: layer(x, state), _flat)
    if mode == "forward":
        return Contender(lambda: layer(x, **arguments), lambda out: _layer_results(*out))

    data = _data(x).clone().requires_grad_()
    x = x._replace(data=data) if isinstance(x, PackedSequence) else data
    parameters = dict(layer.named_parameters())
    inputs = [data, *parameters.values()]

    def train() -> tuple[Any, Any, tuple[Tensor, ...]]:
        # As after an optimizer's step, so that nothing derived from the weights may be kept from call to call.
        torch.autograd.graph.increment_version(parameters.values())
        y, state = layer(x, **arguments)
        return y, state, torch.autograd.grad(_data(y), inputs, grad_y)

    def named(out: tuple[Any, Any, tuple[Tensor, ...]]) -> Results:
        y, state, grads = out
        gradients = {f"grad {name}": grad for name, grad in zip(["x", *parameters], grads, strict=True)}
        return _layer_results(y, state) | gradients

    return Contender(train, named)


def layer_like(library: Any, problem: Problem, **options: Any) -> nn.Module:
    """The problem's layer out of the library."""
    with torch.device(problem.device):
        layer = make_layer(library, problem.case, **options)
    layer.load_state_dict(problem.layer.state_dict())
    return layer


def _torch_like(library: Any, problem: Problem, dtype: torch.dtype | None = None, **options: Any) -> Contender:
    return contender_of(layer_like(library, problem, **options), problem, dtype)


def contender_of(layer: nn.Module, problem: Problem, dtype: torch.dtype | None = None) -> Contender:
    dtype = dtype or problem.dtype
    state = _map(problem.state, lambda s: s.to(dtype))
    x, grad_y = problem.x.to(dtype), problem.grad_y.to(dtype)
    return torch_contender(layer.to(dtype), problem.case.mode, x, state, grad_y, problem.arguments)


def fastrnn(problem: Problem, backend: str = "auto") -> Contender:
    return _torch_like(_fastrnn(), problem, backend=backend)


class Around(nn.Module):
    """A module around a layer, whose parameters it shows under the layer's names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.named_parameters(*args, **kwargs)


class _Packing(Around):
    """torch.nn's way with lengths, which it wants on the CPU: pack, run, pad."""

    def __init__(self, layer: nn.Module, lengths: Tensor) -> None:
        super().__init__(layer)
        self.lengths = lengths

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        y, state = self.layer(pack_padded_sequence(x, self.lengths, enforce_sorted=False))
        return pad_packed_sequence(y, total_length=len(x))[0], state


def torch_nn(problem: Problem) -> Contender:
    case = problem.case
    if case.variant and case.given not in ("lengths", "full_lengths", "packed"):
        raise Unsupported(f"has no {case.variant}")
    if "lengths" in problem.arguments:
        return contender_of(_Packing(layer_like(nn, problem), case.lengths), problem)
    return _torch_like(nn, problem)


class _Loop(Around):
    """A recurrent layer written as a Python loop, as users write the variants that torch.nn does not have."""

    def __init__(self, layer: nn.Module, case: Case, compiled: bool, zoneout_masks: Tensor | None) -> None:
        super().__init__(layer)
        self.cell = case.cell
        self.options = dict(VARIANTS[case.variant].options) if case.variant else {}
        self.zoneout_masks = zoneout_masks  # [2, T, B, H]
        self.step = torch.compile(self._step, fullgraph=True) if compiled else self._step

    def _affine(self, of: str) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of a layer norm."""
        if not self.options.get("layer_norm") or not hasattr(self.layer, f"layer_norm_{of}_l0_weight"):
            return None
        return getattr(self.layer, f"layer_norm_{of}_l0_weight"), getattr(self.layer, f"layer_norm_{of}_l0_bias")

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """W x + b, or LN(W x) + b: the LSTM's gates as one vector, the GRU's r and z as one, its n as another."""
        if norm is None:
            return nn.functional.linear(x, weight, bias)
        size = len(weight) // GATES[self.cell]
        groups = [2 * size, size] if self.cell == "gru" else [len(weight)]
        split = (tensor.split(groups, -1) for tensor in (nn.functional.linear(x, weight), *norm))
        parts = [nn.functional.layer_norm(part, part.shape[-1:], w, b) for part, w, b in zip(*split, strict=True)]
        return (torch.cat(parts, -1) if len(parts) > 1 else parts[0]) + bias

    def _step(
        self,
        x: Tensor,  # [B, G*H], the pre-activations
        h: Tensor,
        c: Tensor | None,  # of the LSTM
        weights: dict[str, Any],  # the same at every step
        now: dict[str, Tensor],  # what the options need of this step
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, h and c of one time step."""
        if "kept" in now:
            h = h * now["kept"]
            c = None if c is None else c * now["kept"]
        masked = h * weights["mask"] if "mask" in weights else h
        weight, bias = weights["weight_hh"], weights["bias_hh"]
        c_new: Any = None
        if self.options.get("reset_after", True):
            product = self._linear(masked, weight, bias, weights["norm_hh"])
            if c is not None:
                i, f, g, o = (x + product).chunk(4, -1)
                if "peephole" in weights:
                    p_i, p_f, p_o = weights["peephole"].chunk(3)
                    i, f = i + p_i * c, f + p_f * c
                c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                if "peephole" in weights:
                    o = o + p_o * c_new
                norm = weights["norm_c"]
                normed = c_new if norm is None else nn.functional.layer_norm(c_new, c.shape[-1:], *norm)
                h_new = torch.sigmoid(o) * torch.tanh(normed)
            elif self.cell == "gru":
                x_r, x_z, x_n = x.chunk(3, -1)
                h_r, h_z, h_n = product.chunk(3, -1)
                z = torch.sigmoid(x_z + h_z)
                n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
                h_new = n + z * (h - n)
            else:
                h_new = torch.tanh(x + product)
        else:
            sizes = [2 * h.shape[-1], h.shape[-1]]
            (x_rz, x_n), (w_rz, w_n), (b_rz, b_n) = x.split(sizes, -1), weight.split(sizes), bias.split(sizes)
            r, z = torch.sigmoid(x_rz + nn.functional.linear(h, w_rz, b_rz)).chunk(2, -1)
            n = torch.tanh(x_n + nn.functional.linear(r * h, w_n, b_n))
            h_new = n + z * (h - n)

        if "zoneout_h" in now:
            h_new = torch.where(now["zoneout_h"], h, h_new)
            c_new = None if c is None else torch.where(now["zoneout_c"], c, c_new)
        elif "zoneout" in self.options:
            p = self.options["zoneout"]
            h_new = p * h + (1 - p) * h_new
            c_new = None if c is None else p * c + (1 - p) * c_new
        if "active" in now:
            y = torch.where(now["active"], h_new, 0)
            c_new = None if c is None else torch.where(now["active"], c_new, c)
            return y, torch.where(now["active"], h_new, h), c_new
        return h_new, h_new, c_new

    def forward(self, x: Any, lengths: Tensor | None = None, resets: Tensor | None = None) -> tuple[Any, Any]:
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)
            y, state = self.forward(padded, lengths)
            return pack_padded_sequence(y, lengths, enforce_sorted=False), state
        layer: Any = self.layer
        steps, batch, _ = x.shape
        h = x.new_zeros(batch, layer.hidden_size)
        c = torch.zeros_like(h) if self.cell == "lstm" else None
        weights = {
            "weight_hh": layer.weight_hh_l0,
            "bias_hh": layer.bias_hh_l0,
            "norm_hh": self._affine("hh"),
            "norm_c": self._affine("c"),
        }
        if "peephole" in self.options:
            weights["peephole"] = layer.weight_peephole_l0
        of_steps: dict[str, Tensor] = {}
        # The masks are the layer's own, so that results can be compared; torch.dropout takes 16 ms for this weight_hh.
        if self.training and "weight_dropout" in self.options:
            weights["weight_hh"] = dropout(layer.weight_hh_l0, self.options["weight_dropout"], draw_seed())
        if self.training and "recurrent_dropout" in self.options:
            weights["mask"] = dropout(torch.ones_like(h), self.options["recurrent_dropout"], draw_seed())
        if self.training and self.zoneout_masks is not None:
            of_steps["zoneout_h"], of_steps["zoneout_c"] = self.zoneout_masks
        if lengths is not None:
            of_steps["active"] = (torch.arange(steps, device=lengths.device)[:, None] < lengths)[..., None]
        if resets is not None:
            of_steps["kept"] = (~resets)[..., None].to(x.dtype)

        gates_x = self._linear(x, layer.weight_ih_l0, layer.bias_ih_l0, self._affine("ih"))
        outputs = []
        for t, step_x in enumerate(gates_x.unbind(0)):
            now = {name: values[t] for name, values in of_steps.items()}
            y, h, c = self.step(step_x, h, c, weights, now)
            outputs.append(y)
        return torch.stack(outputs), h[None] if c is None else (h[None], c[None])


def _loop(problem: Problem, compiled: bool) -> Contender:
    case = problem.case
    if case.mode == "step":
        raise Unsupported("a loop over time has no one-step form")
    masks = problem.zoneout_masks() if case.variant == "zoneout" else None
    return contender_of(_Loop(copy.deepcopy(problem.layer), case, compiled, masks), problem)


def loop(problem: Problem) -> Contender:
    return _loop(problem, compiled=False)


def compiled_loop(problem: Problem, seconds: float | None = None) -> Contender:
    """The step under torch.compile, called once per time step: compiling the whole loop takes minutes at T = 100."""
    if seconds is None:
        seconds = float(os.environ.get("FASTRNN_BENCH_COMPILE_SECONDS", "60"))
    torch.compiler.reset()  # All cases share one step function, and torch compiles a function for eight uses at most.
    contender = _loop(problem, compiled=True)
    _compile(contender, seconds)
    return contender


def _compile(contender: Contender, seconds: float) -> None:
    """The first call; raises Unsupported where that fails or takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        contender.call()
    except Exception as error:  # torch wraps what stops its compiler, TimeoutError too
        late = time.monotonic() - started >= seconds
        reason = f"takes more than {seconds:g} s" if late else f"failed: {type(error).__name__}"
        raise Unsupported(f"torch.compile {reason}") from error
    finally:
        # pytest-timeout has its own limit on the same alarm.
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.001) if left else 0)
        signal.signal(signal.SIGALRM, handler)


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
        attributes["linear_before_reset"] = int(case.variant != "reset_before")
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
    if problem.case.variant not in (None, "reset_before"):
        raise Unsupported(f"has no {problem.case.variant}")


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
    precision = {"fp32": "f32", "bf16": "bf16"}[problem.case.dtype]
    config = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(_onnx_model(problem)), "CPU", config)
    if compiled.get_property("INFERENCE_PRECISION_HINT").to_string() != precision:
        raise Unsupported(f"has no {problem.case.dtype} on this CPU")
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(problem.x.float().numpy()))  # A copy: memory that it shares it keeps no hold of.
    return Contender(
        lambda: request.infer(share_outputs=True),
        lambda out: _onnx_named([out[i] for i in range(len(compiled.outputs))]),
    )


def jax(problem: Problem) -> Contender:
    """jax.lax.scan under jit, the input projection outside the loop; XLA takes its threads from the CPUs it may use."""
    if problem.case.mode == "step":
        raise Unsupported("has no cell of its own")
    if problem.case.variant or problem.case.dtype != "fp32":
        raise Unsupported("is compared with plain fp32 layers only")
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
DEFAULT_VARIANT_PEERS = [name for name in PEERS if name != "compiled_loop"]


def chosen_peers(case: Case) -> list[str]:
    """The peers named by FASTRNN_BENCH_PEERS (fastrnn and torch always); by default all, but for the Python loops of
    plain cells and the compiled loops, and torch alone where costs are drawn against sizes.

    Raises ValueError where that variable names an unknown peer.
    """
    chosen = os.environ.get("FASTRNN_BENCH_PEERS")
    if chosen is None and isinstance(case, SizedCase):
        return ["fastrnn", "torch"]
    if chosen is None:
        return DEFAULT_PEERS if case.variant is None else DEFAULT_VARIANT_PEERS
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"FASTRNN_BENCH_PEERS must name peers out of {', '.join(PEERS)}, got {name!r}")
    return [name for name in PEERS if name in ("fastrnn", "torch", *names)]
