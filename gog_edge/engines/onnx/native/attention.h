// Attention of new tokens over a cache of keys and values, which they are added to first, and of a picture's patches
// over each other.
//
// The cache holds bfloat16, as checkpoints are taught and run. Pairs stand together that are multiplied together:
//   keys    [kv_heads, capacity / TILE, width / 2, TILE, 2]
//   values  [kv_heads, capacity / 2, width, 2]
// so that a vector holds a pair of many tokens' keys, and of many columns' values, and nothing is laid out anew when it
// is read. Heads of the query that share keys and values are rows of one product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace gog {

constexpr int TILE = 16;   // tokens whose keys stand together
constexpr int KEYS = 64;   // tokens that are attended at a time; a cache's capacity is a multiple of it
constexpr int WIDEST = 256;  // of a head
constexpr int WIDTHS = 32;   // widths of the decoder's heads are multiples of it

using Work = std::function<void(size_t)>;
using Parallel = std::function<void(size_t count, const Work&)>;  // runs work(0) .. work(count - 1)

struct Attention {
  int heads, kv_heads, width;
  float scale, epsilon;
  const float* q_norm;  // [width], or null: queries are not normalised
  const float* k_norm;

  // qkv [tokens, (heads + 2 kv_heads) * width], rotary tables cos, sin [capacity, width / 2] -> out
  // [tokens, heads * width]. `seen`: tokens in the cache before.
  void run(const float* qkv, int tokens, int seen, const float* cos, const float* sin, uint16_t* keys,
           uint16_t* values, int64_t capacity, float* out, const Parallel& parallel) const;
};

using Window = std::vector<int64_t>;  // patches that see each other, and no others

struct PatchAttention {
  int heads, width;  // any even width up to WIDEST
  float scale;

  // qkv [patches, 3 * heads * width], cos, sin [patches, width / 2] -> out [patches, heads * width], of each patch that
  // is in a window.
  void run(const float* qkv, const float* cos, const float* sin, const std::vector<Window>& windows, float* out,
           const Parallel& parallel) const;
};

}  // namespace gog
