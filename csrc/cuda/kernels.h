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

const Kernels& kernels_float16(Cell);
const Kernels& kernels_bfloat16(Cell);
const Kernels& kernels_tf32(Cell);
const Kernels& kernels_float32(Cell);

// Gates whose product with h is the step's first one; n of the GRU with the reset before the product has a second.
constexpr int first_gates(Cell cell) { return cell == Cell::gru_reset_before ? 2 : gate_count(cell); }

// One product of a kernel: rows of weights for each unit, how often K is as long as h, the chunks of weights that each
// warp holds in registers and how many it takes at a time.
struct Shape {
  int octets, depths, held, ahead;
};

constexpr Shape forward_product(Cell cell) {
  const int gates = first_gates(cell);
  return {gates, 1, gates == 4 ? 6 : gates == 1 ? 16 : 8, gates == 4 ? 6 : 4};
}
constexpr Shape forward_second() { return {1, 1, 8, 4}; }
constexpr Shape backward_product(Cell cell) {
  return {1, first_gates(cell), cell == Cell::gru_reset_before ? 12 : 16, 4};
}
constexpr Shape backward_second() { return {1, 1, 8, 4}; }

// Floats of shared memory for each row and unit of a block: states, and backward the sums over time.
constexpr int forward_states(Cell cell) { return cell == Cell::lstm ? 2 : 1; }
constexpr int backward_states(Cell cell, int sums) { return forward_states(cell) + sums; }

}  // namespace fastrnn::cuda
