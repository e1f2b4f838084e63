// The hardware instructions that kernels use, one small function each. Kernels call nothing else of CUDA, so that
// tests/cuda_emulator can run the same sources on a CPU with a twin of each of these.
#pragma once

#ifdef FASTRNN_CUDA_EMULATED
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define FASTRNN_DEVICE __device__ __forceinline__

namespace fastrnn::cuda {

constexpr int kWarpSize = 32;

// 16-bit elements are opaque: bits, and the conversions below.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};

FASTRNN_DEVICE float to_float(float value) { return value; }
FASTRNN_DEVICE float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
FASTRNN_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// To the nearest, ties to even; NaN becomes the canonical 0x7FFF.
template <class T>
FASTRNN_DEVICE T from_float(float value);
template <>
FASTRNN_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FASTRNN_DEVICE Float16 from_float<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
FASTRNN_DEVICE BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

FASTRNN_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
FASTRNN_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// e^x to 2 + 1.2 |x| ulp, tanh and 1 / sqrt(x) to 2 ulp, 1 / x to 0.5.
FASTRNN_DEVICE float exponential(float x) { return __expf(x); }
FASTRNN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
FASTRNN_DEVICE float reciprocal(float x) { return __frcp_rn(x); }
FASTRNN_DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }

// The block's dynamic shared memory, 16-byte aligned.
FASTRNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

FASTRNN_DEVICE void sync_block() { __syncthreads(); }
FASTRNN_DEVICE void sync_warp() { __syncwarp(); }

// All 32 lanes take part.
FASTRNN_DEVICE float shuffle_xor(float value, int lane_mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask); }
FASTRNN_DEVICE uint32_t shuffle_xor(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}
FASTRNN_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
FASTRNN_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }

// Words of global memory that blocks of one launch hand to each other: relaxed, at device scope, past L1. Each 32-bit
// word arrives as a whole, in no order with others. Memory is filled with kUnwritten beforehand, and nobody hands over
// that word, so that a word is its own flag.
constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

FASTRNN_DEVICE bool is_written(Vec4 v) {
  return v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten && v.w != kUnwritten;
}

FASTRNN_DEVICE Vec4 load_exchanged(const void* address) {
  Vec4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// The same, again and again until all four words are written.
FASTRNN_DEVICE Vec4 wait_exchanged(const void* address) {
  Vec4 v = load_exchanged(address);
  while (!is_written(v)) v = load_exchanged(address);
  return v;
}

FASTRNN_DEVICE void store_exchanged(void* address, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(word) : "memory");
}

FASTRNN_DEVICE void store_exchanged(void* address, Vec4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Two pairs of a word and the epoch that it is of, (x, y) and (z, w). A pair arrives as a whole; otherwise as above.
FASTRNN_DEVICE bool is_tagged(Vec4 v, uint32_t epoch) { return v.y == epoch && v.w == epoch; }

FASTRNN_DEVICE Vec4 load_tagged(const void* address) {
  uint64_t first, second;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(second),
          static_cast<uint32_t>(second >> 32)};
}

// The same, again and again until both words are of the epoch.
FASTRNN_DEVICE Vec4 wait_tagged(const void* address, uint32_t epoch) {
  Vec4 v = load_tagged(address);
  while (!is_tagged(v, epoch)) v = load_tagged(address);
  return v;
}

FASTRNN_DEVICE void store_tagged(void* address, Vec4 v) {
  const uint64_t first = static_cast<uint64_t>(v.y) << 32 | v.x, second = static_cast<uint64_t>(v.w) << 32 | v.z;
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}

// A flag that orders what was written before it: release after it, acquire until it is at least `value`.
FASTRNN_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
FASTRNN_DEVICE uint32_t add_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
FASTRNN_DEVICE void wait_acquire(const uint32_t* flag, uint32_t value) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
  } while (found < value);
}

// 16 bytes from global to shared memory; copies are committed in groups and waited for until `pending` are left.
FASTRNN_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
FASTRNN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
FASTRNN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// d += a b by the tensor cores, a [16, K] and b [K, 8], K = 16 elements of T, or 8 floats rounded to tf32 (T float).
// Lane 4 g + q holds rows g and g + 8 of a, column g of b, and of d (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1).
// Words of a: (g, first half of K), (g+8, first), (g, second), (g+8, second); of b: first half, second; in each half
// the lane has the elements 2q and 2q+1, or the float q.
template <class T>
FASTRNN_DEVICE void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1);
#define FASTRNN_MULTIPLY_ADD(T, shape)                                                                                \
  template <>                                                                                                         \
  FASTRNN_DEVICE void multiply_add<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                      uint32_t b1) {                                                                  \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                             \
  }
FASTRNN_MULTIPLY_ADD(Float16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTRNN_MULTIPLY_ADD(BFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTRNN_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTRNN_MULTIPLY_ADD

// The float whose low 13 bits are 0 that is nearest, ties away from 0.
FASTRNN_DEVICE uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// Blocks of one cluster, sm_90 and later; below, a cluster is one block.
FASTRNN_DEVICE uint32_t cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
FASTRNN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// Writes a word into the shared memory of another block of the cluster, at the address that it has in this block.
FASTRNN_DEVICE void store_cluster(void* shared, uint32_t rank, uint32_t word) {
#if __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  uint32_t other;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(own), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(other), "r"(word) : "memory");
#else
  *static_cast<uint32_t*>(shared) = word;
#endif
}

}  // namespace fastrnn::cuda

#endif
