#include "emulator.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "emulated_device.h"
#include "emulated_launch.h"

// Only what runs on the fibers' stacks in kernels is compiled with a sanitizer, never this file: it asks at run time
// which one the program is linked with.
extern "C" {
#define OPTIONAL __attribute__((weak, visibility("default")))
OPTIONAL void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
OPTIONAL void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
OPTIONAL void __asan_poison_memory_region(const volatile void* address, size_t size);
OPTIONAL void __asan_unpoison_memory_region(const volatile void* address, size_t size);
OPTIONAL void* __tsan_get_current_fiber();
OPTIONAL void* __tsan_create_fiber(unsigned flags);
OPTIONAL void __tsan_destroy_fiber(void* fiber);
OPTIONAL void __tsan_switch_to_fiber(void* fiber, unsigned flags);
OPTIONAL void __tsan_acquire(void* address);
OPTIONAL void __tsan_release(void* address);
OPTIONAL void AnnotateIgnoreReadsBegin(const char* file, int line);
OPTIONAL void AnnotateIgnoreReadsEnd(const char* file, int line);
OPTIONAL void AnnotateIgnoreWritesBegin(const char* file, int line);
OPTIONAL void AnnotateIgnoreWritesEnd(const char* file, int line);
#undef OPTIONAL
}

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace fastrnn::cuda::emulator {
namespace {

constexpr int64_t kStackSize = 128 << 10, kGuardSize = 4 << 10;  // the guard is the lowest page of a stack
constexpr int64_t kSharedGap = 8 << 10;                          // between the shared memories of two blocks
constexpr uint8_t kSharedFill = 0xFF, kGapFill = 0xA5;           // 0xFFFF and 0xFFFFFFFF are NaN in every data type
constexpr int kMostThreads = 30000;     // at once: each has two memory maps, of the 65530 of a process
constexpr int kMostTsanThreads = 8000;  // libtsan of gcc 12 dies above 8128 fibers
constexpr int kFewThreads = 1024;       // as many are enough where blocks need not run at once
constexpr int kFewTsanThreads = 512;    // each costs 1 ms to begin with
constexpr int kSpins = 64;              // loads of unwritten words after which a thread rests until others have run
constexpr int kIdleRounds = 100;        // after which threads that only spin are a deadlock

bool with_asan() { return __asan_poison_memory_region != nullptr; }
bool with_tsan() { return __tsan_create_fiber != nullptr; }

// The functions of this file, and those of libc that TSan watches, are no accesses of the kernel.
struct IgnoredByTsan {
  IgnoredByTsan() { begin(); }
  ~IgnoredByTsan() { end(); }
  static inline bool active = false;
  static void begin() {
    active = true;
    if (!with_tsan()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  static void end() {
    active = false;
    if (!with_tsan()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

void tsan_release(void* address) {
  if (with_tsan()) __tsan_release(address);
}
void tsan_acquire(void* address) {
  if (with_tsan()) __tsan_acquire(address);
}

struct Fiber;

// Threads that meet: a warp, a block or a cluster.
struct Group {
  Fiber* first;
  int size;
  int arrived = 0, exited = 0;
  Fiber* last_arrived = nullptr;
  // What TSan orders a meeting by. Two in turn: in one, a thread slow to leave would be ordered after the next meeting.
  bool turn = false;
  char order[2] = {};
};

enum class State : uint8_t { ready, meeting, polling, spinning, exited };

struct Fiber {
  State state = State::ready;
  int block, thread;
  Group *warp_group, *block_group, *cluster_group;
  int queue;  // of the scheduler
  void* stack_pointer;
  char* stack;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;

  // Where it waits, and for what.
  const char* operation;
  Site site;
  void* operand;
  const uint32_t* polled;
  bool for_written;  // four words from `polled` on, else a flag that is at least `wanted`
  uint32_t wanted;
  Fiber* next_polling;

  int unwritten_loads = 0;
  std::vector<std::pair<uint32_t*, uint32_t>> kept_back;
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;  // of committed groups, in copies
};

struct Block {
  char* shared;
  int cluster_first;  // index of the first block of its cluster
};

class Random {
 public:
  using result_type = uint32_t;
  static constexpr uint32_t min() { return 0; }
  static constexpr uint32_t max() { return UINT32_MAX; }
  void seed(uint64_t seed) { state_ = seed; }
  // splitmix64
  uint32_t operator()() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return static_cast<uint32_t>(z >> 32);
  }
  int below(size_t n) { return static_cast<int>(static_cast<uint64_t>((*this)()) * n >> 32); }
  bool one_in(int n) { return below(n) == 0; }

 private:
  uint64_t state_ = 0;
};

Random random_number;

// The threads that are ready, in queues: one for all, one for each block or one for each warp, as the policy needs it.
class Scheduler {
 public:
  void reset(int policy, int queues) {
    policy_ = policy;
    queues_.resize(queues);
    places_.assign(queues, -1);
    for (auto& queue : queues_) queue.clear();
    nonempty_.clear();
    current_ = -1;
  }

  void add(Fiber* fiber) {
    auto& queue = queues_[fiber->queue];
    if (queue.empty()) {
      places_[fiber->queue] = static_cast<int>(nonempty_.size());
      nonempty_.push_back(fiber->queue);
    }
    queue.push_back(fiber);
  }

  // Null where there is none.
  Fiber* take() {
    if (nonempty_.empty()) return nullptr;
    if (policy_ == 2) {
      current_ = *std::min_element(nonempty_.begin(), nonempty_.end());
    } else if (policy_ != 3 || current_ < 0 || queues_[current_].empty() || random_number.one_in(256)) {
      current_ = nonempty_[policy_ == 0 ? 0 : random_number.below(nonempty_.size())];
    }
    auto& queue = queues_[current_];
    if (policy_ != 0) std::swap(queue[random_number.below(queue.size())], queue.back());
    Fiber* fiber = queue.back();
    queue.pop_back();
    if (queue.empty()) {
      const int place = places_[current_];
      places_[nonempty_.back()] = place;
      nonempty_[place] = nonempty_.back();
      nonempty_.pop_back();
    }
    return fiber;
  }

 private:
  int policy_, current_;
  std::vector<std::vector<Fiber*>> queues_;
  std::vector<int> nonempty_, places_;  // queues that are not empty, and where in that list each is
};

constexpr int kPollBuckets = 4096;

struct Engine {
  Settings settings;
  Scheduler scheduler;
  std::vector<Fiber> fibers;
  std::vector<Group> warps, blocks, clusters;
  std::vector<Block> block_memory;
  Fiber* polling[kPollBuckets];
  std::vector<Fiber*> spinning;  // have loaded a word that was not written, and will again
  Fiber* current;                // null outside of kernels
  int unfinished;
  int idle_rounds;  // in which all that spin have, and nothing else happened

  int block_threads, cluster_size;
  int64_t shared_bytes;
  void (*body)(const void*);
  const void* arguments;

  char* stacks = nullptr;
  int64_t stack_count = 0;
  std::vector<void*> tsan_fibers;  // of the stacks, kept: one costs 0.7 ms and 1.6 MB (gcc 12)
  char* shared = nullptr;
  int64_t shared_stride, shared_size = 0;

  void* host_stack_pointer;
  void* host_asan_stack;
  const void* host_stack_bottom;
  size_t host_stack_size;
  void* host_tsan_fiber;
  char started, finished;  // what TSan orders a launch by

  bool failed;
  char error[4096];
} engine;

std::mutex launching;

const char* file_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

// Switching

// Saves what a function must leave as it was, and goes on where `to` was saved.
__attribute__((naked, noinline)) void switch_stack(void** /*from*/, void* /*to*/) {
  asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
      "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
      "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
}

// From the running fiber, or where `from` is null from the host, to another, or where `to` is null to the host. With
// `leaving`, `from` does not come back.
void switch_to(Fiber* from, Fiber* to, bool leaving = false) {
  void*& asan_stack = from ? from->asan_stack : engine.host_asan_stack;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(leaving ? nullptr : &asan_stack,
                                   to ? to->stack + kGuardSize : engine.host_stack_bottom,
                                   to ? kStackSize - kGuardSize : engine.host_stack_size);
  IgnoredByTsan::end();
  if (with_tsan()) __tsan_switch_to_fiber(to ? to->tsan_fiber : engine.host_tsan_fiber, 1);
  engine.current = to;
  if (to) {
    threadIdx = {static_cast<unsigned>(to->thread), 0, 0};
    blockIdx = {static_cast<unsigned>(to->block), 0, 0};
  }
  switch_stack(from ? &from->stack_pointer : &engine.host_stack_pointer,
               to ? to->stack_pointer : engine.host_stack_pointer);
  IgnoredByTsan::begin();
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan_stack, nullptr, nullptr);
}

[[noreturn]] void leave_failed() {
  engine.failed = true;
  switch_to(engine.current, nullptr, true);
  __builtin_unreachable();
}

[[noreturn]] void report_deadlock() {
  // Threads by where they wait.
  std::map<std::tuple<std::string, int, std::string>, std::vector<const Fiber*>> places;
  for (const Fiber& fiber : engine.fibers)
    if (fiber.state != State::ready && fiber.state != State::exited)
      places[{file_name(fiber.site.file), fiber.site.line, fiber.operation}].push_back(&fiber);
  std::string text = "deadlock:";
  for (const auto& [place, threads] : places) {
    const auto& [file, line, operation] = place;
    text += (text.back() == ':' ? " " : ", ") + std::to_string(threads.size()) + " in " + operation + " (" + file +
            ":" + std::to_string(line) + "), first thread " + std::to_string(threads[0]->thread) + " of block " +
            std::to_string(threads[0]->block);
  }
  text += ", " + std::to_string(engine.fibers.size() - engine.unfinished) + " exited";
  snprintf(engine.error, sizeof engine.error, "%s", text.c_str());
  leave_failed();
}

bool satisfied(const Fiber& fiber) {
  if (!fiber.for_written) return __atomic_load_n(fiber.polled, __ATOMIC_RELAXED) >= fiber.wanted;
  for (int word = 0; word < 4; ++word)
    if (__atomic_load_n(fiber.polled + word, __ATOMIC_RELAXED) == kUnwritten) return false;
  return true;
}

Fiber*& polling_at(const void* address) {
  return engine.polling[reinterpret_cast<uintptr_t>(address) / 16 % kPollBuckets];
}

// Makes ready who has waited for what now is there.
void look_at(Fiber*& bucket) {
  for (Fiber** link = &bucket; *link;) {
    Fiber* fiber = *link;
    if (!satisfied(*fiber)) {
      link = &fiber->next_polling;
      continue;
    }
    *link = fiber->next_polling;
    fiber->state = State::ready;
    engine.scheduler.add(fiber);
  }
}

void wake_spinning() {
  for (Fiber* fiber : engine.spinning) {
    fiber->state = State::ready;
    engine.scheduler.add(fiber);
  }
  engine.spinning.clear();
}

// Runs another fiber; returns when this one runs again.
void run_others(bool leaving = false) {
  Fiber* self = engine.current;
  Fiber* next = engine.scheduler.take();
  if (!next) {  // a word that was not exchanged as such may have been waited for
    for (Fiber*& bucket : engine.polling) look_at(bucket);
    if (++engine.idle_rounds < kIdleRounds) wake_spinning();
    next = engine.scheduler.take();
  }
  if (!next && engine.unfinished > 0) report_deadlock();
  if (next != self) switch_to(self, next, leaving);
}

void maybe_give_way(int one_in) {
  if (engine.settings.policy == 0 || !random_number.one_in(one_in)) return;
  engine.scheduler.add(engine.current);
  run_others();
}

void stored_at(const void* address) {
  engine.idle_rounds = 0;
  look_at(polling_at(address));
  if (random_number.one_in(8)) wake_spinning();
  maybe_give_way(4);
}

// Stores kept back

void release_one(size_t index) {
  auto& kept = engine.current->kept_back;
  const auto [address, word] = kept[index];
  kept.erase(kept.begin() + index);
  __atomic_store_n(address, word, __ATOMIC_RELAXED);
  stored_at(address);
}

void release_all() {
  auto& kept = engine.current->kept_back;
  while (!kept.empty()) release_one(random_number.below(kept.size()));
}

// Meetings

// Lanes of a meeting exchange their operands: the last that arrives does it for all. `orders`: what each did before is
// seen by all afterwards.
void meet(Group& group, const char* operation, Site site, bool orders, void* operand = nullptr,
          void (*execute)(Fiber* lanes) = nullptr) {
  IgnoredByTsan ignored;
  Fiber& self = *engine.current;
  release_all();
  engine.idle_rounds = 0;
  if (group.exited > 0) fail(site, "%s where %d of %d threads have exited", operation, group.exited, group.size);
  if (execute && group.size < kWarpSize) fail(site, "%s in a warp of %d threads", operation, group.size);
  if (group.arrived > 0) {
    const Fiber& other = *group.last_arrived;
    if (strcmp(other.operation, operation) != 0 || !same(other.site, site))
      fail(site, "diverged: this thread is in %s, thread %d of block %d in %s (%s:%d)", operation, other.thread,
           other.block, other.operation, file_name(other.site.file), other.site.line);
  }
  char* order = &group.order[group.turn];
  if (orders) tsan_release(order);
  self.operation = operation;
  self.site = site;
  self.operand = operand;
  group.last_arrived = &self;
  if (++group.arrived < group.size) {
    self.state = State::meeting;
    run_others();
  } else {
    group.arrived = 0;
    group.turn = !group.turn;
    if (execute) execute(group.first);
    for (int i = group.size - 1; i >= 0; --i) {
      if (&group.first[i] == &self) continue;
      group.first[i].state = State::ready;
      engine.scheduler.add(&group.first[i]);
    }
    maybe_give_way(4);
  }
  if (orders) tsan_acquire(order);
}

void poll(const char* operation, const void* address, bool for_written, uint32_t wanted, Site site) {
  IgnoredByTsan ignored;
  Fiber& self = *engine.current;
  release_all();
  self.polled = static_cast<const uint32_t*>(address);
  self.for_written = for_written;
  self.wanted = wanted;
  if (satisfied(self)) return;
  self.state = State::polling;
  self.operation = operation;
  self.site = site;
  Fiber*& bucket = polling_at(address);
  self.next_polling = bucket;
  bucket = &self;
  run_others();
}

void exit_from(Group& group) {
  if (group.arrived > 0)
    fail(group.last_arrived->site, "has exited while thread %d of block %d is in %s", group.last_arrived->thread,
         group.last_arrived->block, group.last_arrived->operation);
  ++group.exited;
}

[[noreturn]] void fiber_main() {
  if (__sanitizer_finish_switch_fiber) {
    const bool from_host = !engine.host_stack_bottom;
    __sanitizer_finish_switch_fiber(nullptr, from_host ? &engine.host_stack_bottom : nullptr,
                                    from_host ? &engine.host_stack_size : nullptr);
  }
  IgnoredByTsan::active = false;
  tsan_acquire(&engine.started);
  engine.body(engine.arguments);
  IgnoredByTsan::begin();
  Fiber& self = *engine.current;
  release_all();
  exit_from(*self.warp_group);
  exit_from(*self.block_group);
  exit_from(*self.cluster_group);
  self.state = State::exited;
  engine.idle_rounds = 0;
  --engine.unfinished;
  tsan_release(&engine.finished);
  run_others(true);
  __builtin_unreachable();
}

// Launches

struct sigaction previous_segv;

void on_segv(int, siginfo_t* info, void*) {
  const int64_t offset = static_cast<char*>(info->si_addr) - engine.stacks;
  if (offset >= 0 && offset < engine.stack_count * kStackSize && offset % kStackSize < kGuardSize) {
    const char text[] = "CUDA emulator: a thread of the kernel has overrun its stack of 124 KiB\n";
    static_cast<void>(!write(2, text, sizeof text - 1));
  }
  sigaction(SIGSEGV, &previous_segv, nullptr);  // the access faults again
}

// A fault on a fiber's guard page can only be handled on another stack.
class StackOverflowReport {
 public:
  StackOverflowReport() {
    stack_t stack = {};
    stack.ss_sp = memory_;
    stack.ss_size = sizeof memory_;
    sigaltstack(&stack, &previous_);
    struct sigaction action = {};
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_segv);
  }
  ~StackOverflowReport() {
    sigaction(SIGSEGV, &previous_segv, nullptr);
    sigaltstack(&previous_, nullptr);
  }

 private:
  static inline char memory_[64 << 10];
  stack_t previous_;
};

const char* provide_stacks(int64_t count) {
  if (count > engine.stack_count) {
    if (engine.stack_count > 0) munmap(engine.stacks, engine.stack_count * kStackSize);
    engine.stack_count = 0;
    void* memory =
        mmap(nullptr, count * kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return "the emulator has no memory for the stacks of so many threads at once";
    engine.stacks = static_cast<char*>(memory);
    for (int64_t i = 0; i < count; ++i)
      if (mprotect(engine.stacks + i * kStackSize, kGuardSize, PROT_NONE) != 0) {
        munmap(memory, count * kStackSize);
        return "the emulator cannot guard the stacks of so many threads at once";
      }
    engine.stack_count = count;
  }
  // Stacks that were switched away from for good leave their redzones poisoned.
  if (with_asan()) __asan_unpoison_memory_region(engine.stacks, engine.stack_count * kStackSize);
  if (with_tsan())
    while (static_cast<int64_t>(engine.tsan_fibers.size()) < count)
      engine.tsan_fibers.push_back(__tsan_create_fiber(0));
  return nullptr;
}

const char* provide_shared_memory(int blocks) {
  engine.shared_stride = (engine.shared_bytes + 127) / 128 * 128 + kSharedGap;
  const int64_t size = (blocks + 1) * engine.shared_stride;
  if (size > engine.shared_size) {
    if (engine.shared_size > 0) munmap(engine.shared, engine.shared_size);
    engine.shared_size = 0;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return "the emulator has no memory for the shared memory of so many blocks at once";
    engine.shared = static_cast<char*>(memory);
    engine.shared_size = size;
  }
  if (with_asan()) __asan_unpoison_memory_region(engine.shared, engine.shared_size);
  memset(engine.shared, kGapFill, size);
  if (with_asan()) __asan_poison_memory_region(engine.shared, engine.shared_size);
  engine.block_memory.resize(blocks);
  for (int block = 0; block < blocks; ++block) {
    char* memory = engine.shared + block * engine.shared_stride + kSharedGap;
    engine.block_memory[block] = {memory, block - block % engine.cluster_size};
    if (with_asan()) __asan_unpoison_memory_region(memory, engine.shared_bytes);
    memset(memory, kSharedFill, engine.shared_bytes);
  }
  return nullptr;
}

void check_gaps() {
  if (with_asan()) return;
  for (size_t block = 0; block <= engine.block_memory.size(); ++block) {
    const char* end = engine.shared + block * engine.shared_stride + kSharedGap;
    const char* begin = block == 0 ? engine.shared : end - engine.shared_stride + engine.shared_bytes;
    if (std::any_of(begin, end, [](char byte) { return static_cast<uint8_t>(byte) != kGapFill; })) {
      snprintf(engine.error, sizeof engine.error, "a store beside the %lld bytes of a block's shared memory",
               static_cast<long long>(engine.shared_bytes));
      engine.failed = true;
      return;
    }
  }
}

// Runs the blocks with these numbers, all at once.
void run_blocks(const int* numbers, int count) {
  const int threads = engine.block_threads, warps = (threads + kWarpSize - 1) / kWarpSize;
  const int policy = engine.settings.policy;
  engine.fibers.clear();
  engine.fibers.resize(static_cast<size_t>(count) * threads);
  engine.warps.assign(count * warps, {});
  engine.blocks.assign(count, {});
  engine.clusters.assign(count / engine.cluster_size, {});
  engine.scheduler.reset(policy, policy == 2 ? count : policy == 3 ? count * warps : 1);
  engine.spinning.clear();
  std::fill(std::begin(engine.polling), std::end(engine.polling), nullptr);
  engine.unfinished = count * threads;
  engine.idle_rounds = 0;
  std::vector<int> ranks(count);
  for (int block = 0; block < count; ++block) ranks[block] = block;
  std::shuffle(ranks.begin(), ranks.end(), random_number);

  for (int i = count * threads - 1; i >= 0; --i) {
    Fiber& fiber = engine.fibers[i];
    const int block = i / threads, thread = i % threads, warp = block * warps + thread / kWarpSize;
    fiber.block = numbers[block];
    fiber.thread = thread;
    fiber.queue = policy == 2 ? ranks[block] : policy == 3 ? warp : 0;
    fiber.warp_group = &engine.warps[warp];
    fiber.block_group = &engine.blocks[block];
    fiber.cluster_group = &engine.clusters[block / engine.cluster_size];
    for (Group* group : {fiber.warp_group, fiber.block_group, fiber.cluster_group}) {
      group->first = &fiber;
      ++group->size;
    }
    fiber.stack = engine.stacks + i * kStackSize;
    // Tops at different lines of a page: at equal ones they would all compete for the same sets of the cache.
    void** top = reinterpret_cast<void**>(fiber.stack + kStackSize - i % 32 * 128 - 64);
    *--top = nullptr;  // the address that fiber_main would return to
    *--top = reinterpret_cast<void*>(fiber_main);
    fiber.stack_pointer = top - 6;
    if (with_tsan()) fiber.tsan_fiber = engine.tsan_fibers[i];
    engine.scheduler.add(&fiber);
  }
  tsan_release(&engine.started);
  engine.host_stack_bottom = nullptr;
  switch_to(nullptr, engine.scheduler.take());
  tsan_acquire(&engine.finished);
  if (!engine.failed) check_gaps();
}

const char* run_launch(const Launch& launch) {
  const char* error = read_settings(engine.settings);
  if (error) return error;
  // In the words of the CUDA runtime, for launches that it refuses.
  const int cluster = std::max(launch.cluster, 1);
  if (launch.shared_bytes < 0 || launch.shared_bytes > engine.settings.shared_bytes) return "invalid argument";
  if (launch.blocks < 1 || launch.threads < 1 || launch.threads > 1024) return "invalid configuration argument";
  if (cluster > 1 && (engine.settings.capability < 90 || launch.blocks % cluster != 0 || cluster > 8))
    return "a kernel launch error has occurred due to cluster misconfiguration";
  const int resident =
      engine.settings.multiprocessors * blocks_per_multiprocessor(engine.settings, launch.threads, launch.shared_bytes);
  if (resident < (launch.cooperative ? launch.blocks : cluster)) return "too many blocks in cooperative launch";

  int live = launch.blocks;
  if (!launch.cooperative) {
    live = std::min({live, resident, (with_tsan() ? kFewTsanThreads : kFewThreads) / launch.threads});
    live = std::max(live / cluster, 1) * cluster;
  }
  const int most = with_tsan() ? kMostTsanThreads : kMostThreads;
  if (static_cast<int64_t>(live) * launch.threads > most) {
    snprintf(engine.error, sizeof engine.error, "the emulator runs at most %d threads at once, not %d blocks of %d",
             most, live, launch.threads);
    return engine.error;
  }
  engine.block_threads = launch.threads;
  engine.cluster_size = cluster;
  engine.shared_bytes = launch.shared_bytes;
  if ((error = provide_stacks(static_cast<int64_t>(live) * launch.threads))) return error;

  random_number.seed(engine.settings.seed);
  std::vector<int> order(launch.blocks / cluster), numbers;  // of clusters, of blocks
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  if (engine.settings.policy != 0) std::shuffle(order.begin(), order.end(), random_number);
  for (int first : order)
    for (int i = 0; i < cluster; ++i) numbers.push_back(first * cluster + i);

  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  gridDim = {static_cast<unsigned>(launch.blocks), 1, 1};
  engine.failed = false;
  for (int begin = 0; begin < launch.blocks && !engine.failed; begin += live) {
    const int count = std::min(live, launch.blocks - begin);
    if ((error = provide_shared_memory(count))) return error;
    run_blocks(&numbers[begin], count);
  }
  if (engine.failed && with_tsan()) {
    // Fibers that were left in the middle: the host goes on after all that they did.
    for (void* fiber : engine.tsan_fibers) {
      __tsan_switch_to_fiber(fiber, 1);
      __tsan_release(&engine.finished);
      __tsan_switch_to_fiber(engine.host_tsan_fiber, 1);
      __tsan_destroy_fiber(fiber);
    }
    engine.tsan_fibers.clear();
    __tsan_acquire(&engine.finished);
  }
  return engine.failed ? engine.error : nullptr;
}

const char* read_setting(const char* name, int64_t least, int64_t most, int64_t& value) {
  const char* text = getenv(name);
  if (!text) return nullptr;
  char* end;
  errno = 0;
  value = strtoll(text, &end, 10);
  if (end != text && *end == 0 && errno == 0 && value >= least && value <= most) return nullptr;
  snprintf(engine.error, sizeof engine.error, "%s must be from %lld to %lld, got '%s'", name,
           static_cast<long long>(least), static_cast<long long>(most), text);
  return engine.error;
}

}  // namespace

const char* read_settings(Settings& settings) {
  int64_t policy = 3, seed = 0, multiprocessors = 132, shared_bytes = 232448, capability = 90;  // an H100's
  const char* error = read_setting("FASTRNN_EMULATOR_POLICY", 0, 3, policy);
  if (!error) error = read_setting("FASTRNN_EMULATOR_SEED", 0, INT64_MAX, seed);
  if (!error) error = read_setting("FASTRNN_EMULATOR_MULTIPROCESSORS", 1, 1024, multiprocessors);
  if (!error) error = read_setting("FASTRNN_EMULATOR_SHARED_BYTES", 0, 1 << 20, shared_bytes);
  if (!error) error = read_setting("FASTRNN_EMULATOR_CAPABILITY", 10, 999, capability);
  if (error) return error;
  const char* copy = getenv("FASTRNN_EMULATOR_COPY");
  if (copy && strcmp(copy, "early") != 0 && strcmp(copy, "late") != 0)
    return "FASTRNN_EMULATOR_COPY must be 'early' or 'late'";
  settings = {static_cast<int>(policy),
              static_cast<uint64_t>(seed),
              !copy || strcmp(copy, "late") == 0,
              static_cast<int>(multiprocessors),
              shared_bytes,
              static_cast<int>(capability)};
  return nullptr;
}

int blocks_per_multiprocessor(const Settings& settings, int threads, int64_t shared_bytes) {
  if (threads < 1 || threads > 1024 || shared_bytes > settings.shared_bytes) return 0;
  const int64_t reserved = 1024;  // of the shared memory, for each block
  const int64_t by_threads = 2048 / ((threads + kWarpSize - 1) / kWarpSize * kWarpSize);
  return static_cast<int>(
      std::min({int64_t{32}, by_threads, (settings.shared_bytes + reserved) / (shared_bytes + reserved)}));
}

const char* run(const Launch& launch, void (*body)(const void*), const void* arguments) {
  const std::lock_guard<std::mutex> lock(launching);
  IgnoredByTsan ignored;
  engine.body = body;
  engine.arguments = arguments;
  if (with_tsan()) engine.host_tsan_fiber = __tsan_get_current_fiber();
  if (with_asan() || with_tsan()) return run_launch(launch);
  const StackOverflowReport report;
  return run_launch(launch);
}

void fail(Site site, const char* format, ...) {
  if (!IgnoredByTsan::active) IgnoredByTsan::begin();
  const Fiber& self = *engine.current;
  const int length = snprintf(engine.error, sizeof engine.error, "thread %d of block %d at %s:%d: ", self.thread,
                              self.block, file_name(site.file), site.line);
  va_list values;
  va_start(values, format);
  vsnprintf(engine.error + length, sizeof engine.error - length, format, values);
  va_end(values);
  leave_failed();
}

// Memory

static Block& own_block() { return engine.block_memory[engine.current->block_group - engine.blocks.data()]; }

char* shared_memory() { return own_block().shared; }

bool in_shared_memory(const void* address, int64_t bytes) {
  const int64_t offset = static_cast<const char*>(address) - own_block().shared;
  return offset >= 0 && offset + bytes <= engine.shared_bytes;
}

bool in_any_shared_memory(const void* address) {
  return address >= engine.shared && address < engine.shared + engine.shared_size;
}

uint32_t cluster_rank() { return blockIdx.x % engine.cluster_size; }

char* shared_memory_of(void* shared, uint32_t rank, Site site) {
  const Block& own = own_block();
  if (rank >= static_cast<uint32_t>(engine.cluster_size))
    fail(site, "store_cluster to block %u of a cluster of %d", rank, engine.cluster_size);
  const int other = own.cluster_first + static_cast<int>(rank);
  if (engine.blocks[other].exited > 0) fail(site, "store_cluster to block %u of the cluster, which has exited", rank);
  return engine.block_memory[other].shared + (static_cast<char*>(shared) - own.shared);
}

bool copies_are_late() { return engine.settings.late_copies; }

void add_copy(Copy copy) {
  IgnoredByTsan ignored;
  engine.current->copies.push_back(copy);
}

void commit_copies() {
  IgnoredByTsan ignored;
  engine.current->group_ends.push_back(engine.current->copies.size());
}

bool next_copy(int pending, Copy& copy) {
  IgnoredByTsan ignored;
  Fiber& self = *engine.current;
  while (static_cast<int>(self.group_ends.size()) > pending) {
    if (self.group_ends.front() > 0) {
      copy = self.copies.front();
      self.copies.erase(self.copies.begin());
      for (size_t& end : self.group_ends) --end;
      return true;
    }
    self.group_ends.erase(self.group_ends.begin());
  }
  return false;
}

// Exchanged words

void before_load(const void* address) {
  IgnoredByTsan ignored;
  auto& kept = engine.current->kept_back;
  for (size_t i = 0; i < kept.size();)
    if (kept[i].first == address)
      release_one(i);
    else
      ++i;
  maybe_give_way(16);
}

void after_load(bool written, Site site) {
  // Most loads are followed by a wait. Who does not wait spins: it rests until others have run.
  if (written || ++engine.current->unwritten_loads % kSpins != 0) return;
  IgnoredByTsan ignored;
  Fiber& self = *engine.current;
  release_all();
  self.state = State::spinning;
  self.operation = "load_exchanged";
  self.site = site;
  engine.spinning.push_back(&self);
  run_others();
}

void after_store(const void* address) {
  IgnoredByTsan ignored;
  stored_at(address);
}

bool keeps_stores_back() { return engine.settings.policy != 0 && !with_tsan(); }

void keep_back(uint32_t* address, uint32_t word) {
  auto& kept = engine.current->kept_back;
  for (size_t i = 0; i < kept.size(); ++i)  // a word's own stores stay in order
    if (kept[i].first == address) release_one(i--);
  kept.emplace_back(address, word);
  while (!kept.empty() && (kept.size() > 8 || random_number.one_in(2))) release_one(random_number.below(kept.size()));
}

void release_stores() {
  IgnoredByTsan ignored;
  release_all();
}

void wait_written(const void* address, Site site) { poll("wait_exchanged", address, true, 0, site); }
void wait_at_least(const uint32_t* flag, uint32_t value, Site site) { poll("wait_acquire", flag, false, value, site); }

// Meetings

void sync_block(Site site) { meet(*engine.current->block_group, "sync_block", site, true); }
void sync_cluster(Site site) { meet(*engine.current->cluster_group, "sync_cluster", site, true); }
void sync_warp(Site site) {
  meet(*engine.current->warp_group, "sync_warp", site, true, nullptr, [](Fiber*) {});
}

namespace {

struct Exchange {
  uint32_t bits;
  int source;
};

// Words of a and b, as a lane holds them, and d.
struct MultiplyAdd {
  float* d;
  const uint32_t* words;
};

float number(uint32_t word, int half, Element element) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * half);
  return element == Element::float16    ? to_float(Float16{bits})
         : element == Element::bfloat16 ? to_float(BFloat16{bits})
                                        : bits_float(word & ~0x1FFFu);
}

// How the tensor cores of these generations round their sums (Fasi et al. 2021, doi 10.7717/peerj-cs.330).
float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <Element element>
void multiply_add_lanes(Fiber* lanes) {
  constexpr int each = element == Element::tf32 ? 1 : 2, depth = 8 * each;  // elements in a word, K
  float a[16][depth], b[depth][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int g = lane / 4, q = lane % 4;
    const uint32_t* words = static_cast<MultiplyAdd*>(lanes[lane].operand)->words;
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < each; ++i) {
        const int k = half * depth / 2 + q * each + i;
        a[g][k] = number(words[2 * half], i, element);
        a[g + 8][k] = number(words[2 * half + 1], i, element);
        b[k][g] = number(words[4 + half], i, element);
      }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* d = static_cast<MultiplyAdd*>(lanes[lane].operand)->d;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = d[i];
      for (int k = 0; k < depth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      d[i] = toward_zero(sum);
    }
  }
}

}  // namespace

uint32_t exchange(const char* name, uint32_t bits, int source_lane, Site site) {
  Exchange own = {bits, source_lane};
  meet(*engine.current->warp_group, name, site, false, &own, [](Fiber* lanes) {
    uint32_t all[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) all[i] = static_cast<Exchange*>(lanes[i].operand)->bits;
    for (int i = 0; i < kWarpSize; ++i) {
      Exchange& lane = *static_cast<Exchange*>(lanes[i].operand);
      lane.bits = all[lane.source & (kWarpSize - 1)];
    }
  });
  return own.bits;
}

uint32_t ballot(bool predicate, Site site) {
  uint32_t own = predicate;
  meet(*engine.current->warp_group, "ballot", site, false, &own, [](Fiber* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < kWarpSize; ++i) all |= *static_cast<uint32_t*>(lanes[i].operand) << i;
    for (int i = 0; i < kWarpSize; ++i) *static_cast<uint32_t*>(lanes[i].operand) = all;
  });
  return own;
}

void multiply_add(Element element, float* d, const uint32_t (&words)[6], Site site) {
  MultiplyAdd own = {d, words};
  meet(*engine.current->warp_group, "multiply_add", site, false, &own,
       element == Element::float16    ? multiply_add_lanes<Element::float16>
       : element == Element::bfloat16 ? multiply_add_lanes<Element::bfloat16>
                                      : multiply_add_lanes<Element::tf32>);
}

}  // namespace fastrnn::cuda::emulator
