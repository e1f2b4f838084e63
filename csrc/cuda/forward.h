// The recurrence forward, all steps in one launch: each block owns hidden units with all their gates, so that c and the
// exact h stay with the thread that computed them and only rounded h crosses blocks.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/norm.h"

namespace fastrnn::cuda {
namespace {

template <Math math, Cell cell, bool norms>
FASTRNN_KERNEL void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Work<Forward> launch) {
  using T = Element<math>;
  constexpr bool kLstm = cell == Cell::lstm, kBefore = cell == Cell::gru_reset_before;
  constexpr int kGates = gate_count(cell), kFirst = first_gates(cell), kSlots = saved_slots(cell);
  constexpr Variant kVariant = {math, cell, norms};
  constexpr Shape kProduct = forward_product(kVariant), kSecond = second_product(kVariant);
  using FirstNorms = Norms<kFirst, norm_split(cell)>;
  using LastNorms = Norms<1, 1>;  // of c, or of n

  const Forward& a = launch.directions[blockIdx.x / launch.blocks];
  const Problem& problem = a.problem;
  const Block block(blockIdx.x % launch.blocks, problem, launch.tile, launch.first_row);
  if (block.rows <= 0) return;
  const Share& share = block.share;
  const int64_t hidden = problem.hidden_size, padded = padded_size(hidden);
  const int tiles = (block.rows + kRowTile - 1) / kRowTile;
  const int chunks = static_cast<int>(padded / kChunk<math>), warp = threadIdx.x / kWarpSize;
  const Zoneout zoneout(problem);

  float* const parts = reinterpret_cast<float*>(shared_memory());
  float* const h_states = parts + parts_floats(launch.tile.unit_groups);
  float* const c_states = h_states + launch.tile.rows * share.units;
  Vec4* const shared_weights =
      reinterpret_cast<Vec4*>(h_states + forward_states(cell) * launch.tile.rows * share.units);

  // This warp's unit group and its part of K.
  const int64_t unit_group = static_cast<int64_t>(block.slice) * launch.tile.unit_groups + share.unit_group;
  const Vec4* const packed = static_cast<const Vec4*>(a.packed_weight);
  const int parts_each = launch.tile.unit_groups, first_part = share.part * parts_each;
  const Product<math, kProduct.octets, kProduct.held, kProduct.ahead> product(
      packed + unit_group * chunks * kFirst * kWarpSize, chunks, first_part, parts_each,
      shared_weights + warp * launch.shared_chunks[0] * kFirst * kWarpSize, launch.shared_chunks[0]);
  // Of the other cells the compiler drops it.
  const Product<math, kSecond.octets, kSecond.held, kSecond.ahead> second(
      packed + (padded / kUnitGroup * kFirst + unit_group) * chunks * kWarpSize, kBefore ? chunks : 0, first_part,
      parts_each,
      shared_weights + (kWarps * launch.shared_chunks[0] * kFirst + warp * launch.shared_chunks[1]) * kWarpSize,
      launch.shared_chunks[1]);

  const auto time = [&](int64_t step) { return problem.reverse ? problem.steps - 1 - step : step; };
  // What meets the weights at step t.
  const auto publish_state = [&](int64_t t, const CellPlace& place, float h) {
    const float masked = place.used ? h * mask_of(problem, place.b, place.unit) : 0;
    publish(static_cast<T*>(a.h_in) + kept_row(problem, t, place.b) * padded, place.unit, masked,
            place.has_row && is_present(problem, t, place.b));
  };

  for (int tile = 0; tile < tiles; ++tile)
    for (int k = 0; k < kCells; ++k) {
      const CellPlace place(block, problem, tile, k);
      if (!place.exists) break;
      const bool zero = !place.used || is_reset(problem, time(0), place.b);
      const float h = zero ? 0 : at<T>(a.h0, place.b * hidden + place.unit);
      h_states[place.state] = h;
      if constexpr (kLstm) c_states[place.state] = zero ? 0 : at<T>(a.c0, place.b * hidden + place.unit);
      publish_state(time(0), place, h);
    }

  int parity = 0;
  // The parts' place for a product, behind whose barrier all of them are there.
  const auto meet = [&](const auto& sums, auto octets) {
    constexpr int kOctets = decltype(octets)::value;
    float* const to = parts + parity * (parts_floats(launch.tile.unit_groups) / 2);
    parity ^= 1;
    Parts<kOctets>::put(to, share, sums);
    sync_block();
    return to;
  };

  for (int64_t step = 0; step < problem.steps; ++step) {
    const int64_t t = time(step);
    const bool last = step + 1 == problem.steps;
    for (int tile = 0; tile < tiles; ++tile) {
      // Loads that need nobody's result come before the wait for others.
      T raw_x[kCells][kGates];  // converted where they are used: a conversion here would wait for the load
      uint8_t reset_next[kCells];
      bool active[kCells];
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        active[k] = place.used && is_active(problem, t, place.b);
        reset_next[k] = place.used && !last ? reset_byte(problem, time(step + 1), place.b) : 0;
        const T* row = static_cast<const T*>(a.gates_x);
        if (active[k]) row += row_offset(problem, a.gates_x_rows, t, place.b) + place.unit;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) raw_x[k][gate] = active[k] ? row[gate * hidden] : T{};
      }

      const int64_t first = block.row_begin + tile * kRowTile, first_row = kept_row(problem, t, first);
      const int rows = present_rows(problem, t, first, block.rows - tile * static_cast<int>(kRowTile));
      float pre[kCells][kFirst];
      {
        typename decltype(product)::Sums sums;
        product.run(sums, static_cast<const T*>(a.h_in) + first_row * padded, padded, rows);
        const float* met = meet(sums, Count<kFirst>());
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (place.exists) Parts<kFirst>::get(met, share, place.row_in_tile, place.unit_in_block, pre[k]);
        }
      }

