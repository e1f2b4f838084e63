// The backward recurrence and the gradients of the weights. Steps run backwards with the hidden units dealt out as in
// the forward pass; after each chunk of steps all threads turn the chunk's gate gradients dG into dW += dG^T [h | x],
// db += sum dG and dx = dG W_ih, while dG is still in cache.
#pragma once

#include "cpu/forward.h"

namespace fastrnn {
namespace {

constexpr int64_t kGradientRows = 384;   // rows of a chunk
constexpr int64_t kBackwardDepth = 256;  // words per pass over a panel of dG W
constexpr int64_t kBlockPanels = 16;     // panels of [h | x] per pass over the rows of dW: 16 * 384 rows stay in L2

// Columns of dG in tiles [words of rows][MR], and what they add to the biases' gradients: short sums in float, long
// ones in double. stride: elements of a row of dG.
template <int MR>
inline void pack_columns(const Element* from, int64_t stride, int64_t rows, Word* packed, double* sums) {
  constexpr int64_t kShort = 32;
  for (int64_t row = 0; row < rows; row += kShort) {
    float total[MR] = {};
    for (int64_t last = smaller(rows, row + kShort), i = row; i < last;
         i += kPerWord, from += kPerWord * stride, packed += MR)
      for (int m = 0; m < MR; ++m) {
#ifdef FASTRNN_BF16
        const Element second = i + 1 < last ? from[stride + m] : 0;
        packed[m] = pair(from[m], second);
        total[m] += to_float(second);
#else
        packed[m] = from[m];
#endif
        total[m] += to_float(from[m]);
      }
    for (int m = 0; m < MR; ++m) sums[m] += total[m];
  }
}

template <int MR = max_rows<2>()>
inline void pack_columns(int64_t columns, const Element* from, int64_t stride, int64_t rows, Word* packed,
                         double* sums) {
  if (columns == MR) {
    pack_columns<MR>(from, stride, rows, packed, sums);
  } else if constexpr (MR > 1) {
    pack_columns<MR - 1>(columns, from, stride, rows, packed, sums);
  }
}

// Writes one row of a panel of B, which has kPerWord of its rows in each row of words.
inline __attribute__((always_inline)) void put_row(Word* panel, int64_t row, int64_t column, Vec values) {
  Word* to = panel + row / kPerWord * kColumns + column;
#ifdef FASTRNN_BF16
  const Words old = load(to);
  const Words fresh = reinterpret_cast<Words>(_mm512_cvtepu16_epi32(rounded(values)));
  store(to, row % 2 ? (old & 0xffff) | fresh << 16 : (old & ~0xffff) | fresh);
#else
  store(to, values);
#endif
}

// out[columns of dG][columns] (+)= dG^T B for one tile of packed columns of dG and `panels` panels of B.
inline void add_outer(int64_t rows, int64_t k_size, const Word* packed, const Word* b, int64_t panel_stride,
                      int64_t panels, bool accumulate, float* out, int64_t ldc, int64_t columns) {
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t count = columns - p * kColumns;
    float* c = out + p * kColumns;
    if (count >= kColumns) {
      tile_rows<2, true>(rows, k_size, packed, rows, b + p * panel_stride, kColumns, resume(accumulate, c, ldc), c,
                         ldc);
      continue;
    }
    alignas(64) float edge[max_rows<2>() * kColumns];
    tile_rows<2, true>(rows, k_size, packed, rows, b + p * panel_stride, kColumns, kZero, edge, kColumns);
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < count; ++n)
        c[m * ldc + n] = (accumulate ? c[m * ldc + n] : 0.0f) + edge[m * kColumns + n];
  }
}

// The column blocks of dG, H wide each, and where they go: rows of dW_hh and dW_ih in gates, -1 for nowhere.
struct GradientBlock {
  int hidden_gate, input_gate;
};

template <Cell cell>
constexpr GradientBlock gradient_block(int block) {
  // gru_reset_before: the rows of W_hn pair with r * h and not with h, see Slot::weight_gradients.
  if (cell == Cell::gru)
    return block == 0 ? GradientBlock{2, -1} : GradientBlock{block < 3 ? block - 1 : -1, block - 1};
  return {block, block};
}

// Rows of one pass of dG^T [h | x]. Shorter sums round less, longer ones write dW less often (384: 3 % faster than
// 128), which matters where dW is large. Up to H = 128, 96 is the most that keeps dW_hh within twice torch's error, and
// costs nothing; 64 would take 3 % longer.
inline int64_t outer_depth(int64_t hidden_size) {
  return hidden_size <= 64 ? 64 : hidden_size <= 128 ? 96 : hidden_size <= 256 ? 128 : 384;
}

template <Cell cell>
class Backward {
  using P = Panel<cell>;
  static constexpr bool kLstm = cell == Cell::lstm, kGru = is_gru(cell), kResetBefore = cell == Cell::gru_reset_before;
  static constexpr int kGates = gate_count(cell), kGroups = group_count<cell>();
  static constexpr int kTile = max_rows<2>();

 public:
  Backward(const Problem& problem, const BackwardArgs& args, int threads)
      : problem_(problem),
        args_(args),
        panels_(ceil_div(problem.hidden_size, kColumns)),
        vectors_(ceil_div(problem.hidden_size, kLanes)),
        h_panels_(ceil_div(problem.output_size, kColumns)),
        x_panels_(args.weight_ih || args.dweight_ih ? ceil_div(problem.input_size, kColumns) : 0),
        deal_(deal_recurrence(problem, panels_, threads)),
        barrier_(deal_.slots),
        chunk_rows_(largest_chunk(problem)),
        chunk_words_(words(chunk_rows_)),
        dh_stride_(args.weight_hr ? padded(words(problem.output_size)) : 0),
        gate_stride_(gate_stride(problem.hidden_size)),
        blocks_(norms() ? 2 * kGates : gradient_count(cell)),
        gradient_stride_(padded(blocks_ * gate_stride_ / kPerWord)),
        state_stride_(larger(panels_, h_panels_) * kColumns),
        tiles_(ceil_div(larger(problem.hidden_size, problem.output_size), kTile)),
        tile_words_(kTile * chunk_words_),
        slot_floats_((blocks_ + (args.weight_hr ? 1 : 0)) * (ceil_div(tiles_, deal_.slots) + 1) * tile_words_ +
                     product_floats() + ceil_div(x_panels_, deal_.slots) * kColumns * chunk_rows_),
        gradients_(2 * chunk_rows_ * gradient_stride_),
        zoneout_(problem),
        h_carry_(kGru || zoneout_.used() ? problem.batch * state_stride_ : 0),
        c_carry_(kLstm ? problem.batch * state_stride_ : 0),
        sums_(2 * blocks_ * problem.hidden_size),
        right_((h_panels_ + x_panels_ + (kResetBefore || args.weight_hr ? panels_ : 0)) * kColumns * chunk_words_),
        dh_(chunk_rows_ * dh_stride_),
        norm_work_(norms() ? problem.batch * vectors_ * kNormValues * kLanes : 0),
        parameter_sums_(has_parameter_sums() ? deal_.slots * 2 * parameter_sums_size() : 0),
        parts_hh_(args.norm_hh.weight ? problem.batch : 0, kGroups, problem.hidden_size),
        parts_ih_(args.norm_ih.weight ? problem.batch : 0, kGroups, problem.hidden_size),
        parts_c_(args.norm_c.weight ? problem.batch : 0, 1, problem.hidden_size),
        scratch_(deal_.slots * slot_floats_) {
    // Rows of dG end their gates in whole words; what fills those up is multiplied by zeros, so it may not be NaN.
    if (gate_stride_ != problem.hidden_size)
      __builtin_memset(gradients_.data(), 0, 2 * chunk_rows_ * gradient_stride_ * sizeof(Word));
  }

