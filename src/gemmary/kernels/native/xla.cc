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

// Pieces of one kernel's work, which any thread may take.
class Job {
 public:
  Job(int64_t count, void (*run)(void*, int64_t), void* context) : count_(count), run_(run), context_(context) {}

  void work() {
    int64_t mine = 0;
    for (int64_t i; (i = next_.fetch_add(1)) < count_; ++mine) run_(context_, i);
    if (mine == 0) return;
    std::lock_guard lock(mutex_);
    if (done_.fetch_add(mine) + mine == count_) ended_.notify_one();
  }

  void wait() {
    for (int i = 0; i < kPatience && done_.load() != count_; ++i) pause();
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return done_.load() == count_; });
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int kPatience = 500;  // some twenty microseconds: less than it takes to wake a thread

 private:
  const int64_t count_;
  void (*const run_)(void*, int64_t);
  void* const context_;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> done_{0};
  std::mutex mutex_;
  std::condition_variable ended_;
};

// XLA's threads that have just worked stay a moment for the next kernel, which comes within microseconds in a decoding step:
// waking one takes longer than many a kernel.
class Crew {
 public:
  // How many threads saw the job offered to them; those that wait take it, those that don't are to be called.
  int offer(const std::shared_ptr<Job>& job) {
    std::lock_guard lock(mutex_);
    job_ = job;
    turn_.fetch_add(1);
    return waiting_;
  }

  void retire(const std::shared_ptr<Job>& job) {
    std::lock_guard lock(mutex_);
    if (job_ == job) job_.reset();
  }

  // A thread's stay: its own job, then what is offered until nothing has come for a while.
  void stay(std::shared_ptr<Job> job) {
    while (job) {
      job->work();
      job.reset();
      int64_t turn;
      {
        std::lock_guard lock(mutex_);
        ++waiting_;
        turn = turn_.load();
      }
      for (int i = 0; i < 4 * Job::kPatience && turn_.load(std::memory_order_relaxed) == turn; ++i) Job::pause();
      std::lock_guard lock(mutex_);
      --waiting_;
      if (turn_.load() != turn) job = job_;
    }
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Job> job_;
  std::atomic<int64_t> turn_{0};
  int waiting_ = 0;
};

// Never destroyed: XLA's threads may outlive what is.
Crew& crew() {
  static Crew* const one = new Crew;
  return *one;
}

// The caller takes its share of the pieces, and waits only for those that were taken: XLA may have no other thread free, and one
// that comes late finds nothing to do.
class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool), threads_(int(pool.num_threads())) {}

  int threads() const override { return threads_ > 0 ? threads_ : 1; }

  void run(int64_t count, void (*run)(void*, int64_t), void* context) override {
    auto job = std::make_shared<Job>(count, run, context);
    const int64_t helpers = std::min<int64_t>(threads(), count) - 1;
    if (helpers > 0)
      for (int64_t i = crew().offer(job); i < helpers; ++i) pool_.Schedule([job] { crew().stay(job); });
    job->work();
    job->wait();
    crew().retire(job);
  }

 private:
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

// One of the matrices that x [m, k] is multiplied with; blocks come as their bytes, a row after the other.
ffi::ErrorOr<Factor> factor(const ffi::AnyBuffer& w, int32_t kind, bool turned, int64_t k) {
  const auto sides = w.dimensions();
  const auto wrong = ffi::Unexpected(ffi::Error::InvalidArgument("products: the sides do not fit"));
  if (sides.size() != 2 || kind < 0 || kind > int32_t(Kind::q6_k)) return wrong;
  const Factor made{Kind(kind), turned, sides[!turned], w.untyped_data()};
  const int64_t bytes = row_bytes(made.kind, k);
  const ffi::DataType types[] = {ffi::F32, ffi::BF16, ffi::S8};
  if (kind > int32_t(Kind::i8) ? !turned || bytes == 0 || sides[1] != bytes || w.element_type() != ffi::U8
                               : sides[turned] != k || w.element_type() != types[kind])
    return wrong;
  return made;
}

constexpr size_t kMost = 4;

ffi::Error products(ffi::ThreadPool threads, Values x, ffi::RemainingArgs matrices, ffi::RemainingRets results,
                    ffi::Span<const int32_t> kinds, ffi::Span<const int32_t> turned, bool gated) {
  const auto sides = x.dimensions();
  const size_t count = matrices.size();
  if (sides.size() != 2 || count == 0 || count > kMost || kinds.size() != count || turned.size() != count ||
      results.size() != (gated ? 1 : count) || (gated && count != 2))
    return ffi::Error::InvalidArgument("products: a number of matrices that do not fit");
  Factor factors[kMost];
  float* y[kMost];
  for (size_t i = 0; i < count; ++i) {
    const auto w = matrices.get<ffi::AnyBuffer>(i);
    if (w.has_error()) return w.error();
    const auto made = factor(*w, kinds.begin()[i], turned.begin()[i] != 0, sides[1]);
    if (made.has_error()) return made.error();
    factors[i] = *made;
    if (made->kind <= Kind::i8 && sides[0] > kFewRows)
      return ffi::Error::InvalidArgument("products: too many rows for a plain matrix");
    if (i >= results.size()) continue;
    auto result = results.get<ffi::BufferR2<ffi::F32>>(i);
    if (result.has_error()) return result.error();
    const auto shape = (*result)->dimensions();
    if (shape[0] != sides[0] || shape[1] != made->n) return ffi::Error::InvalidArgument("products: results that do not fit");
    y[i] = (*result)->typed_data();
  }
  if (gated && factors[0].n != factors[1].n) return ffi::Error::InvalidArgument("products: a gate of another size");
  XlaPool pool(threads);
  chosen()->products(pool, {sides[0], sides[1], x.typed_data(), int64_t(count), factors, y, gated});
  return ffi::Error::Success();
}

