// pybind11 module fastrnn._C: the one file that knows Python. Tensors arrive as addresses (0 for none) that
// fastrnn/backends/cpu.py has checked and allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "cpu/beam.h"
#include "cpu/decode_step.h"
#include "cpu/decoder.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/threads.h"
#include "cuda/device_query.h"
#include "cuda/exchange_benchmark.h"
#include "cuda/recurrence.h"

namespace py = pybind11;
using namespace fastrnn;
using namespace fastrnn::cpu;

namespace {

template <class T = float>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Pooled memory that a tensor can be laid over.
struct Workspace {
  explicit Workspace(int64_t floats_in) : floats(floats_in), memory(floats_in) {}
  const int64_t floats;
  const Scratch memory;
};

// The kernels for a data type; bfloat16 only where the caller has seen that there are some.
const Kernels& kernels_for(bool bf16) { return bf16 ? *kernels_bf16() : kernels(); }

int team_size(int threads) { return std::clamp<int>(threads, 1, kMaxSlots); }

// A weight in the panels of the kernels, forward and backward, kept between calls.
class PackedWeight {
 public:
  PackedWeight(int cell, int64_t hidden_size, int64_t columns, bool hidden, bool bf16)
      : cell_(static_cast<Cell>(cell)), hidden_size_(hidden_size), columns_(columns), hidden_(hidden), bf16_(bf16) {}

  // Packs the weight [G*H, columns] at `address`, which holds floats or else elements of the kernels' data type. With
  // `reuse` nothing is done where the panels still match its address and a checksum of its contents: a version counter
  // would miss writes through .data or shared memory.
  void prepare(uintptr_t address, bool floats, bool backward, bool reuse, int threads) {
    Layout& layout = backward ? backward_ : forward_;
    const Kernels& k = kernels_for(bf16_);
    const void* weight = pointer(address);
    const int64_t size = gate_count(cell_) * hidden_size_ * columns_;
    if (layout.kernels != &k) {
      layout.panels.reset();
      layout.panels = std::make_unique<Scratch>(backward ? k.packed_backward_size(cell_, hidden_size_, columns_)
                                                         : k.packed_forward_size(cell_, hidden_size_, columns_));
      layout.kernels = &k;
      layout.source = nullptr;
    }
    py::gil_scoped_release release;
    const uint64_t checksum = reuse ? sum(k, weight, floats, size, team_size(threads)) : 0;
    if (reuse && layout.source == weight && layout.checksum == checksum) return;
    if (backward) {
      k.pack_backward(cell_, hidden_size_, columns_, hidden_, weight, floats, layout.panels->data(),
                      team_size(threads));
    } else {
      k.pack_forward(cell_, hidden_size_, columns_, hidden_, weight, floats, layout.panels->data(), team_size(threads));
    }
    layout.source = reuse ? weight : nullptr;
    layout.checksum = checksum;
  }

  const void* panels(bool backward) const { return (backward ? backward_ : forward_).panels->data(); }

 private:
  struct Layout {
    const Kernels* kernels = nullptr;
    std::unique_ptr<Scratch> panels;
    const void* source = nullptr;  // null: contents unknown
    uint64_t checksum = 0;
  };

  static uint64_t sum(const Kernels& k, const void* weight, bool floats, int64_t size, int threads) {
    if (floats) return k.checksum(static_cast<const float*>(weight), size, threads);
    const uint64_t last = size % 2 ? static_cast<const uint16_t*>(weight)[size - 1] : 0;
    return k.checksum(static_cast<const float*>(weight), size / 2, threads) + last * 0x9E3779B97F4A7C15ull;
  }

