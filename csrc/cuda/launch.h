// What the launchers use of the CUDA runtime. Functions return null, or the runtime's own words on what went wrong.
#pragma once

#ifdef FASTRNN_CUDA_EMULATED
#include "emulated_launch.h"
#else

#include <cuda_runtime.h>
#include <stdint.h>

#define FASTRNN_KERNEL __global__

namespace fastrnn::cuda {

struct Launch {
  int blocks, threads;
  int64_t shared_bytes;  // dynamic shared memory of each block
  bool cooperative;      // all blocks run at once or the launch fails
  int cluster;           // blocks in each cluster, 1: none
  void* stream;          // a cudaStream_t
};

struct Limits {
  int multiprocessors;
  int64_t shared_bytes;  // most dynamic shared memory of one block
  int capability;        // 90 for sm_90
};

inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear it: the next launch would report it as its own
  return cudaGetErrorString(error);
}

inline const char* device_count(int& count) { return error_text(cudaGetDeviceCount(&count)); }

inline const char* capability(int device, int& found) {
  int major, minor;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) found = 10 * major + minor;
  return error_text(error);
}

// Of the current device.
inline const char* limits(Limits& found) {
  int device, shared;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error_text(error);
  found.shared_bytes = shared;
  return capability(device, found.capability);
}

// How many blocks of a kernel can run at once on the current device.
template <class... Parameters>
const char* resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes, int& blocks) {
  int device, multiprocessors, each = 0;
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  blocks = error == cudaSuccess ? each * multiprocessors : 0;
  return error_text(error);
}

// Starts the kernel on the stream; does not wait for it.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& launch, Arguments... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(launch.shared_bytes));
  constexpr int kPortableCluster = 8;  // above, a kernel must say that it will do with fewer kinds of GPU
  if (error == cudaSuccess && launch.cluster > kPortableCluster)
    error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error_text(error);
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (launch.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = launch.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(launch.blocks);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return error_text(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// Sets every byte, on the stream.
inline const char* fill(void* memory, uint8_t byte, int64_t bytes, void* stream) {
  return error_text(cudaMemsetAsync(memory, byte, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace fastrnn::cuda

#endif
