// Log-softmax and the k best of each group of rows, in one read of the logits. A row goes by in blocks that stay in L1:
// their largest element, the sum of exponentials relative to it, and what comes before the k best so far. Blocks are
// combined in order, whoever read them, so that a row's result does not depend on the threads.
#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/top_k.h"

namespace fastrnn {
namespace {

constexpr int64_t kBlock = 2048;
constexpr int64_t kProjectedBlock = 512;  // of 80 rows: 160 KB, which stay in L2 beside a panel of W
constexpr int32_t kLowest = INT32_MIN;

// Floats in order as integers, NaN below all and -0 equal to 0.
inline __attribute__((always_inline)) VecInt order_of(Vec x) {
  const VecInt b = bits(x + 0.0f);
  const VecInt ordered = b ^ ((b >> 31) & 0x7fffffff);
  return x == x ? ordered : VecInt{} + kLowest;
}

inline int32_t order_of(float x) { return order_of(splat(x))[0]; }

inline float value_of(int32_t order) {
  const int32_t b = order ^ ((order >> 31) & 0x7fffffff);
  float value;
  __builtin_memcpy(&value, &b, sizeof value);
  return order == kLowest ? __builtin_nanf("") : value;
}

constexpr int kTogether = 4;  // vectors that are compared before a branch

// A bit for each lane that is above.
inline __attribute__((always_inline)) uint32_t lanes_above(Vec x, Vec limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GT_OQ)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint32_t>(x[i] > limit[i]) << i;
  return lanes;
#endif
}

struct Candidate {
  int64_t index;
  int32_t order;

  bool before(const Candidate& other) const { return order != other.order ? order > other.order : index < other.index; }
};

// The k best so far; the worst of them comes first.
class Best {
 public:
  Best(Candidate* heap, int64_t k, int64_t count) : heap_(heap), k_(k), count_(count) {}

  // What a later candidate must exceed; the lowest of all while there is room.
  int32_t limit() const { return heap_[0].order; }
  bool full() const { return count_ == k_; }
  int64_t count() const { return count_; }

  void offer(Candidate candidate) {
    if (!full()) {
      int64_t at = count_++;
      for (; at > 0 && heap_[(at - 1) / 2].before(candidate); at = (at - 1) / 2) heap_[at] = heap_[(at - 1) / 2];
      heap_[at] = candidate;
    } else if (candidate.before(heap_[0])) {
      settle(candidate, count_);
    }
  }

  // Puts them in order, best first; returns how many there are.
  int64_t sort() {
    for (int64_t last = count_ - 1; last > 0; --last) {
      const Candidate moved = heap_[last];
      heap_[last] = heap_[0];
      settle(moved, last);
    }
    return count_;
  }

 private:
  // Replaces the first of `count`.
  void settle(Candidate candidate, int64_t count) {
    int64_t at = 0;
    for (int64_t child = 1; child < count; child = 2 * at + 1) {
      if (child + 1 < count && heap_[child].before(heap_[child + 1])) ++child;
      if (!candidate.before(heap_[child])) break;
      heap_[at] = heap_[child];
      at = child;
    }
    heap_[at] = candidate;
  }

