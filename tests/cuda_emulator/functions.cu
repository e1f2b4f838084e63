// What the functions of device.h compute, for test_functions.py to look at.
#include "cuda/device.h"
#include "cuda/launch.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace fastrnn::cuda {
namespace {

// words: [blocks * 32 lanes][6], a0 to a3, b0, b1; d: [blocks * 32 lanes][4].
template <class T>
FASTRNN_KERNEL void multiply_add_kernel(const uint32_t* words, float* d) {
  const int lane = blockIdx.x * kWarpSize + threadIdx.x;
  const uint32_t* w = words + lane * 6;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  multiply_add<T>(sums, w[0], w[1], w[2], w[3], w[4], w[5]);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

// out: [threads][5]. Two warps, so that one's lanes are not the threads' numbers.
FASTRNN_KERNEL void lanes_kernel(const uint32_t* in, int lane_mask, int lane, uint32_t* out) {
  const uint32_t own = in[threadIdx.x];
  uint32_t* result = out + threadIdx.x * 5;
  result[0] = shuffle_xor(own, lane_mask);
  result[1] = float_bits(shuffle_xor(bits_float(own), lane_mask));
  result[2] = float_bits(shuffle(bits_float(own), lane));
  result[3] = float_bits(shuffle(bits_float(own), static_cast<int>(threadIdx.x + 1) % kWarpSize));
  result[4] = ballot(own % 2 == 1);
}

FASTRNN_KERNEL void floats_kernel(const float* x, int64_t count, uint16_t* float16, uint16_t* bfloat16, uint32_t* tf32,
                                  float* functions) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    float16[i] = from_float<Float16>(x[i]).bits;
    bfloat16[i] = from_float<BFloat16>(x[i]).bits;
    tf32[i] = round_to_tf32(x[i]);
    functions[4 * i] = exponential(x[i]);
    functions[4 * i + 1] = hyperbolic_tangent(x[i]);
    functions[4 * i + 2] = reciprocal(x[i]);
    functions[4 * i + 3] = reciprocal_sqrt(x[i]);
  }
}

// All 65536 values of both 16-bit types.
FASTRNN_KERNEL void widen_kernel(float* float16, float* bfloat16) {
  for (uint32_t bits = blockIdx.x * blockDim.x + threadIdx.x; bits < 65536; bits += gridDim.x * blockDim.x) {
    float16[bits] = to_float(Float16{static_cast<uint16_t>(bits)});
    bfloat16[bits] = to_float(BFloat16{static_cast<uint16_t>(bits)});
  }
}

// In every block: its number and size, those of the grid, and whether threads count from 0 on.
FASTRNN_KERNEL void indices_kernel(uint32_t* out) {
  uint32_t* result = out + (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  result[0] = blockIdx.x;
  result[1] = threadIdx.x;
  result[2] = gridDim.x;
  result[3] = blockDim.x;
}

FASTRNN_KERNEL void empty_kernel() {}

}  // namespace

EXPORTED const char* run_multiply_add(const char* type, int blocks, const uint32_t* words, float* d) {
  const auto kernel = type[0] == 'h'   ? multiply_add_kernel<Float16>
                      : type[0] == 'b' ? multiply_add_kernel<BFloat16>
                                       : multiply_add_kernel<float>;
  return launch(kernel, {blocks, kWarpSize, 0, false, 1, nullptr}, words, d);
}

EXPORTED const char* run_lanes(const uint32_t* in, int lane_mask, int lane, uint32_t* out) {
  return launch(lanes_kernel, {1, 64, 0, false, 1, nullptr}, in, lane_mask, lane, out);
}

EXPORTED const char* run_floats(const float* x, int64_t count, uint16_t* float16, uint16_t* bfloat16, uint32_t* tf32,
                                float* functions) {
  return launch(floats_kernel, {8, 64, 0, false, 1, nullptr}, x, count, float16, bfloat16, tf32, functions);
}

EXPORTED const char* run_widen(float* float16, float* bfloat16) {
  return launch(widen_kernel, {8, 64, 0, false, 1, nullptr}, float16, bfloat16);
}

EXPORTED const char* run_indices(int blocks, int threads, uint32_t* out) {
  return launch(indices_kernel, {blocks, threads, 0, false, 1, nullptr}, out);
}

EXPORTED const char* run_empty(int blocks, int threads, int64_t shared_bytes, bool cooperative, int cluster) {
  return launch(empty_kernel, {blocks, threads, shared_bytes, cooperative, cluster, nullptr});
}

EXPORTED const char* query_resident_blocks(int threads, int64_t shared_bytes, int* blocks) {
  return resident_blocks(indices_kernel, threads, shared_bytes, *blocks);
}

EXPORTED const char* query_limits(int64_t* found) {
  Limits limits;
  const char* error = fastrnn::cuda::limits(limits);
  if (!error) found[0] = limits.multiprocessors, found[1] = limits.shared_bytes, found[2] = limits.capability;
  return error;
}

EXPORTED const char* run_fill(void* memory, uint8_t byte, int64_t bytes) { return fill(memory, byte, bytes, nullptr); }

}  // namespace fastrnn::cuda
