// Teams of threads from torch's own pool, and the barrier between the steps of a recurrence.
#pragma once

#include <stdint.h>

namespace fastrnn::cpu {

// torch_parallel_for of libtorch_cpu (C ABI since torch 2.10).
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);

// Null (the state at start) runs everything on the calling thread.
void set_parallel_for(ParallelFor parallel_for);

// Calls body(begin, end, context) so that the ranges cover [0, slots). The ranges run at the same time, on different
// threads; how many there are is the pool's choice (a nested call gets one), so work is dealt out by slots.
void run_team(int64_t slots, void (*body)(int64_t, int64_t, void*), void* context);

double now_seconds();

constexpr int64_t kMaxSlots = 128;

// All slots of a team wait for each other. Each has a line of its own to raise and reads the others': one transfer
// between cores, where a shared counter takes two.
class Barrier {
 public:
  explicit Barrier(int64_t slots);
  // For a thread that stands for the slots [begin, end).
  void wait(int64_t begin, int64_t end);

 private:
  struct alignas(64) Line {
    int64_t epoch;
  };
  const int64_t slots_;
  Line lines_[kMaxSlots];
};

}  // namespace fastrnn::cpu
