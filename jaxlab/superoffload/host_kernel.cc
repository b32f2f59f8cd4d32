// One Adam step on a flat bucket in host memory, and its exact inverse, as XLA FFI handlers.
//
// One pass over memory: a block of kBlock elements is updated while it is in the cache, and what else is asked for (the
// 16-bit copy, the sum of squares, the undo log) is computed from there. Work runs on XLA's own thread pool: the calling
// thread takes chunks too, and waits for nobody who has not begun. Compile with -ffp-contract=off and without fast-math:
// then every element has the bits of the same operations rounded one by one, wherever it lies.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kBlock = 512;          // elements between two looks at the exceptions
constexpr int64_t kChunk = 128 * kBlock;  // elements a thread takes at a time

// The order of `Coefficients` in fused_adam, then the reciprocals of b1, b2 and 1 - decay.
struct Scalars {
  float factor, b1, rest1, b2, rest2, eps, decay, step, root, un_b1, un_b2, un_decay;
};

// Denormals count as zero, as in everything that XLA compiles for a CPU.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (1ull << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

// Calls body(i) for every i < tasks, on the pool and on this thread.
template <typename Body>
void ParallelFor(ffi::ThreadPool& pool, int64_t threads, int64_t tasks, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &body] {
    FlushDenormals flush;
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks;) {
      body(i);
      if (shared->done.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->finished.notify_all();
      }
    }
  };
  const int64_t most = threads > 0 ? std::min(threads, pool.num_threads()) : pool.num_threads();
  for (int64_t helper = 1; helper < std::min(most, tasks); ++helper) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done.load() == tasks; });
}

inline uint32_t Bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float Float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <bool kDecoupled>
inline float Gradient(float g, float p, const Scalars& c) {
  g = g * c.factor;
  return kDecoupled ? g : g + c.decay * p;
}

// m / den: by how much the parameter moves, over the step size.
inline float Direction(float m, float v, const Scalars& c) { return m / (std::sqrt(v) * c.root + c.eps); }

// What the old values would be if nothing had been rounded.
template <bool kDecoupled>
inline float InverseP(float p, float direction, const Scalars& c) {
  p = p + c.step * direction;
  return kDecoupled ? p * c.un_decay : p;
}
inline float InverseM(float m, float g, const Scalars& c) { return (m - c.rest1 * g) * c.un_b1; }
inline float InverseV(float v, float g, const Scalars& c) { return (v - c.rest2 * (g * g)) * c.un_b2; }

struct State {
  float *p, *m, *v;
};
struct Source {
  const float *p, *m, *v, *g;
};

// `from` and `to` are the same memory or do not touch.
template <bool kDecoupled>
void Step(Source from, State to, int64_t n, const Scalars c) {
  INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float p = from.p[i], g = Gradient<kDecoupled>(from.g[i], p, c);
    const float m = c.b1 * from.m[i] + c.rest1 * g;
    const float v = c.b2 * from.v[i] + c.rest2 * (g * g);
    to.m[i] = m;
    to.v[i] = v;
    to.p[i] = (kDecoupled ? p - c.decay * p : p) - c.step * Direction(m, v, c);
  }
}

// What a logged block needs beside its arrays.
struct Block {
  float old[3][kBlock];
  int8_t diff[3][kBlock];
  uint32_t bad[kBlock];
};

// `Step` that also keeps the old values and the difference of their bits to the inverse of the new ones; returns how many
// elements those differences do not describe. (A NaN has many bit patterns, so where the old value was one none is
// trusted; from all others a NaN is farther away than any difference that counts.)
template <bool kDecoupled>
int64_t StepAndEncode(Source from, State to, Block& block, int64_t n, const Scalars c) {
  uint32_t count = 0;
  INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float p = from.p[i], old_m = from.m[i], old_v = from.v[i], g = Gradient<kDecoupled>(from.g[i], p, c);
    const float m = c.b1 * old_m + c.rest1 * g;
    const float v = c.b2 * old_v + c.rest2 * (g * g);
    const float direction = Direction(m, v, c);
    const float new_p = (kDecoupled ? p - c.decay * p : p) - c.step * direction;
    block.old[0][i] = p;
    block.old[1][i] = old_m;
    block.old[2][i] = old_v;
    to.m[i] = m;
    to.v[i] = v;
    to.p[i] = new_p;
    const uint32_t dp = Bits(p) - Bits(InverseP<kDecoupled>(new_p, direction, c));
    const uint32_t dm = Bits(old_m) - Bits(InverseM(m, g, c)), dv = Bits(old_v) - Bits(InverseV(v, g, c));
    block.diff[0][i] = static_cast<int8_t>(dp);
    block.diff[1][i] = static_cast<int8_t>(dm);
    block.diff[2][i] = static_cast<int8_t>(dv);
    const float sum = p + old_m + old_v;
    const uint32_t farthest = std::max(std::max(dp + 127, dm + 127), dv + 127);
    block.bad[i] = (farthest > 254) | (sum != sum);
    count += block.bad[i];
  }
  return count;
}

