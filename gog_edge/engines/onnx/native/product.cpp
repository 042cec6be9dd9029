#include "product.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace gog {
namespace {

constexpr int WIDE = COLUMNS * LANES;
constexpr int BLOCK = 96;  // rows of the left side whose sums stay in the nearest cache
constexpr int FEW = 3 * ROWS;  // rows for which halves of bytes are taken apart as they are multiplied

// Rows rounded to 8 bits, by blocks.
struct Rounded {
  std::vector<int8_t> values;  // [count, blocks * block]
  std::vector<float> scales;   // [count, blocks]
  std::vector<int32_t> sums;   // [count, blocks] of the values, times the weights' zero

  void fit(size_t count, size_t rows, size_t blocks) {
    values.resize(std::max(values.size(), count * rows));
    scales.resize(std::max(scales.size(), count * blocks));
    sums.resize(std::max(sums.size(), count * blocks));
  }
};

void round_block(const float* from, int block, int zero, int8_t* values, float* scale, int32_t* sum) {
  Floats most = {}, nothing = {};
  for (int i = 0; i < block; i += LANES) {
    const Floats some = load<Floats>(from + i);
    most = greater(magnitude(some), most);
    nothing += 0 * some;  // but for what is no number
  }
  const float top = most_of(most), factor = top > 0 ? 127 / top : 0;
  *scale = top / 127 + sum_of(nothing);
  for (int i = 0; i < block; i += LANES) narrow(load<Floats>(from + i) * factor, values + i);
  int32_t total = 0;
  for (int i = 0; i < block; ++i) total += values[i];
  *sum = -zero * total;
}

// A block of a panel, four rows of the weights at a time, as bytes [block / 4, PANEL, 4] ...
struct Bytes {
  static constexpr int PARTS = 1;
  const uint8_t* from;
  Ints at(int step, int, int column) const { return load<Ints>(from + (step * PANEL + column * LANES) * 4); }
};

// ... and by halves of bytes [block / 8, PANEL, 4].
struct Nibbles {
  static constexpr int PARTS = 2;
  const uint8_t* from;
  static Ints part_of(Ints both, int part) { return both >> 4 * part & 0x0f0f0f0f; }
  Ints both(int step, int column) const { return load<Ints>(from + (step * PANEL + column * LANES) * 4); }
  Ints at(int step, int part, int column) const { return part_of(both(step, column), part); }
};

void unpack(Nibbles from, int block, uint8_t* to) {
  for (int step = 0; step < block / 8; ++step)
    for (int column = 0; column < PANEL / LANES; ++column) {
      const Ints both = from.both(step, column);  // once: a load behind a store of a like address would wait for it
      store(to + (2 * step * PANEL + column * LANES) * 4, Nibbles::part_of(both, 0));
      store(to + ((2 * step + 1) * PANEL + column * LANES) * 4, Nibbles::part_of(both, 1));
    }
}

// Rows on the left side of a block.
struct Left {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
  int row, blocks;  // from one row to the next
};

// One block's part of a panel's sums [count, PANEL], for COUNT rows from `first` on and WIDE columns.
template <int BITS, int COUNT, class Weights>
void multiply_rows(int block, const Left& left, int first, Weights weights, const float* scales, float* sums) {
  const int8_t* values = left.values + first * left.row;
  const float* left_scales = left.scales + first * left.blocks;
  const int32_t* left_sums = left.sums + first * left.blocks;
  Ints kept[COUNT][COLUMNS];
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < COLUMNS; ++column) kept[row][column] = Ints{} + left_sums[row * left.blocks];
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
          kept[row][column] = add_product<BITS>(kept[row][column], factors[column], four);
      }
    }
#pragma GCC unroll 8
  for (int column = 0; column < COLUMNS; ++column) {
    const Floats scale = load<Floats>(scales + column * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < COUNT; ++row) {
      float* to = sums + row * PANEL + column * LANES;
      const Floats part = __builtin_convertvector(kept[row][column], Floats);
      store(to, load<Floats>(to) + part * (scale * left_scales[row * left.blocks]));
    }
  }
}

