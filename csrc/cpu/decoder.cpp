#include "cpu/decoder.h"

#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace fastrnn::cpu {

namespace {

// `rows` sequences of one step.
struct OneStep {
  int64_t row_base[2];
  Problem problem;

  OneStep(const Decoder& decoder, const DecoderLayer& layer, int64_t rows) : row_base{0, rows}, problem{} {
    problem.cell = decoder.cell;
    problem.steps = 1;
    problem.batch = rows;
    problem.input_size = layer.input_size;
    problem.hidden_size = problem.output_size = decoder.hidden_size;
    problem.active = row_base + 1;
    problem.row_base = row_base;
  }
};

constexpr int64_t kAtStart[1] = {0};

Rows rows_of(int64_t size) { return {kAtStart, size}; }

// An array of a layer at step t, null where there is none.
template <class T>
T* at(T* array, int64_t t, int64_t step) {
  return array ? array + t * step : nullptr;
}

void add(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// The attention of step t, whose queries lie in rows of the size.
AttentionInputs of_step(const Decoder& decoder, int64_t t) {
  AttentionInputs in = decoder.attention;
  const DecoderLayer& top = decoder.layers.back();
  const float* query =
      decoder.query_weight ? decoder.query + t * decoder.batch * in.size : top.h + (t + 1) * decoder.batch * in.size;
  in.query = {query, in.queries * in.size, in.size};
  return in;
}

int64_t saved_step(const Decoder& decoder) {
  return kernels().saved_size(decoder.cell, decoder.batch, decoder.hidden_size, false);
}

// What the backward pass of a layer reads at step t, or, with rows = T * N at step 0, at all steps.
BackwardArgs backward_args(const Decoder& decoder, const DecoderLayer& layer, int64_t t) {
  const int64_t hidden = decoder.hidden_size, states = decoder.batch * hidden;
  BackwardArgs args{};
  args.dy = layer.dh + t * states;
  args.dy_rows = args.y_rows = args.c_rows = rows_of(hidden);
  args.dc_n = at(layer.dc, t, states);
  args.x = layer.x + t * decoder.batch * layer.input_size;
  args.x_rows = args.dx_rows = rows_of(layer.input_size);
  args.weight_ih = layer.weight_ih;
  args.weight_hh = layer.weight_hh;
  args.h0 = layer.h + t * states;
  args.c0 = at(layer.c, t, states);
  args.y = layer.h + (t + 1) * states;
  args.c_all = at(layer.c, t + 1, states);
  args.saved = at(layer.saved, t, saved_step(decoder));
  return args;
}

// Queries, keys and values of all steps at once, for the gradients that are sums over them.
void attention_gradients(const Decoder& decoder, int threads) {
  AttentionBackward call{};
  call.in = of_step(decoder, 0);
  call.in.queries = decoder.steps;
  call.in.query.stride_b = call.in.size;
  call.in.query.stride_row = decoder.batch * call.in.size;
  call.dcontext = {decoder.dcontext, decoder.context_size, decoder.batch * decoder.context_size};
  call.dweights = {decoder.dweights, decoder.steps * call.in.keys, call.in.keys};
  call.weights = decoder.weights;
  call.weights_b = decoder.weights_b;
  call.dkey = decoder.dkey;
  call.dvalue = decoder.dvalue;
  call.dv = decoder.dv;
  attention_kernels().backward(call, threads);
}

}  // namespace

void decoder_forward(const Decoder& decoder, int threads) {
  const int64_t rows = decoder.batch, hidden = decoder.hidden_size, states = rows * hidden;
  const DecoderLayer &first = decoder.layers.front(), &top = decoder.layers.back();
  const int64_t fed = first.input_size - decoder.context_size;
  for (int64_t t = 0; t < decoder.steps; ++t) {
    for (size_t l = 0; l < decoder.layers.size(); ++l) {
      const DecoderLayer& layer = decoder.layers[l];
      if (l > 0) {
        const DecoderLayer& below = decoder.layers[l - 1];
        const float *h = below.h + (t + 1) * states, *mask = at(below.mask, t, states);
        float* x = layer.x + t * states;
        for (int64_t i = 0; i < states; ++i) x[i] = mask ? h[i] * mask[i] : h[i];
      }
      const OneStep step(decoder, layer, rows);
      ForwardArgs args{};
      args.x = layer.x + t * rows * layer.input_size;
      args.x_rows = rows_of(layer.input_size);
      args.weight_ih = layer.weight_ih;
      args.weight_hh = layer.weight_hh;
      args.bias_ih = layer.bias_ih;
      args.bias_hh = layer.bias_hh;
      args.h0 = layer.h + t * states;
      args.c0 = at(layer.c, t, states);
      args.y = args.h_n = layer.h + (t + 1) * states;
      args.y_rows = rows_of(hidden);
      args.c_n = at(layer.c, t + 1, states);
      args.saved = at(layer.saved, t, saved_step(decoder));
      kernels().forward(step.problem, args, threads);
    }
    const int64_t size = decoder.attention.size;
    if (size == 0) continue;
    if (decoder.query_weight)
      attention_kernels().multiply_panels(rows, hidden, top.h + (t + 1) * states, hidden, decoder.query_weight, size,
                                          false, decoder.query + t * rows * size, size, threads);
    AttentionForward call{};
    call.in = of_step(decoder, t);
    call.context = decoder.context + t * rows * decoder.context_size;
    call.context_b = call.in.queries * decoder.context_size;
    call.context_row = decoder.context_size;
    call.weights = decoder.weights + t * decoder.weights_t;
    call.weights_b = decoder.weights_b;
    attention_kernels().forward(call, threads);
    for (int64_t row = 0; t + 1 < decoder.steps && row < rows; ++row)
      __builtin_memcpy(first.x + ((t + 1) * rows + row) * first.input_size + fed,
                       call.context + row * decoder.context_size, decoder.context_size * sizeof(float));
  }
}

void decoder_backward(const Decoder& decoder, int threads) {
  const int64_t rows = decoder.batch, hidden = decoder.hidden_size, states = rows * hidden;
  const DecoderLayer &first = decoder.layers.front(), &top = decoder.layers.back();
  const int64_t size = decoder.attention.size, fed = first.input_size - decoder.context_size;
  const Scratch carried(states);
  for (int64_t t = decoder.steps - 1; t >= 0; --t) {
    AttentionBackward call{};
    call.in = of_step(decoder, t);
    call.dcontext = {decoder.dcontext + t * rows * decoder.context_size, decoder.context_size, decoder.context_size};
    call.dweights = {at(decoder.dweights, t, call.in.keys), decoder.steps * call.in.keys, call.in.keys};
    call.weights = decoder.weights + t * decoder.weights_t;
    call.weights_b = decoder.weights_b;
    call.dquery = decoder.dquery + t * rows * size;
    attention_kernels().backward(call, threads);
    if (decoder.query_weight) {
      attention_kernels().multiply_panels(rows, size, call.dquery, size, decoder.query_weight, hidden, true,
                                          top.dh + t * states, hidden, threads);
    } else {
      add(top.dh + t * states, call.dquery, states);
    }
    for (size_t l = decoder.layers.size(); l-- > 0;) {
      const DecoderLayer& layer = decoder.layers[l];
      const OneStep step(decoder, layer, rows);
      BackwardArgs args = backward_args(decoder, layer, t);
      float* dx = layer.dx + t * rows * layer.input_size;
      args.dx = dx;
      args.dh0 = t > 0 ? carried.data() : layer.dh0;
      args.dc0 = t > 0 ? at(layer.dc, t - 1, states) : layer.dc0;
      kernels().backward(step.problem, args, threads);
      if (t > 0) add(layer.dh + (t - 1) * states, carried.data(), states);
      if (l > 0) {
        const DecoderLayer& below = decoder.layers[l - 1];
        const float* mask = at(below.mask, t, states);
        float* dh = below.dh + t * states;
        for (int64_t i = 0; i < states; ++i) dh[i] += mask ? dx[i] * mask[i] : dx[i];
      } else if (t > 0) {
        for (int64_t row = 0; row < rows; ++row)
          add(decoder.dcontext + ((t - 1) * rows + row) * decoder.context_size, dx + row * layer.input_size + fed,
              decoder.context_size);
      }
    }
  }
  // Gradients that are sums over steps, each by one product over all of them.
  for (const DecoderLayer& layer : decoder.layers) {
    const OneStep all(decoder, layer, decoder.steps * rows);
    BackwardArgs args = backward_args(decoder, layer, 0);
    args.dweight_ih = layer.dweight_ih;
    args.dweight_hh = layer.dweight_hh;
    args.dbias_ih = layer.dbias_ih;
    args.dbias_hh = layer.dbias_hh;
    kernels().backward(all.problem, args, threads);
  }
  if (decoder.dkey || decoder.dvalue || decoder.dv) attention_gradients(decoder, threads);
}

}  // namespace fastrnn::cpu
