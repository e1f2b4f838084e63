#include "cuda/device.h"
#include "cuda/exchange_benchmark.h"
#include "cuda/launch.h"

namespace fastrnn {
namespace cuda {
namespace {

constexpr int kMaxWarps = 32;
constexpr int kFlagSpacing = 32;  // words, a cache line
constexpr int kAhead = 8;         // 16-byte loads that a thread has under way at once

struct Arguments {
  uint32_t* flags;
  uint32_t* words;
  uint32_t* sums;
  int slice, rounds, cluster;
};

FASTRNN_DEVICE uint32_t make_word(uint32_t index, uint32_t seed) {
  return (index * 2654435761u + seed) & 0x7FFFFFFFu;  // never kUnwritten
}

FASTRNN_DEVICE Vec4 make_words(uint32_t index, uint32_t seed) {
  return {make_word(index, seed), make_word(index + 1, seed), make_word(index + 2, seed), make_word(index + 3, seed)};
}

// The sum of all threads' values in every thread. `partial` must not be in use by the call before.
FASTRNN_DEVICE uint32_t block_sum(uint32_t value, uint32_t* partial) {
  for (int lane_mask = kWarpSize / 2; lane_mask > 0; lane_mask /= 2) value += shuffle_xor(value, lane_mask);
  const int warps = blockDim.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  sync_block();
  uint32_t sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += partial[warp];
  return sum;
}

// This thread's share of sum(take(load(i), i)) over i < count, with several loads under way before the first is taken.
template <class Load, class Take>
FASTRNN_DEVICE uint32_t gather(int count, Load load, Take take) {
  uint32_t sum = 0;
  for (int first = threadIdx.x; first < count; first += kAhead * blockDim.x) {
    Vec4 v[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * blockDim.x;
      if (i < count) v[k] = load(i);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * blockDim.x;
      if (i < count) sum += take(v[k], i);
    }
  }
  return sum;
}

FASTRNN_DEVICE uint32_t sum_words(Vec4 v) { return v.x + v.y + v.z + v.w; }

// Counter or flags: words are ordered by them, in two buffers by turns. A block writes a buffer again only after all
// have arrived a second time, when they are done with reading it.
template <Exchange kMethod>
FASTRNN_DEVICE uint32_t exchange_ordered(const Arguments& a, uint32_t round, uint32_t seed) {
  const int blocks = gridDim.x, total = blocks * a.slice;
  uint32_t* const words = a.words + static_cast<int64_t>(round % 2) * total;
  const int begin = blockIdx.x * a.slice;
  for (int i = 4 * threadIdx.x; i < a.slice; i += 4 * blockDim.x)
    store_exchanged(words + begin + i, make_words(begin + i, seed));
  sync_block();
  if constexpr (kMethod == Exchange::kGridBarrier) {
    if (threadIdx.x == 0) {
      add_release(a.flags, 1);
      wait_acquire(a.flags, round * blocks);
    }
  } else {
    const int spacing = kMethod == Exchange::kPackedFlags ? 1 : kFlagSpacing;
    if (threadIdx.x == 0) store_release(a.flags + blockIdx.x * spacing, round);
    for (int block = threadIdx.x; block < blocks; block += blockDim.x) wait_acquire(a.flags + block * spacing, round);
  }
  sync_block();
  return gather(
      total / 4, [&](int i) { return load_exchanged(words + 4 * i); }, [](Vec4 v, int) { return sum_words(v); });
}

FASTRNN_DEVICE uint32_t exchange_tagged(const Arguments& a, uint32_t round, uint32_t seed) {
  const int total = gridDim.x * a.slice;
  uint32_t* const words = a.words + static_cast<int64_t>(round % 2) * 2 * total;
  const int begin = blockIdx.x * a.slice;
  for (int i = 2 * threadIdx.x; i < a.slice; i += 2 * blockDim.x)
    store_tagged(words + 2 * (begin + i), {make_word(begin + i, seed), round, make_word(begin + i + 1, seed), round});
  return gather(
      total / 2, [&](int i) { return load_tagged(words + 4 * i); },
      [&](Vec4 v, int i) {
        if (!is_tagged(v, round)) v = wait_tagged(words + 4 * i, round);
        return v.x + v.z;
      });
}

FASTRNN_DEVICE uint32_t exchange_prefilled(const Arguments& a, uint32_t round, uint32_t seed) {
  const int total = gridDim.x * a.slice;
  uint32_t* const words = a.words + static_cast<int64_t>(round - 1) * total;
  const int begin = blockIdx.x * a.slice;
  for (int i = 4 * threadIdx.x; i < a.slice; i += 4 * blockDim.x)
    store_exchanged(words + begin + i, make_words(begin + i, seed));
  return gather(
      total / 4, [&](int i) { return load_exchanged(words + 4 * i); },
      [&](Vec4 v, int i) { return sum_words(is_written(v) ? v : wait_exchanged(words + 4 * i)); });
}

FASTRNN_DEVICE uint32_t exchange_cluster(const Arguments& a, uint32_t* inbox, uint32_t round, uint32_t seed) {
  const int total = a.cluster * a.slice, begin = cluster_rank() * a.slice;
  uint32_t* const words = inbox + (round % 2) * total;
  for (int i = threadIdx.x; i < a.slice; i += blockDim.x) {
    const uint32_t word = make_word(begin + i, seed);
    for (int rank = 0; rank < a.cluster; ++rank) store_cluster(words + begin + i, rank, word);
  }
  sync_cluster();
  return gather(
      total / 4, [&](int i) { return *reinterpret_cast<const Vec4*>(words + 4 * i); },
      [](Vec4 v, int) { return sum_words(v); });
}

template <Exchange kMethod>
FASTRNN_KERNEL void exchange_benchmark(Arguments a) {
  uint32_t* const partial = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* const inbox = partial + 2 * kMaxWarps;
  if constexpr (kMethod == Exchange::kCluster)
    sync_cluster();  // all blocks must have started before one writes to them
  uint32_t sum = 0;
  for (int t = 1; t <= a.rounds; ++t) {
    const uint32_t round = t, seed = sum + round;
    uint32_t share;
    if constexpr (kMethod == Exchange::kCluster)
      share = exchange_cluster(a, inbox, round, seed);
    else if constexpr (kMethod == Exchange::kPrefilled)
      share = exchange_prefilled(a, round, seed);
    else if constexpr (kMethod == Exchange::kTagged)
      share = exchange_tagged(a, round, seed);
    else
      share = exchange_ordered<kMethod>(a, round, seed);
    sum = block_sum(share, partial + round % 2 * kMaxWarps);
  }
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

int64_t flag_bytes(const ExchangeBenchmark& b) { return 4ll * kFlagSpacing * b.blocks; }

int64_t word_bytes(const ExchangeBenchmark& b) {
  const int64_t bytes = 4ll * b.blocks * b.slice;
  switch (b.method) {
    case Exchange::kTagged:
      return 2 * 2 * bytes;
    case Exchange::kPrefilled:
      return b.rounds * bytes;
    case Exchange::kCluster:
      return 0;
    default:
      return 2 * bytes;
  }
}

template <Exchange kMethod>
const char* start(const ExchangeBenchmark& b) {
  constexpr bool clusters = kMethod == Exchange::kCluster;
  uint32_t* const flags = static_cast<uint32_t*>(b.memory);
  uint32_t* const words = flags + flag_bytes(b) / 4;
  const char* error = fill(flags, 0, flag_bytes(b), b.stream);
  if (!error && kMethod == Exchange::kTagged) error = fill(words, 0, word_bytes(b), b.stream);
  if (!error && kMethod == Exchange::kPrefilled) error = fill(words, 0xFF, word_bytes(b), b.stream);
  if (error) return error;
  const int64_t inbox = clusters ? 2ll * 4 * b.cluster * b.slice : 0;
  const Launch grid{b.blocks, b.threads, 2 * 4 * kMaxWarps + inbox, !clusters, clusters ? b.cluster : 1, b.stream};
  return launch(exchange_benchmark<kMethod>, grid, Arguments{flags, words, b.sums, b.slice, b.rounds, b.cluster});
}

}  // namespace
}  // namespace cuda

int64_t exchange_benchmark_bytes(const ExchangeBenchmark& benchmark) {
  return cuda::flag_bytes(benchmark) + cuda::word_bytes(benchmark);
}

const char* cuda_exchange_benchmark(const ExchangeBenchmark& b) {
  if (b.blocks < 1 || b.rounds < 1) return "blocks and rounds must be positive";
  if (b.slice < 4 || b.slice % 4) return "slice must be a multiple of 4";
  if (b.threads < cuda::kWarpSize || b.threads % cuda::kWarpSize || b.threads > cuda::kMaxWarps * cuda::kWarpSize)
    return "threads must be a multiple of 32 up to 1024";
  switch (b.method) {
    case Exchange::kGridBarrier:
      return cuda::start<Exchange::kGridBarrier>(b);
    case Exchange::kPackedFlags:
      return cuda::start<Exchange::kPackedFlags>(b);
    case Exchange::kSpreadFlags:
      return cuda::start<Exchange::kSpreadFlags>(b);
    case Exchange::kTagged:
      return cuda::start<Exchange::kTagged>(b);
    case Exchange::kPrefilled:
      return cuda::start<Exchange::kPrefilled>(b);
    case Exchange::kCluster:
      break;
  }
  cuda::Limits limits;
  if (const char* error = cuda::limits(limits)) return error;
  if (limits.capability < 90) return "clusters need compute capability 9.0";
  if (b.cluster < 1 || b.blocks % b.cluster) return "blocks must be a multiple of cluster";
  return cuda::start<Exchange::kCluster>(b);
}

}  // namespace fastrnn