  void run() {
    on_team(deal_.slots, [this](int64_t begin, int64_t end) { Slot(*this, begin, end).run(); });
    if (problem_.row_base[problem_.steps] == 0) {  // no step was taken, so nothing wrote them
      const int64_t rows = kGates * problem_.hidden_size;
      if (args_.dweight_ih) __builtin_memset(args_.dweight_ih, 0, rows * problem_.input_size * sizeof(float));
      if (args_.dweight_hh) __builtin_memset(args_.dweight_hh, 0, rows * problem_.output_size * sizeof(float));
      if (args_.dweight_hr)
        __builtin_memset(args_.dweight_hr, 0, problem_.output_size * problem_.hidden_size * sizeof(float));
    }
  }

 private:
  // With layer norm a row of dG holds the gradients of W_hh h, then those of W_ih x, in the packed weights' order.
  bool norms() const { return args_.norm_ih.weight || args_.norm_hh.weight || args_.norm_c.weight; }
  GradientBlock block_at(int block) const {
    if (!norms()) return gradient_block<cell>(block);
    if (block < kGates) return {static_cast<int>(hidden_gate<cell>(block)), -1};
    return {-1, block - kGates};
  }

  // Of a row's vector of units, in norm_work_: gradients of the gates' pre-activations, the GRU's W_hn h + b_hn last.
  static constexpr int kNormValues = 4;

  // A slot's sums over rows, H each. For the norms of W_hh h and W_ih x those of dy x^ and dy, G each, then the same
  // for that of c; the gradients of the peepholes i f o.
  static constexpr int kStateSums = 4 * kGates, kPeepholeSums = kStateSums + 2, kParameterSums = kPeepholeSums + 3;
  bool has_parameter_sums() const { return norms() || args_.peephole; }
  int64_t parameter_sums_size() const { return kParameterSums * vectors_ * kLanes; }

  static int64_t largest_chunk(const Problem& problem) {
    int64_t rows = smaller(kGradientRows, problem.row_base[problem.steps]);
    for (int64_t t = 0; t < problem.steps; ++t) rows = larger(rows, problem.active[t]);
    return larger(rows, 1);
  }

  Word* gradients() const { return reinterpret_cast<Word*>(gradients_.data()); }
  Word* right_panel(int64_t panel, int64_t rows) const {
    return reinterpret_cast<Word*>(right_.data()) + panel * words(rows) * kColumns;
  }
  // Of the third part of right_: r * h, or what is projected.
  int64_t last_panels() const { return h_panels_ + x_panels_; }
  double* sums() const { return reinterpret_cast<double*>(sums_.data()); }
  int64_t product_floats() const { return larger(problem_.batch, kFewRows * kGroup) * kColumns; }

  struct Slot {
    const Backward& f;
    const Problem& problem;
    const BackwardArgs& args;
    const Element *const x, *const y, *const dy;
    Element* const dx;
    const Word *const weight_ih, *const weight_hh, *const weight_hr;
    int64_t begin, end;      // the slots that this thread stands for
    int64_t p0, p1, r0, r1;  // its panels of hidden units and rows
    int64_t q0, q1;          // its panels of h: those of its units without a projection
    float *product, *dx_sums;
    Word* columns;

    Slot(const Backward& backward, int64_t begin_in, int64_t end_in)
        : f(backward),
          problem(backward.problem_),
          args(backward.args_),
          x(static_cast<const Element*>(args.x)),
          y(static_cast<const Element*>(args.y)),
          dy(static_cast<const Element*>(args.dy)),
          dx(static_cast<Element*>(args.dx)),
          weight_ih(static_cast<const Word*>(args.weight_ih)),
          weight_hh(static_cast<const Word*>(args.weight_hh)),
          weight_hr(static_cast<const Word*>(args.weight_hr)),
          begin(begin_in),
          end(end_in) {
      const bool by_rows = f.deal_.by_rows;
      p0 = by_rows ? 0 : share(f.panels_, begin);
      p1 = by_rows ? f.panels_ : share(f.panels_, end);
      q0 = by_rows ? 0 : share(f.h_panels_, begin);
      q1 = by_rows ? f.h_panels_ : share(f.h_panels_, end);
      r0 = by_rows ? share(problem.batch, begin) : 0;
      r1 = by_rows ? share(problem.batch, end) : problem.batch;
      product = f.scratch_.data() + begin * f.slot_floats_;
      dx_sums = product + f.product_floats();
      columns = reinterpret_cast<Word*>(dx_sums + (share(f.x_panels_, end) - share(f.x_panels_, begin)) * kColumns *
                                                      f.chunk_rows_);
    }

    int64_t share(int64_t count, int64_t slot) const { return count * slot / f.deal_.slots; }
    int64_t time(int64_t s) const { return problem.reverse ? problem.steps - 1 - s : s; }
    int64_t entry(int64_t i) const { return problem.order ? problem.order[i] : i; }
    int64_t active_at(int64_t s) const {  // rows of step s, 0 outside the sequence
      return s < 0 || s >= problem.steps ? 0 : problem.active[time(s)];
    }
    bool is_reset(int64_t s, int64_t i) const {
      return problem.resets && problem.resets[time(s) * problem.reset_stride_t + entry(i) * problem.reset_stride_b];
    }
    float* h_carry_at(int64_t i) const { return f.h_carry_.data() + i * f.state_stride_; }
    float* c_carry_at(int64_t i) const { return f.c_carry_.data() + i * f.state_stride_; }
    void wait() const { f.barrier_.wait(begin, end); }
    void meet() const {
      if (!f.deal_.by_rows) wait();
    }

