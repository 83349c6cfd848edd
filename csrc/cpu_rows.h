// The row kernels on SIMD vectors; see cpu_kernels.h for what each one does.
//
// A row crosses the memory bus once: each block is swept twice (max, then shifted sums) while it sits in the
// first-level cache, and the gradient re-reads the row from the second-level cache. The exponential is computed twice:
// keeping it would cost a store, a load and the bits that make forward and backward give the same gradient.
#pragma once

#include "cpu_simd.h"

namespace lsk {
namespace {

// Σ (z - shift) where every class weighs the same.
template <class T>
struct Uniform {
  Vec<T> dev = {};

  LSK_MEMBER void add(const Group<T>&, const Group<T>& x, int64_t, int64_t) { dev += total(x); }
  LSK_MEMBER void store(Stats<double>& stats, int64_t n) const {
    stats.rest.mass = double(n);
    for (int l = 0; l < kWidth<T>; ++l) stats.rest.dev += dev[l];
  }
};

// Lane sums of a block. The terms exp(0) = 1 of the maximum (and its equals) are counted and not added: beside a 1, a
// float would lose the digits of the small terms, which are all that the loss of a confident row consists of.
template <class T, class Classes>
struct Sums {
  Vec<T> exp, ones;
  Classes classes;

  // n logits from class k on.
  LSK_MEMBER void add(const Group<T>& z, Vec<T> shift, int64_t k, int64_t n) {
    Group<T> x, e;
    LSK_EACH(i) {
      x.v[i] = z.v[i] - shift;
      e.v[i] = exp_nonpositive(x.v[i]);
      e.v[i] = x.v[i] == 0 ? Vec<T>{} : e.v[i];
      ones = x.v[i] == 0 ? ones + 1 : ones;
      if (n < kGroup<T>) x.v[i] = lanes_between<T>(i, 0, n) ? x.v[i] : Vec<T>{};
    }
    exp += total(e);
    classes.add(z, x, k, n);
  }
};

template <class T, class Classes>
LSK_INLINE Stats<double> block_of(const T* z, int64_t n, const void* ahead, const Classes& classes) {
  const int64_t whole = n - n % kGroup<T>;
  const Vec<T> lowest = splat<T>(-INFINITY);
  Vec<T> m[kVectors];
  LSK_EACH(i) m[i] = lowest;
  for (int64_t k = 0; k < whole; k += kGroup<T>) {
    const Group<T> x = Format<T>::load(z + k);
    LSK_EACH(i) m[i] = larger(x.v[i], m[i]);
  }
  Group<T> rest;
  if (whole < n) {
    rest = load_part(z + whole, n - whole);
    LSK_EACH(i) {
      rest.v[i] = lanes_between<T>(i, 0, n - whole) ? rest.v[i] : lowest;
      m[i] = larger(rest.v[i], m[i]);
    }
  }
  m[0] = larger(larger(m[0], m[1]), larger(m[2], m[3]));
  Acc<T> max = -INFINITY;
  for (int l = 0; l < kWidth<T>; ++l) max = m[0][l] > max ? m[0][l] : max;

  const Vec<T> shift = splat<T>(origin(max));
  Sums<T, Classes> sums = {{}, {}, classes};
  for (int64_t k = 0; k < whole; k += kGroup<T>) {
    // The next block, or row: memory delivers it while these exponentials are computed (a third of the time, measured).
    for (size_t line = 0; line < kGroup<T> * sizeof(T); line += 64)
      __builtin_prefetch(static_cast<const char*>(ahead) + k * sizeof(T) + line);
    sums.add(Format<T>::load(z + k), shift, k, kGroup<T>);
  }
  if (whole < n) sums.add(rest, shift, whole, n - whole);
  Stats<double> stats = no_stats<double>();
  stats.max = max;
  for (int l = 0; l < kWidth<T>; ++l) stats.sum += double(sums.exp[l]) + sums.ones[l];
  sums.classes.store(stats, n);
  return stats;
}

template <class T>
Stats<double> block(const void* z, int64_t n, const void* ahead) {
  return block_of(static_cast<const T*>(z), n, ahead, Uniform<T>{});
}

template <class T>
double value(const void* z) {
  return load_part(static_cast<const T*>(z), 1).v[0][0];
}

template <class T>
int64_t find(const void* logits, int64_t n, double value) {
  const T* z = static_cast<const T*>(logits);
  const Acc<T> wanted = Acc<T>(value);
  for (int64_t k = 0; k < n; k += kGroup<T>) {
    const int64_t count = n - k < kGroup<T> ? n - k : kGroup<T>;
    const Group<T> x = load_some(z + k, count);
    Signed<T> any = {}, hit[kVectors];
    LSK_EACH(i) {
      hit[i] = (Signed<T>)(x.v[i] == wanted) & lanes_between<T>(i, 0, count);
      any |= hit[i];
    }
    int64_t first = kGroup<T>;
    for (int l = 0; l < kWidth<T>; ++l) {
      if (!any[l]) continue;
      LSK_EACH(i) if (hit[i][l] && Format<T>::element(i, l) < first) first = Format<T>::element(i, l);
    }
    if (first < kGroup<T>) return k + first;
  }
  return n;
}

template <class T>
struct Gradient {
  Vec<T> zmax, logsum, mass, factor, q_rest, q_target;

