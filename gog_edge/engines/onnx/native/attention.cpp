// The attention kernels. They use the online softmax of FlashAttention (Dao et al. 2022): a block of query rows passes
// over the keys once, KEYS tokens at a time, and keeps for each row the weighted sum of values and the sum of weights.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace gog {
namespace {

constexpr int BLOCK = 96;    // query rows that pass over the cache together
constexpr int SPLIT = 256;   // cached tokens per thread when there is only one block of query rows
constexpr float LOWEST = -1e30f;
constexpr float HEADROOM = 8;  // how far a score may exceed its row's base; a float holds sums of e^8 easily

// The right operand of a multiplication: vectors of pairs by step (pair index) and column. `from` skips columns.
struct Keys {
  const uint16_t* tiles;
  int width;
  Ints at(int step, int column) const {
    const int token = column * LANES;
    return load<Ints>(tiles + token / TILE * (width * TILE) + (step * TILE + token % TILE) * 2);
  }
  Keys from(int token) const { return {tiles + token * width, width}; }
};

struct Values {
  const uint16_t* pairs;
  int width;
  Ints at(int step, int column) const { return load<Ints>(pairs + (step * width + column * LANES) * 2); }
  Values from(int column) const { return {pairs + 2 * column, width}; }
};

// COUNT rows of `multiply_columns`, whose accumulators stay in registers.
template <int COUNT, int WIDTH, class Right>
void multiply_rows(int steps, const Pair* left, int left_stride, Right right, float* sums, int sums_stride) {
  Floats accumulators[COUNT][WIDTH];
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < WIDTH; ++column)
      accumulators[row][column] = load<Floats>(sums + row * sums_stride + column * LANES);
  for (int step = 0; step < steps; ++step) {
    Ints factors[WIDTH];
#pragma GCC unroll 8
    for (int column = 0; column < WIDTH; ++column) factors[column] = right.at(step, column);
#pragma GCC unroll 8
    for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
      for (int column = 0; column < WIDTH; ++column)
        accumulators[row][column] = add_product(accumulators[row][column], left[row * left_stride + step],
                                                factors[column]);
  }
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < WIDTH; ++column)
      store(sums + row * sums_stride + column * LANES, accumulators[row][column]);
}

// WIDTH vectors of columns of `multiply`.
template <int WIDTH, class Right>
void multiply_columns(int rows, int columns, int steps, const Pair* left, int left_stride, Right right, float* sums) {
  for (int row = 0; row < rows; row += ROWS) {
    const Pair* from = left + row * left_stride;
    float* to = sums + row * columns;
    switch (std::min(rows - row, ROWS)) {
#if defined(__AVX512F__)
      case 6: multiply_rows<6, WIDTH>(steps, from, left_stride, right, to, columns); break;
      case 5: multiply_rows<5, WIDTH>(steps, from, left_stride, right, to, columns); break;
#endif
      case 4: multiply_rows<4, WIDTH>(steps, from, left_stride, right, to, columns); break;
      case 3: multiply_rows<3, WIDTH>(steps, from, left_stride, right, to, columns); break;
      case 2: multiply_rows<2, WIDTH>(steps, from, left_stride, right, to, columns); break;
      default: multiply_rows<1, WIDTH>(steps, from, left_stride, right, to, columns);
    }
  }
}

// sums [rows, columns] += left [rows, steps] of pairs * right [steps, columns] of pairs
template <class Right>
void multiply(int rows, int columns, int steps, const Pair* left, int left_stride, Right right, float* sums) {
  constexpr int FULL = COLUMNS * LANES;
  int column = 0;
  for (; column + FULL <= columns; column += FULL)
    multiply_columns<COLUMNS>(rows, columns, steps, left, left_stride, right.from(column), sums + column);
  if (column < columns)  // half of them remain, because columns are multiples of 32
    multiply_columns<COLUMNS / 2>(rows, columns, steps, left, left_stride, right.from(column), sums + column);
}

// What a block of query rows accumulates on its pass over the keys: values and totals, weighted by e^(score - base).
struct Accumulator {
  alignas(64) float sums[BLOCK * MAX_HEAD_WIDTH];
  alignas(64) float totals[BLOCK * LANES];  // partial sums of weights
  float base[BLOCK];

  float total(int row) const { return horizontal_sum(load<Floats>(totals + row * LANES)); }
};

// Rotary position embedding of one head, after an RMS norm if `norm` is given; the result is multiplied by `factor`.
struct Rotary {
  int width;
  float epsilon;

