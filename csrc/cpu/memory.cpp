#include "cpu/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace fastrnn::cpu {

namespace {

struct Pool {
  std::mutex mutex;
  std::multimap<int64_t, void*> free;  // by size
  int64_t bytes = 0;
};

// Never destroyed: tensors that hold blocks may outlive every other static object.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

Scratch::Scratch(int64_t floats) : bytes_((floats * 4 + 127) / 64 * 64) {
  {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    const auto found = p.free.lower_bound(bytes_);
    if (found != p.free.end() && found->first <= 2 * bytes_ + 4096) {
      bytes_ = found->first;
      data_ = static_cast<float*>(found->second);
      p.bytes -= bytes_;
      p.free.erase(found);
      return;
    }
  }
  constexpr int64_t kHugePage = 2 << 20;
  const bool huge = bytes_ >= 2 * kHugePage;
  if (huge) bytes_ = (bytes_ + kHugePage - 1) / kHugePage * kHugePage;
  data_ = static_cast<float*>(std::aligned_alloc(huge ? kHugePage : 64, bytes_));
  if (data_ == nullptr) throw std::bad_alloc();
  if (huge) madvise(data_, bytes_, MADV_HUGEPAGE);
}

Scratch::~Scratch() {
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + bytes_ <= kPoolBytes) {
      p.free.emplace(bytes_, data_);
      p.bytes += bytes_;
      return;
    }
  }
  std::free(data_);
}

}  // namespace fastrnn::cpu
