// One time step straight from torch's weight layout, [G*H, columns]: nothing is packed or cached. Forward, each output
// is the dot product of two rows; its sum has one order, whatever the batch. Backward, dG W runs along the rows of W.
#pragma once

#include "cpu/backward.h"
#include "cpu/rows.h"

namespace fastrnn {
namespace {

constexpr int64_t kDotDepth = 512;  // kLanes rows of weights of this length stay in L1
constexpr int64_t kDotRows = 64;    // rows of the batch whose pre-activations are held at once

// The dot products of `a` with kLanes rows of a weight, of which `valid` exist.
inline __attribute__((always_inline)) Vec dot_rows(const float* weight, int64_t ld, int64_t valid, const float* a,
                                                   int64_t size) {
  Vec sums[kLanes] = {};
  int64_t k = 0;
  if (valid >= kLanes) {
    for (; k + kLanes <= size; k += kLanes) {
      const Vec value = load(a + k);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) sums[i] += value * load(weight + i * ld + k);
    }
    if (k < size) {
      const Vec value = load(a + k, size - k);
      for (int i = 0; i < kLanes; ++i) sums[i] += value * load(weight + i * ld + k, size - k);
    }
  } else {
    for (; k < size; k += kLanes) {
      const Vec value = load(a + k, size - k);
      for (int i = 0; i < valid; ++i) sums[i] += value * load(weight + i * ld + k, size - k);
    }
  }
  return sum_lanes(sums);
}

inline int64_t step_slots(const Problem& problem, int threads) {
  const double flops =
      2.0 * gate_count(problem.cell) * problem.batch * problem.hidden_size * (problem.hidden_size + problem.input_size);
  return larger(1, smaller(smaller(threads, ceil_div(problem.hidden_size, kLanes)), static_cast<int64_t>(flops / 1e6)));
}

template <Cell cell>
void step_units(const Problem& problem, const StepArgs& args, int64_t unit, float* pre) {
  constexpr int kGates = gate_count(cell);
  const int64_t hidden = problem.hidden_size, size = problem.input_size, count = hidden - unit;
  const int64_t vectors = ceil_div(hidden, kLanes);
  for (int64_t b0 = 0; b0 < problem.batch; b0 += kDotRows) {
    const int64_t rows = smaller(kDotRows, problem.batch - b0);
    // pre[row][source][gate]: the parts that come from x and from h.
    auto at = [&](int64_t row, int source, int gate)
                  __attribute__((always_inline)) { return pre + ((row * 2 + source) * kGates + gate) * kLanes; };
    auto multiply = [&](int source, const float* weight, int64_t columns, const float* a, int64_t lda) {
      for (int gate = 0; gate < kGates; ++gate)
        for (int64_t k = 0; k < columns; k += kDotDepth)
          for (int64_t row = 0; row < rows; ++row) {
            const Vec sum = dot_rows(weight + (gate * hidden + unit) * columns + k, columns, count,
                                     a + (b0 + row) * lda + k, smaller(kDotDepth, columns - k));
            store(at(row, source, gate), k == 0 ? sum : sum + load(at(row, source, gate)));
          }
    };
    if (args.weight_ih) {
      multiply(0, args.weight_ih, size, args.x, args.x_stride);
    } else {
      for (int64_t row = 0; row < rows; ++row)
        for (int gate = 0; gate < kGates; ++gate)
          store(at(row, 0, gate), load(args.x + (b0 + row) * args.x_stride + gate * hidden + unit, count));
    }
    if (args.h0) multiply(1, args.weight_hh, hidden, args.h0, hidden);

    for (int64_t row = 0; row < rows; ++row) {
      const int64_t b = b0 + row, state_at = b * hidden + unit;
      auto bias = [&](const float* values, int gate) __attribute__((always_inline)) {
        return values ? load(values + gate * hidden + unit, count) : Vec{};
      };
      auto x_part = [&](int gate)
                        __attribute__((always_inline)) { return load(at(row, 0, gate)) + bias(args.bias_ih, gate); };
      auto h_part = [&](int gate) __attribute__((always_inline)) {
        return (args.h0 ? load(at(row, 1, gate)) : Vec{}) + bias(args.bias_hh, gate);
      };
      float* saved = args.saved ? args.saved + (b * vectors + unit / kLanes) * (saved_count(cell) * kLanes) : nullptr;
      Vec h;
      if constexpr (cell == Cell::lstm) {
        LstmGates<Vec> gates{x_part(0) + h_part(0), x_part(1) + h_part(1), x_part(2) + h_part(2),
                             x_part(3) + h_part(3)};
        Vec c = args.c0 ? load(args.c0 + state_at, count) : Vec{};
        lstm_cell_state(gates, c);
        h = lstm_output(gates.o, c);
        store(args.c + state_at, c, count);
        if (saved) {
          store(saved, gates.i);
          store(saved + kLanes, gates.f);
          store(saved + 2 * kLanes, gates.g);
          store(saved + 3 * kLanes, gates.o);
        }
      } else if constexpr (cell == Cell::gru) {
        GruGates<Vec> gates{sigmoid(x_part(0) + h_part(0)), sigmoid(x_part(1) + h_part(1)), x_part(2), h_part(2)};
        gates.n = tanh(gates.n + gates.r * gates.h_n);
        h = gru_output(gates.z, gates.n, args.h0 ? load(args.h0 + state_at, count) : Vec{});
        if (saved) {
          store(saved, gates.r);
          store(saved + kLanes, gates.z);
          store(saved + 2 * kLanes, gates.n);
          store(saved + 3 * kLanes, gates.h_n);
        }
      } else {
        h = rnn_forward<cell>(x_part(0) + h_part(0));
      }
      store(args.h + state_at, h, count);
    }
  }
}

template <Cell cell>
void step_forward(const Problem& problem, const StepArgs& args, int threads) {
  const int64_t vectors = ceil_div(problem.hidden_size, kLanes), slots = step_slots(problem, threads);
  const int64_t floats = smaller(kDotRows, larger(1, problem.batch)) * 2 * gate_count(cell) * kLanes;
  const Scratch scratch(slots * floats);
  float* pre = scratch.data();
  on_team(slots, [&, pre](int64_t begin, int64_t end) {
    for (int64_t v = vectors * begin / slots; v < vectors * end / slots; ++v)
      step_units<cell>(problem, args, v * kLanes, pre + begin * floats);
  });
}

template <Cell cell>
void step_gradients(const Problem& problem, const StepBackwardArgs& args, int64_t unit, float* gradients,
                    int64_t stride) {
  const int64_t hidden = problem.hidden_size, count = hidden - unit, vectors = ceil_div(hidden, kLanes);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t at = b * hidden + unit;
    auto optional = [&](const float* from)
                        __attribute__((always_inline)) { return from ? load(from + at, count) : Vec{}; };
    const float* saved = args.saved + (b * vectors + unit / kLanes) * (saved_count(cell) * kLanes);
    float* out = gradients + b * stride + unit;
    Vec dh = optional(args.dh);
    if constexpr (cell == Cell::lstm) {
      LstmGates<Vec> gates{load(saved), load(saved + kLanes), load(saved + 2 * kLanes), load(saved + 3 * kLanes)};
      Vec dc = optional(args.dc);
      const Vec c_previous = optional(args.c0), tanh_c = lstm_output_backward(gates, c_previous, dh, dc);
      lstm_gate_gradients(gates, c_previous, tanh_c, dh, dc);
      store(out, gates.i, count);
      store(out + hidden, gates.f, count);
      store(out + 2 * hidden, gates.g, count);
      store(out + 3 * hidden, gates.o, count);
      if (args.dc0) store(args.dc0 + at, dc, count);
    } else if constexpr (cell == Cell::gru) {
      GruGates<Vec> gates{load(saved), load(saved + kLanes), load(saved + 2 * kLanes), load(saved + 3 * kLanes)};
      gru_backward(gates, optional(args.h0), dh);
      store(out, gates.h_n, count);
      store(out + hidden, gates.r, count);
      store(out + 2 * hidden, gates.z, count);
      store(out + 3 * hidden, gates.n, count);
      if (args.dh0) store(args.dh0 + at, dh, count);  // the direct part; dG W_hh is added to it
    } else {
      store(out, rnn_backward<cell>(load(args.h + at, count), dh), count);
    }
  }
}

