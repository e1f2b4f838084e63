// The recurrence backward in time, all steps in one launch: each block owns hidden units, whose gradients of h and c
// stay with the thread that computes them; the gradients of the gates cross blocks, and stay behind for the weights'
// GEMMs.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/norm.h"

namespace fastrnn::cuda {
namespace {

// What the backward pass reads of one cell at one step, loaded before it waits for others,
// converted where it is used: a conversion before would wait for the load.
template <Math math, Cell cell>
struct Loaded {
  Element<math> slots[saved_slots(cell)], dy;
  float dc;                    // gradient of c from outside
  Element<math> h_previous;    // GRU; or c0, LSTM
  float c_previous;            // LSTM
  bool initial;                // the state before is the initial one
  uint8_t reset, reset_after;  // of this step and the one after
};

template <Cell cell>
struct KeptCell {
  float slots[saved_slots(cell)];
  float h_previous;  // GRU
  float c_previous;  // LSTM
};

template <Math math, Cell cell, bool norms>
FASTRNN_KERNEL void __launch_bounds__(kThreads, 1) backward_kernel(const __grid_constant__ Work<Backward> launch) {
  using T = Element<math>;
  constexpr bool kLstm = cell == Cell::lstm, kGru = is_gru(cell), kBefore = cell == Cell::gru_reset_before;
  constexpr int kGates = gate_count(cell), kSlots = saved_slots(cell);
  constexpr int kFirst = first_gates(cell);
  constexpr Variant kVariant = {math, cell, norms};
  constexpr Shape kProduct = backward_product(kVariant), kSecond = second_product(kVariant);
  using FirstNorms = Norms<kFirst, norm_split(cell)>;
  using LastNorms = Norms<1, 1>;

  const Backward& a = launch.directions[blockIdx.x / launch.blocks];
  const Problem& problem = a.problem;
  const Block block(blockIdx.x % launch.blocks, problem, launch.tile, launch.first_row);
  if (block.rows <= 0) return;
  const Share& share = block.share;
  const int64_t hidden = problem.hidden_size, padded = padded_size(hidden);
  const int tiles = (block.rows + kRowTile - 1) / kRowTile;
  const int state_count = launch.tile.rows * share.units;
  const int warp = threadIdx.x / kWarpSize;
  const bool normed = norms && problem.norm_hh.weight, normed_c = norms && kLstm && problem.norm_c.weight;
  const bool peephole = kLstm && problem.peephole != nullptr;
  const Zoneout zoneout(problem);

  float* const parts = reinterpret_cast<float*>(shared_memory());
  float* const dh_states = parts + parts_floats(launch.tile.unit_groups);
  float* const dc_states = dh_states + state_count;
  float* const sums = dh_states + (kLstm ? 2 : 1) * state_count;
  const int sum_count = gradient_sums(cell, normed, normed_c, peephole);
  const int norm_c_sums = normed ? 2 * kGates : 0, peephole_sums = norm_c_sums + (normed_c ? 2 : 0);
  Vec4* const shared_weights = reinterpret_cast<Vec4*>(sums + sum_count * state_count);
  const auto add = [&](int sum, const CellPlace& place, float value) {
    sums[sum * state_count + place.state] += value;
  };

  const int64_t unit_group = static_cast<int64_t>(block.slice) * launch.tile.unit_groups + share.unit_group;
  const int gate_chunks = static_cast<int>(padded / kChunk<math>);
  const Vec4* const packed = static_cast<const Vec4*>(a.packed_weight);
  const int parts_each = launch.tile.unit_groups, first_part = share.part * parts_each;
  const Product<math, kProduct.octets, kProduct.held, kProduct.ahead> product(
      packed + unit_group * kFirst * gate_chunks * kWarpSize, kFirst * gate_chunks, first_part, parts_each,
      shared_weights + warp * launch.shared_chunks[0] * kWarpSize, launch.shared_chunks[0]);
  // Of n's gradients, with the reset before the product. Of the other cells the compiler drops it.
  const Product<math, kSecond.octets, kSecond.held, kSecond.ahead> second(
      packed + (padded / kUnitGroup * kFirst + unit_group) * gate_chunks * kWarpSize, kBefore ? gate_chunks : 0,
      first_part, parts_each,
      shared_weights + (kWarps * launch.shared_chunks[0] + warp * launch.shared_chunks[1]) * kWarpSize,
      launch.shared_chunks[1]);

  // Backward in the order of steps: step s undoes the forward pass's step s.
  const auto time = [&](int64_t step) { return problem.reverse ? problem.steps - 1 - step : step; };
  T* const dproduct = static_cast<T*>(a.dproduct);
  const int64_t dproduct_row = kGates * padded;

  for (int tile = 0; tile < tiles; ++tile)
    for (int k = 0; k < kCells; ++k) {
      const CellPlace place(block, problem, tile, k);
      if (!place.exists) break;
      const int64_t index = place.b * hidden + place.unit;
      dh_states[place.state] = place.used ? at<T>(a.dh_n, index) : 0;
      if constexpr (kLstm) dc_states[place.state] = place.used ? at<T>(a.dc_n, index) : 0;
      for (int sum = 0; sum < sum_count; ++sum) sums[sum * state_count + place.state] = 0;
    }

  int parity = 0;
  const auto meet = [&](const auto& partial) {
    float* const to = parts + parity * (parts_floats(launch.tile.unit_groups) / 2);
    parity ^= 1;
    Parts<1>::put(to, share, partial);
    sync_block();
    return to;
  };

  // The step -1 only brings the gradients of the initial state.
  for (int64_t step = problem.steps - 1; step >= -1; --step) {
    const int64_t t = step < 0 ? 0 : time(step);
    const bool first = step == problem.steps - 1;
    if (step < 0 && !a.dh0 && !a.dc0) break;
    for (int tile = 0; tile < tiles; ++tile) {
      Loaded<math, cell> loaded[kCells];
      bool active[kCells];
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        active[k] = step >= 0 && place.used && is_active(problem, t, place.b);
        loaded[k] = {};
        if (place.used && !first) loaded[k].reset_after = reset_byte(problem, time(step + 1), place.b);
        if (!active[k]) continue;
        const T* saved = static_cast<const T*>(a.saved) + kept_row(problem, t, place.b) * kSlots * hidden + place.unit;
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) loaded[k].slots[slot] = saved[slot * hidden];
        if (a.dy) loaded[k].dy = static_cast<const T*>(a.dy)[row_offset(problem, a.dy_rows, t, place.b) + place.unit];
        if constexpr (kLstm || kGru) {
          // The state before the step: what the step before gave out, or the initial one.
          const int64_t index = place.b * hidden + place.unit;
          loaded[k].reset = reset_byte(problem, t, place.b);
          loaded[k].initial = step == 0 || !is_active(problem, time(step - 1), place.b);
          const void* const initial = kLstm ? a.c0 : a.h0;
          if (loaded[k].initial) {
            if (initial) loaded[k].h_previous = static_cast<const T*>(initial)[index];
          } else if constexpr (kLstm) {
            loaded[k].c_previous = a.c_all[row_offset(problem, a.c_rows, time(step - 1), place.b) + place.unit];
          } else {
            loaded[k].h_previous =
                static_cast<const T*>(a.y)[row_offset(problem, a.y_rows, time(step - 1), place.b) + place.unit];
          }
          if (kLstm && a.dc_all) loaded[k].dc = a.dc_all[row_offset(problem, a.dc_all_rows, t, place.b) + place.unit];
        }
      }

      const int64_t first_row = block.row_begin + tile * kRowTile;
      // What the step `at` handed over, or its gates from `gate` on.
      const auto product_of = [&](const auto& of, auto& partial, int64_t at, int gate) {
        const int rows = present_rows(problem, at, first_row, block.rows - tile * static_cast<int>(kRowTile));
        of.run(partial, dproduct + kept_row(problem, at, first_row) * dproduct_row + gate * padded, dproduct_row, rows);
      };
      float dh[kCells] = {}, dc[kCells] = {};
      const float* met = nullptr;
      if (!first) {
        typename decltype(product)::Sums partial;
        product_of(product, partial, time(step + 1), 0);
        met = meet(partial);
      }
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        if (!place.exists) continue;
        float through[1] = {};
        if (!first) Parts<1>::get(met, share, place.row_in_tile, place.unit_in_block, through);
        if (!place.used) continue;
        if (loaded[k].reset_after && is_active(problem, time(step + 1), place.b)) continue;
        dh[k] = dh_states[place.state] + through[0] * mask_of(problem, place.b, place.unit);
        if constexpr (kLstm) dc[k] = dc_states[place.state];
      }
      if (step < 0) {
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.used) continue;
          if (a.dh0) a.dh0[place.b * hidden + place.unit] = dh[k];
          if (kLstm && a.dc0) a.dc0[place.b * hidden + place.unit] = dc[k];
        }
        continue;
      }

      KeptCell<cell> kept[kCells];
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) kept[k].slots[slot] = to_float(loaded[k].slots[slot]);
        const float initial_or_h = loaded[k].reset ? 0 : to_float(loaded[k].h_previous);
        kept[k].h_previous = initial_or_h;
        kept[k].c_previous = loaded[k].initial ? initial_or_h : loaded[k].reset ? 0 : loaded[k].c_previous;
      }

      // dh, dc: of the state after the step; then of what the cell made, and `old_..` of the state before.
      float old_h[kCells], old_c[kCells], tanh_c[kCells] = {};
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        old_h[k] = old_c[k] = 0;
        if (!active[k]) {  // the state stood still
          old_h[k] = dh[k];
          old_c[k] = dc[k];
          dh[k] = dc[k] = 0;
          continue;
        }
        dh[k] += to_float(loaded[k].dy);
        dc[k] += loaded[k].dc;
        old_h[k] = zoneout.split(0, t, place.b, place.unit, dh[k]);
        if constexpr (kLstm) old_c[k] = zoneout.split(1, t, place.b, place.unit, dc[k]);
      }

      if constexpr (kLstm) {
        if (normed_c) {
          float gradients[kCells][1] = {}, values[kCells][1] = {};
#pragma unroll
          for (int k = 0; k < kCells; ++k) {
            const CellPlace place(block, problem, tile, k);
            if (!place.exists) continue;
            if (active[k]) {
              const float (&s)[kSlots] = kept[k].slots;
              const float* moments = a.deviations + kept_row(problem, t, place.b) * 4 + 2;
              const float weight = problem.norm_c.weight[place.unit];
              values[k][0] = (s[1] * kept[k].c_previous + s[0] * s[2] - moments[0]) * moments[1];
              tanh_c[k] = tanh(values[k][0] * weight + problem.norm_c.bias[place.unit]);
              const float gradient = dh[k] * s[3] * (1 - tanh_c[k] * tanh_c[k]);
              add(norm_c_sums, place, gradient * values[k][0]);
              add(norm_c_sums + 1, place, gradient);
              gradients[k][0] = gradient * weight;
            }
            LastNorms::put_gradient(RowExchange(a.stats, 1, t, place.b, problem), place, gradients[k], values[k]);
          }
#pragma unroll
          for (int k = 0; k < kCells; ++k) {
            const CellPlace place(block, problem, tile, k);
            if (!place.exists) continue;
            const float deviation = active[k] ? a.deviations[kept_row(problem, t, place.b) * 4 + 3] : 0;
            LastNorms::get_gradient(RowExchange(a.stats, 1, t, place.b, problem), place, values[k], {deviation, 0},
                                    gradients[k]);
            if (active[k]) dc[k] += gradients[k][0];
          }
        }
      }

      // Gradients of the gates' pre-activations: of W_ih x, and of W_hh h (behind its norm).
      float dgates[kCells][kGates], dnormed[kCells][kGates];
