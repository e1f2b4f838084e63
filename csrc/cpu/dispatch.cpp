#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fastrnn::cpu {

namespace {

// The kernels of all operators for one instruction set.
struct Isa {
  const Kernels* recurrence;
  const AttentionKernels* attention;
  TopKKernel top_k;
};

std::vector<Isa> available() {
  std::vector<Isa> all;
#ifdef FASTRNN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    all.push_back({&kernels_avx512(), &attention_avx512(), top_k_avx512});
  if (avx2) all.push_back({&kernels_avx2(), &attention_avx2(), top_k_avx2});
#endif
  all.push_back({&kernels_portable(), &attention_portable(), top_k_portable});
  return all;
}

Isa& current() {
  static Isa chosen = [] {
    const char* cap = std::getenv("FASTRNN_CPU_ISA");
    for (const Isa& isa : available())
      if (cap == nullptr || *cap == '\0' || std::string(cap) == isa.recurrence->isa) return isa;
    return available().front();
  }();
  return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : available()) names.push_back(isa.recurrence->isa);
  return names;
}

const Kernels& kernels() { return *current().recurrence; }

const Kernels* kernels_bf16() {
#ifdef FASTRNN_X86
  if (&kernels() == &kernels_avx512() && __builtin_cpu_supports("avx512bf16")) return &kernels_avx512bf16();
#endif
  return nullptr;
}

const AttentionKernels& attention_kernels() { return *current().attention; }

TopKKernel top_k_kernel() { return current().top_k; }

void use_isa(const std::string& name) {
  for (const Isa& isa : available())
    if (name == isa.recurrence->isa) {
      current() = isa;
      return;
    }
  throw std::invalid_argument("instruction set must be one that this machine can run, got '" + name + "'");
}

}  // namespace fastrnn::cpu
