// Of each row of logits the highest few, in order, and the logarithm of the sum of all exponentials: one pass, in chunks.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace gemmary {
namespace {

constexpr int64_t kChunk = 8192;

// The highest `count` so far, from the highest down; of equal ones the earlier place comes first.
struct Highest {
  float* values;
  int32_t* places;
  int64_t count, held = 0;

  void offer(float value, int64_t place) {
    if (held == count && !(value > values[count - 1])) return;
    int64_t at = held < count ? held++ : count - 1;
    for (; at > 0 && value > values[at - 1]; --at) values[at] = values[at - 1], places[at] = places[at - 1];
    values[at] = value, places[at] = int32_t(place);
  }
};

inline bool any_above(Floats v, float bound) {
  const Ints above = v > bound;
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= above[i];
  return any != 0;
}

void choose(Pool& pool, const Choice& c) {
  static thread_local Scratch numbers;
  const int64_t chunks = (c.size + kChunk - 1) / kChunk, step = 2 + 2 * c.count;
  float* const found = numbers.floats(c.rows * chunks * step);
  auto piece = [&](int64_t i) {
    const int64_t row = i / chunks, first = i % chunks * kChunk, last = least(first + kChunk, c.size);
    const float* const x = c.logits + row * c.size;
    float* const mine = found + i * step;
    Highest highest{mine + 2, reinterpret_cast<int32_t*>(mine + 2 + c.count), c.count};
    const int64_t known = least(last, c.known), whole = first + (last - first) / kWidth * kWidth;
    Floats peak = all(x[first]);
    for (int64_t j = first; j < whole; j += kWidth) peak = larger(load(x + j), peak);
    float top = x[first];
    for (int lane = 0; lane < kWidth; ++lane) top = peak[lane] > top ? peak[lane] : top;
    for (int64_t j = whole; j < last; ++j) top = x[j] > top ? x[j] : top;
    Floats sums = {};
    for (int64_t j = first; j < whole; j += kWidth) {
      const Floats v = load(x + j);
      sums += exponential(v - top);
      if (j < known && (highest.held < c.count || any_above(v, highest.values[c.count - 1])))
        for (int64_t lane = j; lane < least(j + kWidth, known); ++lane) highest.offer(x[lane], lane);
    }
    float sum = sum_of(sums);
    for (int64_t j = whole; j < last; ++j) {
      sum += exponential(all(x[j] - top))[0];
      if (j < known) highest.offer(x[j], j);
    }
    mine[0] = top, mine[1] = sum;
    for (int64_t j = highest.held; j < c.count; ++j) highest.values[j] = -3e38f, highest.places[j] = int32_t(c.size);
  };
  in_parallel(pool, c.rows * chunks, piece);
  for (int64_t row = 0; row < c.rows; ++row) {
    const float* const parts = found + row * chunks * step;
    Highest highest{c.values + row * c.count, c.places + row * c.count, c.count};
    float top = parts[0], sum = 0;
    for (int64_t j = 1; j < chunks; ++j) top = parts[j * step] > top ? parts[j * step] : top;
    for (int64_t j = 0; j < chunks; ++j) {
      const float* const part = parts + j * step;
      sum += exponential(all(part[0] - top))[0] * part[1];
      for (int64_t k = 0; k < c.count; ++k) highest.offer(part[2 + k], reinterpret_cast<const int32_t*>(part + 2 + c.count)[k]);
    }
    c.top[row] = top, c.sum[row] = sum;
  }
}

}  // namespace
}  // namespace gemmary
