// The k best continuations of groups of rows, by log-softmax plus a score of the row: what a call consists of, and the
// kernel of one instruction set. The logits are in memory, or a product that is never there as a whole.
#pragma once

#include "cpu/attention.h"

namespace fastrnn::cpu {

struct TopK {
  Number number;                              // of the logits
  int64_t groups, group_size, vocabulary, k;  // k <= group_size * vocabulary
  const void* logits;                         // [groups * group_size, vocabulary]
  int64_t stride;                             // elements from row to row
  const void* panels;                         // W [vocabulary, depth] in forward panels: the logits are W x + bias
  const float *x, *bias;                      // [groups * group_size, depth] and [vocabulary] or null
  int64_t depth;
  const float* scores;  // [groups * group_size] or null
  const float* given;   // normalizers [groups * group_size], or null: log sum e^logit
  float* values;        // [groups, k], best first
  int64_t* indices;     // [groups, k]: row within the group * vocabulary + token
  float* normalizers;   // [groups * group_size]: what was subtracted; NaN for a row with NaN or inf
};

using TopKKernel = void (*)(const TopK&, int threads);

void top_k_portable(const TopK&, int threads);
void top_k_avx2(const TopK&, int threads);
void top_k_avx512(const TopK&, int threads);

}  // namespace fastrnn::cpu
