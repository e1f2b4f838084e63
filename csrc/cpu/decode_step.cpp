#include "cpu/decode_step.h"

#include "cpu/dispatch.h"

namespace fastrnn::cpu {

namespace {

void copy(float* to, const float* from, int64_t count) { __builtin_memcpy(to, from, count * sizeof(float)); }

// What the projection sees, [N, depth], after a step of everything below it.
const float* run(const DecodeStep& step, const int64_t* tokens, const int64_t* rows, int threads) {
  const Decoder& decoder = step.decoder;
  const int64_t batch = decoder.batch, hidden = decoder.hidden_size, states = batch * hidden;
  const int64_t context = decoder.context_size, embedded = step.embedding_size;
  const DecoderLayer &first = decoder.layers.front(), &top = decoder.layers.back();
  for (int64_t row = 0; row < batch; ++row) {
    float* x = first.x + row * first.input_size;
    copy(x, step.embedding + tokens[row] * embedded, embedded);
    copy(x + embedded, decoder.context + rows[row] * context, context);
    for (const DecoderLayer& layer : decoder.layers) {
      copy(layer.h + row * hidden, layer.h + states + rows[row] * hidden, hidden);
      if (layer.c) copy(layer.c + row * hidden, layer.c + states + rows[row] * hidden, hidden);
    }
  }
  decoder_forward(decoder, threads);
  const int64_t size = hidden + context;
  for (int64_t row = 0; row < batch; ++row) {
    copy(step.output + row * size, top.h + states + row * hidden, hidden);
    const float* seen = step.before ? first.x + row * first.input_size + embedded : decoder.context + row * context;
    copy(step.output + row * size + hidden, seen, context);
  }
  if (!step.readout) return step.output;
  attention_kernels().multiply_panels(batch, size, step.output, size, step.readout, step.readout_size, false, step.read,
                                      step.readout_size, threads);
  attention_kernels().tanh_all(step.read, batch * step.readout_size);
  return step.read;
}

int64_t depth(const DecodeStep& step) {
  return step.readout ? step.readout_size : step.decoder.hidden_size + step.decoder.context_size;
}

}  // namespace

void decode_step(const DecodeStep& step, const int64_t* tokens, const int64_t* rows, TopK found, int threads) {
  found.x = run(step, tokens, rows, threads);
  found.depth = depth(step);
  found.panels = step.panels;
  found.bias = step.bias;
  found.vocabulary = step.vocabulary;
  top_k_kernel()(found, threads);
}

void decode_step(const DecodeStep& step, const int64_t* tokens, const int64_t* rows, float* logits, int threads) {
  const float* x = run(step, tokens, rows, threads);
  for (int64_t row = 0; row < step.decoder.batch; ++row)
    copy(logits + row * step.vocabulary, step.bias, step.vocabulary);
  attention_kernels().multiply_panels(step.decoder.batch, depth(step), x, depth(step), step.panels, step.vocabulary,
                                      true, logits, step.vocabulary, threads);
}

}  // namespace fastrnn::cpu
