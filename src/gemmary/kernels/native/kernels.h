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
  const int32_t *positions, *segments;  // [batch, tokens]; position -1: padding
  const float *q, *k, *v;               // [batch, tokens, heads or kv_heads, head_dim]
};

// y [m, n] = x [m, k] w, for few rows; w is [k, n], or turned [n, k], of float or bfloat16.
struct Rows {
  int64_t m, n, k;
  const float* x;
  const void* w;
  bool bfloat16, turned;
  float* y;
};

struct Kernels {
  const char* name;
  void (*rows)(Pool&, const Rows&);
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
