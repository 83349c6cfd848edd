// What an instruction set's translation unit offers to the drivers of cpu.cpp: one table of row kernels per dtype.
// Only plain types cross this line, so that nothing compiled for AVX-512 can be linked into code that runs without it.
#pragma once

#include <stdint.h>

#include "row_math.h"

namespace lsk {

enum Dtype { kFloat16, kBFloat16, kFloat32, kFloat64, kDtypes };

// A row's gradient factor·(p - q), with p from (zmax, logsum), q = q_target at class `target` and q_rest elsewhere.
struct GradientRow {
  double zmax, logsum, q_target, q_rest, factor;
};

struct RowKernels {
  // max, exp-sum and deviation sum of z[0, n): one read from memory, then reads of the first-level cache.
  Stats<double> (*block)(const void* z, int64_t n);
  // First index with z == value (of a NaN, where value is one); n where there is none.
  int64_t (*find)(const void* z, int64_t n, double value);
  // g may be z; target outside [0, n) belongs to no class here; `stream` writes g past the caches.
  void (*gradient)(const void* z, void* g, int64_t n, int64_t target, const GradientRow& row, bool stream);
  void (*scale)(void* g, int64_t n, double factor);
};

// A block stays in a 32 KiB first-level cache between its two sweeps.
constexpr int64_t kBlock = 4096;

const RowKernels* portable_kernels();
#if defined(__x86_64__)
const RowKernels* avx2_kernels();
const RowKernels* avx512_kernels();
#endif

}  // namespace lsk
