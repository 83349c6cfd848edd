// The row kernels on SIMD vectors; see cpu_kernels.h for what each one does.
//
// A row crosses the memory bus once: each block is swept twice (max, then shifted sums) while it sits in the
// first-level cache, and the gradient re-reads the row from the second-level cache. The exponential is computed twice:
// keeping it would cost a store, a load and the bits that make forward and backward give the same gradient.
#pragma once

#include "cpu_simd.h"

namespace lsk {
namespace {

// f(k, count) for each group of n elements.
template <class T, class F>
LSK_INLINE void for_groups(int64_t n, const F& f) {
  for (int64_t k = 0; k < n; k += kGroup<T>) f(k, n - k < kGroup<T> ? n - k : kGroup<T>);
}

// A factor of 1 that the compiler knows: the same bits as a vector of ones, without its register and its products.
struct One {
  template <class V>
  LSK_MEMBER explicit One(V) {}
};
template <class V>
LSK_INLINE V operator*(V x, One) {
  return x;
}
template <class V>
LSK_INLINE V operator*(One, V x) {
  return x;
}

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

// Lane sums of a block, with z = scale·x and shift = scale·top rounded. The terms of the maximum (and its equals) are
// counted and not added: they are 1 or next to it, and beside a 1 a float would lose the digits of the small terms,
// which are all that the loss of a confident row consists of.
template <class T, class Classes>
struct Sums {
  Vec<T> exp, others;  // `others` counts what is not a maximum: one comparison serves it and the sum
  Classes classes;

