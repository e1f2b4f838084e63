// The product of weights that stay on the chip and a vector per batch row that other blocks are still writing.
#pragma once

#include "cuda/activations.h"
#include "cuda/recurrence.h"

namespace fastrnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

template <Math math>
struct DataOf {
  using Element = float;
};
template <>
struct DataOf<Math::float16> {
  using Element = Float16;
};
template <>
struct DataOf<Math::bfloat16> {
  using Element = BFloat16;
};
template <Math math>
using Element = typename DataOf<math>::Element;

// Elements of K that one step of a warp covers: 16 bytes of each of 4 lanes. The order of K within a chunk is of no
// account as long as both factors have the same, so that a lane's 16 contiguous bytes are its part of two
// multiply_adds.
template <Math math>
constexpr int kChunk = 64 / sizeof(Element<math>);

// A float as the sum of two tf32 numbers.
struct Split {
  uint32_t big, small;
};
FASTRNN_DEVICE Split split(uint32_t bits) {
  const float value = bits_float(bits);
  const uint32_t big = round_to_tf32(value);
  const bool finite = (big & 0x7F800000u) != 0x7F800000u;
  return {big, finite ? round_to_tf32(value - bits_float(big)) : 0};
}

// Floats (math float32) are multiplied as three products of tf32, the smallest of the four terms left out.
template <Math math>
FASTRNN_DEVICE void multiply_words(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  if constexpr (math == Math::float32) {
    const Split s0 = split(a0), s1 = split(a1), s2 = split(a2), s3 = split(a3), t0 = split(b0), t1 = split(b1);
    multiply_add<float>(d, s0.small, s1.small, s2.small, s3.small, t0.big, t1.big);
    multiply_add<float>(d, s0.big, s1.big, s2.big, s3.big, t0.small, t1.small);
    multiply_add<float>(d, s0.big, s1.big, s2.big, s3.big, t0.big, t1.big);
  } else if constexpr (math == Math::tf32) {
    multiply_add<float>(d, a0, a1, a2, a3, round_to_tf32(bits_float(b0)), round_to_tf32(bits_float(b1)));
  } else {
    multiply_add<Element<math>>(d, a0, a1, a2, a3, b0, b1);
  }
}

// Tensor cores round sums towards zero: over a whole row of floats the error would grow to 20 times that of sums in
// float (emulated, K = 2400), so that floats are summed outside from chunk to chunk.
//
// The two halves of a chunk go to sums of their own, since each product waits for the one before that it adds to.
template <Math math>
FASTRNN_DEVICE void multiply_chunk(float (&first)[4], float (&second)[4], const Vec4& low, const Vec4& high,
                                   const Vec4& b) {
  if constexpr (math == Math::float32) {
    float sums[2][4] = {};
    multiply_words<math>(sums[0], low.x, high.x, low.y, high.y, b.x, b.y);
    multiply_words<math>(sums[1], low.z, high.z, low.w, high.w, b.z, b.w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first[i] += sums[0][i];
      second[i] += sums[1][i];
    }
  } else {
    multiply_words<math>(first, low.x, high.x, low.y, high.y, b.x, b.y);
    multiply_words<math>(second, low.z, high.z, low.w, high.w, b.z, b.w);
  }
}

// One warp's share: kOctets times 8 rows of the weights (8 hidden units, an octet for each gate), a part of K, up to 16
// rows of the batch. Weights come in the order of pack_weights: the first kHeld chunks stay in registers, the next in
// shared memory, and what fits in neither is read from L2 at every step.
template <Math math, int kOctets, int kHeld>
class Product {
 public:
  static constexpr int kTiles = (kOctets + 1) / 2;
  using Sums = float[kTiles][2][4];

  // packed: chunk 0 of this warp's unit group. `shared`: this warp's place for `shared_chunks` chunks.
  FASTRNN_DEVICE Product(const void* packed, int first, int chunks, void* shared, int shared_chunks)
      : first_(first), chunks_(chunks), shared_chunks_(shared_chunks) {
    const int lane = threadIdx.x % kWarpSize;
    streamed_ = static_cast<const Vec4*>(packed) + first * kOctets * kWarpSize + lane;
    shared_ = static_cast<Vec4*>(shared) + lane;
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
#pragma unroll
      for (int o = 0; o < kOctets; ++o)
        held_[j][o] = j < chunks_ ? streamed_[(j * kOctets + o) * kWarpSize] : Vec4{0, 0, 0, 0};
    // Each lane reads what it wrote itself.
    for (int j = 0; j < shared_chunks_ && kHeld + j < chunks_; ++j)
#pragma unroll
      for (int o = 0; o < kOctets; ++o)
        shared_[(j * kOctets + o) * kWarpSize] = streamed_[((kHeld + j) * kOctets + o) * kWarpSize];
  }