    void run() {
      pass_through();
      zero_sums();
      for (int64_t slot = begin; f.has_parameter_sums() && slot < end; ++slot)
        __builtin_memset(parameter_sums(slot), 0, f.parameter_sums_size() * sizeof(double));
      const Word* next = nullptr;  // dG of step s + 1
      int64_t buffer = 0;
      bool first = true;
      for (int64_t s = problem.steps - 1; s >= 0;) {
        const int64_t low = chunk_begin(s);
        const int64_t base = smaller(problem.row_base[time(low)], problem.row_base[time(s)]);
        Word* chunk = f.gradients() + buffer * f.chunk_rows_ * f.gradient_stride_;
        int64_t rows = 0;
        for (int64_t step = s; step >= low; --step) {
          Word* current = chunk + (problem.row_base[time(step)] - base) * f.gradient_stride_;
          if (weight_hr) project_gradient(step, next, base);
          recur(step, next, current, base);
          if constexpr (kResetBefore) {
            meet();
            recur_reset(step, current);
          }
          rows += active_at(step);
          next = current;
          if (!f.deal_.by_rows || step == low) wait();
        }
        gather_right(low, s, base, rows);
        gather_columns(chunk, rows);
        if (weight_hr) gather_projected(rows);
        input_gradient(low, s, base, chunk, rows);
        wait();
        weight_gradients(rows, first);
        first = false;
        buffer ^= 1;
        s = low - 1;
      }
      if (problem.steps > 0 && weight_hr) project_gradient(-1, next, 0);
      if (problem.steps > 0) recur(-1, next, nullptr, 0);
      if (!f.norms()) bias_gradients();
      if (f.has_parameter_sums()) parameter_gradients();
    }

    int64_t chunk_begin(int64_t s) const {
      int64_t rows = active_at(s), low = s;
      while (low > 0 && rows + active_at(low - 1) <= f.chunk_rows_) rows += active_at(--low);
      return low;
    }

    // Sequences of length 0: h_n is h0.
    void pass_through() const {
      for (int64_t i = larger(r0, problem.steps ? problem.active[0] : 0); i < r1; ++i) {
        for (int64_t u = q0 * kColumns; args.dh0 && u < smaller(problem.output_size, q1 * kColumns); ++u) {
          const int64_t at = entry(i) * problem.output_size + u;
          args.dh0[at] = args.dh_n ? args.dh_n[at] : 0.0f;
        }
        for (int64_t u = p0 * kColumns; kLstm && args.dc0 && u < smaller(problem.hidden_size, p1 * kColumns); ++u) {
          const int64_t at = entry(i) * problem.hidden_size + u;
          args.dc0[at] = args.dc_n ? args.dc_n[at] : 0.0f;
        }
      }
    }

    // dG of step s from that of step s + 1; rows that began at step s + 1 get their dh0 and dc0 instead.
    // base: the first row of the chunk.
    void recur(int64_t s, const Word* next, Word* current, int64_t base) const {
      const int64_t from = r0, coming = smaller(r1, active_at(s + 1));
      const int64_t last = larger(coming, smaller(r1, active_at(s)));
      if (from >= last) return;  // by all threads alike, where they have to meet
      const bool needed = s >= 0 || args.dh0 || args.dc0;
      if (!needed) return;
      if (weight_hr) {
        const int64_t depth = words(problem.output_size), now = smaller(r1, active_at(s));
        for (int64_t p = p0; p < p1; ++p) {
          if (now > from)
            multiply_rows_by_panel(now - from, depth, dh_at(s, from, base), f.dh_stride_,
                                   weight_hr + p * depth * kColumns, product);
          finish(s, p, from, coming, last, product, current);
        }
        if (f.norms() && s >= 0) normalize_gradients(s, current);
        return;
      }
      const int64_t rows = larger(0, coming - from), group = last - from <= kFewRows ? kGroup : 1;
      if (rows <= kFewRows)
        prefetch_rows(next + from * f.gradient_stride_, f.gradient_stride_, rows, kGates * gate_words());
      for (int64_t p = p0; p < p1; p += group) {
        const int64_t count = smaller(group, p1 - p);
        for (int64_t q = 0; q < count;)
          q += multiply(p + q, p + count, from, coming, next, product + q * rows * kColumns);
        for (int64_t q = 0; q < count; ++q)
          finish(s, p + q, from, coming, last, product + q * rows * kColumns, current);
      }
      if (f.norms() && s >= 0) normalize_gradients(s, current);
    }

    int64_t gate_words() const { return f.gate_stride_ / kPerWord; }
    const Word* panel_at(int64_t p) const { return weight_hh + p * kGates * gate_words() * kColumns; }
    static Element* elements(Word* row) { return reinterpret_cast<Element*>(row); }

    // out[panel][row][kColumns] = dG_{s+1} W_hh for panel p, or two panels below `limit`; returns how many.
    int64_t multiply(int64_t p, int64_t limit, int64_t from, int64_t to, const Word* next, float* out) const {
      const int64_t rows = to - from;
      const int64_t k_size = (kResetBefore ? 2 : kGates) * gate_words();  // W_hn does not meet h there
      if (rows <= 0) return 1;
      const Word *a = next + from * f.gradient_stride_, *b = panel_at(p);
      if (panels_at_once<2>(rows) == 2 && p + 2 <= limit) {
        two_panels<2>(rows, k_size, kBackwardDepth, a, f.gradient_stride_, b, panel_at(1) - panel_at(0), out);
        return 2;
      }
      multiply_rows_by_panel(rows, k_size, a, f.gradient_stride_, b, out);
      return 1;
    }

    static void multiply_rows_by_panel(int64_t rows, int64_t k_size, const Word* a, int64_t lda, const Word* b,
                                       float* out) {
      const RowTiles tiles(rows, kTile);
      for (int64_t k = 0; k < k_size; k += kBackwardDepth)
        for (int64_t i = 0; i < tiles.count; ++i) {
          float* c = out + tiles.begin(i) * kColumns;
          tile_rows<2, false>(tiles.begin(i + 1) - tiles.begin(i), smaller(kBackwardDepth, k_size - k),
                              a + tiles.begin(i) * lda + k, lda, b + k * kColumns, kColumns, resume(k > 0, c, kColumns),
                              c, kColumns);
        }
    }

    // Gradient of h of row i at step s, among the rows of the chunk that begins at row `base`.
    Word* dh_at(int64_t s, int64_t i, int64_t base) const {
      const int64_t row = s >= 0 ? problem.row_base[time(s)] - base + i : 0;
      return reinterpret_cast<Word*>(f.dh_.data()) + row * f.dh_stride_;
    }

