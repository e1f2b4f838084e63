"""The pointwise mathematics of each cell, forward and backward, and what all Triton kernels compute with.

Cells are named as in csrc/cells.h, gates follow torch's order. Tiles are float32 [rows, units]; several gates are a
tuple. Formulas: fastrnn/reference/recurrence.py.
"""

import triton
import triton.language as tl

# Whether TRITON_INTERPRET=1 runs the kernels in Python. Its bfloat16 is a uint16 to numpy, which the next two functions
# work around; compiled, both are the plain operation.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# How zoneout works: the state is kept by a random mask, or mixed in by its probability.
ZONEOUT_RANDOM = tl.constexpr(1)
ZONEOUT_EXPECTED = tl.constexpr(2)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, in float32."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to the nearest value of dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(x == x, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def load(pointer, mask):
    """float32, 0 where masked."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(pointer, x, mask):
    tl.store(pointer, rounded(x, pointer.dtype.element_ty), mask=mask)


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    # The quotient loses digits towards 0, where the polynomial of Cephes' tanhf (netlib.org/cephes) has them.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0.0, -far, far))


@triton.jit
def mix32(x):
    """The finaliser of MurmurHash3 on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def kept_units(word, t, rows, units, threshold):
    """The random mask of zoneout: bool [rows, units]. word: of seed and stream. As in csrc/random.h."""
    at_t = mix32(rows.to(tl.uint32) * 0 ^ word.to(tl.uint32) ^ t.to(tl.uint32))
    row = mix32(rows.to(tl.uint32) ^ at_t)
    unit = mix32((units + 1).to(tl.uint32))
    return (mix32(row[:, None] ^ unit[None, :]) >> 8) < threshold.to(tl.uint32)


@triton.jit
def zone_out(new, old, word, t, rows, units, probability, threshold, ZONEOUT: tl.constexpr):
    if ZONEOUT == ZONEOUT_RANDOM:
        return tl.where(kept_units(word, t, rows, units, threshold), old, new)
    elif ZONEOUT == ZONEOUT_EXPECTED:
        return probability * old + (1.0 - probability) * new
    else:
        return new


@triton.jit
def zone_out_backward(gradient, word, t, rows, units, probability, threshold, ZONEOUT: tl.constexpr):
    """Gradients of new and old."""
    if ZONEOUT == ZONEOUT_RANDOM:
        kept = kept_units(word, t, rows, units, threshold)
        return tl.where(kept, 0.0, gradient), tl.where(kept, gradient, 0.0)
    elif ZONEOUT == ZONEOUT_EXPECTED:
        return (1.0 - probability) * gradient, probability * gradient
    else:
        return gradient, tl.zeros_like(gradient)


@triton.jit
def rnn_forward(pre, CELL: tl.constexpr):
    if CELL == "rnn_tanh":
        return tanh(pre)
    else:
        return tl.where(pre < 0.0, 0.0, pre)  # written so that NaN passes


@triton.jit
def rnn_backward(h, dh, CELL: tl.constexpr):
    """h: the state that the step produced."""
    if CELL == "rnn_tanh":
        return dh * (1.0 - h * h)
    else:
        return tl.where(h > 0.0, dh, 0.0)


@triton.jit
def lstm_forward(pre, c, peephole):
    """Activations i, f, g, o and the new c. peephole: weights of i, f, o, or None."""
    i, f, g, o = pre
    if peephole is not None:
        i += peephole[0] * c
        f += peephole[1] * c
    i = sigmoid(i)
    f = sigmoid(f)
    g = tanh(g)
    c = f * c + i * g
    if peephole is not None:
        o += peephole[2] * c
    return (i, f, g, sigmoid(o)), c


@triton.jit
def lstm_backward(gates, c_before, dh, tanh_c, dc, peephole):
    """Gradients of the pre-activations and of c_before. h was o * tanh_c; dc has what came through tanh_c already."""
    i, f, g, o = gates
    do = dh * tanh_c * o * (1.0 - o)
    if peephole is not None:
        dc += peephole[2] * do
    di = dc * g * i * (1.0 - i)
    df = dc * c_before * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    dc = dc * f
    if peephole is not None:
        dc += peephole[0] * di + peephole[1] * df
    return (di, df, dg, do), dc


@triton.jit
def gru_output(z, n, h):
    return (1.0 - z) * n + z * h


@triton.jit
def gru_output_backward(z, n, h, dh):
    """Gradients of the pre-activations z and n, and of the h before that is interpolated with."""
    dz = dh * (h - n) * z * (1.0 - z)
    dn = dh * (1.0 - z) * (1.0 - n * n)
    return dz, dn, dh * z
