"""The options that fastrnn's recurrent modules have and torch.nn's have not."""

from __future__ import annotations

import math
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from fastrnn import backends
from fastrnn.backends import Norm

_PROBABILITIES = ("zoneout", "recurrent_dropout", "weight_dropout")
_FLAGS = ("layer_norm", "peephole", "residual", "reset_after", "return_cell_states")


def draw_seed() -> int | Tensor:
    """A seed for the counter-based masks, from torch's generator: reproducible under torch.manual_seed."""
    if backends.onnx.exporting():
        raise NotImplementedError(
            "the random masks of zoneout, recurrent_dropout and weight_dropout cannot be exported to ONNX: "
            "call model.eval() first"
        )
    seed = torch.randint(2**63 - 1, (), device="cpu")
    # torch.vmap draws a seed for each model or sample, which only a tensor can hold. Not int(..), which torch.export
    # cannot trace.
    return seed if backends.transforming() else cast(int, seed.item())


def check_backend(name: str) -> None:
    if name not in (*backends.NAMES, "auto"):
        raise ValueError(f"backend must be one of {', '.join(map(repr, (*backends.NAMES, 'auto')))}, got {name!r}")


def refuse_scripting(self: torch.nn.Module) -> NoReturn:
    """What torch.jit.script calls first."""
    raise TypeError(
        "torch.jit.script compiles torch.nn's modules only: fastrnn.restore(model) turns accelerated modules back, "
        "and torch.compile, torch.export and torch.jit.trace take fastrnn's as they are"
    )


class WithOptions(torch.nn.Module):
    """Base of fastrnn's recurrent modules, layers and cells: their options and what these do to the parameters.

    The values given here leave torch.nn's function as it is. A module that ``fastrnn.accelerate`` has swapped never ran
    our constructor and has only these.
    """

    backend: str = "auto"
    layer_norm: bool = False
    peephole: bool = False
    residual: bool = False
    zoneout: float = 0.0
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    forget_bias: float | None = None
    reset_after: bool = True
    return_cell_states: bool = False

    _cell: str  # A key of fastrnn.reference.CELLS.

    def _set_options(self, **options: Any) -> None:
        """To be called before torch's constructor, which initialises the parameters and so wants `forget_bias`."""
        for name, value in options.items():
            if name == "backend":
                check_backend(value)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name in _PROBABILITIES and not (number and 0 <= value <= 1):
                raise ValueError(f"{name} must be a probability in [0, 1], got {value!r}")
            if name in _FLAGS and not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
            if name == "forget_bias" and not (value is None or number):
                raise TypeError(f"forget_bias must be a number or None, got {type(value).__name__}")
            setattr(self, name, value)

    def _add_parameters(self, suffixes: list[str]) -> None:
        """To be called after torch's constructor, whose parameters come first. The suffix of a cell is empty."""
        if self.forget_bias is not None and not self.bias:
            raise ValueError("forget_bias needs bias=True, got bias=False")
        if self.peephole:
            # Before the layer norms: reset_parameters draws everything in order, and should give what is given here.
            for suffix in suffixes:
                weight_hh = getattr(self, f"weight_hh{suffix}").detach()
                hidden = len(weight_hh) // 4
                bound = 1 / math.sqrt(max(1, hidden))
                weight = torch.nn.init.uniform_(weight_hh.new_empty(3 * hidden), -bound, bound)
                setattr(self, f"weight_peephole{suffix}", torch.nn.Parameter(weight))
        if self.layer_norm:
            for suffix in suffixes:
                weight_hh = getattr(self, f"weight_hh{suffix}").detach()
                for name in self._norm_names(suffix):
                    size = self.hidden_size if name.startswith("layer_norm_c") else len(weight_hh)
                    setattr(self, f"{name}_weight", torch.nn.Parameter(weight_hh.new_ones(size)))
                    setattr(self, f"{name}_bias", torch.nn.Parameter(weight_hh.new_zeros(size)))

    def _norm_names(self, suffix: str) -> list[str]:
        return [f"layer_norm_{of}{suffix}" for of in ("ih", "hh", "c")[: 3 if self._cell == "lstm" else 2]]

    def _norms(self, suffix: str) -> list[Norm | None]:
        """Weights and biases of the layer norms of W_ih x, W_hh h and c."""
        names = self._norm_names(suffix) if self.layer_norm else []
        norms = [(getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")) for name in names]
        return [*norms, None, None, None][:3]

    def _peephole(self, suffix: str) -> Tensor | None:
        return getattr(self, f"weight_peephole{suffix}") if self.peephole else None

    def _zoneout_seed(self) -> int | Tensor | None:
        return draw_seed() if self.training and self.zoneout > 0 else None

    def reset_parameters(self) -> None:
        """As torch.nn's; layer norms begin with weight 1 and bias 0, and a forget bias is set."""
        super().reset_parameters()  # type: ignore[misc]
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("layer_norm"):
                    parameter.fill_(1 if name.endswith("weight") else 0)
                elif name.startswith("bias") and self.forget_bias is not None:
                    # The gates add both biases: the forget bias goes into the first.
                    parameter.chunk(4)[1].fill_(self.forget_bias if name.startswith("bias_ih") else 0)

    __prepare_scriptable__ = refuse_scripting

    def extra_repr(self) -> str:
        names = [name for name in WithOptions.__annotations__ if name != "_cell"]
        changed = [name for name in names if getattr(self, name) != getattr(WithOptions, name)]
        return ", ".join([super().extra_repr(), *(f"{name}={getattr(self, name)!r}" for name in changed)])
