// Products with weights of four or eight bits.
//
// Weights stand by panels of PANEL columns, as they are multiplied: vectors of four rows of the weights for each of
// many columns.
//   8 bits  [columns / PANEL, rows / block, block / 4, PANEL, 4]
//   4 bits  [columns / PANEL, rows / block, block / 8, PANEL, 4], four more rows in the upper halves
//   scales  [columns / PANEL, rows / block, PANEL]
// They have no sign: half of what fits is their zero. What is wanting of the last panel and of the last block is filled
// up. What they are multiplied with is rounded to 8 bits, a scale for each block of each row.
//
// A gated product has two panels for each that comes out, the gate's first: silu(left * gate) * (left * other).
#pragma once

#include <cstdint>

#include "attention.h"

namespace gog {

constexpr int PANEL = 64;
constexpr int BIGGEST = 256;  // block

struct Product {
  int rows, columns, block, bits;  // of the weights, as they come out; rows that share a scale
  bool gated;
  const uint8_t* weights;
  const float* scales;
  const float* bias;  // [panels * PANEL], as the panels stand, or null

  int blocks() const { return (rows + block - 1) / block; }
  int panels_out() const { return (columns + PANEL - 1) / PANEL; }
  int panels() const { return panels_out() * (gated ? 2 : 1); }
  int64_t numbers() const { return static_cast<int64_t>(panels()) * PANEL * blocks() * block; }  // filled up

  // left [count, rows] * weights -> out [count, columns]
  void run(const float* left, int count, float* out, const Parallel& parallel) const;
};

// Whether there is a kernel for weights of this shape.
inline bool fits(const Product& product) {
  return (product.bits == 4 || product.bits == 8) && product.block >= 32 && product.block <= BIGGEST &&
         product.block % 32 == 0 && product.rows > 0 && product.columns > 0;
}

}  // namespace gog
