// The table of one instruction set. Its file defines FASTRNN_LANES and calls FASTRNN_DEFINE_KERNELS.
#pragma once

#include "cpu/step.h"

namespace fastrnn {
namespace {

// Turns the cell of a call into a template argument: function(CellTag<cell>).
template <Cell value>
struct CellTag {
  static constexpr Cell cell = value;
};

template <class Function>
auto with_cell(Cell cell, Function function) {
  switch (cell) {
    case Cell::lstm: return function(CellTag<Cell::lstm>());
    case Cell::gru: return function(CellTag<Cell::gru>());
    case Cell::gru_reset_before: return function(CellTag<Cell::gru_reset_before>());
    case Cell::rnn_relu: return function(CellTag<Cell::rnn_relu>());
    default: return function(CellTag<Cell::rnn_tanh>());
  }
}

int64_t packed_forward_size(Cell cell, int64_t hidden_size, int64_t columns) {
  return with_cell(cell, [&](auto tag) {
    using P = Panel<tag.cell>;
    return P::count(hidden_size) * P::kWidth * columns;
  });
}

void pack_forward(Cell cell, int64_t hidden_size, int64_t columns, bool hidden, const float* weight, float* packed,
                  int threads) {
  with_cell(cell,
            [&](auto tag) { pack_forward_panels<tag.cell>(hidden_size, columns, hidden, weight, packed, threads); });
}

int64_t packed_backward_size(Cell cell, int64_t hidden_size, int64_t columns) {
  return gate_count(cell) * hidden_size * ceil_div(columns, kColumns) * kColumns;
}

void pack_backward(Cell cell, int64_t hidden_size, int64_t columns, bool hidden, const float* weight, float* packed,
                   int threads) {
  with_cell(cell,
            [&](auto tag) { pack_backward_panels<tag.cell>(hidden_size, columns, hidden, weight, packed, threads); });
}

int64_t saved_size(Cell cell, int64_t rows, int64_t hidden_size, bool zoneout_expected) {
  const int64_t per_unit = saved_count(cell) == 0 && zoneout_expected ? 1 : saved_count(cell);
  return rows * ceil_div(hidden_size, kLanes) * per_unit * kLanes;
}

void forward(const Problem& problem, const ForwardArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { Forward<tag.cell>(problem, args, threads).run(); });
}

void backward(const Problem& problem, const BackwardArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { Backward<tag.cell>(problem, args, threads).run(); });
}

void step(const Problem& problem, const StepArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { step_forward<tag.cell>(problem, args, threads); });
}

void step_backward_any(const Problem& problem, const StepBackwardArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { step_backward<tag.cell>(problem, args, threads); });
}

double fma_ceiling(int threads, double seconds) {
  double rates[256] = {};
  const int64_t slots = smaller(threads, 256);
  on_team(slots, [&](int64_t begin, int64_t) {
    Vec acc[12];
    for (int i = 0; i < 12; ++i) acc[i] = Vec{} + 1e-3f * i;
    Vec factor = Vec{} + 0.999f, addend = Vec{} + 1e-3f;
    asm volatile("" : "+m"(factor), "+m"(addend));  // not known to the compiler
    const double start = now_seconds();
    double elapsed = 0, count = 0;
    while (elapsed < seconds) {
      for (int repeat = 0; repeat < 100000; ++repeat) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) acc[i] = acc[i] * factor + addend;
      }
      count += 100000.0 * 12 * kLanes * 2;
      elapsed = now_seconds() - start;
    }
    for (int i = 0; i < 12; ++i) asm volatile("" : : "m"(acc[i]));
    rates[begin] = count / elapsed;
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_DEFINE_KERNELS(name)                                                                               \
  namespace fastrnn::cpu {                                                                                         \
  const Kernels& kernels_##name() {                                                                                \
    static const Kernels kernels = {#name,          kLanes,           packed_forward_size, pack_forward,           \
                                    packed_backward_size, pack_backward, checksum_floats,   saved_size, forward,    \
                                    backward,       step,             step_backward_any,   fma_ceiling};           \
    return kernels;                                                                                                \
  }                                                                                                                \
  }
