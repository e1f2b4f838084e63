// The counter-based generator of random masks: the bit of (seed, stream, t, b, unit) depends on nothing else, so
// forward and backward draw the same mask and none is kept. Streams 0 and 1 are zoneout's of h and c; dropout's has
// t = 0, the row as b and the column as unit. The specification is zoneout_mask in fastrnn/reference/recurrence.py.
#pragma once

#include <stdint.h>

#include "cells.h"

namespace fastrnn {
namespace {

constexpr uint32_t kDropoutStream = 2;

// The finaliser of MurmurHash3; V is uint32_t or a vector of them.
template <class V>
FASTRNN_CELL V mix32(V x) {
  x = x ^ (x >> 16);
  x = x * 0x85EBCA6Bu;
  x = x ^ (x >> 13);
  x = x * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// What all units of one row share; mix32(key ^ mix32(unit + 1)) is then the unit's word.
FASTRNN_CELL uint32_t row_key(uint64_t seed, uint32_t stream, int64_t t, int64_t b) {
  uint32_t word = mix32(static_cast<uint32_t>(seed) ^ static_cast<uint32_t>(seed >> 32));
  word = mix32(word ^ stream);
  word = mix32(word ^ static_cast<uint32_t>(t));
  return mix32(word ^ static_cast<uint32_t>(b));
}

}  // namespace
}  // namespace fastrnn
