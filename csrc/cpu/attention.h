// The CPU attention: what a call consists of, and the table of kernels that one instruction set provides.
#pragma once

#include <stdint.h>

namespace fastrnn::cpu {

// [B, rows, n] with contiguous rows; data null: absent.
struct Matrices {
  const float* data;
  int64_t stride_b, stride_row;

  const float* at(int64_t b, int64_t row) const { return data + b * stride_b + row * stride_row; }
};

// What queries, keys and values are in memory. Those of 16 bits are for the forward pass; a Matrices of them has their
// address, and strides in elements, all the same.
enum class Number { float32, bfloat16, float16 };

struct AttentionInputs {
  Number number;
  int64_t batch, queries, keys, size, value_size, channels;
  Matrices query, key, value;          // [B, Tq, D], [B, Tk, D], [B, Tk, Dv]
  const float* v;                      // [D], of the additive score; null: the inner product
  Matrices factors;                    // [B, Tk, D]: e^{2k}, NaN where that is out of range; or absent
  const float* features;               // [B, Tq, Tk, C] or null
  const float* feature_weight;         // [D, C]
  const int64_t* lengths;              // [B] or null
  const uint8_t* mask;                 // [B, Tq, Tk] by the strides below, or null
  int64_t mask_b, mask_row, mask_key;  // mask_row 0: the same for all queries
  bool causal, softmax;
  float scale;  // of the inner product
};

struct AttentionForward {
  AttentionInputs in;
  float* context;  // [B, Tq, Dv] by these strides
  int64_t context_b, context_row;
  float* weights;  // [B, Tq, Tk]: rows of Tk, and this from memory to memory
  int64_t weights_b;
};

// Gradients are null where not wanted.
struct AttentionBackward {
  AttentionInputs in;
  Matrices dcontext, dweights;  // or absent
  const float* weights;
  int64_t weights_b;
  float* dquery;           // [B, Tq, D]
  float* dkey;             // [B, Tk, D]
  float* dvalue;           // [B, Tk, Dv]; may be dkey, which then gets the sum of both
  float* dv;               // [B, D]: of each memory's part
  float* dfeatures;        // [B, Tq, Tk, C]
  float* dfeature_weight;  // [B, D, C]: of each memory's part
};

struct AttentionKernels {
  void (*forward)(const AttentionForward&, int threads);
  void (*backward)(const AttentionBackward&, int threads);
  // out [rows, columns] (+)= A B, A [rows, depth], B in panels: Kernels::pack_forward of an RNN's weight [columns,
  // depth], or pack_backward of one [depth, columns].
  void (*multiply_panels)(int64_t rows, int64_t depth, const float* a, int64_t lda, const void* panels, int64_t columns,
                          bool accumulate, float* out, int64_t ldo, int threads);
  // out [m, n] = A^T B, A [rows, m], B [rows, n], all with contiguous rows.
  void (*outer_product)(int64_t rows, const float* a, int64_t m, const float* b, int64_t n, float* out, int threads);
  void (*tanh_all)(float* x, int64_t count);  // in place
};

const AttentionKernels& attention_portable();
const AttentionKernels& attention_avx2();
const AttentionKernels& attention_avx512();

}  // namespace fastrnn::cpu
