"""The k best of groups of rows, by logits less a normalizer plus a score of the row, in one read of the logits.

`top_k_parts` finds the best of each part of a row, `top_k_rows` puts those of a row in order and makes values of them,
`top_k_groups` does so with the values of several rows. Nothing is sorted: the place of each candidate is the number of
those that are better, whatever k is.

A candidate is int64: `order_of` its value above, and below its index counted from the end. So all are distinct, and of
equal values the one with the lower index is the largest candidate. Absent options are None.
"""

import triton
import triton.language as tl

MISSING = tl.constexpr(-(2**63))  # in place of a candidate: less than all of them
NOTHING = tl.constexpr(-(2**31))  # in place of an order


@triton.jit
def order_of(x):
    """float32 in order as int32, NaN below all and -0 equal to 0."""
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(order == -1, 0, order)  # which was -0
    return tl.where(x == x, order, NOTHING + 1)


@triton.jit
def candidate_of(order, index):
    return (order.to(tl.int64) << 32) + (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def value_and_index(candidate):
    order = (candidate >> 32).to(tl.int32)
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)  # NaN comes out as a NaN
    return bits.to(tl.float32, bitcast=True), 0xFFFFFFFF - (candidate & 0xFFFFFFFF)


@triton.jit
def number_of(chosen):
    return tl.sum(chosen.to(tl.int32))


@triton.jit
def least_of_best(keys, number, WIDTH: tl.constexpr):
    """What exactly so many of the keys, which are distinct, reach. number <= WIDTH."""
    # At least WIDTH reach the least of the largest of so many sets.
    low = tl.min(tl.max(tl.reshape(keys, (keys.shape[0] // WIDTH, WIDTH)), 0))
    high = tl.max(keys) + 1
    reached = number_of(keys >= low)
    while reached != number:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # which does not overflow
        found = number_of(keys >= middle)
        low, high = tl.where(found < number, low, middle), tl.where(found < number, middle, high)
        reached = tl.where(found < number, reached, found)
    return low


@triton.jit(do_not_specialize=["vocabulary", "parts", "kept"])
def top_k_parts(
    logits,
    stride,
    candidates,
    sums,
    vocabulary,
    parts,
    kept,
    EXPONENTIALS: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
):
    """Of each part of each row: the `kept` best in any order, the largest logit and the sum of e^(logit - largest).

    The sum is NaN where a logit is NaN or inf, and without EXPONENTIALS says no more than that. Logits: [rows,
    vocabulary] with a stride of the rows; candidates: [rows, parts, kept]; sums: both, [rows, parts, 2]. kept <= WIDTH.
    """
    program = tl.program_id(0).to(tl.int64)
    row, first = program // parts, (program % parts).to(tl.int32) * PART
    i = tl.arange(0, PART)
    inside = first + i < vocabulary
    x = tl.load(logits + row * stride + first + i, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x, float("-inf"))

    largest = tl.max(tl.where(x == x, x, float("-inf")))
    if EXPONENTIALS:
        total = tl.sum(tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest)))
    else:
        total = tl.sum(tl.where(x < float("inf"), 0.0, float("nan")))
    tl.store(sums + 2 * program, largest)
    tl.store(sums + 2 * program + 1, total)

    # For short bisections keys are narrow: of a 16-bit type without the bits that it does not have.
    order = tl.where(inside, order_of(x), NOTHING)
    if logits.dtype.element_ty == tl.float32:
        key = order.to(tl.int64) * PART + (PART - 1 - i)
    elif logits.dtype.element_ty == tl.bfloat16:
        key = (order >> 16) * PART + (PART - 1 - i)
    else:
        key = (order >> 13) * PART + (PART - 1 - i)
    chosen = key >= least_of_best(key, kept, WIDTH)
    position = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(candidates + program * kept + position, candidate_of(order, first + i), mask=chosen)


@triton.jit
def difference(x, largest):
    """x - largest, where both may be infinite."""
    return tl.where(x == largest, 0.0, x - largest)


@triton.jit
def log_sum(sums, parts, BLOCK_P: tl.constexpr):
    """log sum e^logit of a row; NaN where the sum of a part is."""
    largest, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        part_largest = tl.load(sums + 2 * p, mask=p < parts, other=float("-inf"))
        part_sum = tl.load(sums + 2 * p + 1, mask=p < parts, other=0.0)
        before = largest
        largest = tl.maximum(largest, tl.max(part_largest))
        total = total * tl.exp(difference(before, largest))
        total += tl.sum(part_sum * tl.exp(difference(part_largest, largest)))
    return largest + tl.log(total)


@triton.jit(do_not_specialize=["vocabulary", "parts", "kept", "group_size", "k"])
def top_k_rows(
    candidates,
    sums,
    scores,
    given,
    values,
    indices,
    normalizers,
    vocabulary,
    parts,
    kept,
    group_size,
    k,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Of each row the normalizer, and the values and indices [rows, k] of the k best, best first.

    From what `top_k_parts` found. Each program places BLOCK_C candidates of a row.
    """
    count = parts * kept
    tiles = tl.cdiv(count, BLOCK_C)
    row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    normalizer = log_sum(sums + row * parts * 2, parts, BLOCK_P)
    if given is not None:
        normalizer = tl.where(normalizer == normalizer, tl.load(given + row), normalizer)
    if tile == 0:
        tl.store(normalizers + row, normalizer)

    candidates += row * count
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    own = tl.load(candidates + c, mask=c < count, other=MISSING)
    better = tl.zeros((BLOCK_C, BLOCK_O), tl.int32)
    for start in range(0, count, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        others = tl.load(candidates + o, mask=o < count, other=MISSING)
        better += (others[None, :] > own[:, None]).to(tl.int32)
    place = tl.sum(better, 1)

    logit, token = value_and_index(own)
    value, broken = logit - normalizer, normalizer != normalizer
    if scores is not None:
        score = tl.load(scores + row)
        value, broken = value + score, broken | (score != score)
    # -inf stays: a token that is not allowed, also where none is.
    value = tl.where((logit == float("-inf")) & (broken == 0), logit, value)
    live = (c < count) & (place < k)
    tl.store(values + row * k + place, value, mask=live)
    tl.store(indices + row * k + place, row % group_size * vocabulary + token, mask=live)


@triton.jit
def load_candidates(values, c, count):
    """Of equal values the first is the best."""
    return tl.where(c < count, candidate_of(order_of(tl.load(values + c, mask=c < count, other=0.0)), c), MISSING)


@triton.jit(do_not_specialize=["count", "k"])
def top_k_groups(
    row_values,
    row_indices,
    values,
    indices,
    count,
    k,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """The values and indices [groups, k] of the k best of each group, best first, from `count` of its rows.

    Each program places BLOCK_C of them.
    """
    tiles = tl.cdiv(count, BLOCK_C)
    group, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row_values += group * count
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    own = load_candidates(row_values, c, count)
    better = tl.zeros((BLOCK_C, BLOCK_O), tl.int32)
    for start in range(0, count, BLOCK_O):
        others = load_candidates(row_values, start + tl.arange(0, BLOCK_O), count)
        better += (others[None, :] > own[:, None]).to(tl.int32)
    place = tl.sum(better, 1)
    live = (c < count) & (place < k)
    tl.store(values + group * k + place, tl.load(row_values + c, mask=live, other=0.0), mask=live)
    tl.store(indices + group * k + place, tl.load(row_indices + group * count + c, mask=live, other=0), mask=live)
