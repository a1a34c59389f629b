// Compiled once for each instruction set, with GEMMARY_NAME and GEMMARY_KERNELS as its names.
#include "attention.h"
#include "cached.h"
#include "choice.h"
#include "products.h"

namespace gemmary {

const Kernels* GEMMARY_KERNELS() {
  static const Kernels all_kernels = {GEMMARY_NAME, products, lookup, attend_cached, choose, attend, attend_gradient};
  return &all_kernels;
}

}  // namespace gemmary
