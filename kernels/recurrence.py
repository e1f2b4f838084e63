"""The whole sequence in one launch, for hidden sizes whose recurrent weights stay on one multiprocessor.

A program takes BLOCK_B sequences through all steps. Its weights are loaded before the loop; the compiler keeps them in
shared memory. State and sums are float32; h is rounded to the data's dtype where it meets the weights. H is padded to
BLOCK_H and P, the projected size (H without weight_hr), to BLOCK_P.

Sequence tensors have strides of t and b and unit stride of their columns, or row_starts where they are packed. Saved
tensors have no gaps: row t*B + b, or the packed row. Absent options are None pointers.
"""

import triton
import triton.language as tl
from fastrnn.kernels.cells import (
    ZONEOUT_EXPECTED,
    dot,
    gru_output,
    gru_output_backward,
    load,
    lstm_backward,
    lstm_forward,
    rnn_backward,
    rnn_forward,
    rounded,
    row_of,
    sigmoid,
    store,
    tanh,
    zone_out,
    zone_out_backward,
)

EPSILON = tl.constexpr(1e-5)


@triton.jit
def _load_gates(pointer, offsets, H, mask, GATES: tl.constexpr):
    found = ()
    for g in tl.static_range(GATES):
        found += (load(pointer + offsets + g * H, mask),)
    return found


@triton.jit
def _store_gates(pointer, offsets, H, gates, mask, GATES: tl.constexpr):
    for g in tl.static_range(GATES):
        store(pointer + offsets + g * H, gates[g], mask)


@triton.jit
def _load_weights(weight, row_offsets, column_offsets, rows_per_gate, mask, GATES: tl.constexpr):
    found = ()
    for g in tl.static_range(GATES):
        at = weight + (row_offsets + g * rows_per_gate) + column_offsets
        found += (tl.load(at, mask=mask, other=0.0),)
    return found


