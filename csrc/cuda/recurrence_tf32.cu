#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_tf32(Cell cell, bool norms) {
  return norms ? table<Math::tf32, true>(cell) : table<Math::tf32, false>(cell);
}
