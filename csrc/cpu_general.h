// Kernels for what the plain row kernels do not know: other layouts, scale and cap, class vectors, given targets. They
// work on blocks in the dtype of the arithmetic that stay in the first-level cache; gather and scatter convert.
#pragma once

#include "cpu_distill.h"

namespace lsk {
namespace {

// A vector of elements, in order.
template <class T>
LSK_INLINE Vec<T> widen(const T* p) {
  Vec<T> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
LSK_INLINE Vec<float> widen(const Half* p) {
  Packed x;
  __builtin_memcpy(&x, p, sizeof x);
  return Format<Half>::widen(x);
}
LSK_INLINE Vec<float> widen(const BFloat16* p) {
  Packed x;
  __builtin_memcpy(&x, p, sizeof x);
  return (Vec<float>)(__builtin_convertvector(x, Bits<float>) << 16);
}

template <class T>
LSK_INLINE void narrow(T* p, Vec<T> x) {
  __builtin_memcpy(p, &x, sizeof x);
}
LSK_INLINE void narrow(Half* p, Vec<float> x) {
  const Packed y = Format<Half>::narrow(x);
  __builtin_memcpy(p, &y, sizeof y);
}
LSK_INLINE void narrow(BFloat16* p, Vec<float> x) {
  const Bits<float> u = Format<BFloat16>::rounded(x == x ? x : operand<float>(NAN));
  const Packed y = __builtin_convertvector(u >> 16, Packed);
  __builtin_memcpy(p, &y, sizeof y);
}

// At most a vector of elements that lie `stride` apart.
template <class T>
LSK_INLINE Vec<T> pick(const T* p, int64_t stride, int64_t n) {
  if (stride == 1 && n >= kWidth<T>) return widen(p);
  T lanes[kWidth<T>] = {};
  for (int64_t l = 0; l < kWidth<T> && l < n; ++l) lanes[l] = p[l * stride];
  return widen(lanes);
}

template <class T>
LSK_INLINE void place(T* p, int64_t stride, int64_t n, Vec<T> x) {
  if (stride == 1 && n >= kWidth<T>) return narrow(p, x);
  T lanes[kWidth<T>];
  narrow(lanes, x);
  for (int64_t l = 0; l < kWidth<T> && l < n; ++l) p[l * stride] = lanes[l];
}

// One exchange of a transposition: bit S of the row and of the lane change places.
template <class T, int S>
LSK_INLINE void transpose(Vec<T> (&x)[kWidth<T>]) {
  Signed<T> even, odd;
  for (int l = 0; l < kWidth<T>; ++l) {
    even[l] = l & S ? kWidth<T> + l - S : l;
    odd[l] = l & S ? kWidth<T> + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; ++i) {
    if (i & S) continue;
    const Vec<T> low = x[i], high = x[i + S];
    x[i] = shuffle(low, high, even);
    x[i + S] = shuffle(low, high, odd);
  }
  if constexpr (2 * S < kWidth<T>) transpose<T, 2 * S>(x);
}

// Gather or scatter. Where rows are adjacent and classes are not, squares are transposed in registers: a cache line is
// touched once for all of its rows.
template <class T, bool kGather>
void convert(void* tensor, const Tile& tile, void* rows, int64_t pitch) {
  constexpr int64_t W = kWidth<T>;
  const bool square = tile.row_stride == 1 && tile.class_stride != 1;
  for (int64_t k = 0; k < tile.n; k += W) {
    for (int64_t row = 0; row < tile.rows; row += square ? W : 1) {
      T* p = static_cast<T*>(tensor) + row * tile.row_stride + k * tile.class_stride;
      Acc<T>* q = static_cast<Acc<T>*>(rows) + row * pitch + k;
      if (!square) {
        kGather ? narrow(q, pick(p, tile.class_stride, tile.n - k)) : place(p, tile.class_stride, tile.n - k, widen(q));
        continue;
      }
      Vec<T> v[W] = {};
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) {
        if (kGather && k + i < tile.n) {
          __builtin_prefetch(p + (i + 2 * W) * tile.class_stride);
          v[i] = pick(p + i * tile.class_stride, 1, tile.rows - row);
        }
        if (!kGather && row + i < tile.rows) v[i] = widen(q + i * pitch);
      }
      transpose<T, 1>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) {
        if (kGather && row + i < tile.rows) narrow(q + i * pitch, v[i]);
        if (!kGather && k + i < tile.n) place(p + i * tile.class_stride, 1, tile.rows - row, v[i]);
      }
    }
  }
}

// With e = exp(-2|v|), tanh |v| = (1 - e)/(1 + e), whose numerator keeps its digits near 0, and its slope 4e/(1 + e)².
template <class T>
void transform(const void* logits, void* out, void* slopes, int64_t n, double scale, double cap) {
  const T* x = static_cast<const T*>(logits);
  T *z = static_cast<T*>(out), *slope = static_cast<T*>(slopes);
  const Vec<T> factor = operand<T>(cap == 0 ? scale : 2 * scale / cap), c = operand<T>(cap),
               tiny = splat<T>(kLowest<T>);
  const Bits<T> sign = (Bits<T>)splat<T>(-0.0);
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    Group<T> v = load_some(x + k, count), down = {};
    LSK_EACH(i) v.v[i] *= factor;
    if (cap != 0) LSK_EACH(i) {
        const Vec<T> down2 = (Vec<T>)((Bits<T>)v.v[i] | sign);
        const Exp<T> e = exp_parts(down2 < tiny ? tiny : down2);
        const Vec<T> whole = e.power * e.tail + e.power, r = reciprocal(1 + whole);
        const Vec<T> t = c * (((1 - e.power) - e.power * e.tail) * r);
        const auto masked = v.v[i] == splat<T>(-INFINITY);
        down.v[i] = masked ? splat<T>(1) : whole * r * r * 4;
        v.v[i] = masked ? v.v[i] : (Vec<T>)((Bits<T>)t | ((Bits<T>)v.v[i] & sign));
      }
    store_some(z + k, count, v);
    if (slope != nullptr) store_some(slope + k, count, down);
  });
}

