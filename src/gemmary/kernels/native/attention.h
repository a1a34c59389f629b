// Attention of tokens among themselves: causal, with windows, packed documents and trees, grouped heads and a soft-cap, in blocks
// of which no scores are kept (Dao, "FlashAttention-2", arXiv 2307.08691).
//
// A panel of queries, as wide as two vectors, lies across the lanes, with keys one below the other: so a softmax's
// maximum and sum are those of lanes, and the probabilities are, as they stand, the packed right side of the product with
// the values. For the gradients of keys and values a panel of keys lies across the lanes instead; scores are made once
// more for that, which costs less than turning them round.
#pragma once

#include <cmath>

#include "tile.h"

namespace gemmary {
namespace {

constexpr float kMasked = -1e30f;
constexpr float kLeast = -1e29f;  // where a running maximum begins: what is masked stays far below it
constexpr int64_t kBlock = 128;   // keys, or queries, that a panel meets at once

// Where tokens stand, of one row of the batch.
struct Marks {
  const int32_t *positions, *segments, *ends;
  int64_t tokens;
  int32_t window;

  // Positions, segments and ends of a stretch of tokens, from the least to the greatest.
  struct Range {
    int32_t first, last, least_position, position, least_segment, segment, least_end, end;
  };

  Range range(int64_t first, int64_t count) const {
    Range r{int32_t(first), int32_t(first + count - 1), positions[first], positions[first], segments[first],
            segments[first], ends[first], ends[first]};
    for (int64_t i = first + 1; i < first + count; ++i) {
      r.least_position = positions[i] < r.least_position ? positions[i] : r.least_position;
      r.position = positions[i] > r.position ? positions[i] : r.position;
      r.least_segment = segments[i] < r.least_segment ? segments[i] : r.least_segment;
      r.segment = segments[i] > r.segment ? segments[i] : r.segment;
      r.least_end = ends[i] < r.least_end ? ends[i] : r.least_end;
      r.end = ends[i] > r.end ? ends[i] : r.end;
    }
    return r;
  }

  // Whether some query may see some key, and whether each sees all.
  static bool none(Range q, Range k, int32_t window) {
    return k.first > q.last || k.position < 0 || q.position < 0 || k.least_position > q.position ||
           k.position <= q.least_position - window || k.least_segment > q.segment || k.end <= q.least_segment;
  }
  static bool all(Range q, Range k, int32_t window) {
    return k.last <= q.first && k.least_position >= 0 && k.position <= q.least_position &&
           k.least_position > q.position - window && k.segment <= q.least_segment && k.least_end > q.segment;
  }
};

// The marks of a panel's tokens, a lane each. Lanes past the last token see nothing and are seen by none.
struct Lanes {
  Ints place[2], position[2], segment[2], end[2];

  Lanes(const Marks& marks, int64_t first) {
    int32_t values[4][kColumns];
    for (int64_t i = 0; i < kColumns; ++i) {
      const bool there = first + i < marks.tokens;
      values[0][i] = int32_t(first + i);
      values[1][i] = there ? marks.positions[first + i] : -1;
      values[2][i] = there ? marks.segments[first + i] : -2;
      values[3][i] = there ? marks.ends[first + i] : -2;
    }
    for (int j = 0; j < 2; ++j) {
      place[j] = load(values[0] + j * kWidth);
      position[j] = load(values[1] + j * kWidth);
      segment[j] = load(values[2] + j * kWidth);
      end[j] = load(values[3] + j * kWidth);
    }
  }

  // Lanes are queries: which see the key.
  Ints see(int j, const Marks& marks, int64_t key) const {
    const int32_t k = marks.positions[key];
    if (k < 0) return Ints{};
    return (position[j] >= k) & (position[j] < k + marks.window) & (segment[j] >= marks.segments[key]) &
           (segment[j] < marks.ends[key]) & (place[j] >= int32_t(key));
  }

  // Lanes are keys: which the query sees.
  Ints seen(int j, const Marks& marks, int64_t query) const {
    const int32_t q = marks.positions[query];
    if (q < 0) return Ints{};
    return (position[j] <= q) & (position[j] >= 0) & (position[j] > q - marks.window) &
           (segment[j] <= marks.segments[query]) & (end[j] > marks.segments[query]) & (place[j] <= int32_t(query));
  }
};

// c [rows, kColumns] (+)= a b, with a in strips of kRows rows that lie `stride` apart.
inline void strips(int64_t rows, int64_t k, const float* a, int64_t stride, const float* b, float* c, bool add) {
  for (int64_t i = 0; i < rows; i += kRows, a += stride) tile<kRows>(k, a, b, c + i * kColumns, add);
}

// A panel [H][kColumns] as the rows of `to`, times a factor for each lane where one is given.
inline void put(const float* panel, int64_t head_dim, int64_t lanes, float* to, int64_t stride, const float* factor) {
  for (int64_t i = 0; i < lanes; ++i)
    for (int64_t h = 0; h < head_dim; ++h) to[i * stride + h] = panel[h * kColumns + i] * (factor ? factor[i] : 1.0f);
}

// One row of the batch and one head.
struct Head {
  const Attention& a;
  Marks marks, asking;  // of keys, and of queries
  int64_t T, H, rows;  // rows: tokens in whole strips
  Matrix q, k, v;
  int64_t q_at, k_at, line;  // where this head's values begin in q and k, and its logarithms

