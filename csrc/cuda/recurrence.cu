#include <cstdio>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/product.h"
#include "cuda/recurrence.h"

namespace fastrnn::cuda {
namespace {

// Weights [G*H, H] in the order in which Product reads them, padded with zeros: for each group of 8 units and each
// chunk of K the 16 bytes of each lane, one after another for the gates `first` .. `first + gates - 1`. Forward a row
// is a gate of a unit and K the previous h; backward a row is a unit of h and K all units of one gate after another.
template <Math math>
FASTRNN_KERNEL void pack_weights(const Element<math>* weight, void* packed, int64_t hidden, int first, int gates,
                                 bool backward) {
  using T = Element<math>;
  constexpr int kLaneChunk = kChunk<math> / 4;
  union Piece {
    Vec4 words;
    T elements[kLaneChunk];
  };
  const int64_t padded = padded_size(hidden), chunks = padded / kChunk<math>;
  const int64_t pieces = padded / kUnitGroup * chunks * gates * kWarpSize;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < pieces;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int lane = i % kWarpSize;
    const int64_t rest = i / kWarpSize;
    // Forward [unit group][chunk][gate], backward [unit group][gate][chunk].
    const int64_t gate = first + (backward ? rest / chunks % gates : rest % gates);
    const int64_t chunk = backward ? rest % chunks : rest / gates % chunks;
    const int64_t unit = rest / (chunks * gates) * kUnitGroup + lane / 4;
    Piece piece;
    for (int e = 0; e < kLaneChunk; ++e) {
      const int64_t k = chunk * kChunk<math> + lane % 4 * kLaneChunk + e;
      const int64_t row = gate * hidden + (backward ? k : unit), column = backward ? unit : k;
      const float value = unit < hidden && k < hidden ? to_float(weight[row * hidden + column]) : 0;
      piece.elements[e] = from_float<T>(math == Math::tf32 ? bits_float(round_to_tf32(value)) : value);
    }
    static_cast<Vec4*>(packed)[i] = piece.words;
  }
}

const Kernels& kernels_of(const Variant& variant) {
  const auto [math, cell, norms] = variant;
  switch (math) {
    case Math::float16:
      return kernels_float16(cell, norms);
    case Math::bfloat16:
      return kernels_bfloat16(cell, norms);
    case Math::tf32:
      return kernels_tf32(cell, norms);
    default:
      return kernels_float32(cell, norms);
  }
}

template <Math math>
const char* pack(const Problem& problem, const void* weight, void* packed, bool backward, void* stream) {
  const int gates = gate_count(problem.cell), first = first_gates(problem.cell);
  const int64_t padded = padded_size(problem.hidden_size);
  const Launch launch_with = {256, 256, 0, false, 1, stream};
  const auto* from = static_cast<const Element<math>*>(weight);
  const char* error = launch(pack_weights<math>, launch_with, from, packed, problem.hidden_size, 0, first, backward);
  if (error || gates == first) return error;
  return launch(pack_weights<math>, launch_with, from,
                static_cast<char*>(packed) + first * padded * padded * element_size(math), problem.hidden_size, first,
                gates - first, backward);
}

const char* pack_any(const Problem& problem, const void* weight, void* packed, bool backward, void* stream) {
  switch (problem.math) {
    case Math::float16:
      return pack<Math::float16>(problem, weight, packed, backward, stream);
    case Math::bfloat16:
      return pack<Math::bfloat16>(problem, weight, packed, backward, stream);
    case Math::tf32:
      return pack<Math::tf32>(problem, weight, packed, backward, stream);
    default:
      return pack<Math::float32>(problem, weight, packed, backward, stream);
  }
}

struct Plan {
  int64_t shared_bytes, streamed_bytes;
  int shared_chunks[2];
};

// Shared memory goes to parts and states first; weights that registers do not hold get what is left.
Plan plan(const Variant& variant, int64_t hidden_size, const Tile& tile, const Shape& product, int states,
          int64_t limit) {
  const int64_t chunks = padded_size(hidden_size) * element_size(variant.math) / 64;
  Plan found = {};
  found.shared_bytes = 4 * (parts_floats(tile.unit_groups) + states * tile.rows * kUnitGroup * tile.unit_groups);
  const Shape shapes[2] = {product, second_product(variant)};
  for (int i = 0; i < (variant.cell == Cell::gru_reset_before ? 2 : 1); ++i) {
    const int64_t of_warp = tile.unit_groups * ((shapes[i].depths * chunks + kParts - 1) / kParts);
    const int64_t wanted = of_warp > shapes[i].held ? of_warp - shapes[i].held : 0;
    const int64_t bytes = kWarps * shapes[i].octets * kWarpSize * static_cast<int64_t>(sizeof(Vec4));  // of one chunk
    const int64_t room = limit > found.shared_bytes ? (limit - found.shared_bytes) / bytes : 0;
    found.shared_chunks[i] = static_cast<int>(wanted < room ? wanted : room);
    found.shared_bytes += found.shared_chunks[i] * bytes;
    found.streamed_bytes += (wanted - found.shared_chunks[i]) * bytes;
  }
  return found;
}

Plan plan_of(const Forward*, const Variant& variant, int64_t hidden_size, const Tile& tile, int, int64_t limit) {
  return plan(variant, hidden_size, tile, forward_product(variant), forward_states(variant.cell), limit);
}
Plan plan_of(const Backward*, const Variant& variant, int64_t hidden_size, const Tile& tile, int sums, int64_t limit) {
  return plan(variant, hidden_size, tile, backward_product(variant), backward_states(variant.cell, sums), limit);
}

int sums_of(const Problem& problem) {
  return gradient_sums(problem.cell, problem.norm_hh.weight, problem.norm_c.weight, problem.peephole);
}

auto kernel_of(const Forward*, const Kernels& kernels) { return kernels.forward; }
auto kernel_of(const Backward*, const Kernels& kernels) { return kernels.backward; }

// Valid until the next failure in this thread.
template <class... Values>
const char* failure(const char* format, Values... values) {
  thread_local char text[256];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

// Fills what the kernel exchanges through, packs the weights, and runs the kernel over as many rows at a time as fit.
template <class Direction>
const char* run(const Direction* directions, int count, const Tile& tile, void* stream) {
  const Problem& problem = directions[0].problem;
  Limits device;
  if (const char* error = limits(device)) return error;
  const Variant variant = {problem.math, problem.cell, problem.norm_hh.weight || problem.norm_c.weight};
  const Plan planned = plan_of(directions, variant, problem.hidden_size, tile, sums_of(problem), device.shared_bytes);
  if (planned.shared_bytes > device.shared_bytes)
    return failure("%d rows of %d units need %lld bytes of shared memory; a block has %lld", tile.rows,
                   tile.unit_groups * static_cast<int>(kUnitGroup), static_cast<long long>(planned.shared_bytes),
                   static_cast<long long>(device.shared_bytes));
  const auto kernel = kernel_of(directions, kernels_of(variant));
  int resident;
  if (const char* error = resident_blocks(kernel, kThreads, planned.shared_bytes, resident)) return error;
  const int64_t of_group = count * slices(problem.hidden_size, tile);
  if (of_group > resident)
    return failure("hidden size %lld needs %lld blocks at once; the device holds %d",
                   static_cast<long long>(problem.hidden_size), static_cast<long long>(of_group), resident);

  Work<Direction> work = {};
  work.tile = tile;
  for (int i = 0; i < 2; ++i) work.shared_chunks[i] = planned.shared_chunks[i];
  const int64_t values = problem.rows * padded_size(problem.hidden_size) * element_size(problem.math);
  for (int i = 0; i < count; ++i) {
    const Direction& direction = directions[i];
    work.directions[i] = direction;
    const char* error = nullptr;
    if constexpr (std::is_same_v<Direction, Forward>) {
      error = fill(direction.h_in, 0xFF, values, stream);
      if (!error && direction.rh) error = fill(direction.rh, 0xFF, values, stream);
    } else {
      error = fill(direction.dproduct, 0xFF, gate_count(problem.cell) * values, stream);
    }
    if (!error && direction.stats)
      error = fill(direction.stats, 0xFF, stats_bytes(problem.steps, problem.batch, problem.hidden_size), stream);
    if (!error)
      error =
          pack_any(problem, direction.weight_hh, direction.packed_weight, std::is_same_v<Direction, Backward>, stream);
    if (error) return error;
  }
  const int64_t groups_at_once = resident / of_group;
  const int64_t rows_at_once = groups_at_once * tile.rows;
  for (int64_t row = 0; row < problem.batch; row += rows_at_once) {
    const int64_t left = (problem.batch - row + tile.rows - 1) / tile.rows;
    const int64_t groups = left < groups_at_once ? left : groups_at_once;
    work.first_row = row;
    work.blocks = static_cast<int>(groups * slices(problem.hidden_size, tile));
    const Launch with = {count * work.blocks, kThreads, planned.shared_bytes, true, 1, stream};
    if (const char* error = launch(kernel, with, work)) return error;
  }
  return nullptr;
}

}  // namespace

const char* recurrence_forward(const Forward* directions, int count, const Tile& tile, void* stream) {
  return run(directions, count, tile, stream);
}

const char* recurrence_backward(const Backward* directions, int count, const Tile& tile, void* stream) {
  return run(directions, count, tile, stream);
}

const char* device_limits(DeviceLimits& found) {
  Limits device;
  const char* error = limits(device);
  if (!error) found = {device.multiprocessors, device.shared_bytes, device.capability};
  return error;
}

const char* recurrence_fit(Cell cell, Math math, int64_t hidden_size, const Tile& tile, bool norms, bool backward,
                           Fit& fit) {
  Limits device;
  if (const char* error = limits(device)) return error;
  const Variant variant = {math, cell, norms};
  const Kernels& kernels = kernels_of(variant);
  const auto found = [&](const auto* direction) {
    const Plan planned = plan_of(direction, variant, hidden_size, tile, 0, device.shared_bytes);
    fit.blocks_needed = static_cast<int>(slices(hidden_size, tile));
    fit.shared_bytes = planned.shared_bytes;
    fit.streamed_bytes = planned.streamed_bytes;
    return resident_blocks(kernel_of(direction, kernels), kThreads, planned.shared_bytes, fit.blocks_at_once);
  };
  return backward ? found(static_cast<const Backward*>(nullptr)) : found(static_cast<const Forward*>(nullptr));
}

}  // namespace fastrnn::cuda
