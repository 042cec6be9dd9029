// The kernels of matrix multiplication with int4 or int8 weights. Activations are rounded to int8, dot products within
// a block are accumulated in int32, and blocks are combined in float32.
#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace gog {
namespace {

constexpr int FULL = COLUMNS * LANES;
constexpr int BLOCK = 96;  // rows of the left side whose sums stay in the L1 cache
constexpr int FEW = 3 * ROWS;  // up to so many rows, nibbles are extracted while they are multiplied

// Rows rounded to int8, block by block.
struct QuantizedRows {
  std::vector<int8_t> values;  // [count, blocks * block]
  std::vector<float> scales;   // [count, blocks]
  std::vector<int32_t> sums;   // [count, blocks]: sum of the block's values times minus the weights' zero point

  void resize(size_t count, size_t rows, size_t blocks) {
    values.resize(std::max(values.size(), count * rows));
    scales.resize(std::max(scales.size(), count * blocks));
    sums.resize(std::max(sums.size(), count * blocks));
  }
};

void quantize_block(const float* from, int block, int zero_point, int8_t* values, float* scale, int32_t* sum) {
  Floats most = {}, nan = {};
  for (int i = 0; i < block; i += LANES) {
    const Floats some = load<Floats>(from + i);
    most = max(abs(some), most);
    nan += 0 * some;  // zero, or NaN if an element is NaN or infinite
  }
  const float top = horizontal_max(most), factor = top > 0 ? 127 / top : 0;
  *scale = top / 127 + horizontal_sum(nan);
  for (int i = 0; i < block; i += LANES) to_int8(load<Floats>(from + i) * factor, values + i);
  int32_t total = 0;
  for (int i = 0; i < block; ++i) total += values[i];
  *sum = -zero_point * total;
}

// A block of a panel as vectors of four rows of the weights: stored in bytes [block / 4, PANEL, 4] ...
struct Bytes {
  static constexpr int PARTS = 1;
  const uint8_t* from;
  Ints at(int step, int, int column) const { return load<Ints>(from + (step * PANEL + column * LANES) * 4); }
};

// ... or in nibbles [block / 8, PANEL, 4], with two such vectors in each.
struct Nibbles {
  static constexpr int PARTS = 2;
  const uint8_t* from;
  static Ints part_of(Ints both, int part) { return both >> 4 * part & 0x0f0f0f0f; }
  Ints both(int step, int column) const { return load<Ints>(from + (step * PANEL + column * LANES) * 4); }
  Ints at(int step, int part, int column) const { return part_of(both(step, column), part); }
};

// Unpacks nibbles to bytes.
void unpack(Nibbles from, int block, uint8_t* to) {
  for (int step = 0; step < block / 8; ++step)
    for (int column = 0; column < PANEL / LANES; ++column) {
      const Ints both = from.both(step, column);  // loaded once: a second load could alias the first store and stall
      store(to + (2 * step * PANEL + column * LANES) * 4, Nibbles::part_of(both, 0));
      store(to + ((2 * step + 1) * PANEL + column * LANES) * 4, Nibbles::part_of(both, 1));
    }
}

// Quantized rows, at one block.
struct Left {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int row, blocks;  // strides of `values` and of the others from one row to the next
};

// Adds one block's part to a panel's sums [count, PANEL], for COUNT rows from `first` on and FULL columns.
template <int BITS, int COUNT, class Weights>
void multiply_rows(int block, const Left& left, int first, Weights weights, const float* scales, float* sums) {
  const int8_t* values = left.values + first * left.row;
  const float* left_scales = left.scales + first * left.blocks;
  const int32_t* left_sums = left.sums + first * left.blocks;
  Ints accumulators[COUNT][COLUMNS];
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < COLUMNS; ++column) accumulators[row][column] = Ints{} + left_sums[row * left.blocks];
  for (int step = 0; step < block / 4 / Weights::PARTS; ++step)
#pragma GCC unroll 2
    for (int part = 0; part < Weights::PARTS; ++part) {
      Ints factors[COLUMNS];
#pragma GCC unroll 8
      for (int column = 0; column < COLUMNS; ++column) factors[column] = weights.at(step, part, column);
#pragma GCC unroll 8
      for (int row = 0; row < COUNT; ++row) {
        const int32_t four = load<int32_t>(values + row * left.row + 4 * (Weights::PARTS * step + part));
#pragma GCC unroll 8
        for (int column = 0; column < COLUMNS; ++column)
          accumulators[row][column] = add_product<BITS>(accumulators[row][column], factors[column], four);
      }
    }
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column) {
    const Floats scale = load<Floats>(scales + column * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < COUNT; ++row) {
      float* to = sums + row * PANEL + column * LANES;
      const Floats part = __builtin_convertvector(accumulators[row][column], Floats);
      store(to, load<Floats>(to) + part * (scale * left_scales[row * left.blocks]));
    }
  }
}