    // With a projection: dh of step s, complete before any thread takes dh W_hr; dh0 of rows that began at step s + 1.
    void project_gradient(int64_t s, const Word* next, int64_t base) const {
      const int64_t from = r0, coming = smaller(r1, active_at(s + 1)), now = smaller(r1, active_at(s));
      const int64_t last = larger(coming, now);
      if (from >= last || (s < 0 && !args.dh0)) return;
      for (int64_t q = q0; q < q1; ++q) {
        if (coming > from)
          multiply_rows_by_panel(coming - from, kGates * gate_words(), next + from * f.gradient_stride_,
                                 f.gradient_stride_, panel_at(q), product);
        for (int64_t i = from; i < last; ++i)
          for (int64_t unit = q * kColumns; unit < smaller(problem.output_size, (q + 1) * kColumns); unit += kLanes) {
            Vec dh = incoming_h(s, i, unit, coming, product + (i - from) * kColumns + unit - q * kColumns);
            if (i >= now) {
              if (args.dh0) store(args.dh0 + entry(i) * problem.output_size + unit, dh, problem.output_size - unit);
              continue;
            }
            dh += output_gradient(s, i, unit);
            if (f.zoneout_.used()) {
              Vec old = {};
              f.zoneout_.row(0, time(s), entry(i)).split(unit, dh, dh, old);
              store(h_carry_at(i) + unit, is_reset(s, i) ? Vec{} : old);
            }
            store(elements(dh_at(s, i, base)) + unit, dh);
          }
      }
      if (s >= 0) meet();
    }

    // What h of row i at step s gets from later steps (`recurrent`: dG W_hh), or as the final state.
    Vec incoming_h(int64_t s, int64_t i, int64_t unit, int64_t coming, const float* recurrent) const {
      const int64_t count = problem.output_size - unit, at = entry(i) * problem.output_size + unit;
      if (i >= coming) return args.dh_n ? load(args.dh_n + at, count) : Vec{};
      Vec dh = {};
      if (!is_reset(s + 1, i)) {
        dh = load(recurrent);
        if (problem.recurrent_mask) dh = dh * load(problem.recurrent_mask + at, count);
      }
      if (kGru || f.zoneout_.used()) dh += load(h_carry_at(i) + unit);
      return dh;
    }

    Vec output_gradient(int64_t s, int64_t i, int64_t unit) const {
      return dy ? load(dy + args.dy_rows.offset[time(s)] + entry(i) * args.dy_rows.stride + unit,
                       problem.output_size - unit)
                : Vec{};
    }

    // The second half of a step with the reset before the product: from dn to d(r * h) = dn W_hn, to dr and h_{t-1}.
    void recur_reset(int64_t s, Word* current) const {
      const int64_t hidden = problem.hidden_size, t = time(s), last = smaller(r1, active_at(s));
      for (int64_t p = p0; p < p1 && r0 < last; ++p) {
        multiply_rows_by_panel(last - r0, gate_words(), current + r0 * f.gradient_stride_ + 2 * gate_words(),
                               f.gradient_stride_, panel_at(p) + 2 * gate_words() * kColumns, product);
        for (int64_t i = r0; i < last; ++i)
          for (int vector = 0; vector < 2; ++vector) {
            const int64_t unit = p * kColumns + vector * kLanes, count = hidden - unit;
            if (count <= 0) break;
            const float* mask = problem.recurrent_mask ? problem.recurrent_mask + entry(i) * hidden + unit : nullptr;
            const Vec r = load(saved_at(t, i, unit));
            Vec drh = load(product + (i - r0) * kColumns + vector * kLanes), h = h_before(s, i, unit);
            if (mask) h = h * load(mask, count);
            const Vec dr = gru_reset_gradient(r, h, drh);
            if (f.norms()) {
              store(norm_work(i, unit), dr);
            } else {
              store(elements(current + i * f.gradient_stride_) + unit, dr, count);
            }
            drh = drh * r;
            if (mask) drh = drh * load(mask, count);
            if (!is_reset(s, i)) store(h_carry_at(i) + unit, load(h_carry_at(i) + unit) + drh);
          }
      }
      if (!f.norms() || r0 >= last) return;
      measure_gradients(s, 0b01, 0b11);
      meet();
      write_gradients(s, 0b01, 0b11, current);
    }

    const float* saved_at(int64_t t, int64_t i, int64_t unit) const {
      return args.saved + ((problem.row_base[t] + i) * f.vectors_ + unit / kLanes) * (saved_count(cell) * kLanes);
    }

    // The state of `size` units that row i had before step s: of a sequence of states that began with `initial`.
    template <class T>
    Vec state_before(const T* all, const Rows& rows, const float* initial, int64_t size, int64_t s, int64_t i,
                     int64_t unit) const {
      const int64_t b = entry(i), count = size - unit;
      if (is_reset(s, i)) return Vec{};
      if (i < active_at(s - 1)) return load(all + rows.offset[time(s - 1)] + b * rows.stride + unit, count);
      return initial ? load(initial + b * size + unit, count) : Vec{};
    }
    Vec h_before(int64_t s, int64_t i, int64_t unit) const {
      return state_before(y, args.y_rows, args.h0, problem.output_size, s, i, unit);
    }
    Vec c_before(int64_t s, int64_t i, int64_t unit) const {
      return state_before(args.c_all, args.c_rows, args.c0, problem.hidden_size, s, i, unit);
    }

