#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_float32(Cell cell) { return table<Math::float32>(cell); }
