"""One time step in one launch, or in several, for any hidden size.

A plain cell's step is one launch of `step_forward` or `step_backward`, product and gates together. Where all units of a
row must meet in between (layer norm, the reset gate before its product, a projection) the products come from `multiply`
and the rest of the step reads them. States pass from step to step as float32 [B, n].
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
def _products(
    a,
    a_rows,
    a_live,
    scale,
    rows,
    weight,
    w_n,
    w_k,
    w_gate,
    columns,
    N,
    K,
    GATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a [rows, K], times scale [B, K] where given, by the columns of each gate's weight; zero where a is None."""
    DATA: tl.constexpr = weight.dtype.element_ty
    sums = ()
    for _ in tl.static_range(GATES):
        sums += (tl.zeros((rows.shape[0], columns.shape[0]), tl.float32),)
    if a is not None:
        at_columns = columns.to(tl.int64)[None, :] * w_n
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            inside = a_live[:, None] & (k < K)[None, :]
            tile = tl.load(a + a_rows[:, None] + k[None, :], mask=inside, other=0.0)
            if scale is not None:
                tile = tile.to(tl.float32) * load(scale + rows[:, None] * K + k[None, :], inside)
            if tile.dtype != DATA:
                tile = rounded(tile, DATA)
            at = weight + at_columns + k.to(tl.int64)[:, None] * w_k
            found = ()
            for g in tl.static_range(GATES):
                part = tl.load(at + g * w_gate, mask=(k < K)[:, None] & (columns < N)[None, :], other=0.0)
                found += (dot(tile, part, sums[g], PRECISION),)
            sums = found
    return sums


