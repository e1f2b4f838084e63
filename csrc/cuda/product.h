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

// K is cut into as many parts as a block has warps whatever the tile, and their sums are added as a tree over
// neighbours, so that the result of a row depends neither on the tile nor on the batch it came in.
constexpr int kParts = kWarps;

FASTRNN_DEVICE int chunks_of_part(int chunks) { return (chunks + kParts - 1) / kParts; }

// One warp's share: kOctets times 8 rows of the weights (8 hidden units, an octet for each gate), one, two or four
// neighbouring parts of K, up to 16 rows of the batch. Weights come in the order of pack_weights: the first kHeld
// chunks stay in registers, the next in shared memory, and what fits in neither is read from L2 at every step.
template <Math math, int kOctets, int kHeld, int kAhead>
class Product {
 public:
  static constexpr int kTiles = (kOctets + 1) / 2;
  static_assert(kHeld <= kAhead, "the first batch uses all chunks that registers hold");
  using Sums = float[kTiles][2][4];

  // packed: chunk 0 of this warp's unit group. K has `all_chunks`, of which `parts` parts from `first_part` on are this
  // warp's. `shared`: this warp's place for `shared_chunks` chunks.
  FASTRNN_DEVICE Product(const void* packed, int all_chunks, int first_part, int parts, void* shared, int shared_chunks)
      : part_chunks_(chunks_of_part(all_chunks)), first_(first_part * part_chunks_), shared_chunks_(shared_chunks) {
    const int left = all_chunks - first_, most = parts * part_chunks_;
    chunks_ = left < most ? left : most;
    const int lane = threadIdx.x % kWarpSize;
    streamed_ = static_cast<const Vec4*>(packed) + first_ * kOctets * kWarpSize + lane;
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
    Source source;
    source.rows = rows;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      source.present[n] = 8 * n + lane / 4 < rows;
      source.from[n] = values + (8 * n + lane / 4) * stride + first_ * kChunk<math> + lane % 4 * (kChunk<math> / 4);
    }
    Tree tree(sums, part_chunks_);
    multiply(tree, source, 0, [&](int i, int o) { return i < kHeld ? held_[i < kHeld ? i : 0][o] : weights(i, o); });
    for (int j = kAhead; j < chunks_; j += kAhead)
      multiply(tree, source, j, [&](int i, int o) { return weights(j + i, o); });
    tree.finish();
  }

 private:
  // Of a chunk that registers do not hold.
  FASTRNN_DEVICE Vec4 weights(int chunk, int octet) const {
    const int behind = chunk - kHeld;
    return behind < shared_chunks_ ? shared_[(behind * kOctets + octet) * kWarpSize]
                                   : streamed_[(chunk * kOctets + octet) * kWarpSize];
  }

  struct Source {
    const Element<math>* from[2];
    bool present[2];
    int rows;
  };

  // The sums of up to four parts, ((0 + 1) + (2 + 3)).
  struct Tree {
    Sums halves[2];  // of the part under way: two sums, since each product waits for the one before that it adds to
    Sums third;
    Sums& total;
    const int part_chunks;
    int left, parts = 0;  // chunks to the end of the part under way, parts that are done

    FASTRNN_DEVICE Tree(Sums& total_in, int part_chunks_in)
        : total(total_in), part_chunks(part_chunks_in), left(part_chunks_in) {
      each([&](int tile, int n, int e) { halves[0][tile][n][e] = halves[1][tile][n][e] = total[tile][n][e] = 0; });
    }

    template <class Function>
    FASTRNN_DEVICE void each(Function function) const {
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i) function(i / 8, i / 4 % 2, i % 4);
    }

    FASTRNN_DEVICE void chunk_done() {
      if (--left == 0) part_done();
    }

    FASTRNN_DEVICE void part_done() {
      each([&](int tile, int n, int e) {
        const float sum = halves[0][tile][n][e] + halves[1][tile][n][e];
        halves[0][tile][n][e] = halves[1][tile][n][e] = 0;
        if (parts == 2)
          third[tile][n][e] = sum;
        else
          total[tile][n][e] += parts == 3 ? third[tile][n][e] + sum : sum;
      });
      left = part_chunks;
      ++parts;
    }

    FASTRNN_DEVICE void finish() {
      if (left < part_chunks) part_done();
      if (parts == 3) each([&](int tile, int n, int e) { total[tile][n][e] += third[tile][n][e]; });
    }
  };

  template <class Weights>
  FASTRNN_DEVICE void multiply(Tree& tree, const Source& source, int j, Weights weights) const {
    Vec4 b[kAhead][2];
    // All loads before the first use. Most find their words written.
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        b[i][n] = source.present[n] && j + i < chunks_ ? load_exchanged(source.from[n] + (j + i) * kChunk<math>)
                                                       : Vec4{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (j + i >= chunks_) break;
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (!is_written(b[i][n])) b[i][n] = wait_exchanged(source.from[n] + (j + i) * kChunk<math>);
      sync_warp();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Vec4 low = weights(i, 2 * tile);
        const Vec4 high =
            2 * tile + 1 < kOctets ? weights(i, 2 * tile + 1 < kOctets ? 2 * tile + 1 : 0) : Vec4{0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (n == 1 && source.rows <= 8) break;
          multiply_chunk<math>(tree.halves[0][tile][n], tree.halves[1][tile][n], low, high, b[i][n]);
        }
      }
      tree.chunk_done();
    }
  }

  const int part_chunks_, first_, shared_chunks_;
  int chunks_;  // of this warp
  const Vec4* streamed_;
  Vec4* shared_;
  Vec4 held_[kHeld][kOctets];
};

// How the block's warps share a product: warp w has the unit group w % unit_groups and a share of K, unit_groups parts.
struct Share {
  int unit_group, part, parts, units;  // shares of K, and units of the block, a power of two

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

  // The sum over shares of K, as a tree.
  FASTRNN_DEVICE static void get(const float* parts, const Share& share, int row, int unit, float (&sums)[kOctets]) {
    float pairs[kParts / 2][kOctets];
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      if (i < share.parts) {
        float values[kOctets];
        load(parts + (i * kRowTile + row) * row_size(share.units) + unit * kFloats, values);
#pragma unroll
        for (int o = 0; o < kOctets; ++o) pairs[i / 2][o] = i % 2 ? pairs[i / 2][o] + values[o] : values[o];
      }
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      sums[o] = pairs[0][o];
      if (share.parts > 2) sums[o] += pairs[1][o];
      if (share.parts > 4) sums[o] += pairs[2][o] + pairs[3][o];
    }
  }

 private:
  FASTRNN_DEVICE static void load(const float* from, float (&values)[kOctets]) {
    if constexpr (kOctets == 1) {
      values[0] = from[0];
    } else {
      const Vec4 v = *reinterpret_cast<const Vec4*>(from);
      const float all[4] = {bits_float(v.x), bits_float(v.y), bits_float(v.z), bits_float(v.w)};
#pragma unroll
      for (int o = 0; o < kOctets; ++o) values[o] = all[o];
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
