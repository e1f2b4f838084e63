// Log-softmax and the k best of each group of rows, in one read of the logits. A row goes by in blocks that stay in L1:
// their largest element, the sum of exponentials relative to it, and what comes before the k best so far. Blocks are
// combined in order, whoever read them, so that a row's result does not depend on the threads.
#pragma once

#include "cpu/attention_kernels.h"
#include "cpu/top_k.h"

namespace fastrnn {
namespace {

constexpr int64_t kBlock = 2048;
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

inline bool any_lane(VecInt mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= mask[i];
  return any != 0;
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
  Best(Candidate* heap, int64_t k) : heap_(heap), k_(k) {}

  // What a later candidate must exceed; the lowest of all while there is room.
  int32_t limit() const { return heap_[0].order; }
  bool full() const { return count_ == k_; }

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
  int64_t count_ = 0;
};

struct BlockSum {
  float largest, sum;  // sum of e^{x - largest}; NaN where an x is NaN or inf
};

// One block of a row, whose first token is `first`. Without `exponentials` the sum is NaN or not, no more.
inline BlockSum read_block(const float* logits, int64_t count, int64_t first, bool exponentials, Best& best) {
  const Vec lowest = splat(-__builtin_inff());
  Vec most = lowest;
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t valid = smaller(kLanes, count - i);
    const Vec x = load(logits + i, valid);
    if (best.full() && valid == kLanes) {
      most = x > most ? x : most;
      if (!any_lane(order_of(x) > VecInt{} + best.limit())) continue;
    }
    for (int64_t lane = 0; lane < valid; ++lane) {
      if (x[lane] > most[lane]) most[lane] = x[lane];
      best.offer({first + i + lane, order_of(x[lane])});
    }
  }
  float largest = most[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  const float infinity = __builtin_inff();
  if (!exponentials || largest == infinity || largest == -infinity) {
    int32_t broken = 0;
    for (int64_t i = 0; i < count; ++i) broken |= !(logits[i] < infinity);
    return {largest, broken ? __builtin_nanf("") : 0.0f};
  }
  Vec sums = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += exp_nonpositive(load(logits + i) - largest);
  if (i < count) {
    Vec x = lowest;
    for (int64_t lane = 0; lane < count - i; ++lane) x[lane] = logits[i + lane];
    sums += exp_nonpositive(x - largest);
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

inline void top_k(const TopK& call, int threads) {
  const int64_t rows = call.groups * call.group_size, vocabulary = call.vocabulary;
  const int64_t kept = smaller(call.k, vocabulary), blocks = larger(1, ceil_div(vocabulary, kBlock));
  const int64_t wanted = larger(1, smaller(threads, rows * vocabulary >> 13));
  // Few rows are cut into parts of whole blocks.
  const int64_t parts = rows >= wanted ? 1 : smaller(blocks, ceil_div(wanted, larger(1, rows)));
  const int64_t items = rows * parts, slots = larger(1, smaller(wanted, items));
  constexpr int64_t kFloats = sizeof(Candidate) / sizeof(float);
  const Scratch found(items * kept * kFloats), merged(call.groups * call.k * kFloats);
  const Scratch whole(parts == 1 ? 0 : rows * kept * kFloats);
  const Scratch block_sums(2 * rows * blocks), widening(slots * kBlock), counts(2 * items);
  Candidate* candidates = reinterpret_cast<Candidate*>(found.data());
  // Of each row the best, best first.
  Candidate* of_rows = parts == 1 ? candidates : reinterpret_cast<Candidate*>(whole.data());
  BlockSum* sums = reinterpret_cast<BlockSum*>(block_sums.data());
  int64_t* found_counts = reinterpret_cast<int64_t*>(counts.data());

  on_team(slots, [&](int64_t begin, int64_t end) {
    for (int64_t item = items * begin / slots; item < items * end / slots; ++item) {
      const int64_t row = item / parts, part = item % parts;
      Best best(candidates + item * kept, kept);
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
        const int64_t first = block * kBlock, count = smaller(kBlock, vocabulary - first);
        const float* logits = static_cast<const float*>(call.logits) + row * call.stride + first;
        if (call.number != Number::float32) {
          Matrices narrow{static_cast<const float*>(call.logits), 0, call.stride};
          narrow.data =
              reinterpret_cast<const float*>(static_cast<const uint16_t*>(call.logits) + row * call.stride + first);
          widen(call.number, narrow, 0, 0, 1, count, widening.data() + begin * kBlock);
          logits = narrow.data;
        }
        sums[row * blocks + block] = read_block(logits, count, first, call.given == nullptr, best);
      }
      found_counts[item] = best.sort();
    }
  });

  on_team(larger(1, smaller(slots, call.groups)), [&](int64_t begin, int64_t end) {
    const int64_t team = larger(1, smaller(slots, call.groups));
    for (int64_t group = call.groups * begin / team; group < call.groups * end / team; ++group) {
      Best best(reinterpret_cast<Candidate*>(merged.data()) + group * call.k, call.k);
      for (int64_t i = 0; i < call.group_size; ++i) {
        const int64_t row = group * call.group_size + i;
        const float score = call.scores ? call.scores[row] : 0.0f;
        float normalizer = log_sum(sums + row * blocks, blocks);
        if (call.given && normalizer == normalizer) normalizer = call.given[row];
        call.normalizers[row] = normalizer;
        const Candidate* own = of_rows + row * kept;
        if (parts > 1) {
          Best of_row(of_rows + row * kept, kept);
          for (int64_t item = row * parts; item < (row + 1) * parts; ++item)
            for (int64_t c = 0; c < found_counts[item]; ++c) of_row.offer(candidates[item * kept + c]);
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
      const Candidate* sorted = reinterpret_cast<Candidate*>(merged.data()) + group * call.k;
      for (int64_t c = 0; c < count; ++c) {
        call.values[group * call.k + c] = value_of(sorted[c].order);
        const int64_t row = sorted[c].index / kept;
        const Candidate& token = of_rows[(group * call.group_size + row) * kept + sorted[c].index % kept];
        call.indices[group * call.k + c] = row * vocabulary + token.index;
      }
    }
  });
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_DEFINE_TOP_K(name)                                           \
  namespace fastrnn::cpu {                                                   \
  void top_k_##name(const TopK& call, int threads) { top_k(call, threads); } \
  }
