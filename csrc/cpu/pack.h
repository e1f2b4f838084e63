// Weights into panels, and the checksum by which a cached panel knows that its weight still stands.
#pragma once

#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/recurrence.h"
#include "cpu/threads.h"

namespace fastrnn {
namespace {

using namespace fastrnn::cpu;

// One forward panel holds kUnits hidden units with all their gates: vector g * kVectors + u is gate g of units
// u * lanes .. u * lanes + lanes - 1.
template <Cell cell>
struct Panel {
  static constexpr int kGates = gate_count(cell);
  static constexpr int kVectors = kGates == 1 || cell == Cell::gru_reset_before ? 2 : 1;
  static constexpr int kUnits = kVectors * kLanes;
  static constexpr int NV = kGates * kVectors;
  static constexpr int kWidth = NV * kLanes;
  static int64_t count(int64_t hidden_size) { return ceil_div(hidden_size, kUnits); }
};

// Backward panels hold two vectors of columns.
constexpr int kColumns = 2 * kLanes;

template <class Function>
struct Team {
  static void body(int64_t begin, int64_t end, void* context) { (*static_cast<Function*>(context))(begin, end); }
};

// function(begin, end) over the slots of a team.
template <class Function>
void on_team(int64_t slots, Function function) {
  run_team(slots, &Team<Function>::body, &function);
}

constexpr int lane_mask(int lane, int d, bool second) {
  return second ? ((lane & d) ? kLanes + lane : lane ^ d) : ((lane & d) ? kLanes + (lane ^ d) : lane);
}

inline VecInt shuffle_mask(int d, bool second) {
  VecInt mask = {};
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane_mask(lane, d, second);
  return mask;
}

inline __attribute__((always_inline)) void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const VecInt low = shuffle_mask(d, false), high = shuffle_mask(d, true);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & d) continue;
      const Vec a = rows[i], b = rows[i | d];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i | d] = __builtin_shuffle(a, b, high);
    }
  }
}

// Lane l of the result is the sum over the lanes of rows[l], added in the same order for every l.
inline __attribute__((always_inline)) Vec sum_lanes(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int d = kLanes / 2; d > 0; d /= 2) {
    const VecInt low = shuffle_mask(d, false), high = shuffle_mask(d, true);
#pragma GCC unroll 16
    for (int i = 0; i < d; ++i)
      rows[i] = __builtin_shuffle(rows[i], rows[i | d], low) + __builtin_shuffle(rows[i], rows[i | d], high);
  }
  return rows[0];
}

// Slots that `bytes` of memory traffic are worth: a team costs about 1 us to wake.
inline int64_t traffic_slots(int64_t bytes, int threads) { return larger(1, smaller(threads, bytes / (128 << 10))); }

// Where vector v of a panel begins and how wide its rows are. W_hh of the GRU with the reset before the product is two
// panels in one: r and z, which multiply h, then n, which multiplies r * h.
struct Place {
  int64_t offset, width;
};

template <Cell cell>
inline Place place(int v, int64_t depth, bool hidden) {
  using P = Panel<cell>;
  if (cell != Cell::gru_reset_before || !hidden) return {v * kLanes, P::kWidth};
  constexpr int kFirst = 2 * P::kVectors;
  return v < kFirst ? Place{v * kLanes, kFirst * kLanes}
                    : Place{depth * kFirst * kLanes + (v - kFirst) * kLanes, P::kVectors * kLanes};
}

// Weights are packed from elements or, for bfloat16 kernels on weights in float, from floats, which are rounded here.
// Word k of a row of `columns` numbers; what lies beyond them is zero.
template <class Number>
inline Word word_of(const Number* row, int64_t k, int64_t columns) {
#ifdef FASTRNN_BF16
  const Words word = pair(load(row + 2 * k, 1), 2 * k + 1 < columns ? load(row + 2 * k + 1, 1) : Vec{});
  return word[0];
#else
  return row[k];
#endif
}

// Panels hold W^T: [words of a row][units], which a block of kLanes rows and columns becomes by transposing it.
template <class Number>
inline __attribute__((always_inline)) void store_transposed(const Number* rows, int64_t columns, Word* out,
                                                            int64_t width) {
  Vec block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) block[i] = load(rows + i * columns);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += kPerWord) {
#ifdef FASTRNN_BF16
    store(out + i / 2 * width, pair(block[i], block[i + 1]));
#else
    store(out + i * width, block[i]);
#endif
  }
}

