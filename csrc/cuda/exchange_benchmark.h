#pragma once

#include <stdint.h>

namespace fastrnn {

// Ways in which blocks that run at once hand each other a vector.
enum class Exchange : int {
  kGridBarrier,  // all arrive at one counter
  kPackedFlags,  // each block has a flag, in consecutive words
  kSpreadFlags,  // each block has a flag, 128 bytes apart
  kTagged,       // the round stands beside each word
  kPrefilled,    // words are their own flags, over memory that was filled beforehand, as in the recurrence's kernels
  kCluster,      // distributed shared memory and the cluster's barrier, in each cluster on its own; sm_90 and later
};

struct ExchangeBenchmark {
  Exchange method;
  int blocks, threads;  // threads of each block, a multiple of 32
  int cluster;          // blocks in each cluster of kCluster
  int slice;            // words that each block contributes, a multiple of 4
  int rounds;
  void* memory;    // exchange_benchmark_bytes() of them, 128-byte aligned; the launcher fills them
  uint32_t* sums;  // [blocks]
  void* stream;    // a cudaStream_t
};

// Device memory that the launch needs.
int64_t exchange_benchmark_bytes(const ExchangeBenchmark& benchmark);

// Starts `rounds` rounds in which every block contributes its slice and reads all slices. Word i of round t is
// (i * 2654435761 + S + t) mod 2^31 with S the sum of the words of round t - 1 mod 2^32, so that no block can run
// ahead. Writes the last round's sum of every block. Returns null, or what went wrong.
const char* cuda_exchange_benchmark(const ExchangeBenchmark& benchmark);

}  // namespace fastrnn
