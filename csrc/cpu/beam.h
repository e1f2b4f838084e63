// The bookkeeping of a beam search on the host: what Hypotheses in fastrnn/search/hypotheses.py does by tensor
// operations, which specifies it, in one call for a step and one for the results.
#pragma once

#include <stdint.h>

namespace fastrnn::cpu {

enum class StopRule { first, heuristic, exact, never };

// Rows of sentences [b], of their beams [b, K].
struct Beams {
  int64_t sentences, beams, ends;
  const int64_t *eos, *min_length, *max_length;
  // By length: what sums are divided by, what is added, and the most of both from there on; up to `longest`.
  const float *divisor, *bonus, *largest_divisor, *largest_bonus;
  int64_t longest;
  StopRule rule;
  int64_t wanted, enough;
  float* scores;
  uint8_t *done, *broken;
  int64_t* count;  // of finished hypotheses
  // Finished hypotheses, best first: sort key, score, last token's log-probability, its step, the beam it came from.
  float *key, *score, *increment;
  int64_t *step, *beam, *token;
};

// Candidates [b, C], best first: sums of log-probabilities, and beam * vocabulary + token. Normalizers [b, K] (or null)
// are NaN for beams whose logits are broken.
struct Candidates {
  const float* values;
  const int64_t* indices;
  int64_t count, vocabulary;
  const float* extra;  // [b, K]: added to the score of what ends from a beam; or null
  const float* normalizers;
};

// What goes on [b, K]: tokens, beams and rows that they came from, log-probabilities.
struct Live {
  int64_t *tokens, *parents, *rows;
  float* increments;
};

// Returns how many sentences are not done, -1 where one is broken.
int64_t beam_step(const Beams&, const Candidates&, int64_t length, const Live&);

// What each step of a search left, of all sentences [B, K].
struct Trace {
  const int64_t *tokens, *parents;
  const float* increments;
};

// Tokens and log-probabilities [B, n, longest] of hypotheses [B, n] that ended at these steps (-1: none), behind which
// both are left as they are.
void trace_back(const Trace* steps, int64_t batch, int64_t beams, int64_t wanted, int64_t longest, const int64_t* step,
                const int64_t* beam, const int64_t* token, const float* increment, int64_t* tokens, float* log_probs);

}  // namespace fastrnn::cpu
