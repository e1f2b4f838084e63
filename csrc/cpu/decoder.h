// The loop of an attention decoder over time, forward and backward, from the kernels of its parts: at step t the layers
// of cells see [x_t, context_{t-1}], the top one's h_t asks the memories, context_t goes into the next step.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/attention.h"
#include "cpu/recurrence.h"

namespace fastrnn::cpu {

struct DecoderLayer {
  int64_t input_size;
  const void *weight_ih, *weight_hh;  // packed, of the pass in hand
  const float *bias_ih, *bias_hh;     // or null
  float* x;                           // [T, N, I]; of the first layer its last columns are filled with the contexts
  float* h;                           // [T + 1, N, H], h[0] the initial state
  float* c;                           // the same, LSTM
  float* saved;                       // T times that of one step, or null
  const float* mask;                  // [T, N, H]: multiplies h on its way to the next layer; or null
  float *dh, *dc;                     // [T, N, H]: gradients of h_t and c_t, at first those from outside the loop
  float *dx, *dh0, *dc0;              // [T, N, I] and [N, H]
  float *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh;  // or null
};

struct Decoder {
  Cell cell;
  int64_t steps, batch, hidden_size, context_size;
  std::vector<DecoderLayer> layers;
  AttentionInputs attention;  // of one step: N / B queries of each memory; forward, of size 0: there is none
  const void* query_weight;   // packed, of the pass in hand; or null: the query is h itself
  float* query;               // [T, N, D], where there is a weight
  float* context;             // [T, N, Dv]
  float* weights;             // those of step t and memory b at t * weights_t + b * weights_b
  int64_t weights_t, weights_b;
  // Backward, for one query of each memory.
  float* dcontext;            // [T, N, Dv], at first from outside the loop
  const float* dweights;      // [B, T, Tk] or null
  float* dquery;              // [T, N, D]
  float *dkey, *dvalue, *dv;  // as AttentionBackward, or null
};

void decoder_forward(const Decoder&, int threads);
void decoder_backward(const Decoder&, int threads);

}  // namespace fastrnn::cpu
