// What emulated_device.h and emulated_launch.h need of the engine: the threads of a kernel are fibers of one OS thread.
#pragma once

#include <stdint.h>

#pragma GCC visibility push(hidden)

struct EmulatedIndex {
  unsigned x, y, z;
};
extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;  // rewritten when another fiber runs

namespace fastrnn::cuda {

struct Launch;

namespace emulator {

// A place in the source of a kernel.
struct Site {
  const char* file;
  int line;
};

struct Settings {
  int policy;  // which thread runs next: 0 last in first out, 1 any, 2 by a random rank of its block, 3 warp by warp
  uint64_t seed;
  bool late_copies;  // copy_async copies when it is waited for, not at once
  int multiprocessors;
  int64_t shared_bytes;
  int capability;
};

// From the environment variables FASTRNN_EMULATOR_POLICY, _SEED, _COPY, _MULTIPROCESSORS, _SHARED_BYTES and
// _CAPABILITY. Returns null, or what is wrong with one of them.
const char* read_settings(Settings& settings);

int blocks_per_multiprocessor(const Settings& settings, int threads, int64_t shared_bytes);

// Runs body(arguments) in every thread of the grid. Returns null, or what went wrong, until the next launch.
const char* run(const Launch& launch, void (*body)(const void*), const void* arguments);

// All below: called by the running thread.

[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

char* shared_memory();
bool in_shared_memory(const void* address, int64_t bytes);  // of this block
bool in_any_shared_memory(const void* address);             // of any block that is live
uint32_t cluster_rank();
// Where `shared`, in this block's shared memory, lies in that of another block of the cluster.
char* shared_memory_of(void* shared, uint32_t rank, Site site);

void sync_block(Site site);
void sync_cluster(Site site);
void sync_warp(Site site);
uint32_t exchange(const char* name, uint32_t bits, int source_lane, Site site);
uint32_t ballot(bool predicate, Site site);

enum class Element { float16, bfloat16, tf32 };
// Words a0 to a3, b0, b1.
void multiply_add(Element element, float* d, const uint32_t (&words)[6], Site site);

// Words exchanged between threads. Others may run between any two of them.
void before_load(const void* address);
void after_load(bool written, Site site);
void after_store(const void* address);
// Stores may be kept back, to reach memory in another order.
bool keeps_stores_back();
void keep_back(uint32_t* address, uint32_t word);
void release_stores();
// Returns when the four words, or the flag, may be as wanted: look again.
void wait_written(const void* address, Site site);
void wait_at_least(const uint32_t* flag, uint32_t value, Site site);

struct Copy {
  void* shared;
  const void* global;
};
bool copies_are_late();
void add_copy(Copy copy);
void commit_copies();
// The next copy of the groups before the last `pending` ones; false where there is none.
bool next_copy(int pending, Copy& copy);

}  // namespace emulator
}  // namespace fastrnn::cuda

#pragma GCC visibility pop
