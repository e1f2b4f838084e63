"""One step of a tile [rows, units] of any cell, forward and backward: what the kernels of whole sequences and of single
steps share.

Sequence tensors have strides of t and b and unit stride of their columns, or row_starts where they are packed. Saved
tensors have no gaps: row t*B + b, or the packed row. Absent options are None. Layer norm needs all units in one tile.
"""

import triton
import triton.language as tl
from fastrnn.kernels.cells import (
    ZONEOUT_EXPECTED,
    gru_output,
    gru_output_backward,
    load,
    lstm_backward,
    lstm_forward,
    rnn_backward,
    rnn_forward,
    sigmoid,
    store,
    tanh,
)

EPSILON = tl.constexpr(1e-5)


@triton.jit
def row_of(t, rows, row_starts, stride_t, stride_b):
    """Where the rows of step t begin in a sequence tensor: [T, B, n], or [N, n] packed."""
    if row_starts is not None:
        return (tl.load(row_starts + t) + rows) * stride_b
    else:
        return tl.cast(t, tl.int64) * stride_t + rows * stride_b


@triton.jit
def lengths_of(lengths, rows, T, B):
    """How many steps each row takes; none beyond the batch."""
    if lengths is None:
        return tl.where(rows < B, T, 0)
    else:
        found = tl.load(lengths + rows, mask=rows < B, other=0)
        return tl.minimum(tl.maximum(found, 0), T).to(tl.int32)


@triton.jit
def resets_at(resets, stride_t, stride_b, t, rows, live):
    """Whether the state before step t is zero: bool [rows, 1]."""
    found = tl.load(resets + tl.cast(t, tl.int64) * stride_t + rows * stride_b, mask=live, other=0)
    return found[:, None] != 0


@triton.jit
def load_state(pointer, rows, columns, B, width):
    """[rows, columns] of [B, width], zero where the pointer is None."""
    if pointer is None:
        return tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    else:
        inside = (rows < B)[:, None] & (columns < width)[None, :]
        return load(pointer + rows[:, None] * width + columns[None, :], inside)


@triton.jit
def state_before(
    sequence,
    stride_t,
    stride_b,
    initial,
    t,
    own_lengths,
    rows,
    row_starts,
    columns,
    live,
    width,
    REVERSE: tl.constexpr,
):
    """The state [rows, columns] that step t began with, before resets: of the step before, or the initial one."""
    before = tl.zeros_like(own_lengths) + (t + 1 if REVERSE else t - 1)
    exists = live & (before >= 0) & (before < own_lengths)
    inside = (columns < width)[None, :]
    if row_starts is not None:
        row = (tl.load(row_starts + before, mask=exists, other=0) + rows) * stride_b
    else:
        row = before.to(tl.int64) * stride_t + rows * stride_b
    state = load(sequence + row[:, None] + columns[None, :], exists[:, None] & inside)
    if initial is not None:
        at_start = live & ((before < 0) | (before >= own_lengths))
        first = load(initial + rows[:, None] * width + columns[None, :], at_start[:, None] & inside)
        state = tl.where(exists[:, None], state, first)
    return state


@triton.jit
def load_gates(pointer, offsets, H, mask, GATES: tl.constexpr):
    found = ()
    for g in tl.static_range(GATES):
        found += (load(pointer + offsets + g * H, mask),)
    return found


@triton.jit
def store_gates(pointer, offsets, H, gates, mask, GATES: tl.constexpr):
    for g in tl.static_range(GATES):
        store(pointer + offsets + g * H, gates[g], mask)


@triton.jit
def load_vectors(pointer, units, H, COUNT: tl.constexpr):
    """COUNT rows [1, units] of a parameter."""
    found = ()
    for g in tl.static_range(COUNT):
        found += (load(pointer + g * H + units, units < H)[None, :],)
    return found


@triton.jit
def normalize(x, valid, H, COUNT: tl.constexpr):
    """Layer norm without its affine over COUNT tiles as one vector; 1 / deviation [rows]. x: zero where not valid."""
    size = COUNT * H
    total = tl.sum(x[0], 1)
    for g in tl.static_range(1, COUNT):
        total += tl.sum(x[g], 1)
    mean = (total / size)[:, None]
    squares = tl.sum(tl.where(valid, (x[0] - mean) * (x[0] - mean), 0.0), 1)
    for g in tl.static_range(1, COUNT):
        squares += tl.sum(tl.where(valid, (x[g] - mean) * (x[g] - mean), 0.0), 1)
    scale = 1.0 / tl.sqrt(squares / size + EPSILON)
    found = ()
    for g in tl.static_range(COUNT):
        found += ((x[g] - mean) * scale[:, None],)
    return found, scale


