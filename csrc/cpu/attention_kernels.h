// Attention, forward and backward. A memory with its queries is one piece of work, for one thread where there are
// enough of them: scores of all pairs, weights, contexts, while its keys and values are in the cache. Formulas:
// fastrnn/reference/attention.py.
#pragma once

#include "cpu/attention.h"
#include "cpu/rows.h"

namespace fastrnn {
namespace {

// Pairs of query and key whose scores are summed at once, one in each lane: kRows queries by kKeys keys, or one query
// by kLanes keys.
constexpr int kRows = kLanes == 16 ? 4 : 2, kKeys = kLanes / kRows;
constexpr int kStreams = 4;         // keys that one query reads at once
constexpr int64_t kSumDepth = 256;  // terms of a weighted sum in one pass: long memories stay accurate
constexpr int64_t kOuterRows = 48;  // rows of an outer product that go together
constexpr float kLargestExponent = 87.0f;
// Below this sum of the largest |q| and |k| the rounding of e^{2q} e^{2k} near 1 would show in tanh itself.
constexpr float kSmallArguments = 1.0f;

// e^x for |x| <= 87, ln 2 taken as two floats: half an ulp better than reduce_exp for large x.
inline __attribute__((always_inline)) Vec exp_within(Vec x) {
  const float magic = 12582912.0f;
  const Vec n = (x * 1.44269504088896341f + magic) - magic;
  const Reduced e = reduce_exp(x - n * 0.693145751953125f - n * 1.42860682030941723e-6f);
  return from_bits(bits(e.scale * e.remainder + e.scale) + (bits(n + magic) << 23));
}

// e^x for x <= 0.
inline __attribute__((always_inline)) Vec exp_nonpositive(Vec x) {
  return x < -kLargestExponent ? Vec{} : exp_within(at_least(-kLargestExponent, x));
}

// e^{2x}, NaN where that, or its inverse, is no normal float.
inline __attribute__((always_inline)) Vec tanh_factor(Vec x) {
  const Vec doubled = x + x;
  const VecInt inside = (doubled <= kLargestExponent) & (doubled >= -kLargestExponent);
  return inside ? exp_within(doubled) : splat(__builtin_nanf(""));
}

// 1 / d for d >= 1; may be NaN where d is infinite.
inline __attribute__((always_inline)) Vec reciprocal(Vec d) {
#if defined(__AVX512F__)
  const Vec r = _mm512_rcp14_ps(d);
  return r + r * (1.0f - d * r);
#else
  return 1.0f / d;
#endif
}

// What a pair of elements adds to a score. kGroup: accumulators in flight, few where each needs many registers.
struct ProductTerm {
  static constexpr int kGroup = kLanes;
  static __attribute__((always_inline)) Vec add(Vec sum, Vec q, Vec k, Vec) { return sum + q * k; }
};

// tanh(q + k) = 1 - 2 / (1 + e^{2q} e^{2k}) from the two factors.
struct FactoredTerm {
  static constexpr int kGroup = kLanes;
  static __attribute__((always_inline)) Vec add(Vec sum, Vec q, Vec k, Vec v) {
    const Vec d = q * k + 1.0f;
#if defined(__AVX512F__)
    // reciprocal() with a multiplication less, which is 5 % of a decoder's step: 1 - 2 r (2 - d r).
    const Vec r = _mm512_rcp14_ps(d);
    return sum + v * ((r + r) * (d * r - 2.0f) + 1.0f);
#else
    return sum + v * (1.0f - 2.0f * reciprocal(d));
#endif
  }
};

struct TanhTerm {
  static constexpr int kGroup = 4;
  static __attribute__((always_inline)) Vec add(Vec sum, Vec q, Vec k, Vec v) { return sum + v * tanh(q + k); }
};

// tanh with an absolute error of an ulp of 1, which is all that a softmax sees.
struct LogisticTerm {
  static constexpr int kGroup = 4;
  static __attribute__((always_inline)) Vec add(Vec sum, Vec q, Vec k, Vec v) {
    const Vec s = q + k;
    const Reduced e = reduce_exp(at_least(-kLargestExponent, at_most(kLargestExponent, s + s)));
    return sum + v * (1.0f - 2.0f * reciprocal(e.scale * e.remainder + (e.scale + 1.0f)));
  }
};

// Lane i * K + j is the score of query i and key j; each is summed in the same order, whatever Q and K. One query
// streams the keys, a few at a time, and asks for those that come `ahead` elements later (L3 on a Zen 5 core: 64 -> 81
// GB/s).
template <class Term, int Q, int K>
__attribute__((noinline)) Vec score_pairs(const float* const* query, const float* const* key, int64_t ahead,
                                          const float* v, int64_t size) {
  static_assert(Q * K == kLanes, "a pair in each lane");
  constexpr int kGroup = Q == 1 ? kStreams : Term::kGroup;
  Vec sums[kLanes];
#pragma GCC unroll 4
  for (int group = 0; group < kLanes; group += kGroup) {
    Vec part[kGroup] = {};
    auto step = [&](int64_t d, auto read) __attribute__((always_inline)) {
      const Vec own = v ? read(v + d) : Vec{};
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) {
        const float* at = key[(group + i) % K] + d;
        if constexpr (Q == 1) __builtin_prefetch(at + ahead);
        part[i] = Term::add(part[i], read(query[(group + i) / K] + d), read(at), own);
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes)
      step(d, [](const float* p) __attribute__((always_inline)) { return load(p); });
    if (d < size) step(d, [count = size - d](const float* p) __attribute__((always_inline)) { return load(p, count); });
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i) sums[group + i] = part[i];
  }
  return sum_lanes(sums);
}

// Scores of the queries [first, last) and up to kLanes keys: write(query, key, score). Rows beyond `count` repeat one
// that exists; `stride` is their distance.
template <class Term, class Query, class Write>
void score_block(int64_t first, int64_t last, Query query, const float* const (&key)[kLanes], int64_t stride,
                 int64_t count, const float* v, int64_t size, Write write) {
  int64_t t = first;
  for (; t + kRows <= last && count > 1; t += kRows) {
    const float* rows[kRows];
    for (int i = 0; i < kRows; ++i) rows[i] = query(t + i);
    for (int64_t s = 0; s < count; s += kKeys) {
      const Vec scores = score_pairs<Term, kRows, kKeys>(rows, key + s, 0, v, size);
      for (int i = 0; i < kLanes; ++i)
        if (s + i % kKeys < count) write(t + i / kKeys, s + i % kKeys, scores[i]);
    }
  }
  for (; t < last; ++t) {
    const float* row = query(t);
    const Vec scores = score_pairs<Term, 1, kLanes>(&row, key, kStreams * stride, v, size);
    for (int i = 0; i < count; ++i) write(t, i, scores[i]);
  }
}

inline int64_t key_count(const AttentionInputs& in, int64_t b) {
  return in.lengths ? larger(0, smaller(in.lengths[b], in.keys)) : in.keys;
}

inline int64_t key_count(const AttentionInputs& in, int64_t b, int64_t t) {
  const int64_t count = key_count(in, b);
  return in.causal ? smaller(count, t + 1) : count;
}

inline const uint8_t* mask_row(const AttentionInputs& in, int64_t b, int64_t t) {
  return in.mask ? in.mask + b * in.mask_b + t * in.mask_row : nullptr;
}

// Whether all queries of a memory see the same keys.
inline bool see_alike(const AttentionInputs& in) { return !in.causal && (!in.mask || in.mask_row == 0); }

// function(begin, end) for the neighbouring keys that a query sees.
template <class Function>
void for_runs(const AttentionInputs& in, int64_t b, int64_t t, Function function) {
  const int64_t count = key_count(in, b, t);
  const uint8_t* mask = mask_row(in, b, t);
  if (!mask) {
    if (count > 0) function(0, count);
    return;
  }
  for (int64_t s = 0; s < count;) {
    while (s < count && !mask[s * in.mask_key]) ++s;
    const int64_t begin = s;
    while (s < count && mask[s * in.mask_key]) ++s;
    if (begin < s) function(begin, s);
  }
}

// out[t][begin..end] = sum over the keys s that query t sees of a[t][s] x[s], for all queries of a memory.
inline void weighted_sums(const AttentionInputs& in, int64_t b, const float* a, const Matrices& x, int64_t begin,
                          int64_t end, float* out, int64_t ldo) {
  auto add = [&](int64_t t, int64_t rows, int64_t from, int64_t to, bool resumed) {
    for (int64_t s = from; s < to; s += kSumDepth)
      multiply_rows(rows, smaller(kSumDepth, to - s), a + t * in.keys + s, in.keys, x.at(b, s), x.stride_row, begin,
                    end, resumed || s > from, out + t * ldo, ldo);
  };
  // Rows that see the same keys go together; with the causal mask, as far as the first of a few rows sees.
  const int64_t together = see_alike(in) ? in.queries : in.causal && !in.mask ? max_rows<2>() : 1;
  for (int64_t t = 0; t < in.queries; t += together) {
    const int64_t rows = smaller(together, in.queries - t);
    bool resumed = false;
    for_runs(in, b, t, [&](int64_t from, int64_t to) {
      add(t, rows, from, to, resumed);
      resumed = true;
    });
    for (int64_t row = t; row < t + rows; ++row) {
      if (!resumed) __builtin_memset(out + row * ldo + begin, 0, (end - begin) * sizeof(float));
      if (in.causal && row > t && together > 1) add(row, 1, key_count(in, b, t), key_count(in, b, row), resumed);
    }
  }
}

// out[s][begin..end] (+)= sum over the queries t of a[t][s] x[t], for the first `count` keys of a memory.
inline void transposed_sums(const AttentionInputs& in, int64_t b, int64_t count, const float* a, const Matrices& x,
                            int64_t begin, int64_t end, bool accumulate, float* out, int64_t ldo) {
  for (int64_t t = 0; t < in.queries; t += kSumDepth)
    outer_rows(0, count, smaller(kSumDepth, in.queries - t), a + t * in.keys, in.keys, x.at(b, t), x.stride_row, begin,
               end, accumulate || t > 0, out, ldo);
}

// Scores of a row into weights, in place; unseen keys get 0.
inline void normalize_row(const AttentionInputs& in, int64_t b, int64_t t, float* row) {
  const int64_t count = key_count(in, b, t);
  const uint8_t* mask = mask_row(in, b, t);
  int64_t seen = count;
  if (mask) {
    for (int64_t s = 0; s < count; ++s) {
      if (mask[s * in.mask_key]) continue;
      row[s] = -__builtin_inff();
      --seen;
    }
  }
  if (seen == 0) {
    __builtin_memset(row, 0, in.keys * sizeof(float));
    return;
  }
  if (in.softmax) {
    const Vec lowest = splat(-__builtin_inff());
    auto at = [&](int64_t s) __attribute__((always_inline)) {
      const Vec scores = load(row + s, count - s);
      if (s + kLanes <= count) return scores;
      Vec kept = lowest;
      for (int64_t i = 0; i < count - s; ++i) kept[i] = scores[i];
      return kept;
    };
    Vec largest = lowest;
    for (int64_t s = 0; s < count; s += kLanes) {
      const Vec scores = at(s);
      largest = scores > largest ? scores : largest;
    }
    float most = largest[0];
    for (int i = 1; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    Vec sums = {};
    for (int64_t s = 0; s < count; s += kLanes) {
      const Vec e = exp_nonpositive(at(s) - most);
      sums += e;
      store(row + s, e, count - s);
    }
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    for (int64_t s = 0; s < count; s += kLanes) store(row + s, load(row + s, count - s) / sum, count - s);
  } else {
    for (int64_t s = 0; s < count; s += kLanes)
      store(row + s, load(row + s, count - s) / static_cast<float>(seen), count - s);
  }
  if (mask) {
    for (int64_t s = 0; s < count; ++s)
      if (!mask[s * in.mask_key]) row[s] = 0;
  }
  __builtin_memset(row + count, 0, (in.keys - count) * sizeof(float));
}

// Row stride of scratch that holds vectors of the size.
inline int64_t vectors_of(int64_t size) { return ceil_div(size, kLanes) * kLanes; }

inline void store_factors(const float* from, int64_t size, float* to) {
  for (int64_t d = 0; d < size; d += kLanes) store(to + d, tanh_factor(load(from + d, size - d)));
}

// What tanh is taken of for query t and the keys s .. s + count - 1, (q + k) + F f: rows [kLanes][vectors_of(size)].
inline void sum_features(const AttentionInputs& in, int64_t b, int64_t t, int64_t s, int64_t count,
                         const float* transposed, float* rows) {
  const int64_t ld = vectors_of(in.size);
  const float* query = in.query.at(b, t);
  for (int64_t i = 0; i < count; ++i) {
    const float* key = in.key.at(b, s + i);
    for (int64_t d = 0; d < in.size; d += kLanes)
      store(rows + i * ld + d, load(query + d, in.size - d) + load(key + d, in.size - d));
  }
  multiply_rows(count, in.channels, in.features + ((b * in.queries + t) * in.keys + s) * in.channels, in.channels,
                transposed, in.size, 0, in.size, true, rows, ld);
}

// F^T [C, D].
inline void transpose_features(const AttentionInputs& in, float* transposed) {
  for (int64_t d = 0; d < in.size; ++d)
    for (int64_t c = 0; c < in.channels; ++c) transposed[c * in.size + d] = in.feature_weight[d * in.channels + c];
}

// How the memories are dealt to a team: some to each slot, or, where there are too few, all slots share each of them.
struct AttentionDeal {
  int64_t batch, slots;
  bool shared;

  // `work` in elements of pairs.
  AttentionDeal(const AttentionInputs& in, int64_t work, bool divisible, int threads)
      : batch(in.batch), slots(larger(1, smaller(threads, work >> 15))), shared(divisible && batch < slots) {
    if (!shared) slots = smaller(slots, larger(1, batch));
  }
};

// What a thread does of a memory: a share of everything, and waits for the others in between.
struct Part {
  int64_t begin, end, count;  // slots begin..end of count
  Barrier* barrier;

  void wait() const {
    if (count > 1) barrier->wait(begin, end);
  }
  // Its share of n things, cut at multiples of `unit`.
  int64_t first(int64_t n, int64_t unit) const { return smaller(n, ceil_div(n, unit) * begin / count * unit); }
  int64_t last(int64_t n, int64_t unit) const { return smaller(n, ceil_div(n, unit) * end / count * unit); }
};

// work(memory, part, slot) for all memories, slot being the first of those that this thread stands for.
template <class Work>
void deal_attention(const AttentionDeal& deal, Work work) {
  Barrier barrier(deal.slots);
  on_team(deal.slots, [&](int64_t begin, int64_t end) {
    const int64_t first = deal.shared ? 0 : deal.batch * begin / deal.slots;
    const int64_t last = deal.shared ? deal.batch : deal.batch * end / deal.slots;
    const Part part = deal.shared ? Part{begin, end, deal.slots, &barrier} : Part{0, 1, 1, nullptr};
    for (int64_t b = first; b < last; ++b) work(b, part, begin);
  });
}

inline float sum_of(const float* v, int64_t size) {
  double sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += v[d];
  return sum;
}

inline float widened(uint16_t value, Number number) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  if (number == Number::bfloat16) {
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
  }
  // The exponent's bias is 15 and not 127, subnormal numbers included; infinity and NaN keep the largest exponent.
  const uint32_t magnitude = (value & 0x7fffu) << 13;
  __builtin_memcpy(&result, &magnitude, sizeof result);
  result *= 0x1p112f;
  __builtin_memcpy(&bits, &result, sizeof bits);
  bits |= (magnitude >= 0x0f800000u ? 0x7f800000u : 0u) | (value & 0x8000u) << 16;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

// Rows [first, last) of a memory as floats in `to`, and these in its place.
inline void widen(Number number, Matrices& from, int64_t b, int64_t first, int64_t last, int64_t size, float* to) {
  const uint16_t* memory = reinterpret_cast<const uint16_t*>(from.data) + b * from.stride_b;
  for (int64_t row = first; row < last; ++row) {
    const uint16_t* numbers = memory + row * from.stride_row;
    if (number == Number::bfloat16) {
      for (int64_t i = 0; i < size; ++i) to[row * size + i] = widened(numbers[i], Number::bfloat16);
    } else {
      for (int64_t i = 0; i < size; ++i) to[row * size + i] = widened(numbers[i], Number::float16);
    }
  }
  from = {to, 0, size};
}

void attention_forward(const AttentionForward& call, int threads) {
  const int64_t ld = vectors_of(call.in.size);
  // Factors pay where each serves two pairs, or is there already. Without a softmax scores need tanh's relative
  // accuracy.
  const bool factored =
      call.in.v && call.in.softmax && !call.in.features && (call.in.factors.data || call.in.queries > 1);
  const int64_t query_floats = factored ? call.in.queries * ld : 0;
  const int64_t key_floats = call.in.features ? (kLanes + 1) * ld : factored && !call.in.factors.data ? kLanes * ld : 0;
  const AttentionDeal deal(
      call.in, call.in.batch * call.in.queries * call.in.keys * (call.in.size + call.in.value_size), true, threads);
  const Scratch scratch(deal.slots * (query_floats + key_floats) + call.in.channels * call.in.size);
  float* transposed = scratch.data() + deal.slots * (query_floats + key_floats);
  if (call.in.features) transpose_features(call.in, transposed);
  // One memory's queries, keys and values as floats, for each thread or, where they share it, for all.
  const bool wide = call.in.number == Number::float32, own_values = call.in.value.data != call.in.key.data;
  const int64_t widened_floats =
      wide ? 0 : (call.in.queries + call.in.keys) * call.in.size + (own_values ? call.in.keys * call.in.value_size : 0);
  const Scratch floats((deal.shared ? call.in.batch : deal.slots) * widened_floats);

  deal_attention(deal, [&](int64_t b, const Part& part, int64_t slot) {
    AttentionInputs in = call.in;
    if (!wide) {
      float* to = floats.data() + (deal.shared ? b : slot) * widened_floats;
      const int64_t first = part.first(in.keys, 1), last = part.last(in.keys, 1);
      widen(in.number, in.query, b, part.first(in.queries, 1), part.last(in.queries, 1), in.size, to);
      widen(in.number, in.key, b, first, last, in.size, to + in.queries * in.size);
      if (own_values) {
        widen(in.number, in.value, b, first, last, in.value_size, to + (in.queries + in.keys) * in.size);
      } else {
        in.value = in.key;
      }
      part.wait();
    }
    float* query_factors = scratch.data() + slot * (query_floats + key_floats);
    float* block = query_factors + query_floats;
    float* weights = call.weights + b * call.weights_b;
    const int64_t count = key_count(in, b);
    if (factored)
      for (int64_t t = 0; t < in.queries; ++t) store_factors(in.query.at(b, t), in.size, query_factors + t * ld);
    // With features the query is in the sums already.
    float* zeros = block + kLanes * ld;
    for (int64_t d = 0; in.features && d < ld; d += kLanes) store(zeros + d, Vec{});
    auto query = [&](int64_t t) { return in.features ? zeros : in.query.at(b, t); };

    for (int64_t s = part.first(in.keys, kLanes); s < smaller(count, part.last(in.keys, kLanes)); s += kLanes) {
      const int64_t keys = smaller(kLanes, count - s);
      const int64_t first = in.causal ? smaller(s, in.queries) : 0;
      const float* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = in.key.at(b, s + smaller(i, keys - 1));
      auto keep = [&](int64_t t, int64_t i, float score) { weights[t * in.keys + s + i] = score; };
      auto exact = [&](int64_t t, int64_t last) {
        if (in.softmax) {
          score_block<LogisticTerm>(t, last, query, rows, in.key.stride_row, keys, in.v, in.size, keep);
        } else {
          score_block<TanhTerm>(t, last, query, rows, in.key.stride_row, keys, in.v, in.size, keep);
        }
      };
      if (!in.v) {
        score_block<ProductTerm>(first, in.queries, query, rows, in.key.stride_row, keys, nullptr, in.size,
                                 [&](int64_t t, int64_t i, float score) { keep(t, i, in.scale * score); });
      } else if (in.features) {
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = block + smaller(i, keys - 1) * ld;
        for (int64_t t = first; t < in.queries; ++t) {
          sum_features(in, b, t, s, keys, transposed, block);
          exact(t, t + 1);
        }
      } else if (factored) {
        const float* factors[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          factors[i] = in.factors.data ? in.factors.at(b, s + smaller(i, keys - 1)) : block + smaller(i, keys - 1) * ld;
          if (!in.factors.data && i < keys) store_factors(rows[i], in.size, block + i * ld);
        }
        bool out_of_range = false;
        score_block<FactoredTerm>(
            first, in.queries, [&](int64_t t) { return query_factors + t * ld; }, factors,
            in.factors.data ? in.factors.stride_row : ld, keys, in.v, in.size,
            [&](int64_t t, int64_t i, float score) {
              keep(t, i, score);
              out_of_range |= score != score;
            });
        for (int64_t t = first; out_of_range && t < in.queries; ++t)
          for (int64_t i = 0; i < keys; ++i) {
            float& score = weights[t * in.keys + s + i];
            if (score == score) continue;
            const float *one_query = in.query.at(b, t), *one_key[kLanes];
            for (int k = 0; k < kLanes; ++k) one_key[k] = rows[i];
            score = score_pairs<LogisticTerm, 1, kLanes>(&one_query, one_key, 0, in.v, in.size)[0];
          }
      } else {
        exact(first, in.queries);
      }
    }
    part.wait();
    for (int64_t t = part.first(in.queries, 1); t < part.last(in.queries, 1); ++t)
      normalize_row(in, b, t, weights + t * in.keys);
    part.wait();
    weighted_sums(in, b, weights, in.value, part.first(in.value_size, kColumns), part.last(in.value_size, kColumns),
                  call.context + b * call.context_b, call.context_row);
  });
}

// Gradient of a row's scores, in place of that of its weights.
inline void normalize_row_backward(const AttentionInputs& in, int64_t b, int64_t t, const float* weights, float* row) {
  const int64_t count = key_count(in, b, t);
  const uint8_t* mask = mask_row(in, b, t);
  int64_t seen = count;
  if (mask) {
    for (int64_t s = 0; s < count; ++s) {
      if (mask[s * in.mask_key]) continue;
      row[s] = 0;
      --seen;
    }
  }
  const float scale = in.v ? 1.0f : in.scale;
  if (in.softmax) {
    Vec sums = {};
    for (int64_t s = 0; s < count; s += kLanes) sums += load(weights + s, count - s) * load(row + s, count - s);
    float along = 0;
    for (int i = 0; i < kLanes; ++i) along += sums[i];
    for (int64_t s = 0; s < count; s += kLanes)
      store(row + s, load(weights + s, count - s) * (load(row + s, count - s) - along) * scale, count - s);
  } else {
    const float each = scale / static_cast<float>(larger(1, seen));
    for (int64_t s = 0; s < count; s += kLanes) store(row + s, load(row + s, count - s) * each, count - s);
  }
  __builtin_memset(row + count, 0, (in.keys - count) * sizeof(float));
}

// Gradients of the additive score in the columns d .. d + kLanes - 1, from those of the scores. `exact`: by tanh
// itself. Guarded: a key whose score has no gradient may be NaN.
template <bool exact, bool guarded>
void additive_columns(const AttentionInputs& in, int64_t count, const float* dscores, const Vec* query, const Vec* key,
                      Vec* dquery, Vec* dkey, Vec* dv) {
  Vec along_query[kRows], along_key[kSumDepth], along_v;
  // Queries t .. t + rows - 1 and the keys [first, last): adds to along_query, along_key and along_v.
  auto pairs = [&](int64_t t, auto rows, int64_t first, int64_t last) __attribute__((always_inline)) {
    constexpr int kCount = decltype(rows)::value;
    Vec q[kCount], sums[kCount] = {}, sum_v = {};
    for (int i = 0; i < kCount; ++i) q[i] = query[t + i];
    for (int64_t s = first; s < last; ++s) {
      const Vec k = key[s];
      Vec sum_k = along_key[s - first];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const Vec d = splat(dscores[(t + i) * in.keys + s]);
        Vec slope, value;
        if (exact) {
          value = tanh(q[i] + k);
          slope = 1.0f - value * value;
        } else {
          const Vec r = reciprocal(q[i] * k + 1.0f);
          value = 1.0f - 2.0f * r;
          slope = r - r * r;
        }
        if (guarded) {
          value = d != 0.0f ? value : Vec{};
          slope = d != 0.0f ? slope : Vec{};
        }
        sums[i] += d * slope;
        sum_k += d * slope;
        sum_v += d * value;
      }
      along_key[s - first] = sum_k;
    }
    for (int i = 0; i < kCount; ++i) along_query[i] = sums[i];
    along_v += sum_v;
  };
  for (int64_t t = 0; t < in.queries; ++t) dquery[t] = Vec{};
  for (int64_t s = 0; s < count; ++s) dkey[s] = Vec{};
  *dv = Vec{};
  for (int64_t t0 = 0; t0 < in.queries; t0 += kSumDepth)
    for (int64_t s0 = 0; s0 < count; s0 += kSumDepth) {
      const int64_t t1 = smaller(in.queries, t0 + kSumDepth), s1 = smaller(count, s0 + kSumDepth);
      for (int64_t s = s0; s < s1; ++s) along_key[s - s0] = Vec{};
      along_v = Vec{};
      auto queries = [&](int64_t t, auto rows) __attribute__((always_inline)) {
        pairs(t, rows, s0, s1);
        for (int i = 0; i < decltype(rows)::value; ++i) dquery[t + i] += along_query[i];
      };
      int64_t t = t0;
      for (; t + kRows <= t1; t += kRows) queries(t, Constant<kRows>());
      for (; t < t1; ++t) queries(t, Constant<1>());
      for (int64_t s = s0; s < s1; ++s) dkey[s] += along_key[s - s0];
      *dv += along_v;
    }
}

inline float largest_magnitude(const Vec* vectors, int64_t count) {
  Vec most = {};
  for (int64_t i = 0; i < count; ++i) {
    const Vec magnitude = from_bits(bits(vectors[i]) & 0x7fffffff);
    most = magnitude > most ? magnitude : most;
  }
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

// The additive score's gradients of one memory, in the columns [begin, end). columns: scratch of 2 * (Tq + Tk) vectors.
inline void additive_backward(const AttentionBackward& call, int64_t b, const float* dscores, int64_t begin,
                              int64_t end, Vec* columns) {
  const AttentionInputs& in = call.in;
  const int64_t count = key_count(in, b);
  Vec *query = columns, *key = query + in.queries, *dquery = key + in.keys, *dkey = dquery + in.queries;
  // A key that nobody sees is read as zero, and one that only some see is guarded.
  const bool guarded = !see_alike(in);
  const uint8_t* mask = guarded ? nullptr : mask_row(in, b, 0);
  for (int64_t d = begin; d < end; d += kLanes) {
    const int64_t valid = end - d;
    auto key_at = [&](int64_t s) __attribute__((always_inline)) {
      return mask && !mask[s * in.mask_key] ? Vec{} : load(in.key.at(b, s) + d, valid);
    };
    for (int64_t t = 0; t < in.queries; ++t) query[t] = load(in.query.at(b, t) + d, valid);
    for (int64_t s = 0; s < count; ++s) key[s] = key_at(s);
    const float most = largest_magnitude(query, in.queries) + largest_magnitude(key, count);
    bool exact = most < kSmallArguments;
    if (!exact) {
      VecInt out_of_range = {};
      for (int64_t t = 0; t < in.queries; ++t) {
        query[t] = tanh_factor(query[t]);
        out_of_range |= query[t] != query[t];
      }
      for (int64_t s = 0; s < count; ++s) {
        key[s] = in.factors.data && !(mask && !mask[s * in.mask_key]) ? load(in.factors.at(b, s) + d, valid)
                                                                      : tanh_factor(key[s]);
        out_of_range |= key[s] != key[s];
      }
      for (int i = 0; i < kLanes; ++i) exact |= out_of_range[i] != 0;
      // A product of factors may overflow, where the reciprocal is NaN.
      exact |= !(most < kLargestExponent / 2);
      if (exact) {
        for (int64_t t = 0; t < in.queries; ++t) query[t] = load(in.query.at(b, t) + d, valid);
        for (int64_t s = 0; s < count; ++s) key[s] = key_at(s);
      }
    }
    Vec dv;
    const auto run = exact ? (guarded ? additive_columns<true, true> : additive_columns<true, false>)
                           : (guarded ? additive_columns<false, true> : additive_columns<false, false>);
    run(in, count, dscores, query, key, dquery, dkey, &dv);
    const Vec v = load(in.v + d, valid) * (exact ? 1.0f : 4.0f);  // 1 - tanh^2 = 4 (r - r^2)
    if (call.dquery)
      for (int64_t t = 0; t < in.queries; ++t)
        store(call.dquery + (b * in.queries + t) * in.size + d, dquery[t] * v, valid);
    if (call.dkey) {
      float* out = call.dkey + b * in.keys * in.size + d;
      const bool added = call.dvalue == call.dkey;
      for (int64_t s = 0; s < count; ++s)
        store(out + s * in.size, dkey[s] * v + (added ? load(out + s * in.size, valid) : Vec{}), valid);
    }
    if (call.dv) store(call.dv + b * in.size + d, dv, valid);
  }
}

// The query's gradient alone, as each step of a decoder's backward pass wants it: factors are read in the order of
// memory and not by columns. row: scratch of 3 * vectors_of(size).
inline void additive_query_backward(const AttentionBackward& call, int64_t b, const float* dscores, float* row) {
  const AttentionInputs& in = call.in;
  const int64_t ld = vectors_of(in.size);
  float *query = row, *part = row + ld, *sums = row + 2 * ld;
  for (int64_t t = 0; t < in.queries; ++t) {
    const float* gradients = dscores + t * in.keys;
    store_factors(in.query.at(b, t), in.size, query);
    for (int64_t d = 0; d < ld; d += kLanes) store(sums + d, Vec{});
    // Keys s .. s + count - 1, whose sums go to `part` in passes of kSumDepth.
    auto keys = [&](int64_t s, auto count, bool exact) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      for (int64_t d = 0; d < in.size; d += kLanes) {
        const int64_t valid = in.size - d;
        const Vec q = exact ? load(in.query.at(b, t) + d, valid) : load(query + d);
        Vec sum = load(part + d);
#pragma GCC unroll 4
        for (int i = 0; i < kCount; ++i) {
          if (exact) {
            const Vec value = tanh(q + load(in.key.at(b, s + i) + d, valid));
            sum += gradients[s + i] * 0.25f * (1.0f - value * value);
          } else {
            const float* factors = in.factors.at(b, s + i) + d;
            __builtin_prefetch(factors + kStreams * in.factors.stride_row);
            const Vec r = reciprocal(q * load(factors, valid) + 1.0f);
            sum += gradients[s + i] * (r - r * r);
          }
        }
        store(part + d, sum);
      }
    };
    auto run = [&](bool exact) {
      for_runs(in, b, t, [&](int64_t from, int64_t to) {
        for (int64_t s0 = from; s0 < to; s0 += kSumDepth) {
          const int64_t s1 = smaller(to, s0 + kSumDepth);
          for (int64_t d = 0; d < ld; d += kLanes) store(part + d, Vec{});
          int64_t s = s0;
          for (; s + kStreams <= s1; s += kStreams) {
            if (exact) keys(s, Constant<kStreams>(), true);
            if (!exact) keys(s, Constant<kStreams>(), false);
          }
          for (; s < s1; ++s) keys(s, Constant<1>(), exact);
          for (int64_t d = 0; d < ld; d += kLanes) store(sums + d, load(sums + d) + load(part + d));
        }
      });
    };
    run(false);
    VecInt out_of_range = {};
    for (int64_t d = 0; d < in.size; d += kLanes) {
      const Vec sum = load(sums + d, in.size - d);
      out_of_range |= sum != sum;
    }
    bool exact = false;
    for (int i = 0; i < kLanes; ++i) exact |= out_of_range[i] != 0;
    if (exact) {
      for (int64_t d = 0; d < ld; d += kLanes) store(sums + d, Vec{});
      run(true);
    }
    for (int64_t d = 0; d < in.size; d += kLanes)
      store(call.dquery + (b * in.queries + t) * in.size + d, 4.0f * load(sums + d) * load(in.v + d, in.size - d),
            in.size - d);
  }
}

// The same with features, a few keys at a time. rows: scratch of 3 * kLanes rows of vectors_of(size).
inline void features_backward(const AttentionBackward& call, int64_t b, const float* dscores, const float* transposed,
                              float* rows) {
  const AttentionInputs& in = call.in;
  const int64_t ld = vectors_of(in.size), count = key_count(in, b);
  float *slopes = rows + kLanes * ld, *dv = slopes + kLanes * ld;
  for (int64_t d = 0; d < ld; d += kLanes) store(dv + d, Vec{});
  if (call.dfeature_weight)
    __builtin_memset(call.dfeature_weight + b * in.size * in.channels, 0, in.size * in.channels * sizeof(float));
  if (call.dkey && call.dvalue != call.dkey)
    __builtin_memset(call.dkey + b * in.keys * in.size, 0, count * in.size * sizeof(float));
  for (int64_t t = 0; t < in.queries; ++t) {
    float* dquery = dv + ld;
    for (int64_t d = 0; d < ld; d += kLanes) store(dquery + d, Vec{});
    for (int64_t s = 0; s < count; s += kLanes) {
      const int64_t keys = smaller(kLanes, count - s);
      const int64_t pair = (b * in.queries + t) * in.keys + s;
      sum_features(in, b, t, s, keys, transposed, rows);
      for (int64_t i = 0; i < keys; ++i) {
        const float dscore = dscores[t * in.keys + s + i];
        for (int64_t d = 0; d < in.size; d += kLanes) {
          const int64_t valid = in.size - d;
          Vec slope = {};
          if (dscore != 0) {  // else the key may be NaN
            const Vec value = tanh(load(rows + i * ld + d));
            slope = dscore * load(in.v + d, valid) * (1.0f - value * value);
            store(dv + d, load(dv + d) + dscore * value);
            store(dquery + d, load(dquery + d) + slope);
            if (call.dkey) {
              float* out = call.dkey + (b * in.keys + s + i) * in.size + d;
              store(out, load(out, valid) + slope, valid);
            }
          }
          store(slopes + i * ld + d, slope);
        }
      }
      if (call.dfeatures)
        multiply_rows(keys, in.size, slopes, ld, in.feature_weight, in.channels, 0, in.channels, false,
                      call.dfeatures + pair * in.channels, in.channels);
      if (call.dfeature_weight)
        outer_rows(0, in.size, keys, slopes, ld, in.features + pair * in.channels, in.channels, 0, in.channels, true,
                   call.dfeature_weight + b * in.size * in.channels, in.channels);
    }
    if (call.dfeatures)
      __builtin_memset(call.dfeatures + ((b * in.queries + t) * in.keys + count) * in.channels, 0,
                       (in.keys - count) * in.channels * sizeof(float));
    if (call.dquery) __builtin_memcpy(call.dquery + (b * in.queries + t) * in.size, dquery, in.size * sizeof(float));
  }
  if (call.dv) __builtin_memcpy(call.dv + b * in.size, dv, in.size * sizeof(float));
}

// What the passes over a panel fetch, [depth][kColumns] words of it: those that the next pass reads follow them, and
// the first tiles fetch a line for each k (vocabulary of 32000 by 80 rows: 15 % of the time).
inline Ahead lines_after(const Word* words, int64_t depth, int64_t tile) {
  constexpr int64_t kLine = 64, kLines = kColumns * sizeof(Word) / kLine;
  if (tile >= kLines) return nothing_ahead(words);
  return {reinterpret_cast<const char*>(words + depth * kColumns) + tile * depth * kLine, kLine};
}

void multiply_panels(int64_t rows, int64_t depth, const float* a, int64_t lda, const void* packed, int64_t columns,
                     bool accumulate, float* out, int64_t ldo, int threads) {
  const int64_t panels = ceil_div(columns, kColumns);
  const int64_t slots = larger(1, smaller(smaller(threads, panels), rows * depth * columns >> 18));
  const Scratch scratch(slots * rows * kColumns);
  on_team(slots, [&, slots](int64_t begin, int64_t end) {
    const RowTiles tiles(rows, max_rows<2>());
    for (int64_t p = panels * begin / slots; p < panels * end / slots; ++p) {
      const float* panel = static_cast<const float*>(packed) + p * depth * kColumns;
      const int64_t n = p * kColumns, valid = smaller(kColumns, columns - n);
      float* to = valid == kColumns ? out + n : scratch.data() + begin * rows * kColumns;
      const int64_t ld = valid == kColumns ? ldo : kColumns;
      for (int64_t row = 0; to != out + n && accumulate && row < rows; ++row)
        __builtin_memcpy(to + row * ld, out + row * ldo + n, valid * sizeof(float));
      for (int64_t k = 0; k < depth; k += kSumDepth)
        for (int64_t i = 0; i < tiles.count; ++i) {
          float* c = to + tiles.begin(i) * ld;
          const int64_t terms = smaller(kSumDepth, depth - k);
          const Word* words = panel + k * kColumns;
          tile_rows<2, false>(tiles.begin(i + 1) - tiles.begin(i), terms, a + tiles.begin(i) * lda + k, lda, words,
                              kColumns, resume(accumulate || k > 0, c, ld), c, ld, lines_after(words, terms, i));
        }
      for (int64_t row = 0; to != out + n && row < rows; ++row)
        __builtin_memcpy(out + row * ldo + n, to + row * ld, valid * sizeof(float));
    }
  });
}

void outer_product(int64_t rows, const float* a, int64_t m, const float* b, int64_t n, float* out, int threads) {
  const int64_t tiles = ceil_div(m, kOuterRows);
  const int64_t slots = larger(1, smaller(smaller(threads, tiles), rows * m * n >> 18));
  on_team(slots, [=](int64_t begin, int64_t end) {
    const int64_t first = tiles * begin / slots * kOuterRows, last = smaller(m, tiles * end / slots * kOuterRows);
    // A's columns and B's panels of one pass stay in L2.
    for (int64_t k = 0; k < rows; k += kSumDepth)
      for (int64_t row = first; row < last; row += kOuterRows)
        outer_rows(row, smaller(last, row + kOuterRows), smaller(kSumDepth, rows - k), a + k * m, m, b + k * n, n, 0, n,
                   k > 0, out, n);
    for (int64_t row = first; rows == 0 && row < last; ++row) __builtin_memset(out + row * n, 0, n * sizeof(float));
  });
}

void tanh_all(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store(x + i, tanh(load(x + i, smaller(kLanes, count - i))), smaller(kLanes, count - i));
}

void attention_backward(const AttentionBackward& call, int threads) {
  const AttentionInputs& in = call.in;
  const int64_t ld = vectors_of(in.size), pairs = in.queries * in.keys;
  const AttentionDeal deal(in, in.batch * pairs * 2 * (in.size + in.value_size), !in.features, threads);
  // A memory's gradients of scores, which all of its threads see, and what each thread needs for itself.
  const int64_t column_floats = in.v && !in.features ? 2 * (in.queries + in.keys) * kLanes : 0;
  const bool query_alone = in.v && in.factors.data && !call.dkey && !call.dv;
  const int64_t own_floats = in.features ? (2 * kLanes + 2) * ld : query_alone ? 3 * ld : column_floats;
  const int64_t score_floats = vectors_of(pairs);
  const int64_t transposed_floats = vectors_of(in.channels * in.size);
  const Scratch scratch(transposed_floats + deal.slots * own_floats +
                        (deal.shared ? in.batch : deal.slots) * score_floats);
  float *own = scratch.data() + transposed_floats, *scores = own + deal.slots * own_floats;
  if (in.features) transpose_features(in, scratch.data());

  deal_attention(deal, [&](int64_t b, const Part& part, int64_t slot) {
    const float* weights = call.weights + b * call.weights_b;
    float* dscores = scores + (deal.shared ? b : slot) * score_floats;
    const int64_t count = key_count(in, b);
    const bool values_too = call.dcontext.data != nullptr;
    for (int64_t s = part.first(in.keys, kLanes); s < smaller(count, part.last(in.keys, kLanes)); s += kLanes) {
      const int64_t keys = smaller(kLanes, count - s);
      auto keep = [&](int64_t t, int64_t i, float value) __attribute__((always_inline)) {
        const float given = call.dweights.data ? call.dweights.at(b, t)[s + i] : 0.0f;
        dscores[t * in.keys + s + i] = value + given;
      };
      if (values_too) {
        const float* rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = in.value.at(b, s + smaller(i, keys - 1));
        score_block<ProductTerm>(
            0, in.queries, [&](int64_t t) { return call.dcontext.at(b, t); }, rows, in.value.stride_row, keys, nullptr,
            in.value_size, keep);
      } else {
        for (int64_t t = 0; t < in.queries; ++t)
          for (int64_t i = 0; i < keys; ++i) keep(t, i, 0.0f);
      }
    }
    part.wait();
    for (int64_t t = part.first(in.queries, 1); t < part.last(in.queries, 1); ++t)
      normalize_row_backward(in, b, t, weights + t * in.keys, dscores + t * in.keys);
    part.wait();

    if (call.dvalue) {
      const int64_t begin = part.first(in.value_size, kColumns), end = part.last(in.value_size, kColumns);
      float* out = call.dvalue + b * in.keys * in.value_size;
      if (values_too) transposed_sums(in, b, count, weights, call.dcontext, begin, end, false, out, in.value_size);
      for (int64_t s = values_too ? count : 0; s < in.keys; ++s)
        __builtin_memset(out + s * in.value_size + begin, 0, (end - begin) * sizeof(float));
    }
    const int64_t begin = part.first(in.size, kColumns), end = part.last(in.size, kColumns);
    if (in.features) {
      features_backward(call, b, dscores, scratch.data(), own + slot * own_floats);
    } else if (query_alone) {
      if (call.dquery && part.begin == 0) additive_query_backward(call, b, dscores, own + slot * own_floats);
    } else if (in.v) {
      additive_backward(call, b, dscores, begin, end, reinterpret_cast<Vec*>(own + slot * own_floats));
    } else {
      if (call.dquery)
        weighted_sums(in, b, dscores, in.key, begin, end, call.dquery + b * in.queries * in.size, in.size);
      if (call.dkey)
        transposed_sums(in, b, count, dscores, in.query, begin, end, call.dvalue == call.dkey,
                        call.dkey + b * in.keys * in.size, in.size);
    }
    if (call.dkey && call.dkey != call.dvalue)
      for (int64_t s = count; s < in.keys; ++s)
        __builtin_memset(call.dkey + (b * in.keys + s) * in.size + begin, 0, (end - begin) * sizeof(float));
  });
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_DEFINE_ATTENTION(name)                                                                              \
  namespace fastrnn::cpu {                                                                                          \
  const AttentionKernels& attention_##name() {                                                                      \
    static const AttentionKernels kernels = {attention_forward, attention_backward, multiply_panels, outer_product, \
                                             tanh_all};                                                             \
    return kernels;                                                                                                 \
  }                                                                                                                 \
  }
