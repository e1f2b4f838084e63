#define FASTRNN_LANES 4
#include "cpu/attention_kernels.h"

FASTRNN_DEFINE_ATTENTION(portable)
