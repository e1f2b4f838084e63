#include "cuda/recurrence.h"

namespace fastrnn::cuda {

namespace {
constexpr const char* kReason = "built without CUDA";
}

const char* recurrence_forward(const Forward*, int, const Tile&, void*) { return kReason; }
const char* recurrence_backward(const Backward*, int, const Tile&, void*) { return kReason; }
const char* device_limits(DeviceLimits&) { return kReason; }
const char* recurrence_fit(Cell, Math, int64_t, const Tile&, bool, bool, Fit&) { return kReason; }

}  // namespace fastrnn::cuda