  void operator()(const float* from, const float* norm, float factor, const float* cos, const float* sin,
                  float* to) const {
    const int half = width / 2;
    if (norm) {
      float squares = 0;
      for (int i = 0; i < width; ++i) squares += from[i] * from[i];
      factor /= std::sqrt(squares / width + epsilon);
    }
    for (int i = 0; i < half; ++i) {
      const float a = from[i] * factor * (norm ? norm[i] : 1);
      const float b = from[i + half] * factor * (norm ? norm[i + half] : 1);
      to[i] = a * cos[i] - b * sin[i];
      to[i + half] = b * cos[i] + a * sin[i];
    }
  }
};

// A head's width, rounded up to what `multiply` needs.
int padded(int width) { return (width + HEAD_WIDTH_MULTIPLE - 1) / HEAD_WIDTH_MULTIPLE * HEAD_WIDTH_MULTIPLE; }

// The keys and values of one head, and the rows of its queries: `group` query heads share it, token after token.
struct Head {
  int width, group;
  int past;  // tokens that the first query attends to besides its own
  uint16_t *keys, *values;
  Pair* queries;  // [rows, padded(width) / 2]

  void store_query(int row, const float* query) const {
    to_pairs(query, padded(width), queries + row * static_cast<size_t>(padded(width)) / 2);
  }
  void store_key_value(int at, const float* key, const float* value, bool clear_next) const;
  void attend(int first, int count, int begin, int end, Accumulator& accumulator) const;

 private:
  void apply_softmax(float* scores, int visible, int row, Accumulator& accumulator) const;
};

// Writes the key and value of token `at`. `clear_next`: token at + 1, with which its values are paired, is not in the
// cache yet; its values are set to zero.
void Head::store_key_value(int at, const float* key, const float* value, bool clear_next) const {
  alignas(64) uint16_t rounded[2][MAX_HEAD_WIDTH];  // rounded in vectors, then scattered
  for (int i = 0; i < width; ++i) rounded[0][i] = to_bfloat16(key[i]);
  for (int i = 0; i < width; ++i) rounded[1][i] = to_bfloat16(value[i]);
  uint16_t* key_to = keys + at / TILE * TILE * static_cast<size_t>(width) + at % TILE * 2;
  uint16_t* value_to = values + at / 2 * 2 * static_cast<size_t>(padded(width)) + at % 2;
  for (int i = 0; i < width; i += 2) store(key_to + i * TILE, load<uint32_t>(rounded[0] + i));
  for (int i = 0; i < width; ++i) value_to[i * 2] = rounded[1][i];
  for (int i = 0; clear_next && i < width; ++i) value_to[i * 2 + 1] = 0;
}

// Replaces a row's scores [KEYS], of which the first `visible` count, by weights e^(score - base) and adds them to the
// row's total. If a score exceeds the base by HEADROOM, the base becomes the largest score and the sums so far are
// rescaled. This is rare, and so is the search for the maximum.
void Head::apply_softmax(float* scores, int visible, int row, Accumulator& accumulator) const {
  for (int key = std::max(visible, 0); key < KEYS; ++key) scores[key] = LOWEST;
  Floats most = load<Floats>(scores);
  for (int key = LANES; key < KEYS; key += LANES) most = max(most, load<Floats>(scores + key));
  float *sums = accumulator.sums + row * padded(width), *totals = accumulator.totals + row * LANES;
  Floats total = load<Floats>(totals);
  if (any_greater(most, accumulator.base[row] + HEADROOM)) {
    const float top = horizontal_max(most), factor = std::exp(accumulator.base[row] - top);
    accumulator.base[row] = top;
    total *= factor;
    for (int i = 0; i < padded(width); i += LANES) store(sums + i, load<Floats>(sums + i) * factor);
  }
  for (int key = 0; key < KEYS; key += LANES) {
    const Floats weight = exponential(load<Floats>(scores + key) - accumulator.base[row]);
    store(scores + key, weight);
    total += weight;
  }
  store(totals, total);
}

