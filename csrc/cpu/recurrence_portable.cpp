#define FASTRNN_LANES 4
#include "cpu/kernels.h"

FASTRNN_DEFINE_KERNELS(portable)
