// Attention and its gradient on random shapes, in buffers of exactly their size, against doubles; for sanitizers.
#include "check.h"

namespace {

using gemmary::Attention;

// Out and the gradients of sum(out * d), one query at a time.
void reference(const Attention& a, const std::vector<float>& d, std::vector<double>& out, std::vector<double>& dq,
               std::vector<double>& dk, std::vector<double>& dv) {
  const int64_t T = a.tokens, H = a.head_dim, group = a.heads / a.kv_heads;
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t n = 0; n < a.heads; ++n)
      for (int64_t t = 0; t < T; ++t) {
        const int64_t row = b * T + t, at = (row * a.heads + n) * H;
        std::vector<double> p(T, 0.0), slope(T, 1.0);
        double sum = 0;
        for (int64_t s = 0; s <= t; ++s) {
          const int64_t key = b * T + s, from = (key * a.kv_heads + n / group) * H;
          const int32_t i = a.positions[row], j = a.positions[key];
          const bool grown = a.segments[row] >= a.segments[key] && a.segments[row] < a.ends[key];
          if (j < 0 || j > i || !grown || (a.window && j <= i - a.window)) continue;
          double score = 0;
          for (int64_t h = 0; h < H; ++h) score += double(a.q[at + h]) * a.k[from + h];
          if (a.softcap > 0) {
            score = std::tanh(score / a.softcap);
            slope[s] = 1 - score * score;
            score *= a.softcap;
          }
          sum += p[s] = std::exp(score);
        }
        double inner = 0;
        for (int64_t s = 0; s <= t && sum > 0; ++s)
          for (int64_t h = 0; h < H; ++h) {
            const double value = p[s] / sum * a.v[((b * T + s) * a.kv_heads + n / group) * H + h];
            out[at + h] += value;
            inner += value * d[at + h];
          }
        for (int64_t s = 0; s <= t && sum > 0; ++s) {
          const int64_t from = ((b * T + s) * a.kv_heads + n / group) * H;
          double dp = -inner;
          for (int64_t h = 0; h < H; ++h) dp += double(d[at + h]) * a.v[from + h];
          const double ds = p[s] / sum * dp * slope[s];
          for (int64_t h = 0; h < H; ++h) {
            dq[at + h] += ds * a.k[from + h];
            dk[from + h] += ds * a.q[at + h];
            dv[from + h] += p[s] / sum * d[at + h];
          }
        }
      }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  auto below = [&](int n) { return int64_t(rng() % n); };
  TwoThreads pool;
  for (int shape = 0; shape < 60; ++shape) {
    Attention a{};
    a.batch = 1 + below(2), a.tokens = 1 + below(shape % 3 ? 60 : 300), a.kv_heads = 1 + below(2);
    a.heads = a.kv_heads * (1 + below(3)), a.head_dim = 8 * (1 + below(5));
    a.window = below(2) ? 1 + below(50) : 0, a.softcap = below(2) ? 4.0f : 0.0f;
    const int64_t rows = a.batch * a.tokens, queries = rows * a.heads * a.head_dim, keys = rows * a.kv_heads * a.head_dim;
    std::normal_distribution<float> normal;
    auto draw = [&](int64_t n) {
      std::vector<float> x(n);
      for (float& one : x) one = 0.5f * normal(rng);
      return x;
    };
    const auto q = draw(queries), k = draw(keys), v = draw(keys), d = draw(queries);
    std::vector<int32_t> positions(rows), segments(rows), ends(rows);
    for (int64_t i = 0, position = 0, segment = 0; i < rows; ++i, ++position) {
      if (i % a.tokens == 0 || below(20) == 0) position = 0, ++segment;
      const bool padding = below(30) == 0;
      positions[i] = padding ? -1 : int32_t(position), segments[i] = padding ? -1 : int32_t(segment);
      ends[i] = segments[i] + 1 + int32_t(below(3) ? 0 : below(5));
    }
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.positions = positions.data(), a.segments = segments.data();
    a.ends = ends.data();
    std::vector<float> out(queries), log_sum(rows * a.heads), dq(queries), dk(keys), dv(keys);
    const gemmary::Kernels* const kernels = gemmary::GEMMARY_KERNELS();
    kernels->attend(pool, a, out.data(), log_sum.data());
    kernels->attend_gradient(pool, a, out.data(), log_sum.data(), d.data(), dq.data(), dk.data(), dv.data());
    std::vector<double> out_(queries), dq_(queries), dk_(keys), dv_(keys);
    reference(a, d, out_, dq_, dk_, dv_);
    if (!near(out, out_) || !near(dq, dq_) || !near(dk, dk_) || !near(dv, dv_)) {
      std::fprintf(stderr, "shape %d differs\n", shape);
      return 1;
    }
  }
  std::puts("60 shapes");
}
