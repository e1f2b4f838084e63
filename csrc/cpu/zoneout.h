// Zoneout on vectors of units: each keeps its previous state with a probability, or, in evaluation, the expectation.
#pragma once

#include "cpu/pack.h"
#include "random.h"

namespace fastrnn {
namespace {

typedef uint32_t VecWord __attribute__((vector_size(FASTRNN_LANES * 4)));
typedef uint32_t VecWordUnaligned __attribute__((vector_size(FASTRNN_LANES * 4), aligned(4), may_alias));

class Zoneout {
 public:
  explicit Zoneout(const Problem& problem)
      : probability_(problem.zoneout),
        random_(problem.zoneout_random),
        seed_(problem.zoneout_seed),
        threshold_(static_cast<uint32_t>(static_cast<double>(problem.zoneout) * (1 << 24))),
        units_(random_ ? ceil_div(problem.hidden_size, kLanes) * kLanes + kLanes : 0) {
    if (!random_) return;
    uint32_t* words = reinterpret_cast<uint32_t*>(units_.data());
    for (int64_t unit = 0; unit < ceil_div(problem.hidden_size, kLanes) * kLanes; ++unit)
      words[unit] = mix32(static_cast<uint32_t>(unit + 1));
  }

  bool used() const { return probability_ > 0; }

  // Of one state (stream 0: h, 1: c) of one row at one step.
  struct Row {
    const Zoneout& zoneout;
    uint32_t key;

    VecInt kept(int64_t unit) const {
      const VecWord units = *reinterpret_cast<const VecWordUnaligned*>(zoneout.units_.data() + unit);
      return (mix32(units ^ key) >> 8) < zoneout.threshold_;
    }
    Vec apply(int64_t unit, Vec fresh, Vec old) const {
      if (!zoneout.random_) return zoneout.probability_ * old + (1.0f - zoneout.probability_) * fresh;
      return kept(unit) ? old : fresh;
    }
    // The parts of a gradient that go to the fresh and to the old state.
    void split(int64_t unit, Vec gradient, Vec& fresh, Vec& old) const {
      if (!zoneout.random_) {
        fresh = (1.0f - zoneout.probability_) * gradient;
        old = zoneout.probability_ * gradient;
      } else {
        const VecInt keep = kept(unit);
        fresh = keep ? Vec{} : gradient;
        old = keep ? gradient : Vec{};
      }
    }
  };

  Row row(uint32_t stream, int64_t t, int64_t b) const {
    return {*this, random_ ? row_key(seed_, stream, t, b) : 0};
  }

 private:
  const float probability_;
  const bool random_;
  const uint64_t seed_;
  const uint32_t threshold_;
  const Scratch units_;
};

}  // namespace
}  // namespace fastrnn
