// One step of a search by a decoder: the beams that go on take their rows of the step before, tokens are embedded,
// layers and attention run, and of the next token's logits the best are found.
#pragma once

#include "cpu/decoder.h"
#include "cpu/top_k.h"

namespace fastrnn::cpu {

struct DecodeStep {
  // Of one step. h[1], c[1] and the context are those of the step before, h[0] and c[0] get the rows that go on.
  Decoder decoder;
  bool before;             // the output has the context that the layers saw, not the one that their h has asked for
  const float* embedding;  // [tokens, E]
  int64_t embedding_size;
  float* output;        // [N, H + Dv]
  const void* readout;  // panels of R, or null: the projection sees the output itself
  int64_t readout_size;
  float* read;  // [N, readout_size]: tanh(R output)
  // The projection.
  const void* panels;
  const float* bias;
  int64_t vocabulary;
};

// tokens and rows [N]: what goes on, and from which rows. Fills what `found` says, or all logits [N, V].
void decode_step(const DecodeStep&, const int64_t* tokens, const int64_t* rows, TopK found, int threads);
void decode_step(const DecodeStep&, const int64_t* tokens, const int64_t* rows, float* logits, int threads);

}  // namespace fastrnn::cpu
