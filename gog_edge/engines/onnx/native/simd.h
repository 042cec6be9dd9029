// Vectors of the processor that this is compiled for, and the two dot products on which the kernels are built.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace gog {

// A microkernel keeps ROWS x COLUMNS accumulators in registers: for each row, COLUMNS vectors of LANES floats.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6, COLUMNS = 4;
#else
constexpr int LANES = 8, ROWS = 4, COLUMNS = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

template <class Vector>
inline Vector load(const void* from) {
  Vector loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

template <class Vector>
inline void store(void* to, Vector stored) {
  std::memcpy(to, &stored, sizeof stored);
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline Floats abs(Floats a) { return max(a, -a); }

inline float horizontal_sum(Floats a) {
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += a[lane];
  return sum;
}

inline float horizontal_max(Floats a) {
  float most = a[0];
  for (int lane = 1; lane < LANES; ++lane) most = a[lane] > most ? a[lane] : most;
  return most;
}

// Returns whether any element of `a` is greater than `b`.
inline bool any_greater(Floats a, float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, _mm512_set1_ps(b), _CMP_GT_OQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(b), _CMP_GT_OQ));
#endif
}

// Returns e^x with a relative error of at most 2e-6 for x from -87 to 87: 2^n by the exponent bits times 2^f by its
// series, where n + f = x / log(2) and |f| <= 1/2. NaN gives NaN.
inline Floats exponential(Floats x) {
#if defined(__AVX512F__)
  x = x * 1.44269504f;
  const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Floats least = Floats{} - 87.0f;
  x = -max(least, -max(least, x)) * 1.44269504f;  // `x` is the second operand of max(), so that NaN is kept
  const Floats n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  const Floats f = x - n;
  Floats series = Floats{} + 1.3333558e-3f;
  for (float factor : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) series = series * f + factor;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(series, n);
#else
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return series * load<Floats>(&exponent);
#endif
}

// ---- bfloat16, multiplied in pairs ----

// Rounds to bfloat16, to nearest with ties to even.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512BF16__)
typedef uint32_t Pair;  // two bfloat16

inline void to_pairs(const float* values, int count, Pair* pairs) {
  for (int i = 0; i < count; i += 2 * LANES) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + i + LANES), _mm512_loadu_ps(values + i));
    std::memcpy(pairs + i / 2, &both, sizeof both);
  }
}

// Returns sum + the dot product of the pair `a` with each pair of `b`.
inline Floats add_product(Floats sum, Pair a, Ints b) {
  const __m512i left = _mm512_set1_epi32(static_cast<int32_t>(a));
  return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)(__m512i)b);
}
#else
struct Pair {  // without bfloat16 instructions the left side stays float32
  float low, high;
};

inline void to_pairs(const float* values, int count, Pair* pairs) { std::memcpy(pairs, values, 4 * count); }

inline Floats add_product(Floats sum, Pair a, Ints b) {
  const Ints low = b << 16, high = b & static_cast<int32_t>(0xffff0000);
  return sum + a.low * load<Floats>(&low) + a.high * load<Floats>(&high);
}
#endif

// ---- 8-bit integers, multiplied in fours ----

// Returns sum + the dot products of each four unsigned bytes of `a`, which use BITS bits, with the four signed bytes of
// `b`.
#if defined(__AVX512VNNI__)
template <int BITS>
inline Ints add_product(Ints sum, Ints a, int32_t b) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, _mm512_set1_epi32(b));
}
#elif defined(__AVXVNNI__)
template <int BITS>
inline Ints add_product(Ints sum, Ints a, int32_t b) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, _mm256_set1_epi32(b));
}
#else
// vpmaddubsw saturates sums of two products at 16 bits. That suffices for 4 bits, so 8 bits are split into nibbles.
template <int BITS>
inline Ints add_product(Ints sum, Ints a, int32_t b) {
  const __m256i ones = _mm256_set1_epi16(1), nibbles = _mm256_set1_epi8(15), right = _mm256_set1_epi32(b);
  const __m256i low = BITS == 8 ? _mm256_and_si256((__m256i)a, nibbles) : (__m256i)a;
  sum += (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(low, right), ones);
  if (BITS == 8) {
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16((__m256i)a, 4), nibbles);
    sum += (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(high, right), ones) << 4;
  }
  return sum;
}
#endif

// Rounds LANES floats to int8.
inline void to_int8(Floats values, int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(values)));
#else
  const __m256i rounded = _mm256_cvtps_epi32(values);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storel_epi64((__m128i*)to, _mm_packs_epi16(words, words));
#endif
}

inline void prefetch(const void* from, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

}  // namespace gog
