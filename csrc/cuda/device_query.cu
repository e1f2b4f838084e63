#include "cuda/device_query.h"

#include <cuda_runtime.h>

namespace fastrnn {
namespace {

struct Query {
  int usable = 0;
  const char* status = "ok";
};

Query query() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clear it: the next launch would report it as its own
    return {0, cudaGetErrorString(error)};
  }
  Query result;
  for (int device = 0; device < devices; ++device) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    result.usable += major >= 8;  // sm_80 is the oldest image in the binary
  }
  if (devices == 0) result.status = "no CUDA device";
  else if (result.usable == 0) result.status = "no device of compute capability 8.0 or later";
  return result;
}

}  // namespace

int cuda_device_count() { return query().usable; }

const char* cuda_status() { return query().status; }

}  // namespace fastrnn