  const Cell cell_;
  const int64_t hidden_size_, columns_;
  const bool hidden_, bf16_;
  Layout forward_, backward_;
};

using Strides = std::pair<int64_t, int64_t>;

// What the options of a call add to the parameters: weights and biases of the layer norms of W_ih x, W_hh h and c, then
// the peepholes.
using Parameters = std::array<uintptr_t, 7>;

template <class Norm, class T>
Norm norm_at(const Parameters& parameters, int index) {
  return {pointer<T>(parameters[2 * index]), pointer<T>(parameters[2 * index + 1])};
}

template <class T>
T* peephole_at(const Parameters& parameters) {
  return pointer<T>(parameters[6]);
}

// Where the rows of a call lie and which of them take part in each step.
class Layout {
 public:
  Layout(int cell, bool reverse, int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
         int64_t output_size, uintptr_t lengths, uintptr_t batch_sizes, uintptr_t resets, Strides reset_strides,
         double zoneout, std::optional<uint64_t> zoneout_seed, uintptr_t recurrent_mask, bool bf16)
      : kernels(kernels_for(bf16)), active_(steps, batch), row_base_(steps + 1, 0), packed_(batch_sizes != 0) {
    if (packed_) {
      std::copy_n(pointer<const int64_t>(batch_sizes), steps, active_.begin());
    } else if (lengths) {
      const int64_t* length = pointer<const int64_t>(lengths);
      order_.resize(batch);
      std::iota(order_.begin(), order_.end(), 0);
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
      int64_t alive = batch;
      for (int64_t t = 0; t < steps; ++t) {
        while (alive > 0 && length[order_[alive - 1]] <= t) --alive;
        active_[t] = alive;
      }
    }
    std::partial_sum(active_.begin(), active_.end(), row_base_.begin() + 1);
    problem = {static_cast<Cell>(cell),
               reverse,
               steps,
               batch,
               input_size,
               hidden_size,
               output_size,
               active_.data(),
               row_base_.data(),
               order_.empty() ? nullptr : order_.data(),
               pointer<const uint8_t>(resets),
               reset_strides.first,
               reset_strides.second,
               zoneout,
               zoneout_seed.has_value(),
               zoneout_seed.value_or(0),
               pointer(recurrent_mask)};
  }

  // The rows of a tensor with these strides (the first is of no account where sequences are packed).
  Rows rows(Strides strides, std::vector<int64_t>& offsets) const {
    offsets.resize(problem.steps);
    for (int64_t t = 0; t < problem.steps; ++t)
      offsets[t] = packed_ ? row_base_[t] * strides.second : t * strides.first;
    return {offsets.data(), strides.second};
  }

  const Kernels& kernels;
  Problem problem;