  // sums[tile][n][..] = weights times rows 8 n .. 8 n + 7 of `values` [rows, stride], waiting until they are written.
  FASTRNN_DEVICE void run(Sums& sums, const Element<math>* values, int64_t stride, int rows) const {
    const int lane = threadIdx.x % kWarpSize;
    const Element<math>* from[2];
    bool present[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      present[n] = 8 * n + lane / 4 < rows;
      from[n] = values + (8 * n + lane / 4) * stride + first_ * kChunk<math> + lane % 4 * (kChunk<math> / 4);
    }
    Sums chains[kChains];
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain)
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i) chains[chain][i / 8][i / 4 % 2][i % 4] = 0;

    multiply(chains, from, present, rows, 0, [&](int i, int o) { return held_[i][o]; });
    for (int j = kHeld; j < chunks_; j += kHeld)
      multiply(chains, from, present, rows, j, [&](int i, int o) {
        const int behind = j + i - kHeld;
        return behind < shared_chunks_ ? shared_[(behind * kOctets + o) * kWarpSize]
                                       : streamed_[((j + i) * kOctets + o) * kWarpSize];
      });
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) {
      float total = 0;
#pragma unroll
      for (int chain = 0; chain < kChains; ++chain) total += chains[chain][i / 8][i / 4 % 2][i % 4];
      sums[i / 8][i / 4 % 2][i % 4] = total;
    }
  }

 private:
  // Sums that are added up at the end: enough that products of two batches of 8 rows overlap.
  static constexpr int kChains = kOctets == 1 ? 4 : 2;

  template <class Weights>
  FASTRNN_DEVICE void multiply(Sums (&chains)[kChains], const Element<math>* const (&from)[2], const bool (&present)[2],
                               int rows, int j, Weights weights) const {
    Vec4 b[kHeld][2];
    // All loads before the first use. Most find their words written.
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        b[i][n] = present[n] && j + i < chunks_ ? load_exchanged(from[n] + (j + i) * kChunk<math>) : Vec4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (j + i >= chunks_) break;
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (!is_written(b[i][n])) b[i][n] = wait_exchanged(from[n] + (j + i) * kChunk<math>);
      sync_warp();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Vec4 low = weights(i, 2 * tile);
        const Vec4 high =
            2 * tile + 1 < kOctets ? weights(i, 2 * tile + 1 < kOctets ? 2 * tile + 1 : 0) : Vec4{0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n == 1 && rows <= 8) break;
          const int chain = 2 * i % kChains;
          multiply_chunk<math>(chains[chain][tile][n], chains[chain + 1][tile][n], low, high, b[i][n]);
        }
      }
    }
  }

  const int first_, chunks_, shared_chunks_;
  const Vec4* streamed_;
  Vec4* shared_;
  Vec4 held_[kHeld][kOctets];
};

// How the block's warps share a product: warp w has the unit group w % unit_groups and a part of K.
struct Share {
  int unit_group, part, parts, units;  // units of the block, a power of two

  FASTRNN_DEVICE explicit Share(int unit_groups)
      : unit_group(threadIdx.x / kWarpSize % unit_groups),
        part(threadIdx.x / kWarpSize / unit_groups),
        parts(kWarps / unit_groups),
        units(unit_groups * static_cast<int>(kUnitGroup)) {}
};

// Where the parts of a product meet: [part][row][unit][kOctets], the gates of a unit side by side (in 4 floats), rows
// padded so that neither writing fragments nor reading units has bank conflicts.
template <int kOctets>
struct Parts {
  static constexpr int kFloats = kOctets == 1 ? 1 : 4;

  FASTRNN_DEVICE static int row_size(int units) { return kOctets == 1 ? units + 4 : (units + 1) * 4; }

  template <class Sums>
  FASTRNN_DEVICE static void put(float* parts, const Share& share, const Sums& sums) {
    const int lane = threadIdx.x % kWarpSize;
    const int unit = share.unit_group * static_cast<int>(kUnitGroup) + lane / 4;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = 8 * n + lane % 4 * 2 + column;
        float* to = parts + (share.part * kRowTile + row) * row_size(share.units) + unit * kFloats;
        if constexpr (kOctets == 1) {
          to[0] = sums[0][n][column];
        } else {
          constexpr int kLast = kOctets > 2;
          *reinterpret_cast<Vec4*>(to) = {float_bits(sums[0][n][column]), float_bits(sums[0][n][2 + column]),
                                          float_bits(sums[kLast][n][column]), float_bits(sums[kLast][n][2 + column])};
        }
      }
  }

  // The sum over parts, in their order.
  FASTRNN_DEVICE static void get(const float* parts, const Share& share, int row, int unit, float (&sums)[kOctets]) {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) sums[o] = 0;
    for (int part = 0; part < share.parts; ++part) {
      const float* from = parts + (part * kRowTile + row) * row_size(share.units) + unit * kFloats;
      if constexpr (kOctets == 1) {
        sums[0] += from[0];
      } else {
        const Vec4 v = *reinterpret_cast<const Vec4*>(from);
        const float values[4] = {bits_float(v.x), bits_float(v.y), bits_float(v.z), bits_float(v.w)};
#pragma unroll
        for (int o = 0; o < kOctets; ++o) sums[o] += values[o];
      }
    }
  }
};

// Floats of two sets of parts: a step's are read while the fastest warps write the next one's, so that one block
// barrier between writing and reading is all that a step needs.
constexpr int parts_floats(int unit_groups) {
  return 2 * (kWarps / unit_groups) * static_cast<int>(kRowTile) * (unit_groups * static_cast<int>(kUnitGroup) + 1) * 4;
}

}  // namespace
}  // namespace fastrnn::cuda
