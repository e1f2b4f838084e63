#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fastrnn::cpu {

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> all;
#ifdef FASTRNN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    all.push_back(&kernels_avx512());
  if (avx2) all.push_back(&kernels_avx2());
#endif
  all.push_back(&kernels_portable());
  return all;
}

const Kernels*& current() {
  static const Kernels* chosen = [] {
    const char* cap = std::getenv("FASTRNN_CPU_ISA");
    for (const Kernels* kernels : available())
      if (cap == nullptr || *cap == '\0' || std::string(cap) == kernels->isa) return kernels;
    return available().front();
  }();
  return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.push_back(kernels->isa);
  return names;
}

const Kernels& kernels() { return *current(); }

const Kernels* kernels_bf16() {
#ifdef FASTRNN_X86
  if (&kernels() == &kernels_avx512() && __builtin_cpu_supports("avx512bf16")) return &kernels_avx512bf16();
#endif
  return nullptr;
}

const AttentionKernels& attention_kernels() {
#ifdef FASTRNN_X86
  if (&kernels() == &kernels_avx512()) return attention_avx512();
  if (&kernels() == &kernels_avx2()) return attention_avx2();
#endif
  return attention_portable();
}

TopKKernel top_k_kernel() {
#ifdef FASTRNN_X86
  if (&kernels() == &kernels_avx512()) return top_k_avx512;
  if (&kernels() == &kernels_avx2()) return top_k_avx2;
#endif
  return top_k_portable;
}

void use_isa(const std::string& name) {
  for (const Kernels* kernels : available())
    if (name == kernels->isa) {
      current() = kernels;
      return;
    }
  throw std::invalid_argument("instruction set must be one that this machine can run, got '" + name + "'");
}

}  // namespace fastrnn::cpu