 private:
  std::vector<int64_t> active_, row_base_, order_;
  bool packed_;
};

void forward(const Layout& layout, uintptr_t x, Strides x_strides, const PackedWeight* weight_ih,
             const PackedWeight& weight_hh, const PackedWeight* weight_hr, uintptr_t bias_ih, uintptr_t bias_hh,
             uintptr_t h0, uintptr_t c0, uintptr_t y, Strides y_strides, uintptr_t h_n, uintptr_t c_n, uintptr_t saved,
             uintptr_t c_all, Strides c_strides, const Parameters& parameters, uintptr_t norm_saved, int threads) {
  std::vector<int64_t> x_offsets, y_offsets, c_offsets;
  const ForwardArgs args{pointer(x),
                         layout.rows(x_strides, x_offsets),
                         weight_ih ? weight_ih->panels(false) : nullptr,
                         weight_hh.panels(false),
                         weight_hr ? weight_hr->panels(false) : nullptr,
                         pointer(bias_ih),
                         pointer(bias_hh),
                         pointer(h0),
                         pointer(c0),
                         pointer(y),
                         layout.rows(y_strides, y_offsets),
                         pointer(h_n),
                         pointer(c_n),
                         pointer(saved),
                         pointer(c_all),
                         layout.rows(c_strides, c_offsets),
                         norm_at<Norm, const float>(parameters, 0),
                         norm_at<Norm, const float>(parameters, 1),
                         norm_at<Norm, const float>(parameters, 2),
                         pointer(norm_saved),
                         peephole_at<const float>(parameters)};
  py::gil_scoped_release release;
  layout.kernels.forward(layout.problem, args, team_size(threads));
}

void backward(const Layout& layout, uintptr_t dy, Strides dy_strides, uintptr_t dh_n, uintptr_t dc_n, uintptr_t dc_all,
              Strides dc_all_strides, uintptr_t x, Strides x_strides, const PackedWeight* weight_ih,
              const PackedWeight& weight_hh, const PackedWeight* weight_hr, uintptr_t h0, uintptr_t c0, uintptr_t y,
              Strides y_strides, uintptr_t saved, uintptr_t c_all, Strides c_strides, uintptr_t dx, Strides dx_strides,
              uintptr_t dweight_ih, uintptr_t dweight_hh, uintptr_t dweight_hr, uintptr_t dbias_ih, uintptr_t dbias_hh,
              uintptr_t dh0, uintptr_t dc0, const Parameters& parameters, uintptr_t norm_saved,
              const Parameters& dparameters, int threads) {
  std::vector<int64_t> dy_offsets, dc_all_offsets, x_offsets, y_offsets, c_offsets, dx_offsets;
  const BackwardArgs args{pointer(dy),
                          layout.rows(dy_strides, dy_offsets),
                          pointer(dh_n),
                          pointer(dc_n),
                          pointer(dc_all),
                          layout.rows(dc_all_strides, dc_all_offsets),
                          pointer(x),
                          layout.rows(x_strides, x_offsets),
                          weight_ih ? weight_ih->panels(true) : nullptr,
                          weight_hh.panels(true),
                          weight_hr ? weight_hr->panels(true) : nullptr,
                          pointer(h0),
                          pointer(c0),
                          pointer(y),
                          layout.rows(y_strides, y_offsets),
                          pointer(saved),
                          pointer(c_all),
                          layout.rows(c_strides, c_offsets),
                          pointer(dx),
                          layout.rows(dx_strides, dx_offsets),
                          pointer(dweight_ih),
                          pointer(dweight_hh),
                          pointer(dweight_hr),
                          pointer(dbias_ih),
                          pointer(dbias_hh),
                          pointer(dh0),
                          pointer(dc0),
                          norm_at<Norm, const float>(parameters, 0),
                          norm_at<Norm, const float>(parameters, 1),
                          norm_at<Norm, const float>(parameters, 2),
                          pointer(norm_saved),
                          norm_at<NormGradient, float>(dparameters, 0),
                          norm_at<NormGradient, float>(dparameters, 1),
                          norm_at<NormGradient, float>(dparameters, 2),
                          peephole_at<const float>(parameters),
                          peephole_at<float>(dparameters)};
  py::gil_scoped_release release;
  layout.kernels.backward(layout.problem, args, team_size(threads));
}

Problem step_problem(int cell, int64_t batch, int64_t input_size, int64_t hidden_size) {
  Problem problem{};
  problem.cell = static_cast<Cell>(cell);
  problem.steps = 1;
  problem.batch = batch;
  problem.input_size = input_size;
  problem.hidden_size = hidden_size;
  return problem;
}

void step(int cell, int64_t batch, int64_t input_size, int64_t hidden_size, uintptr_t x, int64_t x_stride,
          uintptr_t weight_ih, uintptr_t weight_hh, uintptr_t bias_ih, uintptr_t bias_hh, uintptr_t h0, uintptr_t c0,
          uintptr_t h, uintptr_t c, uintptr_t saved, int threads) {
  const StepArgs args{pointer(x),       x_stride,         pointer(weight_ih), pointer(weight_hh),
                      pointer(bias_ih), pointer(bias_hh), pointer(h0),        pointer(c0),
                      pointer(h),       pointer(c),       pointer(saved)};
  py::gil_scoped_release release;
  kernels().step(step_problem(cell, batch, input_size, hidden_size), args, team_size(threads));
}

void step_backward(int cell, int64_t batch, int64_t input_size, int64_t hidden_size, uintptr_t dh, uintptr_t dc,
                   uintptr_t x, int64_t x_stride, uintptr_t weight_ih, uintptr_t weight_hh, uintptr_t h0, uintptr_t c0,
                   uintptr_t h, uintptr_t c, uintptr_t saved, uintptr_t dx, uintptr_t dweight_ih, uintptr_t dweight_hh,
                   uintptr_t dbias_ih, uintptr_t dbias_hh, uintptr_t dh0, uintptr_t dc0, int threads) {
  const StepBackwardArgs args{pointer(dh),         pointer(dc),         pointer(x),        x_stride,
                              pointer(weight_ih),  pointer(weight_hh),  pointer(h0),       pointer(c0),
                              pointer(h),          pointer(c),          pointer(saved),    pointer(dx),
                              pointer(dweight_ih), pointer(dweight_hh), pointer(dbias_ih), pointer(dbias_hh),
                              pointer(dh0),        pointer(dc0)};
  py::gil_scoped_release release;
  kernels().step_backward(step_problem(cell, batch, input_size, hidden_size), args, team_size(threads));
}

// Address, elements from memory to memory, elements from row to row.
using Place = std::tuple<uintptr_t, int64_t, int64_t>;

Matrices matrices(const Place& place) {
  return {pointer<const float>(std::get<0>(place)), std::get<1>(place), std::get<2>(place)};
}

// Batch, queries, keys, size, value size, channels.
using AttentionSizes = std::array<int64_t, 6>;

AttentionInputs attention_inputs(int number, const AttentionSizes& sizes, const Place& query, const Place& key,
                                 const Place& value, uintptr_t v, uintptr_t features, uintptr_t feature_weight,
                                 const Place& factors, uintptr_t lengths, uintptr_t mask,
                                 const std::array<int64_t, 3>& mask_strides, bool causal, bool softmax, float scale) {
  const auto [batch, queries, keys, size, value_size, channels] = sizes;
  const auto [mask_b, mask_row, mask_key] = mask_strides;
  return {static_cast<Number>(number),
          batch,
          queries,
          keys,
          size,
          value_size,
          channels,
          matrices(query),
          matrices(key),
          matrices(value),
          pointer(v),
          matrices(factors),
          pointer(features),
          pointer(feature_weight),
          pointer<const int64_t>(lengths),
          pointer<const uint8_t>(mask),
          mask_b,
          mask_row,
          mask_key,
          causal,
          softmax,
          scale};
}

void attention_forward(const AttentionInputs& in, const Place& context, uintptr_t weights, int threads) {
  const auto [address, stride_b, stride_row] = context;
  const AttentionForward call{in, pointer(address), stride_b, stride_row, pointer(weights), in.queries * in.keys};
  py::gil_scoped_release release;
  attention_kernels().forward(call, team_size(threads));
}

void attention_backward(const AttentionInputs& in, const Place& dcontext, const Place& dweights, uintptr_t weights,
                        uintptr_t dquery, uintptr_t dkey, uintptr_t dvalue, uintptr_t dv, uintptr_t dfeatures,
                        uintptr_t dfeature_weight, int threads) {
  const AttentionBackward call{in,
                               matrices(dcontext),
                               matrices(dweights),
                               pointer(weights),
                               in.queries * in.keys,
                               pointer(dquery),
                               pointer(dkey),
                               pointer(dvalue),
                               pointer(dv),
                               pointer(dfeatures),
                               pointer(dfeature_weight)};
  py::gil_scoped_release release;
  attention_kernels().backward(call, team_size(threads));
}

// Calls with many members are filled field by field; addresses are integers, as everywhere here.
template <class Call>
class Fields {
 public:
  Fields(py::module_& m, const char* name) : bound_(m, name) { bound_.def(py::init<>()); }

