// The maths of one row of logits, stated once for every C++ kernel; names are shared with the Triton and Python sides.
//
//   q = a·w·t + b·r      loss = M·logsum - Σ q·(z - zmax) + z_loss·lse² - penalty·H
//   dz = (M + 2·z_loss·lse + penalty·H + penalty·log p)·p - q
//
// with p = exp((z - zmax) - logsum), H = -Σ p·log p, M = Σ q, t the target (one-hot, or given), w the class weights and
// r = w·u·c what smoothing is spread over: class weights, prior and covered classes, each 1 where absent.
//
// V is float, double or a SIMD vector of them. Plain static templates, no ATen, no std::, so that g++ may compile this
// header once per instruction set without one copy replacing another at link time, and nvcc may compile it for a GPU.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define LSK_MEMBER __host__ __device__ __forceinline__
#else
#define LSK_MEMBER inline __attribute__((always_inline))
#endif
#define LSK_INLINE static LSK_MEMBER

namespace lsk {

enum Dtype { kFloat16, kBFloat16, kFloat32, kFloat64, kDtypes };

template <class V>
struct Weights {
  V a, b;
};

// e spread over n classes, or over all of them but the target; where there is no class to take it, it is not spread.
template <class V>
LSK_INLINE Weights<V> weights(V e, V n, bool others) {
  if (others) e = n > 1 ? e * n / (n - 1) : V{};
  return {1 - e, n != 0 ? e / n : V{}};
}

// A weight of exactly 0 switches its term off: 0·(-inf) must not be NaN.
template <class V>
LSK_INLINE V weighted(V weight, V x) {
  return weight == 0 ? V{} : weight * x;
}

// Σ v and Σ v·(z - shift) over the classes of a piece of a row.
template <class V>
struct Moments {
  V mass, dev;
};

// Σ e·(z - shift), Σ e·(z - shift)² and Σ e² with e = exp(z - shift).
template <class V>
struct Spread {
  V first, second, square;
};

// A piece of a row, with shift = origin(max).
template <class V>
struct Stats {
  V max, sum;  // max z, Σ exp(z - shift)
  Spread<V> spread;
  Moments<V> rest, wt, t;  // of r, w·t and t
  V cover;                 // Σ u·c
  int64_t best;            // first class with z = max
};

template <class V>
LSK_INLINE Stats<V> no_stats() {
  return {-V(INFINITY), 0, {0, 0, 0}, {0, 0}, {0, 0}, {0, 0}, 0, 0};
}

// A piece whose logits are all -inf is summed about 0: (-inf) - (-inf) would make a NaN of weights that are simply 0.
template <class V>
LSK_INLINE V origin(V max) {
  return max == -INFINITY ? V{} : max;
}

// The sum of an all -inf piece is 0, or a NaN that hides there: the same at any scale.
template <class V>
LSK_INLINE V rescale(V sum, V max, V new_max) {
  return max == new_max || max == -V(INFINITY) ? sum : sum * exp(max - new_max);
}

template <class V>
LSK_INLINE Moments<V> moved(Moments<V> m, V by) {
  return {m.mass, m.dev + m.mass * by};
}

template <class V>
LSK_INLINE Spread<V> spread_from(const Spread<V>& s, V sum, V max, V new_max) {
  const V by = origin(max) - origin(new_max);
  return {rescale(s.first + sum * by, max, new_max), rescale(s.second + (2 * s.first + sum * by) * by, max, new_max),
          rescale(rescale(s.square, max, new_max), max, new_max)};
}

// A piece with its sums taken about a maximum of at least its own.
template <class V>
LSK_INLINE Stats<V> seen_from(const Stats<V>& p, V max) {
  const V by = origin(p.max) - origin(max);
  return {max,
          rescale(p.sum, p.max, max),
          spread_from(p.spread, p.sum, p.max, max),
          moved(p.rest, by),
          moved(p.wt, by),
          moved(p.t, by),
          p.cover,
          p.best};
}

template <class V>
LSK_INLINE Moments<V> both(Moments<V> x, Moments<V> y) {
  return {x.mass + y.mass, x.dev + y.dev};
}

template <class V>
LSK_INLINE Stats<V> merge(const Stats<V>& p, const Stats<V>& q) {
  const V max = p.max < q.max ? q.max : p.max;
  const Stats<V> x = seen_from(p, max), y = seen_from(q, max);
  const bool second = p.max < q.max || (p.max == q.max && q.best < p.best);
  return {max,
          x.sum + y.sum,
          {x.spread.first + y.spread.first, x.spread.second + y.spread.second, x.spread.square + y.spread.square},
          both(x.rest, y.rest),
          both(x.wt, y.wt),
          both(x.t, y.t),
          x.cover + y.cover,
          second ? q.best : p.best};
}

template <class V>
LSK_INLINE V row_loss(V mass, V logsum, Weights<V> w, const Stats<V>& s, V z_loss) {
  const V lse = s.max + logsum;
  return mass * logsum - (weighted(w.a, s.wt.dev) + weighted(w.b, s.rest.dev)) + z_loss * lse * lse;
}

// -Σ p·log p
template <class V>
LSK_INLINE V entropy(V logsum, const Stats<V>& s) {
  return logsum - s.spread.first / s.sum;
}

// Σ p·z² - (Σ p·z)²; the class of the maximum alone makes it at least mean²/K about the maximum.
template <class V>
LSK_INLINE V variance(const Stats<V>& s) {
  const V mean = s.spread.first / s.sum, found = s.spread.second / s.sum - mean * mean;
  return found < 0 ? V(0) : found;
}

// Two rows of the same classes, a student's z and a teacher's t, at the temperature 1/cold.
template <class V>
struct Pair {
  Stats<V> student;                   // at temperature 1
  V warm, teacher_max, given, cross;  // Σ exp(cold·(z - max)); max t, Σ exp(cold·(t - max)) and that times the next
};  // difference, cold·((t - max t) - (z - max z))

template <class V>
LSK_INLINE Pair<V> no_pair() {
  return {no_stats<V>(), 0, -V(INFINITY), 0, 0};
}

template <class V>
LSK_INLINE Pair<V> pair_from(const Pair<V>& p, V max, V teacher_max, V cold) {
  const V by = cold * (origin(p.student.max) - origin(max)),
          by_t = cold * (origin(p.teacher_max) - origin(teacher_max));
  const V top_t = cold * p.teacher_max, new_t = cold * teacher_max;
  // Where the teacher's mass vanishes, a class that only the student masks counts no more.
  const V given = rescale(p.given, top_t, new_t);
  return {p.student, rescale(p.warm, cold * p.student.max, cold * max), teacher_max, given,
          given == 0 ? V(0) : rescale(p.cross + p.given * (by_t - by), top_t, new_t)};
}

template <class V>
LSK_INLINE Pair<V> merge(const Pair<V>& p, const Pair<V>& q, V cold) {
  const Stats<V> student = merge(p.student, q.student);
  const V top_t = p.teacher_max < q.teacher_max ? q.teacher_max : p.teacher_max;
  const Pair<V> x = pair_from(p, student.max, top_t, cold), y = pair_from(q, student.max, top_t, cold);
  return {student, x.warm + y.warm, top_t, x.given + y.given, x.cross + y.cross};
}

// Σ p_t·(log p_t - log p) at the temperature; rounding may leave a little below 0.
template <class V>
LSK_INLINE V divergence(const Pair<V>& p) {
  const V found = p.cross / p.given - (log(p.given) - log(p.warm));
  return found < 0 ? V(0) : found;
}

// zmax and logsum stay two numbers: their sum would lose the digits of logsum where the logits are large.
template <class V, class Scale>
LSK_INLINE V log_p(V x, Scale scale, V zmax, V logsum) {
  return (x * scale - zmax) - logsum;
}

// mass is M + 2·z_loss·lse + penalty·H, and `surprise` penalty·log p, finite where p is 0.
template <class V, class Mass>
LSK_INLINE V dz(Mass mass, V p, V q) {
  return mass * p - q;
}
template <class V>
LSK_INLINE V dz(V mass, V surprise, V p, V q) {
  return (mass + surprise) * p - q;
}

}  // namespace lsk
