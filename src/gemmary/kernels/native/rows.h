// A few rows times a matrix, as in decoding: all the time goes into reading the matrix, so it is read once and in order.
#pragma once

#include "blocks.h"
#include "kernels.h"
#include "simd.h"

namespace gemmary {
namespace {

typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

inline Floats wide(const float* from) { return load(from); }
inline float wide_one(float x) { return x; }

// bfloat16 is the upper half of a float.
inline Floats wide(const uint16_t* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats v;
  memcpy(&v, &words, sizeof v);
  return v;
}
inline float wide_one(uint16_t x) {
  const uint32_t word = uint32_t(x) << 16;
  float v;
  memcpy(&v, &word, sizeof v);
  return v;
}

// Compilers make of a plain conversion one lane after the other.
#if defined(__AVX512F__)
inline Floats wide(const int8_t* from) {
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
}
#elif defined(__AVX2__)
inline Floats wide(const int8_t* from) {
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(from))));
}
#else
inline Floats wide(const int8_t* from) {
  typedef int8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, Floats);
}
#endif
inline float wide_one(int8_t x) { return x; }

// Some columns of the product of some rows: y has `stride` values from row to row, and begins with column `first`.
struct Part {
  const float* x;
  int64_t k, n, first, last;
  float* y;
  int64_t stride;
  const Numbers* numbers = nullptr;  // x again, for blocks, and at which row of it this begins
  int64_t row = 0;
};

// w as [n, k]: each result is a product of two rows, four of w's at a time.
template <int count, typename T>
void by_outputs(const Part& r, const T* w) {
  const int64_t k = r.k, whole = k / kWidth * kWidth;
  for (int64_t n = r.first; n < r.last; n += 4) {
    const int64_t lines = least(4, r.last - n);
    const T* line[4];
    for (int64_t i = 0; i < 4; ++i) line[i] = w + (n + least(i, lines - 1)) * k;
    Floats sum[4][count] = {};
    for (int64_t p = 0; p < whole; p += kWidth)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Floats value = wide(line[i] + p);
#pragma GCC unroll 4
        for (int m = 0; m < count; ++m) sum[i][m] += value * load(r.x + m * k + p);
      }
    for (int64_t i = 0; i < lines; ++i)
      for (int m = 0; m < count; ++m) {
        float total = sum_of(sum[i][m]);
        for (int64_t p = whole; p < k; ++p) total += wide_one(line[i][p]) * r.x[m * k + p];
        r.y[m * r.stride + n - r.first + i] = total;
      }
  }
}

// w as [k, n]: four of w's rows are added to the results at a time.
template <int count, typename T>
void by_inputs(const Part& r, const T* w) {
  const int64_t k = r.k, n = r.n, size = r.last - r.first, whole = size / kWidth * kWidth;
  for (int m = 0; m < count; ++m) memset(r.y + m * r.stride, 0, sizeof(float) * size);
  for (int64_t p = 0; p < k; p += 4) {
    const int64_t lines = least(4, k - p);
    const T* line[4];
    float x[4][count];
    for (int64_t i = 0; i < 4; ++i) {
      line[i] = w + (p + least(i, lines - 1)) * n + r.first;
      for (int m = 0; m < count; ++m) x[i][m] = i < lines ? r.x[m * k + p + i] : 0.0f;
    }
    const int64_t ahead = (p + 8 < k ? 8 : 0) * n;
    for (int64_t j = 0; j < whole; j += kWidth) {
      Floats value[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(line[i] + ahead + j);
        value[i] = wide(line[i] + j);
      }
#pragma GCC unroll 4
      for (int m = 0; m < count; ++m) {
        float* y = r.y + m * r.stride + j;
        store(y, load(y) + ((value[0] * x[0][m] + value[1] * x[1][m]) + (value[2] * x[2][m] + value[3] * x[3][m])));
      }
    }
    for (int64_t j = whole; j < size; ++j)
      for (int m = 0; m < count; ++m)
        for (int64_t i = 0; i < lines; ++i) r.y[m * r.stride + j] += wide_one(line[i][j]) * x[i][m];
  }
}

typedef float Eight __attribute__((vector_size(32)));

// w as rows of blocks, each of which is unpacked once for all rows of x.
template <int count, typename B>
void by_blocks(const Part& r, const uint8_t* w) {
  const int64_t bytes = r.k / B::values * B::bytes, groups_of_row = r.k / 32;
  const int16_t* const x = r.numbers->x + r.row * r.k;
  const float* const scales = r.numbers->scale + r.row * groups_of_row;
  const float* const sums = r.numbers->sum + r.row * groups_of_row;
  const uint8_t* block = w + r.first * bytes;
  for (int64_t n = 0; n < r.last - r.first; ++n) {
    Floats sum[count] = {};
    Eight under[count] = {};
    for (int64_t p = 0; p < groups_of_row; p += B::values / 32, block += B::bytes) {
      __builtin_prefetch(block + 2048);
      groups(B{}, block, [&](int g, Shorts q, const float* scale) __attribute__((always_inline)) {
        const Floats wide = all(*scale);
#pragma GCC unroll 4
        for (int m = 0; m < count; ++m) {
          const int64_t at = m * groups_of_row + p + g;
          sum[m] += dot(q, x + 32 * at) * (wide * all(scales[at]));
        }
      });
      if constexpr (kHasLeast<B>) {
        Eight less;
        leasts(block, reinterpret_cast<float*>(&less));
        for (int m = 0; m < count; ++m) {
          Eight sums_of_groups;
          memcpy(&sums_of_groups, sums + m * groups_of_row + p, sizeof sums_of_groups);
          under[m] += less * sums_of_groups;
        }
      }
    }
    for (int m = 0; m < count; ++m) {
      float total = sum_of(sum[m]);
      if constexpr (kHasLeast<B>)
        for (int i = 0; i < 8; ++i) total -= under[m][i];
      r.y[m * r.stride + n] = total;
    }
  }
}

// `f` with a value of the type that a kind is made of.
template <typename F>
void with_blocks(Kind kind, F f) {
  switch (kind) {
    case Kind::q8_0: return f(Q8_0{});
    case Kind::q4_0: return f(Q4_0{});
    case Kind::q5_0: return f(Q5_0{});
    case Kind::q4_k: return f(Q4_K{});
    case Kind::q5_k: return f(Q5_K{});
    case Kind::q6_k: return f(Q6_K{});
    default: return;
  }
}

template <int count>
void few(const Part& part, const Factor& factor) {
  const auto plain = [&]<typename T>(const T* w) {
    factor.turned ? by_outputs<count>(part, w) : by_inputs<count>(part, w);
  };
  switch (factor.kind) {
    case Kind::f32: return plain(static_cast<const float*>(factor.w));
    case Kind::bf16: return plain(static_cast<const uint16_t*>(factor.w));
    case Kind::i8: return plain(static_cast<const int8_t*>(factor.w));
    default:
      with_blocks(factor.kind, [&]<typename B>(B) { by_blocks<count, B>(part, static_cast<const uint8_t*>(factor.w)); });
  }
}

// The part of `m` rows, four, two or one at a time; a piece of w that is read again is still near.
inline void some_rows(Part part, int64_t m, const Factor& factor) {
  while (m > 0) {
    const int64_t count = m >= 4 ? 4 : m >= 2 ? 2 : 1;
    (count == 4 ? few<4> : count == 2 ? few<2> : few<1>)(part, factor);
    part.x += count * part.k;
    part.row += count;
    part.y += count * part.stride;
    m -= count;
  }
}

}  // namespace
}  // namespace gemmary
