// A few new tokens against the keys and values before them: they are put into their slots, then every query runs over the
// slots that it sees. Slots are cut into chunks, each with its own softmax, which are joined at the end (Dao et al.,
// "Flash-Decoding", 2023). A cache is one piece for each row, or pages of a common pool that each row's table names (Kwon et al.,
// arXiv 2309.06180).
#pragma once

#include "rows.h"

namespace gemmary {
namespace {

inline void narrow(const float* from, int64_t count, float* to) { memcpy(to, from, sizeof(float) * count); }

// To bfloat16, to the nearest, ties to even; what is no number stays none.
inline void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    memcpy(&word, from + i, sizeof word);
    const bool number = (word & 0x7fffffff) <= 0x7f800000;
    to[i] = uint16_t(number ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : word >> 16 | 0x40);
  }
}

// Slots that lie together, of one row and head: their keys and values, and the position that each holds.
template <typename T>
struct Slots {
  const T *keys, *values;
  const int32_t* positions;
  int64_t count;
};

// The queries that read one key and value head: `group` heads of each of a row's tokens.
struct Reader {
  const Cached& c;
  int64_t row, kv, group, queries;

  Reader(const Cached& c, int64_t row, int64_t kv)
      : c(c), row(row), kv(kv), group(c.heads / c.kv_heads), queries(group * c.tokens) {}

  // Query i is head i % group of token i / group.
  int64_t place(int64_t i) const {
    return ((row * c.tokens + i / group) * c.heads + kv * group + i % group) * c.head_dim;
  }
  int32_t position(int64_t i) const { return c.positions[row * c.tokens + i / group]; }

  bool sees(int32_t query, int32_t key) const {
    return key >= 0 && key <= query && (c.window == 0 || key > query - c.window);
  }

  // Products of a query with some keys.
  template <int keys, typename T>
  void score(const float* q, const T* k, float* to) const {
    const int64_t H = c.head_dim;
    Floats sum[keys] = {};
    int64_t h = 0;
    for (; h + kWidth <= H; h += kWidth) {
      const Floats query = load(q + h);
#pragma GCC unroll 4
      for (int i = 0; i < keys; ++i) sum[i] += query * wide(k + i * H + h);
    }
    for (int i = 0; i < keys; ++i) {
      to[i] = sum_of(sum[i]);
      for (int64_t rest = h; rest < H; ++rest) to[i] += q[rest] * wide_one(k[i * H + rest]);
    }
  }

  // For each query over these slots its highest score, the sum of exponentials below it, and the values mixed.
  template <typename T>
  void chunk(Slots<T> slots, float* scores, float* found) const {
    const int64_t H = c.head_dim, size = slots.count;
    for (int64_t i = 0; i < queries; ++i, found += H + 2) {
      const int32_t query = position(i);
      float top = kNothing;
      const float* const q = c.q + place(i);
      for (int64_t s = 0; s < size; s += 4) {
        const int64_t some = least(4, size - s);
        if (some == 4) score<4>(q, slots.keys + s * H, scores + s);
        else
          for (int64_t j = s; j < size; ++j) score<1>(q, slots.keys + j * H, scores + j);
        for (int64_t j = s; j < s + some; ++j) {
          float value = sees(query, slots.positions[j]) ? scores[j] : kNothing;  // what is not seen may hold anything
          if (c.softcap > 0 && value != kNothing) value = c.softcap * hyperbolic_tangent(all(value / c.softcap))[0];
          scores[j] = value;
          top = value > top || value != value ? value : top;  // a NaN is kept
        }
      }
      found[0] = top;
      if (top == kNothing) continue;
      int64_t s = 0;
      for (; s + kWidth <= size; s += kWidth) store(scores + s, exponential(load(scores + s) - top));
      for (; s < size; ++s) scores[s] = exponential(all(scores[s] - top))[0];
      float sum = 0;
      for (s = 0; s < size; ++s) sum += scores[s];
      found[1] = sum;
      int64_t h = 0;
      for (; h + 8 * kWidth <= H; h += 8 * kWidth) mix<8>(slots, scores, h, found + 2);
      for (; h + kWidth <= H; h += kWidth) mix<1>(slots, scores, h, found + 2);
      for (; h < H; ++h) {
        float value = 0;
        for (s = 0; s < size; ++s)
          if (scores[s] != 0) value += scores[s] * wide_one(slots.values[s * H + h]);
        found[2 + h] = value;
      }
    }
  }

  // Some vectors of the values, weighed. A slot that weighs nothing may hold anything.
  template <int vectors, typename T>
  void mix(Slots<T> slots, const float* weights, int64_t h, float* to) const {
    Floats sum[vectors] = {};
    for (int64_t s = 0; s < slots.count; ++s) {
      if (weights[s] == 0) continue;
      const T* v = slots.values + s * c.head_dim + h;
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) sum[i] += weights[s] * wide(v + i * kWidth);
    }
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) store(to + h + i * kWidth, sum[i]);
  }

  // What the chunks found, `step` floats from one to the next, as one.
  void join(int64_t i, int64_t chunks, const float* found, int64_t step) const {
    const int64_t H = c.head_dim;
    float* const out = c.out + place(i);
    memset(out, 0, sizeof(float) * H);
    float top = kNothing, sum = 0;
    for (int64_t j = 0; j < chunks; ++j) {
      const float value = found[j * step];
      top = value > top || value != value ? value : top;
    }
    if (top == kNothing) return;  // padding, or nothing is seen
    for (int64_t j = 0; j < chunks; ++j) {
      const float* const part = found + j * step;
      if (part[0] == kNothing) continue;
      const float share = exponential(all(part[0] - top))[0];
      sum += share * part[1];
      for (int64_t h = 0; h < H; ++h) out[h] += share * part[2 + h];
    }
    for (int64_t h = 0; h < H; ++h) out[h] /= sum;
  }

  static constexpr float kNothing = -3e38f;
};

