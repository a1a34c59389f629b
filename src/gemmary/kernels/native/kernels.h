// What the kernels are, whichever instruction set they were compiled for.
#pragma once

#include <cstdint>

namespace gemmary {

// Work cut into pieces that any thread may take. `run(context, i)` is called once for each i below `count`, on several
// threads at once; the call returns when all are done.
class Pool {
 public:
  virtual int threads() const = 0;
  virtual void run(int64_t count, void (*run)(void* context, int64_t i), void* context) = 0;

 protected:
  ~Pool() = default;
};

// Tokens among themselves, in the order of their documents; see attention.h.
struct Attention {
  int64_t batch, tokens, heads, kv_heads, head_dim;
  int64_t window;  // keys back that a query sees, itself included; 0: all
  float softcap;   // 0: none
  // [batch, tokens]; position -1: padding. A key of segment s and end e is seen by queries of segments s to e - 1.
  const int32_t *positions, *segments, *ends;
  const float *q, *k, *v;               // [batch, tokens, heads or kv_heads, head_dim]
  const int32_t* query_positions = nullptr;  // where only some ask: -1 in the others' places
};

// A few new tokens of each row and what stands before them in a cache, which they are put into; see cached.h.
struct Cached {
  int64_t batch, tokens, heads, kv_heads, head_dim, slots;
  int64_t window;
  float softcap;
  bool bfloat16;                          // what the cache is made of
  const int32_t* positions;               // [batch, tokens]; -1: padding
  const float *q, *new_k, *new_v;         // [batch, tokens, heads or kv_heads, head_dim]
  void *k, *v;                            // [batch, kv_heads, slots, head_dim]
  int32_t* slot_positions;                // [batch, slots]; -1: empty
  float* out;                             // as q; null: tokens are only put into the cache
  // In pages, k and v are [pool, kv_heads, slots, head_dim], and a row's position p is in page table[row, p / slots].
  const int32_t* table = nullptr;         // [batch, pages]; -1: none
  int64_t pages = 0, pool = 0;
};

// Of rows of logits [rows, size]: the `count` highest of the first `known`, and sum_j e^(x_j - top) with the highest of all as top.
struct Choice {
  int64_t rows, size, known, count;
  const float* logits;
  int32_t* places;
  float *values, *top, *sum;
};

// What each half (IEEE's 16 bits) stands for.
extern const float* const half_floats;

// How a matrix w [k, n] is kept: rows of k, of float, bfloat16 or int8; rows of n turned; or turned rows of blocks (blocks.h).
enum class Kind : int32_t { f32, bf16, i8, q8_0, q4_0, q5_0, q4_k, q5_k, q6_k };

struct Factor {
  Kind kind;
  bool turned;
  int64_t n;
  const void* w;
};

// Up to so many rows reading the matrix takes the time; more are taken of blocks alone.
constexpr int64_t kFewRows = 16;

// y_i [m, n_i] = x [m, k] w_i, for several matrices at once; or, `gated`, the one y = gelu(x w_0) * (x w_1).
struct Products {
  int64_t m, k;
  const float* x;
  int64_t count;
  const Factor* factors;
  float* const* y;
  bool gated;
};

// Rows of w [n, k] in blocks, as floats: y [count, k].
struct Lookup {
  int64_t n, k, count;
  Kind kind;
  const uint8_t* w;
  const int32_t* rows;
  float* y;
};

// Bytes of a row of `k` values in blocks; 0 where they are not whole blocks, or the kind has none.
static inline int64_t row_bytes(Kind kind, int64_t k) {
  const auto of = [k](int64_t values, int64_t bytes) { return k % values == 0 ? k / values * bytes : 0; };
  switch (kind) {
    case Kind::q8_0: return of(32, 34);
    case Kind::q4_0: return of(32, 18);
    case Kind::q5_0: return of(32, 22);
    case Kind::q4_k: return of(256, 144);
    case Kind::q5_k: return of(256, 176);
    case Kind::q6_k: return of(256, 210);
    default: return 0;
  }
}

struct Kernels {
  const char* name;
  void (*products)(Pool&, const Products&);
  void (*lookup)(Pool&, const Lookup&);
  void (*attend_cached)(Pool&, const Cached&);
  void (*choose)(Pool&, const Choice&);
  // Fills out like q, and for each query the logarithm of its softmax's sum, [batch, heads, tokens].
  void (*attend)(Pool&, const Attention&, float* out, float* log_sum);
  // Fills dq, dk and dv from the gradient of out.
  void (*attend_gradient)(Pool&, const Attention&, const float* out, const float* log_sum, const float* d_out,
                          float* dq, float* dk, float* dv);
};

// One for each instruction set that was compiled: on x86 these two, elsewhere what the compiler takes by default.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* native_kernels();

// The best that this processor has, or the one of that name; null where it has none.
const Kernels* kernels(const char* name = nullptr);

}  // namespace gemmary