  Head(const Attention& a, int64_t b, int64_t n)
      : a(a), T(a.tokens), H(a.head_dim), rows(up(a.tokens, kRows)) {
    const int64_t kv = n / (a.heads / a.kv_heads);
    const int32_t window = a.window > 0 && a.window < (1 << 30) ? int32_t(a.window) : 1 << 30;
    marks = {a.positions + b * T, a.segments + b * T, a.ends + b * T, T, window};
    asking = {(a.query_positions != nullptr ? a.query_positions : a.positions) + b * T, marks.segments, marks.ends, T, window};
    q_at = (b * T * a.heads + n) * H;
    k_at = (b * T * a.kv_heads + kv) * H;
    line = (b * a.heads + n) * T;
    q = of_queries(a.q);
    k = of_keys(a.k);
    v = of_keys(a.v);
  }

  Matrix of_queries(const float* data) const { return {data + q_at, a.heads * H, 1}; }
  Matrix of_keys(const float* data) const { return {data + k_at, a.kv_heads * H, 1}; }
  int64_t q_stride() const { return a.heads * H; }

  Floats capped(Floats s) const { return a.softcap > 0 ? a.softcap * hyperbolic_tangent(s / a.softcap) : s; }
  // What the gradient of a score is multiplied by for the soft-cap, from the capped score; 0 where it is masked.
  Floats slope(Floats s) const {
    if (a.softcap <= 0) return all(1.0f);
    const Floats share = larger(s / a.softcap, all(-1.0f));
    return 1.0f - share * share;
  }
};

// Calls `each(b, n, first, last)` for the panels of every row's heads, in enough pieces for the threads.
template <typename F>
void for_panels(Pool& pool, const Attention& a, int64_t heads, F each) {
  const int64_t panels = (a.tokens + kColumns - 1) / kColumns, lines = a.batch * heads;
  const int64_t cuts = least(panels, (4 * pool.threads() + lines - 1) / lines);
  auto piece = [&](int64_t i) {
    const int64_t line = i / cuts, cut = i % cuts;
    each(line / heads, line % heads, panels * cut / cuts, panels * (cut + 1) / cuts);
  };
  in_parallel(pool, lines * cuts, piece);
}

// Scores of a block of keys and a panel of queries, capped, and kMasked where they are not seen.
inline void score(const Head& head, const Lanes& lanes, const float* k_rows, const float* q, int64_t first,
                  int64_t count, bool every, float* s) {
  strips(count, head.H, k_rows + first * head.H, head.H * kRows, q, s, false);
  if (every && head.a.softcap <= 0) return;
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < 2; ++j) {
      float* here = s + i * kColumns + j * kWidth;
      Floats value = head.capped(load(here));
      if (!every) value = lanes.see(j, head.marks, first + i) ? value : all(kMasked);
      store(here, value);
    }
}

void attend(Pool& pool, const Attention& a, float* out, float* log_sum) {
  for_panels(pool, a, a.heads, [&](int64_t b, int64_t n, int64_t from, int64_t to) {
    const Head head(a, b, n);
    const int64_t T = head.T, H = head.H, reach = least(T, to * kColumns);
    const int64_t start = from * kColumns;
    if (head.asking.range(start, reach - start).position < 0) {  // nobody asks
      for (int64_t i = start; i < reach; ++i) {
        memset(out + head.q_at + i * head.q_stride(), 0, sizeof(float) * H);
        log_sum[head.line + i] = 0;
      }
      return;
    }
    static thread_local Scratch scratch;
    float* k_rows = scratch.floats(2 * head.rows * H + (2 * H + kBlock) * kColumns);
    float* v_columns = k_rows + head.rows * H;
    float* q = v_columns + head.rows * H;
    float* mixed = q + H * kColumns;
    float* s = mixed + H * kColumns;
    pack<kRows>(k_rows, head.k, reach, H);
    pack<kRows>(v_columns, turned(head.v), H, reach);
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t first = panel * kColumns, width = least(kColumns, T - first), end = first + width;
      const Lanes lanes(head.asking, first);
      const Marks::Range queries = head.asking.range(first, width);
      pack<kColumns>(q, at(head.q, first, 0), width, H);
      memset(mixed, 0, sizeof(float) * H * kColumns);
      Floats peak[2] = {all(kLeast), all(kLeast)}, sum[2] = {};
      for (int64_t key = 0; key < end; key += kBlock) {
        const int64_t count = least(kBlock, end - key);
        const Marks::Range keys = head.marks.range(key, count);
        if (Marks::none(queries, keys, head.marks.window)) continue;
        const bool every = width == kColumns && Marks::all(queries, keys, head.marks.window);
        score(head, lanes, k_rows, q, key, count, every, s);
        for (int j = 0; j < 2; ++j) {
          float* lane = s + j * kWidth;
          Floats top = peak[j];
          for (int64_t i = 0; i < count; ++i) top = larger(load(lane + i * kColumns), top);
          const Floats shrink = exponential(peak[j] - top);
          sum[j] *= shrink;
          for (int64_t i = 0; i < count; ++i) {
            const Floats p = exponential(load(lane + i * kColumns) - top);
            store(lane + i * kColumns, p);
            sum[j] += p;
          }
          peak[j] = top;
          for (int64_t h = 0; h < H; ++h) {
            float* here = mixed + h * kColumns + j * kWidth;
            store(here, load(here) * shrink);
          }
        }
        strips(H, count, v_columns + key * kRows, reach * kRows, s, mixed, true);
      }
      float sums[kColumns], peaks[kColumns];
      for (int j = 0; j < 2; ++j) store(sums + j * kWidth, sum[j]), store(peaks + j * kWidth, peak[j]);
      for (int64_t i = 0; i < width; ++i) {
        log_sum[head.line + first + i] = sums[i] > 0 ? peaks[i] + logf(sums[i]) : sums[i];
        sums[i] = sums[i] == 0 ? 0.0f : 1.0f / sums[i];
      }
      put(mixed, H, width, out + head.q_at + first * head.q_stride(), head.q_stride(), sums);
    }
  });
}

