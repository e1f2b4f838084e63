// Runs the kernels of csrc/cuda on a small problem of random numbers, forward and backward, without layer norms and
// with, and prints a number that stands for all bits of the results of each:
//
//   recurrence_program CELL
//
// Each runs twice. Memory to be written holds NaN the first time and something else the second, which must make no
// difference. Exit status 0, 1 where it does or a result is not finite, 2 with what the launcher says.
//
// Each cell has one kind of arithmetic, and with ONLY_CELL defined there is only that cell, without norms: compiling
// all cells for all four takes minutes.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "cuda/tables.h"

namespace fastrnn::cuda {
namespace {

constexpr const char* kNames[] = {"rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before"};
constexpr Math kMaths[] = {Math::tf32, Math::float32, Math::bfloat16, Math::float32, Math::float16};

constexpr Math math_of(Cell cell) { return kMaths[static_cast<int>(cell)]; }

template <Math math, Cell cell, bool norms>
constexpr Kernels linked() {
#ifdef ONLY_CELL
  constexpr bool wanted = math == math_of(cell) && cell == Cell::ONLY_CELL && !norms;
#else
  constexpr bool wanted = math == math_of(cell);
#endif
  if constexpr (wanted)
    return pair<math, cell, norms>();
  else
    return {};
}

template <Math math, bool norms>
const Kernels& linked(Cell cell) {
  static const Kernels kernels[] = {linked<math, Cell::rnn_tanh, norms>(), linked<math, Cell::rnn_relu, norms>(),
                                    linked<math, Cell::lstm, norms>(), linked<math, Cell::gru, norms>(),
                                    linked<math, Cell::gru_reset_before, norms>()};
  return kernels[static_cast<int>(cell)];
}

// More than one tile of rows of one block, two blocks, and padding in each direction.
constexpr int64_t kSteps = 3, kBatch = 19, kHidden = 27;
constexpr Tile kTile = {2, 32};

class Random {
 public:
  // From -1 to 1.
  float operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }

  template <class T>
  std::vector<T> numbers(int64_t count, float scale = 1) {
    std::vector<T> found(count);
    for (T& value : found) value = from_float<T>(scale * (*this)());
    return found;
  }

  template <class T>
  std::vector<T> integers(int64_t count, int below) {
    std::vector<T> found(count);
    for (T& value : found) value = static_cast<T>((*this)() * 0.5f * below + 0.5f * below);
    return found;
  }

