#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace gog {
namespace {

constexpr int BLOCK = 96;    // rows of the query that pass over the cache together
constexpr int SPLIT = 256;   // tokens of the cache that one thread passes over, where there is one block
constexpr float LOWEST = -1e30f;
constexpr float HEADROOM = 8;  // by which a score may pass the base of its row: e^8 is no trouble to a float

// Where the vectors of a step stand that are multiplied with a pair of the left side.
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

template <int COUNT, int WIDE, class Right>
void multiply_rows(int steps, const Pair* left, int left_row, Right right, float* sums, int sums_row) {
  Floats kept[COUNT][WIDE];
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < WIDE; ++column)
      kept[row][column] = load<Floats>(sums + row * sums_row + column * LANES);
  for (int step = 0; step < steps; ++step) {
    Ints factors[WIDE];
#pragma GCC unroll 8
    for (int column = 0; column < WIDE; ++column) factors[column] = right.at(step, column);
#pragma GCC unroll 8
    for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
      for (int column = 0; column < WIDE; ++column)
        kept[row][column] = add_product(kept[row][column], left[row * left_row + step], factors[column]);
  }
#pragma GCC unroll 8
  for (int row = 0; row < COUNT; ++row)
#pragma GCC unroll 8
    for (int column = 0; column < WIDE; ++column)
      store(sums + row * sums_row + column * LANES, kept[row][column]);
}

// WIDE vectors of columns of `multiply`.
template <int WIDE, class Right>
void multiply_columns(int rows, int columns, int steps, const Pair* left, int left_row, Right right, float* sums) {
  for (int row = 0; row < rows; row += ROWS) {
    const Pair* from = left + row * left_row;
    float* to = sums + row * columns;
    switch (std::min(rows - row, ROWS)) {
#if defined(__AVX512F__)
      case 6: multiply_rows<6, WIDE>(steps, from, left_row, right, to, columns); break;
      case 5: multiply_rows<5, WIDE>(steps, from, left_row, right, to, columns); break;
#endif
      case 4: multiply_rows<4, WIDE>(steps, from, left_row, right, to, columns); break;
      case 3: multiply_rows<3, WIDE>(steps, from, left_row, right, to, columns); break;
      case 2: multiply_rows<2, WIDE>(steps, from, left_row, right, to, columns); break;
      default: multiply_rows<1, WIDE>(steps, from, left_row, right, to, columns);
    }
  }
}

// sums [rows, columns] += left [rows, steps] of pairs * right [steps, columns] of pairs
template <class Right>
void multiply(int rows, int columns, int steps, const Pair* left, int left_row, Right right, float* sums) {
  constexpr int WIDE = COLUMNS * LANES;
  int column = 0;
  for (; column + WIDE <= columns; column += WIDE)
    multiply_columns<COLUMNS>(rows, columns, steps, left, left_row, right.from(column), sums + column);
  if (column < columns)  // half as many, as widths are multiples of 32
    multiply_columns<COLUMNS / 2>(rows, columns, steps, left, left_row, right.from(column), sums + column);
}

// What a block of rows has gathered on its way over the cache: sums of values by e^(score - base), and of these.
struct Gathered {
  alignas(64) float sums[BLOCK * WIDEST];
  alignas(64) float totals[BLOCK * LANES];
  float base[BLOCK];

  float total(int row) const { return sum_of(load<Floats>(totals + row * LANES)); }
};

// Rotary position embedding of a head; before it RMS norm, where there is one.
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

// To what vectors multiply at once.
int padded(int width) { return (width + WIDTHS - 1) / WIDTHS * WIDTHS; }

// A head's keys and values, and rows of queries of `group` heads that share them, token after token.
struct Head {
  int width, group;
  int seen;  // tokens that the first query sees beside its own
  uint16_t *keys, *values;
  Pair* queries;  // [rows, padded(width) / 2]

  void ask(int row, const float* query) const {
    pairs_of(query, padded(width), queries + row * static_cast<size_t>(padded(width)) / 2);
  }
  void keep(int at, const float* key, const float* value, bool alone) const;
  void look(int first, int count, int begin, int end, Gathered& gathered) const;

 private:
  void weigh(float* scores, int visible, int row, Gathered& gathered) const;
};

// `alone`: the other of its pair is not yet said.
void Head::keep(int at, const float* key, const float* value, bool alone) const {
  alignas(64) uint16_t rounded[2][WIDEST];  // at once, and then to their places
  for (int i = 0; i < width; ++i) rounded[0][i] = bfloat(key[i]);
  for (int i = 0; i < width; ++i) rounded[1][i] = bfloat(value[i]);
  uint16_t* key_to = keys + at / TILE * TILE * static_cast<size_t>(width) + at % TILE * 2;
  uint16_t* value_to = values + at / 2 * 2 * static_cast<size_t>(padded(width)) + at % 2;
  for (int i = 0; i < width; i += 2) store(key_to + i * TILE, load<uint32_t>(rounded[0] + i));
  for (int i = 0; i < width; ++i) value_to[i * 2] = rounded[1][i];
  for (int i = 0; alone && i < width; ++i) value_to[i * 2 + 1] = 0;
}