ffi::Error lookup(ffi::ThreadPool threads, ffi::Buffer<ffi::U8> w, Numbers rows, Result y, int32_t kind) {
  const auto sides = w.dimensions(), shape = y->dimensions();
  if (sides.size() != 2 || shape.size() != 2 || kind <= int32_t(Kind::i8) || kind > int32_t(Kind::q6_k) ||
      row_bytes(Kind(kind), shape[1]) != sides[1] || sides[1] == 0 || int64_t(rows.element_count()) != shape[0])
    return ffi::Error::InvalidArgument("lookup: the sides do not fit");
  XlaPool pool(threads);
  chosen()->lookup(pool, {sides[0], shape[1], shape[0], Kind(kind), w.typed_data(), rows.typed_data(), y->typed_data()});
  return ffi::Error::Success();
}

template <typename A, typename B>
bool alike(A& a, B& b) {
  const auto x = a.dimensions(), y = b.dimensions();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

ffi::ErrorOr<Attention> attention(const Values& q, const Values& k, const Values& v, const Numbers& positions,
                                  const Numbers& segments, const Numbers& ends, int64_t window, float softcap) {
  const auto a = q.dimensions(), b = k.dimensions();
  if (a.size() != 4 || b.size() != 4 || !alike(k, v) || a[0] != b[0] || a[1] != b[1] || a[3] != b[3] || b[2] == 0 ||
      a[2] % b[2] != 0 || a[3] % 8 != 0 || int64_t(positions.element_count()) != a[0] * a[1] ||
      segments.element_count() != positions.element_count() || ends.element_count() != positions.element_count())
    return ffi::Unexpected(ffi::Error::InvalidArgument("attention: the shapes do not fit"));
  return Attention{a[0], a[1], a[2], b[2], a[3], window, softcap, positions.typed_data(), segments.typed_data(),
                   ends.typed_data(), q.typed_data(), k.typed_data(), v.typed_data()};
}

ffi::Error attend(ffi::ThreadPool threads, Values q, Values k, Values v, Numbers positions, Numbers segments,
                  Numbers ends, Numbers query_positions, Result out, Result log_sum, int64_t window, float softcap) {
  auto made = attention(q, k, v, positions, segments, ends, window, softcap);
  if (made.has_error()) return made.error();
  made->query_positions = query_positions.typed_data();
  if (!alike(query_positions, positions) || !alike(*out, q) || int64_t(log_sum->element_count()) != made->batch * made->heads * made->tokens)
    return ffi::Error::InvalidArgument("attention: the results do not fit");
  XlaPool pool(threads);
  chosen()->attend(pool, *made, out->typed_data(), log_sum->typed_data());
  return ffi::Error::Success();
}

ffi::Error attend_gradient(ffi::ThreadPool threads, Values q, Values k, Values v, Numbers positions, Numbers segments,
                           Numbers ends, Values out, Values log_sum, Values d_out, Result dq, Result dk, Result dv, int64_t window,
                           float softcap) {
  const auto made = attention(q, k, v, positions, segments, ends, window, softcap);
  if (made.has_error()) return made.error();
  if (int64_t(log_sum.element_count()) != made->batch * made->heads * made->tokens || !alike(out, q) ||
      !alike(d_out, q) || !alike(*dq, q) || !alike(*dk, k) || !alike(*dv, k))
    return ffi::Error::InvalidArgument("attention: the results do not fit");
  XlaPool pool(threads);
  chosen()->attend_gradient(pool, *made, out.typed_data(), log_sum.typed_data(), d_out.typed_data(), dq->typed_data(),
                            dk->typed_data(), dv->typed_data());
  return ffi::Error::Success();
}

// The cache comes in and goes out in the same memory.
ffi::Error attend_cached(ffi::ThreadPool threads, Values q, Values k, Values v, Numbers positions, ffi::AnyBuffer keys,
                         ffi::AnyBuffer values, Numbers slot_positions, Result out,
                         ffi::Result<ffi::AnyBuffer> new_keys, ffi::Result<ffi::AnyBuffer> new_values,
                         ffi::ResultBuffer<ffi::S32> new_positions, int64_t window, float softcap) {
  const auto a = q.dimensions(), b = k.dimensions(), c = keys.dimensions();
  const bool bfloat16 = keys.element_type() == ffi::BF16;
  if (a.size() != 4 || b.size() != 4 || c.size() != 4 || !alike(k, v) || !alike(keys, values) || !alike(*out, q) ||
      a[0] != b[0] || a[1] != b[1] || a[3] != b[3] || b[2] == 0 || a[2] % b[2] != 0 || c[0] != a[0] || c[1] != b[2] ||
      c[3] != a[3] || !(bfloat16 || keys.element_type() == ffi::F32) || values.element_type() != keys.element_type() ||
      int64_t(positions.element_count()) != a[0] * a[1] || int64_t(slot_positions.element_count()) != a[0] * c[2])
    return ffi::Error::InvalidArgument("attention to a cache: the shapes do not fit");
  if (keys.untyped_data() != new_keys->untyped_data() || values.untyped_data() != new_values->untyped_data() ||
      slot_positions.typed_data() != new_positions->typed_data())
    return ffi::Error::Internal("attention to a cache: it was not given in place");
  XlaPool pool(threads);
  chosen()->attend_cached(pool, {a[0], a[1], a[2], b[2], a[3], c[2], window, softcap, bfloat16, positions.typed_data(),
                                 q.typed_data(), k.typed_data(), v.typed_data(), new_keys->untyped_data(),
                                 new_values->untyped_data(), new_positions->typed_data(), out->typed_data()});
  return ffi::Error::Success();
}

// The same with a pool of pages; `reads`: tokens also attend, else there is no q to speak of.
ffi::Error attend_pages(ffi::ThreadPool threads, Values q, Values k, Values v, Numbers positions, Numbers table,
                        ffi::AnyBuffer keys, ffi::AnyBuffer values, Result out, ffi::Result<ffi::AnyBuffer> new_keys,
                        ffi::Result<ffi::AnyBuffer> new_values, int64_t window, float softcap, bool reads) {
  const auto a = q.dimensions(), b = k.dimensions(), c = keys.dimensions(), d = table.dimensions();
  const bool bfloat16 = keys.element_type() == ffi::BF16;
  if (a.size() != 4 || b.size() != 4 || c.size() != 4 || d.size() != 2 || !alike(k, v) || !alike(keys, values) ||
      !alike(*out, q) || a[0] != b[0] || d[0] != b[0] || (reads && a[1] != b[1]) || a[3] != b[3] || b[2] == 0 ||
      a[2] % b[2] != 0 || c[1] != b[2] || c[3] != a[3] || !(bfloat16 || keys.element_type() == ffi::F32) ||
      values.element_type() != keys.element_type() || int64_t(positions.element_count()) != b[0] * b[1])
    return ffi::Error::InvalidArgument("attention to pages: the shapes do not fit");
  if (keys.untyped_data() != new_keys->untyped_data() || values.untyped_data() != new_values->untyped_data())
    return ffi::Error::Internal("attention to pages: they were not given in place");
  XlaPool pool(threads);
  chosen()->attend_cached(pool, {b[0], b[1], a[2], b[2], a[3], c[2], window, softcap, bfloat16, positions.typed_data(),
                                 q.typed_data(), k.typed_data(), v.typed_data(), new_keys->untyped_data(),
                                 new_values->untyped_data(), nullptr, reads ? out->typed_data() : nullptr,
                                 table.typed_data(), d[1], c[0]});
  return ffi::Error::Success();
}

ffi::Error choose(ffi::ThreadPool threads, Values logits, ffi::ResultBuffer<ffi::S32> places, Result values, Result top,
                  Result sum, int64_t known) {
  const auto a = logits.dimensions(), b = places->dimensions();
  if (a.size() != 2 || b.size() != 2 || a[0] != b[0] || !alike(*places, *values) || a[1] == 0 || b[1] == 0 ||
      int64_t(top->element_count()) != a[0] || int64_t(sum->element_count()) != a[0])
    return ffi::Error::InvalidArgument("choice: the shapes do not fit");
  XlaPool pool(threads);
  chosen()->choose(pool, {a[0], a[1], known, b[1], logits.typed_data(), places->typed_data(), values->typed_data(),
                          top->typed_data(), sum->typed_data()});
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_products, gemmary::products,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int32_t>>("kinds")
                                  .Attr<xla::ffi::Span<const int32_t>>("turned")
                                  .Attr<bool>("gated"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_lookup, gemmary::lookup,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()
                                  .Arg<gemmary::Numbers>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("kind"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_attend, gemmary::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<gemmary::Numbers>()
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
                                  .Arg<gemmary::Numbers>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_attend_cached, gemmary::attend_cached,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<gemmary::Numbers>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_attend_pages, gemmary::attend_pages,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Values>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<gemmary::Numbers>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Attr<bool>("reads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(gemmary_choose, gemmary::choose,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<gemmary::Values>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("known"));

#pragma GCC visibility pop