    // The pointwise part for rows [from, last) of step s; rows below `coming` took part in step s + 1.
    void finish(int64_t s, int64_t p, int64_t from, int64_t coming, int64_t last, const float* recurrent,
                Word* current) const {
      const int64_t hidden = problem.hidden_size, gate = f.gate_stride_, t = s >= 0 ? time(s) : 0, now = active_at(s);
      const bool zoneout_h = f.zoneout_.used() && !weight_hr;
      for (int64_t i = from; i < last; ++i, recurrent += kColumns) {
        const int64_t b = entry(i);
        for (int vector = 0; vector < 2; ++vector) {
          const int64_t unit = p * kColumns + vector * kLanes, count = hidden - unit;
          if (count <= 0) break;
          const int64_t state_at = b * hidden + unit;
          Vec dh = {}, dc = {};
          if (!weight_hr) dh = incoming_h(s, i, unit, coming, recurrent + vector * kLanes);
          if (kLstm && i < coming) dc = load(c_carry_at(i) + unit);
          if (kLstm && i >= coming && args.dc_n) dc = load(args.dc_n + state_at, count);
          if (i >= now) {  // the sequence began at step s + 1
            if (args.dh0 && !weight_hr) store(args.dh0 + state_at, dh, count);
            if (kLstm && args.dc0) store(args.dc0 + state_at, dc, count);
            continue;
          }
          if (weight_hr) {
            dh = load(recurrent + vector * kLanes);
          } else {
            dh += output_gradient(s, i, unit);
          }

          const int64_t y_at = args.y_rows.offset[t] + b * args.y_rows.stride + unit;
          const bool reset = is_reset(s, i);
          const float* saved = saved_at(t, i, unit);
          Element* out = elements(current + i * f.gradient_stride_) + unit;
          Vec dh_old = {};  // what goes to h_{t-1} past the product with W_hh
          if (zoneout_h) f.zoneout_.row(0, t, b).split(unit, dh, dh, dh_old);
          if constexpr (kLstm) {
            if (args.dc_all)
              dc += load(args.dc_all + args.dc_all_rows.offset[t] + b * args.dc_all_rows.stride + unit, count);
            Vec dc_old = {};
            if (f.zoneout_.used()) f.zoneout_.row(1, t, b).split(unit, dc, dc, dc_old);
            if (f.norms()) {
              float* work = norm_work(i, unit);
              store(work, dh);
              store(work + kLanes, dc);
              store(work + 2 * kLanes, dc_old);  // lstm_normalized does the rest
            } else {
              LstmGates<Vec> gates = lstm_gates(saved);
              const Vec c_previous = c_before(s, i, unit);
              const Vec tanh_c = lstm_output_backward(gates, c_previous, dh, dc);
              gate_gradients(unit, gates, c_previous, tanh_c, dh, dc);
              store(out, gates.i, count);
              store(out + gate, gates.f, count);
              store(out + 2 * gate, gates.g, count);
              store(out + 3 * gate, gates.o, count);
              store(c_carry_at(i) + unit, reset ? Vec{} : dc + dc_old);
            }
          } else if constexpr (kResetBefore) {
            Vec z = load(saved + kLanes), n = load(saved + 2 * kLanes);
            gru_reset_before_backward(z, n, h_before(s, i, unit), dh);
            dh_old += dh;
            if (f.norms()) {
              store(norm_work(i, unit) + kLanes, z);
              store(norm_work(i, unit) + 2 * kLanes, n);
            } else {
              store(out + gate, z, count);
              store(out + 2 * gate, n, count);
            }
          } else if constexpr (kGru) {
            GruGates<Vec> gates{load(saved), load(saved + kLanes), load(saved + 2 * kLanes), load(saved + 3 * kLanes)};
            gru_backward(gates, h_before(s, i, unit), dh);
            dh_old += dh;
            if (f.norms()) {
              float* work = norm_work(i, unit);
              store(work, gates.r);
              store(work + kLanes, gates.z);
              store(work + 2 * kLanes, gates.n);
              store(work + 3 * kLanes, gates.h_n);
            } else {
              store(out, gates.h_n, count);
              store(out + gate, gates.r, count);
              store(out + 2 * gate, gates.z, count);
              store(out + 3 * gate, gates.n, count);
            }
          } else {
            // Under zoneout's expectation y is not the cell's own output, so that one is saved.
            const Vec h = args.saved ? load(saved_output(problem, args.saved, t, i) + unit) : load(y + y_at, count);
            if (f.norms()) {
              store(norm_work(i, unit), rnn_backward<cell>(h, dh));
            } else {
              store(out, rnn_backward<cell>(h, dh), count);
            }
          }
          if (kGru || zoneout_h) store(h_carry_at(i) + unit, reset ? Vec{} : dh_old);
        }
      }
    }

    float* norm_work(int64_t i, int64_t unit) const {
      return f.norm_work_.data() + (i * f.vectors_ + unit / kLanes) * (kNormValues * kLanes);
    }
    double* parameter_sums(int64_t slot) const {
      return reinterpret_cast<double*>(f.parameter_sums_.data()) + slot * f.parameter_sums_size();
    }
    const float* norm_saved(int64_t s, int64_t i) const {
      return args.norm_saved + (problem.row_base[time(s)] + i) * NormSaved<cell>::row_size(problem.hidden_size);
    }
    // The reciprocal standard deviation; 0 for one number alone, whose norm is constant, where the terms of its
    // gradient would cancel to rounding errors only.
    float slope(int64_t s, int64_t i, int index, int gates) const {
      if (gates * problem.hidden_size == 1) return 0.0f;
      return norm_saved(s, i)[NormSaved<cell>::deviation(problem.hidden_size, index)];
    }
    Vec normal(int64_t s, int64_t i, int64_t unit, int index) const {
      return load(norm_saved(s, i) + NormSaved<cell>::value(unit, index));
    }
    // Parameters of a norm at a gate's units.
    Vec parameter(const float* values, int gate, int64_t unit) const {
      return load(values + gate * problem.hidden_size + unit, problem.hidden_size - unit);
    }
    // c_t as its layer norm hands it to tanh.
    Vec normalized_c(int64_t s, int64_t i, int64_t unit) const {
      return normal(s, i, unit, NormSaved<cell>::kState) * parameter(args.norm_c.weight, 0, unit) +
             parameter(args.norm_c.bias, 0, unit);
    }
    static LstmGates<Vec> lstm_gates(const float* saved) {
      return {load(saved), load(saved + kLanes), load(saved + 2 * kLanes), load(saved + 3 * kLanes)};
    }
    void add_sums(int64_t index, int64_t unit, Vec values) const {
      double* to = parameter_sums(begin) + index * f.vectors_ * kLanes + unit;
      for (int lane = 0; lane < kLanes; ++lane) to[lane] += values[lane];
    }

    // As lstm_gate_gradients, with the peepholes where there are some.
    void gate_gradients(int64_t unit, LstmGates<Vec>& gates, Vec c_previous, Vec tanh_c, Vec dh, Vec& dc) const {
      if (!args.peephole) return lstm_gate_gradients(gates, c_previous, tanh_c, dh, dc);
      const Vec c = gates.f * c_previous + gates.i * gates.g;
      lstm_peephole_gate_gradients(gates, peephole_at(args.peephole, problem.hidden_size, unit), c_previous, tanh_c, dh,
                                   dc);
      add_sums(kPeepholeSums, unit, gates.i * c_previous);
      add_sums(kPeepholeSums + 1, unit, gates.f * c_previous);
      add_sums(kPeepholeSums + 2, unit, gates.o * c);
    }

    template <class Function>
    void for_units(Function function) const {
      for (int64_t p = p0; p < p1; ++p)
        for (int64_t unit = p * kColumns; unit < smaller(problem.hidden_size, (p + 1) * kColumns); unit += kLanes)
          function(unit);
    }

    // From what `finish` has left in norm_work_ to dG of step s, through the layer norms.
    void normalize_gradients(int64_t s, Word* current) const {
      if constexpr (kLstm) lstm_normalized(s);
      constexpr int kAll = (1 << kGroups) - 1;
      const int hidden = kResetBefore ? 0b10 : kAll, input = kResetBefore ? 0 : kAll;
      measure_gradients(s, hidden, input);
      meet();
      write_gradients(s, hidden, input, current);
    }

