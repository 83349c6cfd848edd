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

template <class T>
struct Lanes {  // 16-bit floats compute in float
  using Acc = float;
  using Bits = uint32_t;
  using Signed = int32_t;
  using Stored = uint16_t;
};
template <>
struct Lanes<float> {
  using Acc = float;
  using Bits = uint32_t;
  using Signed = int32_t;
  using Stored = float;
};
template <>
struct Lanes<double> {
  using Acc = double;
  using Bits = uint64_t;
  using Signed = int64_t;
  using Stored = double;
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
using Stored = typename VectorOf<typename Lanes<T>::Stored, kWidth<T>>::type;

template <class T>
LSK_INLINE Vec<T> splat(Acc<T> x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of a zero and every NaN
}

// ---- 16-bit formats: branch-free, to nearest even, NaN stays NaN

LSK_INLINE Vec<float> widen(Stored<BFloat16> v, BFloat16) { return (Vec<float>)(__builtin_convertvector(v, Bits<float>) << 16); }

LSK_INLINE Stored<BFloat16> narrow(Vec<float> x, BFloat16) {
  const Bits<float> u = (Bits<float>)x;
  const Bits<float> rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : rounded * 0 + 0x7fc0, Stored<BFloat16>);
}

#if LSK_SIMD_BYTES == 64
LSK_INLINE Vec<float> widen(Stored<Half> v, Half) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v); }
LSK_INLINE Stored<Half> narrow(Vec<float> x, Half) {
  return (Stored<Half>)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}
#elif LSK_SIMD_BYTES == 32
LSK_INLINE Vec<float> widen(Stored<Half> v, Half) { return (Vec<float>)_mm256_cvtph_ps((__m128i)v); }
LSK_INLINE Stored<Half> narrow(Vec<float> x, Half) {
  return (Stored<Half>)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Shifted into place, a half is a float with its exponent 112 too small: a product by 2^112 mends normals and subnormals.
LSK_INLINE Vec<float> widen(Stored<Half> v, Half) {
  const Bits<float> u = __builtin_convertvector(v, Bits<float>);
  const Bits<float> magnitude = (u & 0x7fff) << 13;
  const Bits<float> finite = (Bits<float>)((Vec<float>)magnitude * 0x1p112f);
  return (Vec<float>)((magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000 : finite) | ((u & 0x8000) << 16));
}

// Adding a power of two 2^13 above x's exponent (never below the subnormals') lets the float adder round to half's 10 bits.
LSK_INLINE Stored<Half> narrow(Vec<float> x, Half) {
  const Bits<float> u = (Bits<float>)x;
  const Bits<float> magnitude = u & 0x7fffffff;
  Bits<float> exponent = magnitude & 0x7f800000;
  exponent = exponent < 0x38800000 ? exponent * 0 + 0x38800000 : exponent;
  const Vec<float> scaled = ((Vec<float>)magnitude * 0x1p112f) * 0x1p-110f;  // 4|x|; inf from 2^16 on
  const Bits<float> sum = (Bits<float>)(scaled + (Vec<float>)(exponent + 0x07800000));
  const Bits<float> number = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  const Bits<float> half = magnitude > 0x7f800000 ? number * 0 + 0x7e00 : number;
  return __builtin_convertvector(half | ((u >> 16) & 0x8000), Stored<Half>);
}
#endif

LSK_INLINE Vec<float> widen(Vec<float> v, float) { return v; }
LSK_INLINE Vec<float> narrow(Vec<float> v, float) { return v; }
LSK_INLINE Vec<double> widen(Vec<double> v, double) { return v; }
LSK_INLINE Vec<double> narrow(Vec<double> v, double) { return v; }

// The larger of x and m; m where x is NaN.
template <class V>
LSK_INLINE V larger(V x, V m) {
  return x > m ? x : m;
}

// ---- memory: any alignment; a partial vector never touches what lies behind its n elements

template <class T>
LSK_INLINE Vec<T> load(const T* p) {
  Stored<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return widen(v, T{});
}

template <class T>
LSK_INLINE Signed<T> lane_index() {
  Signed<T> index = {};
  for (int i = 0; i < kWidth<T>; ++i) index[i] = i;
  return index;
}

template <class T>
LSK_INLINE Vec<T> load_part(const T* p, int64_t n, Acc<T> fill) {
  T lanes[kWidth<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return lane_index<T>() < typename Lanes<T>::Signed(n) ? load(lanes) : splat<T>(fill);
}

template <class T>
LSK_INLINE void store(T* p, Vec<T> x) {
  const Stored<T> v = narrow(x, T{});
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
LSK_INLINE void store_part(T* p, int64_t n, Vec<T> x) {
  T lanes[kWidth<T>];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Past the caches, where the target has such a store for this size; p is aligned to the vector.
template <class T>
LSK_INLINE void store_stream(T* p, Vec<T> x) {
#if defined(__x86_64__)
  const Stored<T> v = narrow(x, T{});
  if constexpr (sizeof v == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
  if constexpr (sizeof v == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
  if constexpr (sizeof v == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
  if constexpr (sizeof v == 8) return _mm_stream_si64((long long*)p, (long long)v);
#else
  store(p, x);
#endif
}

// exp(x) for x <= 0, exactly 0 below the smallest normal number, NaN for NaN (every comparison is written so that NaN
// survives). 1.5·2^23 + 127 added to x/ln 2 rounds it to an integer n and leaves n + 127, the exponent field of 2^n, in
// the low bits; then exp(x) = 2^n·exp(r), r = x - n·ln 2, with a minimax polynomial on |r| <= ln 2 / 2 (3e-9 relative).
LSK_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  const float magic = 12583039.0f;
  const Vec<float> shifted = x * 0x1.715476p+0f + magic;
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;  // ln 2 in two pieces: n·(the first) is exact
  Vec<float> p = r * 0x1.6a2352p-10f + 0x1.123a6cp-7f;
  p = p * r + 0x1.5558f4p-5f;
  p = p * r + 0x1.555490p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<float> e = p * (Vec<float>)((Bits<float>)shifted << 23);
  return x < -87.0f ? Vec<float>{} : e;
}

// The same in double, with the Taylor polynomial of degree 13 (4e-18).
LSK_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  const double magic = 6755399441056767.0;  // 1.5·2^52 + 1023
  const Vec<double> shifted = x * 0x1.71547652b82fep+0 + magic;
  const Vec<double> n = shifted - magic;
  const Vec<double> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  const double taylor[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                           1. / 720,       1. / 120,      1. / 24,      1. / 6,      0.5,        1.,
                           1.};
  Vec<double> p = splat<double>(1. / 6227020800);
  for (double c : taylor) p = p * r + c;
  const Vec<double> e = p * (Vec<double>)((Bits<double>)shifted << 52);
  return x < -708.0 ? Vec<double>{} : e;
}

}  // namespace
}  // namespace lsk