@triton.jit
def _tile(width, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program."""
    across = tl.cdiv(width, BLOCK_N)
    rows = (tl.program_id(0) // across).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return rows, (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["t", "T", "B"])
def multiply(
    a,
    a_t,
    a_b,
    scale,
    weight,
    w_n,
    w_k,
    lengths,
    row_starts,
    resets,
    reset_t,
    reset_b,
    out,
    t,
    T,
    B,
    N,
    K,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [B, N] = the rows of step t of a, times scale, by weight; zero where a row does not live or is reset."""
    rows, columns = _tile(N, BLOCK_B, BLOCK_N)
    live = t < lengths_of(lengths, rows, T, B)
    if resets is not None:
        live = live & (tl.load(resets + tl.cast(t, tl.int64) * reset_t + rows * reset_b, mask=live, other=0) == 0)
    a_rows = row_of(t, rows, row_starts, a_t, a_b)
    sums = _products(a, a_rows, live, scale, rows, weight, w_n, w_k, 0, columns, N, K, 1, BLOCK_K, PRECISION)
    tl.store(out + rows[:, None] * N + columns[None, :], sums[0], mask=(rows < B)[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["t", "T", "B", "threshold", "word_h", "word_c"])
def step_forward(
    gates_x,
    x_t,
    x_b,
    x,
    x_row,
    weight_ih,
    bias_ih,
    product,
    weight_hh,
    bias_hh,
    norm_weight,
    norm_bias,
    norm_c_weight,
    norm_c_bias,
    peephole,
    h_in,
    c_in,
    lengths,
    row_starts,
    resets,
    reset_t,
    reset_b,
    mask,
    y,
    y_t,
    y_b,
    h_out,
    c_out,
    c_all,
    c_t,
    c_b,
    gates,
    normalized,
    deviations,
    normalized_c,
    deviations_c,
    projected,
    rh,
    t,
    T,
    B,
    H,
    P,
    I,
    probability,
    threshold,
    word_h,
    word_c,
    CELL: tl.constexpr,
    STAGE: tl.constexpr,
    KEEP: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The step t of all units. With `product` [B, gates of the stage * H] given it is not computed here.

    STAGE of gru_reset_before: 1 finds r, z and what is multiplied next, rh; 2 the rest. 0 of all other cells. KEEP:
    what is saved is so for all steps, else it is scratch of this one. With `projected` the product with weight_hr and
    h are left to `multiply` and `project_forward`.
    """
    GATES: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    MULTIPLIED: tl.constexpr = GATES if STAGE == 0 else 2 if STAGE == 1 else 1
    rows, units = _tile(H, BLOCK_B, BLOCK_N)
    in_batch = rows < B
    valid = (units < H)[None, :]
    live = t < lengths_of(lengths, rows, T, B)
    writes = in_batch if row_starts is None else live
    inside = live[:, None] & valid
    row = row_of(t, rows, row_starts, B, 1) if KEEP else rows
    kept = live
    h = load_state(h_in, rows, units, B, H) if projected is None else tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    c = load_state(c_in, rows, units, B, H)
    if resets is not None:
        reset = resets_at(resets, reset_t, reset_b, t, rows, live)
        h = tl.where(reset, 0.0, h)
        c = tl.where(reset, 0.0, c)
        kept = live & (tl.sum(reset.to(tl.int32), 1) == 0)

    if gates_x is not None:
        at_x = row_of(t, rows, row_starts, x_t, x_b)[:, None] + units[None, :]
        from_x = load_gates(gates_x, at_x, H, inside, GATES)
    else:
        from_x = _products(
            x, rows * x_row, live, None, rows, weight_ih, I, 1, H * I, units, H, I, GATES, BLOCK_K, PRECISION
        )
        if bias_ih is not None:
            shifts = load_vectors(bias_ih, units, H, GATES)
            shifted = ()
            for g in tl.static_range(GATES):
                shifted += (from_x[g] + shifts[g],)
            from_x = shifted
    if product is not None:
        at_product = rows[:, None] * (MULTIPLIED * H) + units[None, :]
        products = load_gates(product, at_product, H, in_batch[:, None] & valid, MULTIPLIED)
    else:
        products = _products(
            h_in, rows * P, kept, mask, rows, weight_hh, P, 1, H * P, units, H, P, GATES, BLOCK_K, PRECISION
        )

    biases = load_vectors(bias_hh, units, H, GATES) if bias_hh is not None else None
    norm_weights = load_vectors(norm_weight, units, H, GATES) if norm_weight is not None else None
    norm_biases = load_vectors(norm_bias, units, H, GATES) if norm_bias is not None else None
    norm_c_weights = load_vectors(norm_c_weight, units, H, 1) if norm_c_weight is not None else None
    norm_c_biases = load_vectors(norm_c_bias, units, H, 1) if norm_c_bias is not None else None
    peepholes = load_vectors(peephole, units, H, 3) if peephole is not None else None
    if STAGE == 1:
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
        r = sigmoid(from_x[0] + terms[0])
        z = sigmoid(from_x[1] + terms[1])
        store_gates(gates, row[:, None] * (3 * H) + units[None, :], H, (r, z), inside, 2)
        fed = h
        if mask is not None:
            fed *= load_state(mask, rows, units, B, H)
        store(rh + rows[:, None] * H + units[None, :], r * fed, in_batch[:, None] & valid)
    else:
        if STAGE == 2:
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
                2,
                1,
                1,
                3,
            )
            n = tanh(from_x[2] + terms[0])
            at_gates = gates + row[:, None] * (3 * H) + units[None, :]
            store(at_gates + 2 * H, n, inside)
            h_new = gru_output(load(at_gates + H, inside), n, h)
            c_new = c
        else:
            terms = all_recurrent_terms(
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
                GATES,
            )
            h_new, c_new = advance(
                from_x,
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

        at_state = rows[:, None] * H + units[None, :]
        if projected is not None:
            store(projected + row[:, None] * H + units[None, :], h_new, inside)
        else:
            h_new = zone_out(h_new, h, word_h, t, rows, units, probability, threshold, ZONEOUT)
            store(h_out + at_state, tl.where(live[:, None], h_new, h), in_batch[:, None] & valid)
            if y is not None:
                at_y = y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + units[None, :]
                store(at_y, tl.where(live[:, None], h_new, 0.0), writes[:, None] & valid)
        if CELL == "lstm":
            c_new = zone_out(c_new, c, word_c, t, rows, units, probability, threshold, ZONEOUT)
            store(c_out + at_state, tl.where(live[:, None], c_new, c), in_batch[:, None] & valid)
            if c_all is not None:
                at_c = c_all + row_of(t, rows, row_starts, c_t, c_b)[:, None] + units[None, :]
                tl.store(at_c, tl.where(live[:, None], c_new, 0.0), mask=writes[:, None] & valid)


@triton.jit(do_not_specialize=["t", "T", "B", "threshold", "word_h"])
def project_forward(
    product,
    h_in,
    lengths,
    row_starts,
    resets,
    reset_t,
    reset_b,
    y,
    y_t,
    y_b,
    h_out,
    t,
    T,
    B,
    P,
    probability,
    threshold,
    word_h,
    ZONEOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h of step t from W_hr m: product [B, P]."""
    rows, outputs = _tile(P, BLOCK_B, BLOCK_N)
    live = t < lengths_of(lengths, rows, T, B)
    writes = rows < B if row_starts is None else live
    valid = (outputs < P)[None, :]
    h = load_state(h_in, rows, outputs, B, P)
    if resets is not None:
        h = tl.where(resets_at(resets, reset_t, reset_b, t, rows, live), 0.0, h)
    h_new = load_state(product, rows, outputs, B, P)
    h_new = zone_out(h_new, h, word_h, t, rows, outputs, probability, threshold, ZONEOUT)
    at_state = h_out + rows[:, None] * P + outputs[None, :]
    store(at_state, tl.where(live[:, None], h_new, h), (rows < B)[:, None] & valid)
    at_y = y + row_of(t, rows, row_starts, y_t, y_b)[:, None] + outputs[None, :]
    store(at_y, tl.where(live[:, None], h_new, 0.0), writes[:, None] & valid)


@triton.jit
def _arriving(direct, dfed, mask, resets, reset_t, reset_b, next_t, rows, columns, next_live, B, width):
    """Gradient of h_t, but for what y_t has: of the step that follows it, next_t, and W_hh's part `dfed` of that."""
    dh = load_state(direct, rows, columns, B, width)
    if dfed is not None:
        if mask is not None:
            dfed *= load_state(mask, rows, columns, B, width)
        if resets is not None:
            dfed = tl.where(resets_at(resets, reset_t, reset_b, next_t, rows, next_live), 0.0, dfed)
        dh += dfed
    return dh


@triton.jit(do_not_specialize=["t", "T", "B", "threshold", "word_h"])
def project_backward(
    dfed,
    direct,
    dy,
    dy_t,
    dy_b,
    lengths,
    row_starts,
    resets,
    reset_t,
    reset_b,
    mask,
    dprojected,
    p_t,
    p_b,
    direct_out,
    t,
    T,
    B,
    P,
    probability,
    threshold,
    word_h,
    REVERSE: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of W_hr m at step t, and what of that of h_t passes by the cell."""
    rows, outputs = _tile(P, BLOCK_B, BLOCK_N)
    own_lengths = lengths_of(lengths, rows, T, B)
    live = t < own_lengths
    writes = rows < B if row_starts is None else live
    valid = (outputs < P)[None, :]
    next_t = t - 1 if REVERSE else t + 1
    given = load_state(dfed, rows, outputs, B, P) if dfed is not None else None
    dh = _arriving(direct, given, mask, resets, reset_t, reset_b, next_t, rows, outputs, next_t < own_lengths, B, P)
    dh_t = dh
    if dy is not None:
        dh_t += load(dy + row_of(t, rows, row_starts, dy_t, dy_b)[:, None] + outputs[None, :], live[:, None] & valid)
    dh_new, dh_old = zone_out_backward(dh_t, word_h, t, rows, outputs, probability, threshold, ZONEOUT)
    at = dprojected + row_of(t, rows, row_starts, p_t, p_b)[:, None] + outputs[None, :]
    store(at, tl.where(live[:, None], dh_new, 0.0), writes[:, None] & valid)
    dh = tl.where(live[:, None], dh_old, dh)
    if resets is not None:
        dh = tl.where(resets_at(resets, reset_t, reset_b, t, rows, live), 0.0, dh)
    store(direct_out + rows[:, None] * P + outputs[None, :], dh, (rows < B)[:, None] & valid)


@triton.jit(do_not_specialize=["t", "T", "B", "threshold", "word_h", "word_c"])
def step_backward(
    dy,
    dy_t,
    dy_b,
    dc_all,
    dc_all_t,
    dc_all_b,
    following,
    dfed,
    dm,
    drh,
    direct,
    dc,
    weight_hh,
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
    dnormed_c,
    direct_out,
    dc_out,
    t,
    T,
    B,
    H,
    P,
    probability,
    threshold,
    word_h,
    word_c,
    CELL: tl.constexpr,
    STAGE: tl.constexpr,
    REVERSE: tl.constexpr,
    ZONEOUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Step t of all units, from what the step that follows it left: `direct`, the gradient of h_t but for W_hh's part.

    That part is the product of `following` (dproduct, of which the row of the step that follows is taken) and
    weight_hh, or is given as `dfed` [B, H]; with a projection the gradient of m is given as `dm` [B, H] instead of all
    these. STAGE of gru_reset_before: 1 finds the gradients of z and n; 2, given `drh`, that of r, and adds to direct.
    """
    GATES: tl.constexpr = 4 if CELL == "lstm" else 3 if CELL == "gru" or CELL == "gru_reset_before" else 1
    rows, units = _tile(H, BLOCK_B, BLOCK_N)
    in_batch = rows < B
    valid = (units < H)[None, :]
    own_lengths = lengths_of(lengths, rows, T, B)
    live = t < own_lengths
    writes = in_batch if row_starts is None else live
    inside = live[:, None] & valid
    stored = writes[:, None] & valid
    row = row_of(t, rows, row_starts, B, 1)
    at_x = row_of(t, rows, row_starts, dx_t, dx_b)[:, None] + units[None, :]
    at_state = rows[:, None] * H + units[None, :]
    if resets is not None:
        reset = resets_at(resets, reset_t, reset_b, t, rows, live)
    norm_weights = load_vectors(norm_weight, units, H, GATES) if norm_weight is not None else None
    norm_c_weights = load_vectors(norm_c_weight, units, H, 1) if norm_c_weight is not None else None
    norm_c_biases = load_vectors(norm_c_bias, units, H, 1) if norm_c_bias is not None else None
    peepholes = load_vectors(peephole, units, H, 3) if peephole is not None else None

    h_before = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if GATES == 3:
        h_before = state_before(y, y_t, y_b, h0, t, own_lengths, rows, row_starts, units, live, H, REVERSE)
        if resets is not None:
            h_before = tl.where(reset, 0.0, h_before)

    if STAGE == 2:
        r = load(gates + row[:, None] * (3 * H) + units[None, :], inside)
        given = tl.where(live[:, None], load_state(drh, rows, units, B, H), 0.0)
        passed = given * r
        dr = given * h_before * r * (1.0 - r)
        if mask is not None:
            scale = load_state(mask, rows, units, B, H)
            dr *= scale
            passed *= scale
        store(dgates_x + at_x, dr, stored)
        if norm_weights is not None:
            dz = load(dgates_x + at_x + H, inside)
            unit = load_gates(normalized, row[:, None] * (3 * H) + units[None, :], H, inside, 2)
            deviation = tl.load(deviations + row * 2, mask=live, other=0.0)
            dproducts = normalize_backward((dr, dz), unit, deviation, norm_weights, valid, H, 0, 2)
            store_gates(dproduct, at_x, H, dproducts, stored, 2)
        if resets is not None:
            passed = tl.where(reset, 0.0, passed)
        at_direct = direct_out + at_state
        tl.store(at_direct, load(at_direct, in_batch[:, None] & valid) + passed, mask=in_batch[:, None] & valid)
    else:
        if dm is not None:
            dh_new = tl.where(live[:, None], load_state(dm, rows, units, B, H), 0.0)
        else:
            next_t = t - 1 if REVERSE else t + 1
            next_live = next_t < own_lengths
            given = None
            if dfed is not None:
                given = load_state(dfed, rows, units, B, H)
            elif following is not None:
                next_rows = row_of(next_t, rows, row_starts, dx_t, dx_b)
                given = _products(
                    following,
                    next_rows,
                    next_live,
                    None,
                    rows,
                    weight_hh,
                    1,
                    P,
                    0,
                    units,
                    H,
                    GATES * H,
                    1,
                    BLOCK_K,
                    PRECISION,
                )[0]
            dh = _arriving(direct, given, mask, resets, reset_t, reset_b, next_t, rows, units, next_live, B, H)
            dh_t = dh
            if dy is not None:
                dh_t += load(dy + row_of(t, rows, row_starts, dy_t, dy_b)[:, None] + units[None, :], inside)
            dh_new, dh_old = zone_out_backward(dh_t, word_h, t, rows, units, probability, threshold, ZONEOUT)
            dh_new = tl.where(live[:, None], dh_new, 0.0)
            dh_old = tl.where(live[:, None], dh_old, dh)

        c_before, dc_new = h_before, h_before
        if CELL == "lstm":
            c_before = state_before(c_all, c_t, c_b, c0, t, own_lengths, rows, row_starts, units, live, H, REVERSE)
            if resets is not None:
                c_before = tl.where(reset, 0.0, c_before)
            dc_passed = load_state(dc, rows, units, B, H)
            dc_t = dc_passed
            if dc_all is not None:
                at_dc = row_of(t, rows, row_starts, dc_all_t, dc_all_b)[:, None] + units[None, :]
                dc_t += load(dc_all + at_dc, inside)
            dc_new, dc_old = zone_out_backward(dc_t, word_c, t, rows, units, probability, threshold, ZONEOUT)
            dc_new = tl.where(live[:, None], dc_new, 0.0)
            dc_old = tl.where(live[:, None], dc_old, dc_passed)

        if STAGE == 1:
            z, n = load_gates(gates + H, row[:, None] * (3 * H) + units[None, :], H, inside, 2)
            dz, dn, from_cell = gru_output_backward(z, n, h_before, dh_new)
            store_gates(dgates_x + H, at_x, H, (dz, dn), stored, 2)
            if norm_weights is not None:
                unit = load_gates(normalized + 2 * H, row[:, None] * (3 * H) + units[None, :], H, inside, 1)
                deviation = tl.load(deviations + row * 2 + 1, mask=live, other=0.0)
                dn_product = normalize_backward((dn,), unit, deviation, (norm_weights[2],), valid, H, 0, 1)[0]
                store(dproduct + at_x + 2 * H, dn_product, stored)
        else:
            dgates, dterms, from_cell, dc_new = retreat(
                dh_new,
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
            store_gates(dgates_x, at_x, H, dgates, stored, GATES)
            if dproduct is not None:
                dproducts = terms_backward(
                    dterms, norm_weights, normalized, deviations, row, units, live, valid, H, GATES
                )
                store_gates(dproduct, at_x, H, dproducts, stored, GATES)

        if dm is None:
            dh_old += from_cell
            if resets is not None:
                dh_old = tl.where(reset, 0.0, dh_old)
            tl.store(direct_out + at_state, dh_old, mask=in_batch[:, None] & valid)
        if CELL == "lstm":
            dc_passed = dc_old + dc_new
            if resets is not None:
                dc_passed = tl.where(reset, 0.0, dc_passed)
            tl.store(dc_out + at_state, dc_passed, mask=in_batch[:, None] & valid)