@triton.jit
def normalize_backward(d, normalized, scale, weights, valid, H, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Gradient of what was normalised. d: of the norm's result; all tiles of the cell, the group's begin at FIRST."""
    size = COUNT * H
    scaled = ()
    for g in tl.static_range(COUNT):
        scaled += (tl.where(valid, d[FIRST + g] * weights[FIRST + g], 0.0),)
    total = tl.sum(scaled[0], 1)
    along = tl.sum(scaled[0] * normalized[FIRST], 1)
    for g in tl.static_range(1, COUNT):
        total += tl.sum(scaled[g], 1)
        along += tl.sum(scaled[g] * normalized[FIRST + g], 1)
    mean = (total / size)[:, None]
    slope = (along / size)[:, None]
    found = ()
    for g in tl.static_range(COUNT):
        found += ((scaled[g] - mean - normalized[FIRST + g] * slope) * scale[:, None],)
    return found


@triton.jit
def recurrent_terms(
    products,
    norm_weights,
    norm_biases,
    biases,
    normalized,
    deviations,
    row,
    units,
    live,
    valid,
    H,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    GATES: tl.constexpr,
):
    """What W_hh h adds to COUNT gates, one group of layer norm: norm and biases, where given, of the products."""
    unit = products
    if norm_weights is not None:
        unit, scale = normalize(products, valid, H, COUNT)
        if normalized is not None:
            at = normalized + row[:, None] * (GATES * H) + units[None, :]
            for g in tl.static_range(COUNT):
                store(at + (FIRST + g) * H, unit[g], live[:, None] & valid)
            groups: tl.constexpr = 2 if GATES == 3 else 1
            tl.store(deviations + row * groups + GROUP, scale, mask=live)
    found = ()
    for g in tl.static_range(COUNT):
        value = unit[g]
        if norm_weights is not None:
            value = value * norm_weights[FIRST + g] + norm_biases[FIRST + g]
        if biases is not None:
            value += biases[FIRST + g]
        found += (value,)
    return found


@triton.jit
def all_recurrent_terms(
    products,
    norm_weights,
    norm_biases,
    biases,
    normalized,
    deviations,
    row,
    units,
    live,
    valid,
    H,
    GATES: tl.constexpr,
):
    """`recurrent_terms` of every gate."""
    if GATES == 3:
        first = recurrent_terms(
            (products[0], products[1]),
            norm_weights,
            norm_biases,
            biases,
            normalized,
            deviations,
            row,
            units,
            live,
            valid,
            H,
            0,
            2,
            0,
            GATES,
        )
        second = recurrent_terms(
            (products[2],),
            norm_weights,
            norm_biases,
            biases,
            normalized,
            deviations,
            row,
            units,
            live,
            valid,
            H,
            2,
            1,
            1,
            GATES,
        )
        return first + second
    else:
        return recurrent_terms(
            products,
            norm_weights,
            norm_biases,
            biases,
            normalized,
            deviations,
            row,
            units,
            live,
            valid,
            H,
            0,
            GATES,
            0,
            GATES,
        )


@triton.jit
def terms_backward(dterms, norm_weights, normalized, deviations, row, units, live, valid, H, GATES: tl.constexpr):
    """Gradients of the products, from those of all `recurrent_terms`."""
    if norm_weights is None:
        return dterms
    else:
        inside = live[:, None] & valid
        unit = load_gates(normalized, row[:, None] * (GATES * H) + units[None, :], H, inside, GATES)
        if GATES == 3:
            scale = tl.load(deviations + row * 2, mask=live, other=0.0)
            first = normalize_backward(dterms, unit, scale, norm_weights, valid, H, 0, 2)
            scale = tl.load(deviations + row * 2 + 1, mask=live, other=0.0)
            return first + normalize_backward(dterms, unit, scale, norm_weights, valid, H, 2, 1)
        else:
            scale = tl.load(deviations + row, mask=live, other=0.0)
            return normalize_backward(dterms, unit, scale, norm_weights, valid, H, 0, GATES)


@triton.jit
def advance(
    x,
    terms,
    h,
    c,
    peepholes,
    norm_c_weights,
    norm_c_biases,
    gates,
    normalized_c,
    deviations_c,
    row,
    units,
    live,
    valid,
    H,
    CELL: tl.constexpr,
):
    """h, of an LSTM before its projection, and c that the step produces, before zoneout. Not of gru_reset_before."""
    inside = live[:, None] & valid
    if CELL == "lstm":
        pre = (x[0] + terms[0], x[1] + terms[1], x[2] + terms[2], x[3] + terms[3])
        acted, c = lstm_forward(pre, c, peepholes)
        if gates is not None:
            store_gates(gates, row[:, None] * (4 * H) + units[None, :], H, acted, inside, 4)
        seen = c
        if norm_c_weights is not None:
            unit, scale = normalize((c,), valid, H, 1)
            if normalized_c is not None:
                store(normalized_c + row[:, None] * H + units[None, :], unit[0], inside)
                tl.store(deviations_c + row, scale, mask=live)
            seen = unit[0] * norm_c_weights[0] + norm_c_biases[0]
        return acted[3] * tanh(seen), c
    elif CELL == "gru":
        r = sigmoid(x[0] + terms[0])
        z = sigmoid(x[1] + terms[1])
        n = tanh(x[2] + r * terms[2])
        if gates is not None:
            store_gates(gates, row[:, None] * (4 * H) + units[None, :], H, (r, z, n, terms[2]), inside, 4)
        return gru_output(z, n, h), c
    else:
        h = rnn_forward(x[0] + terms[0], CELL)
        if gates is not None:
            store(gates + row[:, None] * H + units[None, :], h, inside)
        return h, c


@triton.jit
def retreat(
    dh,
    dc,
    h_before,
    c_before,
    y,
    y_t,
    y_b,
    gates,
    normalized_c,
    deviations_c,
    peepholes,
    norm_c_weights,
    norm_c_biases,
    dnormed_c,
    t,
    rows,
    row_starts,
    row,
    units,
    live,
    writes,
    valid,
    H,
    CELL: tl.constexpr,
    ZONEOUT: tl.constexpr,
):
    """Gradients of gates_x, of the `recurrent_terms`, of h_before but for the latter, and of c_before.

    dh, dc: gradients of what `advance` returned, zero where not live.
    """
    inside = live[:, None] & valid
    if CELL == "lstm":
        acted = load_gates(gates, row[:, None] * (4 * H) + units[None, :], H, inside, 4)
        if norm_c_weights is not None:
            unit = load(normalized_c + row[:, None] * H + units[None, :], inside)
            scale = tl.load(deviations_c + row, mask=live, other=0.0)
            tanh_c = tanh(unit * norm_c_weights[0] + norm_c_biases[0])
            dnormed = dh * acted[3] * (1.0 - tanh_c * tanh_c)
            store(dnormed_c + row[:, None] * H + units[None, :], dnormed, writes[:, None] & valid)
            dc += normalize_backward((dnormed,), (unit,), scale, norm_c_weights, valid, H, 0, 1)[0]
        else:
            tanh_c = tanh(acted[1] * c_before + acted[0] * acted[2])
            dc += dh * acted[3] * (1.0 - tanh_c * tanh_c)
        dgates, dc = lstm_backward(acted, c_before, dh, tanh_c, dc, peepholes)
        return dgates, dgates, tl.zeros_like(dh), dc
    elif CELL == "gru":
        r, z, n, term = load_gates(gates, row[:, None] * (4 * H) + units[None, :], H, inside, 4)
        dz, dn, direct = gru_output_backward(z, n, h_before, dh)
        dr = dn * term * r * (1.0 - r)
        return (dr, dz, dn), (dr, dz, dn * r), direct, dc
    else:
        if ZONEOUT == ZONEOUT_EXPECTED:
            h = load(gates + row[:, None] * H + units[None, :], inside)
        else:
            h = load(y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + units[None, :], inside)
        dgates = (rnn_backward(h, dh, CELL),)
        return dgates, dgates, tl.zeros_like(dh), dc