// Scores [KEYS] of a row, of which the first `visible` count, become weights. Where scores rise far above the base it
// becomes the greatest of them, and what was gathered is scaled to fit: seldom, as is finding the greatest.
void Head::weigh(float* scores, int visible, int row, Gathered& gathered) const {
  for (int key = std::max(visible, 0); key < KEYS; ++key) scores[key] = LOWEST;
  Floats most = load<Floats>(scores);
  for (int key = LANES; key < KEYS; key += LANES) most = greater(most, load<Floats>(scores + key));
  float *sums = gathered.sums + row * padded(width), *totals = gathered.totals + row * LANES;
  Floats total = load<Floats>(totals);
  if (any_greater(most, gathered.base[row] + HEADROOM)) {
    const float top = most_of(most), factor = std::exp(gathered.base[row] - top);
    gathered.base[row] = top;
    total *= factor;
    for (int i = 0; i < padded(width); i += LANES) store(sums + i, load<Floats>(sums + i) * factor);
  }
  for (int key = 0; key < KEYS; key += LANES) {
    const Floats weight = exponential(load<Floats>(scores + key) - gathered.base[row]);
    store(scores + key, weight);
    total += weight;
  }
  store(totals, total);
}

// `count` rows from `first` on pass over the tokens from `begin` to `end` of the cache.
void Head::look(int first, int count, int begin, int end, Gathered& gathered) const {
  alignas(64) static thread_local float scores[BLOCK * KEYS];
  alignas(64) static thread_local Pair weights[BLOCK * KEYS / 2];
  const int columns = padded(width);
  std::fill(gathered.sums, gathered.sums + count * columns, 0.0f);
  std::fill(gathered.totals, gathered.totals + count * LANES, 0.0f);
  std::fill(gathered.base, gathered.base + count, LOWEST);
  const Pair* query = queries + first * static_cast<size_t>(columns) / 2;
  for (int at = begin; at < end; at += KEYS) {
    const uint16_t *key = keys + at * static_cast<size_t>(width), *value = values + at * static_cast<size_t>(columns);
    fetch(value, KEYS * columns * 2);  // while scores are computed
    std::fill(scores, scores + count * KEYS, 0.0f);
    multiply(count, KEYS, width / 2, query, columns / 2, Keys{key, width}, scores);
    if (at + KEYS < end) fetch(key + KEYS * width, KEYS * width * 2);
    for (int row = 0; row < count; ++row)
      weigh(scores + row * KEYS, seen + (first + row) / group + 1 - at, row, gathered);
    pairs_of(scores, count * KEYS, weights);
    const int pairs = (std::min(end - at, KEYS) + 1) / 2;  // what lies behind may be no number
    multiply(count, columns, pairs, weights, KEYS / 2, Values{value, columns}, gathered.sums);
  }
}

// One conversation's step.
struct Step {
  const Attention& shape;
  const float *qkv, *cos, *sin;
  int tokens, seen;
  uint16_t *keys, *values;
  int64_t capacity;
  float* out;
  Pair* queries;  // [kv_heads, tokens, group, width / 2]
  float* parts;   // [kv_heads, splits, rows, width + 2]; of one split: null
  int splits;

