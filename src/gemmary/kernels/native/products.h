// Products of the same rows with one or more matrices: of few rows as in rows.h; of many, a panel of the matrix is made wide
// once and multiplied in tiles.
#pragma once

#include "rows.h"
#include "tile.h"

namespace gemmary {
namespace {

// Of many rows: how many, and how many values of each, a tile's panels hold. They fit the second cache.
constexpr int64_t kTall = 512, kDeep = 512;

// The vectors of a square, turned: each round puts the lanes of rows that stand half a square apart side by side.
inline void turn_square(Floats* rows) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#endif
  for (int round = 1; round < kWidth; round *= 2) {
    Floats next[kWidth] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i) {
      const Floats a = rows[i], b = rows[i + kWidth / 2];
#if defined(__AVX512F__)
      next[2 * i] = Floats(_mm512_permutex2var_ps(__m512(a), low, __m512(b)));
      next[2 * i + 1] = Floats(_mm512_permutex2var_ps(__m512(a), high, __m512(b)));
#else
      for (int lane = 0; lane < kWidth / 2; ++lane) {
        next[2 * i][2 * lane] = a[lane], next[2 * i][2 * lane + 1] = b[lane];
        next[2 * i + 1][2 * lane] = a[kWidth / 2 + lane], next[2 * i + 1][2 * lane + 1] = b[kWidth / 2 + lane];
      }
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// Outputs [first, first + kColumns) of w, values [from, from + deep) of each, as [deep][kColumns]; past the last output zeros.
template <typename B>
void panel(const Factor& factor, int64_t k, int64_t first, int64_t from, int64_t deep, float* rows, float* to) {
  const uint8_t* w = static_cast<const uint8_t*>(factor.w);
  const int64_t bytes = k / B::values * B::bytes, some = least(kColumns, factor.n - first);
  for (int64_t i = 0; i < kColumns; ++i) {
    if (i < some) decode<B>(w + (first + i) * bytes + from / B::values * B::bytes, deep, rows + i * deep);
    else memset(rows + i * deep, 0, sizeof(float) * deep);
  }
  for (int64_t p = 0; p < deep; p += kWidth)
    for (int64_t half = 0; half < kColumns; half += kWidth) {
      Floats square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = load(rows + (half + i) * deep + p);
      turn_square(square);
      for (int i = 0; i < kWidth; ++i) store(to + (p + i) * kColumns + half, square[i]);
    }
}

// kColumns outputs of one matrix for all rows; x is packed in strips of kRows, kDeep values at a time.
template <typename B>
void many_rows(const Products& p, const Factor& factor, const float* packed, int64_t first, float* y) {
  static thread_local Scratch scratch;
  const int64_t padded = up(p.m, kRows), deepest = least(kDeep, p.k);
  float* const rows = scratch.floats(2 * kColumns * deepest + kColumns * least(padded, kTall));
  float* const wide = rows + kColumns * deepest;
  float* const sums = wide + kColumns * deepest;
  for (int64_t top = 0; top < p.m; top += kTall) {
    const int64_t tall = least(kTall, padded - top);
    for (int64_t from = 0; from < p.k; from += kDeep) {
      const int64_t deep = least(kDeep, p.k - from);
      panel<B>(factor, p.k, first, from, deep, rows, wide);
      for (int64_t m = 0; m < tall; m += kRows)
        tile<kRows>(deep, packed + from * padded + (top + m) * deep, wide, sums + m * kColumns, from > 0);
    }
    const int64_t some = least(kColumns, factor.n - first);
    for (int64_t m = 0; m < least(tall, p.m - top); ++m)
      memcpy(y + (top + m) * factor.n + first, sums + m * kColumns, sizeof(float) * some);
  }
}

// y = gelu(y) * other, vectors then the rest.
inline void gate(float* y, const float* other, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(y + i, gelu(load(y + i)) * load(other + i));
  if (i == count) return;
  float last[2 * kWidth] = {};
  memcpy(last, y + i, sizeof(float) * (count - i));
  store(last, gelu(load(last)));
  for (int64_t j = i; j < count; ++j) y[j] = last[j - i] * other[j];
}

// Pieces of all the matrices, one after the other. `work(matrix, piece)`; of gated ones both are in one piece.
template <typename F>
void in_pieces(Pool& pool, const Products& p, int64_t (*pieces)(const Pool&, const Products&, const Factor&), F work) {
  int64_t total = 0;
  const int64_t matrices = p.gated ? 1 : p.count;
  for (int64_t i = 0; i < matrices; ++i) total += pieces(pool, p, p.factors[i]);
  auto piece = [&](int64_t at) {
    int64_t i = 0;
    for (int64_t some; at >= (some = pieces(pool, p, p.factors[i])); ++i) at -= some;
    work(i, at);
  };
  in_parallel(pool, total, piece);
}

// Columns of a piece: pages of a matrix of rows of n, some hundred rows of a turned one; fewer where all threads want some.
inline int64_t piece_width(const Pool& pool, const Factor& factor) {
  const int64_t size = factor.kind == Kind::f32 ? 4 : factor.kind == Kind::bf16 ? 2 : 1;
  const int64_t most = factor.turned ? 256 : 4096 / size;
  return least(most, up((factor.n + 2 * pool.threads() - 1) / (2 * pool.threads()), kColumns));
}

void few_rows(Pool& pool, const Products& p) {
  const auto pieces = [](const Pool& pool, const Products&, const Factor& factor) {
    const int64_t width = piece_width(pool, factor);
    return (factor.n + width - 1) / width;
  };
  static thread_local Scratch narrow;
  bool blocks = false;
  for (int64_t i = 0; i < p.count; ++i) blocks |= p.factors[i].kind > Kind::i8;
  const Numbers numbers = blocks ? numbers_of(p.x, p.m, p.k, narrow) : Numbers{};
  in_pieces(pool, p, pieces, [&](int64_t i, int64_t piece) {
    const Factor& factor = p.factors[i];
    const int64_t width = piece_width(pool, factor), n = factor.n;
    const int64_t first = piece * width, last = least(first + width, n), size = last - first;
    float* const y = p.y[i] + first;
    some_rows({p.x, p.k, n, first, last, y, n, &numbers}, p.m, factor);
    if (!p.gated) return;
    static thread_local Scratch scratch;
    float* const other = scratch.floats(p.m * size);
    some_rows({p.x, p.k, n, first, last, other, size, &numbers}, p.m, p.factors[1]);
    for (int64_t m = 0; m < p.m; ++m) gate(y + m * n, other + m * size, size);
  });
}

void many(Pool& pool, const Products& p) {
  static thread_local Scratch packed, up_branch;
  const int64_t padded = up(p.m, kRows), strips = padded / kRows;
  float* const strip = packed.floats(padded * p.k);
  auto pack_strip = [&](int64_t i) {
    for (int64_t from = 0; from < p.k; from += kDeep) {
      const int64_t deep = least(kDeep, p.k - from);
      const Matrix x = {p.x + i * kRows * p.k + from, p.k, 1};
      pack<kRows>(strip + from * padded + i * kRows * deep, x, least(kRows, p.m - i * kRows), deep);
    }
  };
  in_parallel(pool, strips, pack_strip);
  float* const other = p.gated ? up_branch.floats(p.m * p.factors[0].n) : nullptr;
  const auto pieces = [](const Pool&, const Products&, const Factor& factor) {
    return (factor.n + kColumns - 1) / kColumns;
  };
  in_pieces(pool, p, pieces, [&](int64_t i, int64_t piece) {
    const int64_t first = piece * kColumns;
    const auto one = [&](const Factor& factor, float* y) {
      with_blocks(factor.kind, [&]<typename B>(B) { many_rows<B>(p, factor, strip, first, y); });
    };
    one(p.factors[i], p.y[i]);
    if (!p.gated) return;
    one(p.factors[1], other);
    const int64_t n = p.factors[0].n, size = least(kColumns, n - first);
    for (int64_t m = 0; m < p.m; ++m) gate(p.y[0] + m * n + first, other + m * n + first, size);
  });
}

// Many rows are taken by blocks alone; XLA multiplies plain matrices well.
void products(Pool& pool, const Products& p) { p.m <= kFewRows ? few_rows(pool, p) : many(pool, p); }

void lookup(Pool& pool, const Lookup& p) {
  auto row = [&](int64_t i) {
    with_blocks(p.kind, [&]<typename B>(B) {
      const int64_t bytes = p.k / B::values * B::bytes;
      if (p.rows[i] >= 0 && p.rows[i] < p.n) decode<B>(p.w + p.rows[i] * bytes, p.k, p.y + i * p.k);
      else memset(p.y + i * p.k, 0xff, sizeof(float) * p.k);  // no such row: not a number, as JAX fills
    });
  };
  in_parallel(pool, p.count, row);
}

}  // namespace
}  // namespace gemmary
