// The forward recurrence over a whole sequence. Each thread owns a range of hidden units with all their gates: it
// projects its part of a chunk of inputs, then walks the chunk's steps; only h crosses threads, one barrier a step.
#pragma once

#include "cpu/norm.h"
#include "cpu/zoneout.h"

namespace fastrnn {
namespace {

// Rows of a layout that hold one chunk of input projections: 64 to 256 measured equal, the whole sequence 3-10 %
// slower.
constexpr int64_t kChunkRows = 128;

// K per pass over a panel: short sums round less, long ones cost less (512 against 256: 1 %). The LSTM's gates damp the
// error of the sums; the RNN's would be beyond twice torch's at 1024.
template <Cell cell>
constexpr int64_t kDepth = cell == Cell::lstm ? 512 : 256;

// With at most kFewRows rows the pointwise part waits for kGroup panels.
constexpr int64_t kFewRows = 2, kGroup = 8;

// How the work of a call is dealt out: by hidden units (a barrier each step), or, where there are too few of them, by
// rows of the batch (no barrier).
struct Deal {
  bool by_rows;
  int64_t slots;
};

inline Deal deal_recurrence(const Problem& problem, int64_t panels, int threads) {
  const double step_flops =
      2.0 * gate_count(problem.cell) * problem.batch * problem.hidden_size * (problem.hidden_size + problem.input_size);
  // A slot must have a step's work well above the barrier (50 ns, about 15k FLOP on one core).
  const int64_t worth = larger(1, static_cast<int64_t>(step_flops / 120e3));
  if (panels >= threads && worth >= 2) return {false, smaller(smaller(threads, worth), panels)};
  const int64_t by_rows =
      smaller(smaller(threads, problem.batch), larger(1, static_cast<int64_t>(step_flops * problem.steps / 1e6)));
  return {by_rows > 1, by_rows};
}

inline int64_t padded(int64_t size) {
  // A leading dimension that is a multiple of 4 KB would map all rows to the same cache sets.
  const int64_t rounded = ceil_div(size, kLanes) * kLanes;
  return rounded % 1024 == 0 ? rounded + 16 : rounded;
}

// Where the RNN keeps what it put out before zoneout: [rows, units rounded up to lanes].
template <class Float>
inline Float* saved_output(const Problem& problem, Float* saved, int64_t t, int64_t i) {
  return saved + (problem.row_base[t] + i) * ceil_div(problem.hidden_size, kLanes) * kLanes;
}

inline LstmPeephole<Vec> peephole_at(const float* peephole, int64_t hidden_size, int64_t unit) {
  auto at = [&](int gate) { return load(peephole + gate * hidden_size + unit, hidden_size - unit); };
  return {at(0), at(1), at(2)};
}

template <Cell cell>
class Forward {
  using P = Panel<cell>;
  static constexpr bool kLstm = cell == Cell::lstm, kResetBefore = cell == Cell::gru_reset_before;
  static constexpr int kMaxRows = max_rows<P::NV>();
  static constexpr int kGroups = group_count<cell>();
  static constexpr int kOutputs = Panel<Cell::rnn_tanh>::kUnits;  // of a panel of W_hr
  static constexpr bool kRounded = kPerWord > 1;                  // h is rounded where it meets W_hh

 public:
  Forward(const Problem& problem, const ForwardArgs& args, int threads)
      : problem_(problem),
        args_(args),
        panels_(P::count(problem.hidden_size)),
        deal_(deal_recurrence(problem, panels_, threads)),
        barrier_(deal_.slots),
        h_stride_(padded(problem.output_size)),
        c_stride_(padded(problem.hidden_size)),
        operand_stride_(padded(words(problem.output_size))),
        outputs_(ceil_div(problem.output_size, kOutputs)),
        x_stride_(padded(words(problem.input_size))),
        block_rows_(larger(1, smaller(problem.row_base[problem.steps], kChunkRows))),
        slot_panels_(deal_.by_rows ? panels_ : ceil_div(panels_, deal_.slots)),
        slot_floats_(slot_panels_ * P::kWidth * (block_rows_ * (norms() ? 2 : 1) + 1) + slot_panels_ * P::kUnits +
                     block_rows_ * x_stride_),
        zoneout_(problem),
        h_(2 * problem.batch * h_stride_),
        operand_(has_operand() ? 2 * problem.batch * operand_stride_ : 0),
        c_(kLstm || kResetBefore ? problem.batch * c_stride_ : 0),
        unprojected_(args.weight_hr ? problem.batch * padded(words(problem.hidden_size)) : 0),
        reset_h_(kResetBefore ? problem.batch * operand_stride_ : 0),
        parts_hh_(args.norm_hh.weight ? problem.batch : 0, kGroups, problem.hidden_size),
        parts_ih_(args.norm_ih.weight ? (deal_.by_rows ? deal_.slots : 1) * block_rows_ : 0, kGroups,
                  problem.hidden_size),
        parts_c_(args.norm_c.weight ? problem.batch : 0, 1, problem.hidden_size),
        scratch_(deal_.slots * slot_floats_) {}

  void run() {
    on_team(deal_.slots, [this](int64_t begin, int64_t end) { Slot(*this, begin, end).run(); });
  }

