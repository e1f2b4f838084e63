#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_bfloat16(Cell cell) { return table<Math::bfloat16>(cell); }
