// csrc/cuda/device.h for the emulator: a twin of each of its functions. What each does is said there.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "emulator.h"

#define FASTRNN_DEVICE inline
// The line of the kernel that calls.
#define FASTRNN_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace fastrnn::cuda {

constexpr int kWarpSize = 32;

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};

FASTRNN_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
FASTRNN_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTRNN_DEVICE float to_float(float value) { return value; }
FASTRNN_DEVICE float to_float(Float16 value) {
  const uint32_t magnitude = value.bits & 0x7FFF, sign = (value.bits & 0x8000u) << 16;
  if (magnitude >= 0x7C00) return bits_float(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));  // exponents are biased by 127, not 15
}
FASTRNN_DEVICE float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

template <class T>
FASTRNN_DEVICE T from_float(float value);
template <>
FASTRNN_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FASTRNN_DEVICE Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7FFFFFFF;
  const uint16_t sign = (bits >> 16) & 0x8000;
  if (magnitude > 0x7F800000) return {0x7FFF};
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and above
  if (magnitude < 0x38800000)  // below 2^-14: a multiple of 2^-24, the last bit of 0.5
    return {static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000))};
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13)};
}
template <>
FASTRNN_DEVICE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

FASTRNN_DEVICE float exponential(float x) { return expf(x); }
FASTRNN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
FASTRNN_DEVICE float reciprocal(float x) { return 1.0f / x; }
FASTRNN_DEVICE float reciprocal_sqrt(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }

FASTRNN_DEVICE char* shared_memory() { return emulator::shared_memory(); }

FASTRNN_DEVICE void sync_block(FASTRNN_SITE) { emulator::sync_block(site); }
FASTRNN_DEVICE void sync_warp(FASTRNN_SITE) { emulator::sync_warp(site); }

FASTRNN_DEVICE uint32_t shuffle_xor(uint32_t value, int lane_mask, FASTRNN_SITE) {
  return emulator::exchange("shuffle_xor", value, static_cast<int>(threadIdx.x % 32) ^ lane_mask, site);
}
FASTRNN_DEVICE float shuffle_xor(float value, int lane_mask, FASTRNN_SITE) {
  return bits_float(shuffle_xor(float_bits(value), lane_mask, site));
}
FASTRNN_DEVICE float shuffle(float value, int lane, FASTRNN_SITE) {
  return bits_float(emulator::exchange("shuffle", float_bits(value), lane, site));
}
FASTRNN_DEVICE uint32_t ballot(bool predicate, FASTRNN_SITE) { return emulator::ballot(predicate, site); }

constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

FASTRNN_DEVICE bool is_written(Vec4 v) {
  return v.x != kUnwritten && v.y != kUnwritten && v.z != kUnwritten && v.w != kUnwritten;
}

namespace emulator {

// The GPU faults on an address that is not a multiple of the access, and on a wrong kind of memory.
inline void require_global(const void* address, int bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail(site, "misaligned address: %s of %p", what, address);
  if (in_any_shared_memory(address)) fail(site, "%s of %p, which is shared memory, not global", what, address);
}
inline void require_shared(const void* address, int bytes, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail(site, "misaligned address: %s of %p", what, address);
  if (!in_shared_memory(address, bytes)) fail(site, "%s of %p, outside the block's shared memory", what, address);
}

inline uint32_t load_word(const uint32_t* address) {
  before_load(address);
  return __atomic_load_n(address, __ATOMIC_RELAXED);
}
inline Vec4 load_words(const void* address) {
  const uint32_t* words = static_cast<const uint32_t*>(address);
  return {load_word(words), load_word(words + 1), load_word(words + 2), load_word(words + 3)};
}
inline void store_word(uint32_t* address, uint32_t word) {
  if (keeps_stores_back()) {
    static_cast<void>(
        *static_cast<volatile uint32_t*>(address));  // a sanitizer names the kernel's line, not a later one
    keep_back(address, word);
  } else {
    __atomic_store_n(address, word, __ATOMIC_RELAXED);
    after_store(address);
  }
}

}  // namespace emulator

FASTRNN_DEVICE Vec4 load_exchanged(const void* address, FASTRNN_SITE) {
  emulator::require_global(address, 16, "load_exchanged", site);
  const Vec4 v = emulator::load_words(address);
  emulator::after_load(is_written(v), site);
  return v;
}

FASTRNN_DEVICE Vec4 wait_exchanged(const void* address, FASTRNN_SITE) {
  emulator::require_global(address, 16, "wait_exchanged", site);
  Vec4 v = emulator::load_words(address);
  while (!is_written(v)) {
    emulator::wait_written(address, site);
    v = emulator::load_words(address);
  }
  return v;
}

FASTRNN_DEVICE void store_exchanged(void* address, uint32_t word, FASTRNN_SITE) {
  emulator::require_global(address, 4, "store_exchanged", site);
  emulator::store_word(static_cast<uint32_t*>(address), word);
}

FASTRNN_DEVICE void store_exchanged(void* address, Vec4 v, FASTRNN_SITE) {
  emulator::require_global(address, 16, "store_exchanged", site);
  uint32_t* words = static_cast<uint32_t*>(address);
  emulator::store_word(words, v.x);
  emulator::store_word(words + 1, v.y);
  emulator::store_word(words + 2, v.z);
  emulator::store_word(words + 3, v.w);
}

