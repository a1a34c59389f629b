// The kernels as XLA calls them: buffers in, buffers out, and XLA's own threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace gemmary {
namespace {

namespace ffi = xla::ffi;

// Threads take pieces until none are left. The caller takes its share, and waits only for pieces that were taken: XLA may
// have no other thread free, and one that comes late finds nothing to do.
class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool), threads_(int(pool.num_threads())) {}

  int threads() const override { return threads_ > 0 ? threads_ : 1; }

  void run(int64_t count, void (*run)(void*, int64_t), void* context) override {
    auto job = std::make_shared<Job>(count, run, context);
    for (int64_t i = 1; i < threads() && i < count; ++i) pool_.Schedule([job] { job->work(); });
    job->work();
    job->wait();
  }

 private:
  struct Job {
    const int64_t count;
    void (*const run)(void*, int64_t);
    void* const context;
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable ended;

    Job(int64_t count, void (*run)(void*, int64_t), void* context) : count(count), run(run), context(context) {}

    void work() {
      int64_t mine = 0;
      for (int64_t i; (i = next.fetch_add(1)) < count; ++mine) run(context, i);
      if (mine == 0) return;
      std::lock_guard lock(mutex);
      if ((done += mine) == count) ended.notify_one();
    }

    void wait() {
      std::unique_lock lock(mutex);
      ended.wait(lock, [this] { return done == count; });
    }
  };

  ffi::ThreadPool pool_;
  const int threads_;
};

using Values = ffi::Buffer<ffi::F32>;
using Numbers = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// GEMMARY_INSTRUCTIONS names another set than the best, for tests and comparisons; one that cannot run here is passed over.
const Kernels* chosen() {
  static const Kernels* const best = [] {
    const Kernels* const named = kernels(std::getenv("GEMMARY_INSTRUCTIONS"));
    return named != nullptr ? named : kernels();
  }();
  return best;
}

ffi::Error rows(ffi::ThreadPool threads, Values x, ffi::AnyBuffer w, Result y, bool turned) {
  const auto a = x.dimensions(), b = w.dimensions(), c = y->dimensions();
  const bool bfloat16 = w.element_type() == ffi::BF16;
  if (a.size() != 2 || b.size() != 2 || c.size() != 2 || a[0] != c[0] || a[1] != b[turned] || c[1] != b[!turned] ||
      !(bfloat16 || w.element_type() == ffi::F32))
    return ffi::Error::InvalidArgument("rows: the sides do not fit");
  XlaPool pool(threads);
  chosen()->rows(pool, {a[0], c[1], a[1], x.typed_data(), w.untyped_data(), bfloat16, turned, y->typed_data()});
  return ffi::Error::Success();
}

template <typename A, typename B>
bool alike(A& a, B& b) {
  const auto x = a.dimensions(), y = b.dimensions();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

ffi::ErrorOr<Attention> attention(const Values& q, const Values& k, const Values& v, const Numbers& positions,
                                  const Numbers& segments, int64_t window, float softcap) {
  const auto a = q.dimensions(), b = k.dimensions();
  if (a.size() != 4 || b.size() != 4 || !alike(k, v) || a[0] != b[0] || a[1] != b[1] || a[3] != b[3] || b[2] == 0 ||
      a[2] % b[2] != 0 || a[3] % 8 != 0 || int64_t(positions.element_count()) != a[0] * a[1] ||
      segments.element_count() != positions.element_count())
    return ffi::Unexpected(ffi::Error::InvalidArgument("attention: the shapes do not fit"));
  return Attention{a[0], a[1], a[2], b[2], a[3], window, softcap, positions.typed_data(), segments.typed_data(),
                   q.typed_data(), k.typed_data(), v.typed_data()};
}

ffi::Error attend(ffi::ThreadPool threads, Values q, Values k, Values v, Numbers positions, Numbers segments,
                  Result out, Result log_sum, int64_t window, float softcap) {
  const auto made = attention(q, k, v, positions, segments, window, softcap);
  if (made.has_error()) return made.error();
  if (!alike(*out, q) || int64_t(log_sum->element_count()) != made->batch * made->heads * made->tokens)
    return ffi::Error::InvalidArgument("attention: the results do not fit");
  XlaPool pool(threads);
  chosen()->attend(pool, *made, out->typed_data(), log_sum->typed_data());
  return ffi::Error::Success();
}

ffi::Error attend_gradient(ffi::ThreadPool threads, Values q, Values k, Values v, Numbers positions, Numbers segments,
                           Values out, Values log_sum, Values d_out, Result dq, Result dk, Result dv, int64_t window,
                           float softcap) {
  const auto made = attention(q, k, v, positions, segments, window, softcap);
  if (made.has_error()) return made.error();
  if (int64_t(log_sum.element_count()) != made->batch * made->heads * made->tokens || !alike(out, q) ||
      !alike(d_out, q) || !alike(*dq, q) || !alike(*dk, k) || !alike(*dv, k))
    return ffi::Error::InvalidArgument("attention: the results do not fit");
  XlaPool pool(threads);
  chosen()->attend_gradient(pool, *made, out.typed_data(), log_sum.typed_data(), d_out.typed_data(), dq->typed_data(),
                            dk->typed_data(), dv->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gemmary

#pragma GCC visibility push(default)  // all else is the library's own

// The instruction set that serves here; null where none does, and nothing else may be called.
extern "C" const char* gemmary_instructions() {
  const gemmary::Kernels* const best = gemmary::chosen();
  return best == nullptr ? nullptr : best->name;
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_rows, gemmary::rows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<bool>("turned"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_attend, gemmary::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<gemmary::Numbers>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_attend_gradient, gemmary::attend_gradient,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

#pragma GCC visibility pop