#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) dgates[k][gate] = dnormed[k][gate] = 0;
        if (!active[k]) continue;
        const float (&s)[kSlots] = kept[k].slots;
        if constexpr (kLstm) {
          LstmGates<float> gates = {s[0], s[1], s[2], s[3]};
          const float c_previous = kept[k].c_previous;
          if (!normed_c) tanh_c[k] = lstm_output_backward(gates, c_previous, dh[k], dc[k]);
          if (peephole) {
            const float* p = problem.peephole + place.unit;
            const float fresh_c = s[1] * c_previous + s[0] * s[2];
            lstm_peephole_gate_gradients(gates, {p[0], p[hidden], p[2 * hidden]}, c_previous, tanh_c[k], dh[k], dc[k]);
            add(peephole_sums, place, gates.i * c_previous);
            add(peephole_sums + 1, place, gates.f * c_previous);
            add(peephole_sums + 2, place, gates.o * fresh_c);
          } else {
            lstm_gate_gradients(gates, c_previous, tanh_c[k], dh[k], dc[k]);
          }
          dgates[k][0] = gates.i;
          dgates[k][1] = gates.f;
          dgates[k][2] = gates.g;
          dgates[k][3] = gates.o;
          dh[k] = 0;
        } else if constexpr (cell == Cell::gru) {
          GruGates<float> gates = {s[0], s[1], s[2], s[3]};
          gru_backward(gates, kept[k].h_previous, dh[k]);
          dgates[k][0] = gates.r;
          dgates[k][1] = gates.z;
          dgates[k][2] = gates.n;
          dnormed[k][2] = gates.h_n;
        } else if constexpr (kBefore) {
          float z = s[1], n = s[2];
          gru_reset_before_backward(z, n, kept[k].h_previous, dh[k]);
          dgates[k][1] = z;
          dgates[k][2] = n;
        } else {
          dgates[k][0] = rnn_backward<cell>(s[0], dh[k]);
          dh[k] = 0;
        }
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          if (cell != Cell::gru || gate < 2) dnormed[k][gate] = dgates[k][gate];
      }

      // The gradient of W_hh h itself goes to the other blocks. `begin`, `end`: gates; `phase`: of the statistics.
      const auto hand_over = [&](auto kind, auto begin_count, auto count, int phase) {
        using TheseNorms = decltype(kind);
        constexpr int begin = decltype(begin_count)::value, n = decltype(count)::value;
        float gradients[kCells][n], values[kCells][n];
        if (normed) {
#pragma unroll
          for (int k = 0; k < kCells; ++k) {
            const CellPlace place(block, problem, tile, k);
            if (!place.exists) continue;
#pragma unroll
            for (int i = 0; i < n; ++i) {
              const int64_t column = (begin + i) * hidden + place.unit;
              gradients[k][i] = values[k][i] = 0;
              if (!active[k]) continue;
              values[k][i] = at<T>(a.norm_saved, kept_row(problem, t, place.b) * kGates * hidden + column);
              add(begin + i, place, dnormed[k][begin + i] * values[k][i]);
              add(kGates + begin + i, place, dnormed[k][begin + i]);
              gradients[k][i] = dnormed[k][begin + i] * problem.norm_hh.weight[column];
            }
            TheseNorms::put_gradient(RowExchange(a.stats, phase, t, place.b, problem), place, gradients[k], values[k]);
          }
        }
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          if (normed) {
            float deviations[2] = {};
            if (active[k]) {
              const float* found = a.deviations + kept_row(problem, t, place.b) * 4 + (begin == 2);
              deviations[0] = found[0];
              if constexpr (TheseNorms::kGroups == 2) deviations[1] = found[1];
            }
            TheseNorms::get_gradient(RowExchange(a.stats, phase, t, place.b, problem), place, values[k], deviations,
                                     gradients[k]);
          }
          T* const row = dproduct + kept_row(problem, t, place.b) * dproduct_row;
          const bool present = place.has_row && is_present(problem, t, place.b);
#pragma unroll
          for (int i = 0; i < n; ++i)
            publish(row + (begin + i) * padded, place.unit,
                    !active[k] ? 0
                    : normed   ? gradients[k][i]
                               : dnormed[k][begin + i],
                    present);
        }
      };

      if constexpr (kBefore) {
        hand_over(LastNorms(), Count<2>(), Count<1>(), 1);
        typename decltype(second)::Sums partial;
        product_of(second, partial, t, 2);
        met = meet(partial);
#pragma unroll
        for (int k = 0; k < kCells; ++k) {
          const CellPlace place(block, problem, tile, k);
          if (!place.exists) continue;
          float drh[1];
          Parts<1>::get(met, share, place.row_in_tile, place.unit_in_block, drh);
          if (!active[k]) continue;
          const float mask = mask_of(problem, place.b, place.unit), r = kept[k].slots[0];
          dgates[k][0] = dnormed[k][0] = gru_reset_gradient(r, kept[k].h_previous * mask, drh[0]);
          dh[k] += drh[0] * r * mask;
        }
      }
      hand_over(FirstNorms(), Count<0>(), Count<kFirst>(), 0);

#pragma unroll
      for (int k = 0; k < kCells; ++k) {
        const CellPlace place(block, problem, tile, k);
        if (!place.exists) continue;
        if (a.dgates_x && (active[k] || (place.used && !problem.row_starts))) {
          T* row = static_cast<T*>(a.dgates_x) + row_offset(problem, a.dgates_x_rows, t, place.b) + place.unit;
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) row[gate * hidden] = from_float<T>(dgates[k][gate]);
        }
        dh_states[place.state] = dh[k] + old_h[k];
        if constexpr (kLstm) dc_states[place.state] = dc[k] + old_c[k];
      }
    }
  }

  if (!a.sums) return;
  for (int tile = 0; tile < tiles; ++tile)
    for (int k = 0; k < kCells; ++k) {
      const CellPlace place(block, problem, tile, k);
      if (!place.used) continue;
      for (int sum = 0; sum < sum_count; ++sum)
        a.sums[(sum * problem.batch + place.b) * hidden + place.unit] = sums[sum * state_count + place.state];
    }
}

}  // namespace
}  // namespace fastrnn::cuda
