// Every half as a float. A look-up costs one load, and the port that loads is free where the others are not.
#include <cmath>

#include "kernels.h"

namespace gemmary {
namespace {

struct Table {
  float values[1 << 16];

  Table() {
    for (int32_t h = 0; h < 1 << 16; ++h) {
      const int32_t exponent = h >> 10 & 31, fraction = h & 1023;
      float v = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(1024 + fraction), exponent - 25);
      if (exponent == 31) v = fraction ? NAN : INFINITY;
      values[h] = h >> 15 ? -v : v;
    }
  }
};

const Table table;

}  // namespace

const float* const half_floats = table.values;

}  // namespace gemmary
