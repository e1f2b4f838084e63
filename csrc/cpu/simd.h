// Vectors of FASTRNN_LANES floats (GCC vector extensions) and the activations on them. Included by one file per
// instruction set, which defines FASTRNN_LANES; everything is in an anonymous namespace so that no function compiled
// for one instruction set can be linked in for another.
#pragma once

#include <stdint.h>

namespace fastrnn {
namespace {

constexpr int kLanes = FASTRNN_LANES;

typedef float Vec __attribute__((vector_size(FASTRNN_LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(FASTRNN_LANES * 4)));
typedef float VecUnaligned __attribute__((vector_size(FASTRNN_LANES * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline __attribute__((always_inline)) void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// The first `count` lanes; the others are zero. Full vectors take the fast path.
inline __attribute__((always_inline)) Vec load(const float* p, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return load(p);
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

inline __attribute__((always_inline)) void store(float* p, Vec v, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) {
    store(p, v);
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }
}

inline __attribute__((always_inline)) VecInt bits(Vec v) { return reinterpret_cast<VecInt>(v); }
inline __attribute__((always_inline)) Vec from_bits(VecInt v) { return reinterpret_cast<Vec>(v); }

struct Reduced {
  Vec scale;      // 2^n
  Vec remainder;  // exp(r) - 1, where x = n ln 2 + r and |r| <= ln 2 / 2
};

// x must lie within [-87, 88]. The polynomial is the minimax one of Cephes' expf (Moshier 1992).
inline __attribute__((always_inline)) Reduced reduce_exp(Vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {from_bits((bits(shifted) << 23) + 0x3f800000), p * (r * r) + r};
}

// The comparisons keep NaN: it fails them and passes through unchanged.
inline __attribute__((always_inline)) Vec sigmoid(Vec x) {
  Vec y = -x;
  y = y > 87.0f ? Vec{} + 87.0f : y;
  y = y < -87.0f ? Vec{} - 87.0f : y;
  const Reduced e = reduce_exp(y);
  return 1.0f / (1.0f + (e.scale * e.remainder + e.scale));
}

// By expm1, so that small arguments keep their relative accuracy: tanh |x| = m / (m + 2), m = exp(2|x|) - 1.
inline __attribute__((always_inline)) Vec tanh(Vec x) {
  const VecInt sign = bits(x) & static_cast<int32_t>(0x80000000u);
  Vec y = from_bits(bits(x) ^ sign);
  y = y + y;
  y = y > 20.0f ? Vec{} + 20.0f : y;
  const Reduced e = reduce_exp(y);
  const Vec m = e.scale * e.remainder + (e.scale - 1.0f);
  return from_bits(bits(m / (m + 2.0f)) | sign);
}

}  // namespace
}  // namespace fastrnn