  int width() const { return shape.width; }
  int group() const { return shape.heads / shape.kv_heads; }
  int rows() const { return tokens * group(); }
  int blocks() const { return (rows() + BLOCK - 1) / BLOCK; }
  Head head(int i) const {
    const size_t cache = i * capacity * width(), asked = static_cast<size_t>(i) * rows() * width() / 2;
    return {width(), group(), seen, keys + cache, values + cache, queries + asked};
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

// Queries of a token; its key and value into the cache.
void Step::prepare(int head, int token) const {
  const Head kept = this->head(head);
  const Rotary rotary{width(), shape.epsilon};
  const float* row = qkv + token * static_cast<size_t>(shape.heads + 2 * shape.kv_heads) * width();
  const int at = seen + token;
  const float *c = cos + static_cast<size_t>(at) * width() / 2, *s = sin + static_cast<size_t>(at) * width() / 2;
  alignas(64) float turned[WIDEST];
  for (int i = 0; i < group(); ++i) {
    rotary(row + (head * group() + i) * width(), shape.q_norm, shape.scale, c, s, turned);
    kept.ask(token * group() + i, turned);
  }
  rotary(row + (shape.heads + head) * width(), shape.k_norm, 1, c, s, turned);
  kept.keep(at, turned, row + (shape.heads + shape.kv_heads + head) * width(), token == tokens - 1 && at % 2 == 0);
}

void Step::attend(int head, int block, int split) const {
  static thread_local Gathered gathered;
  const int first = block * BLOCK, count = std::min(rows() - first, BLOCK);
  const int visible = seen + (first + count - 1) / group() + 1;  // to the last row
  const int begin = split * SPLIT, end = splits == 1 ? visible : std::min(visible, begin + SPLIT);
  this->head(head).look(first, count, begin, end, gathered);
  for (int row = 0; row < count; ++row) {
    const float *sums = gathered.sums + row * width(), total = gathered.total(row);
    if (splits == 1) {
      float* to = out_of(head, first + row);
      for (int i = 0; i < width(); ++i) to[i] = sums[i] / total;
    } else {
      float* to = part_of(head, split, row);
      std::copy(sums, sums + width(), to);
      to[width()] = gathered.base[row];
      to[width() + 1] = total;
    }
  }
}

// What the splits have gathered, brought to one scale.
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

// A head of the patches of a window. All are seen by all, as if each query were of the last of them.
void attend_window(const PatchAttention& shape, const float* qkv, const float* cos, const float* sin,
                   const Window& window, int head, float* out) {
  static thread_local std::vector<uint16_t> keys, values;
  static thread_local std::vector<Pair> queries;
  static thread_local Gathered gathered;
  const int width = shape.width, columns = padded(width), count = static_cast<int>(window.size());
  const size_t room = (count + KEYS - 1) / KEYS * KEYS, row = static_cast<size_t>(shape.heads) * width;
  keys.resize(std::max(keys.size(), room * width));
  values.assign(room * columns, 0);  // also between what is wide and what is multiplied
  queries.resize(std::max(queries.size(), room * columns / 2));
  const Head kept{width, count, count - 1, keys.data(), values.data(), queries.data()};
  const Rotary rotary{width, 0};
  alignas(64) float turned[WIDEST] = {};
  const auto of_patch = [&](int i) { return qkv + window[i] * 3 * row + head * width; };
  for (int i = 0; i < count; ++i) {
    const float *from = of_patch(i), *soon = of_patch(std::min(i + 4, count - 1));  // rows lie far from each other
    for (int part = 0; part < 3; ++part) fetch(soon + part * row, width * 4);
    const float *c = cos + window[i] * width / 2, *s = sin + window[i] * width / 2;
    rotary(from, nullptr, shape.scale, c, s, turned);
    kept.ask(i, turned);
    rotary(from + row, nullptr, 1, c, s, turned);
    kept.keep(i, turned, from + 2 * row, false);
  }
  for (int first = 0; first < count; first += BLOCK) {
    const int rows = std::min(count - first, BLOCK);
    kept.look(first, rows, 0, count, gathered);
    for (int i = 0; i < rows; ++i) {
      const float *sums = gathered.sums + i * columns, total = gathered.total(i);
      float* to = out + window[first + i] * row + head * width;
      for (int j = 0; j < width; ++j) to[j] = sums[j] / total;
    }
  }
}

}  // namespace

void Attention::run(const float* qkv, int tokens, int seen, const float* cos, const float* sin, uint16_t* keys,
                    uint16_t* values, int64_t capacity, float* out, const Parallel& parallel) const {
  static thread_local std::vector<Pair> queries;
  static thread_local std::vector<float> parts;
  Step step{*this, qkv, cos, sin, tokens, seen, keys, values, capacity, out, nullptr, nullptr, 1};
  queries.resize(std::max(queries.size(), static_cast<size_t>(tokens) * heads * width / 2));
  step.queries = queries.data();
  const int blocks = step.blocks();
  if (blocks == 1) step.splits = (seen + tokens + SPLIT - 1) / SPLIT;
  if (step.splits > 1) {
    parts.resize(std::max(parts.size(), static_cast<size_t>(kv_heads) * step.splits * step.rows() * (width + 2)));
    step.parts = parts.data();
  }
  const int few = 4;  // tokens below which other threads would be called for less than the call takes
  const Parallel alone = [](size_t count, const Work& work) {
    for (size_t i = 0; i < count; ++i) work(i);
  };
  const Parallel& small = tokens < few ? alone : parallel;
  small(static_cast<size_t>(kv_heads) * tokens, [&](size_t i) { step.prepare(i / tokens, i % tokens); });
  parallel(static_cast<size_t>(kv_heads) * blocks * step.splits, [&](size_t i) {
    step.attend(i / step.splits / blocks, i / step.splits % blocks, i % step.splits);
  });
  if (step.splits > 1) small(kv_heads, [&](size_t i) { step.merge(i); });
}

void PatchAttention::run(const float* qkv, const float* cos, const float* sin, const std::vector<Window>& windows,
                         float* out, const Parallel& parallel) const {
  parallel(windows.size() * heads, [&](size_t i) {
    attend_window(*this, qkv, cos, sin, windows[i / heads], static_cast<int>(i % heads), out);
  });
}

}  // namespace gog
