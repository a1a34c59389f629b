// Weights as a GGUF keeps them: blocks of 32 or 256 values that share scales. A type gives its block's size and `each`, which
// hands out the values a vector at a time, with the place of the first in the block. Layouts: ggml's ggml-quants.c.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gemmary {
namespace {

// A byte to each lane. Compilers make of a plain conversion one lane after the other.
#if defined(__AVX512F__)
inline Ints bytes_at(const void* from) {
  return Ints(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
inline Ints signed_bytes_at(const void* from) {
  return Ints(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
#elif defined(__AVX2__)
inline Ints bytes_at(const void* from) { return Ints(_mm256_cvtepu8_epi32(_mm_loadu_si64(from))); }
inline Ints signed_bytes_at(const void* from) { return Ints(_mm256_cvtepi8_epi32(_mm_loadu_si64(from))); }
#else
template <typename B>
inline Ints widened(const void* from) {
  B bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Ints);
}
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
typedef int8_t SignedBytes __attribute__((vector_size(kWidth)));
inline Ints bytes_at(const void* from) { return widened<Bytes>(from); }
inline Ints signed_bytes_at(const void* from) { return widened<SignedBytes>(from); }
#endif
inline Floats signed_at(const void* from) { return __builtin_convertvector(signed_bytes_at(from), Floats); }

// The low four bits of each lane less an offset; what stands above them does not matter.
template <int offset>
inline Floats nibbles(Ints q) {
#if defined(__AVX512F__)
  constexpr float o = offset;
  const __m512 levels = _mm512_setr_ps(0 - o, 1 - o, 2 - o, 3 - o, 4 - o, 5 - o, 6 - o, 7 - o, 8 - o, 9 - o, 10 - o, 11 - o,
                                       12 - o, 13 - o, 14 - o, 15 - o);
  return Floats(_mm512_permutexvar_ps(__m512i(q), levels));
#else
  return __builtin_convertvector((q & 15) - offset, Floats);
#endif
}

// 16 more in the lanes whose bit is set.
inline Floats with_fifth_bit(Floats v, uint32_t bits) {
#if defined(__AVX512F__)
  return Floats(_mm512_mask_add_ps(__m512(v), __mmask16(bits), __m512(v), _mm512_set1_ps(16.0f)));
#else
  Ints lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return v + __builtin_convertvector(((int32_t(bits) - Ints{}) >> lane & 1) << 4, Floats);
#endif
}

inline const float* half_at(const uint8_t* from) {
  uint16_t h;
  memcpy(&h, from, sizeof h);
  return half_floats + h;
}
inline float half(const uint8_t* from) { return *half_at(from); }

struct Q8_0 {  // d, 32 x int8
  static constexpr int values = 32, bytes = 34;
  template <typename F>
  static inline void each(const uint8_t* block, F f) {
    const Floats d = all(half(block));
#pragma GCC unroll 8
    for (int at = 0; at < 32; at += kWidth) f(at, signed_at(block + 2 + at) * d);
  }
};

struct Q4_0 {  // d, 16 bytes: values j and j + 16
  static constexpr int values = 32, bytes = 18;
  template <typename F>
  static inline void each(const uint8_t* block, F f) {
    const Floats d = all(half(block));
#pragma GCC unroll 4
    for (int at = 0; at < 16; at += kWidth) {
      const Ints q = bytes_at(block + 2 + at);
      f(at, nibbles<8>(q) * d);
      f(at + 16, nibbles<8>(q >> 4) * d);
    }
  }
};

struct Q5_0 {  // d, 32 fifth bits, 16 bytes as in Q4_0
  static constexpr int values = 32, bytes = 22;
  template <typename F>
  static inline void each(const uint8_t* block, F f) {
    const Floats d = all(half(block));
    uint32_t fifth;
    memcpy(&fifth, block + 2, sizeof fifth);
#pragma GCC unroll 4
    for (int at = 0; at < 16; at += kWidth) {
      const Ints q = bytes_at(block + 6 + at);
      f(at, with_fifth_bit(nibbles<16>(q), fifth >> at) * d);
      f(at + 16, with_fifth_bit(nibbles<16>(q >> 4), fifth >> (at + 16)) * d);
    }
  }
};

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

struct Q4_K {  // d, dmin, 12 bytes of groups, 4 x 32 bytes: of two groups each
  static constexpr int values = 256, bytes = 144;
  template <typename F>
  static inline void each(const uint8_t* block, F f) {
    const float d = half(block), dmin = half(block + 2);
    const Groups group(block + 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats low = all(d * group.scale[2 * i]), low_least = all(dmin * group.least[2 * i]);
      const Floats high = all(d * group.scale[2 * i + 1]), high_least = all(dmin * group.least[2 * i + 1]);
#pragma GCC unroll 8
      for (int at = 0; at < 32; at += kWidth) {
        const Ints q = bytes_at(block + 16 + 32 * i + at);
        f(64 * i + at, nibbles<0>(q) * low - low_least);
        f(64 * i + 32 + at, nibbles<0>(q >> 4) * high - high_least);
      }
    }
  }
};

struct Q5_K {  // d, dmin, 12 bytes of groups, 32 bytes of fifth bits (bit g: group g), 4 x 32 bytes as in Q4_K
  static constexpr int values = 256, bytes = 176;
  template <typename F>
  static inline void each(const uint8_t* block, F f) {
    const float d = half(block), dmin = half(block + 2);
    const Groups group(block + 4);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Floats low = all(d * group.scale[2 * i]), low_least = all(dmin * group.least[2 * i]);
      const Floats high = all(d * group.scale[2 * i + 1]), high_least = all(dmin * group.least[2 * i + 1]);
#pragma GCC unroll 8
      for (int at = 0; at < 32; at += kWidth) {
        const Ints q = bytes_at(block + 48 + 32 * i + at), fifth = bytes_at(block + 16 + at) >> (2 * i);
        const Ints first = (q & 15) | (fifth & 1) << 4, second = q >> 4 | (fifth & 2) << 3;
        f(64 * i + at, __builtin_convertvector(first, Floats) * low - low_least);
        f(64 * i + 32 + at, __builtin_convertvector(second, Floats) * high - high_least);
      }
    }
  }
};

struct Q6_K {  // 2 x 64 bytes of low bits, 2 x 32 of high ones, 16 signed scales, d
  static constexpr int values = 256, bytes = 210;
  template <typename F>
  static inline void each(const uint8_t* block, F f) {
    const float d = half(block + 208);
    const int8_t* scale = reinterpret_cast<const int8_t*>(block + 192);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
      for (int at = 0; at < 32; at += kWidth) {
        const Ints near = bytes_at(block + 64 * i + at), far = bytes_at(block + 64 * i + 32 + at);
        const Ints high = bytes_at(block + 128 + 32 * i + at);
        const int8_t* s = scale + 8 * i + at / 16;
        const auto give = [&](int place, Ints low, int shift) {
          const Ints q = (low | (high >> shift & 3) << 4) - 32;
          f(128 * i + 32 * place + at, __builtin_convertvector(q, Floats) * all(d * s[2 * place]));
        };
        give(0, near & 15, 0);
        give(1, far & 15, 2);
        give(2, near >> 4, 4);
        give(3, far >> 4, 6);
      }
  }
};

// `count` values of a row, from one that begins a block.
template <typename B>
inline void decode(const uint8_t* block, int64_t count, float* to) {
  for (int64_t first = 0; first < count; first += B::values, block += B::bytes)
    B::each(block, [&](int at, Floats v) __attribute__((always_inline)) { store(to + first + at, v); });
}

}  // namespace
}  // namespace gemmary