// Class vectors r (null: ones) and t (null: none) of a block. Unguarded, 0·(-inf) is NaN and r is not counted.
template <class T, bool kGuarded>
struct Classes {
  const Acc<T>*r, *t;
  Vec<T> hidden;
  Moments<Vec<T>> rest = {}, given = {};

  LSK_MEMBER void add(const Group<T>& z, const Group<T>& x, int64_t k, int64_t n) {
    Group<T> v = {splat<T>(1), splat<T>(1), splat<T>(1), splat<T>(1)};
    if (r != nullptr) v = load_some_wide<T>(r + k, n);
    if (kGuarded) LSK_EACH(i) {
        v.v[i] = z.v[i] == hidden ? Vec<T>{} : v.v[i];
        if (n < kGroup<T>) v.v[i] = lanes_between<T>(i, 0, n) ? v.v[i] : Vec<T>{};
      }
    count(rest, v, x);
    if (t != nullptr) count(given, load_some_wide<T>(t + k, n), x);
  }
  LSK_MEMBER void count(Moments<Vec<T>>& sum, const Group<T>& v, Group<T> x) const {
    // The product comes after the choice, so that both forms contract it alike and give the same bits.
    if (kGuarded) LSK_EACH(i) x.v[i] = v.v[i] == 0 ? Vec<T>{} : x.v[i];
    LSK_EACH(i) x.v[i] *= v.v[i];
    sum.mass += total(v);
    sum.dev += total(x);
  }
  LSK_MEMBER void store(Stats<double>& stats, int64_t n) const {
    if (!kGuarded) stats.rest.mass = double(n);
    for (int l = 0; l < kWidth<T>; ++l) {
      if (kGuarded) stats.rest.mass += rest.mass[l];
      stats.rest.dev += rest.dev[l];
      stats.wt.mass += given.mass[l];
      stats.wt.dev += given.dev[l];
    }
  }
};

template <class T>
Stats<double> class_block(const void* logits, const void* r, const void* t, int64_t n, double scale, double masked,
                          const void* ahead) {
  const T* x = static_cast<const T*>(logits);
  const Acc<T>*rest = static_cast<const Acc<T>*>(r), *given = static_cast<const Acc<T>*>(t);
  if (masked != masked) {
    const Stats<double> s = block_of<Vec<T>>(x, n, scale, ahead, Classes<T, false>{rest, given, {}});
    const double dev = s.rest.dev + s.wt.dev;
    if (dev - dev == 0) return s;
  }
  return block_of<Vec<T>>(x, n, scale, ahead, Classes<T, true>{rest, given, operand<T>(masked)});
}

template <class T>
double sum(const void* values, int64_t n) {
  const T* v = static_cast<const T*>(values);
  Vec<T> sums = {};
  for_groups<T>(
      n, [&](int64_t k, int64_t count) __attribute__((always_inline)) { sums += total(load_some(v + k, count)); });
  double all = 0;
  for (int l = 0; l < kWidth<T>; ++l) all += sums[l];
  return all;
}

template <class T>
Spread<double> spread(const void* logits, int64_t n, double scale, double shift) {
  const T* x = static_cast<const T*>(logits);
  const Vec<T> factor = operand<T>(scale), m = operand<T>(shift);
  Group<T> first = {}, second = {}, square = {};
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    const Group<T> v = load_some(x + k, count);
    LSK_EACH(i) {
      Vec<T> d = v.v[i] * factor - m, e = exp_nonpositive(d);
      if (count < kGroup<T>) e = lanes_between<T>(i, 0, count) ? e : Vec<T>{};
      d = e == 0 ? Vec<T>{} : d;
      first.v[i] += e * d;
      second.v[i] += e * d * d;
      square.v[i] += e * e;
    }
  });
  Spread<double> all = {};
  for (int l = 0; l < kWidth<T>; ++l) {
    all.first += total(first)[l];
    all.second += total(second)[l];
    all.square += total(square)[l];
  }
  return all;
}