// Of queries from `first` on, the sum over the head's values of out times its gradient.
inline void products_of_out(const Head& head, const float* out, const float* d_out, int64_t first, int64_t count,
                            float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = head.q_at + (first + i) * head.q_stride();
    Floats sum{};
    int64_t h = 0;
    for (; h + kWidth <= head.H; h += kWidth) sum += load(out + at + h) * load(d_out + at + h);
    float total = sum_of(sum);
    for (; h < head.H; ++h) total += out[at + h] * d_out[at + h];
    to[i] = total;
  }
}

void gradient_of_queries(Pool& pool, const Attention& a, const float* out, const float* log_sum, const float* d_out,
                         float* dq) {
  for_panels(pool, a, a.heads, [&](int64_t b, int64_t n, int64_t from, int64_t to) {
    const Head head(a, b, n);
    const int64_t T = head.T, H = head.H, reach = least(T, to * kColumns);
    static thread_local Scratch scratch;
    float* k_rows = scratch.floats(3 * head.rows * H + (3 * H + 2 * kBlock) * kColumns);
    float* v_rows = k_rows + head.rows * H;
    float* k_columns = v_rows + head.rows * H;
    float* q = k_columns + head.rows * H;
    float* d = q + H * kColumns;
    float* result = d + H * kColumns;
    float* s = result + H * kColumns;
    float* ds = s + kBlock * kColumns;
    pack<kRows>(k_rows, head.k, reach, H);
    pack<kRows>(v_rows, head.v, reach, H);
    pack<kRows>(k_columns, turned(head.k), H, reach);
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t first = panel * kColumns, width = least(kColumns, T - first), end = first + width;
      const Lanes lanes(head.marks, first);
      const Marks::Range queries = head.marks.range(first, width);
      pack<kColumns>(q, at(head.q, first, 0), width, H);
      pack<kColumns>(d, at(head.of_queries(d_out), first, 0), width, H);
      float sums[kColumns] = {}, inner[kColumns] = {};
      memcpy(sums, log_sum + head.line + first, sizeof(float) * width);
      products_of_out(head, out, d_out, first, width, inner);
      memset(result, 0, sizeof(float) * H * kColumns);
      for (int64_t key = 0; key < end; key += kBlock) {
        const int64_t count = least(kBlock, end - key);
        const Marks::Range keys = head.marks.range(key, count);
        if (Marks::none(queries, keys, head.marks.window)) continue;
        const bool every = width == kColumns && Marks::all(queries, keys, head.marks.window);
        score(head, lanes, k_rows, q, key, count, every, s);
        strips(count, H, v_rows + key * H, H * kRows, d, ds, false);
        for (int64_t i = 0; i < count; ++i)
          for (int j = 0; j < 2; ++j) {
            const int64_t here = i * kColumns + j * kWidth;
            const Floats value = load(s + here);
            const Floats p = exponential(value - load(sums + j * kWidth));
            store(ds + here, p * (load(ds + here) - load(inner + j * kWidth)) * head.slope(value));
          }
        strips(H, count, k_columns + key * kRows, reach * kRows, ds, result, true);
      }
      put(result, H, width, dq + head.q_at + first * head.q_stride(), head.q_stride(), nullptr);
    }
  });
}

