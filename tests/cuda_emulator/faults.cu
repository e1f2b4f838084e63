// Small kernels, each with faults that a launch may ask for by name: `faults CASE [FAULT]`. Ends with 0 where the
// result is right, 1 where it is wrong and 2 where the launch failed, whose error it prints.
#include <stdio.h>
#include <string.h>

#include <vector>

#include "cuda/device.h"
#include "cuda/launch.h"

namespace fastrnn::cuda {
namespace {

#define FAULTS                                                                                                     \
  none, missing_barrier, missing_reuse_barrier, shared_overrun, global_overrun, partial_warp, missing_sync_warp,   \
      early_flag, missing_sync_after_wait, silent_block, too_many_blocks, not_cooperative, unchecked_load,         \
      relaxed_flag, plain_store, endless_loads, missing_copy_wait, missing_commit, missing_sync_after_copy,        \
      misaligned_copy, copy_beyond_shared, missing_sync_cluster, misaligned_vector, diverged_warp, diverged_block, \
      mixed_operations, exited_thread, exiting_thread
#define NAMES_OF(...) #__VA_ARGS__
#define NAMES(...) NAMES_OF(__VA_ARGS__)

enum Fault { FAULTS };

constexpr int kBlocks = 4, kThreads = 64, kSteps = 6;
constexpr int kUnits = kBlocks * kThreads;

FASTRNN_DEVICE int unit() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Sums over the block, in every step: out[step][unit] = sum over the block of x + step.
FASTRNN_KERNEL void __launch_bounds__(kThreads) block_sums(const float* x, float* out, Fault fault) {
  float* const parts = reinterpret_cast<float*>(shared_memory());
  const int warps = blockDim.x / kWarpSize;
  for (int step = 0; step < kSteps; ++step) {
    float value = x[unit()] + step;
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = value;
    if (fault == shared_overrun && threadIdx.x == 7) parts[warps + 1] = value;  // line of shared_overrun
    if (fault != missing_barrier) sync_block();
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += parts[warp];
    out[step * kUnits + unit()] = sum;
    if (fault == global_overrun && step == kSteps - 1) out[kSteps * kUnits + unit()] = sum;  // line of global_overrun
    if (fault != missing_reuse_barrier) sync_block();
  }
}

// out[unit] = x[unit].
FASTRNN_KERNEL void large_frame(const float* x, float* out) {
  volatile float local[50 << 10];
  local[threadIdx.x] = x[unit()];
  out[unit()] = local[threadIdx.x];
}

// out[unit] = x of the lane opposite, through shared memory.
FASTRNN_KERNEL void opposite_lanes(const float* x, float* out, Fault fault) {
  float* const values = reinterpret_cast<float*>(shared_memory());
  values[threadIdx.x] = x[unit()];
  if (fault != missing_sync_warp) sync_warp();
  out[unit()] = values[threadIdx.x ^ (kWarpSize - 1)];
}

// rows[step + 1][unit] = rows[step][the same thread of the next block] + 1. flags[block] counts the rows that are
// there.
FASTRNN_KERNEL void relay(float* rows, uint32_t* flags, uint32_t* done, float* total, Fault fault) {
  const int next = (blockIdx.x + 1) % gridDim.x;
  for (int step = 0; step < kSteps; ++step) {
    if (threadIdx.x == 0) wait_acquire(&flags[next], step);
    if (fault != missing_sync_after_wait) sync_block();
    const float value = rows[step * kUnits + next * kThreads + threadIdx.x] + 1;
    if (fault == early_flag && threadIdx.x == 0) store_release(&flags[blockIdx.x], step + 1);
    rows[(step + 1) * kUnits + unit()] = value;
    if (fault == early_flag) continue;
    sync_block();
    if (fault == silent_block && blockIdx.x == 1) continue;
    if (threadIdx.x == 0) store_release(&flags[blockIdx.x], step + 1);
  }
  sync_block();
  if (threadIdx.x == 0) add_release(done, 1);
  if (unit() != 0) return;
  wait_acquire(done, gridDim.x);
  *total = 0;
  for (int i = 0; i < kUnits; ++i) *total += rows[kSteps * kUnits + i];
}

// words[step + 1][unit] = the sum of all words of the step, modulo 1000; a word is its own flag.
FASTRNN_KERNEL void exchange(uint32_t* words, uint32_t* flags, Fault fault) {
  for (int step = 0; step < kSteps; ++step) {
    uint32_t sum = 0;
    for (int i = 0; i < kUnits; i += 4) {
      const uint32_t* const four = words + step * kUnits + i;
      Vec4 v;
      if (fault == unchecked_load || fault == relaxed_flag) {
        if (fault == relaxed_flag) wait_exchanged(flags + (step * kUnits + i) * 4 + 12);
        v = load_exchanged(four);
      } else if (fault == endless_loads) {
        do v = load_exchanged(i == 4 ? words + kSteps * kUnits : four);
        while (!is_written(v));
      } else {
        v = wait_exchanged(four);
      }
      sum += v.x + v.y + v.z + v.w;
    }
    uint32_t* const own = words + (step + 1) * kUnits + unit();
    if (fault == plain_store)
      *own = sum % 1000;  // line of plain_store
    else
      store_exchanged(own, sum % 1000);
    // A flag that is no part of the data: nothing says that the word above is there first.
    if (fault == relaxed_flag) store_exchanged(flags + ((step + 1) * kUnits + unit()) * 4, Vec4{1, 1, 1, 1});
  }
}

// out[step][unit] = x[step][the thread opposite in the block], copied one step ahead into two buffers in turn.
FASTRNN_KERNEL void copies(const float* x, float* out, Fault fault) {
  float* const buffers = reinterpret_cast<float*>(shared_memory());
  const auto start_copy = [&](int step) {
    if (threadIdx.x < kThreads / 4) {
      const int beyond = fault == copy_beyond_shared && step == 1 ? kThreads : 0;
      float* const to = buffers + step % 2 * kThreads + beyond + threadIdx.x * 4 + (fault == misaligned_copy);
      copy_async(to, x + step * kUnits + blockIdx.x * kThreads + threadIdx.x * 4);
    }
    if (fault != missing_commit) copy_async_commit();
  };
  start_copy(0);
  for (int step = 0; step < kSteps; ++step) {
    if (step + 1 < kSteps) {
      start_copy(step + 1);
      if (fault != missing_copy_wait) copy_async_wait<1>();
    } else if (fault != missing_copy_wait) {
      copy_async_wait<0>();
    }
    if (fault != missing_sync_after_copy) sync_block();
    out[step * kUnits + unit()] = buffers[step % 2 * kThreads + kThreads - 1 - threadIdx.x];
    sync_block();
  }
}

// out[unit] = x of the same thread in the next block of the cluster of 2.
FASTRNN_KERNEL void cluster_neighbours(const float* x, float* out, Fault fault) {
  float* const received = reinterpret_cast<float*>(shared_memory());
  sync_cluster();
  store_cluster(&received[threadIdx.x], 1 - cluster_rank(), float_bits(x[unit()]));
  if (fault != missing_sync_cluster) sync_cluster();
  out[unit()] = received[threadIdx.x];
}

// out[unit] = x[unit], four at a time.
FASTRNN_KERNEL void vectors(const float* x, float* out, Fault fault) {
  if (threadIdx.x >= kThreads / 4) return;
  const int first = blockIdx.x * kThreads + threadIdx.x * 4;
  const int off = fault == misaligned_vector && unit() == 2;
  const Vec4 v = *reinterpret_cast<const Vec4*>(x + first + off);  // line of misaligned_vector
  *reinterpret_cast<Vec4*>(out + first) = v;
}

// out[unit] = x[unit], with threads that part.
FASTRNN_KERNEL void parting(const float* x, float* out, Fault fault) {
  const bool first = threadIdx.x % kWarpSize < 7;
  float value = x[unit()];
  if (fault == exited_thread && threadIdx.x == 5) return;
  if (fault == diverged_warp) {
    if (first)
      value = shuffle_xor(value, 0);
    else
      value = shuffle_xor(value, 0);
  }
  if (fault == mixed_operations) {
    if (first)
      sync_warp();
    else
      ballot(true);
  }
  if (fault == diverged_block) {
    if (threadIdx.x < kWarpSize)
      sync_block();
    else
      sync_block();
  } else {
    sync_block();
  }
  if (fault == exiting_thread && threadIdx.x == 5) return;
  if (fault == exiting_thread) sync_block();
  out[unit()] = value;
}

// Host side

const char* error;

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), Launch how, Arguments... arguments) {
  error = launch(kernel, how, arguments...);
}

