#define FASTRNN_LANES 4
#include "cpu/top_k_kernels.h"

FASTRNN_DEFINE_TOP_K(portable)
