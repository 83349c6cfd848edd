// The operators of every device: operands are checked and described here, results allocated; a Runner does the work.
// The schemas and the semantics of the operators stand in labelsmooth_kernels/ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "call.h"

namespace lsk {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

inline constexpr at::ScalarType kScalarTypes[kDtypes] = {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};

// Dimensions in the order of their strides; each must step over all that lies before it.
inline bool overlaps_itself(const Tensor& t) {
  c10::SmallVector<std::pair<int64_t, int64_t>, 3> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= last) return true;
    last += stride * (size - 1);
  }
  return false;
}

inline View view_of(const Tensor& t, const char* name, bool written) {
  const auto* dtype = std::find(kScalarTypes, kScalarTypes + kDtypes, t.scalar_type());
  TORCH_CHECK(dtype < kScalarTypes + kDtypes, name, " must be float16, bfloat16, float32 or float64, got ",
              t.scalar_type());
  TORCH_CHECK(t.dim() == 2 || t.dim() == 3, name, " must have 2 or 3 dimensions, got shape ", t.sizes());
  TORCH_CHECK(t.size(-1) >= 1 || t.size(-2) * (t.dim() == 3 ? t.size(0) : 1) == 0, name,
              " must have at least one class, got shape ", t.sizes());
  TORCH_CHECK(!written || !overlaps_itself(t), name, " is written in place and must not overlap itself, got strides ",
              t.strides());
  View view;
  view.data = static_cast<char*>(written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr()));
  view.dtype = static_cast<Dtype>(dtype - kScalarTypes);
  view.element = t.element_size();
  view.inner = t.size(-2);
  view.outer_stride = t.dim() == 3 ? t.stride(0) : 0;
  view.row_stride = t.stride(-2);
  view.class_stride = t.size(-1) == 1 ? 1 : t.stride(-1);
  return view;
}

inline const int64_t* index_target(const Tensor& target, int64_t n) {
  TORCH_CHECK(target.scalar_type() == at::kLong, "target must be int64 or floating-point, got ", target.scalar_type());
  TORCH_CHECK(target.dim() == 1 && target.size(0) == n, "target must have shape (", n, "), got ", target.sizes());
  TORCH_CHECK(target.is_contiguous(), "target must be contiguous");
  return target.const_data_ptr<int64_t>();
}