void gradient_of_keys(Pool& pool, const Attention& a, const float* out, const float* log_sum, const float* d_out,
                      float* dk, float* dv) {
  const int64_t group = a.heads / a.kv_heads;
  for_panels(pool, a, a.kv_heads, [&](int64_t b, int64_t kv, int64_t from, int64_t to) {
    const int64_t T = a.tokens, H = a.head_dim, begin = from * kColumns, rest = up(T - begin, kRows);
    const int64_t panel_size = H * kColumns;
    static thread_local Scratch scratch;
    float* q_rows = scratch.floats(4 * rest * H + T + (2 * (to - from) + 2) * panel_size + 2 * kBlock * kColumns);
    float* d_rows = q_rows + rest * H;
    float* q_columns = d_rows + rest * H;
    float* d_columns = q_columns + rest * H;
    float* results = d_columns + rest * H;
    float* k = results + 2 * (to - from) * panel_size;
    float* v = k + panel_size;
    float* s = v + panel_size;
    float* ds = s + kBlock * kColumns;
    float* inner = ds + kBlock * kColumns;
    memset(results, 0, sizeof(float) * 2 * (to - from) * panel_size);
    for (int64_t n = kv * group; n < (kv + 1) * group; ++n) {
      const Head head(a, b, n);
      const Matrix q = at(head.q, begin, 0), d = at(head.of_queries(d_out), begin, 0);
      pack<kRows>(q_rows, q, T - begin, H);
      pack<kRows>(d_rows, d, T - begin, H);
      pack<kRows>(q_columns, turned(q), H, T - begin);
      pack<kRows>(d_columns, turned(d), H, T - begin);
      products_of_out(head, out, d_out, begin, T - begin, inner);
      for (int64_t panel = from; panel < to; ++panel) {
        const int64_t first = panel * kColumns, width = least(kColumns, T - first);
        const Lanes lanes(head.marks, first);
        const Marks::Range keys = head.marks.range(first, width);
        float* d_key = results + 2 * (panel - from) * panel_size;
        pack<kColumns>(k, at(head.k, first, 0), width, H);
        pack<kColumns>(v, at(head.v, first, 0), width, H);
        for (int64_t query = first; query < T; query += kBlock) {
          const int64_t count = least(kBlock, T - query), row = query - begin;
          const Marks::Range queries = head.marks.range(query, count);
          if (Marks::none(queries, keys, head.marks.window)) continue;
          const bool every = width == kColumns && Marks::all(queries, keys, head.marks.window);
          strips(count, H, q_rows + row * H, H * kRows, k, s, false);
          strips(count, H, d_rows + row * H, H * kRows, v, ds, false);
          for (int64_t i = 0; i < count; ++i) {
            const float logarithm = log_sum[head.line + query + i], product = inner[row + i];
            for (int j = 0; j < 2; ++j) {
              const int64_t here = i * kColumns + j * kWidth;
              const Floats value = head.capped(load(s + here));
              Floats p = exponential(value - logarithm);
              if (!every) p = lanes.seen(j, head.marks, query + i) ? p : Floats{};
              store(s + here, p);
              store(ds + here, p * (load(ds + here) - product) * head.slope(value));
            }
          }
          strips(H, count, d_columns + row * kRows, (T - begin) * kRows, s, d_key + panel_size, true);
          strips(H, count, q_columns + row * kRows, (T - begin) * kRows, ds, d_key, true);
        }
      }
    }
    const Head head(a, b, kv * group);
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t first = panel * kColumns, width = least(kColumns, T - first), stride = a.kv_heads * H;
      const float* d_key = results + 2 * (panel - from) * panel_size;
      put(d_key, H, width, dk + head.k_at + first * stride, stride, nullptr);
      put(d_key + panel_size, H, width, dv + head.k_at + first * stride, stride, nullptr);
    }
  });
}

void attend_gradient(Pool& pool, const Attention& a, const float* out, const float* log_sum, const float* d_out,
                     float* dq, float* dk, float* dv) {
  gradient_of_queries(pool, a, out, log_sum, d_out, dq);
  gradient_of_keys(pool, a, out, log_sum, d_out, dk, dv);
}

}  // namespace
}  // namespace gemmary
