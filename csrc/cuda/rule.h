// The gradient of a class, from what is known of its row. The formulas are row_math.h's.
#pragma once

#include "rows.h"

namespace lsk {

// What the gradient of a row needs to know of all of it: entry k is factor·slope·((M' + penalty·log p)·p - q).
template <class T, bool kGeneral>
struct Rule {
  using V = Acc<T>;
  const Given<T, kGeneral>& given;
  V zmax, logsum, mass, factor, a, b;
  V of_p, of_rest, of_target, shift;  // without options an entry is fma(2^(log2e·(z - zmax) + shift), of_p, -of_rest)

  __device__ Rule(const Given<T, kGeneral>& g, int64_t row, V zmax_, V logsum_, V mass_, V count)
      : given(g), zmax(zmax_), logsum(logsum_), mass(mass_) {
    const Call& call = g.call;
    const Weights<V> w = call.row_weights<V>(row, count);
    const bool good = call.valid(row);
    a = w.a;
    b = w.b;
    factor = good ? call.scale.get<V>(row) : V(NAN);
    if (!(kGeneral && call.grad_of_target)) factor *= given.scale;
    mass += 2 * static_cast<V>(call.z_loss) * (zmax + logsum);
    of_p = factor * mass, of_rest = factor * b, of_target = factor * a, shift = -logsum * V(kLog2e);
  }

  template <int N>
  __device__ Lanes<V, N> at(const Lanes<V, N>& x, int64_t k) const {
    if (kGeneral) return with_options(x, k, 0);
    Lanes<V, N> g;
    LSK_LANES(j) {
      const V p = power_of_2(fma(x.v[j] - zmax, V(kLog2e), shift));
      g.v[j] = fma(p, of_p, -of_rest);
    }
    return g;
  }
  // Of the index target, whose entry at() takes for any other's.
  __device__ V at_target(V x, int64_t y) const {
    const Lanes<V, 1> only = {{x}};
    if (!kGeneral) return at(only, y).v[0] - of_target;
    return with_options(only, y, a * given.call.weight.template get<V>(y)).v[0];
  }

 private:
  template <int N>
  __device__ Lanes<V, N> with_options(const Lanes<V, N>& x, int64_t k, V more) const {
    const Call& call = given.call;
    Lanes<V, N> q = given.template of<N>(call.rest, k), g, t = {}, w = {};
    if (call.probabilities) t = given.template t<N>(k), w = given.template of<N>(call.weight, k);
    V z[N];
    LSK_LANES(j) {
      z[j] = given.transformed(x.v[j]);
      q.v[j] = more + (call.finite && z[j] == -V(INFINITY) ? V(0) : b * q.v[j]);
      if (call.probabilities) q.v[j] += a * (w.v[j] * t.v[j]);
    }
    LSK_LANES(j) {
      const V logp = log_p(z[j], V(1), zmax, logsum), p = power_of_2(logp * V(kLog2e));
      const V d = call.penalty != 0 ? dz(mass, surprise(logp), p, q.v[j]) : dz(mass, p, q.v[j]);
      g.v[j] = factor * d * given.slope(x.v[j]);
      if (call.grad_of_target) {
        const V down = q.v[j] == 0 && z[j] == -V(INFINITY) ? V(0) : z[j] - zmax;
        g.v[j] = factor * a * w.v[j] * (logsum - down);
      }
    }
    return g;
  }
  __device__ V surprise(V logp) const { return static_cast<V>(given.call.penalty) * (logp < -V(1e4) ? -V(1e4) : logp); }
};

}  // namespace lsk
