// Rows of few classes: a lane is a row, so that no vector is mostly padding and the logarithm of a row, its loss and
// its weights are vectors too. A block of rows lies class by class in the first-level cache.
#pragma once

#include "cpu_general.h"

namespace lsk {
namespace {

// log(1 + t) for t >= 0, and -inf for t = -1; 2 ulp, relative, which 1 + t would lose where t is small.
//
// 1 + t = 2^n·(1 + f) with 1 + f in [sqrt ½, sqrt 2), log(1 + f) = 2·artanh s with s = f / (2 + f): the series ends
// where its next term is 4e-9 of the sum. What 1 + t was rounded by goes into f.
LSK_INLINE Vec<float> log_one_plus(Vec<float> t) {
  using S = Signed<float>;
  const Vec<float> u = 1 + t;
  const S n = ((S)u - 0x3f3504f3) >> 23;
  const Vec<float> m = (Vec<float>)((S)u - (n << 23)), down = (Vec<float>)((127 - n) << 23);
  const Vec<float> s = ((m - 1) + (t - (u - 1)) * down) / (1 + m), q = s * s;
  const Vec<float> series = q * (2.f / 3 + q * (2.f / 5 + q * (2.f / 7 + q * (2.f / 9))));
  const Vec<float> doublings = __builtin_convertvector(n, Vec<float>);
  const Vec<float> log = doublings * 0x1.63p-1f + (2 * s + (s * series - doublings * 0x1.bd0106p-13f));
  return u == 0 ? splat<float>(-INFINITY) : log;
}
LSK_INLINE Vec<double> log_one_plus(Vec<double> t) {  // the next term is 6e-19 of the sum
  using U = Bits<double>;
  const Vec<double> u = 1 + t;
  const U n = ((U)u - 0x3fe6a09e667f3bcd) >> 52;  // that of u >= 1 is not below 0, and shifts without a sign
  const Vec<double> m = (Vec<double>)((U)u - (n << 52)), down = (Vec<double>)((1023 - n) << 52);
  const Vec<double> s = ((m - 1) + (t - (u - 1)) * down) / (1 + m), q = s * s;
  const Vec<double> far = 2. / 13 + q * (2. / 15 + q * (2. / 17 + q * (2. / 19 + q * (2. / 21))));
  const Vec<double> series = q * (2. / 3 + q * (2. / 5 + q * (2. / 7 + q * (2. / 9 + q * (2. / 11 + q * far)))));
  const Vec<double> doublings = (Vec<double>)(n + 0x4338000000000000) - 0x1.8p52;
  const Vec<double> log = doublings * 0x1.62e42feep-1 + (2 * s + (s * series + doublings * 0x1.a39ef35793c76p-33));
  return u == 0 ? splat<double>(-INFINITY) : log;
}

// See TargetCount.
TargetCount count_targets(const int64_t* target, int64_t n, int64_t ignored, int64_t k) {
  using V = Signed<double>;
  V counted = {}, outside = {};
  for (int64_t i = 0; i < n; i += kWidth<double>) {
    V y = V{} + ignored;
    if (i + kWidth<double> <= n)
      __builtin_memcpy(&y, target + i, sizeof y);
    else
      __builtin_memcpy(&y, target + i, sizeof(int64_t) * (n - i));
    const V counts = y != ignored;
    counted -= counts;
    outside |= counts & ((y < 0) | (y >= k));
  }
  TargetCount found = {};
  for (int l = 0; l < kWidth<double>; ++l) {
    found.counted += counted[l];
    found.outside |= outside[l] != 0;
  }
  return found;
}

// Numbers of n <= kWidth rows, which lie behind each other, or of which there is one for all.
template <class T>
LSK_INLINE Vec<T> of_rows(const Column& column, int64_t row, int64_t n) {
  if (!column) return splat<T>(T(column.fallback));
  const T* p = reinterpret_cast<const T*>(column.data);
  return column.stride == 0 ? splat<T>(p[0]) : pick(p + row, 1, n);
}

template <class T>
LSK_INLINE void set_rows(const Column& column, int64_t row, int64_t n, Vec<T> values) {
  if (column) place(reinterpret_cast<T*>(column.data) + row, 1, n, values);
}

// The targets of n rows: -1 where they are ignored, K where they are probabilities; the weights w and r of their
// classes, and those of every row, a and b.
template <class T>
struct Targets {
  Signed<T> y;
  Vec<T> weight = splat<T>(1), rest = splat<T>(1);
  Weights<Vec<T>> w;

