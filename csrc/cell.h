// The cells, and how many values each has per hidden unit.
#pragma once

namespace fastrnn {

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_reset_before };

constexpr bool is_gru(Cell cell) { return cell == Cell::gru || cell == Cell::gru_reset_before; }

constexpr int gate_count(Cell cell) { return cell == Cell::lstm ? 4 : is_gru(cell) ? 3 : 1; }

// Values per unit that the backward pass needs besides the states: LSTM i f g o; GRU r z n and, where the reset comes
// after the product, W_hn h + b_hn.
constexpr int saved_count(Cell cell) {
  return cell == Cell::lstm || cell == Cell::gru ? 4 : cell == Cell::gru_reset_before ? 3 : 0;
}

// Gradients per unit that the backward pass produces: GRU (n*r, r, z, n), so that the gradient of W_hh h (the first
// three) and of W_ih x (the last three) are both contiguous.
constexpr int gradient_count(Cell cell) {
  return cell == Cell::lstm || cell == Cell::gru ? 4 : cell == Cell::gru_reset_before ? 3 : 1;
}

}  // namespace fastrnn
