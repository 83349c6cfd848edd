// The operands of one call, checked by cpu.cpp and worked on by cpu_passes.cpp; semantics in
// labelsmooth_kernels/ops.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu_kernels.h"

namespace lsk {

// A number per row or class in the dtype of the arithmetic; a stride of 0 repeats one, no data means the fallback.
struct Column {
  char* data = nullptr;
  bool wide = false;
  int64_t stride = 1;
  double fallback = 1;

  explicit operator bool() const { return data != nullptr; }
  double operator[](int64_t i) const {
    if (data == nullptr) return fallback;
    return wide ? reinterpret_cast<double*>(data)[i * stride] : reinterpret_cast<float*>(data)[i * stride];
  }
  void set(int64_t i, double value) const {
    if (data == nullptr) return;
    wide ? reinterpret_cast<double*>(data)[i] = value : reinterpret_cast<float*>(data)[i] = static_cast<float>(value);
  }
  const char* at(int64_t i) const { return data == nullptr ? nullptr : data + i * (wide ? 8 : 4); }
};

// A (..., K) tensor of 2 or 3 dimensions: rows of `inner` adjacent numbers are row_stride elements apart.
struct View {
  char* data = nullptr;
  Dtype dtype = kFloat32;
  int64_t element = 4, inner = 1, outer_stride = 0, row_stride = 0, class_stride = 1;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t row, int64_t k) const {
    const int64_t outer = row < inner ? 0 : row / inner;
    return data + (outer * outer_stride + (row - outer * inner) * row_stride + k * class_stride) * element;
  }
};

struct Call {
  int64_t n = 0, k = 0;
  bool wide = false;                 // the arithmetic is double
  View logits, grad, probabilities;  // probabilities in the dtype of the logits, or another with the same arithmetic
  const int64_t* target = nullptr;   // null where probabilities are given
  Column weight, prior, rest;        // rest = weight·prior
  Column eps, scale, zmax, logsum, mass, count;
  int64_t ignore_index = -100;
  bool others = false, finite = false, grad_of_target = false;
  double z_loss = 0, logit_scale = 1, softcap = 0;  // a softcap of 0 is none
  Column loss, nll, entropy;
  int64_t* prediction = nullptr;

  bool ignored(int64_t row) const { return target != nullptr && target[row] == ignore_index; }
  bool unread(int64_t row) const { return ignored(row) && prediction == nullptr; }
  double factor() const { return wide ? logit_scale : float(logit_scale); }  // the scale in the arithmetic
  // The kernels of the logits as they lie know a positive factor.
  bool transforms() const { return softcap != 0 || !(factor() > 0); }
  // The kernels of the logits' own dtype suffice.
  bool simple() const { return target != nullptr && !finite && !transforms() && !entropy; }
  Weights<double> row_weights(int64_t row, double count) const { return weights(eps[row], count, others); }
};

void run_forward(const Call& call);
void run_backward(const Call& call);
void run_scale(const View& grad, int64_t n, int64_t k, double factor);  // of unit class stride
void run_add_split(uint16_t* high, uint8_t* low, const uint16_t* x, int64_t n, bool last);

}  // namespace lsk
