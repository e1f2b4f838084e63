// x * keep * scale; with the gradient in x's place it is its own backward pass.
#pragma once

#include "cpu/mask.h"

namespace fastrnn {
namespace {

void dropout(const float* x, int64_t x_stride, int64_t rows, int64_t columns, double probability, float scale,
             uint64_t seed, float* out, int threads) {
  const RandomMask mask(probability, columns);
  const int64_t slots = smaller(rows, traffic_slots(rows * columns * 8, threads));
  on_team(slots, [&, slots](int64_t begin, int64_t end) {
    for (int64_t row = rows * begin / slots; row < rows * end / slots; ++row) {
      const uint32_t key = row_key(seed, kDropoutStream, 0, row);
      for (int64_t column = 0; column < columns; column += kLanes) {
        const Vec factor = mask.drawn(key, column) ? Vec{} : splat(scale);
        store(out + row * columns + column, load(x + row * x_stride + column, columns - column) * factor,
              columns - column);
      }
    }
  });
}

}  // namespace
}  // namespace fastrnn
