#include "cuda/device_query.h"
#include "cuda/launch.h"

namespace fastrnn {
namespace {

struct Query {
  int usable = 0;
  const char* status = "ok";
};

Query query() {
  int devices = 0;
  if (const char* error = cuda::device_count(devices)) return {0, error};
  Query result;
  for (int device = 0; device < devices; ++device) {
    int capability = 0;
    if (const char* error = cuda::capability(device, capability)) return {0, error};
    result.usable += capability >= 80;  // sm_80 is the oldest image in the binary
  }
  if (devices == 0)
    result.status = "no CUDA device";
  else if (result.usable == 0)
    result.status = "no device of compute capability 8.0 or later";
  return result;
}

}  // namespace

int cuda_device_count() { return query().usable; }

const char* cuda_status() { return query().status; }

const char* cuda_device_type() {
#ifdef FASTRNN_CUDA_EMULATED
  return "cpu";
#else
  return "cuda";
#endif
}

}  // namespace fastrnn
