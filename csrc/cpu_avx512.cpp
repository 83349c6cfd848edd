// Row kernels for AVX-512 (F, BW, DQ, VL: what ATen calls avx512). The pragma comes after the system headers: their
// functions stay baseline code.
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LSK_SIMD_BYTES 64
#include "cpu_table.h"

const lsk::Kernels* lsk::avx512_kernels() { return &kTable; }
#endif