// Passes `count` query rows from row `first` on over the cached tokens from `begin` to `end`.
void Head::attend(int first, int count, int begin, int end, Accumulator& accumulator) const {
  alignas(64) static thread_local float scores[BLOCK * KEYS];
  alignas(64) static thread_local Pair weights[BLOCK * KEYS / 2];
  const int columns = padded(width);
  std::fill(accumulator.sums, accumulator.sums + count * columns, 0.0f);
  std::fill(accumulator.totals, accumulator.totals + count * LANES, 0.0f);
  std::fill(accumulator.base, accumulator.base + count, LOWEST);
  const Pair* query = queries + first * static_cast<size_t>(columns) / 2;
  for (int at = begin; at < end; at += KEYS) {
    const uint16_t *key = keys + at * static_cast<size_t>(width), *value = values + at * static_cast<size_t>(columns);
    prefetch(value, KEYS * columns * 2);  // while the scores are computed
    std::fill(scores, scores + count * KEYS, 0.0f);
    multiply(count, KEYS, width / 2, query, columns / 2, Keys{key, width}, scores);
    if (at + KEYS < end) prefetch(key + KEYS * width, KEYS * width * 2);
    for (int row = 0; row < count; ++row)
      apply_softmax(scores + row * KEYS, past + (first + row) / group + 1 - at, row, accumulator);
    to_pairs(scores, count * KEYS, weights);
    const int pairs = (std::min(end - at, KEYS) + 1) / 2;  // memory beyond the last pair may hold NaN
    multiply(count, columns, pairs, weights, KEYS / 2, Values{value, columns}, accumulator.sums);
  }
}

// One call of `Attention::run`.
struct Step {
  const Attention& shape;
  const float *qkv, *cos, *sin;
  int tokens, past;
  uint16_t *keys, *values;
  int64_t capacity;
  float* out;
  Pair* queries;  // [kv_heads, tokens, group, width / 2]
  float* parts;   // [kv_heads, splits, rows, width + 2]: sums, base and total of each split; null for one split
  int splits;

  int width() const { return shape.width; }
  int group() const { return shape.heads / shape.kv_heads; }
  int rows() const { return tokens * group(); }
  int blocks() const { return (rows() + BLOCK - 1) / BLOCK; }
  Head head(int i) const {
    const size_t cache = i * capacity * width(), query = static_cast<size_t>(i) * rows() * width() / 2;
    return {width(), group(), past, keys + cache, values + cache, queries + query};
  }
  float* out_of(int head, int row) const {
    return out + ((row / group()) * shape.heads + head * group() + row % group()) * static_cast<size_t>(width());
  }
  float* part_of(int head, int split, int row) const {
    return parts + ((static_cast<size_t>(head) * splits + split) * rows() + row) * (width() + 2);
  }

  void prepare(int head, int token) const;
  void attend(int head, int block, int split) const;
  void merge(int head) const;
};

// Rotates the queries of one token and appends its key and value to the cache.
void Step::prepare(int head, int token) const {
  const Head target = this->head(head);
  const Rotary rotary{width(), shape.epsilon};
  const float* row = qkv + token * static_cast<size_t>(shape.heads + 2 * shape.kv_heads) * width();
  const int at = past + token;
  const float *c = cos + static_cast<size_t>(at) * width() / 2, *s = sin + static_cast<size_t>(at) * width() / 2;
  alignas(64) float rotated[MAX_HEAD_WIDTH];
  for (int i = 0; i < group(); ++i) {
    rotary(row + (head * group() + i) * width(), shape.q_norm, shape.scale, c, s, rotated);
    target.store_query(token * group() + i, rotated);
  }
  rotary(row + (shape.heads + head) * width(), shape.k_norm, 1, c, s, rotated);
  target.store_key_value(at, rotated, row + (shape.heads + shape.kv_heads + head) * width(),
                         token == tokens - 1 && at % 2 == 0);
}

// Computes one block of query rows over one split of the cache.
void Step::attend(int head, int block, int split) const {
  static thread_local Accumulator accumulator;
  const int first = block * BLOCK, count = std::min(rows() - first, BLOCK);
  const int visible = past + (first + count - 1) / group() + 1;  // to the last row
  const int begin = split * SPLIT, end = splits == 1 ? visible : std::min(visible, begin + SPLIT);
  this->head(head).attend(first, count, begin, end, accumulator);
  for (int row = 0; row < count; ++row) {
    const float *sums = accumulator.sums + row * width(), total = accumulator.total(row);
    if (splits == 1) {
      float* to = out_of(head, first + row);
      for (int i = 0; i < width(); ++i) to[i] = sums[i] / total;
    } else {
      float* to = part_of(head, split, row);
      std::copy(sums, sums + width(), to);
      to[width()] = accumulator.base[row];
      to[width() + 1] = total;
    }
  }
}