std::vector<float> numbers(int count) {
  std::vector<float> x(count);
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(i * 7 % 100);
  return x;
}

bool run_block_sums(Fault fault) {
  const int threads = fault == partial_warp ? 48 : kThreads;
  const std::vector<float> x = numbers(kUnits);
  std::vector<float> out(kSteps * kUnits);
  run(block_sums, {kBlocks, threads, 2 * sizeof(float), false, 1, nullptr}, x.data(), out.data(), fault);
  bool right = true;
  for (int step = 0; step < kSteps; ++step)
    for (int i = 0; i < kUnits; ++i) {
      float sum = 0;
      for (int j = 0; j < kThreads; ++j) sum += x[i / kThreads * kThreads + j] + step;
      right &= out[step * kUnits + i] == sum;
    }
  return right;
}

bool run_opposite_lanes(Fault fault) {
  const std::vector<float> x = numbers(kUnits);
  std::vector<float> out(kUnits);
  run(opposite_lanes, {kBlocks, kThreads, kThreads * sizeof(float), false, 1, nullptr}, x.data(), out.data(), fault);
  bool right = true;
  for (int i = 0; i < kUnits; ++i) right &= out[i] == x[i ^ 31];
  return right;
}

bool run_relay(Fault fault) {
  // Of so much shared memory one block fits into a multiprocessor.
  const int64_t shared_bytes = fault == too_many_blocks || fault == not_cooperative ? 150000 : 0;
  std::vector<float> rows = numbers(kUnits);
  rows.resize((kSteps + 1) * kUnits, -1e9f);
  std::vector<uint32_t> flags(kBlocks);
  uint32_t done = 0;
  float total = 0, expected = 0;
  run(relay, {kBlocks, kThreads, shared_bytes, fault != not_cooperative, 1, nullptr}, rows.data(), flags.data(), &done,
      &total, fault);
  for (int i = 0; i < kUnits; ++i) expected += rows[i] + kSteps;
  bool right = total == expected;
  for (int step = 0; step < kSteps; ++step)
    for (int i = 0; i < kUnits; ++i)
      right &= rows[(step + 1) * kUnits + i] == rows[step * kUnits + (i + kThreads) % kUnits] + 1;
  return right;
}

