#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_float16(Cell cell, bool norms) {
  return norms ? table<Math::float16, true>(cell) : table<Math::float16, false>(cell);
}
