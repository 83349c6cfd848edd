// What each instruction set's translation unit offers to cpu.cpp: a table of row kernels per dtype. Only plain types
// cross this line, so that nothing compiled for AVX-512 can be linked into code that must run without it.
#pragma once

#include <stdint.h>

#include "row_math.h"

namespace lsk {

enum Dtype { kFloat16, kBFloat16, kFloat32, kFloat64, kDtypes };

// A row's gradient is factor·(p - q): p from (zmax, logsum), q = q_target at class `target` and q_rest elsewhere.
struct GradientRow {
  double zmax, logsum, q_target, q_rest, factor;
};

struct RowKernels {
  double (*logit)(const void* z);
  // Statistics of z[0, n), read from memory once where n fits the first-level cache.
  Stats<double> (*block)(const void* z, int64_t n);
  // First index with z == value; n where there is none.
  int64_t (*find)(const void* z, int64_t n, double value);
  // g may be z; a target outside [0, n) belongs to another part of the row.
  void (*gradient)(const void* z, void* g, int64_t n, int64_t target, const GradientRow& row);
  void (*scale)(void* g, int64_t n, double factor);
};

// clang knows the target pragma by another name; until someone measures it there, it gets the portable kernels.
#if defined(__x86_64__) && !defined(__clang__)
#define LSK_X86 1
#endif

const RowKernels* portable_kernels();
#if LSK_X86
const RowKernels* avx2_kernels();
const RowKernels* avx512_kernels();
#endif

// The instruction set that this process uses: "avx512", "avx2" or "portable".
const char* cpu_capability();

}  // namespace lsk