  explicit Gradient(const GradientRow& r)
      : zmax(operand<T>(r.zmax)),
        logsum(operand<T>(r.logsum)),
        mass(operand<T>(r.mass)),
        factor(operand<T>(r.factor)),
        q_rest(operand<T>(r.q_rest)),
        q_target(operand<T>(r.q_target)) {}

  LSK_MEMBER Vec<T> at(Vec<T> z, Vec<T> q) const {
    return factor * dz(mass, exp_nonpositive(log_p(z, zmax, logsum)), q);
  }

  // Whole groups without the target; a class vector r is null or the factors of q_rest.
  template <class R>
  LSK_MEMBER void sweep(const T* z, R r, T* g, int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; k += kGroup<T>) {
      Group<T> x = Format<T>::load(z + k);
      const Group<T> q = rest(r, k, kGroup<T>);
      LSK_EACH(i) x.v[i] = at(x.v[i], q.v[i]);
      Format<T>::store(g + k, x);
    }
  }

  // At most one group, which may hold the target: the same arithmetic with the target's weight in its lane.
  template <class R>
  LSK_MEMBER void piece(const T* z, R r, T* g, int64_t begin, int64_t end, int64_t target) const {
    if (begin >= end) return;
    Group<T> x = load_part(z + begin, end - begin);
    const Group<T> q = rest(r, begin, end - begin);
    const int64_t y = target >= begin && target < end ? target - begin : -1;
    LSK_EACH(i) x.v[i] = at(x.v[i], lanes_between<T>(i, y, y + 1) ? q_target : q.v[i]);
    store_part(g + begin, end - begin, x);
  }

  LSK_MEMBER Group<T> rest(decltype(nullptr), int64_t, int64_t) const { return {q_rest, q_rest, q_rest, q_rest}; }
  LSK_MEMBER Group<T> rest(const T* r, int64_t k, int64_t n) const {
    Group<T> q = load_some(r + k, n);
    LSK_EACH(i) q.v[i] *= q_rest;
    return q;
  }

  template <class R>
  LSK_MEMBER void row(const T* z, R r, T* g, int64_t n, int64_t target) const {
    const int64_t whole = n - n % kGroup<T>;
    const bool inside = target >= 0 && target < whole;
    const int64_t cut = inside ? target - target % kGroup<T> : whole;
    sweep(z, r, g, 0, cut);
    if (inside) {
      piece(z, r, g, cut, cut + kGroup<T>, target);
      sweep(z, r, g, cut + kGroup<T>, whole);
    }
    piece(z, r, g, whole, n, target);
  }
};

template <class T>
void gradient(const void* z, void* g, int64_t n, int64_t target, const GradientRow& row) {
  Gradient<T>(row).row(static_cast<const T*>(z), nullptr, static_cast<T*>(g), n, target);
}

template <class T>
void scale(void* grad, int64_t n, double factor) {
  T* g = static_cast<T*>(grad);
  const Vec<T> f = operand<T>(factor);
  for (int64_t k = 0; k < n; k += kGroup<T>) {
    const int64_t count = n - k < kGroup<T> ? n - k : kGroup<T>;
    Group<T> x = load_some(g + k, count);
    LSK_EACH(i) x.v[i] *= f;
    store_some(g + k, count, x);
  }
}

}  // namespace
}  // namespace lsk