 private:
  bool norms() const { return args_.norm_ih.weight || args_.norm_hh.weight || args_.norm_c.weight; }
  bool has_operand() const { return kRounded || problem_.recurrent_mask; }

  struct Slot {
    const Forward& f;
    const Problem& problem;
    const ForwardArgs& args;
    const Element* const x;
    Element* const y;
    const Word *const weight_ih, *const weight_hh, *const weight_hr;
    const int64_t begin, end;           // the slots that this thread stands for
    int64_t p0, p1, r0, r1;             // its panels and rows
    int64_t first_output, last_output;  // its part of h: its units, or its panels of W_hr
    float *gates_x, *bias, *bias_hn, *products;
    Word* x_rows;
    int64_t chunk_rows = 0;              // rows that the last projection filled
    int64_t local_base[kChunkRows + 1];  // rows of the chunk before each of its steps, in memory order

    Slot(const Forward& forward, int64_t begin_in, int64_t end_in)
        : f(forward),
          problem(forward.problem_),
          args(forward.args_),
          x(static_cast<const Element*>(args.x)),
          y(static_cast<Element*>(args.y)),
          weight_ih(static_cast<const Word*>(args.weight_ih)),
          weight_hh(static_cast<const Word*>(args.weight_hh)),
          weight_hr(static_cast<const Word*>(args.weight_hr)),
          begin(begin_in),
          end(end_in) {
      const int64_t slots = f.deal_.slots;
      const bool by_rows = f.deal_.by_rows;
      p0 = by_rows ? 0 : f.panels_ * begin / slots;
      p1 = by_rows ? f.panels_ : f.panels_ * end / slots;
      r0 = by_rows ? problem.batch * begin / slots : 0;
      r1 = by_rows ? problem.batch * end / slots : problem.batch;
      first_output = first_unit();
      last_output = last_unit();
      if (weight_hr) {
        first_output = by_rows ? 0 : f.outputs_ * begin / slots * kOutputs;
        last_output = by_rows ? problem.output_size : smaller(problem.output_size, f.outputs_ * end / slots * kOutputs);
      }
      gates_x = f.scratch_.data() + begin * f.slot_floats_;
      bias = gates_x + (p1 - p0) * P::kWidth * f.block_rows_;
      bias_hn = bias + (p1 - p0) * P::kWidth;
      x_rows = reinterpret_cast<Word*>(bias_hn + (p1 - p0) * P::kUnits);
      products = reinterpret_cast<float*>(x_rows + f.block_rows_ * f.x_stride_);
    }

    int64_t time(int64_t s) const { return problem.reverse ? problem.steps - 1 - s : s; }
    int64_t entry(int64_t i) const { return problem.order ? problem.order[i] : i; }
    int64_t active(int64_t t) const { return smaller(r1, problem.active[t]); }
    bool is_reset(int64_t t, int64_t i) const {
      return problem.resets && problem.resets[t * problem.reset_stride_t + entry(i) * problem.reset_stride_b];
    }
    float* h_at(int64_t s, int64_t i) const { return f.h_.data() + ((s & 1) * problem.batch + i) * f.h_stride_; }
    // What W_hh multiplies: h itself, or a copy of it, masked or rounded.
    Word* operand_at(int64_t s, int64_t i) const {
      return reinterpret_cast<Word*>(f.has_operand() ? f.operand_.data() : f.h_.data()) +
             ((s & 1) * problem.batch + i) * f.operand_stride_;
    }
    void store_h(int64_t s, int64_t i, int64_t unit, Vec h) const {
      store(h_at(s, i) + unit, h);
      if (f.has_operand()) {
        if (problem.recurrent_mask)
          h = h * load(problem.recurrent_mask + entry(i) * problem.output_size + unit, problem.output_size - unit);
        store(reinterpret_cast<Element*>(operand_at(s, i)) + unit, h);
      }
    }
    float* c_at(int64_t i) const { return f.c_.data() + i * f.c_stride_; }
    Word* unprojected_at(int64_t i) const {
      return reinterpret_cast<Word*>(f.unprojected_.data()) + i * padded(words(problem.hidden_size));
    }
    int64_t first_unit() const { return p0 * P::kUnits; }
    int64_t last_unit() const { return smaller(problem.hidden_size, p1 * P::kUnits); }

    void run() {
      prepare_bias();
      pass_through(larger(r0, problem.steps ? active(0) : 0));
      if (problem.steps == 0) return;
      join(0, r0, active(time(0)));
      wait();
      for (int64_t s = 0; s < problem.steps;) {
        const int64_t stop = chunk_end(s);
        const int64_t rows = layout(s, stop);
        if (rows <= f.block_rows_) {
          project(s, stop, r0, rows);
          for (int64_t step = s; step < stop; ++step) {
            const int64_t t = time(step);
            recur(step, r0, active(t), local_base[t - smaller(time(s), time(stop - 1))]);
            if (weight_hr) project_output(step, r0, active(t));
            finish_step(step);
          }
        } else {  // a single step with many rows
          for (int64_t i = r0; i < active(time(s)); i += f.block_rows_) {
            const int64_t last = smaller(active(time(s)), i + f.block_rows_);
            project(s, stop, i, last - i);
            recur(s, i, last, 0);
            if (weight_hr) project_output(s, i, last);
            if (f.norms()) wait();  // before the statistics of the next rows replace these
          }
          finish_step(s);
        }
        s = stop;
      }
    }