template <Cell cell>
void step_backward(const Problem& problem, const StepBackwardArgs& args, int threads) {
  constexpr int kGates = gate_count(cell), kBlocks = gradient_count(cell);
  constexpr bool kGru = cell == Cell::gru;
  const int64_t hidden = problem.hidden_size, size = problem.input_size, batch = problem.batch;
  const int64_t vectors = ceil_div(hidden, kLanes), slots = step_slots(problem, threads);
  const int64_t stride = padded(kBlocks * hidden);
  const Scratch scratch(larger(1, batch) * stride);
  float* gradients = scratch.data();
  Barrier barrier(slots);
  on_team(slots, [&](int64_t begin, int64_t end) {
    for (int64_t v = vectors * begin / slots; v < vectors * end / slots; ++v)
      step_gradients<cell>(problem, args, v * kLanes, gradients, stride);
    barrier.wait(begin, end);

    const float* for_input = gradients + (kGru ? hidden : 0);
    auto share = [&](int64_t columns, int64_t slot) {  // in whole vectors, so that no two threads share a line
      return smaller(columns, ceil_div(columns, kLanes) * slot / slots * kLanes);
    };
    if (args.dh0) {
      const int64_t from = share(hidden, begin), to = share(hidden, end);
      if constexpr (kGru) {  // the gradients come in the order n r z, the weights as r z n
        multiply_rows(batch, hidden, gradients, stride, args.weight_hh + 2 * hidden * hidden, hidden, from, to, true,
                      args.dh0, hidden);
        multiply_rows(batch, 2 * hidden, gradients + hidden, stride, args.weight_hh, hidden, from, to, true, args.dh0,
                      hidden);
      } else {
        multiply_rows(batch, kGates * hidden, gradients, stride, args.weight_hh, hidden, from, to, false, args.dh0,
                      hidden);
      }
    }
    if (args.dx && args.weight_ih) {
      multiply_rows(batch, kGates * hidden, for_input, stride, args.weight_ih, size, share(size, begin),
                    share(size, end), false, args.dx, size);
    } else if (args.dx) {
      const int64_t from = share(kGates * hidden, begin), to = share(kGates * hidden, end);
      for (int64_t b = 0; b < batch; ++b)
        __builtin_memcpy(args.dx + b * kGates * hidden + from, for_input + b * stride + from,
                         (to - from) * sizeof(float));
    }
    for (int block = 0; block < kBlocks; ++block) {
      const GradientBlock to = gradient_block<cell>(block);
      const int64_t from = share(hidden, begin), last = share(hidden, end);
      const float* part = gradients + block * hidden;
      auto add = [&](float* dbias, int gate) {
        if (!dbias || gate < 0) return;
        for (int64_t m = from; m < last; ++m) {
          double sum = 0;
          for (int64_t b = 0; b < batch; ++b) sum += part[b * stride + m];
          dbias[gate * hidden + m] = sum;
        }
      };
      add(args.dbias_hh, to.hidden_gate);
      add(args.dbias_ih, to.input_gate);
      if (args.dweight_hh && to.hidden_gate >= 0) {
        float* out = args.dweight_hh + to.hidden_gate * hidden * hidden;
        if (args.h0) {
          outer_rows(from, last, batch, part, stride, args.h0, hidden, 0, hidden, false, out, hidden);
        } else {
          __builtin_memset(out + from * hidden, 0, (last - from) * hidden * sizeof(float));
        }
      }
      if (args.dweight_ih && to.input_gate >= 0)
        outer_rows(from, last, batch, part, stride, args.x, args.x_stride, 0, size, false,
                   args.dweight_ih + to.input_gate * hidden * size, size);
    }
  });
}

}  // namespace
}  // namespace fastrnn