    // dh and dc in norm_work_ become the gradients of the gates, with tanh taken of the normalised c.
    void lstm_normalized(int64_t s) const {
      if constexpr (kLstm) {
        const int64_t now = smaller(r1, active_at(s)), t = time(s);
        if (args.norm_c.weight) {
          for_units([&](int64_t unit) {
            const Vec weight = parameter(args.norm_c.weight, 0, unit);
            Vec dweight = {}, dbias = {};
            for (int64_t i = r0; i < now; ++i) {
              float* work = norm_work(i, unit);
              const Vec tanh_c = tanh(normalized_c(s, i, unit)), x = normal(s, i, unit, NormSaved<cell>::kState);
              const Vec dn = load(work) * load(saved_at(t, i, unit) + 3 * kLanes) * (1.0f - tanh_c * tanh_c);
              store(work + 3 * kLanes, dn);
              f.parts_c_.put(i, 0, unit, sum(weight * dn), sum(weight * dn * x));
              dweight += dn * x;
              dbias += dn;
            }
            add_sums(kStateSums, unit, dweight);
            add_sums(kStateSums + 1, unit, dbias);
          });
          meet();
        }
        for (int64_t i = r0; i < now; ++i) {
          const bool reset = is_reset(s, i);
          const auto means = args.norm_c.weight ? f.parts_c_.means(i, 0, 1) : RowParts::Means{};
          for_units([&](int64_t unit) {
            float* work = norm_work(i, unit);
            const Vec dh = load(work), c_previous = c_before(s, i, unit);
            Vec dc = load(work + kLanes);
            LstmGates<Vec> gates = lstm_gates(saved_at(t, i, unit));
            Vec tanh_c;
            if (args.norm_c.weight) {
              dc += slope(s, i, NormSaved<cell>::kStateDeviation, 1) *
                    (parameter(args.norm_c.weight, 0, unit) * load(work + 3 * kLanes) - means.first -
                     normal(s, i, unit, NormSaved<cell>::kState) * means.second);
              tanh_c = tanh(normalized_c(s, i, unit));
            } else {
              tanh_c = lstm_output_backward(gates, c_previous, dh, dc);
            }
            gate_gradients(unit, gates, c_previous, tanh_c, dh, dc);
            store(c_carry_at(i) + unit, reset ? Vec{} : dc + load(work + 2 * kLanes));
            store(work, gates.i);
            store(work + kLanes, gates.f);
            store(work + 2 * kLanes, gates.g);
            store(work + 3 * kLanes, gates.o);
          });
        }
      }
    }

    // Where norm_work_ has the gradient that reaches a gate from W_hh h.
    static constexpr int hidden_value(int gate) { return cell == Cell::gru && gate == 2 ? 3 : gate; }

    // The sums that the norms' gradients need, of the groups that the masks name, and those of their parameters.
    void measure_gradients(int64_t s, int hidden, int input) const {
      const int64_t now = smaller(r1, active_at(s));
      auto measure = [&](int groups, const Norm& norm, const RowParts& parts, bool of_input) {
        const int first_sum = of_input ? 2 * kGates : 0;
        const int first_value = of_input ? NormSaved<cell>::kInput : NormSaved<cell>::kHidden;
        for_units([&](int64_t unit) {
          Vec dweight[kGates] = {}, dbias[kGates] = {};
          for (int64_t i = r0; i < now; ++i) {
            Vec first[2] = {}, second[2] = {};
            for (int gate = 0; gate < kGates; ++gate) {
              if (!(groups >> group_of<cell>(gate) & 1)) continue;
              const Vec dy = load(norm_work(i, unit) + (of_input ? gate : hidden_value(gate)) * kLanes);
              dbias[gate] += dy;
              if (!norm.weight) continue;
              const Vec x = normal(s, i, unit, first_value + gate), weighted = parameter(norm.weight, gate, unit) * dy;
              dweight[gate] += dy * x;
              first[group_of<cell>(gate)] += weighted;
              second[group_of<cell>(gate)] += weighted * x;
            }
            for (int group = 0; norm.weight && group < kGroups; ++group)
              if (groups >> group & 1) parts.put(i, group, unit, sum(first[group]), sum(second[group]));
          }
          for (int gate = 0; gate < kGates; ++gate) {
            if (!(groups >> group_of<cell>(gate) & 1)) continue;
            add_sums(first_sum + gate, unit, dweight[gate]);
            add_sums(first_sum + kGates + gate, unit, dbias[gate]);
          }
        });
      };
      measure(hidden, args.norm_hh, f.parts_hh_, false);
      measure(input, args.norm_ih, f.parts_ih_, true);
    }

    void write_gradients(int64_t s, int hidden, int input, Word* current) const {
      const int64_t now = smaller(r1, active_at(s));
      auto write = [&](int groups, const Norm& norm, const RowParts& parts, bool of_input) {
        const int first_value = of_input ? NormSaved<cell>::kInput : NormSaved<cell>::kHidden;
        const int first_deviation = of_input ? NormSaved<cell>::kInputDeviation : NormSaved<cell>::kHiddenDeviation;
        for (int64_t i = r0; i < now; ++i)
          for (int group = 0; group < kGroups; ++group) {
            if (!(groups >> group & 1)) continue;
            const Group gates = norm_group<cell>(group);
            const auto means = norm.weight ? parts.means(i, group, gates.gates) : RowParts::Means{};
            const float rstd = norm.weight ? slope(s, i, first_deviation + group, gates.gates) : 1.0f;
            for (int gate = gates.first; gate < gates.first + gates.gates; ++gate) {
              const int block = of_input ? kGates + gate : cell == Cell::gru ? (gate + 1) % 3 : gate;
              Element* out = elements(current + i * f.gradient_stride_) + block * f.gate_stride_;
              for_units([&](int64_t unit) {
                Vec d = load(norm_work(i, unit) + (of_input ? gate : hidden_value(gate)) * kLanes);
                if (norm.weight)
                  d = rstd * (parameter(norm.weight, gate, unit) * d - means.first -
                              normal(s, i, unit, first_value + gate) * means.second);
                store(out + unit, d, problem.hidden_size - unit);
              });
            }
          }
      };
      write(hidden, args.norm_hh, f.parts_hh_, false);
      write(input, args.norm_ih, f.parts_ih_, true);
    }

