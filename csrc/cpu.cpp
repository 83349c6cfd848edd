// The operators of the CPU: cpu_passes.cpp does the work.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "cpu_dispatch.h"
#include "cpu_passes.h"
#include "operands.h"

namespace lsk {
namespace {

// The blocks are the same for any number of threads, and so are the bits.
template <class F>
double sum_of_blocks(int64_t n, const F& f) {
  constexpr int64_t kBlock = 4096, kGrain = 4;  // rows of a block, blocks that are worth waking a thread for
  if (n <= kBlock) return f(int64_t(0), n);
  std::vector<double> sums((n + kBlock - 1) / kBlock);
  at::parallel_for(0, sums.size(), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) sums[b] = f(b * kBlock, std::min(n, (b + 1) * kBlock));
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// How many rows count, once every target is known to be a class or ignored.
double count_rows(const Call& call) {
  if (call.target == nullptr) return double(call.n);
  const double counted = sum_of_blocks(call.n, [&](int64_t begin, int64_t end) {
    const TargetCount found = cpu_kernels().count_targets(call.target + begin, end - begin, call.ignore_index, call.k);
    return found.outside ? NAN : double(found.counted);
  });
  if (std::isnan(counted))
    for (int64_t i = 0; i < call.n; ++i)
      TORCH_CHECK_INDEX(call.valid(i), "target[", i, "] = ", call.target[i], " is outside [0, ", call.k,
                        ") and is not ignore_index (", call.ignore_index, ")");
  return counted;
}

// Σ w_y of the rows that count.
double total_weight(const Call& call) {
  return sum_of_blocks(call.n, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += call.ignored(i) ? 0 : call.weight[call.target[i]];
    return sum;
  });
}

// Σ loss, in float64: at the start of a training all losses are alike, and float32 would round them in one direction.
template <class T>
double total_loss(const Call& call) {
  const T* loss = reinterpret_cast<const T*>(call.loss.data);
  return sum_of_blocks(call.n, [&](int64_t begin, int64_t end) {
    double sums[4] = {};  // four, because a sum waits for the one before
    int64_t i = begin;
    for (; i + 4 <= end; i += 4)
      for (int j = 0; j < 4; ++j) sums[j] += loss[i + j];
    for (; i < end; ++i) sums[0] += loss[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  });
}

struct Cpu {
  static Tensor fresh(Tensor untouched) { return in_large_pages(std::move(untouched)); }

  static void forward(const Call& call, const Tensor&) {
    count_rows(call);
    run_forward(call);
  }

  static void backward(const Call& call, const Tensor&) {
    count_rows(call);
    run_backward(call);
  }

  static void scale(const View& view, const Tensor& rows, const Tensor& scale) {
    const double factor = output_column(scale)[0];
    if (factor == 1) return;
    if (view.class_stride == 1)
      run_scale(view, rows.numel() / rows.size(-1), rows.size(-1), factor);
    else
      rows.copy_(rows.to(acc_dtype(rows)).mul_(factor));
  }
};

Tensor tensor_of(double value, at::IntArrayRef shape, const at::TensorOptions& options) {
  const Tensor t = at::empty(shape, options);
  output_column(t).set(0, value);
  return t;
}

// (loss, scale, saved, grad) of a mean or sum: see cpu_reduced in ops.py.
Results reduced(const Tensor& logits, const Tensor& target, OptionalTensor weight, double eps, int64_t ignore_index,
                bool mean, bool with_saved, bool with_grad) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  Prepared p(logits, false, target, weight, {}, eps, {}, {}, ignore_index, false, false, 0, 0, 1, {});
  Call& call = p.call;
  const auto options = logits.options().dtype(acc_dtype(logits));
  const double counted = count_rows(call);
  const double divisor = weight && call.target != nullptr ? total_weight(call) : counted;
  const Tensor scale = tensor_of(mean ? 1 / divisor : 1, {1}, options);
  set_column(call.scale, scale, "scale", logits, call.n, true);
  const Tensor grad = with_grad ? Cpu::fresh(at::empty_like(logits)) : at::empty({0}, logits.options());
  if (with_grad) call.grad = view_of(grad, "grad", true);
  const Tensor loss = Cpu::fresh(at::empty({call.n}, options));
  call.loss = output_column(loss);
  // The kernels of few classes make the gradient while they have what the others store.
  const bool stored = with_saved || (with_grad && !call.few());
  const Tensor saved = Cpu::fresh(at::empty({4, stored ? call.n : 0}, options));
  if (stored) p.set_saved(saved);
  run_forward(call);
  const double total = call.wide ? total_loss<double>(call) : total_loss<float>(call);
  return {tensor_of(mean ? total / divisor : total, {}, options), scale,
          with_saved ? saved : at::empty({4, 0}, options), grad};
}

// high + low += x: see Kernels::add_split.
void add_split_(Tensor& high, Tensor& low, const Tensor& x, bool last) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(high.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16,
              "high and x must be bfloat16, got ", high.scalar_type(), " and ", x.scalar_type());
  TORCH_CHECK(low.scalar_type() == at::kByte, "low must be uint8, got ", low.scalar_type());
  TORCH_CHECK(high.sizes() == low.sizes() && high.sizes() == x.sizes(), "high, low and x must have one shape, got ",
              high.sizes(), ", ", low.sizes(), " and ", x.sizes());
  TORCH_CHECK(high.is_contiguous() && low.is_contiguous() && x.is_contiguous(), "high, low and x must be contiguous");
  run_add_split(static_cast<uint16_t*>(high.mutable_data_ptr()), low.mutable_data_ptr<uint8_t>(),
                static_cast<const uint16_t*>(x.const_data_ptr()), x.numel(), last);
}

}  // namespace

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CPU, m) {
  implement<Cpu>(m, "cpu");
  m.impl("cpu_reduced", &reduced);
  m.impl("cpu_add_split_", &add_split_);
}

}  // namespace lsk