    void wait() const {
      if (!f.deal_.by_rows) f.barrier_.wait(begin, end);
    }

    void finish_step(int64_t s) {
      zero_inactive(time(s));
      if (s + 1 < problem.steps) {
        join(s + 1, larger(r0, active(time(s))), active(time(s + 1)));
        wait();
      }
    }

    // Sequences of length 0, which are never active: the state passes through.
    void pass_through(int64_t from) const {
      for (int64_t i = from; i < r1; ++i) {
        for (int64_t u = first_output; u < last_output; ++u) {
          const int64_t at = entry(i) * problem.output_size + u;
          args.h_n[at] = args.h0 ? args.h0[at] : 0.0f;
        }
        for (int64_t u = first_unit(); kLstm && u < last_unit(); ++u) {
          const int64_t at = entry(i) * problem.hidden_size + u;
          args.c_n[at] = args.c0 ? args.c0[at] : 0.0f;
        }
      }
    }

    // The rows whose first step is s start from the initial state.
    void join(int64_t s, int64_t from, int64_t to) const {
      for (int64_t i = from; i < to; ++i) {
        const bool zero = is_reset(time(s), i);
        const float* h0 = zero || !args.h0 ? nullptr : args.h0 + entry(i) * problem.output_size;
        const float* c0 = zero || !args.c0 ? nullptr : args.c0 + entry(i) * problem.hidden_size;
        for (int64_t u = first_output; u < last_output; u += kLanes)
          store_h(s, i, u, h0 ? load(h0 + u, problem.output_size - u) : Vec{});
        for (int64_t u = first_unit(); kLstm && u < last_unit(); u += kLanes)
          store(c_at(i) + u, c0 ? load(c0 + u, problem.hidden_size - u) : Vec{});
      }
    }

    void zero_inactive(int64_t t) const {
      if (!problem.order) return;  // packed, or all of one length
      for (int64_t i = larger(r0, problem.active[t]); i < r1; ++i) {
        Element* row = y + args.y_rows.offset[t] + entry(i) * args.y_rows.stride;
        for (int64_t u = first_output; u < last_output; ++u) row[u] = 0;
        if (!kLstm || !args.c_all) continue;
        float* c = args.c_all + args.c_rows.offset[t] + entry(i) * args.c_rows.stride;
        for (int64_t u = first_unit(); u < last_unit(); ++u) c[u] = 0.0f;
      }
    }

    int64_t chunk_end(int64_t s) const {
      int64_t rows = larger(0, active(time(s)) - r0), stop = s + 1;
      while (stop < problem.steps && stop - s < kChunkRows) {
        rows += larger(0, active(time(stop)) - r0);
        if (rows > f.block_rows_) break;
        ++stop;
      }
      return stop;
    }

    // Fills local_base for the steps [s, stop), which lie in memory order from the earliest t; returns the rows.
    int64_t layout(int64_t s, int64_t stop) {
      const int64_t t0 = smaller(time(s), time(stop - 1));
      int64_t rows = 0;
      for (int64_t k = 0; k < stop - s; ++k) {
        local_base[k] = rows;
        rows += larger(0, active(t0 + k) - r0);
      }
      local_base[stop - s] = rows;
      return rows;
    }

    void prepare_bias() const {
      for (int64_t p = p0; p < p1; ++p)
        for (int v = 0; v < P::NV; ++v)
          for (int lane = 0; lane < kLanes; ++lane) {
            const int gate = v / P::kVectors;
            const int64_t unit = p * P::kUnits + (v % P::kVectors) * kLanes + lane;
            const bool valid = unit < problem.hidden_size;
            const int64_t at = gate * problem.hidden_size + unit;
            const float b_ih = valid && args.bias_ih ? args.bias_ih[at] : 0.0f;
            const float b_hh = valid && args.bias_hh ? args.bias_hh[at] : 0.0f;
            const bool candidate = cell == Cell::gru && gate == 2;
            bias[(p - p0) * P::kWidth + v * kLanes + lane] = candidate ? b_ih : b_ih + b_hh;
            if (candidate) bias_hn[(p - p0) * P::kUnits + lane] = b_hh;
          }
    }

