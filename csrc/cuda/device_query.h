#pragma once

namespace fastrnn {

// Number of CUDA devices that the kernels in this binary can run on; 0 without a driver or a device. Never throws.
// Initialises the CUDA driver, after which a fork must not use CUDA: ask when CUDA is wanted, not at import.
int cuda_device_count();

// "ok", or why cuda_device_count() is 0, in the CUDA runtime's own words where they are the reason. Never null.
const char* cuda_status();

// The type of the device, in torch's words, whose memory the kernels work on: "cuda"; "cpu" where they are emulated.
const char* cuda_device_type();

}  // namespace fastrnn