    // The slots' sums, added up, to the gradients of the peepholes, and with layer norm to those of its parameters and
    // of the biases.
    void parameter_gradients() const {
      wait();
      const int64_t from = share(problem.hidden_size, begin), last = share(problem.hidden_size, end);
      auto write = [&](int index, float* to) {
        for (int64_t unit = from; to && unit < last; ++unit) {
          double total = 0;
          for (int64_t slot = 0; slot < f.deal_.slots; ++slot)
            total += parameter_sums(slot)[index * f.vectors_ * kLanes + unit];
          to[unit] = total;
        }
      };
      auto at = [&](float* to, int gate) { return to ? to + gate * problem.hidden_size : nullptr; };
      for (int index = 0; index < 3; ++index) write(kPeepholeSums + index, at(args.dpeephole, index));
      if (!f.norms()) return;
      for (int gate = 0; gate < kGates; ++gate) {
        write(gate, at(args.dnorm_hh.weight, gate));
        write(kGates + gate, at(args.dnorm_hh.bias, gate));
        write(kGates + gate, at(args.dbias_hh, gate));
        write(2 * kGates + gate, at(args.dnorm_ih.weight, gate));
        write(3 * kGates + gate, at(args.dnorm_ih.bias, gate));
        write(3 * kGates + gate, at(args.dbias_ih, gate));
      }
      write(kStateSums, args.dnorm_c.weight);
      write(kStateSums + 1, args.dnorm_c.bias);
    }

    // function(row within the chunk, step, row within the step, t) for the steps [low, high], in memory order.
    template <class Function>
    void for_rows(int64_t low, int64_t high, int64_t base, Function function) const {
      for (int64_t s = low; s <= high; ++s)
        for (int64_t i = 0; i < active_at(s); ++i) function(problem.row_base[time(s)] - base + i, s, i, time(s));
    }

    // This thread's share of the right-hand side of dW: [h_{t-1} | x], in panels [rows][kColumns]; with the reset
    // before the product [h_{t-1} | x | r * h_{t-1}].
    void gather_right(int64_t low, int64_t high, int64_t base, int64_t rows) const {
      if (rows % kPerWord) zero_row(rows);
      if (args.dweight_hh) {
        for_rows(low, high, base, [&](int64_t row, int64_t s, int64_t i, int64_t t) {
          const float* mask =
              problem.recurrent_mask ? problem.recurrent_mask + entry(i) * problem.output_size : nullptr;
          for_vectors(f.h_panels_, [&](int64_t p, int64_t unit, int64_t column) {
            const int64_t count = problem.output_size - unit;
            Vec h = count > 0 ? h_before(s, i, unit) : Vec{};
            if (mask && count > 0) h = h * load(mask + unit, count);
            put_row(f.right_panel(p, rows), row, column, h);
            if constexpr (kResetBefore) {
              if (count > 0) h = h * load(saved_at(t, i, unit));
              put_row(f.right_panel(f.last_panels() + p, rows), row, column, h);
            }
          });
        });
      }
      if (args.dweight_ih) {
        for_rows(low, high, base, [&](int64_t row, int64_t, int64_t i, int64_t t) {
          const Element* from = x + args.x_rows.offset[t] + entry(i) * args.x_rows.stride;
          for_vectors(f.x_panels_, [&](int64_t p, int64_t unit, int64_t column) {
            put_row(f.right_panel(f.h_panels_ + p, rows), row, column, load(from + unit, problem.input_size - unit));
          });
        });
      }
      if (args.dweight_hr) {
        for_rows(low, high, base, [&](int64_t row, int64_t s, int64_t i, int64_t) {
          for_vectors(f.panels_, [&](int64_t p, int64_t unit, int64_t column) {
            put_row(f.right_panel(f.last_panels() + p, rows), row, column,
                    unit < problem.hidden_size ? unprojected(s, i, unit) : Vec{});
          });
        });
      }
    }

    // function(panel, first column of a vector, the same within the panel) for this thread's share of panels.
    template <class Function>
    void for_vectors(int64_t panels, Function function) const {
      for (int64_t p = share(panels, begin); p < share(panels, end); ++p)
        for (int column = 0; column < kColumns; column += kLanes) function(p, p * kColumns + column, column);
    }

    // The row that fills up the last words of this thread's panels.
    void zero_row(int64_t row) const {
      auto zero = [&](int64_t first, int64_t panels) {
        for_vectors(panels, [&](int64_t p, int64_t, int64_t column) {
          put_row(f.right_panel(first + p, row), row, column, Vec{});
        });
      };
      zero(0, f.h_panels_);
      zero(f.h_panels_, f.x_panels_);
      if (kResetBefore || weight_hr) zero(f.last_panels(), f.panels_);
    }

    // o * tanh(c), which a projection multiplies.
    Vec unprojected(int64_t s, int64_t i, int64_t unit) const {
      if constexpr (kLstm) {
        const LstmGates<Vec> gates = lstm_gates(saved_at(time(s), i, unit));
        return lstm_output(gates.o, args.norm_c.weight ? normalized_c(s, i, unit)
                                                       : gates.f * c_before(s, i, unit) + gates.i * gates.g);
      }
      return Vec{};
    }

    // This thread's columns of dh, packed as those of dG, behind them.
    void gather_projected(int64_t rows) const {
      double unused[kTile] = {};
      for_output_tiles([&](int64_t tile, int64_t column, int64_t count) {
        pack_columns(count, reinterpret_cast<const Element*>(f.dh_.data()) + column, f.dh_stride_ * kPerWord, rows,
                     columns + tile * f.tile_words_, unused);
      });
    }

    // function(tile within this thread's share, first column of dh, columns).
    template <class Function>
    void for_output_tiles(Function function) const {
      const int64_t first = share(problem.output_size, begin), size = share(problem.output_size, end) - first;
      const int64_t before =
          f.blocks_ * RowTiles(share(problem.hidden_size, end) - share(problem.hidden_size, begin), kTile).count;
      const RowTiles tiles(size, kTile);
      for (int64_t i = 0; i < tiles.count; ++i)
        function(before + i, first + tiles.begin(i), tiles.begin(i + 1) - tiles.begin(i));
    }

    // function(block, tile within this thread's share, first column, columns) for its tiles of each block of dG.
    template <class Function>
    void for_tiles(Function function) const {
      const int64_t first = share(problem.hidden_size, begin), size = share(problem.hidden_size, end) - first;
      const RowTiles tiles(size, kTile);
      for (int block = 0; block < f.blocks_; ++block)
        for (int64_t i = 0; i < tiles.count; ++i)
          function(block, block * tiles.count + i, first + tiles.begin(i), tiles.begin(i + 1) - tiles.begin(i));
    }

    // This thread's columns of dG, packed for dG^T B, and their sums for the biases.
    void gather_columns(Word* chunk, int64_t rows) const {
      for_tiles([&](int block, int64_t tile, int64_t column, int64_t count) {
        pack_columns(count, elements(chunk) + block * f.gate_stride_ + column, f.gradient_stride_ * kPerWord, rows,
                     columns + tile * f.tile_words_, f.sums() + block * problem.hidden_size + column);
      });
    }

