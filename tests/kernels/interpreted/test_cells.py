"""The pointwise functions that all kernels share."""

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from fastrnn.kernels import cells  # noqa: E402

from fastrnn.reference import zoneout_mask  # noqa: E402


@triton.jit
def _apply(x, out, FUNCTION: tl.constexpr):
    at = tl.arange(0, 4096)
    tl.store(out + at, FUNCTION(tl.load(x + at)))


@triton.jit
def _round(x, out):
    at = tl.arange(0, 4096)
    cells.store(out + at, tl.load(x + at), at < 4096)


@triton.jit
def _kept(out, word, t, threshold):
    rows, units = tl.arange(0, 8), tl.arange(0, 16)
    kept = cells.kept_units(word, t, rows, units, threshold)
    tl.store(out + rows[:, None] * 16 + units[None, :], kept.to(tl.int32))


def _values() -> Tensor:
    """Of all magnitudes and both signs, and the ends."""
    spread = torch.logspace(-40, 1.5, 2046, dtype=torch.float64).float()
    return torch.cat([spread, -spread, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_activations_keep_their_relative_accuracy(name: str) -> None:
    x, out = _values(), torch.empty(4096)
    _apply[(1,)](x, out, getattr(cells, name))
    exact = getattr(torch, name)(x.double())
    assert torch.equal(out.isnan(), exact.isnan())
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    error = ((out.double() - exact) / exact)[normal].abs().max()
    assert error <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    x, out = _values(), torch.empty(4096, dtype=dtype)
    with np.errstate(over="ignore"):
        _round[(1,)](x, out)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
@pytest.mark.parametrize("stream", [0, 1])
def test_zoneout_draws_the_mask_of_the_specification(seed: int, stream: int) -> None:
    from fastrnn.backends.triton import _word

    out = torch.empty(8, 16, dtype=torch.int32)
    for t in (0, 5, 70000):
        with np.errstate(over="ignore"):
            _kept[(1,)](out, _word(seed, stream), t, int(0.3 * 2**24))
        assert torch.equal(out.bool(), zoneout_mask(0.3, seed, stream, t, 8, 16))