template <bool kDecoupled>
void Decode(Source now, State to, const int8_t* const diff[3], int64_t n, const Scalars c) {
  INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const float direction = Direction(now.m[i], now.v[i], c);
    const float p = Float(Bits(InverseP<kDecoupled>(now.p[i], direction, c)) + static_cast<int32_t>(diff[0][i]));
    const float g = Gradient<kDecoupled>(now.g[i], p, c);
    const uint32_t m = Bits(InverseM(now.m[i], g, c)), v = Bits(InverseV(now.v[i], g, c));
    to.p[i] = p;
    to.m[i] = Float(m + static_cast<int32_t>(diff[1][i]));
    to.v[i] = Float(v + static_cast<int32_t>(diff[2][i]));
  }
}

// Before others read what was streamed.
void Fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Copies what will not be read again soon past the cache, which would otherwise fetch the target first.
void Stream(const void* from, void* to, int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0 && bytes % 16 == 0) {
    for (int64_t i = 0; i < bytes / 16; ++i)
      _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

void CastToBfloat16(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
  for (; i < n; ++i) {
    const uint32_t bits = Bits(from[i]);
    const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : nearest);
  }
}

void CastToFloat16(const float* from, uint16_t* to, int64_t n) {
#if defined(__F16C__)
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  for (; i < n; ++i) to[i] = _cvtss_sh(from[i], 0);
#else
  for (int64_t i = 0; i < n; ++i) {
    const _Float16 half = static_cast<_Float16>(from[i]);
    std::memcpy(to + i, &half, sizeof half);
  }
#endif
}