// Rescales the splits' sums to a common base and combines them.
void Step::merge(int head) const {
  for (int row = 0; row < rows(); ++row) {
    float base = LOWEST, total = 0;
    for (int split = 0; split < splits; ++split) base = std::max(base, part_of(head, split, row)[width()]);
    float* to = out_of(head, row);
    std::fill(to, to + width(), 0.0f);
    for (int split = 0; split < splits; ++split) {
      const float* part = part_of(head, split, row);
      const float factor = std::exp(part[width()] - base);
      total += factor * part[width() + 1];
      for (int i = 0; i < width(); ++i) to[i] += factor * part[i];
    }
    for (int i = 0; i < width(); ++i) to[i] /= total;
  }
}

// Computes one head of the patches of one window. There is no mask: each query is treated as that of the last patch.
void attend_window(const PatchAttention& shape, const float* qkv, const float* cos, const float* sin,
                   const Window& window, int head, float* out) {
  static thread_local std::vector<uint16_t> keys, values;
  static thread_local std::vector<Pair> queries;
  static thread_local Accumulator accumulator;
  const int width = shape.width, columns = padded(width), count = static_cast<int>(window.size());
  const size_t capacity = (count + KEYS - 1) / KEYS * KEYS, row = static_cast<size_t>(shape.heads) * width;
  keys.resize(std::max(keys.size(), capacity * width));
  values.assign(capacity * columns, 0);  // the padding between width and columns must be zero, too
  queries.resize(std::max(queries.size(), capacity * columns / 2));
  const Head target{width, count, count - 1, keys.data(), values.data(), queries.data()};
  const Rotary rotary{width, 0};
  alignas(64) float rotated[MAX_HEAD_WIDTH] = {};
  const auto patch = [&](int i) { return qkv + window[i] * 3 * row + head * width; };
  for (int i = 0; i < count; ++i) {
    const float *from = patch(i), *soon = patch(std::min(i + 4, count - 1));  // rows are far apart in memory
    for (int part = 0; part < 3; ++part) prefetch(soon + part * row, width * 4);
    const float *c = cos + window[i] * width / 2, *s = sin + window[i] * width / 2;
    rotary(from, nullptr, shape.scale, c, s, rotated);
    target.store_query(i, rotated);
    rotary(from + row, nullptr, 1, c, s, rotated);
    target.store_key_value(i, rotated, from + 2 * row, false);
  }
  for (int first = 0; first < count; first += BLOCK) {
    const int rows = std::min(count - first, BLOCK);
    target.attend(first, rows, 0, count, accumulator);
    for (int i = 0; i < rows; ++i) {
      const float *sums = accumulator.sums + i * columns, total = accumulator.total(i);
      float* to = out + window[first + i] * row + head * width;
      for (int j = 0; j < width; ++j) to[j] = sums[j] / total;
    }
  }
}

}  // namespace

void Attention::run(const float* qkv, int tokens, int past, const float* cos, const float* sin, uint16_t* keys,
                    uint16_t* values, int64_t capacity, float* out, const ParallelFor& parallel_for) const {
  static thread_local std::vector<Pair> queries;
  static thread_local std::vector<float> parts;
  Step step{*this, qkv, cos, sin, tokens, past, keys, values, capacity, out, nullptr, nullptr, 1};
  queries.resize(std::max(queries.size(), static_cast<size_t>(tokens) * heads * width / 2));
  step.queries = queries.data();
  const int blocks = step.blocks();
  if (blocks == 1) step.splits = (past + tokens + SPLIT - 1) / SPLIT;
  if (step.splits > 1) {
    parts.resize(std::max(parts.size(), static_cast<size_t>(kv_heads) * step.splits * step.rows() * (width + 2)));
    step.parts = parts.data();
  }
  const int few = 4;  // with fewer tokens, the small loops take less time than waking other threads
  const ParallelFor serial = [](size_t count, const Work& work) {
    for (size_t i = 0; i < count; ++i) work(i);
  };
  const ParallelFor& small_for = tokens < few ? serial : parallel_for;
  small_for(static_cast<size_t>(kv_heads) * tokens, [&](size_t i) { step.prepare(i / tokens, i % tokens); });
  parallel_for(static_cast<size_t>(kv_heads) * blocks * step.splits, [&](size_t i) {
    step.attend(i / step.splits / blocks, i / step.splits % blocks, i % step.splits);
  });
  if (step.splits > 1) small_for(kv_heads, [&](size_t i) { step.merge(i); });
}

void PatchAttention::run(const float* qkv, const float* cos, const float* sin, const std::vector<Window>& windows,
                         float* out, const ParallelFor& parallel_for) const {
  parallel_for(windows.size() * heads, [&](size_t i) {
    attend_window(*this, qkv, cos, sin, windows[i / heads], static_cast<int>(i % heads), out);
  });
}

}  // namespace gog
