#include "cuda/tables.h"

const fastrnn::cuda::Kernels& fastrnn::cuda::kernels_tf32(Cell cell) { return table<Math::tf32>(cell); }