    // gates_x of the rows of steps [s, stop) from row i0 on, panel by panel: x W_ih^T + b.
    void project(int64_t s, int64_t stop, int64_t i0, int64_t rows) {
      const int64_t t0 = smaller(time(s), time(stop - 1));
      chunk_rows = rows;
      if (!weight_ih) {
        for_rows(t0, stop - s, i0, rows, [&](int64_t row, const Element* from) { copy_gates(row, from); });
        return;
      }
      const Element* first = x + args.x_rows.offset[t0] + i0 * args.x_rows.stride;
      const Word* a = reinterpret_cast<const Word*>(first);
      int64_t lda = args.x_rows.stride / kPerWord;
      if (!is_matrix(t0, stop - s, first)) {
        lda = f.x_stride_;
        for_rows(t0, stop - s, i0, rows, [&](int64_t row, const Element* from) {
          x_rows[row * lda + words(problem.input_size) - 1] = 0;
          __builtin_memcpy(x_rows + row * lda, from, problem.input_size * sizeof(Element));
        });
        a = x_rows;
      }
      const int64_t size = words(problem.input_size);
      const RowTiles tiles(rows, kMaxRows);
      for (int64_t p = p0; p < p1; ++p) {
        const Word* panel = weight_ih + p * size * P::kWidth;
        float* out = gates_x + (p - p0) * rows * P::kWidth;
        for (int64_t k = 0; k < size; k += kDepth<cell>)
          for (int64_t i = 0; i < tiles.count; ++i) {
            float* c = out + tiles.begin(i) * P::kWidth;
            tile_rows<P::NV, false>(tiles.begin(i + 1) - tiles.begin(i), smaller(kDepth<cell>, size - k),
                                    a + tiles.begin(i) * lda + k, lda, panel + k * P::kWidth, P::kWidth,
                                    k > 0                 ? Start{c, P::kWidth}
                                    : args.norm_ih.weight ? kZero
                                                          : Start{bias + (p - p0) * P::kWidth, 0},
                                    c, P::kWidth,
                                    ahead(p + 1 < p1 ? panel + size * P::kWidth : panel, size, i, tiles).after(k));
          }
      }
      if (args.norm_ih.weight) normalize_input(t0, stop - s, i0, rows);
    }

    void normalize_input(int64_t t0, int64_t steps, int64_t i0, int64_t rows) const {
      int64_t numbers[kChunkRows];  // of the chunk's rows among all
      int64_t row = 0;
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t i = i0; i < active(t0 + k) && row < rows; ++i) numbers[row++] = problem.row_base[t0 + k] + i;
      const int64_t first = f.deal_.by_rows ? begin * f.block_rows_ : 0;
      for_groups(
          [&](auto group) { measure<group.first, group.gates>(f.parts_ih_, first, gates_x, rows, P::kWidth, 0); });
      wait();
      for_groups([&](auto group) {
        normalize<group.first, group.gates>(
            f.parts_ih_, first, args.norm_ih, gates_x, rows, P::kWidth, 0, [&](int64_t i) { return numbers[i]; },
            NormSaved<cell>::kInput);
      });
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t i = 0; i < rows; ++i)
          for (int v = 0; v < P::NV; ++v) {
            float* to = gates_x + ((p - p0) * rows + i) * P::kWidth + v * kLanes;
            store(to, load(to) + load(bias + (p - p0) * P::kWidth + v * kLanes));
          }
    }

    template <int kFirst, int kGateCount>
    struct GroupTag {
      static constexpr int first = kFirst, gates = kGateCount;
    };

    template <class Function>
    static void for_groups(Function function) {
      constexpr Group a = norm_group<cell>(0), b = norm_group<cell>(kGroups - 1);
      function(GroupTag<a.first, a.gates>());
      if constexpr (kGroups > 1) function(GroupTag<b.first, b.gates>());
    }

    // Statistics of gates [kFirst, kFirst + kCount) in a block [panels][rows][width], whose first gate is `origin`.
    template <int kFirst, int kCount>
    void measure(const RowParts& parts, int64_t first_row, const float* block, int64_t rows, int64_t width,
                 int origin) const {
      for (int64_t p = p0; p < p1; ++p)
        for (int vector = 0; vector < P::kVectors; ++vector) {
          const int64_t unit = p * P::kUnits + vector * kLanes;
          if (unit >= problem.hidden_size) break;
          const float* from = block + (p - p0) * rows * width + (kFirst - origin) * P::kUnits + vector * kLanes;
          parts.measure<kCount>(first_row, rows, group_of<cell>(kFirst), unit,
                                [&](int64_t i, int gate) __attribute__((always_inline)) {
                                  return load(from + i * width + gate * P::kUnits);
                                });
        }
    }

    // The same block normalised, in place; number(i) says which of all rows row i is.
    template <int kFirst, int kCount, class Number>
    void normalize(const RowParts& parts, int64_t first_row, const Norm& norm, float* block, int64_t rows,
                   int64_t width, int origin, Number number, int saved_value) const {
      RowParts::Scale scales[kChunkRows];
      for (int64_t i = 0; i < rows; ++i) {
        scales[i] = parts.scale(first_row + i, group_of<cell>(kFirst), kCount);
        save_deviation(number(i), saved_value / gate_count(cell) * kGroups + group_of<cell>(kFirst), scales[i].rstd);
      }
      for (int64_t p = p0; p < p1; ++p)
        for (int gate = kFirst; gate < kFirst + kCount; ++gate)
          for (int vector = 0; vector < P::kVectors; ++vector) {
            const int64_t unit = p * P::kUnits + vector * kLanes, count = problem.hidden_size - unit;
            if (count <= 0) break;
            const Vec weight = load(norm.weight + gate * problem.hidden_size + unit, count);
            const Vec shift = load(norm.bias + gate * problem.hidden_size + unit, count);
            for (int64_t i = 0; i < rows; ++i) {
              float* to = block + ((p - p0) * rows + i) * width + (gate - origin) * P::kUnits + vector * kLanes;
              const Vec normal = (load(to) - scales[i].mean) * scales[i].rstd;
              save_normal(number(i), unit, saved_value + gate, normal);
              store(to, normal * weight + shift);
            }
          }
    }

    float* norm_saved(int64_t row) const {
      return args.norm_saved + row * NormSaved<cell>::row_size(problem.hidden_size);
    }

