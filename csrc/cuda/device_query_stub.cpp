#include "cuda/device_query.h"

namespace fastrnn {

int cuda_device_count() { return 0; }

const char* cuda_status() { return "built without CUDA"; }

const char* cuda_device_type() { return "cuda"; }

}  // namespace fastrnn
