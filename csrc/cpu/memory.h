// Memory for what a call needs besides its results. Fresh pages cost about 0.25 us per 4 KB, which was 9 % of a
// training step; so blocks go back to a pool, which keeps at most kPoolBytes of them.
#pragma once

#include <stdint.h>

namespace fastrnn::cpu {

constexpr int64_t kPoolBytes = int64_t{256} << 20;

// 64-byte aligned, uninitialised. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  int64_t bytes_;
  float* data_;
};

}  // namespace fastrnn::cpu
