"""The whole sequence in one launch, for hidden sizes whose recurrent weights stay on one multiprocessor.

A program takes BLOCK_B sequences through all steps. Its weights are loaded before the loop; the compiler keeps them in
shared memory. State and sums are float32; h is rounded to the data's dtype where it meets the weights. H is padded to
BLOCK_H, and P, the projected size (H without weight_hr), to BLOCK_P.
"""

import triton
import triton.language as tl
from fastrnn.kernels.cells import (
    dot,
    gru_output,
    gru_output_backward,
    load,
    rounded,
    sigmoid,
    store,
    tanh,
    zone_out,
    zone_out_backward,
)
from fastrnn.kernels.tiles import (
    advance,
    all_recurrent_terms,
    lengths_of,
    load_gates,
    load_state,
    load_vectors,
    normalize_backward,
    recurrent_terms,
    resets_at,
    retreat,
    row_of,
    state_before,
    store_gates,
    terms_backward,
)


@triton.jit
def _load_weights(weight, offsets, rows_per_gate, mask, GATES: tl.constexpr):
    found = ()
    for g in tl.static_range(GATES):
        found += (tl.load(weight + offsets + g * rows_per_gate, mask=mask, other=0.0),)
    return found


@triton.jit
def _products(fed, weights, like, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    found = ()
    for g in tl.static_range(COUNT):
        found += (dot(fed, weights[g], tl.zeros_like(like), PRECISION),)
    return found


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
    GATES: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    DATA: tl.constexpr = weight_hh.dtype.element_ty

    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    outputs = tl.arange(0, BLOCK_P)
    in_batch = rows < B
    valid = (units < H)[None, :]
    valid_y = (outputs < P)[None, :]
    own_lengths = lengths_of(lengths, rows, T, B)
    steps = tl.max(own_lengths)

    at_weights = units[None, :] * P + outputs[:, None]
    weights = _load_weights(weight_hh, at_weights, H * P, valid & (outputs < P)[:, None], GATES)
    if weight_hr is not None:
        at_projection = outputs[None, :] * H + units[:, None]
        projection = tl.load(weight_hr + at_projection, mask=valid_y & (units < H)[:, None], other=0.0)
    biases = load_vectors(bias_hh, units, H, GATES) if bias_hh is not None else None
    norm_weights = load_vectors(norm_weight, units, H, GATES) if norm_weight is not None else None
    norm_biases = load_vectors(norm_bias, units, H, GATES) if norm_bias is not None else None
    norm_c_weights = load_vectors(norm_c_weight, units, H, 1) if norm_c_weight is not None else None
    norm_c_biases = load_vectors(norm_c_bias, units, H, 1) if norm_c_bias is not None else None
    peepholes = load_vectors(peephole, units, H, 3) if peephole is not None else None
    h = load_state(h0, rows, outputs, B, P)
    c = load_state(c0, rows, units, B, H)
    if mask is not None:
        scale = load_state(mask, rows, outputs, B, P)

    for s in tl.range(0, steps, num_stages=LOAD_STAGES):
        t = steps - 1 - s if REVERSE else s
        live = t < own_lengths
        writes = in_batch if row_starts is None else live
        row = row_of(t, rows, row_starts, B, 1)
        at_x = row_of(t, rows, row_starts, x_t, x_b)[:, None] + units[None, :]
        x = load_gates(gates_x, at_x, H, live[:, None] & valid, GATES)

        if resets is not None:
            reset = resets_at(resets, reset_t, reset_b, t, rows, live)
            h = tl.where(reset, 0.0, h)
            c = tl.where(reset, 0.0, c)

        fed = h
        if mask is not None:
            fed = h * scale
        if CELL == "gru_reset_before":
            products = _products(rounded(fed, DATA), weights, x[0], 2, PRECISION)
            terms = recurrent_terms(
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
                2,
                0,
                3,
            )
            r = sigmoid(x[0] + terms[0])
            z = sigmoid(x[1] + terms[1])
            product = dot(rounded(r * fed, DATA), weights[2], tl.zeros_like(x[0]), PRECISION)
            terms = recurrent_terms(
                (product,),
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
                3,
            )
            n = tanh(x[2] + terms[0])
            if gates is not None:
                at_gates = row[:, None] * (3 * H) + units[None, :]
                store_gates(gates, at_gates, H, (r, z, n), live[:, None] & valid, 3)
            h_new = gru_output(z, n, h)
            c_new = c
        else:
            terms = all_recurrent_terms(
                _products(rounded(fed, DATA), weights, x[0], GATES, PRECISION),
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
                GATES,
            )
            h_new, c_new = advance(
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
                CELL,
            )

        if weight_hr is not None:
            m = rounded(h_new, DATA)
            if projected is not None:
                tl.store(projected + row[:, None] * H + units[None, :], m, mask=live[:, None] & valid)
            h_new = dot(m, projection, tl.zeros_like(h), PRECISION)
        h_new = zone_out(h_new, h, word_h, t, rows, outputs, probability, threshold, ZONEOUT)
        h = tl.where(live[:, None], h_new, h)
        at_y = y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
        store(at_y, tl.where(live[:, None], h, 0.0), writes[:, None] & valid_y)
        if CELL == "lstm":
            c_new = zone_out(c_new, c, word_c, t, rows, units, probability, threshold, ZONEOUT)
            c = tl.where(live[:, None], c_new, c)
            if c_all is not None:
                at_c = c_all + row_of(t, rows, row_starts, c_t, c_b)[:, None] + units[None, :]
                tl.store(at_c, tl.where(live[:, None], c, 0.0), mask=writes[:, None] & valid)

    if lengths is not None and row_starts is None:
        for t in range(steps, T):
            at_y = y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
            store(at_y, tl.zeros_like(h), in_batch[:, None] & valid_y)
            if c_all is not None:
                at_c = c_all + row_of(t, rows, row_starts, c_t, c_b)[:, None] + units[None, :]
                tl.store(at_c, tl.zeros_like(c), mask=in_batch[:, None] & valid)

    store(h_n + rows[:, None] * P + outputs[None, :], h, in_batch[:, None] & valid_y)
    if CELL == "lstm":
        store(c_n + rows[:, None] * H + units[None, :], c, in_batch[:, None] & valid)


@triton.jit(do_not_specialize=["T", "B", "threshold", "word_h", "word_c"])
def recurrence_backward(
    dy,
    dy_t,
    dy_b,
    dh_n,
    dc_n,
    dc_all,
    dc_all_t,
    dc_all_b,
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
    GATES: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    DATA: tl.constexpr = weight_hh.dtype.element_ty

    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    outputs = tl.arange(0, BLOCK_P)
    in_batch = rows < B
    valid = (units < H)[None, :]
    valid_y = (outputs < P)[None, :]
    own_lengths = lengths_of(lengths, rows, T, B)
    steps = tl.max(own_lengths)

    at_weights = units[:, None] * P + outputs[None, :]
    weights = _load_weights(weight_hh, at_weights, H * P, valid_y & (units < H)[:, None], GATES)
    if weight_hr is not None:
        at_projection = outputs[:, None] * H + units[None, :]
        projection = tl.load(weight_hr + at_projection, mask=valid & (outputs < P)[:, None], other=0.0)
    norm_weights = load_vectors(norm_weight, units, H, GATES) if norm_weight is not None else None
    norm_c_weights = load_vectors(norm_c_weight, units, H, 1) if norm_c_weight is not None else None
    norm_c_biases = load_vectors(norm_c_bias, units, H, 1) if norm_c_bias is not None else None
    peepholes = load_vectors(peephole, units, H, 3) if peephole is not None else None
    dh = load_state(dh_n, rows, outputs, B, P)
    dc = load_state(dc_n, rows, units, B, H)
    if mask is not None:
        scale = load_state(mask, rows, outputs, B, P)

    for s in tl.range(0, steps, num_stages=LOAD_STAGES):
        t = s if REVERSE else steps - 1 - s
        live = t < own_lengths
        writes = in_batch if row_starts is None else live
        row = row_of(t, rows, row_starts, B, 1)
        if resets is not None:
            reset = resets_at(resets, reset_t, reset_b, t, rows, live)

        dh_t = dh
        if dy is not None:
            at_dy = row_of(t, rows, row_starts, dy_t, dy_b)[:, None] + outputs[None, :]
            dh_t += load(dy + at_dy, live[:, None] & valid_y)
        dh_new, dh_old = zone_out_backward(dh_t, word_h, t, rows, outputs, probability, threshold, ZONEOUT)
        dh_new = tl.where(live[:, None], dh_new, 0.0)
        dh_old = tl.where(live[:, None], dh_old, dh)

        dm = dh_new
        if weight_hr is not None:
            to_project = rounded(dh_new, DATA)
            at_projected = dprojected + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
            tl.store(at_projected, to_project, mask=writes[:, None] & valid_y)
            dm = dot(to_project, projection, tl.zeros_like(dc), PRECISION)

        dc_new, dc_old, c_before, h_before = dc, dc, dc, dh
        if CELL == "lstm":
            c_before = state_before(c_all, c_t, c_b, c0, t, own_lengths, rows, row_starts, units, live, H, REVERSE)
            dc_t = dc
            if dc_all is not None:
                at_dc = row_of(t, rows, row_starts, dc_all_t, dc_all_b)[:, None] + units[None, :]
                dc_t += load(dc_all + at_dc, live[:, None] & valid)
            dc_new, dc_old = zone_out_backward(dc_t, word_c, t, rows, units, probability, threshold, ZONEOUT)
            dc_new = tl.where(live[:, None], dc_new, 0.0)
            dc_old = tl.where(live[:, None], dc_old, dc)
            if resets is not None:
                c_before = tl.where(reset, 0.0, c_before)
        elif GATES == 3:
            h_before = state_before(y, y_t, y_b, h0, t, own_lengths, rows, row_starts, units, live, H, REVERSE)
            if resets is not None:
                h_before = tl.where(reset, 0.0, h_before)

        if CELL == "gru_reset_before":
            at_gates = row[:, None] * (3 * H) + units[None, :]
            r, z, n = load_gates(gates, at_gates, H, live[:, None] & valid, 3)
            dz, dn, direct = gru_output_backward(z, n, h_before, dh_new)
            # The gradient of r needs that of r * h first.
            dn_product = dn
            if norm_weights is not None:
                unit = load_gates(normalized + 2 * H, at_gates, H, live[:, None] & valid, 1)
                deviation = tl.load(deviations + row * 2 + 1, mask=live, other=0.0)
                dn_product = normalize_backward((dn,), unit, deviation, (norm_weights[2],), valid, H, 0, 1)[0]
            drh = dot(rounded(dn_product, DATA), weights[2], tl.zeros_like(dh), PRECISION)
            fed = h_before
            if mask is not None:
                fed *= scale
            dgates = (drh * fed * r * (1.0 - r), dz, dn)
            dterms = dgates
        else:
            dgates, dterms, direct, dc_new = retreat(
                dm,
                dc_new,
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
                CELL,
                ZONEOUT,
            )
        dproducts = terms_backward(dterms, norm_weights, normalized, deviations, row, units, live, valid, H, GATES)

        at_x = row_of(t, rows, row_starts, dx_t, dx_b)[:, None] + units[None, :]
        store_gates(dgates_x, at_x, H, dgates, writes[:, None] & valid, GATES)
        if dproduct is not None:
            store_gates(dproduct, at_x, H, dproducts, writes[:, None] & valid, GATES)

        dfed = tl.zeros_like(dh)
        for g in tl.static_range(2 if CELL == "gru_reset_before" else GATES):
            dfed = dot(rounded(dproducts[g], DATA), weights[g], dfed, PRECISION)
        if CELL == "gru_reset_before":
            dfed += drh * r
        if mask is not None:
            dfed *= scale
        dh = dh_old + dfed
        if GATES == 3:
            dh += direct
        if CELL == "lstm":
            dc = dc_old + dc_new
        if resets is not None:
            dh = tl.where(reset, 0.0, dh)
            dc = tl.where(reset, 0.0, dc)

    if lengths is not None and row_starts is None:
        for t in range(steps, T):
            stored = in_batch[:, None] & valid
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
                store(at_projected, tl.zeros_like(dh), in_batch[:, None] & valid_y)

    if dh0 is not None:
        tl.store(dh0 + rows[:, None] * P + outputs[None, :], dh, mask=in_batch[:, None] & valid_y)
    if dc0 is not None:
        tl.store(dc0 + rows[:, None] * H + units[None, :], dc, mask=in_batch[:, None] & valid)
