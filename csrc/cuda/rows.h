// A row of logits on a GPU: how its threads read it, what they sum and what they write. The formulas are row_math.h's.
#pragma once

#if defined(__CUDACC__)
#include "device.h"
#else
#include <cuda_shim/device.h>  // from tests/, on a CPU
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../call.h"

namespace lsk {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>  // the arithmetic of a dtype
using Acc = typename AccOf<T>::type;

template <class T>
constexpr Dtype kDtypeOf = kFloat32;
template <>
constexpr Dtype kDtypeOf<Half> = kFloat16;
template <>
constexpr Dtype kDtypeOf<BFloat16> = kBFloat16;
template <>
constexpr Dtype kDtypeOf<double> = kFloat64;

template <class T>  // elements of one access
constexpr int kLanes = 16 / sizeof(T);

// N adjacent classes of a row; 1 where no more can be accessed at once.
template <class V, int N>
struct Lanes {
  V v[N];
};
#define LSK_LANES(j) _Pragma("unroll") for (int j = 0; j < N; ++j)

template <class T>
LSK_DEVICE Lanes<Acc<T>, kLanes<T>> unpack(Bits16 bits) {
  constexpr int N = kLanes<T>;
  T elements[N];
  memcpy(elements, &bits, sizeof bits);
  Lanes<Acc<T>, N> x;
  LSK_LANES(j) x.v[j] = static_cast<Acc<T>>(elements[j]);
  return x;
}

template <class T>
LSK_DEVICE Bits16 pack(const Lanes<Acc<T>, kLanes<T>>& x) {
  constexpr int N = kLanes<T>;
  T elements[N];
  LSK_LANES(j) elements[j] = static_cast<T>(x.v[j]);
  Bits16 bits;
  memcpy(&bits, elements, sizeof bits);
  return bits;
}

LSK_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// N numbers that are read by many rows, and so from a cache.
template <int N, class V>
LSK_DEVICE Lanes<V, N> load_classes(const V* p) {
  Lanes<V, N> x;
  if (N * sizeof(V) % 16 == 0 && aligned(p)) {
    _Pragma("unroll") for (int i = 0; i < int(N * sizeof(V) / 16); ++i) {
      const Bits16 bits = load16(p + i * kLanes<V>);
      memcpy(&x.v[i * kLanes<V>], &bits, sizeof bits);
    }
  } else {
    LSK_LANES(j) x.v[j] = p[j];
  }
  return x;
}

// A row of a tensor whose dtype the kernel was not compiled for, or whose accesses are narrow.
template <class V>
struct Narrow {
  char* data;
  int64_t step;  // bytes
  Dtype dtype;

  __device__ Narrow(const View& view, int64_t row)
      : data(view.at(row, 0)), step(view.class_stride * view.element), dtype(view.dtype) {}

  __device__ V load(int64_t k) const {
    const char* p = data + k * step;
    switch (dtype) {
      case kFloat16:
        return static_cast<V>(static_cast<float>(*reinterpret_cast<const Half*>(p)));
      case kBFloat16:
        return static_cast<V>(static_cast<float>(*reinterpret_cast<const BFloat16*>(p)));
      case kFloat32:
        return static_cast<V>(*reinterpret_cast<const float*>(p));
      default:
        return static_cast<V>(*reinterpret_cast<const double*>(p));
    }
  }
  __device__ void store(int64_t k, V x) const {
    char* p = data + k * step;
    switch (dtype) {
      case kFloat16:
        *reinterpret_cast<Half*>(p) = static_cast<float>(x);
        return;
      case kBFloat16:
        *reinterpret_cast<BFloat16*>(p) = static_cast<float>(x);
        return;
      case kFloat32:
        *reinterpret_cast<float*>(p) = static_cast<float>(x);
        return;
      default:
        *reinterpret_cast<double*>(p) = x;
    }
  }
};

// A row of logits: `vectors` groups of kLanes adjacent classes on 16-byte boundaries, and the classes before and behind
// them, the edges; all of them where classes are not adjacent.
template <class T>
struct Line {
  const T* x;
  int64_t step, n, head, vectors;

