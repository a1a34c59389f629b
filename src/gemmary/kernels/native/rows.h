// A few rows times a matrix, as in decoding: all the time goes into reading the matrix, so it is read once and in order.
#pragma once

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

// Columns [first, last) of `count` rows, w as [n, k]: each result is a product of two rows, four of w's at a time.
template <typename T, int count>
void by_outputs(const Rows& r, const T* w, int64_t row, int64_t first, int64_t last) {
  const int64_t k = r.k, whole = k / kWidth * kWidth;
  const float* x = r.x + row * k;
  for (int64_t n = first; n < last; n += 4) {
    const int64_t lines = least(4, last - n);
    const T* line[4];
    for (int64_t i = 0; i < 4; ++i) line[i] = w + (n + least(i, lines - 1)) * k;
    Floats sum[4][count] = {};
    for (int64_t p = 0; p < whole; p += kWidth)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Floats value = wide(line[i] + p);
#pragma GCC unroll 4
        for (int m = 0; m < count; ++m) sum[i][m] += value * load(x + m * k + p);
      }
    for (int64_t i = 0; i < lines; ++i)
      for (int m = 0; m < count; ++m) {
        float total = sum_of(sum[i][m]);
        for (int64_t p = whole; p < k; ++p) total += wide_one(line[i][p]) * x[m * k + p];
        r.y[(row + m) * r.n + n + i] = total;
      }
  }
}

// Columns [first, last) of `count` rows, w as [k, n]: four of w's rows are added to the results at a time.
template <typename T, int count>
void by_inputs(const Rows& r, const T* w, int64_t row, int64_t first, int64_t last) {
  const int64_t k = r.k, n = r.n, whole = first + (last - first) / kWidth * kWidth;
  for (int m = 0; m < count; ++m) memset(r.y + (row + m) * n + first, 0, sizeof(float) * (last - first));
  for (int64_t p = 0; p < k; p += 4) {
    const int64_t lines = least(4, k - p);
    const T* line[4];
    float x[4][count];
    for (int64_t i = 0; i < 4; ++i) {
      line[i] = w + (p + least(i, lines - 1)) * n;
      for (int m = 0; m < count; ++m) x[i][m] = i < lines ? r.x[(row + m) * k + p + i] : 0.0f;
    }
    const int64_t ahead = (p + 8 < k ? 8 : 0) * n;
    for (int64_t j = first; j < whole; j += kWidth) {
      Floats value[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(line[i] + ahead + j);
        value[i] = wide(line[i] + j);
      }
#pragma GCC unroll 4
      for (int m = 0; m < count; ++m) {
        float* y = r.y + (row + m) * n + j;
        store(y, load(y) + ((value[0] * x[0][m] + value[1] * x[1][m]) + (value[2] * x[2][m] + value[3] * x[3][m])));
      }
    }
    for (int64_t j = whole; j < last; ++j)
      for (int m = 0; m < count; ++m)
        for (int64_t i = 0; i < lines; ++i) r.y[(row + m) * n + j] += wide_one(line[i][j]) * x[i][m];
  }
}

template <typename T>
void rows_of(Pool& pool, const Rows& r, const T* w) {
  // As wide as a page, and a piece for each thread where there is so much; a few pieces more where outputs are many.
  const int64_t most = r.turned ? 256 : 4096 / int64_t(sizeof(T));
  const int64_t width = least(most, up((r.n + pool.threads() - 1) / pool.threads(), kColumns));
  auto piece = [&](int64_t i) {
    const int64_t first = i * width, last = least(first + width, r.n);
    for (int64_t row = 0; row < r.m;) {
      const int64_t left = r.m - row;
      const auto run = [&]<int count>() {
        (r.turned ? by_outputs<T, count> : by_inputs<T, count>)(r, w, row, first, last);
        row += count;
      };
      if (left >= 4) run.template operator()<4>();
      else if (left >= 2) run.template operator()<2>();
      else run.template operator()<1>();
    }
  };
  in_parallel(pool, (r.n + width - 1) / width, piece);
}

void rows(Pool& pool, const Rows& r) {
  r.bfloat16 ? rows_of(pool, r, static_cast<const uint16_t*>(r.w)) : rows_of(pool, r, static_cast<const float*>(r.w));
}

}  // namespace
}  // namespace gemmary
