// Kernels of distillation: two rows of logits at a time, the student's and the teacher's; see cpu_kernels.h.
#pragma once

#include "cpu_rows.h"

namespace lsk {
namespace {

template <class T>
LSK_INLINE Vec<T> highest(const T* x, int64_t n) {
  const Vec<T> lowest = splat<T>(-INFINITY);
  Vec<T> m = lowest;
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    const Group<T> v = load_some(x + k, count);
    LSK_EACH(i) m = larger(count < kGroup<T> ? (lanes_between<T>(i, 0, count) ? v.v[i] : lowest) : v.v[i], m);
  });
  Acc<T> max = -INFINITY;
  for (int l = 0; l < kWidth<T>; ++l) max = m[l] > max ? m[l] : max;
  return splat<T>(max);
}

// Σ exp without the terms of the maximum, which are counted: as in cpu_rows.h, they would cost the others their digits.
template <class T>
struct Exponentials {
  Vec<T> sum = {}, others = {};

  LSK_MEMBER void add(Vec<T> e, Signed<T> other) {
    sum += other ? e : Vec<T>{};
    others += other ? splat<T>(1) : Vec<T>{};
  }
  LSK_MEMBER double total(int64_t n) const {
    double all = double(n);
    for (int l = 0; l < kWidth<T>; ++l) all += double(sum[l]) - double(others[l]);
    return all;
  }
};

template <class T>
double total_of(Vec<T> v) {
  double all = 0;
  for (int l = 0; l < kWidth<T>; ++l) all += v[l];
  return all;
}

// kHard: the student's own loss at temperature 1 is asked for as well; kPrior: r is given.
template <class T, bool kHard, bool kPrior>
Pair<double> pair_block(const T* x, const T* t, const Acc<T>* r, int64_t n, double cold) {
  const Vec<T> top = highest(x, n), top_t = highest(t, n), beta = operand<T>(cold);
  const Vec<T> m = splat<T>(origin(top[0])), m_t = splat<T>(origin(top_t[0]));
  Exponentials<T> plain, warm, given;
  Vec<T> cross = {}, rest = {}, mass = {};
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    const Group<T> z = load_some(x + k, count), u = load_some(t + k, count);
    Group<T> w = {splat<T>(1), splat<T>(1), splat<T>(1), splat<T>(1)};
    if (kPrior) w = load_some_wide<T>(r + k, count);
    LSK_EACH(i) {
      const Signed<T> in = count < kGroup<T> ? lanes_between<T>(i, 0, count) : ~Signed<T>{};
      const Vec<T> d = z.v[i] - m, dt = u.v[i] - m_t;
      const Signed<T> other = (Signed<T>)(z.v[i] != m) & in, other_t = (Signed<T>)(u.v[i] != m_t) & in;
      const Vec<T> e_t = exp_nonpositive(dt * beta, in);
      given.add(e_t, other_t);
      warm.add(exp_nonpositive(d * beta, in), other);
      cross += e_t == 0 ? Vec<T>{} : e_t * ((dt - d) * beta);
      if (kHard) {
        plain.add(exp_nonpositive(d, in), other);
        const Vec<T> q = in ? w.v[i] : Vec<T>{};
        rest += q == 0 ? Vec<T>{} : q * d;
        if (kPrior) mass += q;
      }
    }
  });
  Pair<double> p = no_pair<double>();
  p.student.max = top[0];
  p.teacher_max = top_t[0];
  p.warm = warm.total(n);
  p.given = given.total(n);
  p.cross = total_of<T>(cross);
  if (kHard) {
    p.student.sum = plain.total(n);
    p.student.rest = {kPrior ? total_of<T>(mass) : double(n), total_of<T>(rest)};
  }
  return p;
}

template <class T>
Pair<double> pair_stats(const void* student, const void* teacher, const void* prior, int64_t n, double cold,
                        bool hard) {
  const T *x = static_cast<const T*>(student), *t = static_cast<const T*>(teacher);
  const Acc<T>* r = static_cast<const Acc<T>*>(prior);
  if (!hard) return pair_block<T, false, false>(x, t, r, n, cold);
  return r == nullptr ? pair_block<T, true, false>(x, t, r, n, cold) : pair_block<T, true, true>(x, t, r, n, cold);
}

template <class T, bool kHard, bool kPrior>
void pair_sweep(const T* x, const T* t, const Acc<T>* r, T* g, int64_t n, const PairRow& row) {
  const Vec<T> beta = operand<T>(row.cold), m = operand<T>(row.zmax), m_t = operand<T>(row.teacher_max);
  const Vec<T> logsum = operand<T>(row.logsum), warm = operand<T>(row.warm), given = operand<T>(row.given);
  const Vec<T> soft = operand<T>(row.soft), hard = operand<T>(row.hard), q_rest = operand<T>(row.q_rest);
  const Vec<T> mass = operand<T>(row.mass);
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    Group<T> z = load_some(x + k, count);
    const Group<T> u = load_some(t + k, count);
    Group<T> q = {q_rest, q_rest, q_rest, q_rest};
    if (kPrior) {
      q = load_some_wide<T>(r + k, count);
      LSK_EACH(i) q.v[i] *= q_rest;
    }
    LSK_EACH(i) {
      const Vec<T> d = z.v[i] - m, p_t = exp_nonpositive((u.v[i] - m_t) * beta - given);
      Vec<T> grad = soft == 0 ? Vec<T>{} : soft * (exp_nonpositive(d * beta - warm) - p_t);
      if (kHard) grad += hard * dz(mass, exp_nonpositive(d - logsum), q.v[i]);
      z.v[i] = grad;
    }
    store_some(g + k, count, z);
  });
}

template <class T>
void pair_gradient(const void* student, const void* teacher, const void* prior, void* grad, int64_t n,
                   const PairRow& row) {
  const T *x = static_cast<const T*>(student), *t = static_cast<const T*>(teacher);
  const Acc<T>* r = static_cast<const Acc<T>*>(prior);
  T* g = static_cast<T*>(grad);
  if (row.hard == 0)
    pair_sweep<T, false, false>(x, t, r, g, n, row);
  else if (r == nullptr)
    pair_sweep<T, true, false>(x, t, r, g, n, row);
  else
    pair_sweep<T, true, true>(x, t, r, g, n, row);
  if (row.target < 0) return;
  // The target's own entry again, with its weight.
  const auto at = [&](const T* p) { return double(load_part(p + row.target, 1).v[0][0]); };
  const double d = at(x) - row.zmax, d_t = at(t) - row.teacher_max;
  const double soft = weighted(row.soft, exp(d * row.cold - row.warm) - exp(d_t * row.cold - row.given));
  const Vec<T> entry = operand<T>(soft + row.hard * dz(row.mass, exp(d - row.logsum), row.q_target));
  store_part(g + row.target, 1, Group<T>{entry, entry, entry, entry});
}

template <class T>
constexpr PairKernels pair_kernels() {
  return {pair_stats<T>, pair_gradient<T>};
}

}  // namespace
}  // namespace lsk
