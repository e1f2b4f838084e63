#define FASTRNN_LANES 16
#include "cpu/top_k_kernels.h"

FASTRNN_DEFINE_TOP_K(avx512)
