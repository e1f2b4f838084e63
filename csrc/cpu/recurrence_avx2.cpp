#define FASTRNN_LANES 8
#include "cpu/kernels.h"

FASTRNN_DEFINE_KERNELS(avx2)
