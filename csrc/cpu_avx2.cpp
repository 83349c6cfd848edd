// Row kernels for AVX2 with FMA and F16C. The pragma comes after the system headers: their functions stay baseline
// code.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#pragma GCC target("avx2,fma,f16c")
#define LSK_SIMD_BYTES 32
#include "cpu_table.h"

const lsk::Kernels* lsk::avx2_kernels() { return &kTable; }
#endif
