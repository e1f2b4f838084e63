"""The back end `cpu`."""

from typing import Any

from torch import Tensor

from fastrnn.backends.attention.call import AttentionCall


def reasons_against(call: AttentionCall) -> list[str]:
    return ["no kernels yet"]


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


def backward(*args: Any) -> tuple[Tensor, ...]:
    raise NotImplementedError