    void save_normal(int64_t row, int64_t unit, int index, Vec normal) const {
      if (args.norm_saved) store(norm_saved(row) + NormSaved<cell>::value(unit, index), normal);
    }

    void save_deviation(int64_t row, int index, float rstd) const {
      if (args.norm_saved && p0 == 0) norm_saved(row)[NormSaved<cell>::deviation(problem.hidden_size, index)] = rstd;
    }

    // Whether the chunk's rows of x, of which `first` is one, can be multiplied where they lie.
    bool is_matrix(int64_t t0, int64_t steps, const Element* first) const {
      bool uniform = !problem.order && (r0 == 0 || steps == 1);
      for (int64_t k = 0; uniform && k + 1 < steps; ++k)
        uniform = args.x_rows.offset[t0 + k + 1] - args.x_rows.offset[t0 + k] ==
                  (local_base[k + 1] - local_base[k]) * args.x_rows.stride;
      return uniform && problem.input_size % kPerWord == 0 && args.x_rows.stride % kPerWord == 0 &&
             reinterpret_cast<uintptr_t>(first) % sizeof(Word) == 0;
    }

    // The share of a panel, `size` words deep, that tile i of those before it fetches. Few tiles cannot fetch it all,
    // and the core's own prefetchers do better then (d: 3 % faster by it, c: 2 % slower).
    static Ahead ahead(const Word* panel, int64_t size, int64_t i, const RowTiles& tiles) {
      const bool takes_part = tiles.count >= P::NV && i < P::NV;
      return {reinterpret_cast<const char*>(panel + (takes_part ? i * size * kLanes : 0)), takes_part ? 64 : 0};
    }

    // function(local row, its x) for rows of consecutive steps from t0.
    template <class Function>
    void for_rows(int64_t t0, int64_t steps, int64_t i0, int64_t rows, Function function) const {
      int64_t row = 0;
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t i = i0; i < active(t0 + k) && row < rows; ++i, ++row)
          function(row, x + args.x_rows.offset[t0 + k] + entry(i) * args.x_rows.stride);
    }

    void copy_gates(int64_t row, const Element* from) const {
      for (int64_t p = p0; p < p1; ++p)
        for (int v = 0; v < P::NV; ++v) {
          const int64_t unit = p * P::kUnits + (v % P::kVectors) * kLanes;
          const Element* gate = from + (v / P::kVectors) * problem.hidden_size + unit;
          store(gates_x + ((p - p0) * chunk_rows + row) * P::kWidth + v * kLanes,
                load(gate, problem.hidden_size - unit) + load(bias + (p - p0) * P::kWidth + v * kLanes));
        }
    }