  Targets(const Call& call, Vec<T> count, int64_t row, int64_t n) {
    w = weights(of_rows<T>(call.eps, row, n), count, call.others);
    y = Signed<T>{} + typename Lanes<T>::Signed(call.k);
    if (call.target == nullptr) return;
    using Wide = typename VectorOf<int64_t, kWidth<T>>::type;
    Wide class_of = Wide{} + call.ignore_index;
    __builtin_memcpy(&class_of, call.target + row, sizeof(int64_t) * (n < kWidth<T> ? n : kWidth<T>));
    y = __builtin_convertvector(class_of == call.ignore_index ? Wide{} - 1 : class_of, Signed<T>);
    if (call.weight) weight = of_classes(call.weight);
    if (call.rest) rest = of_classes(call.rest);
  }

 private:
  Vec<T> of_classes(const Column& column) const {
    T lanes[kWidth<T>];
    for (int l = 0; l < kWidth<T>; ++l) lanes[l] = y[l] < 0 ? T(0) : column.get<T>(y[l]);
    return widen(lanes);
  }
};

// Classes that are summed before their sum is added: 256 terms, one by one, lost as much as the tests allow (ε = 1).
constexpr int64_t kTogether = 16;

// Sums over the classes of a vector of rows, whose logits lie `pitch` apart, and probabilities t where kSoft. As in
// Sums, the terms of the maximum are counted and not added.
template <class T, bool kSoft>
struct Columns {
  Stats<Vec<T>> stats = {};
  Vec<T> shift, beyond;  // origin(max); Σ exp(z - shift) - 1

