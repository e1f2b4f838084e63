// All kernels of one kind of arithmetic; each recurrence_<math>.cu compiles its own.
#pragma once

#include "cuda/backward.h"
#include "cuda/forward.h"

namespace fastrnn::cuda {
namespace {

template <Math math, Cell cell>
constexpr Kernels pair() {
  return {forward_kernel<math, cell>, backward_kernel<math, cell>};
}

// In the order of Cell.
template <Math math>
const Kernels& table(Cell cell) {
  static const Kernels kernels[] = {pair<math, Cell::rnn_tanh>(), pair<math, Cell::rnn_relu>(),
                                    pair<math, Cell::lstm>(), pair<math, Cell::gru>(),
                                    pair<math, Cell::gru_reset_before>()};
  return kernels[static_cast<int>(cell)];
}

}  // namespace
}  // namespace fastrnn::cuda