  __device__ Line(const View& view, int64_t row, int64_t k)
      : x(reinterpret_cast<const T*>(view.at(row, 0))), step(view.class_stride), n(k), head(k), vectors(0) {
    if (step != 1) return;
    const int64_t before = (16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T);
    head = before < n ? before : n;
    vectors = (n - head) / kLanes<T>;
  }
  __device__ int64_t edges() const { return n - vectors * kLanes<T>; }
  __device__ int64_t class_of_edge(int64_t e) const { return e < head ? e : e + vectors * kLanes<T>; }
  __device__ int64_t class_of_vector(int64_t i) const { return head + i * kLanes<T>; }
  __device__ const T* vector(int64_t i) const { return x + class_of_vector(i); }
  __device__ Acc<T> at(int64_t k) const { return static_cast<Acc<T>>(x[k * step]); }
};

// What a class of a row is given beside its logit. Not kGeneral: an index target and nothing else.
template <class T, bool kGeneral>
struct Given {
  using V = Acc<T>;
  const Call& call;
  Narrow<V> probabilities;
  bool wide_accesses;  // to the probabilities, as to the logits
  V scale, cap;
  bool capped;

  __device__ Given(const Call& c, const Line<T>& line, int64_t row)
      : call(c),
        probabilities(kGeneral && c.probabilities ? c.probabilities : c.logits, row),
        wide_accesses(kGeneral && c.probabilities.dtype == kDtypeOf<T> && c.probabilities.class_stride == 1 &&
                      aligned(probabilities.data + line.head * sizeof(T))),
        scale(static_cast<V>(c.logit_scale)),
        cap(static_cast<V>(c.softcap)),
        capped(kGeneral && c.softcap != 0) {}

  __device__ V transformed(V x) const {
    const V z = x * scale;
    return !capped || z == -V(INFINITY) ? z : cap * tanh(z / cap);
  }
  // cap' of a capped z, from e = exp(-2|v|): 1 - tanh² would lose its digits where it is small.
  __device__ V slope(V x) const {
    const V z = x * scale;
    if (!capped || z == -V(INFINITY)) return 1;
    const V e = exp(-2 * fabs(z / cap));
    return 4 * e / ((1 + e) * (1 + e));
  }
  template <int N>
  __device__ Lanes<V, N> t(int64_t k) const {
    if (N > 1 && wide_accesses) return as<N>(load16(probabilities.data + k * sizeof(T)));
    Lanes<V, N> x;
    LSK_LANES(j) x.v[j] = probabilities.load(k + j);
    return x;
  }
  template <int N>
  __device__ Lanes<V, N> of(const Column& column, int64_t k) const {
    if (column) return load_classes<N>(reinterpret_cast<const V*>(column.data) + k);
    Lanes<V, N> x;
    LSK_LANES(j) x.v[j] = static_cast<V>(column.fallback);
    return x;
  }

 private:
  template <int N>  // which is 1 only where it is not called
  __device__ Lanes<V, N> as(Bits16 bits) const {
    const Lanes<V, kLanes<T>> all = unpack<T>(bits);
    Lanes<V, N> x;
    LSK_LANES(j) x.v[j] = all.v[j];
    return x;
  }
};

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

  template <int N>
  __device__ void add(const Lanes<V, N>& x, int64_t k, const Given<T, kGeneral>& given) {
    V z[N], top = -V(INFINITY);
    LSK_LANES(j) {
      z[j] = given.transformed(x.v[j]);
      top = z[j] > top ? z[j] : top;
    }
    if (top > s.max) {
      low = rescale(low, s.max, top);
      s = seen_from(s, top);
      if (!kGeneral) s.spread = {0, 0, 0};  // as it was, which the compiler does not see
      int first = 0;
      for (int j = N - 1; j >= 0; --j) first = z[j] == top ? j : first;
      s.best = k + first;
    } else if (N == 1 && top == s.max && k < s.best) {
      s.best = k;  // an edge in front of the vectors, which were summed before
    }
    const V shift = origin(s.max);
    if (kGeneral) return add_general<N>(z, shift, k, given);
    V sum = 0, dev = 0;  // of few terms, so that the long sums have fewer
    LSK_LANES(j) {
      sum += exp(z[j] - shift);
      dev += z[j] - shift;
    }
    add_exact(sum);
    s.rest.dev += dev;
    s.rest.mass += N;
  }

 private:
  Stats<V> s = no_stats<V>();
  V low = 0;  // what rounding lost of s.sum