  template <class T>
  Fields& address(const char* name, T* Call::* field) {
    bound_.def_property(
        name, [field](const Call& call) { return reinterpret_cast<uintptr_t>(call.*field); },
        [field](Call& call, uintptr_t address) { call.*field = pointer<T>(address); });
    return *this;
  }
  Fields& norm(const char* name, cuda::Norm Call::* field) {
    return set<std::array<uintptr_t, 2>>(name, [field](Call& call, const std::array<uintptr_t, 2>& norm) {
      call.*field = {pointer<const float>(norm[0]), pointer<const float>(norm[1])};
    });
  }
  Fields& rows(const char* name, cuda::Sequence Call::* field) {
    return set<Strides>(name, [field](Call& call, Strides strides) { call.*field = {strides.first, strides.second}; });
  }
  template <class Value, class Set>
  Fields& set(const char* name, Set set) {
    bound_.def_property(name, nullptr, py::cpp_function(set, py::is_method(bound_)));
    return *this;
  }
  template <class Field>
  Fields& value(const char* name, Field Call::* field) {
    bound_.def_readwrite(name, field);
    return *this;
  }

 private:
  py::class_<Call> bound_;
};

void bind_decoder(py::module_& m) {
  Fields<DecoderLayer>(m, "DecoderLayer")
      .value("input_size", &DecoderLayer::input_size)
      .address("weight_ih", &DecoderLayer::weight_ih)
      .address("weight_hh", &DecoderLayer::weight_hh)
      .address("bias_ih", &DecoderLayer::bias_ih)
      .address("bias_hh", &DecoderLayer::bias_hh)
      .address("x", &DecoderLayer::x)
      .address("h", &DecoderLayer::h)
      .address("c", &DecoderLayer::c)
      .address("saved", &DecoderLayer::saved)
      .address("mask", &DecoderLayer::mask)
      .address("dh", &DecoderLayer::dh)
      .address("dc", &DecoderLayer::dc)
      .address("dx", &DecoderLayer::dx)
      .address("dh0", &DecoderLayer::dh0)
      .address("dc0", &DecoderLayer::dc0)
      .address("dweight_ih", &DecoderLayer::dweight_ih)
      .address("dweight_hh", &DecoderLayer::dweight_hh)
      .address("dbias_ih", &DecoderLayer::dbias_ih)
      .address("dbias_hh", &DecoderLayer::dbias_hh);
  Fields<Decoder>(m, "Decoder")
      .set<int>("cell", [](Decoder& decoder, int cell) { decoder.cell = static_cast<Cell>(cell); })
      .value("steps", &Decoder::steps)
      .value("batch", &Decoder::batch)
      .value("hidden_size", &Decoder::hidden_size)
      .value("context_size", &Decoder::context_size)
      .value("layers", &Decoder::layers)
      .value("attention", &Decoder::attention)
      .address("query_weight", &Decoder::query_weight)
      .address("query", &Decoder::query)
      .address("context", &Decoder::context)
      .address("weights", &Decoder::weights)
      .value("weights_t", &Decoder::weights_t)
      .value("weights_b", &Decoder::weights_b)
      .address("dcontext", &Decoder::dcontext)
      .address("dweights", &Decoder::dweights)
      .address("dquery", &Decoder::dquery)
      .address("dkey", &Decoder::dkey)
      .address("dvalue", &Decoder::dvalue)
      .address("dv", &Decoder::dv);
  m.def("decoder_forward", [](const Decoder& decoder, int threads) {
    py::gil_scoped_release release;
    decoder_forward(decoder, team_size(threads));
  });
  m.def("decoder_backward", [](const Decoder& decoder, int threads) {
    py::gil_scoped_release release;
    decoder_backward(decoder, team_size(threads));
  });
}

void bind_search(py::module_& m) {
  Fields<DecodeStep>(m, "DecodeStep")
      .value("decoder", &DecodeStep::decoder)
      .value("before", &DecodeStep::before)
      .address("embedding", &DecodeStep::embedding)
      .value("embedding_size", &DecodeStep::embedding_size)
      .address("output", &DecodeStep::output)
      .address("readout", &DecodeStep::readout)
      .value("readout_size", &DecodeStep::readout_size)
      .address("read", &DecodeStep::read)
      .address("panels", &DecodeStep::panels)
      .address("bias", &DecodeStep::bias)
      .value("vocabulary", &DecodeStep::vocabulary);
  m.def("decode_logits", [](const DecodeStep& step, uintptr_t tokens, uintptr_t rows, uintptr_t logits, int threads) {
    py::gil_scoped_release release;
    decode_step(step, pointer<const int64_t>(tokens), pointer<const int64_t>(rows), pointer(logits),
                team_size(threads));
  });
  m.def("decode_best", [](const DecodeStep& step, uintptr_t tokens, uintptr_t rows, int64_t group_size, int64_t k,
                          uintptr_t scores, uintptr_t values, uintptr_t indices, uintptr_t normalizers, int threads) {
    TopK found{};
    found.groups = step.decoder.batch / group_size;
    found.group_size = group_size;
    found.k = k;
    found.scores = pointer(scores);
    found.values = pointer(values);
    found.indices = pointer<int64_t>(indices);
    found.normalizers = pointer(normalizers);
    py::gil_scoped_release release;
    decode_step(step, pointer<const int64_t>(tokens), pointer<const int64_t>(rows), found, team_size(threads));
  });

  Fields<Beams>(m, "Beams")
      .value("sentences", &Beams::sentences)
      .value("beams", &Beams::beams)
      .value("ends", &Beams::ends)
      .address("eos", &Beams::eos)
      .address("min_length", &Beams::min_length)
      .address("max_length", &Beams::max_length)
      .address("divisor", &Beams::divisor)
      .address("bonus", &Beams::bonus)
      .address("largest_divisor", &Beams::largest_divisor)
      .address("largest_bonus", &Beams::largest_bonus)
      .value("longest", &Beams::longest)
      .set<int>("rule", [](Beams& beams, int rule) { beams.rule = static_cast<StopRule>(rule); })
      .value("wanted", &Beams::wanted)
      .value("enough", &Beams::enough)
      .address("scores", &Beams::scores)
      .address("done", &Beams::done)
      .address("broken", &Beams::broken)
      .address("count", &Beams::count)
      .address("key", &Beams::key)
      .address("score", &Beams::score)
      .address("increment", &Beams::increment)
      .address("step", &Beams::step)
      .address("beam", &Beams::beam)
      .address("token", &Beams::token);
  m.def("beam_step", [](const Beams& beams, uintptr_t values, uintptr_t indices, int64_t count, int64_t vocabulary,
                        uintptr_t extra, uintptr_t normalizers, int64_t length, uintptr_t tokens, uintptr_t parents,
                        uintptr_t rows, uintptr_t increments) {
    const Candidates candidates{pointer(values),     pointer<const int64_t>(indices), count, vocabulary, pointer(extra),
                                pointer(normalizers)};
    return beam_step(
        beams, candidates, length,
        {pointer<int64_t>(tokens), pointer<int64_t>(parents), pointer<int64_t>(rows), pointer(increments)});
  });
  m.def("trace_back", [](const std::vector<std::array<uintptr_t, 3>>& steps, int64_t batch, int64_t beams,
                         int64_t wanted, int64_t longest, uintptr_t step, uintptr_t beam, uintptr_t token,
                         uintptr_t increment, uintptr_t tokens, uintptr_t log_probs) {
    std::vector<Trace> traces;
    for (const auto& [step_tokens, step_parents, step_increments] : steps)
      traces.push_back(
          {pointer<const int64_t>(step_tokens), pointer<const int64_t>(step_parents), pointer(step_increments)});
    trace_back(traces.data(), batch, beams, wanted, longest, pointer<const int64_t>(step), pointer<const int64_t>(beam),
               pointer<const int64_t>(token), pointer(increment), pointer<int64_t>(tokens), pointer(log_probs));
  });
}

void bind_cuda(py::module_& m) {
  using cuda::Backward, cuda::Forward, cuda::Problem;
  Fields<Problem>(m, "CudaProblem")
      .set<int>("cell", [](Problem& problem, int cell) { problem.cell = static_cast<Cell>(cell); })
      .set<int>("math", [](Problem& problem, int math) { problem.math = static_cast<cuda::Math>(math); })
      .value("reverse", &Problem::reverse)
      .value("steps", &Problem::steps)
      .value("batch", &Problem::batch)
      .value("hidden_size", &Problem::hidden_size)
      .value("rows", &Problem::rows)
      .address("row_starts", &Problem::row_starts)
      .address("lengths", &Problem::lengths)
      .address("resets", &Problem::resets)
      .rows("reset_strides", &Problem::reset_strides)
      .value("zoneout", &Problem::zoneout)
      .value("zoneout_random", &Problem::zoneout_random)
      .value("zoneout_seed", &Problem::zoneout_seed)
      .address("recurrent_mask", &Problem::recurrent_mask)
      .norm("norm_hh", &Problem::norm_hh)
      .norm("norm_c", &Problem::norm_c)
      .address("peephole", &Problem::peephole);
  Fields<Forward>(m, "CudaForward")
      .value("problem", &Forward::problem)
      .address("gates_x", &Forward::gates_x)
      .rows("gates_x_rows", &Forward::gates_x_rows)
      .address("weight_hh", &Forward::weight_hh)
      .address("bias_hh", &Forward::bias_hh)
      .address("h0", &Forward::h0)
      .address("c0", &Forward::c0)
      .address("y", &Forward::y)
      .rows("y_rows", &Forward::y_rows)
      .address("h_n", &Forward::h_n)
      .address("c_n", &Forward::c_n)
      .address("packed_weight", &Forward::packed_weight)
      .address("h_in", &Forward::h_in)
      .address("rh", &Forward::rh)
      .address("stats", &Forward::stats)
      .address("saved", &Forward::saved)
      .address("c_all", &Forward::c_all)
      .rows("c_rows", &Forward::c_rows)
      .address("norm_saved", &Forward::norm_saved)
      .address("deviations", &Forward::deviations);
  Fields<Backward>(m, "CudaBackward")
      .value("problem", &Backward::problem)
      .address("dy", &Backward::dy)
      .rows("dy_rows", &Backward::dy_rows)
      .address("dh_n", &Backward::dh_n)
      .address("dc_n", &Backward::dc_n)
      .address("dc_all", &Backward::dc_all)
      .rows("dc_all_rows", &Backward::dc_all_rows)
      .address("weight_hh", &Backward::weight_hh)
      .address("h0", &Backward::h0)
      .address("c0", &Backward::c0)
      .address("y", &Backward::y)
      .rows("y_rows", &Backward::y_rows)
      .address("saved", &Backward::saved)
      .address("c_all", &Backward::c_all)
      .rows("c_rows", &Backward::c_rows)
      .address("norm_saved", &Backward::norm_saved)
      .address("deviations", &Backward::deviations)
      .address("packed_weight", &Backward::packed_weight)
      .address("dproduct", &Backward::dproduct)
      .address("stats", &Backward::stats)
      .address("dgates_x", &Backward::dgates_x)
      .rows("dgates_x_rows", &Backward::dgates_x_rows)
      .address("dh0", &Backward::dh0)
      .address("dc0", &Backward::dc0)
      .address("sums", &Backward::sums);

  const auto check = [](const char* error) {
    if (error) throw std::runtime_error(error);
  };
  // One or two directions, the tile (unit groups, rows), the stream.
  m.def("cuda_forward", [check](const std::vector<Forward>& directions, std::pair<int, int> tile, uintptr_t stream) {
    check(cuda::recurrence_forward(directions.data(), static_cast<int>(directions.size()), {tile.first, tile.second},
                                   pointer<void>(stream)));
  });
  m.def("cuda_backward", [check](const std::vector<Backward>& directions, std::pair<int, int> tile, uintptr_t stream) {
    check(cuda::recurrence_backward(directions.data(), static_cast<int>(directions.size()), {tile.first, tile.second},
                                    pointer<void>(stream)));
  });
  // Multiprocessors, bytes of shared memory of a block, and 90 for sm_90, of the current device.
  m.def("cuda_limits", [check] {
    cuda::DeviceLimits found;
    check(cuda::device_limits(found));
    return std::make_tuple(found.multiprocessors, found.shared_bytes, found.capability);
  });
  m.def("cuda_packed_bytes", [](int cell, int math, int64_t hidden_size) {
    return cuda::packed_bytes(static_cast<Cell>(cell), static_cast<cuda::Math>(math), hidden_size);
  });
  m.def("cuda_stats_bytes", &cuda::stats_bytes);
  m.def("cuda_saved_slots", [](int cell) { return cuda::saved_slots(static_cast<Cell>(cell)); });
  m.def("cuda_gradient_sums", [](int cell, bool norm_hh, bool norm_c, bool peephole) {
    return cuda::gradient_sums(static_cast<Cell>(cell), norm_hh, norm_c, peephole);
  });
  // Blocks that one direction and one group of rows need, blocks that the current device holds at once, bytes of shared
  // memory, and bytes of weights that each block reads from L2 at every step.
  m.def("cuda_fit",
        [check](int cell, int math, int64_t hidden_size, std::pair<int, int> tile, bool norms, bool backward) {
          cuda::Fit fit;
          check(cuda::recurrence_fit(static_cast<Cell>(cell), static_cast<cuda::Math>(math), hidden_size,
                                     {tile.first, tile.second}, norms, backward, fit));
          return std::make_tuple(fit.blocks_needed, fit.blocks_at_once, fit.shared_bytes, fit.streamed_bytes);
        });
  m.def("cuda_exchange_bytes", [](int method, int blocks, int threads, int cluster, int slice, int rounds) {
    return exchange_benchmark_bytes(
        {static_cast<Exchange>(method), blocks, threads, cluster, slice, rounds, nullptr, nullptr, nullptr});
  });
  m.def("cuda_exchange_benchmark", [check](int method, int blocks, int threads, int cluster, int slice, int rounds,
                                           uintptr_t memory, uintptr_t sums, uintptr_t stream) {
    check(cuda_exchange_benchmark({static_cast<Exchange>(method), blocks, threads, cluster, slice, rounds,
                                   pointer<void>(memory), pointer<uint32_t>(sums), pointer<void>(stream)}));
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_status", &cuda_status);
  m.def("cuda_device_type", &cuda_device_type);
  bind_cuda(m);

  m.def("set_parallel_for", [](uintptr_t function) { set_parallel_for(reinterpret_cast<ParallelFor>(function)); });
  m.def("cpu_isa", [] { return kernels().isa; });
  m.def("cpu_isas", &available_isas);
  m.def("use_cpu_isa", &use_isa);
  m.def("has_bf16", [] { return kernels_bf16() != nullptr; });
  m.def(
      "fma_ceiling",
      [](int threads, double milliseconds, bool bf16) {
        py::gil_scoped_release release;
        return kernels_for(bf16).fma_ceiling(threads, milliseconds * 1e-3) * 1e-9;
      },
      py::arg(), py::arg(), py::arg() = false);
  m.def("stream_bandwidth", [](int64_t bytes, int threads) {
    const Scratch buffer(bytes / 4);
    std::fill_n(buffer.data(), bytes / 4, 1.0f);
    py::gil_scoped_release release;
    return kernels().read_bandwidth(buffer.data(), bytes / 4, threads, 10e-3) * 1e-9;
  });
  m.def("checksum", [](uintptr_t data, int64_t size, int threads) {
    return kernels().checksum(pointer(data), size, team_size(threads));
  });
  m.def("dropout", [](uintptr_t x, int64_t x_stride, int64_t rows, int64_t columns, double probability, float scale,
                      uint64_t seed, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    kernels().dropout(pointer(x), x_stride, rows, columns, probability, scale, seed, pointer(out), team_size(threads));
  });
  m.def("lanes", [] { return kernels().lanes; });
  // Floats that the forward pass keeps of activations, and of layer norms.
  m.def("saved_sizes", [](int cell, int64_t rows, int64_t hidden_size, bool zoneout_expected, bool norms) {
    const Cell c = static_cast<Cell>(cell);
    return std::make_pair(kernels().saved_size(c, rows, hidden_size, zoneout_expected),
                          norms ? kernels().norm_saved_size(c, rows, hidden_size) : 0);
  });

  py::class_<Workspace>(m, "Workspace", py::buffer_protocol()).def(py::init<int64_t>()).def_buffer([](Workspace& w) {
    return py::buffer_info(w.memory.data(), w.floats);
  });
  py::class_<PackedWeight>(m, "PackedWeight")
      .def(py::init<int, int64_t, int64_t, bool, bool>())
      .def("prepare", &PackedWeight::prepare)
      .def("address", [](const PackedWeight& weight, bool backward) {
        return reinterpret_cast<uintptr_t>(weight.panels(backward));
      });
  py::class_<Layout>(m, "Layout")
      .def(py::init<int, bool, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, Strides,
                    double, std::optional<uint64_t>, uintptr_t, bool>());
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("step", &step);
  m.def("step_backward", &step_backward);

  py::class_<AttentionInputs>(m, "AttentionInputs").def(py::init(&attention_inputs));
  m.def("attention_forward", &attention_forward);
  m.def("attention_backward", &attention_backward);
  m.def("multiply_packed", [](int64_t rows, int64_t depth, uintptr_t a, int64_t lda, const PackedWeight& weight,
                              bool backward, int64_t columns, uintptr_t out, int threads) {
    const void* panels = weight.panels(backward);
    py::gil_scoped_release release;
    attention_kernels().multiply_panels(rows, depth, pointer(a), lda, panels, columns, false, pointer(out), columns,
                                        team_size(threads));
  });
  m.def("outer_product", [](int64_t rows, uintptr_t a, int64_t m, uintptr_t b, int64_t n, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    attention_kernels().outer_product(rows, pointer(a), m, pointer(b), n, pointer(out), team_size(threads));
  });
  m.def("top_k_log_softmax", [](int number, int64_t groups, int64_t group_size, int64_t vocabulary, int64_t k,
                                uintptr_t logits, int64_t stride, uintptr_t scores, uintptr_t given, uintptr_t values,
                                uintptr_t indices, uintptr_t normalizers, int threads) {
    const TopK call{static_cast<Number>(number),
                    groups,
                    group_size,
                    vocabulary,
                    k,
                    pointer<const void>(logits),
                    stride,
                    nullptr,
                    nullptr,
                    nullptr,
                    0,
                    pointer(scores),
                    pointer(given),
                    pointer(values),
                    pointer<int64_t>(indices),
                    pointer(normalizers)};
    py::gil_scoped_release release;
    top_k_kernel()(call, team_size(threads));
  });
  bind_decoder(m);
  bind_search(m);
}
