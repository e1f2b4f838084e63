"""One call of the operator `recurrence`: what every back end is asked to compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Norm = tuple[Tensor, Tensor]  # weight and bias


@dataclass(slots=True)
class RecurrenceCall:
    """One direction of one layer. T steps, B sequences, I inputs, H units, P projected units (H without weight_hr).

    With `batch_sizes` the rows of `x` are those of a PackedSequence, longest first, and so are all results.
    """

    cell: str  # a key of fastrnn.reference.CELLS
    x: Tensor  # [T, B, I], [N, I] when packed; or the pre-activations, G*H in place of I, where weight_ih is None
    weight_ih: Tensor | None  # [G*H, I]
    weight_hh: Tensor  # [G*H, P]
    bias_ih: Tensor | None = None  # [G*H]
    bias_hh: Tensor | None = None  # [G*H]
    h0: Tensor | None = None  # [B, P]
    c0: Tensor | None = None  # [B, H]
    weight_hr: Tensor | None = None  # [P, H]
    lengths: Tensor | None = None  # [B] int64
    batch_sizes: Tensor | None = None  # [T] int64 on the CPU
    resets: Tensor | None = None  # [T, B] bool
    zoneout: float = 0.0
    zoneout_seed: int | Tensor | None = None  # None: the expectation; a tensor under torch.func transforms only
    recurrent_mask: Tensor | None = None  # [B, P]
    layer_norm_ih: Norm | None = None  # [G*H]
    layer_norm_hh: Norm | None = None  # [G*H]
    layer_norm_c: Norm | None = None  # [H]
    peephole: Tensor | None = None  # [3*H], gates i f o (LSTM)
    reset_after: bool = True
    reverse: bool = False
    return_cell_states: bool = False  # every c_t [T, B, H] as well (LSTM)
    remembered: bool = False  # set where the choice of a back end is: plain tensors, no option, no autocast, no tracing

    def tensors(self) -> dict[str, Tensor]:
        """The floating tensors that are given, by name."""
        named = {
            "x": self.x,
            "weight_ih": self.weight_ih,
            "weight_hh": self.weight_hh,
            "bias_ih": self.bias_ih,
            "bias_hh": self.bias_hh,
            "h0": self.h0,
            "c0": self.c0,
            "weight_hr": self.weight_hr,
            "recurrent_mask": self.recurrent_mask,
            "peephole": self.peephole,
        }
        for name in ("layer_norm_ih", "layer_norm_hh", "layer_norm_c"):
            norm = getattr(self, name)
            if norm is not None:
                named[f"{name}[0]"], named[f"{name}[1]"] = norm
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def inputs(self) -> tuple[Tensor | None, ...]:
        """All floating tensors that kernels have gradients for, given or not; from the eighth on parameters of options.

        Those are the norms' weights and biases, the peepholes, and weight_hr.
        """
        none = (None, None)
        norms = (self.layer_norm_ih or none) + (self.layer_norm_hh or none) + (self.layer_norm_c or none)
        plain = (self.x, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.h0, self.c0)
        return (*plain, *norms, self.peephole, self.weight_hr)

    def is_plain(self) -> bool:
        """Whether no option is in use: the fast way to ask, a tenth of a small step's time less than `options`."""
        return (
            self.lengths is None
            and self.resets is None
            and self.zoneout == 0
            and self.recurrent_mask is None
            and self.layer_norm_ih is None
            and self.layer_norm_hh is None
            and self.layer_norm_c is None
            and self.peephole is None
            and self.reset_after
            and not self.return_cell_states
        )

    def options(self) -> list[str]:
        """The options in use that torch.nn does not have."""
        given = {
            "lengths": self.lengths is not None,
            "resets": self.resets is not None,
            "zoneout": self.zoneout > 0,
            "recurrent_mask": self.recurrent_mask is not None,
            "layer_norm": self.layer_norm_hh is not None or self.layer_norm_ih is not None,
            "layer_norm_c": self.layer_norm_c is not None,
            "peephole": self.peephole is not None,
            "reset_after=False": not self.reset_after,
            "return_cell_states": self.return_cell_states,
        }
        return [name for name, used in given.items() if used]

    @property
    def steps(self) -> int:
        """T."""
        return self.x.shape[0] if self.batch_sizes is None else self.batch_sizes.shape[0]

    def reasons_against_place(self, place: str, here: bool, dtypes: tuple[torch.dtype, ...]) -> list[str]:
        """Of kernels for tensors in this place, in which the call's are or not, and of these dtypes."""
        return place_reasons(self.x, self.tensors(), place, here, dtypes)

    def reasons_against_kernels(self) -> list[str]:
        """What no native kernel can compute, whatever the device and dtype."""
        reasons = kernel_reasons(self.tensors())
        if self.recurrent_mask is not None and self.recurrent_mask.requires_grad:
            reasons.append("no kernel for the gradient of recurrent_mask")
        if self.weight_hh.shape[0] == 0:
            reasons.append("hidden size 0")
        if self.x.shape[-1] == 0:
            reasons.append("input size 0")
        return reasons

    def __str__(self) -> str:
        shape = "x".join(map(str, self.x.shape))
        direction = " reverse" if self.reverse else ""
        weight = "x".join(map(str, self.weight_hh.shape))
        return f"{self.cell}{direction}, input {shape} {str(self.x.dtype).removeprefix('torch.')}, weight_hh {weight}"


def place_reasons(
    first: Tensor, tensors: dict[str, Tensor], place: str, here: bool, dtypes: tuple[torch.dtype, ...]
) -> list[str]:
    """What the device and dtype of a call's tensors, `first` among them, speak against kernels."""
    # A checked call has one device, and outside autocast one dtype.
    if not here:
        return [f"the tensors are on {first.device}, not on {place}"]
    if any(tensor.dtype not in dtypes for tensor in tensors.values()):
        return [f"the tensors are {first.dtype}; the kernels are for {', '.join(map(str, dtypes))}"]
    return []


def kernel_reasons(tensors: dict[str, Tensor]) -> list[str]:
    """What speaks against any native kernel, whatever the device and dtype: the tensors' layouts and types."""
    reasons = []
    # While a graph is traced, or another dispatch mode is on, fake tensors stand in for plain ones.
    any_type = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            reasons.append(f"{name} has layout {tensor.layout}, not torch.strided")
        if not (any_type or is_plain(type(tensor))):
            reasons.append(f"{name} is a {type(tensor).__name__}, which only torch's own operators understand")
    if torch._C._get_tracing_state() is not None:
        reasons.append("torch.jit.trace is at work, which records torch's own operators only")
    return reasons


def wants_gradients(tensors: Iterable[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_plain(cls: type[Tensor]) -> bool:
    """Whether tensors of this type are memory and no more."""
    return cls in (Tensor, torch.nn.Parameter) or (
        cls.__torch_function__ is torch._C._disabled_torch_function_impl
        and cls.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
    )