    void zero_sums() const {
      for_tiles([&](int block, int64_t, int64_t column, int64_t count) {
        for (int64_t m = 0; m < count; ++m) f.sums()[block * problem.hidden_size + column + m] = 0;
      });
    }

    void bias_gradients() const {
      for_tiles([&](int block, int64_t, int64_t column, int64_t count) {
        const GradientBlock to = f.block_at(block);
        auto write = [&](float* bias, int gate) {
          for (int64_t m = 0; bias && gate >= 0 && m < count; ++m)
            bias[gate * problem.hidden_size + column + m] = f.sums()[block * problem.hidden_size + column + m];
        };
        write(args.dbias_hh, to.hidden_gate);
        write(args.dbias_ih, to.input_gate);
      });
    }

    void weight_gradients(int64_t rows, bool first) const {
      const int64_t panel_stride = words(rows) * kColumns, inputs = f.last_panels();
      const int64_t all = inputs + (kResetBefore ? f.panels_ : 0);
      const int64_t most = outer_depth(problem.hidden_size) / kPerWord;
      for (int64_t k = 0; k < words(rows); k += most) {
        const int64_t depth = smaller(most, words(rows) - k);
        for (int64_t panel = 0; panel < all;) {
          const bool hidden = panel < f.h_panels_ || panel >= inputs, reset_h = panel >= inputs;
          const int64_t stop = panel < f.h_panels_ ? f.h_panels_ : reset_h ? all : inputs;
          const int64_t taken = smaller(kBlockPanels, stop - panel);
          const int64_t column = (panel - (reset_h ? inputs : hidden ? 0 : f.h_panels_)) * kColumns;
          const int64_t size = hidden ? problem.output_size : problem.input_size;
          float* dweight = hidden ? args.dweight_hh : args.dweight_ih;
          if (dweight) {
            for_tiles([&](int block, int64_t tile, int64_t row, int64_t count) {
              const GradientBlock to = f.block_at(block);
              const int gate = hidden ? to.hidden_gate : to.input_gate;
              if (gate < 0 || (kResetBefore && hidden && reset_h != (gate == 2))) return;
              add_outer(count, depth, columns + tile * f.tile_words_ + k * count,
                        f.right_panel(panel, rows) + k * kColumns, panel_stride, taken, !first || k > 0,
                        dweight + (gate * problem.hidden_size + row) * size + column, size, size - column);
            });
          }
          panel += taken;
        }
        for (int64_t panel = 0; args.dweight_hr && panel < f.panels_; panel += kBlockPanels) {
          const int64_t size = problem.hidden_size, column = panel * kColumns;
          for_output_tiles([&](int64_t tile, int64_t row, int64_t count) {
            add_outer(count, depth, columns + tile * f.tile_words_ + k * count,
                      f.right_panel(inputs + panel, rows) + k * kColumns, panel_stride,
                      smaller(kBlockPanels, f.panels_ - panel), !first || k > 0, args.dweight_hr + row * size + column,
                      size, size - column);
          });
        }
      }
    }

    void input_gradient(int64_t low, int64_t high, int64_t base, Word* chunk, int64_t rows) const {
      if (!dx) return;
      Word* a = chunk + (f.norms() ? kGates : cell == Cell::gru ? 1 : 0) * gate_words();  // the blocks r z n
      if (!weight_ih) {
        const int64_t from = share(problem.hidden_size, begin), size = share(problem.hidden_size, end) - from;
        for (int gate = 0; gate < kGates; ++gate) {
          const int64_t column = gate * problem.hidden_size + from;
          for_rows(low, high, base, [&](int64_t row, int64_t, int64_t i, int64_t t) {
            __builtin_memcpy(dx + args.dx_rows.offset[t] + entry(i) * args.dx_rows.stride + column,
                             elements(a + row * f.gradient_stride_) + gate * f.gate_stride_ + from,
                             size * sizeof(Element));
          });
          zero_inactive(low, high, column, size);
        }
        return;
      }
      const int64_t first = share(f.x_panels_, begin), last = share(f.x_panels_, end), k_size = kGates * gate_words();
      const RowTiles tiles(rows, kTile);
      // Panels inside: rows * depth of dG stay in L2.
      for (int64_t k = 0; k < k_size; k += kBackwardDepth)
        for (int64_t p = first; p < last; ++p)
          for (int64_t i = 0; i < tiles.count; ++i) {
            float* c = dx_sums + ((p - first) * rows + tiles.begin(i)) * kColumns;
            tile_rows<2, false>(tiles.begin(i + 1) - tiles.begin(i), smaller(kBackwardDepth, k_size - k),
                                a + tiles.begin(i) * f.gradient_stride_ + k, f.gradient_stride_,
                                weight_ih + (p * k_size + k) * kColumns, kColumns, resume(k > 0, c, kColumns), c,
                                kColumns);
          }
      const int64_t from = first * kColumns, size = smaller(problem.input_size, last * kColumns) - from;
      for_rows(low, high, base, [&](int64_t row, int64_t, int64_t i, int64_t t) {
        Element* out = dx + args.dx_rows.offset[t] + entry(i) * args.dx_rows.stride;
        for (int64_t p = first; p < last; ++p)
          for (int vector = 0; vector < 2; ++vector)
            store(out + p * kColumns + vector * kLanes,
                  load(dx_sums + ((p - first) * rows + row) * kColumns + vector * kLanes),
                  problem.input_size - p * kColumns - vector * kLanes);
      });
      zero_inactive(low, high, from, size);
    }

    void zero_inactive(int64_t low, int64_t high, int64_t from, int64_t size) const {
      if (!problem.order || size <= 0) return;
      for (int64_t s = low; s <= high; ++s)
        for (int64_t i = active_at(s); i < problem.batch; ++i)
          __builtin_memset(dx + args.dx_rows.offset[time(s)] + entry(i) * args.dx_rows.stride + from, 0,
                           size * sizeof(Element));
    }
  };

  const Problem& problem_;
  const BackwardArgs& args_;
  const int64_t panels_, vectors_, h_panels_, x_panels_;
  const Deal deal_;
  mutable Barrier barrier_;
  const int64_t chunk_rows_, chunk_words_, dh_stride_, gate_stride_;
  const int blocks_;
  const int64_t gradient_stride_, state_stride_, tiles_, tile_words_, slot_floats_;
  const Zoneout zoneout_;
  const Scratch gradients_, h_carry_, c_carry_, sums_, right_, dh_, norm_work_, parameter_sums_;
  const RowParts parts_hh_, parts_ih_, parts_c_;
  const Scratch scratch_;
};

}  // namespace
}  // namespace fastrnn
