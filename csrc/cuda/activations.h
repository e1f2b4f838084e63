// The cells' mathematics of cells.h on floats.
#pragma once

#include "cuda/device.h"

namespace fastrnn {
namespace {

FASTRNN_DEVICE float sigmoid(float x) { return cuda::reciprocal(1.0f + cuda::exponential(-x)); }
FASTRNN_DEVICE float tanh(float x) { return cuda::hyperbolic_tangent(x); }

}  // namespace
}  // namespace fastrnn

#include "cells.h"
#include "random.h"