  // n logits from class k on.
  template <class Scale>
  LSK_MEMBER void add(const Group<T>& x, Scale scale, Vec<T> top, Vec<T> shift, int64_t k, int64_t n) {
    Group<T> dev, e;
    LSK_EACH(i) {
      dev.v[i] = x.v[i] * scale - shift;
      const auto other = x.v[i] != top;
      e.v[i] = exp_nonpositive(dev.v[i], (Signed<T>)other);
      others = other ? others + 1 : others;
      if (n < kGroup<T>) dev.v[i] = lanes_between<T>(i, 0, n) ? dev.v[i] : Vec<T>{};
    }
    exp += total(e);
    classes.add(x, dev, k, n);
  }
};

template <class Scale, class T, class Classes>
LSK_INLINE Stats<double> block_of(const T* x, int64_t n, double factor, const void* ahead, const Classes& classes) {
  const int64_t whole = n - n % kGroup<T>;
  const Vec<T> lowest = splat<T>(-INFINITY);
  Vec<T> m[kVectors];
  LSK_EACH(i) m[i] = lowest;
  for (int64_t k = 0; k < whole; k += kGroup<T>) {
    const Group<T> v = Format<T>::load(x + k);
    LSK_EACH(i) m[i] = larger(v.v[i], m[i]);
  }
  Group<T> rest;
  if (whole < n) {
    rest = load_part(x + whole, n - whole);
    LSK_EACH(i) {
      rest.v[i] = lanes_between<T>(i, 0, n - whole) ? rest.v[i] : lowest;
      m[i] = larger(rest.v[i], m[i]);
    }
  }
  m[0] = larger(larger(m[0], m[1]), larger(m[2], m[3]));
  Acc<T> max = -INFINITY;
  for (int l = 0; l < kWidth<T>; ++l) max = m[0][l] > max ? m[0][l] : max;

  const Scale scale(splat<T>(Acc<T>(factor)));
  const Acc<T> highest = origin(max);
  const Vec<T> top = splat<T>(highest), shift = top * scale;
  Sums<T, Classes> sums = {{}, {}, classes};
  for (int64_t k = 0; k < whole; k += kGroup<T>) {
    // The next block, or row: memory delivers it while these exponentials are computed (a third of the time, measured).
    for (size_t line = 0; line < kGroup<T> * sizeof(T); line += 64)
      __builtin_prefetch(static_cast<const char*>(ahead) + k * sizeof(T) + line);
    sums.add(Format<T>::load(x + k), scale, top, shift, k, kGroup<T>);
  }
  if (whole < n) sums.add(rest, scale, top, shift, whole, n - whole);
  const int64_t groups = (n + kGroup<T> - 1) / kGroup<T>;
  Stats<double> stats = no_stats<double>();
  stats.max = max * Acc<T>(factor);
  const double one =
      exp(fma(double(highest), double(Acc<T>(factor)), -double(shift[0])));  // what rounding left of the product
  for (int l = 0; l < kWidth<T>; ++l) stats.sum += double(sums.exp[l]) + (groups * kVectors - sums.others[l]) * one;
  sums.classes.store(stats, n);
  return stats;
}

template <class T>
Stats<double> block(const void* x, int64_t n, double scale, const void* ahead) {
  const T* z = static_cast<const T*>(x);
  return scale == 1 ? block_of<One>(z, n, scale, ahead, Uniform<T>{})
                    : block_of<Vec<T>>(z, n, scale, ahead, Uniform<T>{});
}

template <class T>
double value(const void* x) {
  return load_part(static_cast<const T*>(x), 1).v[0][0];
}

template <class T>
int64_t find(const void* logits, int64_t n, double scale, double value) {
  const T* x = static_cast<const T*>(logits);
  const Acc<T> factor = Acc<T>(scale), wanted = Acc<T>(value);
  for (int64_t k = 0; k < n; k += kGroup<T>) {
    const int64_t count = n - k < kGroup<T> ? n - k : kGroup<T>;
    const Group<T> v = load_some(x + k, count);
    Signed<T> any = {}, hit[kVectors];
    LSK_EACH(i) {
      hit[i] = (Signed<T>)(v.v[i] * factor == wanted) & lanes_between<T>(i, 0, count);
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

// Factor: what scale and mass are, vectors or One.
template <class T, class Factor, bool kPenalty = false>
struct Gradient {
  Factor scale, mass;
  Vec<T> zmax, logsum, factor, q_rest, q_target, penalty;

  explicit Gradient(const GradientRow& r)
      : scale(operand<T>(r.scale)),
        mass(operand<T>(r.mass)),
        zmax(operand<T>(r.zmax)),
        logsum(operand<T>(r.logsum)),
        factor(operand<T>(r.factor)),
        q_rest(operand<T>(r.q_rest)),
        q_target(operand<T>(r.q_target)),
        penalty(operand<T>(r.penalty)) {}

  LSK_MEMBER Vec<T> at(Vec<T> x, Vec<T> q, Vec<T> f) const {
    const Vec<T> logp = log_p(x, scale, zmax, logsum), p = exp_nonpositive(logp);
    if constexpr (kPenalty) return f * dz(mass, penalty * larger(logp, splat<T>(kLowest<Acc<T>>)), p, q);
    return f * dz(mass, p, q);
  }

  // Whole groups without the target; the vectors r and slope are null or factors of q_rest and `factor`.
  template <class R, class S>
  LSK_MEMBER void sweep(const T* z, R r, S slope, T* g, int64_t begin, int64_t end) const {
    for (int64_t k = begin; k < end; k += kGroup<T>) {
      Group<T> x = Format<T>::load(z + k);
      const Group<T> q = times(q_rest, r, k, kGroup<T>), f = times(factor, slope, k, kGroup<T>);
      LSK_EACH(i) x.v[i] = at(x.v[i], q.v[i], f.v[i]);
      Format<T>::store(g + k, x);
    }
  }

  // At most one group, which may hold the target: the same arithmetic with the target's weight in its lane.
  template <class R, class S>
  LSK_MEMBER void piece(const T* z, R r, S slope, T* g, int64_t begin, int64_t end, int64_t target) const {
    if (begin >= end) return;
    Group<T> x = load_part(z + begin, end - begin);
    const Group<T> q = times(q_rest, r, begin, end - begin), f = times(factor, slope, begin, end - begin);
    const int64_t y = target >= begin && target < end ? target - begin : -1;
    LSK_EACH(i) x.v[i] = at(x.v[i], lanes_between<T>(i, y, y + 1) ? q_target : q.v[i], f.v[i]);
    store_part(g + begin, end - begin, x);
  }

  LSK_MEMBER Group<T> times(Vec<T> x, decltype(nullptr), int64_t, int64_t) const { return {x, x, x, x}; }
  LSK_MEMBER Group<T> times(Vec<T> x, const Acc<T>* factors, int64_t k, int64_t n) const {
    Group<T> y = load_some_wide<T>(factors + k, n);
    LSK_EACH(i) y.v[i] *= x;
    return y;
  }

  template <class R, class S>
  LSK_MEMBER void row(const T* z, R r, S slope, T* g, int64_t n, int64_t target) const {
    const int64_t whole = n - n % kGroup<T>;
    const bool inside = target >= 0 && target < whole;
    const int64_t cut = inside ? target - target % kGroup<T> : whole;
    sweep(z, r, slope, g, 0, cut);
    if (inside) {
      piece(z, r, slope, g, cut, cut + kGroup<T>, target);
      sweep(z, r, slope, g, cut + kGroup<T>, whole);
    }
    piece(z, r, slope, g, whole, n, target);
  }
};

template <class T>
void gradient(const void* z, void* g, int64_t n, int64_t target, const GradientRow& row) {
  const T* x = static_cast<const T*>(z);
  T* out = static_cast<T*>(g);
  if (row.penalty != 0)
    Gradient<T, Vec<T>, true>(row).row(x, nullptr, nullptr, out, n, target);
  else if (row.scale == 1 && row.mass == 1)
    Gradient<T, One>(row).row(x, nullptr, nullptr, out, n, target);
  else
    Gradient<T, Vec<T>>(row).row(x, nullptr, nullptr, out, n, target);
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
