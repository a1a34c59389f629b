// Weights as a GGUF keeps them: blocks of 32 or 256 values, in groups of 32 whole numbers with a scale. Layouts: ggml's ggml-quants.c.
//
// Few rows are multiplied as whole numbers of 16 bits on both sides: half the work of floats, and what rounding costs is 2^-16 of a
// group's largest value. For many the values are made floats first.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gemmary {
namespace {

struct Q8_0 {  // d, 32 x int8
  static constexpr int values = 32, bytes = 34;
};
struct Q4_0 {  // d, 16 bytes: values j and j + 16
  static constexpr int values = 32, bytes = 18;
};
struct Q5_0 {  // d, 32 fifth bits, 16 bytes as in Q4_0
  static constexpr int values = 32, bytes = 22;
};
struct Q4_K {  // d, dmin, 12 bytes of groups, 4 x 32 bytes: of two groups each
  static constexpr int values = 256, bytes = 144;
};
struct Q5_K {  // d, dmin, 12 bytes of groups, 32 bytes of fifth bits (bit g: group g), 4 x 32 bytes as in Q4_K
  static constexpr int values = 256, bytes = 176;
};
struct Q6_K {  // 2 x 64 bytes of low bits, 2 x 32 of high ones, 16 signed scales, d
  static constexpr int values = 256, bytes = 210;
};

inline const float* half_at(const uint8_t* from) {
  uint16_t h;
  memcpy(&h, from, sizeof h);
  return half_floats + h;
}
inline float half(const uint8_t* from) { return *half_at(from); }

// Scale and minimum of each group of 32 in a block of 256: six bits each, in twelve bytes.
struct Groups {
  uint8_t scale[8], least[8];
  explicit Groups(const uint8_t* packed) {
    uint32_t low, middle, high;
    memcpy(&low, packed, 4);
    memcpy(&middle, packed + 4, 4);
    memcpy(&high, packed + 8, 4);
    const uint32_t scales[2] = {low & 0x3f3f3f3f, (high & 0x0f0f0f0f) | (low >> 6 & 0x03030303) << 4};
    const uint32_t leasts[2] = {middle & 0x3f3f3f3f, (high >> 4 & 0x0f0f0f0f) | (middle >> 6 & 0x03030303) << 4};
    memcpy(scale, scales, 8);
    memcpy(least, leasts, 8);
  }
};

typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint8_t Bytes32 __attribute__((vector_size(32)));
typedef uint8_t Bytes16 __attribute__((vector_size(16)));

template <typename B>
inline B bytes_of(const uint8_t* from) {
  B bytes;
  memcpy(&bytes, from, sizeof bytes);
  return bytes;
}

#if defined(__AVX512BW__)
inline Shorts unsigned_shorts(Bytes32 b) { return Shorts(_mm512_cvtepu8_epi16(__m256i(b))); }
inline Shorts signed_shorts(Bytes32 b) { return Shorts(_mm512_cvtepi8_epi16(__m256i(b))); }
inline Floats dot(Shorts q, const int16_t* x) {
  return Floats(_mm512_cvtepi32_ps(_mm512_madd_epi16(__m512i(q), _mm512_loadu_si512(x))));
}
#elif defined(__AVX2__)
union Halves32 {
  Shorts whole;
  __m256i half[2];
};
inline Shorts unsigned_shorts(Bytes32 b) {
  Halves32 h;
  h.half[0] = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(__m256i(b)));
  h.half[1] = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(__m256i(b), 1));
  return h.whole;
}
inline Shorts signed_shorts(Bytes32 b) {
  Halves32 h;
  h.half[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(__m256i(b)));
  h.half[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(__m256i(b), 1));
  return h.whole;
}
inline Floats dot(Shorts q, const int16_t* x) {
  Halves32 h;
  h.whole = q;
  const __m256i low = _mm256_madd_epi16(h.half[0], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  const __m256i high = _mm256_madd_epi16(h.half[1], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16)));
  return Floats(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)));
}
#else
typedef int8_t SignedBytes32 __attribute__((vector_size(32)));
inline Shorts unsigned_shorts(Bytes32 b) { return __builtin_convertvector(b, Shorts); }
inline Shorts signed_shorts(Bytes32 b) { return __builtin_convertvector(SignedBytes32(b), Shorts); }
inline Floats dot(Shorts q, const int16_t* x) {
  Ints sum{};
  for (int i = 0; i < 32; ++i) sum[i % kWidth] += int32_t(q[i]) * x[i];
  return __builtin_convertvector(sum, Floats);
}
#endif

