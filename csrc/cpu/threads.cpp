#include "cpu/threads.h"

#include <sched.h>
#include <time.h>

#include <cstdlib>
#include <new>

namespace fastrnn::cpu {

namespace {

ParallelFor parallel_for = nullptr;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

void set_parallel_for(ParallelFor function) { parallel_for = function; }

void run_team(int64_t slots, void (*body)(int64_t, int64_t, void*), void* context) {
  if (slots <= 1 || parallel_for == nullptr) {
    body(0, slots, context);
  } else {
    parallel_for(0, slots, 1, body, context);
  }
}

double now_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec + now.tv_nsec * 1e-9;
}

void Barrier::wait(int64_t weight) {
  const int64_t epoch = __atomic_load_n(&epoch_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, weight, __ATOMIC_ACQ_REL) == slots_) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&epoch_, epoch + 1, __ATOMIC_RELEASE);
    return;
  }
  // In the first wait the other thread may still have to wake up, on this very core: yield soon. Later a core that is
  // shared with other programs must not be burnt either (pure spinning: 5 to 16 times slower there).
  int spins = epoch == 0 ? 200 : 4000;
  while (__atomic_load_n(&epoch_, __ATOMIC_ACQUIRE) == epoch) {
    if (spins > 0) {
      --spins;
      pause();
    } else {
      sched_yield();
    }
  }
}

Scratch::Scratch(int64_t floats) {
  data_ = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 127) / 64 * 64));
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace fastrnn::cpu
