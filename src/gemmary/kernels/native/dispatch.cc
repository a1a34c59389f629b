// The kernels for the processor that this runs on.
#include <cstring>

#include "kernels.h"

namespace gemmary {

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const Kernels* there[] = {avx512 ? avx512_kernels() : nullptr, avx2 ? avx2_kernels() : nullptr};
#else
  const Kernels* there[] = {native_kernels()};
#endif
  for (const Kernels* one : there)
    if (one != nullptr && (name == nullptr || strcmp(name, one->name) == 0)) return one;
  return nullptr;
}

}  // namespace gemmary