template <class T>
void mix(const void* logits, const void* targets, const void* rest, void* mixed, int64_t n, Weights<double> w,
         double masked) {
  const T *z = static_cast<const T*>(logits), *t = static_cast<const T*>(targets), *r = static_cast<const T*>(rest);
  T* q = static_cast<T*>(mixed);
  const Vec<T> a = operand<T>(w.a), b = operand<T>(w.b), hidden = operand<T>(masked);
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    const Group<T> x = load_some(z + k, count);
    Group<T> v = {b, b, b, b}, given = {};
    if (r != nullptr) {
      v = load_some(r + k, count);
      LSK_EACH(i) v.v[i] *= b;
    }
    if (t != nullptr) given = load_some(t + k, count);
    LSK_EACH(i) v.v[i] = a * given.v[i] + (x.v[i] == hidden ? Vec<T>{} : v.v[i]);
    store_some(q + k, count, v);
  });
}

template <class T>
void class_gradient(const void* logits, const void* rest, const void* slopes, void* grad, int64_t n, int64_t target,
                    const GradientRow& row) {
  const T* x = static_cast<const T*>(logits);
  const Acc<T>*r = static_cast<const Acc<T>*>(rest), *slope = static_cast<const Acc<T>*>(slopes);
  T* g = static_cast<T*>(grad);
  const auto run = [&](const auto& rule) {
    if (r == nullptr)
      rule.row(x, nullptr, slope, g, n, target);
    else if (slope == nullptr)
      rule.row(x, r, nullptr, g, n, target);
    else
      rule.row(x, r, slope, g, n, target);
  };
  row.penalty == 0 ? run(Gradient<T, Vec<T>>(row)) : run(Gradient<T, Vec<T>, true>(row));
}

template <class T>
void target_gradient(const void* logits, const void* weights, void* grad, int64_t n, const GradientRow& row) {
  const T *z = static_cast<const T*>(logits), *q = static_cast<const T*>(weights);
  T* g = static_cast<T*>(grad);
  const Gradient<T, Vec<T>> rule(row);
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    Group<T> x = load_some(z + k, count);
    const Group<T> v = load_some(q + k, count);
    LSK_EACH(i) {
      const auto absent = (v.v[i] == 0) & (x.v[i] == splat<T>(-INFINITY));
      x.v[i] = rule.factor * (rule.logsum - (absent ? Vec<T>{} : x.v[i] * rule.scale - rule.zmax));
    }
    store_some(g + k, count, x);
  });
}

template <class T>
void multiply(const void* left, const void* right, void* product, int64_t n) {
  const T *x = static_cast<const T*>(left), *y = static_cast<const T*>(right);
  T* z = static_cast<T*>(product);
  for_groups<T>(n, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
    Group<T> v = load_some(x + k, count);
    const Group<T> f = load_some(y + k, count);
    LSK_EACH(i) v.v[i] *= f.v[i];
    store_some(z + k, count, v);
  });
}

// Rounded to 24 bits: beside a sum of numbers that have 8 bits the 16 of its mantissa lose next to nothing.
void add_split(void* high, void* low, const void* x, int64_t n, bool last) {
  using Bytes = VectorOf<uint8_t, kWidth<float>>::type;
  BFloat16 *h = static_cast<BFloat16*>(high), lanes[kWidth<float>] = {}, added[kWidth<float>] = {};
  uint8_t *l = static_cast<uint8_t*>(low), below[kWidth<float>] = {};
  const BFloat16* t = static_cast<const BFloat16*>(x);
  for (int64_t k = 0; k < n; k += kWidth<float>) {
    const int64_t count = n - k < kWidth<float> ? n - k : kWidth<float>;
    const bool part = count < kWidth<float>;
    if (part) {
      __builtin_memcpy(lanes, h + k, count * sizeof *h);
      __builtin_memcpy(below, l + k, count);
      __builtin_memcpy(added, t + k, count * sizeof *t);
    }
    Bytes b;
    __builtin_memcpy(&b, part ? below : l + k, sizeof b);
    const Bits<float> upper = (Bits<float>)widen(part ? lanes : h + k), lower = __builtin_convertvector(b, Bits<float>);
    const Vec<float> sum = (Vec<float>)(upper | lower << 8) + widen(part ? added : t + k);
    if (last) {
      narrow(part ? lanes : h + k, sum);
    } else {
      const Bits<float> rounded = (Bits<float>)(sum == sum ? sum : operand<float>(NAN)) + 0x80;
      const Packed top = __builtin_convertvector(rounded >> 16, Packed);
      b = __builtin_convertvector(rounded >> 8 & 0xff, Bytes);
      __builtin_memcpy(part ? lanes : h + k, &top, sizeof top);
      __builtin_memcpy(part ? below : l + k, &b, sizeof b);
    }
    if (part) {
      __builtin_memcpy(h + k, lanes, count * sizeof *h);
      if (!last) __builtin_memcpy(l + k, below, count);
    }
  }
}

}  // namespace
}  // namespace lsk
