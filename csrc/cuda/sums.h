// What is summed over a row: by a thread, a warp, and of the target. The formulas are row_math.h's.
#pragma once

#include "rows.h"

namespace lsk {

template <class V>
LSK_DEVICE void count(Moments<V>& m, V weight, V dev) {
  m.mass += weight;
  m.dev += weighted(weight, dev);
}

template <class V>
LSK_DEVICE void count(Spread<V>& s, V e, V dev, bool all) {
  const V first = weighted(e, dev);
  s.first += first;
  if (!all) return;
  s.second += weighted(first, dev);
  s.square += e * e;
}

// The sums of one thread. That of exponentials is held in two numbers: beside the 1 of a maximum each of thousands of
// small terms would be rounded, and they are all that the loss of a confident row consists of.
template <class T, bool kGeneral>
class Sums {
 public:
  using V = Acc<T>;

  __device__ Stats<V> stats() const {
    Stats<V> all = s;
    all.sum += low;
    return all;
  }

  // C vectors, the first of them the i-th of a part and of class k on, the next of k + step on.
  template <int C>
  __device__ void add(const Bits16 (&bits)[C], int i, int64_t k, int64_t step, const Given<T, kGeneral>& given) {
    constexpr int N = kLanes<T>;
    V z[C][N];
    LSK_GROUPS(c) {
      const Lanes<V, N> x = unpack<T>(bits[c]);
      LSK_LANES(j) z[c][j] = given.transformed(x.v[j]);
    }
    if (add_groups(z, k, step, given)) highest = i;
  }
  // Finds the first class with the maximum, of the vectors that `load` gives again: C were taken together.
  template <int C, class Load>
  __device__ void find(const Load& load, int count, int threads, int64_t k, const Given<T, kGeneral>& given) {
    constexpr int N = kLanes<T>;
    if (given.call.prediction == nullptr || highest < 0) return;
    for (int i = highest + (C - 1) * threads; i >= highest; i -= threads) {
      if (i >= count) continue;
      const Lanes<V, N> x = unpack<T>(load(i));
      for (int j = N - 1; j >= 0; --j)
        if (given.transformed(x.v[j]) == s.max) s.best = k + int64_t(i) * N + j;
    }
  }
  // An edge, after the vectors; it may come before them in the row.
  __device__ void add_one(V x, int64_t k, const Given<T, kGeneral>& given) {
    const V z[1][1] = {{given.transformed(x)}};
    const bool as_high = z[0][0] == s.max;
    if (add_groups(z, k, 0, given) || (as_high && k < s.best)) s.best = k;
  }

 private:
  Stats<V> s = no_stats<V>();
  V low = 0;         // what rounding lost of s.sum
  int highest = -1;  // vector from which on the maximum was met