template <int BITS, class Weights>
void multiply_block(int count, int block, const Left& left, Weights weights, const float* scales, float* sums) {
  for (int column = 0; column < PANEL; column += WIDE)
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

// sums [count, PANEL] of `count` rows of the left side from `first` on with a panel's columns.
void multiply_panel(const Product& product, size_t panel, const Rounded& left, size_t first, int count, float* sums) {
  alignas(64) static thread_local uint8_t bytes[BIGGEST * PANEL];
  for (int row = 0; row < count; ++row)
    for (int i = 0; i < PANEL; ++i) sums[row * PANEL + i] = product.bias ? product.bias[panel * PANEL + i] : 0;
  const int blocks = product.blocks(), stride = product.block * PANEL * product.bits / 8;
  const uint8_t* weights = product.weights + panel * blocks * stride;
  const float* scales = product.scales + panel * blocks * PANEL;
  for (int block = 0; block < blocks; ++block, weights += stride, scales += PANEL) {
    if (block + 1 < blocks) fetch(weights + stride, stride);
    const size_t at = first * blocks + block;
    const Left part{left.values.data() + at * product.block, left.scales.data() + at, left.sums.data() + at,
                    blocks * product.block, blocks};
    if (product.bits == 8) {
      multiply_block<8>(count, product.block, part, Bytes{weights}, scales, sums);
    } else if (count <= FEW) {
      multiply_block<4>(count, product.block, part, Nibbles{weights}, scales, sums);
    } else {
      unpack(Nibbles{weights}, product.block, bytes);
      multiply_block<4>(count, product.block, part, Bytes{bytes}, scales, sums);
    }
  }
}

// `count` rows of what comes out from `first` on, a panel's columns.
void finish_panel(const Product& product, size_t panel, const Rounded& left, size_t first, int count, float* out) {
  alignas(64) static thread_local float sums[BLOCK * PANEL], others[BLOCK * PANEL];
  multiply_panel(product, product.gated ? 2 * panel : panel, left, first, count, sums);
  if (product.gated) {
    multiply_panel(product, 2 * panel + 1, left, first, count, others);
    for (int i = 0; i < count * PANEL; i += LANES) {
      const Floats gate = load<Floats>(sums + i);
      store(sums + i, gate / (1.0f + exponential(-gate)) * load<Floats>(others + i));
    }
  }
  const size_t start = panel * PANEL;
  const int columns = std::min(PANEL, product.columns - static_cast<int>(start));
  for (int row = 0; row < count; ++row)
    std::copy(sums + row * PANEL, sums + row * PANEL + columns, out + (first + row) * product.columns + start);
}

}  // namespace

void Product::run(const float* left, int count, float* out, const Parallel& parallel) const {
  static thread_local Rounded kept;
  Rounded& rounded = kept;  // of this thread, whichever works with it
  const int all = blocks(), zero = 1 << (bits - 1);
  rounded.fit(count, static_cast<size_t>(all) * block, all);
  const auto round_row = [&](size_t row) {
    alignas(64) float filled[BIGGEST] = {};
    for (int i = 0; i < all; ++i) {
      const size_t at = row * all + i;
      const float* from = left + row * rows + i * block;
      if ((i + 1) * block > rows) {
        std::copy(from, left + (row + 1) * rows, filled);
        from = filled;
      }
      round_block(from, block, zero, &rounded.values[at * block], &rounded.scales[at], &rounded.sums[at]);
    }
  };
  if (count < 8) {
    for (int row = 0; row < count; ++row) round_row(row);
  } else {
    parallel(count, round_row);
  }
  parallel(panels_out(), [&](size_t panel) {
    for (int first = 0; first < count; first += BLOCK)  // the panel stays in the cache
      finish_panel(*this, panel, rounded, first, std::min(count - first, BLOCK), out);
  });
}

}  // namespace gog
