// The table of one instruction set. Its file defines FASTRNN_LANES and calls FASTRNN_DEFINE_KERNELS.
#pragma once

#ifdef FASTRNN_BF16
#include "cpu/backward.h"
#else
#include "cpu/dropout.h"
#include "cpu/step.h"
#endif

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
    case Cell::lstm:
      return function(CellTag<Cell::lstm>());
    case Cell::gru:
      return function(CellTag<Cell::gru>());
    case Cell::gru_reset_before:
      return function(CellTag<Cell::gru_reset_before>());
    case Cell::rnn_relu:
      return function(CellTag<Cell::rnn_relu>());
    default:
      return function(CellTag<Cell::rnn_tanh>());
  }
}

int64_t packed_forward_size(Cell cell, int64_t hidden_size, int64_t columns) {
  return with_cell(cell, [&](auto tag) {
    using P = Panel<tag.cell>;
    return P::count(hidden_size) * P::kWidth * words(columns);
  });
}

void pack_forward(Cell cell, int64_t hidden_size, int64_t columns, bool hidden, const void* weight, bool floats,
                  void* packed, int threads) {
  with_cell(cell, [&](auto tag) {
    if (floats) {
      pack_forward_panels<tag.cell>(hidden_size, columns, hidden, static_cast<const float*>(weight),
                                    static_cast<Word*>(packed), threads);
    } else {
      pack_forward_panels<tag.cell>(hidden_size, columns, hidden, static_cast<const Element*>(weight),
                                    static_cast<Word*>(packed), threads);
    }
  });
}

int64_t packed_backward_size(Cell cell, int64_t hidden_size, int64_t columns) {
  return gate_count(cell) * words(hidden_size) * ceil_div(columns, kColumns) * kColumns;
}

void pack_backward(Cell cell, int64_t hidden_size, int64_t columns, bool hidden, const void* weight, bool floats,
                   void* packed, int threads) {
  with_cell(cell, [&](auto tag) {
    if (floats) {
      pack_backward_panels<tag.cell>(hidden_size, columns, hidden, static_cast<const float*>(weight),
                                     static_cast<Word*>(packed), threads);
    } else {
      pack_backward_panels<tag.cell>(hidden_size, columns, hidden, static_cast<const Element*>(weight),
                                     static_cast<Word*>(packed), threads);
    }
  });
}

int64_t saved_size(Cell cell, int64_t rows, int64_t hidden_size, bool zoneout_expected) {
  const int64_t per_unit = saved_count(cell) == 0 && zoneout_expected ? 1 : saved_count(cell);
  return rows * ceil_div(hidden_size, kLanes) * per_unit * kLanes;
}

int64_t norm_saved_size(Cell cell, int64_t rows, int64_t hidden_size) {
  return with_cell(cell, [&](auto tag) { return rows * NormSaved<tag.cell>::row_size(hidden_size); });
}

void forward(const Problem& problem, const ForwardArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { Forward<tag.cell>(problem, args, threads).run(); });
}

void backward(const Problem& problem, const BackwardArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { Backward<tag.cell>(problem, args, threads).run(); });
}

#ifdef FASTRNN_BF16
constexpr auto step = nullptr, step_backward_any = nullptr, dropout = nullptr;
#else
void step(const Problem& problem, const StepArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { step_forward<tag.cell>(problem, args, threads); });
}

void step_backward_any(const Problem& problem, const StepBackwardArgs& args, int threads) {
  with_cell(problem.cell, [&](auto tag) { step_backward<tag.cell>(problem, args, threads); });
}
#endif

// Sums over a team's slots of work(begin, end) -> amount, repeated for that long; per second.
template <class Work>
double team_rate(int threads, double seconds, Work work) {
  double rates[kMaxSlots] = {};
  const int64_t slots = smaller(threads, kMaxSlots);
  Barrier barrier(slots);
  on_team(slots, [&](int64_t begin, int64_t end) {
    barrier.wait(begin, end);
    const double start = now_seconds();
    double elapsed = 0, amount = 0;
    while (elapsed < seconds) {
      amount += work(begin, end);
      elapsed = now_seconds() - start;
    }
    rates[begin] = amount / elapsed;
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

double fma_ceiling(int threads, double seconds) {
  return team_rate(threads, seconds, [](int64_t, int64_t) {
    constexpr int kChains = 12, kRepeats = 100000;
    Vec acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = splat(1e-3f * i);
    Words a = splat(Word{}), b = splat(Word{});
    asm volatile("" : "+m"(a), "+m"(b));  // not known to the compiler
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = multiply_add(a, b, acc[i]);
    }
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(acc[i]));
    return 2.0 * kPerWord * kLanes * kChains * kRepeats;
  });
}

double read_bandwidth(const float* data, int64_t size, int threads, double seconds) {
  const int64_t blocks = size / (8 * kLanes), slots = smaller(threads, kMaxSlots);
  return team_rate(threads, seconds, [=](int64_t begin, int64_t end) {
    const int64_t first = blocks * begin / slots, last = blocks * end / slots;
    Vec sums[8] = {};
    for (int64_t block = first; block < last; ++block)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        __builtin_prefetch(data + (block * 8 + i) * kLanes + 512);
        sums[i] += load(data + (block * 8 + i) * kLanes);
      }
    for (int i = 0; i < 8; ++i) asm volatile("" : : "m"(sums[i]));
    return static_cast<double>(last - first) * 8 * kLanes * sizeof(float);
  });
}

}  // namespace
}  // namespace fastrnn

#define FASTRNN_DEFINE_KERNELS(name)                      \
  namespace fastrnn::cpu {                                \
  const Kernels& kernels_##name() {                       \
    static const Kernels kernels = {#name,                \
                                    kLanes,               \
                                    packed_forward_size,  \
                                    pack_forward,         \
                                    packed_backward_size, \
                                    pack_backward,        \
                                    checksum_floats,      \
                                    saved_size,           \
                                    norm_saved_size,      \
                                    forward,              \
                                    backward,             \
                                    step,                 \
                                    step_backward_any,    \
                                    dropout,              \
                                    fma_ceiling,          \
                                    read_bandwidth};      \
    return kernels;                                       \
  }                                                       \
  }
