// All kernels of one kind of arithmetic; each recurrence_<math>.cu compiles its own.
#pragma once

#include "cuda/backward.h"
#include "cuda/forward.h"

namespace fastrnn::cuda {
namespace {

template <Math math, Cell cell, bool norms>
constexpr Kernels pair() {
  return {forward_kernel<math, cell, norms>, backward_kernel<math, cell, norms>};
}

// In the order of Cell.
template <Math math, bool norms>
const Kernels& table(Cell cell) {
  static const Kernels kernels[] = {pair<math, Cell::rnn_tanh, norms>(), pair<math, Cell::rnn_relu, norms>(),
                                    pair<math, Cell::lstm, norms>(), pair<math, Cell::gru, norms>(),
                                    pair<math, Cell::gru_reset_before, norms>()};
  return kernels[static_cast<int>(cell)];
}

}  // namespace
}  // namespace fastrnn::cuda
