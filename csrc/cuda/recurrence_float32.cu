#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_float32(Cell cell, bool norms) {
  return norms ? table<Math::float32, true>(cell) : table<Math::float32, false>(cell);
}
