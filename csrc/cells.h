// The pointwise mathematics of each cell, forward and backward, once for every native back end.
//
// V is a vector of units (csrc/cpu) or a float (csrc/cuda); sigmoid(V) and tanh(V) are found where the
// template is used. Gates follow torch's order. Formulas: fastrnn/reference/recurrence.py.
#pragma once

#include "cell.h"

#ifdef __CUDACC__
#define FASTRNN_CELL __device__ __forceinline__
#else
#define FASTRNN_CELL inline __attribute__((always_inline))
#endif

namespace fastrnn {

namespace {

template <Cell cell, class V>
FASTRNN_CELL V rnn_forward(V pre) {
  if constexpr (cell == Cell::rnn_tanh) {
    return tanh(pre);
  } else {
    return pre < 0.0f ? V{} : pre;  // written so that NaN passes
  }
}

// h: the state that the step produced.
template <Cell cell, class V>
FASTRNN_CELL V rnn_backward(V h, V dh) {
  if constexpr (cell == Cell::rnn_tanh) {
    return dh * (1.0f - h * h);
  } else {
    return h > 0.0f ? dh : V{};
  }
}

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// gates: pre-activations on entry, activations on return; c: c_{t-1} on entry, c_t on return.
template <class V>
FASTRNN_CELL void lstm_cell_state(LstmGates<V>& gates, V& c) {
  gates.i = sigmoid(gates.i);
  gates.f = sigmoid(gates.f);
  gates.g = tanh(gates.g);
  gates.o = sigmoid(gates.o);
  c = gates.f * c + gates.i * gates.g;
}

template <class V>
FASTRNN_CELL V lstm_output(V o, V c) {
  return o * tanh(c);
}

// Diagonal weights with which the gates see the cell state: i and f that of the step before, o the new one.
template <class V>
struct LstmPeephole {
  V i, f, o;
};

// As lstm_cell_state.
template <class V>
FASTRNN_CELL void lstm_peephole_cell_state(LstmGates<V>& gates, const LstmPeephole<V>& peephole, V& c) {
  const V o = gates.o;
  gates.i = gates.i + peephole.i * c;
  gates.f = gates.f + peephole.f * c;
  lstm_cell_state(gates, c);
  gates.o = sigmoid(o + peephole.o * c);
}

// gates: activations on entry, gradients of the pre-activations on return. tanh_c: what h is o times of. dc: gradient
// of c_t on entry, with what comes through h_t; of c_{t-1} on return.
template <class V>
FASTRNN_CELL void lstm_gate_gradients(LstmGates<V>& gates, V c_previous, V tanh_c, V dh, V& dc) {
  const V i = gates.i, f = gates.f, g = gates.g, o = gates.o;
  gates.i = dc * g * i * (1.0f - i);
  gates.f = dc * c_previous * f * (1.0f - f);
  gates.g = dc * i * (1.0f - g * g);
  gates.o = dh * tanh_c * o * (1.0f - o);
  dc = dc * f;
}

// Adds to dc what comes through h_t = o * tanh(c_t); returns tanh(c_t). gates: activations.
template <class V>
FASTRNN_CELL V lstm_output_backward(const LstmGates<V>& gates, V c_previous, V dh, V& dc) {
  const V tanh_c = tanh(gates.f * c_previous + gates.i * gates.g);
  dc = dc + dh * gates.o * (1.0f - tanh_c * tanh_c);
  return tanh_c;
}

// As lstm_gate_gradients.
template <class V>
FASTRNN_CELL void lstm_peephole_gate_gradients(LstmGates<V>& gates, const LstmPeephole<V>& peephole, V c_previous,
                                               V tanh_c, V dh, V& dc) {
  dc = dc + peephole.o * (dh * tanh_c * gates.o * (1.0f - gates.o));
  lstm_gate_gradients(gates, c_previous, tanh_c, dh, dc);
  dc = dc + peephole.i * gates.i + peephole.f * gates.f;
}

template <class V>
struct GruGates {
  V r, z, n, h_n;  // h_n: W_hn h_{t-1} + b_hn
};

template <class V>
FASTRNN_CELL V gru_output(V z, V n, V h_previous) {
  return (1.0f - z) * n + z * h_previous;
}

// gates: activations on entry; gradients of the pre-activations r, z, n and of h_n on return.
// dh: gradient of h_t on entry, its direct part for h_{t-1} on return.
template <class V>
FASTRNN_CELL void gru_backward(GruGates<V>& gates, V h_previous, V& dh) {
  const V r = gates.r, z = gates.z, n = gates.n;
  const V dn = dh * (1.0f - z) * (1.0f - n * n);
  gates.r = dn * gates.h_n * r * (1.0f - r);
  gates.z = dh * (h_previous - n) * z * (1.0f - z);
  gates.n = dn;
  gates.h_n = dn * r;
  dh = dh * z;
}

// With the reset before the product the gradient of r needs that of r * h, a product with W_hn that comes between these
// two. First r, z, n on entry; the gradients of the pre-activations z and n on return, dh as in gru_backward.
template <class V>
FASTRNN_CELL void gru_reset_before_backward(V& z, V& n, V h_previous, V& dh) {
  const V dz = dh * (h_previous - n) * z * (1.0f - z);
  n = dh * (1.0f - z) * (1.0f - n * n);
  dh = dh * z;
  z = dz;
}

// drh: gradient of r * h. The gradient of r's pre-activation; drh * r goes to h.
template <class V>
FASTRNN_CELL V gru_reset_gradient(V r, V h_previous, V drh) {
  return drh * h_previous * r * (1.0f - r);
}

}  // namespace
}  // namespace fastrnn
