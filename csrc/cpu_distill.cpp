// Distillation on the CPU: temperature² times the divergence from a teacher plus the smoothed loss, in one pass.
//
// Bytes: student and teacher are read from memory once and the gradient is written once; the second reading of a row
// finds it in the second-level cache. Six exponentials per class: three for the sums, three for the gradient.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu_kernels.h"
#include "cpu_passes.h"
#include "operands.h"

namespace lsk {
namespace {

constexpr int64_t kBlock = 2048;  // of both tensors: stays in a first-level cache between the sweeps over it

// Student, teacher and gradient are (N, K) with adjacent classes, of one dtype.
struct DistillCall {
  int64_t n = 0, k = 0;
  bool others = false;
  View student, teacher, grad;
  const int64_t* target = nullptr;
  Column prior, eps, scale, divergence, loss;  // the last two are made: KL at the temperature, cross-entropy at 1
  int64_t ignore_index = -100;
  double alpha = 1, temperature = 1;

  bool hard() const { return alpha != 1; }
};

Pair<double> pair_of_row(const DistillCall& call, int64_t row, double cold) {
  const PairKernels& kernels = cpu_kernels().pairs[call.student.dtype];
  Pair<double> all = no_pair<double>();
  for (int64_t k = 0; k < call.k; k += kBlock) {
    const int64_t n = std::min(kBlock, call.k - k);
    const Pair<double> part =
        kernels.stats(call.student.at(row, k), call.teacher.at(row, k), call.prior.at(k), n, cold, call.hard());
    all = k == 0 ? part : merge(all, part, cold);
  }
  return all;
}

void distill_row(const DistillCall& call, int64_t row) {
  const int64_t y = call.target[row];
  if (y == call.ignore_index) {
    call.divergence.set(row, 0.0);
    call.loss.set(row, 0.0);
    if (call.grad) std::memset(call.grad.at(row, 0), 0, call.k * call.grad.element);
    return;
  }
  const Kernels& kernels = cpu_kernels();
  const Dtype dtype = call.student.dtype;
  const double cold = 1 / call.temperature;
  Pair<double> all = pair_of_row(call, row, cold);
  const Weights<double> w = weights(call.eps[row], call.prior ? 1.0 : double(call.k), call.others);
  all.student.wt = {1, kernels.rows[dtype].value(call.student.at(row, y)) - origin(all.student.max)};
  const double logsum = std::log(all.student.sum), mass = call.prior ? w.a + w.b * all.student.rest.mass : 1;
  call.divergence.set(row, divergence(all));
  call.loss.set(row, call.hard() ? row_loss(mass, logsum, w, all.student, 0.0) : 0.0);
  if (!call.grad) return;
  const double factor = call.scale[row], soft = factor * call.alpha * call.temperature;
  PairRow rule = {cold, all.student.max, logsum, std::log(all.warm), all.teacher_max, std::log(all.given), soft};
  rule.hard = call.hard() ? factor * (1 - call.alpha) : 0;
  rule.mass = mass;
  rule.q_target = w.a + w.b * call.prior[y];
  rule.q_rest = w.b;
  rule.target = call.hard() ? y : -1;
  kernels.pairs[dtype].gradient(call.student.at(row, 0), call.teacher.at(row, 0), call.prior.at(0),
                                call.grad.at(row, 0), call.k, rule);
}

View rows_of(const Tensor& t, const char* name, const Tensor& student, bool written) {
  TORCH_CHECK(t.dim() == 2 && t.sizes() == student.sizes() && t.scalar_type() == student.scalar_type(), name,
              " must be ", student.scalar_type(), " ", student.sizes(), " as student is, got ", t.scalar_type(), " ",
              t.sizes());
  const View view = view_of(t, name, written);
  TORCH_CHECK(view.class_stride == 1, name, " must have adjacent classes, got strides ", t.strides());
  return view;
}

std::tuple<Tensor, Tensor> distill(const Tensor& student, const Tensor& teacher, const Tensor& target,
                                   OptionalTensor prior, double eps, OptionalTensor eps_rows, OptionalTensor row_scale,
                                   int64_t ignore_index, bool others, double alpha, double temperature,
                                   bool with_grad) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  DistillCall call;
  call.student = rows_of(student, "student", student, false);
  call.teacher = rows_of(teacher, "teacher", student, false);
  const Tensor grad =
      with_grad ? in_large_pages(at::empty(student.sizes(), student.options())) : at::empty({0}, student.options());
  if (with_grad) call.grad = rows_of(grad, "grad", student, true);
  call.n = student.size(0);
  call.k = student.size(1);
  call.target = index_target(target, call.n);
  set_column(call.prior, prior, "prior", student, call.k, false);
  call.eps.fallback = eps;
  set_column(call.eps, eps_rows, "eps_rows", student, call.n, true);
  set_column(call.scale, row_scale, "row_scale", student, call.n, true);
  TORCH_CHECK(temperature > 0, "temperature must be positive, got ", temperature);
  call.ignore_index = ignore_index;
  call.others = others;
  call.alpha = alpha;
  call.temperature = temperature;
  for (int64_t i = 0; i < call.n; ++i)
    TORCH_CHECK_INDEX(call.target[i] == ignore_index || (call.target[i] >= 0 && call.target[i] < call.k), "target[", i,
                      "] = ", call.target[i], " is outside [0, ", call.k, ") and is not ignore_index (", ignore_index,
                      ")");
  const Tensor terms = at::empty({2, call.n}, student.options().dtype(acc_dtype(student)));
  call.divergence = output_column(terms, 0);
  call.loss = output_column(terms, 1);
  at::parallel_for(0, call.n, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, call.k)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) distill_row(call, row);
                   });
  return {terms, grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CPU, m) { m.impl("cpu_distill", &distill); }

}  // namespace lsk
