// The kernels of the recurrence as the launcher sees them: one table for each kind of arithmetic.
#pragma once

#include "cuda/recurrence.h"

namespace fastrnn::cuda {

// What a launch runs: one or two directions, a range of rows of the batch that fits on the chip at once.
template <class Direction>
struct Work {
  Direction directions[2];
  Tile tile;
  int blocks;            // of each direction
  int64_t first_row;     // of the batch
  int shared_chunks[2];  // of each warp's weights, of the first and the second product
};

struct Kernels {
  void (*forward)(Work<Forward>);
  void (*backward)(Work<Backward>);
};

const Kernels& kernels_float16(Cell, bool norms);
const Kernels& kernels_bfloat16(Cell, bool norms);
const Kernels& kernels_tf32(Cell, bool norms);
const Kernels& kernels_float32(Cell, bool norms);

// Gates whose product with h is the step's first one; n of the GRU with the reset before the product has a second.
constexpr int first_gates(Cell cell) { return cell == Cell::gru_reset_before ? 2 : gate_count(cell); }

// What is known of a kernel as it is compiled. Layer norms cost registers, so that kernels without are kernels apart.
struct Variant {
  Math math;
  Cell cell;
  bool norms;
};

// One product of a kernel: rows of weights for each unit, how often K is as long as h, the chunks of weights that each
// warp holds in registers, and the chunks of h whose loads are under way at a time.
struct Shape {
  int octets, depths, held, ahead;
};

// As many as the registers hold (docs/cuda_kernels.md). Floats are held as two tf32 numbers each.
constexpr Shape shape(const Variant& v, int octets, int depths, int held, int ahead) {
  const int less = (v.math == Math::float32 ? 2 : 1) * (v.norms ? 2 : 1);
  return {octets, depths, held > less ? held / less : 1, ahead > less ? ahead / less : 1};
}
constexpr Shape forward_product(const Variant& v) {
  const int gates = first_gates(v.cell);
  return gates == 1 ? shape(v, 1, 1, 8, 8) : shape(v, gates, 1, 3, 4);
}
constexpr Shape backward_product(const Variant& v) {
  return gate_count(v.cell) == 1 ? shape(v, 1, 1, 8, 8) : shape(v, 1, first_gates(v.cell), 6, 6);
}
constexpr Shape second_product(const Variant& v) { return shape(v, 1, 1, 4, 4); }

// Floats of shared memory for each row and unit of a block: states, and backward the sums over time.
constexpr int forward_states(Cell cell) { return cell == Cell::lstm ? 2 : 1; }
constexpr int backward_states(Cell cell, int sums) { return forward_states(cell) + sums; }

}  // namespace fastrnn::cuda
