#define FASTRNN_LANES 16
#define FASTRNN_BF16
#include "cpu/kernels.h"

FASTRNN_DEFINE_KERNELS(avx512bf16)
