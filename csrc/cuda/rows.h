// A row of logits on a GPU: how its threads read it and write its gradient.
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

constexpr double kLog2e = 1.4426950408889634;

template <class T>  // elements of one access
constexpr int kLanes = 16 / sizeof(T);

// N adjacent classes of a row; 1 where no more can be accessed at once.
template <class V, int N>
struct Lanes {
  V v[N];
};
#define LSK_LANES(j) _Pragma("unroll") for (int j = 0; j < N; ++j)
#define LSK_GROUPS(c) _Pragma("unroll") for (int c = 0; c < C; ++c)

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
  Bits16 bits;
  if constexpr (sizeof(T) == 2) {
    uint32_t words[4];
    _Pragma("unroll") for (int i = 0; i < 4; ++i) words[i] = rounded_pair(T(), x.v[2 * i], x.v[2 * i + 1]);
    memcpy(&bits, words, sizeof bits);
  } else {
    T elements[N];
    LSK_LANES(j) elements[j] = static_cast<T>(x.v[j]);
    memcpy(&bits, elements, sizeof bits);
  }
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
    if (!kGeneral) return x;
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

// Where the gradient of a row goes.
template <class T>
struct Output {
  Narrow<Acc<T>> row;
  bool wide_accesses;

  __device__ Output(const View& view, const Line<T>& line, int64_t i)
      : row(view, i),
        wide_accesses(view.dtype == kDtypeOf<T> && view.class_stride == 1 &&
                      aligned(row.data + line.head * sizeof(T))) {}

  __device__ void store_one_by_one(int64_t k, const Lanes<Acc<T>, kLanes<T>>& g) const {
    constexpr int N = kLanes<T>;
    LSK_LANES(j) row.store(k + j, g.v[j]);
  }
};

}  // namespace lsk
