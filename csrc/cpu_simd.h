// SIMD vectors of LSK_SIMD_BYTES bytes by the compiler's vector extensions: loads, stores, conversions, exp.
//
// Included once by each instruction set's translation unit, after its target pragma. Everything is static or in the
// unnamed namespace: two units that share an external inline function would share one of its two machine codes.
#pragma once

#include "cpu_kernels.h"

namespace lsk {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class E, int W>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * W)));
};

// The arithmetic of a dtype, and the integers as wide as one lane; 16-bit floats compute in float.
template <class T>
struct Lanes {
  using Acc = float;
  using Bits = uint32_t;
  using Signed = int32_t;
};
template <>
struct Lanes<double> {
  using Acc = double;
  using Bits = uint64_t;
  using Signed = int64_t;
};

template <class T>
using Acc = typename Lanes<T>::Acc;
template <class T>
constexpr int kWidth = LSK_SIMD_BYTES / sizeof(Acc<T>);
template <class T>
using Vec = typename VectorOf<Acc<T>, kWidth<T>>::type;
template <class T>
using Bits = typename VectorOf<typename Lanes<T>::Bits, kWidth<T>>::type;
template <class T>
using Signed = typename VectorOf<typename Lanes<T>::Signed, kWidth<T>>::type;

template <class T>
LSK_INLINE Vec<T> splat(Acc<T> x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of a zero and every NaN
}

// Lane l is lane index[l] of low and high, one after the other.
template <class V, class I>
LSK_INLINE V shuffle(V low, V high, I index) {
#if defined(__clang__)
  V x;
  const int w = sizeof x / sizeof x[0];
  for (int l = 0; l < w; ++l) x[l] = index[l] < w ? low[index[l]] : high[index[l] - w];
  return x;
#else
  return __builtin_shuffle(low, high, index);
#endif
}

// The larger of x and m; m where x is NaN.
template <class V>
LSK_INLINE V larger(V x, V m) {
  return x > m ? x : m;
}

// The unit of work: vectors enough to hide the latency of max and add, read and written together.
constexpr int kVectors = 4;
template <class T>
constexpr int kGroup = kVectors * kWidth<T>;

template <class T>
struct Group {
  Vec<T> v[kVectors];
};

template <class T>
LSK_INLINE Vec<T> total(const Group<T>& x) {
  return (x.v[0] + x.v[1]) + (x.v[2] + x.v[3]);
}

#define LSK_EACH(i) _Pragma("GCC unroll 4") for (int i = 0; i < kVectors; ++i)

// Formats: which element is lane l of vector i, load, and store rounding once to nearest even; all branch-free.
template <class T>  // float and double
struct Format {
  LSK_INLINE int element(int i, int l) { return i * kWidth<T> + l; }
  LSK_INLINE Group<T> load(const T* p) {
    Group<T> x;
    LSK_EACH(i) __builtin_memcpy(&x.v[i], p + i * kWidth<T>, sizeof x.v[i]);
    return x;
  }
  LSK_INLINE void store(T* p, const Group<T>& x) {
    LSK_EACH(i) __builtin_memcpy(p + i * kWidth<T>, &x.v[i], sizeof x.v[i]);
  }
};

// A vector of 32-bit words holds two of floats: elements 2l in the low halves, 2l + 1 in the high ones. No shuffles.
template <>
struct Format<BFloat16> {
  using U = Bits<float>;
  LSK_INLINE int element(int i, int l) { return (i / 2 * kWidth<float> + l) * 2 + i % 2; }
  LSK_INLINE Group<BFloat16> load(const BFloat16* p) {
    Group<BFloat16> x;
    LSK_EACH(i) if (i % 2 == 0) {
      U u;
      __builtin_memcpy(&u, p + i * kWidth<float>, sizeof u);
      x.v[i] = (Vec<float>)(u << 16);
      x.v[i + 1] = (Vec<float>)(u & 0xffff0000);
    }
    return x;
  }
  // The high half of the result holds x to nearest even. A NaN stays one: its low half is 0, see operand().
  LSK_INLINE U rounded(Vec<float> x) { return (U)x + 0x7fff + (((U)x >> 16) & 1); }
  LSK_INLINE void store(BFloat16* p, const Group<BFloat16>& x) {
    LSK_EACH(i) if (i % 2 == 0) {
      const U u = (rounded(x.v[i]) >> 16) | (rounded(x.v[i + 1]) & 0xffff0000);
      __builtin_memcpy(p + i * kWidth<float>, &u, sizeof u);
    }
  }
};

using Packed = VectorOf<uint16_t, kWidth<float>>::type;  // as many 16-bit floats as a vector has lanes

template <>
struct Format<Half> {
  using U = Bits<float>;
  LSK_INLINE int element(int i, int l) { return i * kWidth<float> + l; }
  LSK_INLINE Vec<float> widen(Packed h) {
#if LSK_SIMD_BYTES == 64
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif LSK_SIMD_BYTES == 32
    return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
    Vec<float> x;
    for (int l = 0; l < kWidth<float>; ++l) x[l] = c10::Half(h[l], c10::Half::from_bits());
    return x;
#endif
  }
  LSK_INLINE Packed narrow(Vec<float> x) {
#if LSK_SIMD_BYTES == 64
    return (Packed)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif LSK_SIMD_BYTES == 32
    return (Packed)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    Packed h;
    for (int l = 0; l < kWidth<float>; ++l) h[l] = c10::Half(x[l]).x;
    return h;
#endif
  }
  LSK_INLINE Group<Half> load(const Half* p) {
    Group<Half> x;
    LSK_EACH(i) {
      Packed h;
      __builtin_memcpy(&h, p + i * kWidth<float>, sizeof h);
      x.v[i] = widen(h);
    }
    return x;
  }
  LSK_INLINE void store(Half* p, const Group<Half>& x) {
    LSK_EACH(i) {
      const Packed h = narrow(x.v[i]);
      __builtin_memcpy(p + i * kWidth<float>, &h, sizeof h);
    }
  }
};

