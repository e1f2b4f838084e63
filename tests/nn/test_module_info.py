"""torch's own samples and error samples of its recurrent modules, run with ours."""

import copy
import functools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch.utils import _pytree

import fastrnn

INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls.__name__ in fastrnn.nn.__all__ and info.module_cls.__module__ == "torch.nn.modules.rnn"
}
assert len(INFOS) == 6

modules = pytest.mark.parametrize("name", INFOS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(info: ModuleInfo, dtype: torch.dtype, training: bool) -> Iterator[tuple[ModuleInput, Any, Any]]:
    """Each sample with our module and torch's, of equal parameters."""
    arguments: dict[str, Any] = {} if "Cell" in info.name or "LSTM" in info.name else {"with_packed_sequence": True}
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training, **arguments
    ):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        ours = getattr(fastrnn.nn, info.module_cls.__name__)(*args, **kwargs).to(dtype).train(training)
        torchs = info.module_cls(*args, **kwargs).to(dtype).train(training)
        torchs.load_state_dict(ours.state_dict())
        yield sample, ours, torchs


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def outputs_and_gradients(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], ...]:
    outputs = tensors(module(*args, **kwargs))
    wanted = [*tensors((args, kwargs)), *module.parameters()]
    gradients = torch.autograd.grad(sum((o * o).sum() for o in outputs), wanted)
    return outputs, list(gradients)


@modules
def test_samples_are_complete(name: str) -> None:
    counts = {"RNNCell": 3, "LSTMCell": 2, "GRUCell": 2, "RNN": 64, "LSTM": 32, "GRU": 32}
    assert len(list(samples(INFOS[name], torch.float32, True))) == counts[name]


@modules
@dtypes
@modes
def test_forward_and_gradients(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample, ours, torchs in samples(INFOS[name], dtype, training):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        # The tolerance of torch's own TestModule: inputs in [-9, 9] make single elements ill-conditioned, so that their
        # errors are no measure of accuracy, which test_against_torch.py takes.
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(
            outputs_and_gradients(ours, args, kwargs), outputs_and_gradients(torchs, args, kwargs), **tolerance
        )


@modules
@dtypes
@modes
def test_against_the_samples_reference(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample, ours, _ in samples(INFOS[name], dtype, training):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        if sample.reference_fn is not None and isinstance(args[0], torch.Tensor):
            args, kwargs = _pytree.tree_map(torch.Tensor.detach, (args, kwargs))
            torch.testing.assert_close(ours(*args, **kwargs), sample.reference_fn(ours, *args, **kwargs))


@modules
@dtypes
@modes
def test_non_contiguous_tensors(name: str, dtype: torch.dtype, training: bool) -> None:
    def spread(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.numel() < 2 or not leaf.is_floating_point():
            return leaf
        spaced = leaf.detach().new_empty(*leaf.shape, 2)[..., 0].copy_(leaf.detach()).requires_grad_(leaf.requires_grad)
        assert not spaced.is_contiguous()
        return spaced

    for sample, ours, _ in samples(INFOS[name], dtype, training):
        plain = sample.forward_input.args, sample.forward_input.kwargs
        spaced = _pytree.tree_map(spread, plain)
        torch.testing.assert_close(outputs_and_gradients(ours, *spaced), outputs_and_gradients(ours, *plain))


def _called_with(
    ours: torch.nn.Module, leaves: list[Any], spec: Any, places: list[int], names: list[str], *inputs: torch.Tensor
) -> Any:
    """The module's outputs as a function of the tensors in its arguments at `places` and of the parameters `names`."""
    given = list(leaves)
    for place, value in zip(places, inputs):
        given[place] = value
    args, kwargs = _pytree.tree_unflatten(given, spec)
    weights = dict(zip(names, inputs[len(places) :]))
    return tuple(tensors(torch.func.functional_call(ours, weights, args, kwargs)))


@modules
@pytest.mark.parametrize(
    ("backend", "training"),
    [("auto", True), ("auto", False), ("reference", True)],
    ids=["auto-train", "auto-eval", "reference-train"],
)
def test_gradcheck_and_gradgradcheck(name: str, backend: str, training: bool) -> None:
    # The reference takes seconds per sample of a layer: every eleventh has each argument at each value.
    chosen = list(samples(INFOS[name], torch.float64, training))[:: 11 if backend == "reference" else 1]
    for sample, ours, _ in chosen:
        ours.backend = backend
        leaves, spec = _pytree.tree_flatten((sample.forward_input.args, sample.forward_input.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        names = [name for name, _ in ours.named_parameters()]

        function = functools.partial(_called_with, ours, leaves, spec, places, names)
        inputs = (*(leaves[i] for i in places), *(p.detach().clone().requires_grad_() for p in ours.parameters()))
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@modules
@dtypes
def test_factory_arguments(name: str, dtype: torch.dtype) -> None:
    for sample in INFOS[name].module_inputs_func(
        INFOS[name], device="cpu", dtype=dtype, requires_grad=False, training=True
    ):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        for device in ("cpu", "meta"):
            ours = getattr(fastrnn.nn, name)(*args, **kwargs, device=device, dtype=dtype)
            for parameter in ours.parameters():
                assert parameter.dtype == dtype and parameter.device.type == device


@modules
@dtypes
@modes
def test_pickle_repr_and_state_dict(name: str, dtype: torch.dtype, training: bool) -> None:
    for sample, ours, torchs in samples(INFOS[name], dtype, training):
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        outputs = ours(*args, **kwargs)
        for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert type(other) is type(ours) and other.training == training
            torch.testing.assert_close(other(*args, **kwargs), outputs, rtol=0, atol=0)
        assert repr(ours) == repr(torchs)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        ours.load_state_dict(torchs.state_dict())
        torchs.load_state_dict(ours.state_dict())


@modules
@dtypes
@modes
def test_error_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    info = INFOS[name]
    for sample in info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    ):
        given = sample.module_error_input
        found = {}
        for module_cls in (info.module_cls, getattr(fastrnn.nn, name)):
            with pytest.raises(sample.error_type, match=sample.error_regex) as caught:
                module = module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)
                assert sample.error_on == ModuleErrorEnum.FORWARD_ERROR
                module.train(training)(*given.forward_input.args, **given.forward_input.kwargs)
            found[module_cls] = (type(caught.value), str(caught.value))
        assert len(set(found.values())) == 1
