// The CPU recurrence: what a call consists of, and the table of kernels that one instruction set provides.
// Raw pointers and sizes only; the layouts are described in csrc/README.md.
#pragma once

#include <stdint.h>

#include "cells.h"

namespace fastrnn::cpu {

// Where row i of step t lies: base + offset[t] + index(i) * stride, in elements.
struct Rows {
  const int64_t* offset;  // [T]
  int64_t stride;
};

// Rows of a step are numbered 0..active[t]-1, longest sequence first; row i belongs to batch entry order[i].
struct Problem {
  Cell cell;
  bool reverse;
  int64_t steps, batch, input_size, hidden_size;
  int64_t output_size;      // P, the size of h: hidden_size without a projection
  const int64_t* active;    // [T]
  const int64_t* row_base;  // [T+1], prefix sums of active
  const int64_t* order;     // [B], or null: row i is batch entry i
  const uint8_t* resets;    // [T, B] by the strides below, or null
  int64_t reset_stride_t, reset_stride_b;
  double zoneout;  // probability; in expectation unless random
  bool zoneout_random;
  uint64_t zoneout_seed;
  const float* recurrent_mask;  // [B, P] or null
};

// Of a layer norm; null where there is none.
struct Norm {
  const float *weight, *bias;
};

struct NormGradient {
  float *weight, *bias;
};

// void: elements of the kernels' data type, float or bfloat16.
struct ForwardArgs {
  const void* x;  // [T, B, I], or pre-activations [T, B, G*H] where weight_ih is null
  Rows x_rows;
  const void* weight_ih;  // packed by pack_forward
  const void* weight_hh;  // packed by pack_forward
  const void* weight_hr;  // [P, H], packed by pack_forward as an RNN's weight, LSTM, or null: h = W_hr (o * tanh(c))
  const float* bias_ih;   // [G*H] or null
  const float* bias_hh;   // [G*H] or null
  const float* h0;        // [B, P] or null
  const float* c0;        // [B, H] or null
  void* y;                // [T, B, P]
  Rows y_rows;
  float* h_n;    // [B, P]
  float* c_n;    // [B, H], LSTM
  float* saved;  // [rows, panels, saved_count*lanes], or null in inference; the RNN's see saved_output
  float* c_all;  // [T, B, H], LSTM, or null
  Rows c_rows;
  Norm norm_ih, norm_hh, norm_c;  // of W_ih x and W_hh h [G*H], and of c before its tanh [H]
  float* norm_saved;              // [rows] of NormSaved, or null
  const float* peephole;          // [3*H], gates i f o, LSTM; or null
};

struct BackwardArgs {
  const void* dy;  // [T, B, P] or null
  Rows dy_rows;
  const float* dh_n;    // [B, P] or null
  const float* dc_n;    // [B, H] or null
  const float* dc_all;  // [T, B, H] or null
  Rows dc_all_rows;
  const void* x;
  Rows x_rows;
  const void* weight_ih;  // packed by pack_backward; null: dx is the gradient of the pre-activations
  const void* weight_hh;  // packed by pack_backward
  const void* weight_hr;  // packed by pack_backward as an RNN's weight, or null
  const float* h0;
  const float* c0;
  const void* y;
  Rows y_rows;
  const float* saved;
  const float* c_all;
  Rows c_rows;
  void* dx;  // or null
  Rows dx_rows;
  float* dweight_ih;  // [G*H, I] or null
  float* dweight_hh;  // [G*H, P] or null
  float* dweight_hr;  // [P, H] or null
  float* dbias_ih;    // [G*H] or null
  float* dbias_hh;    // [G*H] or null
  float* dh0;         // [B, P] or null
  float* dc0;         // [B, H] or null
  Norm norm_ih, norm_hh, norm_c;
  const float* norm_saved;
  NormGradient dnorm_ih, dnorm_hh, dnorm_c;  // null where not wanted
  const float* peephole;
  float* dpeephole;  // or null
};

// One step straight from torch's weight layout, for calls too short to pay for packing. All [rows, columns] matrices
// have contiguous rows.
struct StepArgs {
  const float* x;  // [B, I] or pre-activations [B, G*H] where weight_ih is null
  int64_t x_stride;
  const float* weight_ih;  // [G*H, I] or null
  const float* weight_hh;  // [G*H, H]
  const float* bias_ih;
  const float* bias_hh;
  const float* h0;  // [B, H] or null
  const float* c0;  // [B, H] or null
  float* h;         // [B, H]
  float* c;         // [B, H], LSTM
  float* saved;     // as ForwardArgs, or null
};

struct StepBackwardArgs {
  const float* dh;  // [B, H] or null
  const float* dc;  // [B, H] or null
  const float* x;
  int64_t x_stride;
  const float* weight_ih;  // torch's layout
  const float* weight_hh;
  const float* h0;
  const float* c0;
  const float* h;
  const float* c;
  const float* saved;
  float* dx;  // [B, I] or null
  float* dweight_ih;
  float* dweight_hh;
  float* dbias_ih;
  float* dbias_hh;
  float* dh0;
  float* dc0;
};

struct Kernels {
  const char* isa;
  int lanes;

  // Floats' worth of memory that a weight [G*H, columns] takes once packed for the forward product x W^T.
  int64_t (*packed_forward_size)(Cell, int64_t hidden_size, int64_t columns);
  // `hidden` tells weight_hh, whose layout differs in some cells (place in pack.h, and the gradients' order of
  // cells.h); `floats` a weight that is float whatever the kernels' data type.
  void (*pack_forward)(Cell, int64_t hidden_size, int64_t columns, bool hidden, const void* weight, bool floats,
                       void* packed, int threads);
  // The same for the backward product dG W.
  int64_t (*packed_backward_size)(Cell, int64_t hidden_size, int64_t columns);
  void (*pack_backward)(Cell, int64_t hidden_size, int64_t columns, bool hidden, const void* weight, bool floats,
                        void* packed, int threads);
  // Of `size` 32-bit words.
  uint64_t (*checksum)(const float* data, int64_t size, int threads);

  int64_t (*saved_size)(Cell, int64_t rows, int64_t hidden_size, bool zoneout_expected);
  int64_t (*norm_saved_size)(Cell, int64_t rows, int64_t hidden_size);
  void (*forward)(const Problem&, const ForwardArgs&, int threads);
  void (*backward)(const Problem&, const BackwardArgs&, int threads);
  // Null for bfloat16, whose single steps take the way of the sequences.
  void (*step)(const Problem&, const StepArgs&, int threads);
  void (*step_backward)(const Problem&, const StepBackwardArgs&, int threads);

  // out [rows, columns] = x * keep * scale, each element dropped with the probability. Rows of x are contiguous.
  // Null for bfloat16.
  void (*dropout)(const float* x, int64_t x_stride, int64_t rows, int64_t columns, double probability, float scale,
                  uint64_t seed, float* out, int threads);

  // Multiply-adds of the data type from registers alone, in FLOP/s summed over the threads.
  double (*fma_ceiling)(int threads, double seconds);
  // Bytes per second that the threads together read of a buffer, each its own part over and over.
  double (*read_bandwidth)(const float* data, int64_t size, int threads, double seconds);
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();  // data in bfloat16

}  // namespace fastrnn::cpu
