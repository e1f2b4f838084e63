#define FASTRNN_LANES 8
#include "cpu/top_k_kernels.h"

FASTRNN_DEFINE_TOP_K(avx2)