// Where a position's keys and values are, in floats or halves from the start; -1: its page is not there.
inline int64_t slot_of(const Cached& c, int64_t row, int64_t kv, int64_t position) {
  if (c.table == nullptr) return ((row * c.kv_heads + kv) * c.slots + position % c.slots) * c.head_dim;
  const int64_t index = position / c.slots, page = index < c.pages ? c.table[row * c.pages + index] : -1;
  return page < 0 || page >= c.pool ? -1 : ((page * c.kv_heads + kv) * c.slots + position % c.slots) * c.head_dim;
}

template <typename T>
void put(const Cached& c) {
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int32_t position = c.positions[b * c.tokens + t];
      if (position < 0) continue;
      if (c.slot_positions != nullptr) c.slot_positions[b * c.slots + position % c.slots] = position;
      for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
        const int64_t from = ((b * c.tokens + t) * c.kv_heads + kv) * c.head_dim, to = slot_of(c, b, kv, position);
        if (to < 0) continue;
        narrow(c.new_k + from, c.head_dim, static_cast<T*>(c.k) + to);
        narrow(c.new_v + from, c.head_dim, static_cast<T*>(c.v) + to);
      }
    }
}

// The slots that a row's queries may see lie in chunks: some of a piece's, or pages. Which of them, and where each row's begin.
struct Chunks {
  int64_t size, total = 0;
  int32_t *row, *first;  // of each chunk: its row, and its first slot or position
  int64_t* begin;        // [batch + 1]

  // Chunks follow the slots alone: what a row comes to does not depend on the rows beside it, nor on the number of threads.
  Chunks(const Cached& c, Scratch& scratch) {
    size = c.table != nullptr ? c.slots : up(c.slots / 16 > 64 ? c.slots / 16 : 64, kWidth);
    const int64_t most = c.batch * (c.table != nullptr ? c.pages : (c.slots + size - 1) / size);
    begin = reinterpret_cast<int64_t*>(scratch.floats(2 * (c.batch + 1) + 2 * most));
    row = reinterpret_cast<int32_t*>(begin + c.batch + 1), first = row + most;
    for (int64_t b = 0; b < c.batch; ++b) {
      begin[b] = total;
      int64_t low = 0, high = c.slots;
      if (c.table != nullptr) seen(c, b, low, high);
      for (int64_t at = low / size * size; at < high; at += size) row[total] = int32_t(b), first[total++] = int32_t(at);
    }
    begin[c.batch] = total;
  }

  // The positions that some query of a row may see: [low, high).
  static void seen(const Cached& c, int64_t b, int64_t& low, int64_t& high) {
    int32_t last = -1, earliest = 0x7fffffff;
    for (int64_t t = 0; t < c.tokens; ++t) {
      const int32_t position = c.positions[b * c.tokens + t];
      if (position < 0) continue;
      last = position > last ? position : last;
      earliest = position < earliest ? position : earliest;
    }
    low = c.window > 0 && earliest >= c.window ? earliest - c.window + 1 : 0;
    high = least(int64_t(last) + 1, c.pages * c.slots);
  }
};

template <typename T>
void attend_cached_in(Pool& pool, const Cached& c) {
  put<T>(c);
  if (c.out == nullptr) return;
  static thread_local Scratch all_chunks, all_found;
  const Chunks chunks(c, all_chunks);
  const int64_t queries = c.heads / c.kv_heads * c.tokens, step = queries * (c.head_dim + 2);
  float* const found = all_found.floats(c.kv_heads * chunks.total * step);
  auto piece = [&](int64_t i) {
    static thread_local Scratch scratch, numbers;
    const int64_t kv = i / chunks.total, j = i % chunks.total, row = chunks.row[j], first = chunks.first[j];
    const Reader reader(c, row, kv);
    const bool paged = c.table != nullptr;
    const int64_t count = paged ? chunks.size : least(chunks.size, c.slots - first);
    const int64_t at = slot_of(c, row, kv, first);
    float* const mine = found + i * step;
    if (at < 0) {
      for (int64_t query = 0; query < queries; ++query) mine[query * (c.head_dim + 2)] = Reader::kNothing;
      return;
    }
    int32_t* const made = reinterpret_cast<int32_t*>(numbers.floats(count));
    for (int64_t s = 0; s < count; ++s)
      made[s] = paged ? int32_t(first + s) : c.slot_positions[row * c.slots + first + s];
    reader.chunk<T>({static_cast<const T*>(c.k) + at, static_cast<const T*>(c.v) + at, made, count},
                    scratch.floats(count), mine);
  };
  in_parallel(pool, c.kv_heads * chunks.total, piece);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t kv = 0; kv < c.kv_heads; ++kv) {
      const Reader reader(c, b, kv);
      const float* const mine = found + (kv * chunks.total + chunks.begin[b]) * step;
      for (int64_t query = 0; query < queries; ++query)
        reader.join(query, chunks.begin[b + 1] - chunks.begin[b], mine + query * (c.head_dim + 2), step);
    }
}

void attend_cached(Pool& pool, const Cached& c) {
  c.bfloat16 ? attend_cached_in<uint16_t>(pool, c) : attend_cached_in<float>(pool, c);
}

}  // namespace
}  // namespace gemmary
