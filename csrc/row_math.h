// The maths of one row of logits, stated once for every C++ kernel; names are shared with the Triton and Python sides.
//
//   q = a·[k = y] + b      loss = logsum - Σ q·(z - zmax)      dz = p - q      p = exp((z - zmax) - logsum)
//
// V is float, double or a SIMD vector of them. Plain static templates, no ATen, no std::, so that g++ may compile this
// header once per instruction set without one copy replacing another at link time, and nvcc may compile it for a GPU.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define LSK_MEMBER __host__ __device__ __forceinline__
#else
#define LSK_MEMBER inline __attribute__((always_inline))
#endif
#define LSK_INLINE static LSK_MEMBER

namespace lsk {

template <class V>
struct Weights {
  V a, b;
};

template <class V>
LSK_INLINE Weights<V> weights(V e, V K) {
  return {1 - e, e / K};
}

// A piece of a row: max z, Σ exp(z - shift), Σ (z - shift) and the number of classes, where shift = origin(max).
template <class V>
struct Stats {
  V max, sum, dev, n;
};

// A piece whose logits are all -inf is summed about 0: (-inf) - (-inf) would make a NaN of weights that are simply 0.
template <class V>
LSK_INLINE V origin(V max) {
  return max == -V(INFINITY) ? V(0) : max;
}

// The sum of an all -inf piece is 0, or a NaN that hides there: the same at any scale.
template <class V>
LSK_INLINE V rescale(V sum, V max, V new_max) {
  return max == new_max || max == -V(INFINITY) ? sum : sum * exp(max - new_max);
}

template <class V>
LSK_INLINE Stats<V> merge(Stats<V> p, Stats<V> q) {
  const V max = p.max < q.max ? q.max : p.max;
  const V shift = origin(max);
  return {max, rescale(p.sum, p.max, max) + rescale(q.sum, q.max, max),
          (p.dev + p.n * (origin(p.max) - shift)) + (q.dev + q.n * (origin(q.max) - shift)), p.n + q.n};
}

// A weight of exactly 0 switches its term off: 0·(-inf) must not be NaN.
template <class V>
LSK_INLINE V weighted(V weight, V x) {
  return weight == 0 ? V(0) : weight * x;
}

// zy = z_y - zmax, dev = Σ (z - zmax).
template <class V>
LSK_INLINE V row_loss(V logsum, Weights<V> w, V zy, V dev) {
  return logsum - (weighted(w.a, zy) + weighted(w.b, dev));
}

// zmax and logsum stay two numbers: their sum would lose the digits of logsum where the logits are large.
template <class V>
LSK_INLINE V log_p(V z, V zmax, V logsum) {
  return (z - zmax) - logsum;
}

template <class V>
LSK_INLINE V dz(V p, V q) {
  return p - q;
}

}  // namespace lsk
