// What each instruction set's translation unit offers to the passes: tables of kernels per dtype. Only plain types
// cross this line, so that nothing compiled for AVX-512 can be linked into code that must run without it.
#pragma once

#include <stdint.h>

#include "call.h"

namespace lsk {

// A row's gradient is factor·((mass + penalty·log p)·p - q): p from (zmax, logsum) and z = scale·x, q = q_target at
// class `target` and q_rest elsewhere.
struct GradientRow {
  double scale, zmax, logsum, mass, q_target, q_rest, factor, penalty;
};

// Rows of n classes in a tensor; strides in elements.
struct Tile {
  int64_t rows, n, row_stride, class_stride;
};

// Kernels on n adjacent elements of a tensor's dtype. The logits are z = scale·x, scale > 0, and x is what is passed.
// Class vectors r, t and slope are in the dtype of the arithmetic; r and t may be null: ones and zeros. Classes with
// z = `masked`, which is -inf or NaN (none), do not count in r.
struct RowKernels {
  double (*value)(const void* x);
  // max, sum and, for weights of 1, `rest`; read from memory once where n fits the first-level cache. What follows in
  // memory at `ahead` is prefetched meanwhile.
  Stats<double> (*block)(const void* x, int64_t n, double scale, const void* ahead);
  // The same with `rest` of r and `wt` of t. Where `masked` is NaN, rest.mass is n and not Σ r: that is the same for
  // every row, and summed once.
  Stats<double> (*class_block)(const void* x, const void* r, const void* t, int64_t n, double scale, double masked,
                               const void* ahead);
  // First index with z == value; n where there is none.
  int64_t (*find)(const void* x, int64_t n, double scale, double value);
  // g may be x; a target outside [0, n) belongs to another part of the row.
  void (*gradient)(const void* x, void* g, int64_t n, int64_t target, const GradientRow& row);
  // The same with q_rest·r and factor·slope; one of r and slope may be null: ones.
  void (*class_gradient)(const void* x, const void* r, const void* slope, void* g, int64_t n, int64_t target,
                         const GradientRow& row);
  void (*scale)(void* g, int64_t n, double factor);
  // Between a tile and rows in the dtype of the arithmetic, `pitch` elements apart and padded up to it.
  void (*gather)(void* x, const Tile& tile, void* rows, int64_t pitch);
  void (*scatter)(void* x, const Tile& tile, void* rows, int64_t pitch);
};

// A block of rows of few classes: class k of row `row` + r, in the dtype of the arithmetic and transformed, is
// z[k·pitch + r]. Rows are padded up to a multiple of 16.
struct FewRows {
  void* z;
  const void* t;  // class probabilities, where they lie like z; null for index targets
  int64_t pitch, row, rows;
  double rest_mass;  // Σ r
};

// Kernels on n adjacent elements in the dtype of the arithmetic; r, t and `masked` as above.
struct BlockKernels {
  // z = cap(scale·x), and the slope cap' where it is not null; no cap where `cap` is 0. z may be x.
  void (*transform)(const void* x, void* z, void* slope, int64_t n, double scale, double cap);
  double (*sum)(const void* v, int64_t n);  // Σ v
  Spread<double> (*spread)(const void* x, int64_t n, double scale, double shift);
  // q = a·t + b·r
  void (*mix)(const void* x, const void* t, const void* r, void* q, int64_t n, Weights<double> w, double masked);
  // factor·(logsum - (z - zmax)), where z - zmax counts as 0 if q = 0 and z = -inf
  void (*target_gradient)(const void* x, const void* q, void* g, int64_t n, const GradientRow& row);
  // x·y, which may be x
  void (*multiply)(const void* x, const void* y, void* product, int64_t n);
  // few_forward stores what Call::store does, and writes the gradient, where it is asked for, over z. few_backward
  // writes the gradient of stored rows.
  void (*few_forward)(const Call& call, const FewRows& block);
  void (*few_backward)(const Call& call, const FewRows& block);
};

// A row's gradient is soft·(p_T - t_T) + hard·(mass·p - q), with p_T and t_T the student's and the teacher's
// probabilities at temperature 1/cold: from (zmax, warm) and (teacher_max, given). A hard of 0 leaves its part out, a
// target of -1 none.
struct PairRow {
  double cold, zmax, logsum, warm, teacher_max, given, soft, hard, mass, q_target, q_rest;
  int64_t target;
};

// Kernels on n adjacent logits of a student and as many of a teacher, in the tensors' dtype. The prior, in the dtype of
// the arithmetic, may be null: ones.
struct PairKernels {
  Pair<double> (*stats)(const void* x, const void* t, const void* prior, int64_t n, double cold, bool hard);
  void (*gradient)(const void* x, const void* t, const void* prior, void* g, int64_t n, const PairRow& row);
};

// Of class indices: how many are not ignored, and whether one of those is no class.
struct TargetCount {
  int64_t counted;
  bool outside;
};

struct Kernels {
  RowKernels rows[kDtypes];
  PairKernels pairs[kDtypes];
  BlockKernels blocks[2];  // float, double
  // high, low += x, where x is bfloat16, `high` the upper half of a float and `low` the byte below it, which `last`
  // rounds into `high`
  void (*add_split)(void* high, void* low, const void* x, int64_t n, bool last);
  TargetCount (*count_targets)(const int64_t* target, int64_t n, int64_t ignored, int64_t k);
};

// clang knows the target pragma by another name; until someone measures it there, it gets the portable kernels.
#if defined(__x86_64__) && !defined(__clang__)
#define LSK_X86 1
#endif

const Kernels* portable_kernels();
#if LSK_X86
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
#endif

const Kernels& cpu_kernels();  // those that this process uses

}  // namespace lsk