template <Cell cell, class Number>
void pack_forward_panels(int64_t hidden_size, int64_t columns, bool hidden, const Number* weight, Word* packed,
                         int threads) {
  using P = Panel<cell>;
  const int64_t panels = P::count(hidden_size), depth = words(columns);
  const int64_t slots = smaller(panels, traffic_slots(panels * P::kWidth * depth * 8, threads));
  on_team(slots, [=](int64_t begin, int64_t end) {
    for (int64_t p = panels * begin / slots; p < panels * end / slots; ++p) {
      for (int v = 0; v < P::NV; ++v) {
        const Place to = place<cell>(v, depth, hidden);
        Word* out = packed + p * P::kWidth * depth + to.offset;
        const int64_t unit = p * P::kUnits + (v % P::kVectors) * kLanes;
        const Number* rows = weight + ((v / P::kVectors) * hidden_size + unit) * columns;
        const int64_t valid = hidden_size - unit;
        int64_t k = 0;
        for (; valid >= kLanes && k + kLanes <= columns; k += kLanes)
          store_transposed(rows + k, columns, out + k / kPerWord * to.width, to.width);
        for (k /= kPerWord; k < depth; ++k)
          for (int i = 0; i < kLanes; ++i)
            out[k * to.width + i] = i < valid ? word_of(rows + i * columns, k, columns) : 0;
      }
    }
  });
}

// Row of W_hh, in torch's order, whose gradient is column block `gate` of the GRU's hidden gradients (n*r, r, z).
template <Cell cell>
constexpr int hidden_gate(int gate) {
  return cell == Cell::gru ? (gate + 2) % 3 : gate;
}

// Elements that one gate's gradients take in a row of dG: whole words.
inline int64_t gate_stride(int64_t hidden_size) { return words(hidden_size) * kPerWord; }

template <Cell cell, class Number>
void pack_backward_panels(int64_t hidden_size, int64_t columns, bool hidden, const Number* weight, Word* packed,
                          int threads) {
  const int64_t gate_words = words(hidden_size), depth = gate_count(cell) * gate_words;
  const int64_t panels = ceil_div(columns, kColumns);
  const int64_t slots = smaller(panels, traffic_slots(depth * columns * 8, threads));
  on_team(slots, [=](int64_t begin, int64_t end) {
    const int64_t first = panels * begin / slots, last = panels * end / slots;
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t gate = hidden ? hidden_gate<cell>(k / gate_words) : k / gate_words;
      const int64_t unit = k % gate_words * kPerWord;
      const Number* row = weight + (gate * hidden_size + unit) * columns;
      for (int64_t p = first; p < last; ++p)
        for (int vector = 0; vector < 2; ++vector) {
          const int64_t column = p * kColumns + vector * kLanes, count = columns - column;
          Word* out = packed + (p * depth + k) * kColumns + vector * kLanes;
#ifdef FASTRNN_BF16
          store(out,
                pair(load(row + column, count), unit + 1 < hidden_size ? load(row + columns + column, count) : Vec{}));
#else
          store(out, load(row + column, count));
#endif
        }
    }
  });
}

// A sum of products of neighbouring words, each mixed with its position, so that it does not depend on how the threads
// divide the data. It reads at the speed of memory; a changed weight escapes it with a chance of about 2^-64.
inline uint64_t checksum_floats(const float* data, int64_t size, int threads) {
  constexpr int64_t kBlock = 4096;
  typedef uint64_t Wide __attribute__((vector_size(FASTRNN_LANES * 4)));
  typedef uint64_t WideUnaligned __attribute__((vector_size(FASTRNN_LANES * 4), aligned(4), may_alias));
  const int64_t blocks = ceil_div(size, kBlock);
  const int64_t slots = smaller(larger(1, blocks), traffic_slots(size * 2, threads));
  uint64_t total = 0;
  on_team(slots, [&, blocks, slots](int64_t begin, int64_t end) {
    uint64_t sum = 0;
    for (int64_t b = blocks * begin / slots; b < blocks * end / slots; ++b) {
      const int64_t last = smaller(size, (b + 1) * kBlock);
      int64_t i = b * kBlock;
      Wide key = {}, sums[4] = {};
      for (unsigned lane = 0; lane < sizeof(Wide) / 8; ++lane) key[lane] = (b * 64 + lane + 1) * 0x9E3779B97F4A7C15ull;
      for (; i + 4 * kLanes <= last; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
          const Wide word = *reinterpret_cast<const WideUnaligned*>(data + i + part * kLanes);
          const Wide mixed = word ^ key;
          sums[part] += (mixed & 0xFFFFFFFFu) * (mixed >> 32) + word;
          key += 0xD1B54A32D192ED03ull;
        }
      for (unsigned lane = 0; lane < sizeof(Wide) / 8; ++lane)
        for (int part = 0; part < 4; ++part) sum += sums[part][lane];
      for (; i < last; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, data + i, 4);
        const uint64_t mixed = (word + 0x165667B1u) * static_cast<uint64_t>(2 * i + 0x85EBCA77u);
        sum += mixed ^ (mixed >> 29);
      }
    }
    __atomic_add_fetch(&total, sum, __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace
}  // namespace fastrnn
