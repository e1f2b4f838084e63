// Products with row-major matrices read where they lie, for operands that are used too few times to be packed. Every
// sum runs over k in order with one accumulator, as in gemm.h.
#pragma once

#include "cpu/pack.h"

namespace fastrnn {
namespace {

template <int number>
struct Constant {
  static constexpr int value = number;
};

// multiply_rows for one row, which reads B in the order of memory: the sums so far stay in L1.
inline void multiply_row(int64_t k_size, const float* a, const float* b, int64_t ldb, int64_t columns, bool accumulate,
                         float* out) {
  constexpr int64_t kBlock = 1024;
  constexpr int kAtOnce = 4;
  float sums[kBlock + kLanes];
  for (int64_t n0 = 0; n0 < columns; n0 += kBlock) {
    const int64_t width = smaller(kBlock, columns - n0);
    for (int64_t n = 0; n < width; n += kLanes) store(sums + n, Vec{});
    int64_t k = 0;
    auto rows = [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      const float* row = b + k * ldb + n0;
      auto add = [&](int64_t n, auto read) __attribute__((always_inline)) {
        Vec sum = load(sums + n);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          __builtin_prefetch(row + (kAtOnce + i) * ldb + n);
          sum += a[k + i] * read(row + i * ldb + n);
        }
        store(sums + n, sum);
      };
      int64_t n = 0;
      for (; n + kLanes <= width; n += kLanes)
        add(n, [](const float* p) __attribute__((always_inline)) { return load(p); });
      if (n < width)
        add(n, [valid = width - n](const float* p) __attribute__((always_inline)) { return load(p, valid); });
    };
    for (; k + kAtOnce <= k_size; k += kAtOnce) rows(Constant<kAtOnce>());
    for (; k < k_size; ++k) rows(Constant<1>());
    for (int64_t n = 0; n < width; n += kLanes) {
      float* c = out + n0 + n;
      const Vec sum = load(sums + n);
      store(c, accumulate ? sum + load(c, width - n) : sum, width - n);
    }
  }
}

// out[rows, columns begin..end] (+)= A B, A [rows, k_size], B [k_size, columns].
inline void multiply_rows(int64_t rows, int64_t k_size, const float* a, int64_t lda, const float* b, int64_t ldb,
                          int64_t begin, int64_t end, bool accumulate, float* out, int64_t ldo) {
  if (rows == 1) return multiply_row(k_size, a, b + begin, ldb, end - begin, accumulate, out + begin);
  int64_t n = begin;
  const RowTiles tiles(rows, max_rows<2>());
  for (; n + kColumns <= end; n += kColumns)
    for (int64_t i = 0; i < tiles.count; ++i) {
      float* c = out + tiles.begin(i) * ldo + n;
      tile_rows<2, false>(tiles.begin(i + 1) - tiles.begin(i), k_size, a + tiles.begin(i) * lda, lda, b + n, ldb,
                          resume(accumulate, c, ldo), c, ldo);
    }
  for (; n < end; n += kLanes) {
    const int64_t count = smaller(kLanes, end - n);
    for (int64_t row = 0; row < rows; ++row) {
      float* c = out + row * ldo + n;
      Vec sum = {};
      for (int64_t k = 0; k < k_size; ++k) sum += a[row * lda + k] * load(b + k * ldb + n, count);
      store(c, accumulate ? sum + load(c, count) : sum, count);
    }
  }
}

// out[rows begin..end, columns first..last] (+)= A^T B, A [k_size, rows], B [k_size, columns].
inline void outer_rows(int64_t begin, int64_t end, int64_t k_size, const float* a, int64_t lda, const float* b,
                       int64_t ldb, int64_t first, int64_t last, bool accumulate, float* out, int64_t ldo) {
  const RowTiles tiles(end - begin, max_rows<2>());
  for (int64_t i = 0; i < tiles.count; ++i) {
    const int64_t row = begin + tiles.begin(i), count = tiles.begin(i + 1) - tiles.begin(i);
    int64_t n = first;
    for (; n + kColumns <= last; n += kColumns) {
      float* c = out + row * ldo + n;
      tile_rows<2, true>(count, k_size, a + row, lda, b + n, ldb, resume(accumulate, c, ldo), c, ldo);
    }
    for (; n < last; n += kLanes) {
      const int64_t valid = smaller(kLanes, last - n);
      for (int64_t m = 0; m < count; ++m) {
        float* c = out + (row + m) * ldo + n;
        Vec sum = {};
        for (int64_t k = 0; k < k_size; ++k) sum += a[k * lda + row + m] * load(b + k * ldb + n, valid);
        store(c, accumulate ? sum + load(c, valid) : sum, valid);
      }
    }
  }
}

}  // namespace
}  // namespace fastrnn
