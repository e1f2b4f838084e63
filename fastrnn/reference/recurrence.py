"""The recurrence h_t = cell(x_t, h_{t-1}), step by step.

Any floating dtype, any device, differentiable any number of times. Nothing here is tuned: this file says what
the other back ends must compute, and every test compares them with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Cell(NamedTuple):
    """What distinguishes one cell from another, apart from its formula."""

    gates: int
    """G: rows of weight_hh are G*H, in torch's gate order."""
    has_cell_state: bool
    """Whether there is a c beside h."""
    norm_groups: tuple[int, ...]
    """Sizes, in units of H, of the groups of pre-activations that layer norm treats as one vector (Ba et al. 2016,
    arXiv 1607.06450, equations 20 to 29: LSTM all gates together; GRU r and z together, n on its own)."""


CELLS = {
    "rnn_tanh": Cell(gates=1, has_cell_state=False, norm_groups=(1,)),
    "rnn_relu": Cell(gates=1, has_cell_state=False, norm_groups=(1,)),
    "lstm": Cell(gates=4, has_cell_state=True, norm_groups=(4,)),
    "gru": Cell(gates=3, has_cell_state=False, norm_groups=(2, 1)),
}


def layer_norm(x: Tensor, groups: Sequence[int], weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over groups of the last dimension, in units of H. x ``[.., n*H]``; weight, bias ``[n*H]``."""
    size = x.shape[-1] // sum(groups)
    parts = []
    for part in x.split([size * n for n in groups], dim=-1):
        mean = part.mean(-1, keepdim=True)
        variance = (part - mean).square().mean(-1, keepdim=True)
        parts.append((part - mean) / (variance + eps).sqrt())
    return torch.cat(parts, -1) * weight + bias


def mix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on 32-bit words kept in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def zoneout_mask(
    probability: float,
    seed: int | Tensor,
    stream: int,
    t: int,
    batch: int,
    hidden: int,
    device: torch.device | None = None,
) -> Tensor:
    """Which units keep their previous state at step t: bool [batch, hidden], True with the given probability.

    A counter-based generator: the bit of (seed, stream, t, b, unit) depends on nothing else, so that forward and
    backward, and every back end, draw the same mask without keeping it. Stream 0 is for h, stream 1 for c; the
    operator dropout has stream 2.
    """
    word = torch.as_tensor(seed & 0xFFFFFFFF, device="cpu")
    for value in (seed >> 32, stream, t):
        word = mix32(word ^ (value & 0xFFFFFFFF))
    row = mix32(torch.arange(batch, device=device) ^ word)
    unit = mix32(row[:, None] ^ mix32(torch.arange(hidden, device=device) + 1))
    return (unit >> 8) < int(probability * 2**24)


def _step(
    cell: str,
    x: Tensor,  # [B, G*H]
    h: Tensor,  # [B, P]: what multiplies weight_hh
    h_previous: Tensor,  # [B, P]: what the GRU interpolates with
    c: Tensor | None,  # [B, H]
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    norm_hh: tuple[Tensor, Tensor] | None,
    norm_c: tuple[Tensor, Tensor] | None,
    peephole: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor | None]:
    groups = CELLS[cell].norm_groups

    if cell == "gru" and not reset_after:
        # Cho et al. 2014 (arXiv 1406.1078): the reset gate acts on h, before the product with W_hn.
        size = h.shape[1]
        bias = h.new_zeros(3 * size) if bias_hh is None else bias_hh
        product = h @ weight_hh[: 2 * size].T
        if norm_hh is not None:
            product = layer_norm(product, groups[:1], norm_hh[0][: 2 * size], norm_hh[1][: 2 * size])
        r, z = torch.sigmoid(x[:, : 2 * size] + product + bias[: 2 * size]).chunk(2, 1)
        product = (r * h) @ weight_hh[2 * size :].T
        if norm_hh is not None:
            product = layer_norm(product, groups[1:], norm_hh[0][2 * size :], norm_hh[1][2 * size :])
        n = torch.tanh(x[:, 2 * size :] + product + bias[2 * size :])
        return (1 - z) * n + z * h_previous, None

    product = h @ weight_hh.T
    if norm_hh is not None:
        product = layer_norm(product, groups, *norm_hh)
    if bias_hh is not None:
        product = product + bias_hh

    if cell == "rnn_tanh":
        return torch.tanh(x + product), None
    if cell == "rnn_relu":
        return torch.relu(x + product), None
    if cell == "gru":
        x_r, x_z, x_n = x.chunk(3, 1)
        h_r, h_z, h_n = product.chunk(3, 1)
        r = torch.sigmoid(x_r + h_r)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return (1 - z) * n + z * h_previous, None

    assert c is not None
    i, f, g, o = (x + product).chunk(4, 1)
    if peephole is not None:
        p_i, p_f, p_o = peephole.chunk(3)
        i, f = i + p_i * c, f + p_f * c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if peephole is not None:
        o = o + p_o * c
    normed = c if norm_c is None else layer_norm(c, (1,), *norm_c)
    return torch.sigmoid(o) * torch.tanh(normed), c


def recurrence(
    cell: str,
    gates_x: Tensor,  # [T, B, G*H]
    weight_hh: Tensor,  # [G*H, P], P = H without weight_hr
    bias_hh: Tensor | None = None,  # [G*H]
    h0: Tensor | None = None,  # [B, P]
    c0: Tensor | None = None,  # [B, H]
    *,
    lengths: Tensor | None = None,  # [B]
    resets: Tensor | None = None,  # [T, B] bool
    zoneout: float = 0.0,
    zoneout_seed: int | Tensor | None = None,
    recurrent_mask: Tensor | None = None,  # [B, P]
    layer_norm_hh: tuple[Tensor, Tensor] | None = None,  # weight and bias [G*H]
    layer_norm_c: tuple[Tensor, Tensor] | None = None,  # weight and bias [H]
    peephole: Tensor | None = None,  # [3*H], gates i f o
    reset_after: bool = True,
    weight_hr: Tensor | None = None,  # [P, H]
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one direction of one recurrent layer over time.

    Returns y [T, B, P], h_n [B, P], c_n [B, H] and every c_t [T, B, H] (the last two None without a cell state).

    * ``lengths``: at steps t >= lengths[b] the state of sequence b stands still and its outputs are zero.
    * ``resets``: where resets[t, b], the state before step t is zero.
    * ``zoneout``: each unit keeps its previous h (and c) with this probability (Krueger et al. 2016,
      arXiv 1606.01305); with ``zoneout_seed=None`` the expectation is taken instead, as in evaluation.
    * ``recurrent_mask``: multiplies h_{t-1} where it meets weight_hh (Gal and Ghahramani 2016, arXiv 1512.05287).
    * ``peephole``: diagonal weights with which the LSTM's gates see the cell state, i and f that of the step before, o
      the new one (Gers et al. 2002, JMLR 3).
    * ``reverse``: from the last step to the first.
    """
    steps, batch, _ = gates_x.shape
    hidden = weight_hh.shape[0] // CELLS[cell].gates
    h = gates_x.new_zeros(batch, weight_hh.shape[1]) if h0 is None else h0
    c = None
    if CELLS[cell].has_cell_state:
        c = gates_x.new_zeros(batch, hidden) if c0 is None else c0

    outputs: list[Tensor] = []
    cell_states: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        active = None if lengths is None else (t < lengths)[:, None]
        if resets is not None:
            keep = ~resets[t, :, None]
            keep = keep if active is None else keep | ~active
            h = torch.where(keep, h, 0)
            c = None if c is None else torch.where(keep, c, 0)

        masked = h if recurrent_mask is None else h * recurrent_mask
        h_new, c_new = _step(
            cell, gates_x[t], masked, h, c, weight_hh, bias_hh, layer_norm_hh, layer_norm_c, peephole, reset_after
        )
        if weight_hr is not None:
            h_new = h_new @ weight_hr.T

        if zoneout > 0:
            h_new = _zone_out(h_new, h, zoneout, zoneout_seed, 0, t)
            c_new = None if c_new is None else _zone_out(c_new, c, zoneout, zoneout_seed, 1, t)

        y = h_new
        if active is not None:
            y = torch.where(active, h_new, 0)
            h_new = torch.where(active, h_new, h)
            c_new = None if c_new is None or c is None else torch.where(active, c_new, c)

        h, c = h_new, c_new
        outputs.append(y)
        if c is not None:
            cell_states.append(c if active is None else torch.where(active, c, 0))

    if reverse:
        outputs.reverse()
        cell_states.reverse()
    y = torch.stack(outputs) if outputs else gates_x.new_zeros(0, batch, h.shape[1])
    all_c = torch.stack(cell_states) if cell_states else None if c is None else gates_x.new_zeros(0, batch, hidden)
    return y, h, c, all_c


def _zone_out(
    new: Tensor, old: Tensor | None, probability: float, seed: int | Tensor | None, stream: int, t: int
) -> Tensor:
    assert old is not None
    if seed is None:
        return probability * old + (1 - probability) * new
    batch, hidden = new.shape
    mask = zoneout_mask(probability, seed, stream, t, batch, hidden, new.device)
    return torch.where(mask, old, new)
