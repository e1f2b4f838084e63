// Matrix products on panels: a panel is a block of columns of the right-hand matrix, [K][NV * lanes], kept contiguous.
// Every sum runs over k in order with one accumulator, whatever the tile: a row's result does not depend on how many
// rows are computed with it (bitwise batch invariance). K counts words: elements, or pairs of bfloat16.
#pragma once

#include "cpu/simd.h"

namespace fastrnn {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What a tile's sums are added to: rows of leading dimension ld (0: one row for all, as a bias), or nothing. Added at
// the end, so that the many roundings are of the short sum and few are of the long one.
struct Start {
  const float* rows;
  int64_t ld;
};

constexpr Start kZero = {nullptr, 0};

// What a tile fetches into L2 for those that come after it: from `line` on, `step` bytes for each k (0: nothing new).
struct Ahead {
  const char* line;
  int64_t step;

  Ahead after(int64_t k) const { return {line + k * step, step}; }
};

inline Ahead nothing_ahead(const Word* b) { return {reinterpret_cast<const char*>(b), 0}; }

// c[m][p][v] = start + sum_k a[m, k] * b_p[k][v], m < MR, p < NP panels. A is row-major with leading dimension lda, or,
// for column_major, a[k * lda + m].
template <int MR, int NV, int NP, bool column_major>
inline __attribute__((always_inline)) void tile(int64_t k_size, const Word* a, int64_t lda, const Word* b, int64_t ldb,
                                                int64_t panel_stride, Start start, float* c, int64_t ldc,
                                                int64_t c_panel_stride, Ahead ahead) {
  Vec acc[MR][NP * NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NP * NV; ++v) acc[m][v] = Vec{};

  auto step = [&](int64_t k) __attribute__((always_inline)) {
    Words row[NP * NV];
#pragma GCC unroll 8
    for (int v = 0; v < NP * NV; ++v) row[v] = load(b + k * ldb + (v / NV) * panel_stride + (v % NV) * kLanes);
    if constexpr (MR <= 2) {  // streaming: 2 KB ahead takes the L3 from 240 to 255 GB/s on two Zen 5 cores
#pragma GCC unroll 8
      for (int v = 0; v < NP * NV; ++v)
        __builtin_prefetch(b + k * ldb + (v / NV) * panel_stride + (v % NV) * kLanes + 512);
    } else {
      __builtin_prefetch(ahead.line + k * ahead.step, 0, 2);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Words value = splat(column_major ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NP * NV; ++v) acc[m][v] = multiply_add(value, row[v], acc[m][v]);
    }
  };
  // Tiles with few accumulators are bound by the loop itself unless it is unrolled (4x64: 200 -> 225 GFLOP/s).
  constexpr int kUnroll = MR * NV * NP <= 16 ? 4 : 1;
  int64_t k = 0;
  for (; k + kUnroll <= k_size; k += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(k + u);
  }
  for (; k < k_size; ++k) step(k);

  if (start.rows) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NP * NV; ++v)
        acc[m][v] += load(start.rows + m * start.ld + (v / NV) * c_panel_stride + (v % NV) * kLanes);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NP * NV; ++v) store(c + m * ldc + (v / NV) * c_panel_stride + (v % NV) * kLanes, acc[m][v]);
}

// Rows of a tile for panels of NV vectors: as many accumulators as the registers hold.
template <int NV>
constexpr int max_rows() {
  return kLanes == 16 ? (NV == 2 ? 12 : 24 / NV) : 12 / NV;
}

// Panels that one pass takes when there are so few accumulators that they would wait for each other. Wide panels stream
// faster alone: 240 GB/s from L2 on one Zen 5 core, 135 with two at once.
template <int NV>
constexpr int panels_at_once(int64_t rows) {
  return rows <= 3 && NV <= 2 ? 2 : 1;
}

template <int MR, int NV, int NP, bool column_major>
__attribute__((noinline)) void tile_call(int64_t k_size, const Word* a, int64_t lda, const Word* b, int64_t ldb,
                                         int64_t panel_stride, Start start, float* c, int64_t ldc,
                                         int64_t c_panel_stride, Ahead ahead) {
  tile<MR, NV, NP, column_major>(k_size, a, lda, b, ldb, panel_stride, start, c, ldc, c_panel_stride, ahead);
}

template <int NV, bool column_major, int MR = max_rows<NV>()>
inline void tile_rows(int64_t rows, int64_t k_size, const Word* a, int64_t lda, const Word* b, int64_t ldb, Start start,
                      float* c, int64_t ldc, Ahead ahead) {
  if (rows == MR) {
    tile_call<MR, NV, 1, column_major>(k_size, a, lda, b, ldb, 0, start, c, ldc, 0, ahead);
  } else if constexpr (MR > 1) {
    tile_rows<NV, column_major, MR - 1>(rows, k_size, a, lda, b, ldb, start, c, ldc, ahead);
  }
}

template <int NV, bool column_major>
inline void tile_rows(int64_t rows, int64_t k_size, const Word* a, int64_t lda, const Word* b, int64_t ldb, Start start,
                      float* c, int64_t ldc) {
  tile_rows<NV, column_major>(rows, k_size, a, lda, b, ldb, start, c, ldc, nothing_ahead(b));
}

// Asks for what other cores have just written, all lines at once: one transfer's latency and not one after another.
inline void prefetch_rows(const Word* a, int64_t lda, int64_t rows, int64_t size) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < size; k += 16) __builtin_prefetch(a + row * lda + k);
}

// Adds to what earlier passes over k left in c.
inline Start resume(bool resumed, const float* c, int64_t ldc) { return resumed ? Start{c, ldc} : kZero; }

// One to three rows by two panels, in passes of `depth` over k: out[panel][row][NV * lanes].
template <int NV>
inline void two_panels(int64_t rows, int64_t k_size, int64_t depth, const Word* a, int64_t lda, const Word* b,
                       int64_t panel_stride, float* out) {
  constexpr int64_t kWidth = NV * kLanes;
  const auto call = rows == 1   ? tile_call<1, NV, 2, false>
                    : rows == 2 ? tile_call<2, NV, 2, false>
                                : tile_call<3, NV, 2, false>;
  for (int64_t k = 0; k < k_size; k += depth)
    call(smaller(depth, k_size - k), a + k, lda, b + k * kWidth, kWidth, panel_stride, resume(k > 0, out, kWidth), out,
         kWidth, rows * kWidth, nothing_ahead(b));
}

// Balanced row tiles: 16 rows of at most 6 are 6 + 5 + 5, never 6 + 6 + 4.
struct RowTiles {
  int64_t rows, count;
  RowTiles(int64_t rows_in, int64_t most) : rows(rows_in), count(ceil_div(rows_in, most)) {}
  int64_t begin(int64_t i) const { return rows * i / count; }
};

}  // namespace
}  // namespace fastrnn
