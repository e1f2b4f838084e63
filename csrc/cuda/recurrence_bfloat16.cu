#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_bfloat16(Cell cell, bool norms) {
  return norms ? table<Math::bfloat16, true>(cell) : table<Math::bfloat16, false>(cell);
}
