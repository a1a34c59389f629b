// Products, look-ups, attention to a cache and the choice of tokens, on random shapes, in buffers of exactly their size, against
// doubles; for sanitizers.
#include <algorithm>
#include <limits>
#include <numeric>

#include "check.h"

namespace {

using gemmary::Kind;

const gemmary::Kernels& kernels() { return *gemmary::GEMMARY_KERNELS(); }

std::vector<float> normal(std::mt19937& rng, int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> one(0.0f, scale);
  std::vector<float> x(count);
  for (float& value : x) value = one(rng);
  return x;
}

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A matrix [n, k] of a kind, as it is kept, and what it stands for.
struct Given {
  Kind kind;
  bool turned;
  int64_t n;
  std::vector<uint8_t> stored;
  std::vector<float> values;  // [n, k]

  Given(gemmary::Pool& pool, std::mt19937& rng, Kind kind, bool turned, int64_t n, int64_t k)
      : kind(kind), turned(turned), n(n), values(n * k) {
    const int64_t row = gemmary::row_bytes(kind, k);
    if (row > 0) {
      stored.resize(n * row);
      for (uint8_t& byte : stored) byte = uint8_t(rng());
      // Scales of a moderate size: a half's exponent of 01110.
      const int64_t bytes = row / (k / (kind < Kind::q4_k ? 32 : 256));
      for (size_t at = 0; at < stored.size(); at += bytes) {
        if (kind == Kind::q6_k) stored[at + 209] = 0x18;
        else stored[at + 1] = 0x28;
        if (kind == Kind::q4_k || kind == Kind::q5_k) stored[at + 3] = 0x28;
      }
      std::vector<int32_t> rows(n);
      std::iota(rows.begin(), rows.end(), 0);
      kernels().lookup(pool, {n, k, n, kind, stored.data(), rows.data(), values.data()});
      return;
    }
    const int64_t size = kind == Kind::f32 ? 4 : kind == Kind::bf16 ? 2 : 1;
    stored.resize(n * k * size);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t p = 0; p < k; ++p) {
        const int64_t at = (turned ? i * k + p : p * n + i) * size;
        float x = normal(rng, 1)[0];
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (kind == Kind::bf16) bits &= 0xFFFF0000;
        const int8_t small = int8_t(int(rng() % 255) - 127);
        if (kind == Kind::f32) std::memcpy(&stored[at], &bits, 4);
        if (kind == Kind::bf16) std::memcpy(&stored[at], reinterpret_cast<uint8_t*>(&bits) + 2, 2);
        if (kind == Kind::i8) std::memcpy(&stored[at], &small, 1);
        values[i * k + p] = kind == Kind::i8 ? small : as_float(bits);
      }
  }
};

std::vector<double> product(const std::vector<float>& x, const Given& w, int64_t m, int64_t k) {
  std::vector<double> y(m * w.n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < w.n; ++j)
      for (int64_t p = 0; p < k; ++p) y[i * w.n + j] += double(x[i * k + p]) * w.values[j * k + p];
  return y;
}

bool products_are_right(gemmary::Pool& pool, std::mt19937& rng) {
  for (int shape = 0; shape < 120; ++shape) {
    const Kind kind = Kind(shape % 9);
    const bool blocks = kind > Kind::i8, gated = blocks && shape % 4 == 0;
    const int64_t unit = kind >= Kind::q4_k ? 256 : 32, k = blocks ? unit * (1 + rng() % 3) : 1 + rng() % 70;
    const int64_t m = shape % 5 == 0 && blocks ? 1 + rng() % 40 : 1 + rng() % 8;
    const int64_t n = 1 + rng() % (blocks ? 150 : 600), count = gated ? 2 : 1 + rng() % 3;
    const auto x = normal(rng, m * k, 0.3f);
    std::vector<Given> given;
    std::vector<std::vector<float>> y;
    for (int64_t i = 0; i < count; ++i) {
      given.emplace_back(pool, rng, kind, blocks || rng() % 2 == 0, gated ? n : 1 + (n + 37 * i) % 600, k);
      y.emplace_back(m * given.back().n);
    }
    gemmary::Factor factors[4];
    float* out[4];
    for (int64_t i = 0; i < count; ++i) {
      factors[i] = {kind, given[i].turned, given[i].n, given[i].stored.data()};
      out[i] = y[i].data();
    }
    kernels().products(pool, {m, k, x.data(), count, factors, out, gated});
    for (int64_t i = 0; i < (gated ? 1 : count); ++i) {
      auto wanted = product(x, given[i], m, k);
      if (gated) {
        const auto up = product(x, given[1], m, k);
        for (size_t j = 0; j < up.size(); ++j) {
          const double g = wanted[j], inner = 0.7978845608028654 * (g + 0.044715 * g * g * g);
          wanted[j] = 0.5 * g * (1 + std::tanh(inner)) * up[j];
        }
      }
      double scale = 1;
      for (double one : wanted) scale = std::max(scale, std::fabs(one));
      for (double& one : wanted) one /= scale;
      for (float& one : y[i]) one /= float(scale);
      if (!near(y[i], wanted)) return false;
    }
  }
  return true;
}