  // Whether they have a new maximum. No branch depends on that: each of a warp's threads meets its maxima elsewhere.
  template <int C, int N>
  __device__ bool add_groups(const V (&z)[C][N], int64_t k, int64_t step, const Given<T, kGeneral>& given) {
    V top = -V(INFINITY);
    LSK_GROUPS(c) LSK_LANES(j) top = fmax(top, z[c][j]);  // not a NaN, which the sums will show
    const V max = fmax(s.max, top);
    const bool higher = max > s.max;
    const V shift = origin(max), by = origin(s.max) - shift, factor = power_of_2((s.max - shift) * V(kLog2e));
    if (kGeneral && given.call.spreads()) s.spread = spread_from(s.spread, s.sum, s.max, max);
    s.max = max;
    s.sum *= factor;
    low *= factor;
    move(s.rest, by);
    if (kGeneral) move(s.wt, by), move(s.t, by);
    V sums[C], devs[C];  // of few terms each, so that the long sums have fewer
    LSK_GROUPS(c) {
      V sum = 0, dev = 0, down[N];
      LSK_LANES(j) {
        down[j] = z[c][j] - shift;
        const V e = power_of_2(down[j] * V(kLog2e));
        sum += e;
        dev += down[j];
        if (kGeneral && given.call.spreads()) count(s.spread, e, down[j], bool(given.call.variance));
      }
      sums[c] = sum, devs[c] = dev;
      if (kGeneral) add_weights<N>(z[c], down, k + c * step, given);
    }
    for (int half = C / 2; half > 0; half /= 2)
      _Pragma("unroll") for (int c = 0; c < half; ++c) sums[c] += sums[c + half], devs[c] += devs[c + half];
    add_exact(sums[0]);
    if (!kGeneral) s.rest.dev += devs[0], s.rest.mass += C * N;
    return higher;
  }
  __device__ static void move(Moments<V>& m, V by) { m.dev = fma(m.mass, by, m.dev); }
  __device__ void add_exact(V x) {
    const V sum = s.sum + x, of_x = sum - s.sum;
    low += (s.sum - (sum - of_x)) + (x - of_x);
    s.sum = sum;
  }
  template <int N>
  __device__ void add_weights(const V* z, const V* down, int64_t k, const Given<T, kGeneral>& given) {
    const Call& call = given.call;
    const Lanes<V, N> rest = given.template of<N>(call.rest, k);
    LSK_LANES(j) count(s.rest, call.finite && z[j] == -V(INFINITY) ? V(0) : rest.v[j], down[j]);
    if (call.finite) {
      const Lanes<V, N> prior = given.template of<N>(call.prior, k);
      LSK_LANES(j) s.cover += z[j] == -V(INFINITY) ? V(0) : prior.v[j];
    }
    if (!call.probabilities) return;
    const Lanes<V, N> t = given.template t<N>(k), w = given.template of<N>(call.weight, k);
    LSK_LANES(j) {
      count(s.t, t.v[j], down[j]);
      count(s.wt, w.v[j] * t.v[j], down[j]);
    }
  }
};

template <class V>
LSK_DEVICE V warp_sum(V x) {
  for (int mask = 16; mask > 0; mask /= 2) x += exchange(x, mask);
  return x;
}

// The sums of a warp's lanes, in each of them; the first class with the maximum where `finds`.
template <bool kGeneral, class V>
LSK_DEVICE Stats<V> of_warp(Stats<V> s, bool finds) {
  if (!kGeneral) s = {s.max, s.sum, {0, 0, 0}, s.rest, {0, 0}, {0, 0}, 0, s.best};  // so that nothing is made of zeros
  const V max = warp_max(s.max);
  if (finds) {
    int64_t best = s.max == max ? s.best : INT64_MAX;
    for (int mask = 16; mask > 0; mask /= 2) {
      const int64_t other = exchange(best, mask);
      best = other < best ? other : best;
    }
    s.best = best;
  }
  s = seen_from(s, max);
  s.sum = warp_sum(s.sum);
  s.rest = {warp_sum(s.rest.mass), warp_sum(s.rest.dev)};
  if (!kGeneral) return s;
  s.spread = {warp_sum(s.spread.first), warp_sum(s.spread.second), warp_sum(s.spread.square)};
  s.wt = {warp_sum(s.wt.mass), warp_sum(s.wt.dev)};
  s.t = {warp_sum(s.t.mass), warp_sum(s.t.dev)};
  s.cover = warp_sum(s.cover);
  return s;
}

// The index target's share, which no thread's sums hold.
template <class T, bool kGeneral>
struct Hot {
  using V = Acc<T>;
  const Given<T, kGeneral>& given;
  int64_t y = -1;  // the target, where it counts
  V x = 0;         // its logit, once read: before a gradient may overwrite it

  __device__ Hot(int64_t row, const Given<T, kGeneral>& g) : given(g) {
    const Call& call = given.call;
    if (call.target != nullptr && !call.ignored(row) && call.valid(row)) y = call.target[row];
  }
  __device__ void read(const Line<T>& line) {
    if (y >= 0) x = line.at(y);
  }
  __device__ void join(Stats<V>& s) const {
    if (y < 0) return;
    const V w = kGeneral ? given.call.weight.template get<V>(y) : V(1);
    const V down = given.transformed(x) - origin(s.max);
    s.t = {1, down};
    s.wt = {w, weighted(w, down)};
  }
};

}  // namespace lsk