  Candidate* const heap_;
  const int64_t k_;
  int64_t count_;
};

// e^x for x <= 0, to 2e-9 but for the rounding of x log2 e, which grows as terms stop mattering; 1e-38 below -87. A
// third fewer instructions than exp_nonpositive. The polynomial is a minimax fit (Lawson's iteration) of 2^f.
inline __attribute__((always_inline)) Vec exp_of_term(Vec x) {
  Vec t = x * 1.44269504088896341f;
  t = at_least(-126.0f, t);
#if defined(__AVX512F__)
  const Vec n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23
  const Vec n = (t + magic) - magic;
#endif
  const Vec f = t - n;
  Vec p = f * 0.00015353361917254567f + 0.0013398874414315282f;
  p = p * f + 0.00961843735764695f;
  p = p * f + 0.05550332471125398f;
  p = p * f + 0.24022647913628953f;
  p = p * f + 0.6931472028550668f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return from_bits(bits(p) + (bits(n + magic) << 23));
#endif
}

struct BlockSum {
  float largest, sum;  // sum of e^{x - largest}; NaN where an x is NaN or inf
};

// One block of a row, whose first token is `first`. Without `exponentials` the sum is NaN or not, no more.
inline BlockSum read_block(const float* logits, int64_t count, int64_t first, bool exponentials, Best& best) {
  const Vec lowest = splat(-__builtin_inff());
  Vec most[kTogether];
  for (Vec& vector : most) vector = lowest;
  // NaN is above nothing and nothing is above NaN, which a search full of it must find out slowly.
  float limit = best.full() ? value_of(best.limit()) : __builtin_nanf("");
  constexpr int64_t kStride = kTogether * kLanes;
  for (int64_t i = 0; i < count; i += kStride) {
    if (i + kStride <= count && limit == limit) {
      uint32_t above[kTogether], any = 0;
#pragma GCC unroll 4
      for (int v = 0; v < kTogether; ++v) {
        const Vec x = load(logits + i + v * kLanes);
        most[v] = x > most[v] ? x : most[v];
        any |= above[v] = lanes_above(x, splat(limit));
      }
      if (__builtin_expect(any == 0, 1)) continue;
      for (int v = 0; v < kTogether; ++v)
        for (uint32_t lanes = above[v]; lanes != 0; lanes &= lanes - 1) {
          const int64_t at = i + v * kLanes + __builtin_ctz(lanes);
          // Later ones come behind equal ones.
          if (logits[at] > limit) best.offer({first + at, order_of(logits[at])});
          limit = value_of(best.limit());
        }
      continue;
    }
    for (int64_t at = i; at < smaller(i + kStride, count); ++at) {
      const float x = logits[at];
      if (x > most[0][0]) most[0][0] = x;
      if (!(x <= limit)) best.offer({first + at, order_of(x)});
    }
    if (best.full()) limit = value_of(best.limit());
  }
  for (int v = 1; v < kTogether; ++v) most[0] = most[v] > most[0] ? most[v] : most[0];
  float largest = most[0][0];
  for (int lane = 1; lane < kLanes; ++lane) largest = most[0][lane] > largest ? most[0][lane] : largest;
  const float infinity = __builtin_inff();
  if (!exponentials || largest == infinity || largest == -infinity) {
    int32_t broken = 0;
    for (int64_t i = 0; i < count; ++i) broken |= !(logits[i] < infinity);
    return {largest, broken ? __builtin_nanf("") : 0.0f};
  }
  Vec sums = {}, more = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    // The block that comes next, while there is something to compute.
    __builtin_prefetch(logits + i + count);
    __builtin_prefetch(logits + i + count + kLanes);
    sums += exp_of_term(load(logits + i) - largest);
    more += exp_of_term(load(logits + i + kLanes) - largest);
  }
  sums += more;
  for (; i + kLanes <= count; i += kLanes) sums += exp_of_term(load(logits + i) - largest);
  if (i < count) {
    Vec x = lowest;
    for (int64_t lane = 0; lane < count - i; ++lane) x[lane] = logits[i + lane];
    sums += exp_of_term(x - largest);
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return {largest, sum};
}

// log sum e^x of a row from its blocks.
inline float log_sum(const BlockSum* blocks, int64_t count) {
  float largest = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i) largest = blocks[i].largest > largest ? blocks[i].largest : largest;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float shift = blocks[i].largest - largest;
    sum += blocks[i].largest == largest ? blocks[i].sum : blocks[i].sum * __builtin_exp(static_cast<double>(shift));
  }
  return largest + static_cast<float>(__builtin_log(sum));
}

// What the first pass leaves for the second: of each row the sums of its blocks, and of each part of a row the best.
struct Found {
  const int64_t kept, blocks, parts, items;
  const Scratch candidate_memory, sum_memory, count_memory;