  // With `keep` Σ's terms exp(z - shift) take the place of z.
  Columns(T* z, const T* t, int64_t pitch, const Targets<T>& target, const Call& call, bool keep) {
    const T *rest = reinterpret_cast<const T*>(call.rest.data), *weight = reinterpret_cast<const T*>(call.weight.data);
    Vec<T> top = splat<T>(-INFINITY), exps = {}, tops = {}, dev = {}, hot = {};
    Moments<Vec<T>> wt = {}, given = {};
    for (int64_t c = 0; c < call.k; ++c) top = larger(widen(z + c * pitch), top);
    shift = origin(top);
    // Of two classes one is the maximum: its difference is 0, and the sum of both is the other's, or NaN.
    const bool two = call.k == 2;
    const Vec<T> other_of_two = two ? exp_nonpositive((widen(z) - shift) + (widen(z + pitch) - shift)) : exps;
    for (int64_t c = 0; c < call.k;) {
      Vec<T> some_exps = {}, some_dev = {};
      Moments<Vec<T>> some_wt = {}, some_t = {};
      for (const int64_t end = c + kTogether < call.k ? c + kTogether : call.k; c < end; ++c) {
        const Vec<T> d = widen(z + c * pitch) - shift;
        const auto other = d != 0;
        const Vec<T> e = two ? (other ? other_of_two : splat<T>(1)) : exp_nonpositive(d);
        if (keep) narrow(z + c * pitch, e);
        some_exps += other ? e : Vec<T>{};
        tops = other ? tops : tops + 1;
        const T share = rest == nullptr ? 1 : rest[c];
        if (share != 0) some_dev += share * d;
        if constexpr (kSoft) {
          const Vec<T> q = widen(t + c * pitch);
          some_t = both(some_t, {q, weighted(q, d)});
          if (weight != nullptr) {
            const Vec<T> wq = weight[c] * q;
            some_wt = both(some_wt, {wq, weighted(wq, d)});
          }
        } else {
          hot = target.y == typename Lanes<T>::Signed(c) ? d : hot;
        }
      }
      exps += some_exps;
      dev += some_dev;
      given = both(given, some_t);
      wt = both(wt, some_wt);
    }
    stats.max = top;
    stats.rest.dev = dev;
    stats.wt = kSoft ? weight == nullptr ? given : wt : Moments<Vec<T>>{target.weight, weighted(target.weight, hot)};
    stats.t = kSoft ? given : Moments<Vec<T>>{splat<T>(1), hot};
    beyond = (tops - 1) + exps;
  }
};

// The first class of the maximum; NaNs are none, and a row of them has class 0.
template <class T>
LSK_INLINE void predict(const T* z, int64_t pitch, int64_t k, int64_t n, int64_t* prediction) {
  Vec<T> top = splat<T>(-INFINITY);
  Signed<T> best = {};
  for (int64_t c = 0; c < k; ++c) {
    const Vec<T> x = widen(z + c * pitch);
    best = x > top ? Signed<T>{} + typename Lanes<T>::Signed(c) : best;
    top = larger(x, top);
  }
  for (int64_t l = 0; l < (n < kWidth<T> ? n : kWidth<T>); ++l) prediction[l] = best[l];
}

// Writes the gradients of a vector of rows over z, from which `p` makes the probabilities: there are the logits, or
// what Columns left. `mass` includes the part of the z-loss.
template <class T, class P>
LSK_INLINE void gradients(const Call& call, T* z, const T* t, int64_t pitch, int64_t row, int64_t n,
                          const Targets<T>& target, Vec<T> mass, const P& p) {
  const T *rest = reinterpret_cast<const T*>(call.rest.data), *weight = reinterpret_cast<const T*>(call.weight.data);
  const Vec<T> factor = of_rows<T>(call.scale, row, n) * T(call.logit_scale);
  const Vec<T> q_target = target.w.a * target.weight + target.w.b * target.rest;
  const auto kept = target.y >= 0;
  for (int64_t c = 0; c < call.k; ++c) {
    Vec<T> q = rest == nullptr ? target.w.b : target.w.b * rest[c];
    if (t != nullptr)
      q += target.w.a * (weight == nullptr ? widen(t + c * pitch) : weight[c] * widen(t + c * pitch));
    else
      q = target.y == typename Lanes<T>::Signed(c) ? q_target : q;
    const Vec<T> d = dz(mass, p(widen(z + c * pitch)), q);
    narrow(z + c * pitch, kept ? factor * d : Vec<T>{});
  }
}

template <class T, bool kSoft>
LSK_INLINE void forward_of(const Call& call, const FewRows& block) {
  const Vec<T> covered = splat<T>(call.prior ? 1 : call.k), none = {};
  for (int64_t r = 0; r < block.rows; r += kWidth<T>) {
    T* z = static_cast<T*>(block.z) + r;
    const T* t = kSoft ? static_cast<const T*>(block.t) + r : nullptr;
    const int64_t row = block.row + r, n = block.rows - r;
    const Targets<T> target(call, covered, row, n);
    if (call.prediction != nullptr) predict(z, block.pitch, call.k, n, call.prediction + row);
    const Columns<T, kSoft> sums(z, t, block.pitch, target, call, bool(call.grad));
    const Stats<Vec<T>>& s = sums.stats;
    const Vec<T> logsum = log_one_plus(sums.beyond), top = s.max;
    const Weights<Vec<T>> w = target.w;
    const Vec<T> mass = kSoft || call.rest ? w.a * s.wt.mass + w.b * T(block.rest_mass) : splat<T>(1);
    const auto out = target.y < 0, unread = call.prediction == nullptr ? out : out & 0;
    set_rows<T>(call.zmax, row, n, unread ? none : top);
    set_rows<T>(call.logsum, row, n, unread ? none : logsum);
    set_rows<T>(call.mass, row, n, unread ? none : mass);
    set_rows<T>(call.count, row, n, unread ? none : covered);
    const Vec<T> loss = row_loss(mass, logsum, w, s, splat<T>(call.z_loss));
    set_rows<T>(call.loss, row, n, out ? none : loss);
    set_rows<T>(call.nll, row, n, out ? none : s.t.mass * logsum - s.t.dev);
    if (call.grad) {
      const Vec<T> share = 1 / (1 + sums.beyond);
      gradients(call, z, t, block.pitch, row, n, target, mass + T(2 * call.z_loss) * (top + logsum),
                [&](Vec<T> e) __attribute__((always_inline)) { return e * share; });
    }
  }
}

template <class T>
void few_forward(const Call& call, const FewRows& block) {
  block.t == nullptr ? forward_of<T, false>(call, block) : forward_of<T, true>(call, block);
}

template <class T>
void few_backward(const Call& call, const FewRows& block) {
  for (int64_t r = 0; r < block.rows; r += kWidth<T>) {
    const int64_t row = block.row + r, n = block.rows - r;
    const T* t = block.t == nullptr ? nullptr : static_cast<const T*>(block.t) + r;
    const Targets<T> target(call, of_rows<T>(call.count, row, n), row, n);
    const Vec<T> zmax = of_rows<T>(call.zmax, row, n), logsum = of_rows<T>(call.logsum, row, n);
    const Vec<T> mass = of_rows<T>(call.mass, row, n) + T(2 * call.z_loss) * (zmax + logsum);
    gradients(call, static_cast<T*>(block.z) + r, t, block.pitch, row, n, target, mass,
              [&](Vec<T> z) __attribute__((always_inline)) { return exp_nonpositive((z - zmax) - logsum); });
  }
}

}  // namespace
}  // namespace lsk
