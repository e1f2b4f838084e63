#include "cpu/threads.h"

#include <sched.h>
#include <time.h>

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

Barrier::Barrier(int64_t slots) : slots_(slots) {
  for (int64_t i = 0; i < slots; ++i) lines_[i].epoch = 0;
}

void Barrier::wait(int64_t begin, int64_t end) {
  const int64_t epoch = lines_[begin].epoch + 1;
  for (int64_t i = begin; i < end; ++i) __atomic_store_n(&lines_[i].epoch, epoch, __ATOMIC_RELEASE);
  // In the first wait the other thread may still have to wake up, on this very core: yield soon. Later a core that is
  // shared with other programs must not be burnt either (pure spinning: 5 to 16 times slower there).
  int spins = epoch == 1 ? 200 : 4000;
  for (int64_t i = 0; i < slots_; ++i) {
    while (__atomic_load_n(&lines_[i].epoch, __ATOMIC_ACQUIRE) < epoch) {
      if (spins > 0) {
        --spins;
        pause();
      } else {
        sched_yield();
      }
    }
  }
}

}  // namespace fastrnn::cpu
