// What the checks share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

struct TwoThreads final : gemmary::Pool {
  int threads() const override { return 2; }
  void run(int64_t count, void (*run)(void*, int64_t), void* context) override {
    auto half = [&](int64_t first) {
      for (int64_t i = first; i < count; i += 2) run(context, i);
    };
    std::thread other(half, 1);
    half(0);
    other.join();
  }
};

inline bool near(const std::vector<float>& got, const std::vector<double>& wanted) {
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::fabs(got[i] - wanted[i]) < 1e-4 * (1 + std::fabs(wanted[i])))) return false;
  return true;
}