    // Step s for rows [from, to), whose input parts start at row `base` of the current chunk.
    void recur(int64_t s, int64_t from, int64_t to, int64_t base) const {
      if constexpr (kResetBefore) return recur_reset_before(s, from, to, base);
      if (args.norm_hh.weight || args.norm_c.weight) return recur_normalized(s, from, to, base);
      auto x_part = [&](int64_t p, int64_t row) { return gates_x + ((p - p0) * chunk_rows + base + row) * P::kWidth; };
      if (to - from <= kFewRows) {
        // The chain of activations is long: with few rows it must overlap across panels (0.6 -> 0.2 us a step).
        alignas(64) float product[kFewRows * kGroup * P::kWidth];
        const int64_t rows = to - from;
        if (rows <= 0) return;
        prefetch_rows(operand_at(s, from), f.operand_stride_, rows, words(problem.output_size));
        for (int64_t p = p0; p < p1; p += kGroup) {
          const int64_t count = smaller(kGroup, p1 - p);
          for (int64_t q = 0; q < count;)
            q += multiply(s, p + q, p + count, from, rows, product + q * rows * P::kWidth);
          for (int64_t q = 0; q < count; ++q)
            finish(s, p + q, from, rows, product + q * rows * P::kWidth, x_part(p + q, 0));
        }
        return;
      }
      const RowTiles tiles(to - from, kMaxRows);
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t i = 0; i < tiles.count; ++i) {
          const int64_t row = tiles.begin(i), rows = tiles.begin(i + 1) - row;
          alignas(64) float product[kMaxRows * P::kWidth];
          multiply_panel<P::NV>(rows, operand_at(s, from + row), panel_at(p), product,
                                ahead(panel_at(p + 1 < p1 ? p + 1 : p0), words(problem.output_size), i, tiles));
          finish(s, p, from + row, rows, product, x_part(p, row));
        }
    }

    // As recur, with the threads meeting for the statistics.
    void recur_normalized(int64_t s, int64_t from, int64_t to, int64_t base) const {
      const int64_t rows = to - from;
      if (rows <= 0) return;
      auto product = [&](int64_t p) { return products + (p - p0) * rows * P::kWidth; };
      auto number = [&](int64_t i) { return problem.row_base[time(s)] + from + i; };
      auto x_part = [&](int64_t p) { return gates_x + ((p - p0) * chunk_rows + base) * P::kWidth; };
      const RowTiles tiles(rows, kMaxRows);
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t i = 0; i < tiles.count; ++i)
          multiply_panel<P::NV>(tiles.begin(i + 1) - tiles.begin(i), operand_at(s, from + tiles.begin(i)), panel_at(p),
                                product(p) + tiles.begin(i) * P::kWidth);
      if (args.norm_hh.weight) {
        for_groups(
            [&](auto group) { measure<group.first, group.gates>(f.parts_hh_, from, products, rows, P::kWidth, 0); });
        wait();
        for_groups([&](auto group) {
          normalize<group.first, group.gates>(f.parts_hh_, from, args.norm_hh, products, rows, P::kWidth, 0, number,
                                              NormSaved<cell>::kHidden);
        });
      }
      for (int64_t p = p0; p < p1; ++p) activate(s, p, from, rows, product(p), x_part(p));
      if (kLstm && args.norm_c.weight) normalize_cell_state(from, rows, number);
      for (int64_t p = p0; p < p1; ++p) put_out(s, p, from, rows, product(p), x_part(p));
    }

    // Of c as `activate` has left it: the second vector of each row of products.
    template <class Number>
    void normalize_cell_state(int64_t from, int64_t rows, Number number) const {
      auto c = [&](int64_t p, int64_t i) { return products + ((p - p0) * rows + i) * P::kWidth + kLanes; };
      for (int64_t p = p0; p < p1; ++p)
        f.parts_c_.measure<1>(from, rows, 0, p * kLanes, [&](int64_t i, int) { return load(c(p, i)); });
      wait();
      for (int64_t i = 0; i < rows; ++i) {
        const RowParts::Scale scale = f.parts_c_.scale(from + i, 0, 1);
        save_deviation(number(i), NormSaved<cell>::kStateDeviation, scale.rstd);
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t unit = p * kLanes, count = problem.hidden_size - unit;
          const Vec normal = (load(c(p, i)) - scale.mean) * scale.rstd;
          save_normal(number(i), unit, NormSaved<cell>::kState, normal);
          store(c(p, i), normal * load(args.norm_c.weight + unit, count) + load(args.norm_c.bias + unit, count));
        }
      }
    }

    // n needs all of r * h, so that the threads meet in the middle of the step.
    void recur_reset_before(int64_t s, int64_t from, int64_t to, int64_t base) const {
      const int64_t size = problem.hidden_size, rows = larger(0, to - from);
      auto x_part = [&](int64_t p, int64_t row, int gate) {
        return gates_x + ((p - p0) * chunk_rows + base + row) * P::kWidth + gate * P::kUnits;
      };
      auto reset_h_at = [&](int64_t i) { return reinterpret_cast<Word*>(f.reset_h_.data()) + i * f.operand_stride_; };

      gate_products<0, 2>(s, from, rows, operand_at(s, from), 0,
                          [&](int64_t p, int vector, int64_t row, const float* product) __attribute__((always_inline)) {
                            const int64_t i = from + row, unit = p * P::kUnits + vector * kLanes;
                            auto gate = [&](int g) __attribute__((always_inline)) {
                              return sigmoid(load(product + g * P::kUnits) + load(x_part(p, row, g) + vector * kLanes));
                            };
                            const Vec r = gate(0), z = gate(1);
                            store(c_at(i) + unit, z);
                            store(reinterpret_cast<Element*>(reset_h_at(i)) + unit,
                                  r * load(reinterpret_cast<const Element*>(operand_at(s, i)) + unit));
                            if (args.saved) {
                              store(saved_at(time(s), i, unit), r);
                              store(saved_at(time(s), i, unit) + kLanes, z);
                            }
                          });
      wait();
      gate_products<2, 1>(s, from, rows, reset_h_at(from), words(size) * 2 * P::kUnits,
                          [&](int64_t p, int vector, int64_t row, const float* product) __attribute__((always_inline)) {
                            const int64_t i = from + row, unit = p * P::kUnits + vector * kLanes;
                            const Vec n = tanh(load(product) + load(x_part(p, row, 2) + vector * kLanes));
                            if (args.saved) store(saved_at(time(s), i, unit) + 2 * kLanes, n);
                            put_h(s, i, unit, gru_output(load(c_at(i) + unit), n, load(h_at(s, i) + unit)));
                          });
    }

    // a times the panels of gates [kFirst, kFirst + kCount), which begin at `offset` within a panel, normalised where
    // that is asked for; then pointwise(panel, vector, row, gates) for each vector of units.
    template <int kFirst, int kCount, class Pointwise>
    void gate_products(int64_t s, int64_t from, int64_t rows, const Word* a, int64_t offset,
                       Pointwise pointwise) const {
      constexpr int NV = kCount * P::kVectors;
      auto finish_rows = [&](int64_t p, int64_t row, int64_t count, const float* product) {
        for (int64_t i = 0; i < count; ++i)
          for (int vector = 0; vector < P::kVectors; ++vector)
            if (p * P::kUnits + vector * kLanes < problem.hidden_size)
              pointwise(p, vector, row + i, product + i * NV * kLanes + vector * kLanes);
      };
      const bool normalized = args.norm_hh.weight;
      const RowTiles tiles(rows, max_rows<NV>());
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t i = 0; i < tiles.count; ++i) {
          const int64_t row = tiles.begin(i), count = tiles.begin(i + 1) - row;
          alignas(64) float tile[max_rows<NV>() * NV * kLanes];
          float* product = normalized ? products + ((p - p0) * rows + row) * NV * kLanes : tile;
          multiply_panel<NV>(count, a + row * f.operand_stride_, panel_at(p) + offset, product);
          if (!normalized) finish_rows(p, row, count, product);
        }
      if (!normalized) return;
      measure<kFirst, kCount>(f.parts_hh_, from, products, rows, NV * kLanes, kFirst);
      wait();
      normalize<kFirst, kCount>(
          f.parts_hh_, from, args.norm_hh, products, rows, NV * kLanes, kFirst,
          [&](int64_t i) { return problem.row_base[time(s)] + from + i; }, NormSaved<cell>::kHidden);
      for (int64_t p = p0; p < p1; ++p) finish_rows(p, 0, rows, products + (p - p0) * rows * NV * kLanes);
    }

    const Word* panel_at(int64_t p) const { return weight_hh + p * words(problem.output_size) * P::kWidth; }

    template <int NV>
    void multiply_panel(int64_t rows, const Word* a, const Word* b, float* product, Ahead ahead) const {
      constexpr int64_t kWidth = NV * kLanes;
      const int64_t size = words(problem.output_size);
      for (int64_t k = 0; k < size; k += kDepth<cell>)
        tile_rows<NV, false>(rows, smaller(kDepth<cell>, size - k), a + k, f.operand_stride_, b + k * kWidth, kWidth,
                             resume(k > 0, product, kWidth), product, kWidth, ahead.after(k));
    }

    template <int NV>
    void multiply_panel(int64_t rows, const Word* a, const Word* b, float* product) const {
      multiply_panel<NV>(rows, a, b, product, nothing_ahead(b));
    }

    float* saved_at(int64_t t, int64_t i, int64_t unit) const {
      const int64_t vectors = ceil_div(problem.hidden_size, kLanes);
      return args.saved + ((problem.row_base[t] + i) * vectors + unit / kLanes) * (saved_count(cell) * kLanes);
    }

    // The state that step s gives out: after zoneout, to y, to h_n where the sequence ends, and to the next step.
    void put_h(int64_t s, int64_t i, int64_t unit, Vec h) const {
      const int64_t t = time(s), b = entry(i), count = problem.output_size - unit;
      const bool last = s + 1 == problem.steps || i >= problem.active[time(s + 1)];
      if (f.zoneout_.used()) h = f.zoneout_.row(0, t, b).apply(unit, h, load(h_at(s, i) + unit));
      store(y + args.y_rows.offset[t] + b * args.y_rows.stride + unit, h, count);
      if (last) {
        store(args.h_n + b * problem.output_size + unit, h, count);
      } else {
        store_h(s + 1, i, unit, is_reset(time(s + 1), i) ? Vec{} : h);
      }
    }

    // product[panel][row][kWidth] = h W_hh^T for `rows` rows and panel p, or two panels below `limit`; returns how
    // many.
    int64_t multiply(int64_t s, int64_t p, int64_t limit, int64_t i, int64_t rows, float* product) const {
      const Word *a = operand_at(s, i), *b = panel_at(p);
      if constexpr (panels_at_once<P::NV>(1) == 2) {
        if (panels_at_once<P::NV>(rows) == 2 && p + 2 <= limit) {
          two_panels<P::NV>(rows, words(problem.output_size), kDepth<cell>, a, f.operand_stride_, b,
                            panel_at(1) - panel_at(0), product);
          return 2;
        }
      }
      multiply_panel<P::NV>(rows, a, b, product);
      return 1;
    }

    void finish(int64_t s, int64_t p, int64_t from, int64_t rows, float* product, const float* x_part) const {
      activate(s, p, from, rows, product, x_part);
      put_out(s, p, from, rows, product, x_part);
    }

    static Vec pre_activation(const float* product, const float* x_part, int64_t row, int vector, int gate) {
      const int64_t at = row * P::kWidth + (gate * P::kVectors + vector) * kLanes;
      return load(product + at) + load(x_part + at);
    }

    // The pointwise part of `rows` rows, in two loops: the chain of two activations, sigmoid then tanh, is twice as
    // long as the window in which the core overlaps rows. Rolled over rows: unrolled, GCC keeps the tile in memory
    // within the product.
    void activate(int64_t s, int64_t p, int64_t from, int64_t rows, float* product, const float* x_part) const {
      const int64_t t = time(s);
      auto pre = [&](int64_t row, int vector, int gate)
                     __attribute__((always_inline)) { return pre_activation(product, x_part, row, vector, gate); };
      if constexpr (kLstm) {
        auto activate_rows = [&](auto cell_state) __attribute__((always_inline)) {
          for (int64_t row = 0; row < rows; ++row) {
            LstmGates<Vec> gates{pre(row, 0, 0), pre(row, 0, 1), pre(row, 0, 2), pre(row, 0, 3)};
            float* state = c_at(from + row) + p * kLanes;
            const Vec c_previous = load(state);
            Vec c = c_previous;
            cell_state(gates, c);
            store(product + row * P::kWidth, gates.o);
            store(product + row * P::kWidth + kLanes, c);
            if (f.zoneout_.used()) c = f.zoneout_.row(1, t, entry(from + row)).apply(p * kLanes, c, c_previous);
            store(state, c);
            if (args.saved) {
              float* saved = saved_at(t, from + row, p * kLanes);
              store(saved, gates.i);
              store(saved + kLanes, gates.f);
              store(saved + 2 * kLanes, gates.g);
              store(saved + 3 * kLanes, gates.o);
            }
          }
        };
        if (args.peephole) {
          const auto peephole = peephole_at(args.peephole, problem.hidden_size, p * kLanes);
          activate_rows([&](auto& gates, Vec& c)
                            __attribute__((always_inline)) { lstm_peephole_cell_state(gates, peephole, c); });
        } else {
          activate_rows([](auto& gates, Vec& c) __attribute__((always_inline)) { lstm_cell_state(gates, c); });
        }
      } else if constexpr (cell == Cell::gru) {
        const Vec b_hn = load(bias_hn + (p - p0) * P::kUnits);
        for (int64_t row = 0; row < rows; ++row) {
          float* gates = product + row * P::kWidth;
          const Vec r = sigmoid(pre(row, 0, 0)), z = sigmoid(pre(row, 0, 1));
          const Vec h_n = load(gates + 2 * kLanes) + b_hn;
          if (args.saved) {
            float* saved = saved_at(t, from + row, p * kLanes);
            store(saved, r);
            store(saved + kLanes, z);
            store(saved + 3 * kLanes, h_n);
          }
          store(gates, z);
          store(gates + kLanes, load(x_part + row * P::kWidth + 2 * kLanes) + r * h_n);
        }
      }
    }

    void put_out(int64_t s, int64_t p, int64_t from, int64_t rows, const float* product, const float* x_part) const {
      const int64_t t = time(s);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t i = from + row;
        const float* gates = product + row * P::kWidth;
        for (int vector = 0; vector < P::kVectors; ++vector) {
          const int64_t unit = p * P::kUnits + vector * kLanes;
          if (unit >= problem.hidden_size) break;
          if constexpr (kLstm) {
            put_c(s, i, unit);
            const Vec h = lstm_output(load(gates), load(gates + kLanes));
            if (weight_hr) {
              store(reinterpret_cast<Element*>(unprojected_at(i)) + unit, h);
            } else {
              put_h(s, i, unit, h);
            }
          } else if constexpr (cell == Cell::gru) {
            const Vec n = tanh(load(gates + kLanes));
            if (args.saved) store(saved_at(t, i, unit) + 2 * kLanes, n);
            put_h(s, i, unit, gru_output(load(gates), n, load(h_at(s, i) + unit)));
          } else {
            const Vec h = rnn_forward<cell>(pre_activation(product, x_part, row, vector, 0));
            if (args.saved) store(saved_output(problem, args.saved, t, i) + unit, h);
            put_h(s, i, unit, h);
          }
        }
      }
    }

    // h = W_hr (o * tanh(c)), once all threads have brought their units (Sak et al. 2014).
    void project_output(int64_t s, int64_t from, int64_t to) const {
      if constexpr (kLstm) {
        wait();
        const int64_t size = words(problem.hidden_size);
        const RowTiles tiles(larger(0, to - from), max_rows<2>());
        for (int64_t unit = first_output; unit < last_output; unit += kOutputs)
          for (int64_t tile = 0; tile < tiles.count; ++tile) {
            const int64_t row = from + tiles.begin(tile), rows = tiles.begin(tile + 1) - tiles.begin(tile);
            alignas(64) float product[max_rows<2>() * kOutputs];
            for (int64_t k = 0; k < size; k += kDepth<cell>)
              tile_rows<2, false>(rows, smaller(kDepth<cell>, size - k), unprojected_at(row) + k,
                                  unprojected_at(1) - unprojected_at(0), weight_hr + unit * size + k * kOutputs,
                                  kOutputs, resume(k > 0, product, kOutputs), product, kOutputs);
            for (int64_t i = 0; i < rows; ++i)
              for (int64_t u = unit; u < smaller(last_output, unit + kOutputs); u += kLanes)
                put_h(s, row + i, u, load(product + i * kOutputs + u - unit));
          }
      }
    }

    // c_t, already in its place for the next step, goes to c_all, to c_n where the sequence ends, or gives way to a
    // reset.
    void put_c(int64_t s, int64_t i, int64_t unit) const {
      const int64_t t = time(s), b = entry(i), count = problem.hidden_size - unit;
      const Vec c = load(c_at(i) + unit);
      if (args.c_all) store(args.c_all + args.c_rows.offset[t] + b * args.c_rows.stride + unit, c, count);
      if (s + 1 == problem.steps || i >= problem.active[time(s + 1)]) {
        store(args.c_n + b * problem.hidden_size + unit, c, count);
      } else if (is_reset(time(s + 1), i)) {
        store(c_at(i) + unit, Vec{});
      }
    }
  };

  const Problem& problem_;
  const ForwardArgs& args_;
  const int64_t panels_;
  const Deal deal_;
  mutable Barrier barrier_;
  const int64_t h_stride_, c_stride_, operand_stride_, outputs_, x_stride_, block_rows_, slot_panels_, slot_floats_;
  const Zoneout zoneout_;
  // c_ of the GRU with the reset before the product holds z, and reset_h_ holds r * h.
  const Scratch h_, operand_, c_, unprojected_, reset_h_;
  const RowParts parts_hh_, parts_ih_, parts_c_;
  const Scratch scratch_;
};

}  // namespace
}  // namespace fastrnn
