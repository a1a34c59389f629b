// Vectors as wide as the instruction set that this is compiled for, written once for all of them.
//
// Nothing here or in what includes it may instantiate a template of the standard library, or name one outside this
// anonymous namespace: a linker keeps one copy of each, and it might keep the one compiled for the wider instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemmary {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRows = 4;
#else
constexpr int kWidth = 4;
constexpr int kRows = 8;
#endif

// A tile of a product has kRows x 2 vectors of sums: enough to keep the multipliers busy, and they fit the registers. Every head
// size that is taken divides by kRows.
constexpr int kColumns = 2 * kWidth;

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

inline Floats load(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

inline Ints load(const int32_t* from) {
  Ints v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline Floats all(float x) { return x - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float sum_of(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#endif
  float total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += v[lane];
  return total;
}

// e to the x, for x up to 88; 0 from -87 on down. The argument is cut to r = x - n ln 2, |r| <= ln 2 / 2, whose series to
// the seventh power is within two units in the last place; n goes into the exponent's bits.
inline Floats exponential(Floats x) {
  const Floats lowest = all(-87.0f);
  const Ints low = x < lowest;  // a NaN is not, and stays one
  x = low ? lowest : x;
  const Floats shifter = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats shifted = x * 1.44269504f + shifter;
  const Floats n = shifted - shifter;
  Floats r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  Floats y = all(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  Ints bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  Floats power;
  memcpy(&power, &bits, sizeof power);
  return low ? Floats{} : y * power;
}

// tanh from e^-2|x|; below 0.02 from its series, where the other would lose digits.
inline Floats hyperbolic_tangent(Floats x) {
  const Ints negative = x < 0.0f;
  const Floats size = negative ? -x : x;
  const Floats e = exponential(-2.0f * size);
  Floats y = (1.0f - e) / (1.0f + e);
  const Floats square = x * x;
  y = size < 0.02f ? size * (1.0f - square * (1.0f / 3)) : y;
  return negative ? -y : y;
}

// x Φ(x) by its approximation with tanh (Hendrycks and Gimpel, arXiv 1606.08415), as the model has it.
inline Floats gelu(Floats x) {
  const Floats inner = 0.797884561f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

// Memory of one thread, kept from one call to the next.
class Scratch {
 public:
  ~Scratch() { free(data_); }

  float* floats(int64_t count) {
    if (count > size_) {
      free(data_);
      size_ = (count + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(aligned_alloc(64, size_ * sizeof(float)));
      if (data_ == nullptr) abort();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A lambda as the function and context that a Pool takes.
template <typename F>
void in_parallel(Pool& pool, int64_t count, F& f) {
  pool.run(count, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
}

}  // namespace
}  // namespace gemmary