  __device__ void add_exact(V x) {
    const V sum = s.sum + x, of_x = sum - s.sum;
    low += (s.sum - (sum - of_x)) + (x - of_x);
    s.sum = sum;
  }
  template <int N>
  __device__ void add_general(const V* z, V shift, int64_t k, const Given<T, kGeneral>& given) {
    const Call& call = given.call;
    const Lanes<V, N> rest = given.template of<N>(call.rest, k);
    V sum = 0;
    LSK_LANES(j) {
      const V dev = z[j] - shift, e = exp(dev);
      sum += e;
      count(s.spread, e, dev, bool(call.variance));
      count(s.rest, call.finite && z[j] == -V(INFINITY) ? V(0) : rest.v[j], dev);
    }
    add_exact(sum);
    if (call.finite) {
      const Lanes<V, N> prior = given.template of<N>(call.prior, k);
      LSK_LANES(j) s.cover += z[j] == -V(INFINITY) ? V(0) : prior.v[j];
    }
    if (!call.probabilities) return;
    const Lanes<V, N> t = given.template t<N>(k), w = given.template of<N>(call.weight, k);
    LSK_LANES(j) {
      count(s.t, t.v[j], z[j] - shift);
      count(s.wt, w.v[j] * t.v[j], z[j] - shift);
    }
  }
};

// What the gradient of a row needs to know of all of it.
template <class T, bool kGeneral>
struct Rule {
  using V = Acc<T>;
  const Given<T, kGeneral>& given;
  V zmax, logsum, mass, factor, a_y, a, b;
  int64_t y;
  bool zero;

  __device__ Rule(const Given<T, kGeneral>& g, int64_t row, V zmax_, V logsum_, V mass_, V count)
      : given(g), zmax(zmax_), logsum(logsum_), mass(mass_), y(-1), zero(g.call.ignored(row)) {
    const Call& call = g.call;
    const Weights<V> w = call.row_weights<V>(row, count);
    const bool good = call.valid(row);
    a = w.a;
    b = w.b;
    factor = good ? call.scale.get<V>(row) : V(NAN);
    if (!(kGeneral && call.grad_of_target)) factor *= given.scale;
    mass += 2 * static_cast<V>(call.z_loss) * (zmax + logsum);
    if (call.target != nullptr && good) y = call.target[row];
    a_y = kGeneral && call.target != nullptr && good && !zero ? a * call.weight.get<V>(y) : a;
  }

  template <int N>
  __device__ Lanes<V, N> at(const Lanes<V, N>& x, int64_t k) const {
    Lanes<V, N> q = {}, g, t = {}, w = {};
    const Call& call = given.call;
    if (kGeneral) {
      q = given.template of<N>(call.rest, k);
      if (call.probabilities) t = given.template t<N>(k), w = given.template of<N>(call.weight, k);
    }
    V z[N];
    LSK_LANES(j) {
      z[j] = given.transformed(x.v[j]);
      q.v[j] = kGeneral ? (call.finite && z[j] == -V(INFINITY) ? V(0) : b * q.v[j]) : b;
      if (kGeneral && call.probabilities) q.v[j] += a * (w.v[j] * t.v[j]);
    }
    const uint64_t hot = static_cast<uint64_t>(y - k);  // one comparison for most vectors; huge where y < k
    if (hot < N) LSK_LANES(j) q.v[j] += j == int(hot) ? a_y : V(0);
    LSK_LANES(j) {
      const V logp = log_p(z[j], V(1), zmax, logsum), p = exp(logp);
      const V d = kGeneral && call.penalty != 0 ? dz(mass, surprise(logp), p, q.v[j]) : dz(mass, p, q.v[j]);
      g.v[j] = zero ? V(0) : factor * d * given.slope(x.v[j]);
      if (kGeneral && call.grad_of_target) {
        const V down = q.v[j] == 0 && z[j] == -V(INFINITY) ? V(0) : z[j] - zmax;
        g.v[j] = factor * a * w.v[j] * (logsum - down);
      }
    }
    return g;
  }

 private:
  __device__ V surprise(V logp) const { return static_cast<V>(given.call.penalty) * (logp < -V(1e4) ? -V(1e4) : logp); }
};

// Where the gradient of a row goes.
template <class T>
struct Output {
  Narrow<Acc<T>> row;
  bool wide_accesses;

  __device__ Output(const View& view, const Line<T>& line, int64_t i)
      : row(view, i),
        wide_accesses(view.dtype == kDtypeOf<T> && view.class_stride == 1 &&
                      aligned(row.data + line.head * sizeof(T))) {}

  __device__ void store(int64_t k, const Lanes<Acc<T>, kLanes<T>>& g) const {
    if (wide_accesses) return store16(row.data + k * sizeof(T), pack<T>(g));
    constexpr int N = kLanes<T>;
    LSK_LANES(j) row.store(k + j, g.v[j]);
  }
};

}  // namespace lsk