  Found(int64_t rows, int64_t kept_of_each, int64_t blocks_of_each, int64_t parts_of_each)
      : kept(kept_of_each),
        blocks(blocks_of_each),
        parts(parts_of_each),
        items(rows * parts),
        candidate_memory(items * kept * sizeof(Candidate) / sizeof(float)),
        sum_memory(2 * rows * blocks),
        count_memory(2 * items) {}

  Candidate* candidates(int64_t item) const {
    return reinterpret_cast<Candidate*>(candidate_memory.data()) + item * kept;
  }
  BlockSum* sums(int64_t row) const { return reinterpret_cast<BlockSum*>(sum_memory.data()) + row * blocks; }
  int64_t& count(int64_t item) const { return reinterpret_cast<int64_t*>(count_memory.data())[item]; }
  int64_t first_block(int64_t part) const { return blocks * part / parts; }
};

// Logits in memory: each thread takes rows, or parts of rows where these are few.
inline void read_logits(const TopK& call, const Found& found, int64_t slots) {
  const Scratch widening(slots * kBlock);
  on_team(slots, [&](int64_t begin, int64_t end) {
    for (int64_t item = found.items * begin / slots; item < found.items * end / slots; ++item) {
      const int64_t row = item / found.parts, part = item % found.parts;
      Best best(found.candidates(item), found.kept, 0);
      for (int64_t block = found.first_block(part); block < found.first_block(part + 1); ++block) {
        const int64_t first = block * kBlock, count = smaller(kBlock, call.vocabulary - first);
        const float* logits = static_cast<const float*>(call.logits) + row * call.stride + first;
        if (call.number != Number::float32) {
          Matrices narrow{static_cast<const float*>(call.logits), 0, call.stride};
          narrow.data =
              reinterpret_cast<const float*>(static_cast<const uint16_t*>(call.logits) + row * call.stride + first);
          widen(call.number, narrow, 0, 0, 1, count, widening.data() + begin * kBlock);
          logits = narrow.data;
        }
        found.sums(row)[block] = read_block(logits, count, first, call.given == nullptr, best);
      }
      found.count(item) = best.sort();
    }
  });
}

// Logits as a product: each thread takes a part of the vocabulary, whose logits are read while they are in its cache.
inline void project(const TopK& call, const Found& found) {
  const int64_t rows = call.groups * call.group_size;
  const Scratch logits(found.parts * rows * kProjectedBlock);
  on_team(found.parts, [&](int64_t begin, int64_t end) {
    const RowTiles tiles(rows, max_rows<2>());
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t row = 0; row < rows; ++row) found.count(row * found.parts + part) = 0;
      float* block_logits = logits.data() + part * rows * kProjectedBlock;
      for (int64_t block = found.first_block(part); block < found.first_block(part + 1); ++block) {
        const int64_t first = block * kProjectedBlock, count = smaller(kProjectedBlock, call.vocabulary - first);
        for (int64_t n = 0; n < count; n += kColumns) {
          const float* panel = static_cast<const float*>(call.panels) + (first + n) * call.depth;
          float bias[kColumns] = {};
          if (call.bias) __builtin_memcpy(bias, call.bias + first + n, smaller(kColumns, count - n) * sizeof(float));
          for (int64_t k = 0; k < call.depth; k += kSumDepth)
            for (int64_t i = 0; i < tiles.count; ++i) {
              float* c = block_logits + tiles.begin(i) * kProjectedBlock + n;
              const int64_t depth = smaller(kSumDepth, call.depth - k);
              const Word* weights = panel + k * kColumns;
              tile_rows<2, false>(tiles.begin(i + 1) - tiles.begin(i), depth, call.x + tiles.begin(i) * call.depth + k,
                                  call.depth, weights, kColumns, k > 0 ? Start{c, kProjectedBlock} : Start{bias, 0}, c,
                                  kProjectedBlock, lines_after(weights, depth, i));
            }
        }
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t item = row * found.parts + part;
          Best best(found.candidates(item), found.kept, found.count(item));
          found.sums(row)[block] =
              read_block(block_logits + row * kProjectedBlock, count, first, call.given == nullptr, best);
          found.count(item) = best.count();
        }
      }
      for (int64_t item = part; item < found.items; item += found.parts)
        Best(found.candidates(item), found.kept, found.count(item)).sort();
    }
  });
}