@triton.jit
def _products(fed, weights, like, FIRST: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """fed @ W_g for COUNT gates."""
    found = ()
    for g in tl.static_range(COUNT):
        found += (dot(fed, weights[FIRST + g], tl.zeros_like(like), PRECISION),)
    return found


@triton.jit
def _normalize(x, valid, H, COUNT: tl.constexpr):
    """Layer norm without its affine over COUNT tiles as one vector, and 1 / deviation [rows]. x: zero where not valid."""
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
def _normalize_backward(d, normalized, scale, weights, valid, H, FIRST: tl.constexpr, COUNT: tl.constexpr):
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
def _recurrent_terms(
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
    GROUPS: tl.constexpr,
):
    """What W_hh h adds to the gates of one group: layer norm and biases, where given, of the products."""
    unit = products
    if norm_weights is not None:
        unit, scale = _normalize(products, valid, H, COUNT)
        if normalized is not None:
            at = normalized + row[:, None] * (GATES * H) + units[None, :]
            for g in tl.static_range(COUNT):
                store(at + (FIRST + g) * H, unit[g], live[:, None] & valid)
            tl.store(deviations + row * GROUPS + GROUP, scale, mask=live)
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
def _load_vectors(pointer, units, H, COUNT: tl.constexpr):
    """COUNT rows [1, BLOCK_H] of a parameter."""
    found = ()
    for g in tl.static_range(COUNT):
        found += (load(pointer + g * H + units, units < H)[None, :],)
    return found


@triton.jit
def _load_state(pointer, rows, columns, B, width):
    """[rows, columns] of [B, width], zero where the pointer is None."""
    if pointer is None:
        return tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    else:
        inside = (rows < B)[:, None] & (columns < width)[None, :]
        return load(pointer + rows[:, None] * width + columns[None, :], inside)


@triton.jit
def _lengths_of(lengths, rows, T, B):
    """How many steps each row takes; none beyond the batch."""
    if lengths is None:
        return tl.where(rows < B, T, 0)
    else:
        found = tl.load(lengths + rows, mask=rows < B, other=0)
        return tl.minimum(tl.maximum(found, 0), T).to(tl.int32)


@triton.jit(do_not_specialize=["T", "B", "threshold", "word_h", "word_c"])
def recurrence_forward(
    gates_x,
    x_t,
    x_b,
    weight_hh,
    bias_hh,
    weight_hr,
    norm_weight,
    norm_bias,
    norm_c_weight,
    norm_c_bias,
    peephole,
    h0,
    c0,
    lengths,
    row_starts,
    resets,
    reset_t,
    reset_b,
    mask,
    y,
    y_t,
    y_b,
    h_n,
    c_n,
    c_all,
    c_t,
    c_b,
    gates,
    normalized,
    deviations,
    normalized_c,
    deviations_c,
    projected,
    T,
    B,
    H,
    P,
    probability,
    threshold,
    word_h,
    word_c,
    CELL: tl.constexpr,
    REVERSE: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    LOAD_STAGES: tl.constexpr,
):
    GRU: tl.constexpr = CELL == "gru" or CELL == "gru_reset_before"
    GATES: tl.constexpr = 4 if CELL == "lstm" else 3 if GRU else 1
    GROUPS: tl.constexpr = 2 if GRU else 1
    # Tiles of the first group of layer norm: of GRUs r and z, of the others all.
    FIRST_GROUP: tl.constexpr = 2 if GRU else GATES
    DATA: tl.constexpr = weight_hh.dtype.element_ty

    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    outputs = tl.arange(0, BLOCK_P)
    in_batch = rows < B
    valid = (rows >= 0)[:, None] & (units < H)[None, :]
    own_lengths = _lengths_of(lengths, rows, T, B)
    steps = tl.max(own_lengths)

    weights = _load_weights(
        weight_hh,
        units[None, :] * P,
        outputs[:, None],
        H * P,
        (units < H)[None, :] & (outputs < P)[:, None],
        GATES,
    )
    if weight_hr is not None:
        projection = tl.load(
            weight_hr + outputs[None, :] * H + units[:, None],
            mask=(outputs < P)[None, :] & (units < H)[:, None],
            other=0.0,
        )
    biases = _load_vectors(bias_hh, units, H, GATES) if bias_hh is not None else None
    norm_weights = _load_vectors(norm_weight, units, H, GATES) if norm_weight is not None else None
    norm_biases = _load_vectors(norm_bias, units, H, GATES) if norm_bias is not None else None
    norm_c_weights = _load_vectors(norm_c_weight, units, H, 1) if norm_c_weight is not None else None
    norm_c_biases = _load_vectors(norm_c_bias, units, H, 1) if norm_c_bias is not None else None
    peepholes = _load_vectors(peephole, units, H, 3) if peephole is not None else None
    h = _load_state(h0, rows, outputs, B, P)
    if CELL == "lstm":
        c = _load_state(c0, rows, units, B, H)
    if mask is not None:
        scale = _load_state(mask, rows, outputs, B, P)

    for s in tl.range(0, steps, num_stages=LOAD_STAGES):
        t = steps - 1 - s if REVERSE else s
        live = t < own_lengths
        inside = live[:, None] & (units < H)[None, :]
        writes = in_batch if row_starts is None else live
        row = row_of(t, rows, row_starts, B, 1)
        at_x = row_of(t, rows, row_starts, x_t, x_b)[:, None] + units[None, :]
        x = _load_gates(gates_x, at_x, H, inside, GATES)

        if resets is not None:
            reset = tl.load(resets + tl.cast(t, tl.int64) * reset_t + rows * reset_b, mask=live, other=0)[:, None] != 0
            h = tl.where(reset, 0.0, h)
            if CELL == "lstm":
                c = tl.where(reset, 0.0, c)

        fed = h
        if mask is not None:
            fed = h * scale
        products = _products(rounded(fed, DATA), weights, x[0], 0, FIRST_GROUP, PRECISION)
        terms = _recurrent_terms(
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
            FIRST_GROUP,
            0,
            GATES,
            GROUPS,
        )

        if CELL == "lstm":
            pre = (x[0] + terms[0], x[1] + terms[1], x[2] + terms[2], x[3] + terms[3])
            acted, c_new = lstm_forward(pre, c, peepholes)
            if norm_c_weights is not None:
                unit, deviation = _normalize((c_new,), valid, H, 1)
                if normalized_c is not None:
                    store(normalized_c + row[:, None] * H + units[None, :], unit[0], inside)
                    tl.store(deviations_c + row, deviation, mask=live)
                h_new = acted[3] * tanh(unit[0] * norm_c_weights[0] + norm_c_biases[0])
            else:
                h_new = acted[3] * tanh(c_new)
            if gates is not None:
                _store_gates(gates, row[:, None] * (4 * H) + units[None, :], H, acted, inside, 4)
            if weight_hr is not None:
                m = rounded(h_new, DATA)
                if projected is not None:
                    tl.store(projected + row[:, None] * H + units[None, :], m, mask=inside)
                h_new = dot(m, projection, tl.zeros_like(h), PRECISION)
            c_new = zone_out(c_new, c, word_c, t, rows, units, probability, threshold, ZONEOUT)
            c = tl.where(live[:, None], c_new, c)
            if c_all is not None:
                at_c = c_all + row_of(t, rows, row_starts, c_t, c_b)[:, None] + units[None, :]
                tl.store(at_c, tl.where(live[:, None], c, 0.0), mask=writes[:, None] & (units < H)[None, :])
        elif GRU:
            r = sigmoid(x[0] + terms[0])
            z = sigmoid(x[1] + terms[1])
            if CELL == "gru_reset_before":
                fed *= r
            products = _products(rounded(fed, DATA), weights, x[0], 2, 1, PRECISION)
            terms = _recurrent_terms(
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
                2,
                1,
                1,
                GATES,
                GROUPS,
            )
            at_gates = row[:, None] * ((4 if CELL == "gru" else 3) * H) + units[None, :]
            if CELL == "gru":
                n = tanh(x[2] + r * terms[0])
                if gates is not None:
                    _store_gates(gates, at_gates, H, (r, z, n, terms[0]), inside, 4)
            else:
                n = tanh(x[2] + terms[0])
                if gates is not None:
                    _store_gates(gates, at_gates, H, (r, z, n), inside, 3)
            h_new = gru_output(z, n, h)
        else:
            h_new = rnn_forward(x[0] + terms[0], CELL)
            if gates is not None:
                store(gates + row[:, None] * H + units[None, :], h_new, inside)

        h_new = zone_out(h_new, h, word_h, t, rows, outputs, probability, threshold, ZONEOUT)
        h = tl.where(live[:, None], h_new, h)
        at_y = y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
        store(at_y, tl.where(live[:, None], h, 0.0), writes[:, None] & (outputs < P)[None, :])
    if lengths is not None and row_starts is None:
        for t in range(steps, T):
            at_y = y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
            store(at_y, tl.zeros_like(h), in_batch[:, None] & (outputs < P)[None, :])
            if c_all is not None:
                at_c = c_all + row_of(t, rows, row_starts, c_t, c_b)[:, None] + units[None, :]
                tl.store(at_c, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), mask=in_batch[:, None] & (units < H)[None, :])

    store(h_n + rows[:, None] * P + outputs[None, :], h, in_batch[:, None] & (outputs < P)[None, :])
    if CELL == "lstm":
        store(c_n + rows[:, None] * H + units[None, :], c, in_batch[:, None] & (units < H)[None, :])