inline at::ScalarType acc_dtype(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_device(const Tensor& t, const char* name, const Tensor& logits) {
  TORCH_CHECK(t.device() == logits.device(), name, " must be on the device of logits, ", logits.device(), ", got ",
              t.device());
}

// n numbers in the dtype of the arithmetic, or one for all.
inline void set_column(Column& column, OptionalTensor t, const char* name, const Tensor& logits, int64_t n,
                       bool one_for_all) {
  if (!t) return;
  TORCH_CHECK(t->scalar_type() == acc_dtype(logits), name, " must be ", acc_dtype(logits), " for ",
              logits.scalar_type(), " logits, got ", t->scalar_type());
  check_device(*t, name, logits);
  TORCH_CHECK(t->is_contiguous(), name, " must be contiguous, got strides ", t->strides());
  TORCH_CHECK(t->numel() == n || (one_for_all && t->numel() == 1), name, " must have ", one_for_all ? "1 or " : "", n,
              " elements, got ", t->numel());
  column.data = static_cast<char*>(const_cast<void*>(t->const_data_ptr()));
  column.wide = t->scalar_type() == at::kDouble;
  column.stride = t->numel() == n ? 1 : 0;
}

inline Column output_column(const Tensor& t, int64_t row = 0) {
  Column column;
  column.wide = t.scalar_type() == at::kDouble;
  if (t.numel() > 0) column.data = static_cast<char*>(t.mutable_data_ptr());
  if (row > 0) column.data += row * t.size(-1) * t.element_size();
  return column;
}

// A call and the tensors that it made for itself.
struct Prepared {
  Call call;
  Tensor probabilities;
  std::optional<Tensor> rest;

  // The arguments of every operator between its logits and what is its own, in the order of the schema.
  Prepared(const Tensor& logits, bool written, const Tensor& target, OptionalTensor weight, OptionalTensor prior,
           double eps, OptionalTensor eps_rows, OptionalTensor row_scale, int64_t ignore_index, bool others,
           bool finite, double z_loss, double penalty, double logit_scale, std::optional<double> softcap) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    check_device(target, "target", logits);
    call.logits = view_of(logits, "logits", written);
    call.k = logits.size(-1);
    call.n = logits.size(-2) * (logits.dim() == 3 ? logits.size(0) : 1);
    call.wide = logits.scalar_type() == at::kDouble;
    if (target.is_floating_point()) {
      TORCH_CHECK(target.sizes() == logits.sizes(), "target must have the shape of logits, ", logits.sizes(), ", got ",
                  target.sizes());
      // Kernels convert 16-bit floats to float; between double and the others is rare enough for a copy.
      probabilities = acc_dtype(target) == acc_dtype(logits) ? target : target.to(acc_dtype(logits));
      call.probabilities = view_of(probabilities, "target", false);
    } else {
      call.target = index_target(target, call.n);
    }
    set_column(call.weight, weight, "weight", logits, call.k, false);
    set_column(call.prior, prior, "prior", logits, call.k, false);
    if (weight && prior) rest = weight->mul(*prior);
    set_column(call.rest, rest ? rest : weight ? weight : prior, "weight", logits, call.k, false);
    call.eps.fallback = eps;
    set_column(call.eps, eps_rows, "eps_rows", logits, call.n, true);
    set_column(call.scale, row_scale, "row_scale", logits, call.n, true);
    TORCH_CHECK(!(softcap && !(*softcap > 0)), "softcap must be positive, got ", *softcap);
    call.ignore_index = ignore_index;
    call.others = others;
    call.finite = finite;
    call.z_loss = z_loss;
    call.penalty = penalty;
    call.logit_scale = logit_scale;
    call.softcap = softcap.value_or(0);
  }

  void use(const Tensor& logits, const Tensor& saved) {
    TORCH_CHECK(saved.dim() == 2 && saved.size(0) == 4 && saved.size(1) == call.n, "saved must have shape (4, ", call.n,
                "), got ", saved.sizes());
    Column checked;
    set_column(checked, saved, "saved", logits, 4 * call.n, false);
    set_saved(saved);
  }

  void set_saved(const Tensor& saved) {
    call.zmax = output_column(saved, 0);
    call.logsum = output_column(saved, 1);
    call.mass = output_column(saved, 2);
    call.count = output_column(saved, 3);
  }
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, saved, stats, prediction

template <class Runner>
Results run(Prepared& p, const Tensor& logits, int64_t n_stats) {
  TORCH_CHECK(n_stats >= 0 && n_stats <= 4 && n_stats != 3, "n_stats must be 0, 1, 2 or 4, got ", n_stats);
  const auto options = logits.options().dtype(acc_dtype(logits));
  const int64_t n = p.call.n;
  const Tensor loss = Runner::fresh(at::empty({n}, options)), saved = Runner::fresh(at::empty({4, n}, options));
  const Tensor stats = at::empty({n_stats, n}, options);
  const Tensor prediction = at::empty({n_stats > 0 ? n : 0}, options.dtype(at::kLong));
  p.call.loss = output_column(loss);
  p.set_saved(saved);
  if (n_stats > 0) p.call.nll = output_column(stats, 0);
  if (n_stats > 1) p.call.entropy = output_column(stats, 1);
  if (n_stats > 2) p.call.variance = output_column(stats, 2);
  if (n_stats > 2) p.call.collision = output_column(stats, 3);
  if (n_stats > 0) p.call.prediction = prediction.mutable_data_ptr<int64_t>();
  Runner::forward(p.call, logits);
  return {loss, saved, stats, prediction};
}

// Row... are the arguments that all operators share. A Runner has `forward` and `backward` of a call, the tensor being
// that of its logits, `fresh`, which may prepare the memory of an untouched tensor, and `scale`.
template <class Runner, class... Row>
struct OperatorsOf {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, Row... row, bool with_grad,
                                                                    int64_t n_stats) {
    Prepared p(logits, false, row...);
    const Tensor grad = with_grad ? Runner::fresh(at::empty_like(logits)) : at::empty({0}, logits.options());
    if (with_grad) p.call.grad = view_of(grad, "grad", true);
    return std::tuple_cat(run<Runner>(p, logits, n_stats), std::make_tuple(grad));
  }

  static Results forward_(Tensor& logits, Row... row, int64_t n_stats) {
    Prepared p(logits, true, row...);
    p.call.grad = p.call.logits;
    return run<Runner>(p, logits, n_stats);
  }

  static Tensor backward(const Tensor& logits, Row... row, const Tensor& saved) {
    Prepared p(logits, false, row...);
    p.use(logits, saved);
    const Tensor grad = Runner::fresh(at::empty_like(logits));
    p.call.grad = view_of(grad, "grad", true);
    Runner::backward(p.call, logits);
    return grad;
  }

  static void backward_(Tensor& logits, Row... row, const Tensor& saved) {
    Prepared p(logits, true, row...);
    p.use(logits, saved);
    p.call.grad = p.call.logits;
    Runner::backward(p.call, logits);
  }

  static Tensor target_grad(const Tensor& logits, Row... row, const Tensor& saved) {
    Prepared p(logits, false, row...);
    const Tensor& target = std::get<0>(std::tie(row...));
    TORCH_CHECK(target.is_floating_point(), "target must be floating-point to have a gradient, got ",
                target.scalar_type());
    p.use(logits, saved);
    const Tensor grad = Runner::fresh(at::empty_like(p.probabilities));
    p.call.grad = view_of(grad, "grad", true);
    p.call.grad_of_target = true;
    Runner::backward(p.call, logits);
    return grad.to(target.scalar_type());
  }
};

