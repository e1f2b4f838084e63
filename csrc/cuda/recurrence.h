// The persistent recurrence: what a call consists of, as its launchers take it. Raw pointers and sizes only; how the
// kernels go about it is described in csrc/README.md.
#pragma once

#include <stdint.h>

#include "cell.h"

namespace fastrnn::cuda {

// What data are and how products of them are computed; sums are float in all four.
enum class Math : int { float16, bfloat16, tf32, float32 };

struct Tile {
  int unit_groups;  // groups of 8 hidden units of one block: 1, 2 or 4
  int rows;         // batch rows of one block, a multiple of 16
};

// One direction of one layer. Rows of the batch are b, steps t; element (t, b, column) of a sequence lies at
// t * stride_t + b * stride_b + column, or at (row_starts[t] + b) * stride_b + column where sequences are packed.
struct Sequence {
  int64_t stride_t, stride_b;
};

struct Norm {
  const float *weight, *bias;  // null where there is none
};

struct Problem {
  Cell cell;
  Math math;
  bool reverse;
  int64_t steps, batch, hidden_size;
  int64_t rows;               // of a sequence: T*B, or all rows of packed ones
  const int64_t* row_starts;  // [T], or null
  const int64_t* lengths;     // [B], clamped to 0..T; or null
  const uint8_t* resets;      // by the strides, or null
  Sequence reset_strides;
  double zoneout;  // probability; in expectation unless random
  bool zoneout_random;
  uint64_t zoneout_seed;
  const float* recurrent_mask;  // [B, H] or null
  Norm norm_hh, norm_c;         // [G*H], [H]
  const float* peephole;        // [3*H], gates i f o, LSTM; or null
};

// void: elements of the data's type. Scratch is memory that the launcher fills before the kernels use it.
struct Forward {
  Problem problem;
  const void* gates_x;  // [T, B, G*H], with the bias of the input
  Sequence gates_x_rows;
  const void* weight_hh;  // [G*H, H]
  const float* bias_hh;   // [G*H] or null
  const void* h0;         // [B, H] or null
  const void* c0;         // [B, H] or null
  void* y;                // [T, B, H]
  Sequence y_rows;
  void* h_n;            // [B, H]
  void* c_n;            // [B, H], LSTM
  void* packed_weight;  // scratch of packed_bytes
  void* h_in;           // scratch [rows, padded H]: what met weight_hh at each step
  void* rh;             // scratch [rows, padded H]: r * h_in, GRU with the reset before the product
  void* stats;          // scratch of stats_bytes, or null without layer norm
  void* saved;          // [rows, saved_slots, H] of activations, or null in inference
  float* c_all;         // [T, B, H] or null, LSTM
  Sequence c_rows;
  void* norm_saved;   // [rows, G*H] of normalised products, or null
  float* deviations;  // [rows, 4]: 1/deviation of the groups of W_hh h, then mean and 1/deviation of c; or null
};

struct Backward {
  Problem problem;
  const void* dy;  // [T, B, H] or null
  Sequence dy_rows;
  const void* dh_n;     // [B, H] or null
  const void* dc_n;     // [B, H] or null
  const float* dc_all;  // [T, B, H] or null
  Sequence dc_all_rows;
  const void* weight_hh;
  const void* h0;
  const void* c0;
  const void* y;
  Sequence y_rows;
  const void* saved;
  const float* c_all;
  Sequence c_rows;
  const void* norm_saved;
  const float* deviations;
  void* packed_weight;  // scratch of packed_bytes
  void* dproduct;       // scratch [rows, G, padded H]: gradient of W_hh h before its norm
  void* stats;          // scratch of stats_bytes, or null
  void* dgates_x;       // [T, B, G*H], or null where it is dproduct
  Sequence dgates_x_rows;
  float* dh0;   // [B, H] or null
  float* dc0;   // [B, H] or null, LSTM
  float* sums;  // [gradient_sums, B, H], or null where that is 0
};

// Activations that the backward pass needs: the RNN's state before zoneout, LSTM i f g o, GRU r z n and, with the reset
// after the product, W_hn h + b_hn.
constexpr int saved_slots(Cell cell) { return gate_count(cell) == 1 ? 1 : saved_count(cell); }

// Sums over time for each row and unit: gradients of norm_hh's weight and bias by gates, of norm_c's, and of the
// peepholes.
constexpr int gradient_sums(Cell cell, bool norm_hh, bool norm_c, bool peephole) {
  return (norm_hh ? 2 * gate_count(cell) : 0) + (norm_c ? 2 : 0) + (peephole ? 3 : 0);
}

constexpr int64_t kUnitGroup = 8;
constexpr int64_t kRowTile = 16;
constexpr int kMaxUnitGroups = 4;

// A row of exchanged values is padded to whole chunks of the products, so that all of its bytes get written.
constexpr int64_t padded_size(int64_t hidden_size) { return (hidden_size + 31) / 32 * 32; }

constexpr int64_t element_size(Math math) { return math == Math::float16 || math == Math::bfloat16 ? 2 : 4; }

constexpr int64_t packed_bytes(Cell cell, Math math, int64_t hidden_size) {
  return gate_count(cell) * padded_size(hidden_size) * padded_size(hidden_size) * element_size(math);
}

// Blocks along the hidden units.
constexpr int64_t slices(int64_t hidden_size, const Tile& tile) {
  return padded_size(hidden_size) / (kUnitGroup * tile.unit_groups);
}

// Two exchanges of statistics a step, each of 16 bytes per group of units and row.
constexpr int64_t stats_bytes(int64_t steps, int64_t batch, int64_t hidden_size) {
  return 2 * steps * batch * (padded_size(hidden_size) / kUnitGroup) * 16;
}

// Launch on a cudaStream_t of the current device, and do not wait. `count` directions, of equal sizes and dtypes, run
// at the same time. Null, or what went wrong: then nothing has been computed.
const char* recurrence_forward(const Forward* directions, int count, const Tile& tile, void* stream);
const char* recurrence_backward(const Backward* directions, int count, const Tile& tile, void* stream);

// Of the current device.
struct DeviceLimits {
  int multiprocessors;
  int64_t shared_bytes;  // of one block
  int capability;        // 90 for sm_90
};
const char* device_limits(DeviceLimits& found);

// How a tile would run on the current device.
struct Fit {
  int blocks_needed;   // of one direction and one group of rows
  int blocks_at_once;  // that the device holds
  int64_t shared_bytes;
  int64_t streamed_bytes;  // of weights that do not fit on chip and are read from L2 at every step, per block
};
const char* recurrence_fit(Cell cell, Math math, int64_t hidden_size, const Tile& tile, bool norms, bool backward,
                           Fit& fit);

}  // namespace fastrnn::cuda