// The second pass: the best of each group's rows by their normalizers and scores.
inline void merge(const TopK& call, const Found& found, int64_t threads) {
  const int64_t kept = found.kept, parts = found.parts;
  constexpr int64_t kFloats = sizeof(Candidate) / sizeof(float);
  const Scratch merged(call.groups * call.k * kFloats);
  // Of each row the best, best first.
  const Scratch whole(parts == 1 ? 0 : call.groups * call.group_size * kept * kFloats);
  Candidate* of_rows = parts == 1 ? found.candidates(0) : reinterpret_cast<Candidate*>(whole.data());
  const int64_t team = larger(1, smaller(threads, call.groups));
  on_team(team, [&](int64_t begin, int64_t end) {
    for (int64_t group = call.groups * begin / team; group < call.groups * end / team; ++group) {
      Candidate* sorted = reinterpret_cast<Candidate*>(merged.data()) + group * call.k;
      Best best(sorted, call.k, 0);
      for (int64_t i = 0; i < call.group_size; ++i) {
        const int64_t row = group * call.group_size + i;
        const float score = call.scores ? call.scores[row] : 0.0f;
        float normalizer = log_sum(found.sums(row), found.blocks);
        if (call.given && normalizer == normalizer) normalizer = call.given[row];
        call.normalizers[row] = normalizer;
        Candidate* own = of_rows + row * kept;
        if (parts > 1) {
          Best of_row(own, kept, 0);
          for (int64_t item = row * parts; item < (row + 1) * parts; ++item)
            for (int64_t c = 0; c < found.count(item); ++c) of_row.offer(found.candidates(item)[c]);
          of_row.sort();
        }
        const bool broken = normalizer != normalizer || score != score;
        for (int64_t c = 0; c < kept; ++c) {
          const float logit = value_of(own[c].order);
          // -inf stays: a token that is not allowed, also where none is.
          const float value = logit == -__builtin_inff() && !broken ? logit : logit - normalizer + score;
          // Equal values as they come.
          best.offer({i * kept + c, order_of(value)});
        }
      }
      const int64_t count = best.sort();
      for (int64_t c = 0; c < count; ++c) {
        call.values[group * call.k + c] = value_of(sorted[c].order);
        const int64_t row = sorted[c].index / kept;
        const Candidate& token = of_rows[(group * call.group_size + row) * kept + sorted[c].index % kept];
        call.indices[group * call.k + c] = row * call.vocabulary + token.index;
      }
    }
  });
}

inline void top_k(const TopK& call, int threads) {
  const int64_t rows = call.groups * call.group_size, kept = smaller(call.k, call.vocabulary);
  if (call.panels) {
    const int64_t blocks = larger(1, ceil_div(call.vocabulary, kProjectedBlock));
    const int64_t slots = smaller(smaller(threads, blocks), rows * call.depth * call.vocabulary >> 18);
    const Found found(rows, kept, blocks, larger(1, slots));
    project(call, found);
    return merge(call, found, found.parts);
  }
  const int64_t blocks = larger(1, ceil_div(call.vocabulary, kBlock));
  const int64_t wanted = larger(1, smaller(threads, rows * call.vocabulary >> 13));
  // Few rows are cut into parts of whole blocks.
  const Found found(rows, kept, blocks, rows >= wanted ? 1 : smaller(blocks, ceil_div(wanted, larger(1, rows))));
  const int64_t slots = larger(1, smaller(wanted, found.items));
  read_logits(call, found, slots);
  merge(call, found, slots);
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_DEFINE_TOP_K(name)                                           \
  namespace fastrnn::cpu {                                                   \
  void top_k_##name(const TopK& call, int threads) { top_k(call, threads); } \
  }
