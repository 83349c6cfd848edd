// The row kernels on SIMD vectors; see cpu_kernels.h for what each one does.
//
// A row crosses the memory bus once: each block is swept twice (max, then shifted sums) while it sits in the first-level
// cache, and the gradient re-reads the row from the second-level cache and writes it once, past the caches where asked.
// The exponential is computed twice, which costs less than keeping it would: one polynomial against a store and a load.
#pragma once

#include "cpu_simd.h"

namespace lsk {
namespace {

constexpr int kChains = 4;  // independent accumulators: hide the latency of max and add

template <class T>
Stats<double> block(const void* logits, int64_t n) {
  const T* z = static_cast<const T*>(logits);
  constexpr int W = kWidth<T>;
  const int64_t whole = n - n % W;
  const Acc<T> lowest = -Acc<T>(INFINITY);
  Vec<T> m[kChains];
  for (auto& x : m) x = splat<T>(lowest);
  int64_t i = 0;
  for (; i + kChains * W <= n; i += kChains * W)
    for (int c = 0; c < kChains; ++c) m[c] = larger(load(z + i + c * W), m[c]);
  for (; i < whole; i += W) m[0] = larger(load(z + i), m[0]);
  if (i < n) m[1] = larger(load_part(z + i, n - i, lowest), m[1]);
  m[0] = larger(larger(m[0], m[1]), larger(m[2], m[3]));
  Acc<T> max = lowest;
  for (int l = 0; l < W; ++l) max = m[0][l] > max ? m[0][l] : max;

  const Vec<T> shift = splat<T>(origin(max));
  Vec<T> sum[kChains] = {}, dev[kChains] = {};
  for (i = 0; i + kChains * W <= n; i += kChains * W)
    for (int c = 0; c < kChains; ++c) {
      const Vec<T> x = load(z + i + c * W) - shift;
      sum[c] += exp_nonpositive(x);
      dev[c] += x;
    }
  for (; i < whole; i += W) {
    const Vec<T> x = load(z + i) - shift;
    sum[0] += exp_nonpositive(x);
    dev[0] += x;
  }
  if (i < n) {
    const Vec<T> x = load_part(z + i, n - i, lowest) - shift;
    sum[1] += exp_nonpositive(x);
    dev[1] += lane_index<T>() < typename Lanes<T>::Signed(n - i) ? x : Vec<T>{};
  }
  sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  dev[0] = (dev[0] + dev[1]) + (dev[2] + dev[3]);
  Stats<double> stats = {max, 0, 0, double(n)};
  for (int l = 0; l < W; ++l) {
    stats.sum += sum[0][l];
    stats.dev += dev[0][l];
  }
  return stats;
}

template <class T>
int64_t find(const void* logits, int64_t n, double value) {
  const T* z = static_cast<const T*>(logits);
  constexpr int W = kWidth<T>;
  const Vec<T> wanted = splat<T>(Acc<T>(value));
  for (int64_t i = 0; i < n; i += W) {
    const int64_t lanes = n - i < W ? n - i : W;
    const Vec<T> x = lanes < W ? load_part(z + i, lanes, Acc<T>(0)) : load(z + i);
    const Signed<T> hit = (Signed<T>)(x == wanted) | ((Signed<T>)(x != x) & (Signed<T>)(wanted != wanted));
    typename Lanes<T>::Signed any = 0;
    for (int l = 0; l < W; ++l) any |= hit[l];
    if (any == 0) continue;
    for (int64_t l = 0; l < lanes; ++l)
      if (hit[l]) return i + l;
  }
  return n;
}

template <class T>
struct Gradient {
  Vec<T> zmax, logsum, factor, q_rest, q_target;
  int64_t target;

  LSK_MEMBER Vec<T> value(Vec<T> z, Vec<T> q) const { return factor * dz(exp_nonpositive(log_p(z, zmax, logsum)), q); }

  template <bool kStream>
  LSK_MEMBER void sweep(const T* z, T* g, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += kWidth<T>) {
      const Vec<T> x = value(load(z + i), q_rest);
      kStream ? store_stream(g + i, x) : store(g + i, x);
    }
  }

  // At most one vector, which may hold the target.
  LSK_MEMBER void piece(const T* z, T* g, int64_t begin, int64_t end) const {
    if (begin >= end) return;
    const Signed<T> index = lane_index<T>() + typename Lanes<T>::Signed(0);
    const Vec<T> q = index == typename Lanes<T>::Signed(target - begin) ? q_target : q_rest;
    store_part(g + begin, end - begin, value(load_part(z + begin, end - begin, Acc<T>(0)), q));
  }

  template <bool kStream>
  LSK_MEMBER void row(const T* z, T* g, int64_t n) const {
    constexpr int W = kWidth<T>;
    constexpr int64_t kVector = sizeof(Stored<T>);
    int64_t head = kStream ? int64_t(-reinterpret_cast<uintptr_t>(g) % kVector / sizeof(T)) : 0;
    if (head > n) head = n;
    const int64_t tail = n - (n - head) % W;
    piece(z, g, 0, head);
    if (target >= head && target < tail) {
      const int64_t cut = target - (target - head) % W;
      sweep<kStream>(z, g, head, cut);
      piece(z, g, cut, cut + W);
      sweep<kStream>(z, g, cut + W, tail);
    } else {
      sweep<kStream>(z, g, head, tail);
    }
    piece(z, g, tail, n);
  }
};

template <class T>
void gradient(const void* logits, void* grad, int64_t n, int64_t target, const GradientRow& r, bool stream) {
  const T* z = static_cast<const T*>(logits);
  T* g = static_cast<T*>(grad);
  const Gradient<T> rule = {splat<T>(r.zmax),   splat<T>(r.logsum),   splat<T>(r.factor),
                            splat<T>(r.q_rest), splat<T>(r.q_target), target};
  if (stream && reinterpret_cast<uintptr_t>(g) % sizeof(T) == 0) {
    rule.template row<true>(z, g, n);
#if defined(__x86_64__)
    _mm_sfence();  // streamed lines are not ordered with the stores by which other threads learn that we are done
#endif
  } else {
    rule.template row<false>(z, g, n);
  }
}

template <class T>
void scale(void* grad, int64_t n, double factor) {
  T* g = static_cast<T*>(grad);
  constexpr int W = kWidth<T>;
  const Vec<T> f = splat<T>(Acc<T>(factor));
  int64_t i = 0;
  for (; i + W <= n; i += W) store(g + i, load(g + i) * f);
  if (i < n) store_part(g + i, n - i, load_part(g + i, n - i, Acc<T>(0)) * f);
}

template <class T>
constexpr RowKernels kernels_of() {
  return {block<T>, find<T>, gradient<T>, scale<T>};
}

constexpr RowKernels kTable[kDtypes] = {kernels_of<Half>(), kernels_of<BFloat16>(), kernels_of<float>(),
                                        kernels_of<double>()};

}  // namespace
}  // namespace lsk
