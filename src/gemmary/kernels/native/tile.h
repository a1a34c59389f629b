// The product of two packed fp32 matrices, its sums kept in registers, and the packing, after Goto and van de Geijn
// ("Anatomy of high-performance matrix multiplication", 2008).
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gemmary {
namespace {

// A matrix wherever it lies; strides in values.
struct Matrix {
  const float* data;
  int64_t row_stride, column_stride;
};

// c [rows, kColumns] (+)= a b: a as [k][rows], b as [k][kColumns], the rows of c one after the other.
template <int rows>
inline void tile(int64_t k, const float* a, const float* b, float* c, bool add) {
  Floats sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) sum[i][0] = sum[i][1] = Floats{};
  for (int64_t p = 0; p < k; ++p) {
    const Floats left = load(b), right = load(b + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      sum[i][0] += left * a[i];
      sum[i][1] += right * a[i];
    }
    a += rows;
    b += kColumns;
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, c += kColumns) {
    store(c, add ? load(c) + sum[i][0] : sum[i][0]);
    store(c + kWidth, add ? load(c + kWidth) + sum[i][1] : sum[i][1]);
  }
}

// `size` rows of x, of `k` values each, as [k][size] in strips of `strip` rows; the last is filled up with zeros.
// With row and column strides exchanged it packs columns.
template <int strip>
inline void pack(float* to, Matrix x, int64_t size, int64_t k) {
  for (int64_t first = 0; first < size; first += strip) {
    const float* from = x.data + first * x.row_stride;
    const int64_t rows = least(strip, size - first);
    if (rows < strip) memset(to, 0, sizeof(float) * strip * k);
    if (x.row_stride == 1) {
      for (int64_t p = 0; p < k; ++p) memcpy(to + p * strip, from + p * x.column_stride, sizeof(float) * rows);
    } else if (rows == strip) {
      for (int64_t p = 0; p < k; ++p)
        for (int i = 0; i < strip; ++i) to[p * strip + i] = from[i * x.row_stride + p * x.column_stride];
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t p = 0; p < k; ++p) to[p * strip + i] = from[i * x.row_stride + p * x.column_stride];
    }
    to += strip * k;
  }
}

inline Matrix turned(Matrix x) { return {x.data, x.column_stride, x.row_stride}; }
inline Matrix at(Matrix x, int64_t row, int64_t column) {
  return {x.data + row * x.row_stride + column * x.column_stride, x.row_stride, x.column_stride};
}

}  // namespace
}  // namespace gemmary
