#define FASTRNN_LANES 8
#include "cpu/attention_kernels.h"

FASTRNN_DEFINE_ATTENTION(avx2)
