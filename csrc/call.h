// The operands of one call, checked by operands.h, worked on by the CPU's passes and the GPU's kernels; semantics in
// labelsmooth_kernels/ops.py.
#pragma once

#include "row_math.h"

namespace lsk {

// A number per row or class in the dtype of the arithmetic; a stride of 0 repeats one, no data means the fallback.
struct Column {
  char* data = nullptr;
  bool wide = false;
  int64_t stride = 1;
  double fallback = 1;

  LSK_MEMBER explicit operator bool() const { return data != nullptr; }
  template <class V>
  LSK_MEMBER V get(int64_t i) const {
    if (data == nullptr) return V(fallback);
    return wide ? V(reinterpret_cast<double*>(data)[i * stride]) : V(reinterpret_cast<float*>(data)[i * stride]);
  }
  LSK_MEMBER double operator[](int64_t i) const { return get<double>(i); }
  template <class V>
  LSK_MEMBER void set(int64_t i, V value) const {
    if (data == nullptr) return;
    wide ? reinterpret_cast<double*>(data)[i] = value : reinterpret_cast<float*>(data)[i] = static_cast<float>(value);
  }
  LSK_MEMBER const char* at(int64_t i) const { return data == nullptr ? nullptr : data + i * (wide ? 8 : 4); }
};

// A (..., K) tensor of 2 or 3 dimensions: rows of `inner` adjacent numbers are row_stride elements apart.
struct View {
  char* data = nullptr;
  Dtype dtype = kFloat32;
  int64_t element = 4, inner = 1, outer_stride = 0, row_stride = 0, class_stride = 1;

  LSK_MEMBER explicit operator bool() const { return data != nullptr; }
  LSK_MEMBER char* at(int64_t row, int64_t k) const {
    const int64_t outer = row < inner ? 0 : row / inner;
    return data + (outer * outer_stride + (row - outer * inner) * row_stride + k * class_stride) * element;
  }
};

// What a row comes to.
template <class V>
struct RowEnd {
  V zmax, logsum, mass, count, loss, nll, entropy, variance, collision;
  int64_t best;
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
  double z_loss = 0, penalty = 0, logit_scale = 1, softcap = 0;  // a softcap of 0 is none
  Column loss, nll, entropy, variance, collision;
  int64_t* prediction = nullptr;

  LSK_MEMBER bool ignored(int64_t row) const { return target != nullptr && target[row] == ignore_index; }
  LSK_MEMBER bool unread(int64_t row) const { return ignored(row) && prediction == nullptr; }
  // A GPU finds out as it goes; elsewhere the targets were looked at before.
  LSK_MEMBER bool valid(int64_t row) const {
    return target == nullptr || ignored(row) || (target[row] >= 0 && target[row] < k);
  }
  LSK_MEMBER double factor() const { return wide ? logit_scale : float(logit_scale); }  // the scale in the arithmetic
  // The CPU's kernels of the logits as they lie know a positive factor.
  LSK_MEMBER bool transforms() const { return softcap != 0 || !(factor() > 0); }
  // The CPU's kernels of the logits' own dtype suffice.
  LSK_MEMBER bool simple() const { return target != nullptr && !finite && !transforms() && !spreads(); }
  // Whether the CPU's lanes are rows: at 100 adjacent classes these take 0.8 (float32) and 0.4 (bfloat16) of the cycles
  // that classes in lanes take, at 256 classes 1.6 and 0.95 (AVX2). Classes apart have to be transposed otherwise.
  LSK_MEMBER bool few() const {
    return !finite && !spreads() && softcap == 0 && !grad_of_target && k <= (logits.class_stride == 1 ? 128 : 256);
  }
  // The sums of Spread are asked for.
  LSK_MEMBER bool spreads() const { return entropy || penalty != 0; }
  // More than an index target: for the kernels of a GPU.
  bool general() const {
    return target == nullptr || rest || finite || transforms() || factor() != 1 || spreads() || grad_of_target;
  }
  template <class V>
  LSK_MEMBER Weights<V> row_weights(int64_t row, V count) const {
    return weights(eps.get<V>(row), count, others);
  }

  template <class V>
  LSK_MEMBER RowEnd<V> ended(int64_t row, const Stats<V>& s) const {
    const V covered = finite ? s.cover : prior ? V(1) : V(k), logs = log(s.sum);
    const Weights<V> w = row_weights<V>(row, covered);
    const V all = target != nullptr && !rest ? V(1) : w.a * s.wt.mass + w.b * s.rest.mass;
    const V given_up = penalty == 0 ? V(0) : V(penalty) * lsk::entropy(logs, s);
    return {s.max,
            logs,
            all + given_up,
            covered,
            row_loss(all, logs, w, s, V(z_loss)) - given_up,
            s.t.mass * logs - s.t.dev,
            lsk::entropy(logs, s),
            lsk::variance(s),
            s.spread.square / (s.sum * s.sum),
            s.best};
  }

  template <bool kSpreads = true, class V>  // not: none of Spread's is asked for
  LSK_MEMBER void store(int64_t row, const RowEnd<V>& r) const {
    const bool none = unread(row), out = ignored(row), good = valid(row);
    zmax.set(row, none ? V(0) : r.zmax);
    logsum.set(row, none ? V(0) : r.logsum);
    mass.set(row, none ? V(0) : r.mass);
    count.set(row, none ? V(0) : r.count);
    loss.set(row, out ? V(0) : good ? r.loss : V(NAN));
    nll.set(row, out ? V(0) : good ? r.nll : V(NAN));
    if (kSpreads) {
      entropy.set(row, r.entropy);
      variance.set(row, r.variance);
      collision.set(row, r.collision);
    }
    if (prediction != nullptr) prediction[row] = r.best < k ? r.best : k - 1;  // NaNs have no maximum
  }
};

}  // namespace lsk