FASTRNN_DEVICE bool is_tagged(Vec4 v, uint32_t epoch) { return v.y == epoch && v.w == epoch; }

FASTRNN_DEVICE Vec4 load_tagged(const void* address, FASTRNN_SITE) {
  emulator::require_global(address, 16, "load_tagged", site);
  const uint64_t* pairs = static_cast<const uint64_t*>(address);
  uint64_t v[2];
  for (int i = 0; i < 2; ++i) {
    emulator::before_load(pairs + i);
    v[i] = __atomic_load_n(pairs + i, __ATOMIC_RELAXED);
  }
  return {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[0] >> 32), static_cast<uint32_t>(v[1]),
          static_cast<uint32_t>(v[1] >> 32)};
}

FASTRNN_DEVICE Vec4 wait_tagged(const void* address, uint32_t epoch, FASTRNN_SITE) {
  const uint32_t* words = static_cast<const uint32_t*>(address);
  Vec4 v = load_tagged(address, site);
  while (!is_tagged(v, epoch)) {
    emulator::wait_at_least(words + (v.y == epoch ? 3 : 1), epoch, site);
    v = load_tagged(address, site);
  }
  return v;
}

FASTRNN_DEVICE void store_tagged(void* address, Vec4 v, FASTRNN_SITE) {
  emulator::require_global(address, 16, "store_tagged", site);
  uint64_t* pairs = static_cast<uint64_t*>(address);
  const uint64_t words[] = {static_cast<uint64_t>(v.y) << 32 | v.x, static_cast<uint64_t>(v.w) << 32 | v.z};
  for (int i = 0; i < 2; ++i) {
    __atomic_store_n(pairs + i, words[i], __ATOMIC_RELAXED);
    emulator::after_store(reinterpret_cast<uint32_t*>(pairs + i) + 1);
  }
}

FASTRNN_DEVICE void store_release(uint32_t* flag, uint32_t value, FASTRNN_SITE) {
  emulator::require_global(flag, 4, "store_release", site);
  emulator::release_stores();
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  emulator::after_store(flag);
}
FASTRNN_DEVICE uint32_t add_release(uint32_t* counter, uint32_t value, FASTRNN_SITE) {
  emulator::require_global(counter, 4, "add_release", site);
  emulator::release_stores();
  const uint32_t before = __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
  emulator::after_store(counter);
  return before;
}
FASTRNN_DEVICE void wait_acquire(const uint32_t* flag, uint32_t value, FASTRNN_SITE) {
  emulator::require_global(flag, 4, "wait_acquire", site);
  emulator::before_load(flag);
  while (__atomic_load_n(flag, __ATOMIC_ACQUIRE) < value) emulator::wait_at_least(flag, value, site);
}

FASTRNN_DEVICE void copy_async(void* shared, const void* global, FASTRNN_SITE) {
  emulator::require_shared(shared, 16, "copy_async", site);
  emulator::require_global(global, 16, "copy_async", site);
  if (emulator::copies_are_late())
    emulator::add_copy({shared, global});
  else
    *static_cast<Vec4*>(shared) = *static_cast<const Vec4*>(global);
}
FASTRNN_DEVICE void copy_async_commit() { emulator::commit_copies(); }
template <int pending>
FASTRNN_DEVICE void copy_async_wait() {
  emulator::Copy copy;
  while (emulator::next_copy(pending, copy)) *static_cast<Vec4*>(copy.shared) = *static_cast<const Vec4*>(copy.global);
}

template <class T>
FASTRNN_DEVICE void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1, FASTRNN_SITE);
#define FASTRNN_MULTIPLY_ADD(T, element)                                                                              \
  template <>                                                                                                         \
  FASTRNN_DEVICE void multiply_add<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                                      uint32_t b1, emulator::Site site) {                                             \
    emulator::multiply_add(emulator::Element::element, d, {a0, a1, a2, a3, b0, b1}, site);                            \
  }
FASTRNN_MULTIPLY_ADD(Float16, float16)
FASTRNN_MULTIPLY_ADD(BFloat16, bfloat16)
FASTRNN_MULTIPLY_ADD(float, tf32)
#undef FASTRNN_MULTIPLY_ADD

FASTRNN_DEVICE uint32_t round_to_tf32(float value) {
  if (value != value) return 0x7FFFFFFF;
  return (float_bits(value) + 0x1000) & ~0x1FFFu;
}

FASTRNN_DEVICE uint32_t cluster_rank() { return emulator::cluster_rank(); }
FASTRNN_DEVICE void sync_cluster(FASTRNN_SITE) { emulator::sync_cluster(site); }
FASTRNN_DEVICE void store_cluster(void* shared, uint32_t rank, uint32_t word, FASTRNN_SITE) {
  emulator::require_shared(shared, 4, "store_cluster", site);
  *reinterpret_cast<uint32_t*>(emulator::shared_memory_of(shared, rank, site)) = word;
}

}  // namespace fastrnn::cuda

#undef FASTRNN_SITE