bool run_exchange(Fault fault) {
  std::vector<uint32_t> memory((kSteps + 1) * kUnits + 4), flag_memory((kSteps + 1) * kUnits * 4 + 4);
  const auto aligned = [](std::vector<uint32_t>& v) {
    return reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(v.data()) + 15) / 16 * 16);
  };
  uint32_t *const words = aligned(memory), *const flags = aligned(flag_memory);
  error = fill(words, 0xFF, (kSteps + 1) * kUnits * 4, nullptr);
  error = fill(flags, 0xFF, (kSteps + 1) * kUnits * 16, nullptr);
  uint32_t sum = 0;
  for (int i = 0; i < kUnits; ++i) sum += words[i] = i * 7 % 100;
  for (int i = 0; i < kUnits * 4; ++i) flags[i] = 1;
  run(exchange, {kBlocks, kThreads, 0, true, 1, nullptr}, words, flags, fault);
  bool right = true;
  for (int step = 1; step <= kSteps; ++step) {
    for (int i = 0; i < kUnits; ++i) right &= words[step * kUnits + i] == sum % 1000;
    sum = sum % 1000 * kUnits;
  }
  return right;
}

bool run_copies(Fault fault) {
  std::vector<float> memory = numbers(kSteps * kUnits + 4), out(kSteps * kUnits);
  const float* x = memory.data();
  while (reinterpret_cast<uintptr_t>(x) % 16) ++x;
  run(copies, {kBlocks, kThreads, 2 * kThreads * sizeof(float), false, 1, nullptr}, x, out.data(), fault);
  bool right = true;
  for (int i = 0; i < kSteps * kUnits; ++i) right &= out[i] == x[i ^ (kThreads - 1)];
  return right;
}

bool run_cluster_neighbours(Fault fault) {
  const std::vector<float> x = numbers(kUnits);
  std::vector<float> out(kUnits);
  run(cluster_neighbours, {kBlocks, kThreads, kThreads * sizeof(float), false, 2, nullptr}, x.data(), out.data(),
      fault);
  bool right = true;
  for (int i = 0; i < kUnits; ++i) right &= out[i] == x[i ^ kThreads];
  return right;
}

bool run_vectors(Fault fault) {
  alignas(16) float x[kUnits], out[kUnits] = {};
  for (int i = 0; i < kUnits; ++i) x[i] = static_cast<float>(i);
  run(vectors, {kBlocks, kThreads, 0, false, 1, nullptr}, &x[0], &out[0], fault);
  return memcmp(x, out, sizeof x) == 0;
}

bool run_large_frame(Fault) {
  const std::vector<float> x = numbers(kUnits);
  std::vector<float> out(kUnits);
  run(large_frame, {kBlocks, kThreads, 0, false, 1, nullptr}, x.data(), out.data());
  return x == out;
}

bool run_parting(Fault fault) {
  const std::vector<float> x = numbers(kUnits);
  std::vector<float> out(kUnits);
  run(parting, {kBlocks, kThreads, 0, false, 1, nullptr}, x.data(), out.data(), fault);
  return x == out;
}

struct Case {
  const char* name;
  bool (*run)(Fault);
};

constexpr Case kCases[] = {{"block_sums", run_block_sums}, {"opposite_lanes", run_opposite_lanes},
                           {"relay", run_relay},           {"exchange", run_exchange},
                           {"copies", run_copies},         {"cluster_neighbours", run_cluster_neighbours},
                           {"vectors", run_vectors},       {"large_frame", run_large_frame},
                           {"parting", run_parting}};

// The number of a name in a list with commas.
int number_of(const char* name, const char* list) {
  const size_t length = strlen(name);
  for (int number = 0; list; ++number) {
    list += strspn(list, ", ");
    if (strcspn(list, ",") == length && strncmp(list, name, length) == 0) return number;
    list = strchr(list, ',');
  }
  return -1;
}

}  // namespace

int run_case(const char* name, const char* fault_name) {
  const int fault = number_of(fault_name, NAMES(FAULTS));
  for (const Case& c : kCases) {
    if (fault < 0 || strcmp(name, c.name) != 0) continue;
    const bool right = c.run(static_cast<Fault>(fault));
    if (error) printf("%s\n", error);
    return error ? 2 : !right;
  }
  return 3;
}

}  // namespace fastrnn::cuda

int main(int count, char** arguments) {
  return fastrnn::cuda::run_case(arguments[1], count > 2 ? arguments[2] : "none");
}
