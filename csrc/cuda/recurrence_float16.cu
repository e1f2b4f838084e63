#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_float16(Cell cell) { return table<Math::float16>(cell); }