// Sixteen running sums, added in a fixed order.
float SumOfSquares(const float* g, int64_t n) {
  float sums[16] = {};
  for (int64_t i = 0; i + 16 <= n; i += 16)
    for (int64_t j = 0; j < 16; ++j) sums[j] += g[i + j] * g[i + j];
  for (int64_t i = n - n % 16, j = 0; i < n; ++i, ++j) sums[j] += g[i] * g[i];
  for (int64_t width = 8; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  return sums[0];
}

// Takes `wanted` places of `capacity`, or none; returns the first, or -1.
int64_t Reserve(std::atomic<int64_t>& taken, int64_t wanted, int64_t capacity) {
  int64_t first = taken.load();
  do {
    if (first + wanted > capacity) return -1;
  } while (!taken.compare_exchange_weak(first, first + wanted));
  return first;
}

template <bool kDecoupled>
ffi::Error AdamStep(ffi::ThreadPool pool, int64_t threads, int64_t stop, ffi::Buffer<ffi::F32> p,
                    ffi::Buffer<ffi::F32> m, ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::F32> g,
                    ffi::Buffer<ffi::F32> scalars, ffi::ResultBuffer<ffi::F32> new_p, ffi::ResultBuffer<ffi::F32> new_m,
                    ffi::ResultBuffer<ffi::F32> new_v, ffi::Result<ffi::AnyBuffer> cast,
                    ffi::ResultBuffer<ffi::F32> sum_sq, ffi::ResultBuffer<ffi::S8> diff,
                    ffi::ResultBuffer<ffi::S32> index, ffi::ResultBuffer<ffi::F32> values,
                    ffi::ResultBuffer<ffi::S32> status, ffi::ResultBuffer<ffi::U8> done) {
  const int64_t n = p.element_count(), capacity = index->element_count();
  const bool log = diff->element_count() > 0, squares = sum_sq->element_count() > 0;
  const bool copy = cast->element_count() > 0;
  Scalars c;
  std::memcpy(&c, scalars.typed_data(), sizeof c);
  const Source from{p.typed_data(), m.typed_data(), v.typed_data(), g.typed_data()};
  const State to{new_p->typed_data(), new_m->typed_data(), new_v->typed_data()};
  std::vector<float> partial((n + kChunk - 1) / kChunk);
  std::atomic<int64_t> taken{0};
  std::atomic<bool> overflow{false};

  auto update = [&](int64_t at, int64_t size) {
    const Source source{from.p + at, from.m + at, from.v + at, from.g + at};
    const State target{to.p + at, to.m + at, to.v + at};
    if (log) {
      Block block;
      const int64_t count = StepAndEncode<kDecoupled>(source, target, block, size, c);
      for (int64_t k = 0; k < 3; ++k) Stream(block.diff[k], diff->typed_data() + k * n + at, size);
      int64_t place = count ? Reserve(taken, count, capacity) : 0;
      done->typed_data()[at / kBlock] = place >= 0;
      if (place < 0) {
        overflow = true;
        if (stop) {
          std::memcpy(target.p, block.old[0], size * sizeof(float));
          std::memcpy(target.m, block.old[1], size * sizeof(float));
          std::memcpy(target.v, block.old[2], size * sizeof(float));
        }
      } else if (count) {
        for (int64_t i = 0; i < size; ++i)
          if (block.bad[i]) {
            index->typed_data()[place] = static_cast<int32_t>(at + i);
            for (int64_t k = 0; k < 3; ++k) values->typed_data()[k * capacity + place] = block.old[k][i];
            ++place;
          }
      }
    } else {
      Step<kDecoupled>(source, target, size, c);
    }
    if (copy && cast->element_type() == ffi::F32) {
      std::memcpy(static_cast<float*>(cast->untyped_data()) + at, target.p, size * sizeof(float));
    } else if (copy) {
      uint16_t half[kBlock];
      (cast->element_type() == ffi::BF16 ? CastToBfloat16 : CastToFloat16)(target.p, half, size);
      Stream(half, static_cast<uint16_t*>(cast->untyped_data()) + at, size * sizeof(uint16_t));
    }
  };
  ParallelFor(pool, threads, partial.size(), [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    if (squares) partial[chunk] = SumOfSquares(from.g + chunk * kChunk, end - chunk * kChunk);
    for (int64_t at = chunk * kChunk; at < end; at += kBlock) update(at, std::min(kBlock, end - at));
    Fence();
  });

  if (squares) {
    double total = 0;
    for (float part : partial) total += part;
    sum_sq->typed_data()[0] = static_cast<float>(total);
  }
  if (log) {
    status->typed_data()[0] = static_cast<int32_t>(taken.load());
    status->typed_data()[1] = overflow;
    std::fill(index->typed_data() + taken, index->typed_data() + capacity, static_cast<int32_t>(n));
  }
  return ffi::Error::Success();
}

template <bool kDecoupled>
ffi::Error AdamUndo(ffi::ThreadPool pool, int64_t threads, ffi::Buffer<ffi::F32> p, ffi::Buffer<ffi::F32> m,
                    ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::F32> g, ffi::Buffer<ffi::F32> scalars,
                    ffi::Buffer<ffi::S8> diff, ffi::Buffer<ffi::S32> index, ffi::Buffer<ffi::F32> values,
                    ffi::Buffer<ffi::S32> status, ffi::Buffer<ffi::U8> done, ffi::ResultBuffer<ffi::F32> old_p,
                    ffi::ResultBuffer<ffi::F32> old_m, ffi::ResultBuffer<ffi::F32> old_v) {
  const int64_t n = p.element_count(), capacity = index.element_count();
  Scalars c;
  std::memcpy(&c, scalars.typed_data(), sizeof c);
  float* const to[3] = {old_p->typed_data(), old_m->typed_data(), old_v->typed_data()};
  const float* const from[3] = {p.typed_data(), m.typed_data(), v.typed_data()};
  ParallelFor(pool, threads, (n + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t end = std::min(n, (chunk + 1) * kChunk);
    for (int64_t at = chunk * kChunk; at < end; at += kBlock) {
      const int64_t size = std::min(kBlock, end - at);
      if (done.typed_data()[at / kBlock]) {
        const int8_t* const out[3] = {diff.typed_data() + at, diff.typed_data() + n + at, diff.typed_data() + 2 * n + at};
        const Source now{from[0] + at, from[1] + at, from[2] + at, g.typed_data() + at};
        Decode<kDecoupled>(now, State{to[0] + at, to[1] + at, to[2] + at}, out, size, c);
      } else {
        for (int64_t k = 0; k < 3; ++k)
          if (to[k] != from[k]) std::memcpy(to[k] + at, from[k] + at, size * sizeof(float));
      }
    }
  });
  for (int64_t i = 0; i < status.typed_data()[0]; ++i)
    for (int64_t k = 0; k < 3; ++k) to[k][index.typed_data()[i]] = values.typed_data()[k * capacity + i];
  return ffi::Error::Success();
}

auto StepBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("threads")
      .Attr<int64_t>("stop")
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::S8>>()
      .Ret<ffi::Buffer<ffi::S32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::S32>>()
      .Ret<ffi::Buffer<ffi::U8>>();
}

auto UndoBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Attr<int64_t>("threads")
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S8>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::U8>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>()
      .Ret<ffi::Buffer<ffi::F32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlab_adamw_step, AdamStep<true>, StepBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlab_adam_step, AdamStep<false>, StepBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlab_adamw_undo, AdamUndo<true>, UndoBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlab_adam_undo, AdamUndo<false>, UndoBinding());
