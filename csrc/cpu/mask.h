// Random masks on vectors of units, as random.h draws them.
#pragma once

#include "cpu/pack.h"
#include "random.h"

namespace fastrnn {
namespace {

typedef uint32_t VecWord __attribute__((vector_size(FASTRNN_LANES * 4)));
typedef uint32_t VecWordUnaligned __attribute__((vector_size(FASTRNN_LANES * 4), aligned(4), may_alias));

class RandomMask {
 public:
  // Of rows of `units` units, each true with the given probability.
  RandomMask(double probability, int64_t units)
      : threshold_(static_cast<int32_t>(probability * (1 << 24))),
        words_(units > 0 ? ceil_div(units, kLanes) * kLanes + kLanes : 0) {
    uint32_t* words = reinterpret_cast<uint32_t*>(words_.data());
    for (int64_t unit = 0; unit < ceil_div(units, kLanes) * kLanes; ++unit)
      words[unit] = mix32(static_cast<uint32_t>(unit + 1));
  }

  // Of the units from `unit` on, in the row with this key.
  VecInt drawn(uint32_t key, int64_t unit) const {
    const VecWord words = *reinterpret_cast<const VecWordUnaligned*>(words_.data() + unit);
    return reinterpret_cast<VecInt>(mix32(words ^ key) >> 8) < threshold_;
  }

 private:
  const int32_t threshold_;
  const Scratch words_;
};

}  // namespace
}  // namespace fastrnn