// The cache in one piece, or in pages that lie anywhere in a pool.
bool cached_attention_is_right(gemmary::Pool& pool, std::mt19937& rng) {
  const auto below = [&](int64_t n) { return int64_t(rng() % n); };
  for (int shape = 0; shape < 80; ++shape) {
    const bool paged = shape % 2, bfloat16 = shape % 4 >= 2;
    const int64_t B = 1 + below(3), T = 1 + below(4), K = 1 + below(2), N = K * (1 + below(3)), H = 8 * (1 + below(9));
    const int64_t slots = paged ? 16 : 30 + below(200), pages = 6, count = B * pages;
    const int64_t window = below(2) ? 1 + below(25) : 0, length = paged ? slots * pages : slots;
    const float softcap = below(2) ? 4.0f : 0.0f;
    const int64_t lines = (paged ? count : B) * K * slots;
    std::vector<float> k(lines * H), v(lines * H);
    std::vector<uint16_t> k_halves(lines * H), v_halves(lines * H);
    const auto q = normal(rng, B * T * N * H, 0.3f), new_k = normal(rng, B * T * K * H), new_v = normal(rng, B * T * K * H);
    std::vector<int32_t> positions(B * T), slot_positions(B * slots, -1), table(B * pages, -1), order(count);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    std::vector<std::vector<float>> all_k(B), all_v(B);  // [K, position, H] of each row, as they should end up
    std::vector<int64_t> start(B);
    for (int64_t b = 0; b < B; ++b) {
      start[b] = below(length - T + 1);
      for (int64_t p = 0; p < pages && paged; ++p) table[b * pages + p] = order[b * pages + p];
      all_k[b] = normal(rng, K * length * H), all_v[b] = normal(rng, K * length * H);
      for (int64_t kv = 0; kv < K; ++kv)
        for (int64_t p = 0; p < start[b] + T; ++p)
          for (int64_t h = 0; h < H; ++h)
            for (int which = 0; which < 2; ++which) {
              float& value = (which ? all_v : all_k)[b][(kv * length + p) * H + h];
              const int64_t page = paged ? table[b * pages + p / slots] : b;
              const int64_t at = ((page * K + kv) * slots + p % slots) * H + h;
              if (p >= start[b]) value = (which ? new_v : new_k)[((b * T + p - start[b]) * K + kv) * H + h];
              if (bfloat16) {
                uint32_t bits;
                std::memcpy(&bits, &value, 4);
                bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xFFFF0000;
                value = as_float(bits);
                if (p < start[b]) (which ? v_halves : k_halves)[at] = uint16_t(bits >> 16);
              } else if (p < start[b]) {
                (which ? v : k)[at] = value;
              }
            }
      for (int64_t p = 0; p < start[b] && !paged; ++p) slot_positions[b * slots + p] = int32_t(p);
      for (int64_t t = 0; t < T; ++t) positions[b * T + t] = int32_t(start[b] + t);
    }
    if (T > 1) positions[T - 1] = -1;
    std::vector<float> out(q.size());
    void* const keys = bfloat16 ? static_cast<void*>(k_halves.data()) : k.data();
    void* const values = bfloat16 ? static_cast<void*>(v_halves.data()) : v.data();
    kernels().attend_cached(pool, {B, T, N, K, H, slots, window, softcap, bfloat16, positions.data(), q.data(), new_k.data(),
                                   new_v.data(), keys, values, paged ? nullptr : slot_positions.data(), out.data(),
                                   paged ? table.data() : nullptr, pages, count});
    std::vector<double> wanted(q.size());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t n = 0; n < N; ++n) {
          const int64_t at = ((b * T + t) * N + n) * H, query = positions[b * T + t], kv = n / (N / K);
          if (query < 0) continue;
          double sum = 0;
          for (int64_t p = window ? std::max(int64_t(0), query - window + 1) : 0; p <= query; ++p) {
            double score = 0;
            for (int64_t h = 0; h < H; ++h) score += double(q[at + h]) * all_k[b][(kv * length + p) * H + h];
            if (softcap > 0) score = softcap * std::tanh(score / softcap);
            const double weight = std::exp(score);
            sum += weight;
            for (int64_t h = 0; h < H; ++h) wanted[at + h] += weight * all_v[b][(kv * length + p) * H + h];
          }
          for (int64_t h = 0; h < H; ++h) wanted[at + h] /= sum;
        }
    if (!near(out, wanted)) return false;
  }
  return true;
}

bool choice_is_right(gemmary::Pool& pool, std::mt19937& rng) {
  for (int shape = 0; shape < 40; ++shape) {
    const int64_t rows = 1 + rng() % 3, size = 1 + rng() % 20000, known = 1 + rng() % size;
    const int64_t count = 1 + rng() % std::min<int64_t>(known, 20);
    auto x = normal(rng, rows * size, 5.0f);
    for (float& one : x)
      if (rng() % 50 == 0) one = std::round(one);  // some are equal
    std::vector<int32_t> places(rows * count);
    std::vector<float> values(rows * count), top(rows), sum(rows);
    kernels().choose(pool, {rows, size, known, count, x.data(), places.data(), values.data(), top.data(), sum.data()});
    for (int64_t row = 0; row < rows; ++row) {
      const float* const mine = x.data() + row * size;
      std::vector<int32_t> order(known);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return mine[a] > mine[b]; });
      double total = 0;
      for (int64_t i = 0; i < size; ++i) total += std::exp(double(mine[i]) - top[row]);
      if (std::fabs(sum[row] / total - 1) > 1e-5 || top[row] != *std::max_element(mine, mine + size)) return false;
      for (int64_t i = 0; i < count; ++i)
        if (places[row * count + i] != order[i] || values[row * count + i] != mine[order[i]]) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  TwoThreads pool;
  const struct {
    const char* name;
    bool (*right)(gemmary::Pool&, std::mt19937&);
  } checks[] = {{"products", products_are_right}, {"cached attention", cached_attention_is_right}, {"choice", choice_is_right}};
  for (const auto& check : checks)
    if (!check.right(pool, rng)) {
      std::fprintf(stderr, "%s: differs\n", check.name);
      return 1;
    }
  std::puts("240 shapes");
}
