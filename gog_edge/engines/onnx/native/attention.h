// Attention of new tokens over a KV cache, to which they are appended first, and attention among the patches of a
// picture.
//
// The cache holds bfloat16, in which the checkpoints were trained. The operands of a dot product are stored in pairs:
//   keys    [kv_heads, capacity / TILE, width / 2, TILE, 2]
//   values  [kv_heads, capacity / 2, width, 2]
// so that one vector holds a pair of elements of several tokens' keys, or of several columns of a pair of tokens'
// values, and nothing is rearranged when the cache is read. Query heads that share keys and values (grouped-query
// attention) are rows of one matrix multiplication.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace gog {

constexpr int TILE = 16;   // tokens per tile of keys
constexpr int KEYS = 64;   // tokens per pass of the attention loop; a cache's capacity is a multiple of it
constexpr int MAX_HEAD_WIDTH = 256;
constexpr int HEAD_WIDTH_MULTIPLE = 32;  // the width of the decoder's heads is a multiple of it

using Work = std::function<void(size_t)>;
using ParallelFor = std::function<void(size_t count, const Work&)>;  // calls work(0) .. work(count - 1)

struct Attention {
  int heads, kv_heads, width;  // width: of one head
  float scale, epsilon;
  const float* q_norm;  // [width], weights of the RMS norm of queries, or null for none
  const float* k_norm;

  // qkv [tokens, (heads + 2 kv_heads) * width], rotary tables cos, sin [capacity, width / 2] -> out
  // [tokens, heads * width]. `past`: tokens in the cache before this call.
  void run(const float* qkv, int tokens, int past, const float* cos, const float* sin, uint16_t* keys,
           uint16_t* values, int64_t capacity, float* out, const ParallelFor& parallel_for) const;
};

using Window = std::vector<int64_t>;  // indices of patches that attend to each other and to no others

struct PatchAttention {
  int heads, width;  // width: any even number up to MAX_HEAD_WIDTH
  float scale;

  // qkv [patches, 3 * heads * width], cos, sin [patches, width / 2] -> out [patches, heads * width], for the patches
  // in the windows.
  void run(const float* qkv, const float* cos, const float* sin, const std::vector<Window>& windows, float* out,
           const ParallelFor& parallel_for) const;
};

}  // namespace gog