template <class Runner>
void scale_(Tensor& grad, const Tensor& scale) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(scale.scalar_type() == acc_dtype(grad) && scale.numel() == 1, "scale must be one ", acc_dtype(grad),
              " element for a ", grad.scalar_type(), " grad, got ", scale.numel(), " of ", scale.scalar_type());
  check_device(scale, "scale", grad);
  Tensor rows = grad;  // any dimension of adjacent elements will do for the last
  for (int64_t d = 0; d < grad.dim() && rows.stride(-1) != 1; ++d)
    if (grad.stride(d) == 1 && grad.size(d) > 1) rows = grad.transpose(d, -1);
  const View view = view_of(rows, "grad", true);
  if (grad.numel() > 0) Runner::scale(view, rows, scale);
}

template <class Runner>
using Operators = OperatorsOf<Runner, const Tensor&, OptionalTensor, OptionalTensor, double, OptionalTensor,
                              OptionalTensor, int64_t, bool, bool, double, double, double, std::optional<double>>;

// As the operators `{backend}_{name}` of the dispatch key that m is for.
template <class Runner>
void implement(torch::Library& m, const std::string& backend) {
  using Ops = Operators<Runner>;
  const auto name = [&](const char* op) { return backend + "_" + op; };
  m.impl(name("forward").c_str(), &Ops::forward);
  m.impl(name("forward_").c_str(), &Ops::forward_);
  m.impl(name("backward").c_str(), &Ops::backward);
  m.impl(name("backward_").c_str(), &Ops::backward_);
  m.impl(name("target_grad").c_str(), &Ops::target_grad);
  m.impl(name("scale_").c_str(), &scale_<Runner>);
}

}  // namespace lsk
