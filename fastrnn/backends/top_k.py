"""The back ends of the operator `top_k_log_softmax`: launchers of the kernels, and which of them runs.

Arguments are those of `fastrnn.ops.top_k.select`, already checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrnn import reference
from fastrnn.backends import gpu, native, triton
from fastrnn.backends.attention.cpu import DTYPES
from fastrnn.backends.call import is_plain
from fastrnn.backends.tensors import address, with_unit_stride

Results = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Parts:
    """How the Triton kernel that reads the logits is launched. Nothing depends on how many rows there are, so that no
    result does."""

    tokens: int  # of a program
    warps: int


@dataclass(frozen=True, slots=True)
class Places:
    """How the Triton kernels that place candidates are launched."""

    candidates: int  # that a program places
    others: int  # that it compares them with at once
    warps: int


# With these sizes the kernels, as Triton 3.9 compiles them, need little shared memory and spill nothing
# (tests/kernels/test_compiled.py); not measured on a GPU yet.


def pick_parts(vocabulary: int) -> Parts:
    """How the logits are read."""
    tokens = min(4096, max(128, _power_of_two(vocabulary)))
    return Parts(tokens, max(1, tokens // 512))


def pick_places(candidates: int) -> Places:
    """How the candidates of a row or group are placed."""
    return Places(16, 32, 1) if candidates <= 32 else Places(32, 128, 4)


def _power_of_two(n: int) -> int:
    """The first one that is not less than n."""
    return 1 << (n - 1).bit_length()


def launch(logits: Tensor, k: int, scores: Tensor | None, group_size: int, normalizers: Tensor | None) -> Results:
    """On the kernels where they take these tensors, else on the reference."""
    if is_plain(type(logits)):
        if logits.is_cpu and logits.dtype in DTYPES and native.load() is not None:
            return _launch_cpu(logits, k, scores, group_size, normalizers)
        if logits.is_cuda and logits.dtype in gpu.DTYPES and triton._INSTALLED and _are_indexed(logits, group_size):
            return _launch_triton(logits, k, scores, group_size, normalizers)
    values, indices, used = reference.top_k_log_softmax(logits, k, scores, group_size, normalizers)
    return values.contiguous(), indices.contiguous(), used


def new_results(logits: Tensor, k: int, group_size: int) -> Results:
    """Empty."""
    rows = logits.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((rows // group_size, k), dtype=dtype),
        logits.new_empty((rows // group_size, k), dtype=torch.int64),
        logits.new_empty((rows,), dtype=dtype),
    )


def _launch_cpu(logits: Tensor, k: int, scores: Tensor | None, group_size: int, normalizers: Tensor | None) -> Results:
    logits = with_unit_stride(logits)
    scores = None if scores is None else scores.contiguous()
    normalizers = None if normalizers is None else normalizers.contiguous()
    values, indices, used = new_results(logits, k, group_size)
    native.load().top_k_log_softmax(  # type: ignore[union-attr]
        DTYPES[logits.dtype],
        values.shape[0],
        group_size,
        logits.shape[1],
        k,
        logits.data_ptr(),
        logits.stride(0),
        address(scores),
        address(normalizers),
        values.data_ptr(),
        indices.data_ptr(),
        used.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices, used


def _are_indexed(logits: Tensor, group_size: int) -> bool:
    """Whether the Triton kernels, which count the tokens of a group in 32 bits, have room for this many."""
    return group_size * (logits.shape[1] + 4096) < 2**31


def _launch_triton(
    logits: Tensor, k: int, scores: Tensor | None, group_size: int, normalizers: Tensor | None
) -> Results:
    values, indices, used = results = new_results(logits, k, group_size)
    rows, vocabulary = logits.shape
    if rows == 0:
        return results
    logits = with_unit_stride(logits)
    scores = None if scores is None else scores.contiguous()
    normalizers = None if normalizers is None else normalizers.contiguous()
    reading, of_row = pick_parts(vocabulary), min(k, vocabulary)
    parts, kept = _cdiv(vocabulary, reading.tokens), min(of_row, reading.tokens)
    candidates = logits.new_empty((rows, parts, kept), dtype=torch.int64)
    sums = logits.new_empty((rows, parts, 2), dtype=torch.float32)
    row_values, row_indices = values, indices
    if group_size > 1:
        row_values = values.new_empty((rows, of_row))
        row_indices = indices.new_empty((rows, of_row))
    kernels = triton._kernels("top_k")
    with torch.cuda.device_of(logits):
        kernels.top_k_parts[(rows * parts,)](
            logits,
            logits.stride(0),
            candidates,
            sums,
            vocabulary,
            parts,
            kept,
            EXPONENTIALS=normalizers is None,
            WIDTH=_power_of_two(kept),
            PART=reading.tokens,
            num_warps=reading.warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
        placing = pick_places(parts * kept)
        kernels.top_k_rows[(rows * _cdiv(parts * kept, placing.candidates),)](
            candidates,
            sums,
            scores,
            normalizers,
            row_values,
            row_indices,
            used,
            vocabulary,
            parts,
            kept,
            group_size,
            of_row,
            BLOCK_P=32,
            **_options(placing),
        )
        if group_size > 1:
            of_group = group_size * of_row
            placing = pick_places(of_group)
            kernels.top_k_groups[(values.shape[0] * _cdiv(of_group, placing.candidates),)](
                row_values, row_indices, values, indices, of_group, k, **_options(placing)
            )
    return results


def _options(placing: Places) -> dict[str, Any]:
    blocks = {"BLOCK_C": placing.candidates, "BLOCK_O": placing.others}
    return {**blocks, "num_warps": placing.warps, "num_stages": 2, "enable_fp_fusion": True}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
