// Matrix multiplication with int4 or int8 weights.
//
// Weights are stored in panels of PANEL columns, in the order in which they are multiplied: vectors with four rows of
// the weights for each of several columns.
//   8 bits  [columns / PANEL, rows / block, block / 4, PANEL, 4]
//   4 bits  [columns / PANEL, rows / block, block / 8, PANEL, 4], with four more rows in the upper nibbles
//   scales  [columns / PANEL, rows / block, PANEL]
// They are unsigned, with a zero point in the middle of their range. The last panel and the last block are padded. The
// activations are rounded to int8, with one scale for each block of each row.
//
// A gated multiplication has two panels for each panel of the result, the gate's first:
// silu(left * gate) * (left * other).
#pragma once

#include <cstdint>

#include "attention.h"

namespace gog {

constexpr int PANEL = 64;
constexpr int MAX_BLOCK = 256;

struct QuantizedMatmul {
  int rows, columns, block, bits;  // rows and columns without padding; block: rows that share a scale
  bool gated;
  const uint8_t* weights;
  const float* scales;
  const float* bias;  // [panels * PANEL], in the order of the panels, or null

  int blocks() const { return (rows + block - 1) / block; }
  int panels_out() const { return (columns + PANEL - 1) / PANEL; }
  int panels() const { return panels_out() * (gated ? 2 : 1); }
  int64_t elements() const { return static_cast<int64_t>(panels()) * PANEL * blocks() * block; }  // with padding

  // left [count, rows] * weights -> out [count, columns]
  void run(const float* left, int count, float* out, const ParallelFor& parallel_for) const;
};

// Returns whether there is a kernel for weights of this shape.
inline bool supported(const QuantizedMatmul& matmul) {
  return (matmul.bits == 4 || matmul.bits == 8) && matmul.block >= 32 && matmul.block <= MAX_BLOCK &&
         matmul.block % 32 == 0 && matmul.rows > 0 && matmul.columns > 0;
}

}  // namespace gog
