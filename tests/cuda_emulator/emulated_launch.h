// csrc/cuda/launch.h for the emulator: launches run at once on the calling thread, streams are ignored.
#pragma once

#include <stdint.h>
#include <string.h>

#include <tuple>
#include <type_traits>

#include "emulator.h"

#define FASTRNN_KERNEL
#define __launch_bounds__(...)
#define __grid_constant__

namespace fastrnn::cuda {

struct Launch {
  int blocks, threads;
  int64_t shared_bytes;
  bool cooperative;
  int cluster;
  void* stream;
};

struct Limits {
  int multiprocessors;
  int64_t shared_bytes;
  int capability;
};

inline const char* device_count(int& count) {
  count = 1;
  return nullptr;
}

inline const char* limits(Limits& found) {
  emulator::Settings settings;
  const char* error = emulator::read_settings(settings);
  if (!error) found = {settings.multiprocessors, settings.shared_bytes, settings.capability};
  return error;
}

inline const char* capability(int, int& found) {
  Limits all;
  const char* error = limits(all);
  if (!error) found = all.capability;
  return error;
}

template <class... Parameters>
const char* resident_blocks(void (*)(Parameters...), int threads, int64_t shared_bytes, int& blocks) {
  emulator::Settings settings;
  blocks = 0;
  if (const char* error = emulator::read_settings(settings)) return error;
  if (shared_bytes < 0 || shared_bytes > settings.shared_bytes) return "invalid argument";
  blocks = settings.multiprocessors * emulator::blocks_per_multiprocessor(settings, threads, shared_bytes);
  return nullptr;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Launch& launch, Arguments... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "parameters are copied to the device byte by byte");
  const std::tuple<void (*)(Parameters...), std::tuple<Parameters...>> call{
      kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  return emulator::run(
      launch,
      [](const void* arguments) {
        const auto& [kernel, parameters] = *static_cast<decltype(call)*>(arguments);
        std::apply(kernel, parameters);
      },
      &call);
}

inline const char* fill(void* memory, uint8_t byte, int64_t bytes, void*) {
  memset(memory, byte, bytes);
  return nullptr;
}

}  // namespace fastrnn::cuda
