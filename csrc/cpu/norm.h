// Layer norm (Ba et al. 2016) over hidden units that several threads share. Each thread measures its own vectors of
// units; behind a barrier every thread combines all parts in the same order, so that no result depends on who computed
// what.
#pragma once

#include "cpu/pack.h"

namespace fastrnn {
namespace {

constexpr double kNormEpsilon = 1e-5;

// Gates that are normalised as one vector: the LSTM's all together, the GRU's r and z, then n.
struct Group {
  int first, gates;
};

template <Cell cell>
constexpr int group_count() {
  return is_gru(cell) ? 2 : 1;
}

template <Cell cell>
constexpr Group norm_group(int index) {
  if (!is_gru(cell)) return {0, gate_count(cell)};
  return index == 0 ? Group{0, 2} : Group{2, 1};
}

// The group that a gate belongs to.
template <Cell cell>
constexpr int group_of(int gate) {
  return is_gru(cell) && gate == 2;
}

inline __attribute__((always_inline)) float sum(Vec v) {
#pragma GCC unroll 4
  for (int d = kLanes / 2; d > 0; d /= 2) {
    VecInt other = {};
    for (int lane = 0; lane < kLanes; ++lane) other[lane] = lane ^ d;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

// Zero from lane `valid` on.
inline __attribute__((always_inline)) Vec first_lanes(Vec v, int64_t valid) {
  if (__builtin_expect(valid >= kLanes, 1)) return v;
  for (int64_t lane = valid; lane < kLanes; ++lane) v[lane] = 0;
  return v;
}

// Two numbers for each row, group and vector of units: forward the mean and the sum of squared differences from it,
// backward the sums of w dy and of w dy x^, x^ being the normalised values.
class RowParts {
 public:
  RowParts(int64_t rows, int groups, int64_t hidden_size)
      : groups_(groups),
        hidden_size_(hidden_size),
        vectors_(ceil_div(hidden_size, kLanes)),
        parts_(rows * groups * 2 * vectors_) {}

  void put(int64_t row, int group, int64_t unit, float first, float second) const {
    float* to = at(row, group) + unit / kLanes;
    to[0] = first;
    to[vectors_] = second;
  }

  // Of `rows` rows from `row` on; value(i, gate) is a vector of units of the i-th. By kLanes rows at once, whose sums
  // over lanes cost a third of one at a time.
  template <int kGates, class Value>
  void measure(int64_t row, int64_t rows, int group, int64_t unit, Value value) const {
    const int64_t valid = smaller(kLanes, hidden_size_ - unit);
    for (int64_t first = 0; first < rows; first += kLanes) {
      const int64_t count = smaller(kLanes, rows - first);
      Vec totals[kLanes] = {}, squares[kLanes] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int gate = 0; gate < kGates; ++gate) totals[i] += first_lanes(value(first + i, gate), valid);
      const Vec mean = sum_lanes(totals) / static_cast<float>(kGates * valid);
      for (int64_t i = 0; i < count; ++i)
        for (int gate = 0; gate < kGates; ++gate) {
          const Vec difference = first_lanes(value(first + i, gate) - mean[i], valid);
          squares[i] += difference * difference;
        }
      const Vec square = sum_lanes(squares);
      for (int64_t i = 0; i < count; ++i) put(row + first + i, group, unit, mean[i], square[i]);
    }
  }

  struct Scale {
    float mean, rstd;
  };

  Scale scale(int64_t row, int group, int gates) const {
    const float* part = at(row, group);
    const double size = static_cast<double>(gates) * hidden_size_;
    double mean = 0, squares = 0;
    for (int64_t v = 0; v < vectors_; ++v) mean += part_size(v, gates) * part[v];
    mean /= size;
    for (int64_t v = 0; v < vectors_; ++v)
      squares += part[vectors_ + v] + part_size(v, gates) * (part[v] - mean) * (part[v] - mean);
    return {static_cast<float>(mean), static_cast<float>(1 / __builtin_sqrt(squares / size + kNormEpsilon))};
  }

  struct Means {
    float first, second;
  };

  Means means(int64_t row, int group, int gates) const {
    const float* part = at(row, group);
    double first = 0, second = 0;
    for (int64_t v = 0; v < vectors_; ++v) {
      first += part[v];
      second += part[vectors_ + v];
    }
    const double size = static_cast<double>(gates) * hidden_size_;
    return {static_cast<float>(first / size), static_cast<float>(second / size)};
  }

 private:
  float* at(int64_t row, int group) const { return parts_.data() + (row * groups_ + group) * 2 * vectors_; }
  double part_size(int64_t vector, int gates) const {
    return static_cast<double>(gates) * smaller(kLanes, hidden_size_ - vector * kLanes);
  }

  const int groups_;
  const int64_t hidden_size_, vectors_;
  const Scratch parts_;
};

// What the backward pass needs of each row: for every vector of units x^ of W_hh h, of W_ih x and of c, then the
// reciprocals of the standard deviations.
template <Cell cell>
struct NormSaved {
  static constexpr int kGates = gate_count(cell), kGroups = group_count<cell>(), kStates = cell == Cell::lstm;
  static constexpr int kValues = 2 * kGates + kStates, kDeviations = 2 * kGroups + kStates;
  static constexpr int kHidden = 0, kInput = kGates, kState = 2 * kGates;  // among the values
  static constexpr int kHiddenDeviation = 0, kInputDeviation = kGroups, kStateDeviation = 2 * kGroups;

  static int64_t row_size(int64_t hidden_size) {
    return ceil_div(hidden_size, kLanes) * kValues * kLanes + kDeviations;
  }
  static int64_t value(int64_t unit, int index) { return (unit / kLanes * kValues + index) * kLanes; }
  static int64_t deviation(int64_t hidden_size, int index) {
    return ceil_div(hidden_size, kLanes) * kValues * kLanes + index;
  }
};

}  // namespace
}  // namespace fastrnn
