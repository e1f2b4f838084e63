// Runs every method of csrc/cuda/exchange_benchmark.cu on a few shapes and compares each block's sum.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "cuda/exchange_benchmark.h"

using namespace fastrnn;

static uint32_t expected(int words, int rounds) {
  uint32_t sum = 0;
  for (int t = 1; t <= rounds; ++t) {
    const uint32_t seed = sum + t;
    sum = 0;
    for (int i = 0; i < words; ++i) sum += (i * 2654435761u + seed) & 0x7FFFFFFFu;
  }
  return sum;
}

int main() {
  int wrong = 0;
  for (int method = 0; method <= static_cast<int>(Exchange::kCluster); ++method)
    for (int cluster : {1, 4})
      for (int slice : {4, 36, 260}) {
        const bool clusters = method == static_cast<int>(Exchange::kCluster);
        const int blocks = clusters ? 2 * cluster : 3 * cluster;
        ExchangeBenchmark b{static_cast<Exchange>(method), blocks, 64, cluster, slice, 5, nullptr, nullptr, nullptr};
        if (posix_memalign(&b.memory, 128, exchange_benchmark_bytes(b))) return 2;
        std::vector<uint32_t> sums(blocks);
        b.sums = sums.data();
        if (const char* error = cuda_exchange_benchmark(b)) {
          fprintf(stderr, "method %d, %d blocks, slice %d: %s\n", method, blocks, slice, error);
          ++wrong;
        }
        const uint32_t sum = expected(slice * (clusters ? cluster : blocks), b.rounds);
        for (int block = 0; block < blocks; ++block)
          if (sums[block] != sum) {
            fprintf(stderr, "method %d, %d blocks, slice %d: block %d\n", method, blocks, slice, block);
            ++wrong;
          }
        free(b.memory);
      }
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
