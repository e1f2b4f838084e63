// What one block of a persistent launch has to do, and where the options of a call say so.
#pragma once

#include "cuda/product.h"

namespace fastrnn::cuda {
namespace {

// A number as a type, for generic lambdas.
template <int n>
struct Count {
  static constexpr int value = n;
};

constexpr int kCells = kMaxUnitGroups * kUnitGroup * kRowTile / kThreads;  // of one thread in one tile of rows

// The block's units and rows. Blocks of one group of rows exchange with each other and with no others.
struct Block {
  FASTRNN_DEVICE Block(int index, const Problem& problem, const Tile& tile, int64_t first_row)
      : share(tile.unit_groups) {
    const int count = static_cast<int>(slices(problem.hidden_size, tile));
    slice = index % count;
    row_begin = first_row + index / count * static_cast<int64_t>(tile.rows);
    const int64_t left = problem.batch - row_begin;
    rows = static_cast<int>(left < tile.rows ? left : tile.rows);
    unit_begin = static_cast<int64_t>(slice) * share.units;
  }

  const Share share;
  int slice, rows;  // rows may be negative: nothing to do
  int64_t row_begin, unit_begin;
};

// A row and unit that this thread computes in every step, whose states it keeps.
struct CellPlace {
  FASTRNN_DEVICE CellPlace(const Block& block, const Problem& problem, int tile, int k)
      : in_tile(threadIdx.x + k * kThreads),
        exists(in_tile < block.share.units * static_cast<int>(kRowTile)),
        unit_in_block(in_tile & (block.share.units - 1)),
        row_in_tile(in_tile >> (block.share.units == 8    ? 3
                                : block.share.units == 16 ? 4
                                                          : 5)),
        state(tile * block.share.units * static_cast<int>(kRowTile) + in_tile),
        b(block.row_begin + tile * kRowTile + row_in_tile),
        unit(block.unit_begin + unit_in_block),
        has_row(exists && tile * kRowTile + row_in_tile < block.rows),
        used(has_row && unit < problem.hidden_size) {}

  // Of the 8 units that a layer norm measures together.
  FASTRNN_DEVICE int unit_group() const { return static_cast<int>(unit / kUnitGroup); }
  FASTRNN_DEVICE int lane() const { return unit_in_block % static_cast<int>(kUnitGroup); }

  const int in_tile;
  const bool exists;  // equal for the lanes of a warp
  const int unit_in_block, row_in_tile;
  const int state;  // index of its state in shared memory
  const int64_t b, unit;
  const bool has_row;
  const bool used;  // neither its row nor its unit is padding
};

FASTRNN_DEVICE int64_t row_offset(const Problem& problem, const Sequence& rows, int64_t t, int64_t b) {
  return problem.row_starts ? (problem.row_starts[t] + b) * rows.stride_b : t * rows.stride_t + b * rows.stride_b;
}

// Rows of what the kernels keep for each step, [T, B] or packed.
FASTRNN_DEVICE int64_t kept_row(const Problem& problem, int64_t t, int64_t b) {
  return problem.row_starts ? problem.row_starts[t] + b : t * problem.batch + b;
}

// Rows of a tile that the sequence has at step t: packed ones end, the longest last. May be negative.
FASTRNN_DEVICE int present_rows(const Problem& problem, int64_t t, int64_t first, int rows) {
  if (!problem.row_starts) return rows;
  const int64_t end = t + 1 < problem.steps ? problem.row_starts[t + 1] : problem.rows;
  const int64_t left = end - problem.row_starts[t] - first;
  return left < rows ? static_cast<int>(left) : rows;
}

FASTRNN_DEVICE bool is_active(const Problem& problem, int64_t t, int64_t b) {
  return !problem.lengths || t < problem.lengths[b];
}

FASTRNN_DEVICE bool is_present(const Problem& problem, int64_t t, int64_t b) {
  return !problem.row_starts || is_active(problem, t, b);
}

// The byte alone, so that it can be loaded long before it is looked at.
FASTRNN_DEVICE uint8_t reset_byte(const Problem& problem, int64_t t, int64_t b) {
  return problem.resets ? problem.resets[t * problem.reset_strides.stride_t + b * problem.reset_strides.stride_b] : 0;
}

FASTRNN_DEVICE bool is_reset(const Problem& problem, int64_t t, int64_t b) {
  return reset_byte(problem, t, b) && is_active(problem, t, b);
}

FASTRNN_DEVICE float mask_of(const Problem& problem, int64_t b, int64_t unit) {
  return problem.recurrent_mask ? problem.recurrent_mask[b * problem.hidden_size + unit] : 1.0f;
}

// An element of T, 0 where there are none.
template <class T>
FASTRNN_DEVICE float at(const void* values, int64_t index) {
  return values ? to_float(static_cast<const T*>(values)[index]) : 0.0f;
}

struct Zoneout {
  FASTRNN_DEVICE explicit Zoneout(const Problem& problem)
      : probability(static_cast<float>(problem.zoneout)),
        threshold(static_cast<uint32_t>(problem.zoneout * (1 << 24))),
        random(problem.zoneout_random),
        seed(problem.zoneout_seed) {}

  // Of stream 0, h, or 1, c.
  FASTRNN_DEVICE bool keeps(uint32_t stream, int64_t t, int64_t b, int64_t unit) const {
    return mix32(row_key(seed, stream, t, b) ^ mix32(static_cast<uint32_t>(unit + 1))) >> 8 < threshold;
  }
  FASTRNN_DEVICE float apply(uint32_t stream, int64_t t, int64_t b, int64_t unit, float fresh, float old) const {
    if (probability == 0) return fresh;
    if (!random) return probability * old + (1 - probability) * fresh;
    return keeps(stream, t, b, unit) ? old : fresh;
  }
  // The part of a gradient that goes to the old state; what is left goes to the fresh one.
  FASTRNN_DEVICE float split(uint32_t stream, int64_t t, int64_t b, int64_t unit, float& gradient) const {
    if (probability == 0) return 0;
    const float share = random ? keeps(stream, t, b, unit) : probability;
    const float old = share != 0 ? share * gradient : 0;
    gradient = share != 1 ? (1 - share) * gradient : 0;
    return old;
  }

  const float probability;
  const uint32_t threshold;
  const bool random;
  const uint64_t seed;
};

FASTRNN_DEVICE uint32_t exchanged_bits(float value) {
  const uint32_t bits = float_bits(value);
  return bits == kUnwritten ? 0x7FFFFFFFu : bits;  // another NaN
}

// Hands over the values of a row's units, which neighbouring lanes hold. All lanes of the warp take part.
template <class T>
FASTRNN_DEVICE void publish(T* row, int64_t unit, float value, bool has_row) {
  if constexpr (sizeof(T) == 4) {
    if (has_row) store_exchanged(row + unit, exchanged_bits(value));
  } else {
    const uint32_t own = from_float<T>(value).bits;
    const uint32_t next = shuffle_xor(own, 1);
    if (has_row && unit % 2 == 0) store_exchanged(row + unit, own | next << 16);
  }
}

}  // namespace
}  // namespace fastrnn::cuda
