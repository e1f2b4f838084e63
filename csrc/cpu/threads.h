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

// All slots of a team wait for each other; a thread that stands for several slots arrives with that weight.
class Barrier {
 public:
  explicit Barrier(int64_t slots) : slots_(slots) {}
  void wait(int64_t weight);

 private:
  const int64_t slots_;
  alignas(64) int64_t arrived_ = 0;
  alignas(64) int64_t epoch_ = 0;
};

// 64-byte aligned memory without constructors; null when there is none left.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  float* data_;
};

}  // namespace fastrnn::cpu
