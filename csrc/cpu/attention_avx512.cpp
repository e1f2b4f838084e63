#define FASTRNN_LANES 16
#include "cpu/attention_kernels.h"

FASTRNN_DEFINE_ATTENTION(avx512)