// The low nibbles of 16 bytes, then their high ones.
inline Bytes32 nibbles_of(const uint8_t* from) {
#if defined(__AVX2__)
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i moved = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return Bytes32(_mm256_and_si256(moved, _mm256_set1_epi8(15)));
#else
  const Bytes16 b = bytes_of<Bytes16>(from), low = b & 15, high = b >> 4;
  Bytes32 out;
  for (int i = 0; i < 16; ++i) out[i] = low[i], out[16 + i] = high[i];
  return out;
#endif
}

// 16 less where the lane's bit is not set: five bits as a signed number.
inline Bytes32 with_fifth_bits(Bytes32 b, const uint8_t* from) {
  uint32_t bits;
  memcpy(&bits, from, sizeof bits);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return Bytes32(_mm256_mask_add_epi8(__m256i(b), ~bits, __m256i(b), _mm256_set1_epi8(-16)));
#elif defined(__AVX2__)
  // Each lane gets the byte that its bit is in, and keeps that bit.
  const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i all_bits = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), places);
  const __m256i mine = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i unset = _mm256_cmpeq_epi8(_mm256_and_si256(all_bits, mine), _mm256_setzero_si256());
  return Bytes32(_mm256_or_si256(__m256i(b), _mm256_and_si256(unset, _mm256_set1_epi8(-16))));
#else
  for (int i = 0; i < 32; ++i) b[i] -= (~bits >> i & 1) << 4;
  return b;
#endif
}

// `f(group, numbers, scale)` for each group of a block, the scale as where it lies.
template <typename F>
inline void groups(Q8_0, const uint8_t* block, F f) {
  f(0, signed_shorts(bytes_of<Bytes32>(block + 2)), half_at(block));
}

template <typename F>
inline void groups(Q4_0, const uint8_t* block, F f) {
  f(0, signed_shorts(nibbles_of(block + 2) - uint8_t(8)), half_at(block));
}

template <typename F>
inline void groups(Q5_0, const uint8_t* block, F f) {
  f(0, signed_shorts(with_fifth_bits(nibbles_of(block + 6), block + 2)), half_at(block));
}

// Eight small numbers, times a factor.
inline void times(const uint8_t* from, float factor, float* to) {
#if defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadu_si64(from));
  _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(factor)));
#else
  for (int i = 0; i < 8; ++i) to[i] = factor * from[i];
#endif
}

template <typename F>
inline void groups(Q4_K, const uint8_t* block, F f) {
  const Groups group(block + 4);
  float scale[8];
  times(group.scale, half(block), scale);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Shorts q = unsigned_shorts(bytes_of<Bytes32>(block + 16 + 32 * i));
    f(2 * i, q & 15, scale + 2 * i);
    f(2 * i + 1, q >> 4, scale + 2 * i + 1);
  }
}

template <typename F>
inline void groups(Q5_K, const uint8_t* block, F f) {
  const Groups group(block + 4);
  const Shorts fifth = unsigned_shorts(bytes_of<Bytes32>(block + 16));
  float scale[8];
  times(group.scale, half(block), scale);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Shorts q = unsigned_shorts(bytes_of<Bytes32>(block + 48 + 32 * i)), bits = fifth >> (2 * i);
    f(2 * i, (q & 15) | (bits & 1) << 4, scale + 2 * i);
    f(2 * i + 1, q >> 4 | (bits & 2) << 3, scale + 2 * i + 1);
  }
}

