"""Attention of queries over the keys and values of a memory: scores, weights and contexts, and all gradients.

There are B memories, each with Tq queries, Tk keys and as many values. Tensors of vectors have strides of b and of
their rows, and unit stride of their columns. What belongs to pairs of query and key is float32 [B, Tq, Tk] without
gaps, but for `features` [B, Tq, Tk, C] of any type with strides. Absent options are None.

Scores of unseen keys may hold anything, or be missing: whoever reads them masks them. Gradients of scores are exactly
zero there, and a pair whose gradient is zero contributes nothing, whatever its key, value and features hold.
"""

import triton
import triton.language as tl
from fastrnn.kernels.cells import dot, load, rounded, store, tanh

LOWEST = tl.constexpr(-3.4028234663852886e38)
LARGEST_EXPONENT = tl.constexpr(87.0)  # as in fastrnn.backends.attention.call


@triton.jit
def rows_of(pointer, stride_b, stride_row, b, rows):
    """Where the vectors of these rows of memory b begin."""
    return pointer + b * stride_b + rows.to(tl.int64) * stride_row


@triton.jit
def load_tile(rows, columns, live, width):
    """[rows, columns] as the data's type, zero where a row is not live and beyond the width."""
    return tl.load(rows[:, None] + columns[None, :], mask=live[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def end_of_keys(lengths, b, first, Tk, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr):
    """From where on no query of the tile that begins at `first` sees a key of memory b."""
    end = Tk
    if lengths is not None:
        end = tl.minimum(tl.maximum(tl.load(lengths + b), 0), Tk).to(tl.int32)
    if CAUSAL:
        end = tl.minimum(end, first + BLOCK_Q)
    return end


@triton.jit
def seen_pairs(mask, mask_b, mask_q, mask_k, b, queries, keys, Tq, end, CAUSAL: tl.constexpr):
    """Whether the query sees the key: bool [queries, keys]."""
    seen = (queries < Tq)[:, None] & (keys < end)[None, :]
    if CAUSAL:
        seen = seen & (keys[None, :] <= queries[:, None])
    if mask is not None:
        at = rows_of(mask, mask_b, mask_q, b, queries)[:, None] + keys.to(tl.int64)[None, :] * mask_k
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    return seen


@triton.jit
def any_of_rows(tile):
    """For each column of a bool tile, whether a row has it."""
    return tl.max(tile.to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_inner_scores(
    query,
    query_b,
    query_t,
    keys,
    keys_b,
    keys_s,
    lengths,
    scores,
    scale,
    Tq,
    Tk,
    D,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale <q_t, k_s>."""
    program, key_tiles, query_tiles = tl.program_id(0), tl.cdiv(Tk, BLOCK_K), tl.cdiv(Tq, BLOCK_Q)
    b = (program // key_tiles // query_tiles).to(tl.int64)
    first = program // key_tiles % query_tiles * BLOCK_Q
    first_key = program % key_tiles * BLOCK_K
    if first_key < end_of_keys(lengths, b, first, Tk, CAUSAL, BLOCK_Q):
        t, s = first + tl.arange(0, BLOCK_Q), first_key + tl.arange(0, BLOCK_K)
        query_rows, key_rows = rows_of(query, query_b, query_t, b, t), rows_of(keys, keys_b, keys_s, b, s)
        sums = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            q = load_tile(query_rows, d, t < Tq, D)
            k = tl.load(key_rows[None, :] + d[:, None], mask=(d < D)[:, None] & (s < Tk)[None, :], other=0.0)
            sums = dot(q, k, sums, PRECISION)
        at = rows_of(scores, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)[:, None] + s[None, :]
        tl.store(at, sums * scale, mask=(t < Tq)[:, None] & (s < Tk)[None, :])


@triton.jit
def feature_terms(rows, live, feature_weight, d, D, C, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr):
    """F f: float32 [rows, d]. rows: where the features of each pair begin."""
    sums = tl.zeros((rows.shape[0], d.shape[0]), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        f = load_tile(rows, c, live, C)
        weight = tl.load(
            feature_weight + d[None, :] * C + c[:, None], mask=(d < D)[None, :] & (c < C)[:, None], other=0.0
        )
        sums = dot(f, weight, sums, PRECISION)
    return sums


@triton.jit
def exponential(x):
    """e^x to the last digits, for |x| <= 87. A GPU's own loses as many digits as x has before its point."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, the first one of few digits, as in Cephes
    return tl.exp2(n) * tl.exp(rest)


@triton.jit
def sums_of_tanh(
    query,
    query_b,
    query_t,
    keys,
    keys_b,
    keys_s,
    v,
    features,
    features_b,
    features_t,
    features_s,
    feature_weight,
    b,
    first,
    first_key,
    Tq,
    end,
    D,
    C,
    FACTORS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """v . tanh(q_t + k_s + F f_ts): float32 [BLOCK_Q, BLOCK_K]. FACTORS: `keys` holds e^{2k}, without features.

    NaN where a factor is out of range.
    """
    t, s = first + tl.arange(0, BLOCK_Q), first_key + tl.arange(0, BLOCK_K)
    query_rows, key_rows = rows_of(query, query_b, query_t, b, t), rows_of(keys, keys_b, keys_s, b, s)
    # Summed over the columns at the end only: a sum within the loop would be one across threads each time.
    sums = tl.zeros((BLOCK_Q, BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = load_tile(query_rows, d, t < Tq, D).to(tl.float32)
        k = load_tile(key_rows, d, s < end, D).to(tl.float32)
        weight = load(v + d, d < D)[None, None, :]
        if FACTORS:
            q = tl.where(tl.abs(2.0 * q) <= LARGEST_EXPONENT, exponential(2.0 * q), float("nan"))
            sums += weight * (1.0 - 2.0 / (1.0 + q[:, None, :] * k[None, :, :]))
        else:
            summed = q[:, None, :] + k[None, :, :]
            if features is not None:
                pair = tl.arange(0, BLOCK_Q * BLOCK_K)
                pair_t, pair_s = first + pair // BLOCK_K, first_key + pair % BLOCK_K
                rows = rows_of(features, features_b, features_t, b, pair_t) + pair_s.to(tl.int64) * features_s
                live = (pair_t < Tq) & (pair_s < end)
                terms = feature_terms(rows, live, feature_weight, d, D, C, BLOCK_C, PRECISION)
                summed += tl.reshape(terms, (BLOCK_Q, BLOCK_K, BLOCK_D))
            sums += weight * tanh(summed)
    return tl.sum(sums, 2)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_additive_scores(
    query,
    query_b,
    query_t,
    keys,
    keys_b,
    keys_s,
    v,
    features,
    features_b,
    features_t,
    features_s,
    feature_weight,
    factors,
    factors_b,
    factors_s,
    lengths,
    scores,
    Tq,
    Tk,
    D,
    C,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """v . tanh(q_t + k_s + F f_ts), in which tanh(q + k) = 1 - 2 / (1 + e^{2q} e^{2k}) where there are factors."""
    program, key_tiles, query_tiles = tl.program_id(0), tl.cdiv(Tk, BLOCK_K), tl.cdiv(Tq, BLOCK_Q)
    b = (program // key_tiles // query_tiles).to(tl.int64)
    first = program // key_tiles % query_tiles * BLOCK_Q
    first_key = program % key_tiles * BLOCK_K
    end = end_of_keys(lengths, b, first, Tk, CAUSAL, BLOCK_Q)
    if first_key < end:
        t, s = first + tl.arange(0, BLOCK_Q), first_key + tl.arange(0, BLOCK_K)
        inside = (t < Tq)[:, None] & (s < end)[None, :]
        if factors is not None:
            found = sums_of_tanh(
                query,
                query_b,
                query_t,
                factors,
                factors_b,
                factors_s,
                v,
                None,
                0,
                0,
                0,
                None,
                b,
                first,
                first_key,
                Tq,
                end,
                D,
                C,
                True,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
                BLOCK_C,
                PRECISION,
            )
            lost = inside & (found != found)
            if tl.max(lost.to(tl.int32)) > 0:
                exact = sums_of_tanh(
                    query,
                    query_b,
                    query_t,
                    keys,
                    keys_b,
                    keys_s,
                    v,
                    None,
                    0,
                    0,
                    0,
                    None,
                    b,
                    first,
                    first_key,
                    Tq,
                    end,
                    D,
                    C,
                    False,
                    BLOCK_Q,
                    BLOCK_K,
                    BLOCK_D,
                    BLOCK_C,
                    PRECISION,
                )
                # Only these, so that a score does not depend on its neighbours.
                found = tl.where(lost, exact, found)
        else:
            found = sums_of_tanh(
                query,
                query_b,
                query_t,
                keys,
                keys_b,
                keys_s,
                v,
                features,
                features_b,
                features_t,
                features_s,
                feature_weight,
                b,
                first,
                first_key,
                Tq,
                end,
                D,
                C,
                False,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
                BLOCK_C,
                PRECISION,
            )
        at = rows_of(scores, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)[:, None] + s[None, :]
        tl.store(at, found, mask=inside)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_context(
    scores,
    values,
    values_b,
    values_s,
    lengths,
    mask,
    mask_b,
    mask_q,
    mask_k,
    weights,
    context,
    Tq,
    Tk,
    N,
    CAUSAL: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights, and BLOCK_N columns of the contexts [B, Tq, N], in two passes over the scores."""
    program, column_tiles, query_tiles = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(Tq, BLOCK_Q)
    b = (program // column_tiles // query_tiles).to(tl.int64)
    first = program // column_tiles % query_tiles * BLOCK_Q
    first_column = program % column_tiles * BLOCK_N
    t, n = first + tl.arange(0, BLOCK_Q), first_column + tl.arange(0, BLOCK_N)
    pair_rows = rows_of(scores, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)
    weight_rows = rows_of(weights, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)
    end = end_of_keys(lengths, b, first, Tk, CAUSAL, BLOCK_Q)
    written = tl.where(first_column == 0, Tk, 0)  # The first of the programs that compute them writes the weights.

    largest = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, end, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        seen = seen_pairs(mask, mask_b, mask_q, mask_k, b, t, s, Tq, end, CAUSAL)
        if SOFTMAX:
            score = tl.load(pair_rows[:, None] + s[None, :], mask=seen, other=float("-inf"))
            before = largest
            largest = tl.maximum(largest, tl.max(score, 1))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(score - largest[:, None]), 1)
        else:
            total += tl.sum(seen.to(tl.float32), 1)

    sums = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for start in range(0, end, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        seen = seen_pairs(mask, mask_b, mask_q, mask_k, b, t, s, Tq, end, CAUSAL)
        score = tl.load(pair_rows[:, None] + s[None, :], mask=seen, other=float("-inf"))
        if SOFTMAX:
            score = tl.exp(score - largest[:, None])
        weight = tl.where(seen, score / total[:, None], 0.0)
        tl.store(weight_rows[:, None] + s[None, :], weight, mask=(t < Tq)[:, None] & (s < written)[None, :])
        # Values that no query of the tile sees may be NaN.
        value = load_tile(rows_of(values, values_b, values_s, b, s), n, any_of_rows(seen), N)
        sums = dot(rounded(weight, values.dtype.element_ty), value, sums, PRECISION)
    store(
        rows_of(context, tl.cast(Tq, tl.int64) * N, N, b, t)[:, None] + n[None, :],
        sums,
        (t < Tq)[:, None] & (n < N)[None, :],
    )
    for start in range(tl.cdiv(end, BLOCK_K) * BLOCK_K, written, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        tl.store(weight_rows[:, None] + s[None, :], nothing, mask=(t < Tq)[:, None] & (s < Tk)[None, :])


@triton.jit
def weight_gradient(dproduct_rows, dweight_rows, s, seen):
    """Gradient of the weights [queries, keys], from those of context and weights."""
    found = tl.zeros(seen.shape, tl.float32)
    if dproduct_rows is not None:
        found += load(dproduct_rows[:, None] + s[None, :], seen)
    if dweight_rows is not None:
        found += load(dweight_rows[:, None] + s[None, :], seen)
    return found


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_score_gradients(
    dproducts,
    dweights,
    dweights_b,
    dweights_t,
    weights,
    lengths,
    mask,
    mask_b,
    mask_q,
    mask_k,
    dscores,
    Tq,
    Tk,
    CAUSAL: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of the scores. dproducts: <dcontext_t, value_s>, scores in their unseen keys; may be dscores itself."""
    program, query_tiles = tl.program_id(0), tl.cdiv(Tq, BLOCK_Q)
    b = (program // query_tiles).to(tl.int64)
    first = program % query_tiles * BLOCK_Q
    t = first + tl.arange(0, BLOCK_Q)
    weight_rows = rows_of(weights, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)
    dscore_rows = rows_of(dscores, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)
    dproduct_rows = None
    if dproducts is not None:
        dproduct_rows = rows_of(dproducts, tl.cast(Tq, tl.int64) * Tk, Tk, b, t)
    dweight_rows = None
    if dweights is not None:
        dweight_rows = rows_of(dweights, dweights_b, dweights_t, b, t)
    end = end_of_keys(lengths, b, first, Tk, CAUSAL, BLOCK_Q)

    total = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, end, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        seen = seen_pairs(mask, mask_b, mask_q, mask_k, b, t, s, Tq, end, CAUSAL)
        if SOFTMAX:
            weight = load(weight_rows[:, None] + s[None, :], seen)
            total += tl.sum(weight * weight_gradient(dproduct_rows, dweight_rows, s, seen), 1)
        else:
            total += tl.sum(seen.to(tl.float32), 1)
    for start in range(0, end, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        seen = seen_pairs(mask, mask_b, mask_q, mask_k, b, t, s, Tq, end, CAUSAL)
        gradient = weight_gradient(dproduct_rows, dweight_rows, s, seen)
        if SOFTMAX:
            gradient = load(weight_rows[:, None] + s[None, :], seen) * (gradient - total[:, None])
        else:
            gradient = gradient / total[:, None]
        gradient = tl.where(seen, gradient, 0.0)
        tl.store(dscore_rows[:, None] + s[None, :], gradient, mask=(t < Tq)[:, None] & (s < Tk)[None, :])
    for start in range(tl.cdiv(end, BLOCK_K) * BLOCK_K, Tk, BLOCK_K):
        s = start + tl.arange(0, BLOCK_K)
        nothing = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        tl.store(dscore_rows[:, None] + s[None, :], nothing, mask=(t < Tq)[:, None] & (s < Tk)[None, :])


@triton.jit(do_not_specialize=["rows", "inner"])
def attention_product(
    pairs,
    pairs_b,
    pairs_i,
    pairs_j,
    vectors,
    vectors_b,
    vectors_j,
    lengths,
    added,
    out,
    scale,
    rows,
    inner,
    N,
    OF_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out [B, rows, N] = scale sum_j pairs_ij vectors_j + added, which is float32.

    OF_KEYS: the rows i are keys and j queries, else the other way round.
    """
    program, column_tiles, row_tiles = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(rows, BLOCK_I)
    b = (program // column_tiles // row_tiles).to(tl.int64)
    first = program // column_tiles % row_tiles * BLOCK_I
    i = first + tl.arange(0, BLOCK_I)
    n = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    pair_rows = rows_of(pairs, pairs_b, pairs_i, b, i)
    if OF_KEYS:
        end = tl.where(first < end_of_keys(lengths, b, 0, rows, False, 0), inner, 0)
        begin = first // BLOCK_J * BLOCK_J if CAUSAL else 0
    else:
        end = end_of_keys(lengths, b, first, inner, CAUSAL, BLOCK_I)
        begin = 0
    sums = tl.zeros((BLOCK_I, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        at = pair_rows[:, None] + j.to(tl.int64)[None, :] * pairs_j
        pair = tl.load(at, mask=(i < rows)[:, None] & (j < inner)[None, :], other=0.0)
        vector = load_tile(rows_of(vectors, vectors_b, vectors_j, b, j), n, any_of_rows(pair != 0.0), N)
        sums = dot(rounded(pair, vectors.dtype.element_ty), vector, sums, PRECISION)
    sums *= scale
    offsets = (b * rows + i)[:, None] * N + n[None, :]
    inside = (i < rows)[:, None] & (n < N)[None, :]
    if added is not None:
        sums += tl.load(added + offsets, mask=inside, other=0.0)
    store(out + offsets, sums, inside)


@triton.jit
def tanh_of_pairs(
    q,
    k,
    features,
    features_b,
    features_t,
    features_s,
    feature_weight,
    b,
    t,
    s,
    live,
    d,
    D,
    C,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """tanh(q + k_s + F f_ts) of one query: float32 [s, d]."""
    summed = q[None, :] + k
    if features is not None:
        rows = rows_of(features + t * features_t, features_b, features_s, b, s)
        summed += feature_terms(rows, live, feature_weight, d, D, C, BLOCK_C, PRECISION)
    return tanh(summed)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_additive_backward(
    dscores,
    query,
    query_b,
    query_t,
    keys,
    keys_b,
    keys_s,
    v,
    features,
    features_b,
    features_t,
    features_s,
    feature_weight,
    lengths,
    added,
    dkeys,
    dquery_parts,
    dv_parts,
    dfeature_weight_parts,
    Tq,
    Tk,
    D,
    C,
    CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dkeys [B, Tk, D], to which `added`, float32, is added; float32 sums over the keys of a tile alone of the rest.

    dquery_parts [B, tiles, Tq, D], dv_parts [B, tiles, D], dfeature_weight_parts [B, tiles, D, C]; each may be None.
    """
    program, column_tiles, key_tiles = tl.program_id(0), tl.cdiv(D, BLOCK_D), tl.cdiv(Tk, BLOCK_K)
    # With more features than fit into a tile of dfeature_weight everything is computed again for each tile.
    feature_tiles = 1 if dfeature_weight_parts is None else tl.cdiv(C, BLOCK_C)
    first_feature = program % feature_tiles * BLOCK_C
    program = program // feature_tiles
    d = program % column_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = (program // column_tiles).to(tl.int64)  # of all memories
    b = tile // key_tiles
    first_key = (tile % key_tiles).to(tl.int32) * BLOCK_K
    s = first_key + tl.arange(0, BLOCK_K)
    begin = first_key if CAUSAL else 0
    begin = tl.where(first_key < end_of_keys(lengths, b, 0, Tk, False, 0), begin, Tq)  # the first query that sees them
    D_once = tl.where(first_feature == 0, D, 0)  # of what does not depend on the features' tile

    k = load_tile(rows_of(keys, keys_b, keys_s, b, s), d, s < Tk, D).to(tl.float32)
    weight = load(v + d, d < D)
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    if dfeature_weight_parts is not None:
        dfeature_weight = tl.zeros((BLOCK_D, BLOCK_C), tl.float32)
    if dquery_parts is not None:
        for step in range(0, begin):
            at = dquery_parts + (tile * Tq + step) * D + d
            tl.store(at, tl.zeros((BLOCK_D,), tl.float32), mask=d < D_once)
    for step in range(begin, Tq):
        t = tl.cast(step, tl.int64)
        dscore = tl.load(dscores + (b * Tq + t) * Tk + s, mask=s < Tk, other=0.0)
        live = dscore != 0.0
        q = load(query + b * query_b + t * query_t + d, d < D)
        found = tanh_of_pairs(
            q,
            k,
            features,
            features_b,
            features_t,
            features_s,
            feature_weight,
            b,
            t,
            s,
            live,
            d,
            D,
            C,
            BLOCK_C,
            PRECISION,
        )
        slope = tl.where(live[:, None], dscore[:, None] * (1.0 - found * found), 0.0)
        dk += slope
        if dv_parts is not None:
            dv += tl.where(live[:, None], dscore[:, None] * found, 0.0)
        if dquery_parts is not None:
            tl.store(dquery_parts + (tile * Tq + t) * D + d, weight * tl.sum(slope, 0), mask=d < D_once)
        if dfeature_weight_parts is not None:
            c = first_feature + tl.arange(0, BLOCK_C)
            f = load_tile(rows_of(features + t * features_t, features_b, features_s, b, s), c, live, C)
            factor = tl.trans(rounded(slope * weight[None, :], features.dtype.element_ty))
            dfeature_weight = dot(factor, f, dfeature_weight, PRECISION)

    if dkeys is not None:
        offsets = (b * Tk + s)[:, None] * D + d[None, :]
        inside = (s < Tk)[:, None] & (d < D_once)[None, :]
        dk *= weight[None, :]
        if added is not None:
            dk += tl.load(added + offsets, mask=inside, other=0.0)
        store(dkeys + offsets, dk, inside)
    if dv_parts is not None:
        tl.store(dv_parts + tile * D + d, tl.sum(dv, 0), mask=d < D_once)
    if dfeature_weight_parts is not None:
        c = first_feature + tl.arange(0, BLOCK_C)
        at = dfeature_weight_parts + (tile * D + d)[:, None] * C + c[None, :]
        tl.store(at, dfeature_weight, mask=(d < D)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["Tq", "Tk"])
def attention_feature_gradients(
    dscores,
    query,
    query_b,
    query_t,
    keys,
    keys_b,
    keys_s,
    v,
    features,
    features_b,
    features_t,
    features_s,
    feature_weight,
    lengths,
    dfeatures,
    Tq,
    Tk,
    D,
    C,
    CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dfeatures [B, Tq, Tk, C]."""
    program, feature_tiles, key_tiles = tl.program_id(0), tl.cdiv(C, BLOCK_C), tl.cdiv(Tk, BLOCK_K)
    c = program % feature_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    first_key = program // feature_tiles % key_tiles * BLOCK_K
    s = first_key + tl.arange(0, BLOCK_K)
    row = (program // feature_tiles // key_tiles).to(tl.int64)  # of all queries
    b, t = row // Tq, row % Tq
    dscore = tl.load(dscores + row * Tk + s, mask=s < Tk, other=0.0)
    live = dscore != 0.0
    key_rows = rows_of(keys, keys_b, keys_s, b, s)
    sums = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    end = tl.where(first_key < end_of_keys(lengths, b, t, Tk, CAUSAL, 1), D, 0)
    for start in range(0, end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = load(query + b * query_b + t * query_t + d, d < D)
        found = tanh_of_pairs(
            q,
            load_tile(key_rows, d, live, D).to(tl.float32),
            features,
            features_b,
            features_t,
            features_s,
            feature_weight,
            b,
            t,
            s,
            live,
            d,
            D,
            C,
            BLOCK_C,
            PRECISION,
        )
        slope = tl.where(live[:, None], dscore[:, None] * (1.0 - found * found), 0.0) * load(v + d, d < D)[None, :]
        weight = load_tile(feature_weight + d * C, c, d < D, C)
        sums = dot(rounded(slope, features.dtype.element_ty), weight, sums, PRECISION)
    store(dfeatures + (row * Tk + s)[:, None] * C + c[None, :], sums, (s < Tk)[:, None] & (c < C)[None, :])
