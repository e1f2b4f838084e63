// Vectors of FASTRNN_LANES floats (GCC vector extensions) and the activations on them. Included by one file per
// instruction set, which defines FASTRNN_LANES; everything is in an anonymous namespace so that no function compiled
// for one instruction set can be linked in for another.
//
// With FASTRNN_BF16 the data of a call (x, y, weights, their gradients' operands) are bfloat16, and states, sums and
// the pointwise part are float all the same.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <stdint.h>

namespace fastrnn {
namespace {

constexpr int kLanes = FASTRNN_LANES;

typedef float Vec __attribute__((vector_size(FASTRNN_LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(FASTRNN_LANES * 4)));
typedef float VecUnaligned __attribute__((vector_size(FASTRNN_LANES * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline __attribute__((always_inline)) void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// value - 0 and not value + 0, which would be an addition: it turns -0 into +0.
inline __attribute__((always_inline)) Vec splat(float value) { return value - Vec{}; }

// The first `count` lanes; the others are zero. Full vectors take the fast path.
inline __attribute__((always_inline)) Vec load(const float* p, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return load(p);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(count <= 0 ? 0 : (1 << count) - 1, p);
#else
  Vec v = {};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}

inline __attribute__((always_inline)) void store(float* p, Vec v, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) {
    store(p, v);
  } else {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, count <= 0 ? 0 : (1 << count) - 1, v);
#else
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
  }
}

inline __attribute__((always_inline)) VecInt bits(Vec v) { return reinterpret_cast<VecInt>(v); }
inline __attribute__((always_inline)) Vec from_bits(VecInt v) { return reinterpret_cast<Vec>(v); }

// The smaller and the larger of a limit and x; NaN in x passes through.
inline __attribute__((always_inline)) Vec at_most(float limit, Vec x) {
#if defined(__AVX512F__)
  return _mm512_min_ps(splat(limit), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(splat(limit), x);
#else
  return x > limit ? splat(limit) : x;
#endif
}

inline __attribute__((always_inline)) Vec at_least(float limit, Vec x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(splat(limit), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(splat(limit), x);
#else
  return x < limit ? splat(limit) : x;
#endif
}

// Element: what a tensor of data holds. Word: what a matrix product multiplies at once, kPerWord elements that are
// neighbours along the summed dimension.
#ifdef FASTRNN_BF16
typedef uint16_t Element;
typedef int32_t Word;
typedef VecInt Words;
typedef Words WordsUnaligned __attribute__((aligned(4), may_alias));

inline __attribute__((always_inline)) Vec load(const Element* p) {
  return reinterpret_cast<Vec>(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

// To the nearest bfloat16, ties to even.
inline __attribute__((always_inline)) __m256i rounded(Vec v) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
}

inline __attribute__((always_inline)) void store(Element* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(v));
}

inline __attribute__((always_inline)) Vec load(const Element* p, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return load(p);
  Element elements[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) elements[i] = p[i];
  return load(elements);
}

inline __attribute__((always_inline)) void store(Element* p, Vec v, int64_t count) {
  if (__builtin_expect(count >= kLanes, 1)) return store(p, v);
  Element elements[kLanes];
  store(elements, v);
  for (int64_t i = 0; i < count; ++i) p[i] = elements[i];
}

inline float to_float(Element value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

inline Word pair(Element first, Element second) { return first | static_cast<uint32_t>(second) << 16; }

inline __attribute__((always_inline)) Words pair(Vec first, Vec second) {
  return reinterpret_cast<Words>(_mm512_or_si512(_mm512_cvtepu16_epi32(rounded(first)),
                                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(second)), 16)));
}

inline __attribute__((always_inline)) Words load(const Word* p) { return *reinterpret_cast<const WordsUnaligned*>(p); }
inline __attribute__((always_inline)) void store(Word* p, Words v) { *reinterpret_cast<WordsUnaligned*>(p) = v; }
inline __attribute__((always_inline)) Words splat(Word value) {
  return reinterpret_cast<Words>(_mm512_set1_epi32(value));
}

inline __attribute__((always_inline)) Vec multiply_add(Words a, Words b, Vec sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
typedef float Element;
typedef float Word;
typedef Vec Words;

inline float to_float(Element value) { return value; }

inline __attribute__((always_inline)) Vec multiply_add(Words a, Words b, Vec sum) { return sum + a * b; }
#endif

constexpr int kPerWord = sizeof(Word) / sizeof(Element);

// Words that hold `count` elements.
constexpr int64_t words(int64_t count) { return (count + kPerWord - 1) / kPerWord; }

struct Reduced {
  Vec scale;      // 2^n
  Vec remainder;  // exp(r) - 1, where x = n ln 2 + r and |r| <= ln 2 / 2
};

// x must lie within [-87, 88]. ln 2 as one float is 1.9e-9 off: n * 1.9e-9 relative, below an ulp of exp for |x| < 40.
// The polynomial is a minimax fit (Lawson's iteration) of exp(r) with a relative error of 3.1e-9.
inline __attribute__((always_inline)) Reduced reduce_exp(Vec x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec r = x - (shifted - magic) * 0.69314718055994531f;
  Vec p = r * 0.0013814540579915047f + 0.00836874544620514f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  return {from_bits((bits(shifted) << 23) + 0x3f800000), p * (r * r) + r};
}

inline __attribute__((always_inline)) Vec sigmoid(Vec x) {
  const Reduced e = reduce_exp(at_least(-87.0f, at_most(87.0f, -x)));
  return 1.0f / (e.scale * e.remainder + (e.scale + 1.0f));
}

// By expm1, so that small arguments keep their relative accuracy: with m = exp(2|x|) - 1, tanh |x| = m / (m + 2), and
// for large ones 1 - 2 / (m + 2), where the rounding of m + 2 would cost an ulp that 1 - tanh^2 of the gradient
// magnifies.
inline __attribute__((always_inline)) Vec tanh(Vec x) {
  const VecInt sign = bits(x) & static_cast<int32_t>(0x80000000u);
  const Vec y = from_bits(bits(x) ^ sign);
  const Reduced e = reduce_exp(at_most(20.0f, y + y));
  const Vec m = e.scale * e.remainder + (e.scale - 1.0f);
  const VecInt large = m > 2.0f;
  const Vec ratio = (large ? splat(2.0f) : m) / (m + 2.0f);
  return from_bits(bits(large ? 1.0f - ratio : ratio) | sign);
}

}  // namespace
}  // namespace fastrnn
