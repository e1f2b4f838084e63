// Layer norm (Ba et al. 2016) of rows whose units are spread over blocks. Each group of 8 units is measured by itself;
// all parts are combined in one order, whatever the tile, so that every block finds the same bits.
#pragma once

#include "cuda/block.h"

namespace fastrnn::cuda {
namespace {

constexpr float kNormEpsilon = 1e-5f;

// Gates of the first product that are normalised as one vector.
constexpr int norm_split(Cell cell) { return is_gru(cell) ? 2 : gate_count(cell); }

struct Moments {
  float count, mean, squares;  // squares: of differences from the mean
};

// Chan et al. 1983.
FASTRNN_DEVICE Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float difference = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + difference * share, a.squares + b.squares + difference * difference * a.count * share};
}

// What the blocks hand each other of one row, 16 bytes for each group of 8 units: two numbers for each of two groups of
// gates. The 8 lanes of a group work together.
struct RowExchange {
  Vec4* parts;
  int count;
  int64_t hidden_size;

  FASTRNN_DEVICE RowExchange(void* stats, int phase, int64_t t, int64_t b, const Problem& problem)
      : count(static_cast<int>(padded_size(problem.hidden_size) / kUnitGroup)), hidden_size(problem.hidden_size) {
    parts = static_cast<Vec4*>(stats) + ((phase * problem.steps + t) * problem.batch + b) * count;
  }

  // Units of a group that are no padding.
  FASTRNN_DEVICE int units_of(int group) const {
    const int64_t left = hidden_size - group * kUnitGroup;
    return left < 0 ? 0 : left < kUnitGroup ? static_cast<int>(left) : static_cast<int>(kUnitGroup);
  }

  // Over the lanes of the group; the same bits in each.
  FASTRNN_DEVICE float sum(float value) const {
#pragma unroll
    for (int d = 4; d > 0; d /= 2) value += shuffle_xor(value, d);
    return value;
  }

  FASTRNN_DEVICE void put(int group, float a0, float a1, float b0, float b1) const {
    store_exchanged(parts + group,
                    Vec4{exchanged_bits(a0), exchanged_bits(a1), exchanged_bits(b0), exchanged_bits(b1)});
  }

  // use(group, part) for the groups lane, lane + 8, ...: several loads under way at a time.
  template <class Use>
  FASTRNN_DEVICE void each(int lane, Use use) const {
    constexpr int kAhead = 4, kLanes = kUnitGroup;
    for (int first = lane; first < count; first += kAhead * kLanes) {
      Vec4 v[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * kLanes < count) v[i] = load_exchanged(parts + first + i * kLanes);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i * kLanes >= count) break;
        use(first + i * kLanes, is_written(v[i]) ? v[i] : wait_exchanged(parts + first + i * kLanes));
      }
    }
  }
};

// The gates [0, kSplit) are normalised as one vector over all units, those from kSplit on as another.
template <int kGates, int kSplit>
struct Norms {
  static constexpr int kGroups = kSplit < kGates ? 2 : 1;

  // Hands over the moments of the block's units. All lanes of the warp take part.
  FASTRNN_DEVICE static void put(const RowExchange& row, const CellPlace& place, const float (&values)[kGates]) {
    const int units = row.units_of(place.unit_group());
    float means[2] = {}, squares[2] = {};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int begin = group ? kSplit : 0, end = group ? kGates : kSplit;
      float total = 0;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        if (gate >= begin && gate < end) total += values[gate];
      total = row.sum(place.used ? total : 0);
      means[group] = units ? total / static_cast<float>((end - begin) * units) : 0;
      float square = 0;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate)
        if (gate >= begin && gate < end) square += (values[gate] - means[group]) * (values[gate] - means[group]);
      squares[group] = row.sum(place.used ? square : 0);
    }
    if (place.has_row && place.lane() == 0) row.put(place.unit_group(), means[0], squares[0], means[1], squares[1]);
  }

  // Normalises the values; deviations[group] = 1 / sqrt(variance + epsilon). All lanes of the warp take part.
  FASTRNN_DEVICE static void get(const RowExchange& row, const CellPlace& place, float (&values)[kGates],
                                 float (&means)[2], float (&deviations)[2]) {
    Moments found[2] = {};
    if (place.has_row)
      row.each(place.lane(), [&](int group, const Vec4& v) {
        const float units = static_cast<float>(row.units_of(group));
        found[0] = merged(found[0], {kSplit * units, bits_float(v.x), bits_float(v.y)});
        if constexpr (kGroups == 2)
          found[1] = merged(found[1], {(kGates - kSplit) * units, bits_float(v.z), bits_float(v.w)});
      });
    sync_warp();
    const int first_lane = static_cast<int>(threadIdx.x) % kWarpSize - place.lane();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int d = 4; d > 0; d /= 2) {
        const Moments other = {shuffle_xor(found[group].count, d), shuffle_xor(found[group].mean, d),
                               shuffle_xor(found[group].squares, d)};
        found[group] = merged(found[group], other);
      }
      // Merging is not commutative to the last bit: one lane's word holds.
      means[group] = shuffle(found[group].mean, first_lane);
      const float squares = shuffle(found[group].squares, first_lane);
      const int gates = group ? kGates - kSplit : kSplit;
      const float count = static_cast<float>(gates) * static_cast<float>(row.hidden_size);
      deviations[group] = reciprocal_sqrt(squares / count + kNormEpsilon);
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int group = gate >= kSplit;
      values[gate] = (values[gate] - means[group]) * deviations[group];
    }
  }

  // Hands over the sums of the gradients of the normalised values, and of their products with those values.
  FASTRNN_DEVICE static void put_gradient(const RowExchange& row, const CellPlace& place,
                                          const float (&gradients)[kGates], const float (&normed)[kGates]) {
    float sums[2] = {}, products[2] = {};
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      sums[gate >= kSplit] += gradients[gate];
      products[gate >= kSplit] += gradients[gate] * normed[gate];
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      sums[group] = row.sum(place.used ? sums[group] : 0);
      products[group] = row.sum(place.used ? products[group] : 0);
    }
    if (place.has_row && place.lane() == 0) row.put(place.unit_group(), sums[0], products[0], sums[1], products[1]);
  }

  // gradients: of the normalised values on entry, of the values on return.
  FASTRNN_DEVICE static void get_gradient(const RowExchange& row, const CellPlace& place, const float (&normed)[kGates],
                                          const float (&deviations)[2], float (&gradients)[kGates]) {
    float sums[2] = {}, products[2] = {};
    if (place.has_row)
      row.each(place.lane(), [&](int, const Vec4& v) {
        sums[0] += bits_float(v.x);
        products[0] += bits_float(v.y);
        sums[1] += bits_float(v.z);
        products[1] += bits_float(v.w);
      });
    sync_warp();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int gates = group ? kGates - kSplit : kSplit;
      const float share = 1.0f / (static_cast<float>(gates) * static_cast<float>(row.hidden_size));
      sums[group] = row.sum(sums[group]) * share;
      products[group] = row.sum(products[group]) * share;
    }
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      const int group = gate >= kSplit;
      gradients[gate] = deviations[group] * (gradients[gate] - sums[group] - normed[gate] * products[group]);
    }
  }
};

}  // namespace
}  // namespace fastrnn::cuda