      float x[kCells][kGates];
#pragma unroll
      for (int k = 0; k < kCells; ++k)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) x[k][gate] = to_float(raw_x[k][gate]);

      if (norms && problem.norm_hh.weight) {
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (place.exists) FirstNorms::put(RowExchange(a.stats, 0, t, place.b, problem), place, pre[k]);
        }
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          float means[2], deviations[2];
          FirstNorms::get(RowExchange(a.stats, 0, t, place.b, problem), place, pre[k], means, deviations);
          if (!active[k]) continue;
          const int64_t row = kept_row(problem, t, place.b);
          if (a.deviations && place.unit == 0) {
            a.deviations[row * 4] = deviations[0];
            if (FirstNorms::kGroups == 2) a.deviations[row * 4 + 1] = deviations[1];
          }
#pragma unroll
          for (int gate = 0; gate < kFirst; ++gate) {
            const int64_t column = gate * hidden + place.unit;
            if (a.norm_saved)
              static_cast<T*>(a.norm_saved)[row * kGates * hidden + column] = from_float<T>(pre[k][gate]);
            pre[k][gate] = pre[k][gate] * problem.norm_hh.weight[column] + problem.norm_hh.bias[column];
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
#pragma unroll
        for (int gate = 0; gate < kFirst; ++gate)
          if (place.used) pre[k][gate] += at<float>(a.bias_hh, gate * hidden + place.unit);
      }

      // n of the GRU whose reset comes before the product.
      float late[kCells] = {};
      if constexpr (kBefore) {
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          const float masked = place.used ? h_states[place.state] * mask_of(problem, place.b, place.unit) : 0;
          const float r = sigmoid(x[k][0] + pre[k][0]);
          publish(static_cast<T*>(a.rh) + kept_row(problem, t, place.b) * padded, place.unit,
                  place.used ? r * masked : 0, place.has_row && is_present(problem, t, place.b));
        }
        typename decltype(second)::Sums sums;
        second.run(sums, static_cast<const T*>(a.rh) + first_row * padded, padded, rows);
        const float* met = meet(sums, Count<1>());
        float n[kCells][1];
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          Parts<1>::get(met, share, place.row_in_tile, place.unit_in_block, n[k]);
          if (norms && problem.norm_hh.weight)
            LastNorms::put(RowExchange(a.stats, 1, t, place.b, problem), place, n[k]);
        }
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          const int64_t column = 2 * hidden + place.unit;
          if (norms && problem.norm_hh.weight) {
            float means[2], deviations[2];
            LastNorms::get(RowExchange(a.stats, 1, t, place.b, problem), place, n[k], means, deviations);
            if (active[k]) {
              const int64_t row = kept_row(problem, t, place.b);
              if (a.deviations && place.unit == 0) a.deviations[row * 4 + 1] = deviations[0];
              if (a.norm_saved) static_cast<T*>(a.norm_saved)[row * kGates * hidden + column] = from_float<T>(n[k][0]);
              n[k][0] = n[k][0] * problem.norm_hh.weight[column] + problem.norm_hh.bias[column];
            }
          }
          late[k] = place.used ? n[k][0] + at<float>(a.bias_hh, column) : 0;
        }
      }

      // The cells. fresh: h before zoneout.
      float fresh[kCells], fresh_c[kCells] = {}, keep[kCells][kSlots];
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        if (!place.exists) continue;
        const float h = h_states[place.state];
        if constexpr (kLstm) {
          LstmGates<float> gates = {x[k][0] + pre[k][0], x[k][1] + pre[k][1], x[k][2] + pre[k][2], x[k][3] + pre[k][3]};
          fresh_c[k] = c_states[place.state];
          if (problem.peephole && place.used) {
            const float* p = problem.peephole + place.unit;
            lstm_peephole_cell_state(gates, {p[0], p[hidden], p[2 * hidden]}, fresh_c[k]);
          } else {
            lstm_cell_state(gates, fresh_c[k]);
          }
          keep[k][0] = gates.i;
          keep[k][1] = gates.f;
          keep[k][2] = gates.g;
          keep[k][3] = gates.o;
        } else if constexpr (cell == Cell::gru) {
          const float r = sigmoid(x[k][0] + pre[k][0]), z = sigmoid(x[k][1] + pre[k][1]);
          const float n = tanh(x[k][2] + r * pre[k][2]);
          keep[k][0] = r;
          keep[k][1] = z;
          keep[k][2] = n;
          keep[k][3] = pre[k][2];
          fresh[k] = gru_output(z, n, h);
        } else if constexpr (kBefore) {
          keep[k][0] = sigmoid(x[k][0] + pre[k][0]);
          keep[k][1] = sigmoid(x[k][1] + pre[k][1]);
          keep[k][2] = tanh(x[k][2] + late[k]);
          fresh[k] = gru_output(keep[k][1], keep[k][2], h);
        } else {
          fresh[k] = rnn_forward<cell>(x[k][0] + pre[k][0]);
          keep[k][0] = fresh[k];
        }
      }

      if constexpr (kLstm) {
        float seen[kCells][1];  // c as the output sees it
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          seen[k][0] = fresh_c[k];
          if (norms && problem.norm_c.weight)
            LastNorms::put(RowExchange(a.stats, 1, t, place.b, problem), place, seen[k]);
        }
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          if (norms && problem.norm_c.weight) {
            float means[2], deviations[2];
            LastNorms::get(RowExchange(a.stats, 1, t, place.b, problem), place, seen[k], means, deviations);
            if (active[k]) {
              if (a.deviations && place.unit == 0) {
                const int64_t row = kept_row(problem, t, place.b);
                a.deviations[row * 4 + 2] = means[0];
                a.deviations[row * 4 + 3] = deviations[0];
              }
              seen[k][0] = seen[k][0] * problem.norm_c.weight[place.unit] + problem.norm_c.bias[place.unit];
            }
          }
          fresh[k] = lstm_output(keep[k][3], seen[k][0]);
        }
      }

