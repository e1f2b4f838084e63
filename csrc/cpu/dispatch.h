// Which instruction set runs. Chosen once, by what the CPU has and at most what FASTRNN_CPU_ISA allows.
#pragma once

#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/recurrence.h"
#include "cpu/top_k.h"

namespace fastrnn::cpu {

// Names of the instruction sets that this machine can run, best first.
std::vector<std::string> available_isas();

// The kernels in use.
const Kernels& kernels();

// Those for data in bfloat16, or null where the instruction set in use has no product of them.
const Kernels* kernels_bf16();

const AttentionKernels& attention_kernels();

TopKKernel top_k_kernel();

// Throws std::invalid_argument for a name that is not available.
void use_isa(const std::string& name);

}  // namespace fastrnn::cpu