@triton.jit
def _state_before(
    sequence, stride_t, stride_b, initial, t, own_lengths, rows, row_starts, columns, live, width, REVERSE
):
    """The state [rows, columns] that step t began with, before resets: of the step before, or the initial one."""
    before = tl.zeros_like(own_lengths) + (t + 1 if REVERSE else t - 1)
    exists = live & (before >= 0) & (before < own_lengths)
    inside = columns[None, :] < width
    if row_starts is not None:
        row = (tl.load(row_starts + before, mask=exists, other=0) + rows) * stride_b
    else:
        row = before.to(tl.int64) * stride_t + rows * stride_b
    state = load(sequence + row[:, None] + columns[None, :], exists[:, None] & inside)
    if initial is not None:
        at_start = (live & (before != tl.where(exists, before, -2)))[:, None] & inside
        first = load(initial + rows[:, None] * width + columns[None, :], at_start)
        state = tl.where(exists[:, None], state, first)
    return state


@triton.jit(do_not_specialize=["T", "B", "threshold", "word_h", "word_c"])
def recurrence_backward(
    dy,
    dy_t,
    dy_b,
    dh_n,
    dc_n,
    dc_all,
    dc_t,
    dc_b,
    weight_hh,
    weight_hr,
    norm_weight,
    norm_c_weight,
    norm_c_bias,
    peephole,
    h0,
    c0,
    lengths,
    row_starts,
    resets,
    reset_t,
    reset_b,
    mask,
    y,
    y_t,
    y_b,
    c_all,
    c_t,
    c_b,
    gates,
    normalized,
    deviations,
    normalized_c,
    deviations_c,
    dgates_x,
    dx_t,
    dx_b,
    dproduct,
    dprojected,
    dnormed_c,
    dh0,
    dc0,
    T,
    B,
    H,
    P,
    probability,
    threshold,
    word_h,
    word_c,
    CELL: tl.constexpr,
    REVERSE: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    LOAD_STAGES: tl.constexpr,
):
    GRU: tl.constexpr = CELL == "gru" or CELL == "gru_reset_before"
    GATES: tl.constexpr = 4 if CELL == "lstm" else 3 if GRU else 1
    GROUPS: tl.constexpr = 2 if GRU else 1
    DATA: tl.constexpr = weight_hh.dtype.element_ty

    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    outputs = tl.arange(0, BLOCK_P)
    in_batch = rows < B
    valid = (rows >= 0)[:, None] & (units < H)[None, :]
    own_lengths = _lengths_of(lengths, rows, T, B)
    steps = tl.max(own_lengths)

    weights = _load_weights(
        weight_hh,
        units[:, None] * P,
        outputs[None, :],
        H * P,
        (units < H)[:, None] & (outputs < P)[None, :],
        GATES,
    )
    if weight_hr is not None:
        projection = tl.load(
            weight_hr + outputs[:, None] * H + units[None, :],
            mask=(outputs < P)[:, None] & (units < H)[None, :],
            other=0.0,
        )
    norm_weights = _load_vectors(norm_weight, units, H, GATES) if norm_weight is not None else None
    norm_c_weights = _load_vectors(norm_c_weight, units, H, 1) if norm_c_weight is not None else None
    norm_c_biases = _load_vectors(norm_c_bias, units, H, 1) if norm_c_bias is not None else None
    peepholes = _load_vectors(peephole, units, H, 3) if peephole is not None else None
    dh = _load_state(dh_n, rows, outputs, B, P)
    if CELL == "lstm":
        dc = _load_state(dc_n, rows, units, B, H)
    if mask is not None:
        scale = _load_state(mask, rows, outputs, B, P)

    for s in tl.range(0, steps, num_stages=LOAD_STAGES):
        t = s if REVERSE else steps - 1 - s
        live = t < own_lengths
        writes = in_batch if row_starts is None else live
        inside = live[:, None] & (units < H)[None, :]
        inside_y = live[:, None] & (outputs < P)[None, :]
        row = row_of(t, rows, row_starts, B, 1)
        if resets is not None:
            reset = tl.load(resets + tl.cast(t, tl.int64) * reset_t + rows * reset_b, mask=live, other=0)[:, None] != 0

        dh_t = dh
        if dy is not None:
            dh_t += load(dy + row_of(t, rows, row_starts, dy_t, dy_b)[:, None] + outputs[None, :], inside_y)
        dh_new, dh_old = zone_out_backward(dh_t, word_h, t, rows, outputs, probability, threshold, ZONEOUT)
        dh_new = tl.where(live[:, None], dh_new, 0.0)
        dh_old = tl.where(live[:, None], dh_old, dh)

        if CELL == "lstm":
            acted = _load_gates(gates, row[:, None] * (4 * H) + units[None, :], H, inside, 4)
            c_before = _state_before(c_all, c_t, c_b, c0, t, own_lengths, rows, row_starts, units, live, H, REVERSE)
            if resets is not None:
                c_before = tl.where(reset, 0.0, c_before)
            dc_step = dc
            if dc_all is not None:
                at_dc = dc_all + row_of(t, rows, row_starts, dc_t, dc_b)[:, None] + units[None, :]
                dc_step += load(at_dc, inside)
            dc_new, dc_old = zone_out_backward(dc_step, word_c, t, rows, units, probability, threshold, ZONEOUT)
            dc_new = tl.where(live[:, None], dc_new, 0.0)
            dc_old = tl.where(live[:, None], dc_old, dc)

            dm = dh_new
            if weight_hr is not None:
                to_project = rounded(dh_new, DATA)
                at_projected = dprojected + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
                tl.store(at_projected, to_project, mask=writes[:, None] & (outputs < P)[None, :])
                dm = dot(to_project, projection, tl.zeros_like(dc), PRECISION)
            if norm_c_weights is not None:
                unit = load(normalized_c + row[:, None] * H + units[None, :], inside)
                deviation = tl.load(deviations_c + row, mask=live, other=0.0)
                tanh_c = tanh(unit * norm_c_weights[0] + norm_c_biases[0])
                dnormed = dm * acted[3] * (1.0 - tanh_c * tanh_c)
                store(dnormed_c + row[:, None] * H + units[None, :], dnormed, writes[:, None] & (units < H)[None, :])
                from_norm = _normalize_backward((dnormed,), (unit,), deviation, norm_c_weights, valid, H, 0, 1)
                dc_new += tl.where(valid, from_norm[0], 0.0)
            else:
                tanh_c = tanh(acted[1] * c_before + acted[0] * acted[2])
                dc_new += dm * acted[3] * (1.0 - tanh_c * tanh_c)
            dgates, dc_new = lstm_backward(acted, c_before, dm, tanh_c, dc_new, peepholes)
            dc = dc_new + dc_old
            if resets is not None:
                dc = tl.where(reset, 0.0, dc)
            dterms = dgates
        elif GRU:
            h_before = _state_before(y, y_t, y_b, h0, t, own_lengths, rows, row_starts, units, live, H, REVERSE)
            if resets is not None:
                h_before = tl.where(reset, 0.0, h_before)
            saved = _load_gates(
                gates,
                row[:, None] * ((4 if CELL == "gru" else 3) * H) + units[None, :],
                H,
                inside,
                4 if CELL == "gru" else 3,
            )
            r = saved[0]
            dz, dn, direct = gru_output_backward(saved[1], saved[2], h_before, dh_new)
            dh_old += direct
            if CELL == "gru":
                dr = dn * saved[3] * r * (1.0 - r)
                dterms = (dr, dz, dn * r)
            else:
                # The gradient of r needs that of r * h first.
                fed = h_before
                if mask is not None:
                    fed *= scale
                dn_product = dn
                if norm_weights is not None:
                    unit = _load_gates(normalized, row[:, None] * (3 * H) + 2 * H + units[None, :], H, inside, 1)
                    deviation = tl.load(deviations + row * 2 + 1, mask=live, other=0.0)
                    dn_product = _normalize_backward((dn,), unit, deviation, (norm_weights[2],), valid, H, 0, 1)[0]
                drh = dot(rounded(dn_product, DATA), weights[2], tl.zeros_like(dh), PRECISION)
                dr = drh * fed * r * (1.0 - r)
                dterms = (dr, dz, dn)
            dgates = (dr, dz, dn)
        else:
            if ZONEOUT == ZONEOUT_EXPECTED:
                h_new = load(gates + row[:, None] * H + units[None, :], inside)
            else:
                h_new = load(y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + units[None, :], inside)
            dgates = (rnn_backward(h_new, dh_new, CELL),)
            dterms = dgates

        stored = writes[:, None] & (units < H)[None, :]
        at_x = row_of(t, rows, row_starts, dx_t, dx_b)[:, None] + units[None, :]
        _store_gates(dgates_x, at_x, H, dgates, stored, GATES)

        dproducts = dterms
        if norm_weights is not None:
            unit = _load_gates(normalized, row[:, None] * (GATES * H) + units[None, :], H, inside, GATES)
            deviation = tl.load(deviations + row * GROUPS, mask=live, other=0.0)
            if GRU:
                first = _normalize_backward(dterms, unit, deviation, norm_weights, valid, H, 0, 2)
                if CELL == "gru":
                    deviation = tl.load(deviations + row * 2 + 1, mask=live, other=0.0)
                    dn_product = _normalize_backward(dterms, unit, deviation, norm_weights, valid, H, 2, 1)[0]
                dproducts = (first[0], first[1], dn_product)
            else:
                dproducts = _normalize_backward(dterms, unit, deviation, norm_weights, valid, H, 0, GATES)
        if dproduct is not None:
            _store_gates(dproduct, at_x, H, dproducts, stored, GATES)

        dfed = tl.zeros_like(dh)
        for g in tl.static_range(2 if CELL == "gru_reset_before" else GATES):
            dfed = dot(rounded(dproducts[g], DATA), weights[g], dfed, PRECISION)
        if CELL == "gru_reset_before":
            dfed += drh * r
        if mask is not None:
            dfed *= scale
        dh = dh_old + dfed
        if resets is not None:
            dh = tl.where(reset, 0.0, dh)

    if lengths is not None and row_starts is None:
        for t in range(steps, T):
            stored = in_batch[:, None] & (units < H)[None, :]
            nothing = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            at_x = row_of(t, rows, row_starts, dx_t, dx_b)[:, None] + units[None, :]
            for g in tl.static_range(GATES):
                store(dgates_x + at_x + g * H, nothing, stored)
                if dproduct is not None:
                    store(dproduct + at_x + g * H, nothing, stored)
            if dnormed_c is not None:
                store(dnormed_c + row_of(t, rows, row_starts, B, 1)[:, None] * H + units[None, :], nothing, stored)
            if dprojected is not None:
                at_projected = dprojected + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
                store(at_projected, tl.zeros_like(dh), in_batch[:, None] & (outputs < P)[None, :])

    if dh0 is not None:
        tl.store(dh0 + rows[:, None] * P + outputs[None, :], dh, mask=in_batch[:, None] & (outputs < P)[None, :])
    if dc0 is not None:
        tl.store(dc0 + rows[:, None] * H + units[None, :], dc, mask=in_batch[:, None] & (units < H)[None, :])