 private:
  uint64_t state_ = 1;
};

// Every tensor has memory of its own, so that the address sanitizer sees where it ends.
template <class T>
std::vector<T> filled(int64_t count, uint8_t byte) {
  std::vector<T> found(count);
  if (count) memset(static_cast<void*>(found.data()), byte, count * sizeof(T));
  return found;
}

template <class T>
T* address(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

// Of the bits of results (FNV-1a).
struct Digest {
  uint64_t sum = 0xCBF29CE484222325u;
  const char* not_finite = nullptr;

  template <class T>
  void add(const char* name, const std::vector<T>& values) {
    for (const T& value : values) {
      const float number = to_float(value);
      if (!isfinite(number)) not_finite = name;
      sum = (sum ^ float_bits(number)) * 0x100000001B3u;
    }
  }
};

template <Math math>
const char* run(Cell cell, bool norms, uint8_t byte, Digest& digest) {
  using T = Element<math>;
  const int64_t rows = kSteps * kBatch, hidden = kHidden, padded = padded_size(hidden);
  const int64_t states = kBatch * hidden, outputs = rows * hidden, gates = gate_count(cell), weights = gates * hidden;
  const bool lstm = cell == Cell::lstm, before = cell == Cell::gru_reset_before;
  const Sequence sequence = {kBatch * hidden, hidden}, gates_sequence = {kBatch * weights, weights};

  Random random;
  auto gates_x = random.numbers<T>(rows * weights), weight = random.numbers<T>(weights * hidden, 0.2f);
  auto h0 = random.numbers<T>(states), c0 = random.numbers<T>(lstm ? states : 0);
  auto bias = random.numbers<float>(weights), peephole = random.numbers<float>(lstm ? 3 * hidden : 0);
  auto norm_weight = random.numbers<float>(norms ? weights : 0), norm_bias = random.numbers<float>(norms ? weights : 0);
  auto norm_c_weight = random.numbers<float>(norms && lstm ? hidden : 0);
  auto norm_c_bias = random.numbers<float>(norms && lstm ? hidden : 0), mask = random.numbers<float>(states);
  auto dy = random.numbers<T>(outputs), dh_n = random.numbers<T>(states);
  auto dc_n = random.numbers<T>(lstm ? states : 0);
  auto dc_all = random.numbers<float>(lstm ? outputs : 0);
  auto lengths = random.integers<int64_t>(kBatch, kSteps + 1);
  auto resets = random.integers<uint8_t>(rows, 2);
  lengths[kBatch - 1] = kSteps;

  Problem problem = {};
  problem.cell = cell;
  problem.math = math;
  problem.reverse = norms;
  problem.steps = kSteps;
  problem.batch = kBatch;
  problem.hidden_size = hidden;
  problem.rows = rows;
  problem.lengths = lengths.data();
  problem.resets = resets.data();
  problem.reset_strides = {kBatch, 1};
  problem.zoneout = 0.2;
  problem.zoneout_random = true;
  problem.zoneout_seed = 1;
  problem.recurrent_mask = mask.data();
  problem.norm_hh = {address(norm_weight), address(norm_bias)};
  problem.norm_c = {address(norm_c_weight), address(norm_c_bias)};
  problem.peephole = address(peephole);

  const int64_t scratch = rows * padded;
  auto packed = filled<Vec4>(packed_bytes(cell, math, hidden) / 16, byte);
  auto stats = filled<Vec4>(norms ? stats_bytes(kSteps, kBatch, hidden) / 16 : 0, byte);
  auto h_in = filled<T>(scratch, byte), rh = filled<T>(before ? scratch : 0, byte), y = filled<T>(outputs, byte);
  auto h_n = filled<T>(states, byte), c_n = filled<T>(lstm ? states : 0, byte);
  auto saved = filled<T>(saved_slots(cell) * outputs, byte), norm_saved = filled<T>(norms ? rows * weights : 0, byte);
  auto c_all = filled<float>(lstm ? outputs : 0, byte), deviations = filled<float>(norms ? rows * 4 : 0, byte);

  Forward forward = {};
  forward.problem = problem;
  forward.gates_x = gates_x.data();
  forward.gates_x_rows = gates_sequence;
  forward.weight_hh = weight.data();
  forward.bias_hh = bias.data();
  forward.h0 = h0.data();
  forward.c0 = address(c0);
  forward.y = y.data();
  forward.y_rows = sequence;
  forward.h_n = h_n.data();
  forward.c_n = address(c_n);
  forward.packed_weight = packed.data();
  forward.h_in = h_in.data();
  forward.rh = address(rh);
  forward.stats = address(stats);
  forward.saved = saved.data();
  forward.c_all = address(c_all);
  forward.c_rows = sequence;
  forward.norm_saved = address(norm_saved);
  forward.deviations = address(deviations);
  if (const char* error = recurrence_forward(&forward, 1, kTile, nullptr)) return error;

  const int64_t sum_count = gradient_sums(cell, norms, norms && lstm, lstm);
  auto dproduct = filled<T>(gates * scratch, byte), dgates_x = filled<T>(rows * weights, byte);
  auto dh0 = filled<float>(states, byte), dc0 = filled<float>(lstm ? states : 0, byte);
  auto sums = filled<float>(sum_count * states, byte);

  Backward backward = {};
  backward.problem = problem;
  backward.dy = dy.data();
  backward.dy_rows = sequence;
  backward.dh_n = dh_n.data();
  backward.dc_n = address(dc_n);
  backward.dc_all = address(dc_all);
  backward.dc_all_rows = sequence;
  backward.weight_hh = weight.data();
  backward.h0 = h0.data();
  backward.c0 = address(c0);
  backward.y = y.data();
  backward.y_rows = sequence;
  backward.saved = saved.data();
  backward.c_all = address(c_all);
  backward.c_rows = sequence;
  backward.norm_saved = address(norm_saved);
  backward.deviations = address(deviations);
  backward.packed_weight = packed.data();
  backward.dproduct = dproduct.data();
  backward.stats = address(stats);
  backward.dgates_x = dgates_x.data();
  backward.dgates_x_rows = gates_sequence;
  backward.dh0 = dh0.data();
  backward.dc0 = address(dc0);
  backward.sums = address(sums);
  if (const char* error = recurrence_backward(&backward, 1, kTile, nullptr)) return error;

  // Activations and what norms keep have no values behind the end of a sequence.
  digest.add("y", y);
  digest.add("h_n", h_n);
  digest.add("c_n", c_n);
  digest.add("c_all", c_all);
  digest.add("h_in", h_in);
  digest.add("rh", rh);
  digest.add("dproduct", dproduct);
  digest.add("dgates_x", dgates_x);
  digest.add("dh0", dh0);
  digest.add("dc0", dc0);
  digest.add("sums", sums);
  return nullptr;
}

const char* run_any(Cell cell, bool norms, uint8_t byte, Digest& digest) {
  switch (math_of(cell)) {
    case Math::float16:
      return run<Math::float16>(cell, norms, byte, digest);
    case Math::bfloat16:
      return run<Math::bfloat16>(cell, norms, byte, digest);
    case Math::tf32:
      return run<Math::tf32>(cell, norms, byte, digest);
    default:
      return run<Math::float32>(cell, norms, byte, digest);
  }
}

}  // namespace

#define LINKED(math)                                                                 \
  const Kernels& kernels_##math(Cell cell, bool norms) {                             \
    return norms ? linked<Math::math, true>(cell) : linked<Math::math, false>(cell); \
  }
LINKED(float16)
LINKED(bfloat16)
LINKED(tf32)
LINKED(float32)

int run_twice(Cell cell, bool norms) {
  Digest digests[2];
  for (int i = 0; i < 2; ++i) {
    if (const char* error = run_any(cell, norms, i ? 0x3C : 0xFF, digests[i])) {
      printf("%s\n", error);
      return 2;
    }
    if (digests[i].not_finite) {
      printf("%s is not finite\n", digests[i].not_finite);
      return 1;
    }
  }
  printf("%016llx\n", static_cast<unsigned long long>(digests[0].sum));
  return digests[0].sum != digests[1].sum;
}

int run_cell(const char* name) {
  int cell = 0;
  while (strcmp(kNames[cell], name) != 0) ++cell;
#ifdef ONLY_CELL
  return run_twice(static_cast<Cell>(cell), false);
#else
  const int plain = run_twice(static_cast<Cell>(cell), false);
  return plain ? plain : run_twice(static_cast<Cell>(cell), true);
#endif
}

}  // namespace fastrnn::cuda

int main(int, char** arguments) { return fastrnn::cuda::run_cell(arguments[1]); }
