// Zoneout on vectors of units: each keeps its previous state with a probability, or, in evaluation, the expectation.
#pragma once

#include "cpu/mask.h"
#include "cpu/recurrence.h"

namespace fastrnn {
namespace {

class Zoneout {
 public:
  explicit Zoneout(const Problem& problem)
      : probability_(problem.zoneout),
        random_(problem.zoneout_random),
        seed_(problem.zoneout_seed),
        mask_(problem.zoneout, random_ ? larger(problem.hidden_size, problem.output_size) : 0) {}

  bool used() const { return probability_ > 0; }

  // Of one state (stream 0: h, 1: c) of one row at one step.
  struct Row {
    const Zoneout& zoneout;
    uint32_t key;

    VecInt kept(int64_t unit) const { return zoneout.mask_.drawn(key, unit); }
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

  Row row(uint32_t stream, int64_t t, int64_t b) const { return {*this, random_ ? row_key(seed_, stream, t, b) : 0}; }

 private:
  const float probability_;
  const bool random_;
  const uint64_t seed_;
  const RandomMask mask_;
};

}  // namespace
}  // namespace fastrnn