// What is taken from each value of a group; of those that have it there are eight groups.
template <typename B>
constexpr bool kHasLeast = false;
template <>
constexpr bool kHasLeast<Q4_K> = true;
template <>
constexpr bool kHasLeast<Q5_K> = true;

inline void leasts(const uint8_t* block, float* to) { times(Groups(block + 4).least, half(block + 2), to); }

// Two groups of 16 have a scale each, a small whole number: it goes into the numbers.
template <typename F>
inline void groups(Q6_K, const uint8_t* block, F f) {
  const float* const d = half_at(block + 208);
  const int8_t* scale = reinterpret_cast<const int8_t*>(block + 192);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Shorts near = unsigned_shorts(bytes_of<Bytes32>(block + 64 * i));
    const Shorts far = unsigned_shorts(bytes_of<Bytes32>(block + 64 * i + 32));
    const Shorts high = unsigned_shorts(bytes_of<Bytes32>(block + 128 + 32 * i));
    const auto give = [&](int place, Shorts low, int shift) __attribute__((always_inline)) {
      typedef int16_t Half __attribute__((vector_size(32)));
      const int8_t* s = scale + 8 * i + 2 * place;
      const Half first = int16_t(s[0]) - Half{}, second = int16_t(s[1]) - Half{};
      const Shorts scales = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
                                                    17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
      f(4 * i + place, ((low | (high >> shift & 3) << 4) - 32) * scales, d);
    };
    give(0, near & 15, 0);
    give(1, far & 15, 2);
    give(2, near >> 4, 4);
    give(3, far >> 4, 6);
  }
}

// The values of a group.
inline void spread(Shorts q, float scale, float least, float* to) {
  int16_t number[32];
  memcpy(number, &q, sizeof q);
  for (int i = 0; i < 32; ++i) to[i] = number[i] * scale - least;
}

// `count` values of a row, from one that begins a block.
template <typename B>
inline void decode(const uint8_t* block, int64_t count, float* to) {
  for (int64_t first = 0; first < count; first += B::values, block += B::bytes) {
    float least[8] = {};
    if constexpr (kHasLeast<B>) leasts(block, least);
    groups(B{}, block, [&](int g, Shorts q, const float* scale) __attribute__((always_inline)) {
      spread(q, *scale, least[g], to + first + 32 * g);
    });
  }
}

// Rows of x as 16-bit numbers in groups of 32: x = number * scale; and each group's sum.
struct Numbers {
  const int16_t* x;          // [rows, k]
  const float *scale, *sum;  // [rows, k / 32]
};

inline Numbers numbers_of(const float* x, int64_t rows, int64_t k, Scratch& scratch) {
  const int64_t groups = rows * k / 32;
  float* const scale = scratch.floats(2 * groups + rows * k / 2);
  float* const sum = scale + groups;
  int16_t* const to = reinterpret_cast<int16_t*>(sum + groups);
  for (int64_t g = 0; g < groups; ++g) {
    const float* const from = x + 32 * g;
    float largest = 0;
    for (int i = 0; i < 32; ++i) {
      const float size = from[i] < 0 ? -from[i] : from[i];
      largest = size > largest || size != size ? size : largest;
    }
    // What is next to nothing is nothing; and what is no number has none, but its group's scale is none either.
    const bool some = largest > 1e-30f && largest < 3e38f;
    const float inverse = some ? 32767 / largest : 0.0f;
    int32_t total = 0;
    for (int i = 0; i < 32; ++i) {
      const float value = some ? from[i] * inverse : 0.0f;
      const int32_t number = int32_t(value + (value < 0 ? -0.5f : 0.5f));
      to[32 * g + i] = int16_t(number);
      total += int16_t(number);
    }
    scale[g] = largest / 32767;
    sum[g] = scale[g] * float(total);
  }
  return {to, scale, sum};
}

}  // namespace
}  // namespace gemmary