#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        if (!place.exists) continue;
        const float h_old = h_states[place.state];
        float h = active[k] ? zoneout.apply(0, t, place.b, place.unit, fresh[k], h_old) : h_old;
        float c = 0;
        if constexpr (kLstm) {
          const float c_old = c_states[place.state];
          c = active[k] ? zoneout.apply(1, t, place.b, place.unit, fresh_c[k], c_old) : c_old;
        }
        if (place.used && last) {
          static_cast<T*>(a.h_n)[place.b * hidden + place.unit] = from_float<T>(h);
          if constexpr (kLstm) static_cast<T*>(a.c_n)[place.b * hidden + place.unit] = from_float<T>(c);
        }
        const bool reset = reset_next[k] && is_active(problem, time(step + 1), place.b);
        const float h_next = reset ? 0 : h;
        if (!last) publish_state(time(step + 1), place, h_next);  // first of all: others wait for it
        if (active[k] || (place.used && !problem.row_starts)) {
          static_cast<T*>(a.y)[row_offset(problem, a.y_rows, t, place.b) + place.unit] =
              from_float<T>(active[k] ? h : 0);
          if (kLstm && a.c_all) a.c_all[row_offset(problem, a.c_rows, t, place.b) + place.unit] = active[k] ? c : 0;
        }
        if (active[k] && a.saved) {
          T* row = static_cast<T*>(a.saved) + kept_row(problem, t, place.b) * kSlots * hidden + place.unit;
#pragma unroll
          for (int slot = 0; slot < kSlots; ++slot) row[slot * hidden] = from_float<T>(keep[k][slot]);
        }
        h_states[place.state] = h_next;
        if constexpr (kLstm) c_states[place.state] = reset ? 0 : c;
      }
    }
  }
}

}  // namespace
}  // namespace fastrnn::cuda