// A group of numbers of the arithmetic, each in the lane of its element.
template <class T>
LSK_INLINE Group<T> load_wide(const Acc<T>* p) {
  Group<T> x;
  LSK_EACH(i) __builtin_memcpy(&x.v[i], p + i * kWidth<T>, sizeof x.v[i]);
  if constexpr (__is_same(T, BFloat16)) LSK_EACH(i) if (i % 2 == 0) {
      const Vec<T> low = x.v[i], high = x.v[i + 1];
      Signed<T> even;
      for (int l = 0; l < kWidth<T>; ++l) even[l] = 2 * l;
      x.v[i] = shuffle(low, high, even);
      x.v[i + 1] = shuffle(low, high, even + 1);
    }
  return x;
}

// A partial group touches no memory behind its n elements.
template <class T>
LSK_INLINE Group<T> load_part(const T* p, int64_t n) {
  T lanes[kGroup<T>] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return Format<T>::load(lanes);
}

template <class T>
LSK_INLINE void store_part(T* p, int64_t n, const Group<T>& x) {
  T lanes[kGroup<T>];
  Format<T>::store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

template <class T>
LSK_INLINE Group<T> load_some(const T* p, int64_t n) {
  return n < kGroup<T> ? load_part(p, n) : Format<T>::load(p);
}

template <class T>
LSK_INLINE Group<T> load_some_wide(const Acc<T>* p, int64_t n) {
  if (n >= kGroup<T>) return load_wide<T>(p);
  Acc<T> lanes[kGroup<T>] = {};
  __builtin_memcpy(lanes, p, n * sizeof *p);
  return load_wide<T>(lanes);
}

template <class T>
LSK_INLINE void store_some(T* p, int64_t n, const Group<T>& x) {
  n < kGroup<T> ? store_part(p, n, x) : Format<T>::store(p, x);
}

// Lanes of vector i whose element lies in [begin, end).
template <class T>
LSK_INLINE Signed<T> lanes_between(int i, int64_t begin, int64_t end) {
  Signed<T> index;
  for (int l = 0; l < kWidth<T>; ++l) index[l] = Format<T>::element(i, l);
  using S = typename Lanes<T>::Signed;
  return (Signed<T>)(index >= S(begin)) & (Signed<T>)(index < S(end));
}

// The same number in every lane; a NaN with a payload that no rounding carries away.
template <class T>
LSK_INLINE Vec<T> operand(double x) {
  return splat<T>(x == x ? Acc<T>(x) : Acc<T>(NAN));
}

// exp(x) = power·(1 + tail), power a power of 2, |x - log power| <= ln 2 / 2; near 0, tail keeps its digits.
template <class T>
struct Exp {
  Vec<T> power, tail;
};

// 1.5·2^23 + 127 added to x/ln 2 rounds it to an integer n and leaves n + 127, the exponent field of 2^n, in the low
// bits; then a minimax polynomial of exp(r) - 1, r = x - n·ln 2 (3e-9 relative to exp).
LSK_INLINE Exp<float> exp_parts(Vec<float> x) {
  const float magic = 12583039.0f;
  const Vec<float> shifted = x * 0x1.715476p+0f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 in two pieces: n·(the first) is exact
  Vec<float> p = r * 0x1.6a2352p-10f + 0x1.123a6cp-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  return {(Vec<float>)((Bits<float>)shifted << 23), p * r};
}

// The same in double, with the Taylor polynomial of degree 13 (4e-18).
LSK_INLINE Exp<double> exp_parts(Vec<double> x) {
  const double magic = 6755399441056767.0;  // 1.5·2^52 + 1023
  const Vec<double> shifted = x * 0x1.71547652b82fep+0 + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  const double taylor[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                           1. / 720,       1. / 120,      1. / 24,      1. / 6,      0.5,        1.};
  Vec<double> p = splat<double>(1. / 6227020800);
  for (double c : taylor) p = p * r + c;
  return {(Vec<double>)((Bits<double>)shifted << 52), p * r};
}

// 1/x of a normal number, within 1 ulp or so: a division takes as long as an exponential.
template <class V>
LSK_INLINE V reciprocal(V x) {
#if LSK_SIMD_BYTES == 64
  if constexpr (sizeof x[0] == 4) {
    const V y = (V)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return y + y * (1 - x * y);
  }
#endif
  return 1 / x;
}

// Below kLowest the result is not a normal number.
template <class T>
constexpr T kLowest = -87;
template <>
constexpr double kLowest<double> = -708;

// exp(x) for x <= 0, exactly 0 below kLowest and where not `counted`, NaN for NaN (every comparison is written so that
// NaN survives).
LSK_INLINE Vec<float> exp_nonpositive(Vec<float> x, Signed<float> counted = ~Signed<float>{}) {
  const Exp<float> e = exp_parts(x);
  return x < kLowest<float> ? Vec<float>{} : (counted ? e.power : Vec<float>{}) * (1 + e.tail);
}
LSK_INLINE Vec<double> exp_nonpositive(Vec<double> x, Signed<double> counted = ~Signed<double>{}) {
  const Exp<double> e = exp_parts(x);
  return x < kLowest<double> ? Vec<double>{} : (counted ? e.power : Vec<double>{}) * (1 + e.tail);
}

}  // namespace
}  // namespace lsk