// The same for `count` rows and all columns of the panel.
template <int BITS, class Weights>
void multiply_block(int count, int block, const Left& left, Weights weights, const float* scales, float* sums) {
  for (int column = 0; column < PANEL; column += FULL)
    for (int row = 0; row < count; row += ROWS) {
      const Weights part{weights.from + column * 4};
      const float* factors = scales + column;
      float* to = sums + row * PANEL + column;
      switch (std::min(count - row, ROWS)) {
#if defined(__AVX512F__)
        case 6: multiply_rows<BITS, 6>(block, left, row, part, factors, to); break;
        case 5: multiply_rows<BITS, 5>(block, left, row, part, factors, to); break;
#endif
        case 4: multiply_rows<BITS, 4>(block, left, row, part, factors, to); break;
        case 3: multiply_rows<BITS, 3>(block, left, row, part, factors, to); break;
        case 2: multiply_rows<BITS, 2>(block, left, row, part, factors, to); break;
        default: multiply_rows<BITS, 1>(block, left, row, part, factors, to);
      }
    }
}

// Computes sums [count, PANEL]: `count` rows of the left side from `first` on, times one panel.
void multiply_panel(const QuantizedMatmul& matmul, size_t panel, const QuantizedRows& left, size_t first, int count,
                    float* sums) {
  alignas(64) static thread_local uint8_t bytes[MAX_BLOCK * PANEL];
  for (int row = 0; row < count; ++row)
    for (int i = 0; i < PANEL; ++i) sums[row * PANEL + i] = matmul.bias ? matmul.bias[panel * PANEL + i] : 0;
  const int blocks = matmul.blocks(), stride = matmul.block * PANEL * matmul.bits / 8;
  const uint8_t* weights = matmul.weights + panel * blocks * stride;
  const float* scales = matmul.scales + panel * blocks * PANEL;
  for (int block = 0; block < blocks; ++block, weights += stride, scales += PANEL) {
    if (block + 1 < blocks) prefetch(weights + stride, stride);
    const size_t at = first * blocks + block;
    const Left part{left.values.data() + at * matmul.block, left.scales.data() + at, left.sums.data() + at,
                    blocks * matmul.block, blocks};
    if (matmul.bits == 8) {
      multiply_block<8>(count, matmul.block, part, Bytes{weights}, scales, sums);
    } else if (count <= FEW) {
      multiply_block<4>(count, matmul.block, part, Nibbles{weights}, scales, sums);
    } else {
      unpack(Nibbles{weights}, matmul.block, bytes);
      multiply_block<4>(count, matmul.block, part, Bytes{bytes}, scales, sums);
    }
  }
}

// Writes `count` rows of the result from `first` on, for the columns of one panel.
void compute_panel(const QuantizedMatmul& matmul, size_t panel, const QuantizedRows& left, size_t first, int count,
                   float* out) {
  alignas(64) static thread_local float sums[BLOCK * PANEL], others[BLOCK * PANEL];
  multiply_panel(matmul, matmul.gated ? 2 * panel : panel, left, first, count, sums);
  if (matmul.gated) {
    multiply_panel(matmul, 2 * panel + 1, left, first, count, others);
    for (int i = 0; i < count * PANEL; i += LANES) {
      const Floats gate = load<Floats>(sums + i);
      store(sums + i, gate / (1.0f + exponential(-gate)) * load<Floats>(others + i));
    }
  }
  const size_t start = panel * PANEL;
  const int columns = std::min(PANEL, matmul.columns - static_cast<int>(start));
  for (int row = 0; row < count; ++row)
    std::copy(sums + row * PANEL, sums + row * PANEL + columns, out + (first + row) * matmul.columns + start);
}

}  // namespace

void QuantizedMatmul::run(const float* left, int count, float* out, const ParallelFor& parallel_for) const {
  static thread_local QuantizedRows scratch;
  QuantizedRows& quantized = scratch;  // in other threads, where the lambdas run, `scratch` is another object
  const int all = blocks(), zero_point = 1 << (bits - 1);
  quantized.resize(count, static_cast<size_t>(all) * block, all);
  const auto quantize_row = [&](size_t row) {
    alignas(64) float filled[MAX_BLOCK] = {};
    for (int i = 0; i < all; ++i) {
      const size_t at = row * all + i;
      const float* from = left + row * rows + i * block;
      if ((i + 1) * block > rows) {
        std::copy(from, left + (row + 1) * rows, filled);
        from = filled;
      }
      quantize_block(from, block, zero_point, &quantized.values[at * block], &quantized.scales[at],
                     &quantized.sums[at]);
    }
  };
  if (count < 8) {
    for (int row = 0; row < count; ++row) quantize_row(row);
  } else {
    parallel_for(count, quantize_row);
  }
  parallel_for(panels_out(), [&](size_t panel) {
    for (int first = 0; first < count; first += BLOCK)  // the panel's weights stay in the cache
      compute_panel(*this, panel, quantized, first, std::min(count - first, BLOCK), out);
  });
}

}  // namespace gog
