#define FASTRNN_LANES 16
#include "cpu/kernels.h"

FASTRNN_DEFINE_KERNELS(avx512)
