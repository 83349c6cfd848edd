// The operators of the CPU: cpu_passes.cpp does the work.
#include <torch/library.h>

#include "cpu_passes.h"
#include "operands.h"

namespace lsk {
namespace {

struct Cpu {
  static Tensor fresh(Tensor untouched) { return in_large_pages(std::move(untouched)); }

  static void forward(const Call& call, const Tensor&) {
    check_targets(call);
    run_forward(call);
  }

  static void backward(const Call& call, const Tensor&) {
    check_targets(call);
    run_backward(call);
  }

  static void scale(const View& view, const Tensor& rows, const Tensor& scale) {
    const double factor = scale.item().toDouble();
    if (factor == 1) return;
    if (view.class_stride == 1)
      run_scale(view, rows.numel() / rows.size(-1), rows.size(-1), factor);
    else
      rows.copy_(rows.to(acc_dtype(rows)).mul_(factor));
  }

 private:
  static void check_targets(const Call& call) {
    for (int64_t i = 0; i < call.n; ++i)
      TORCH_CHECK_INDEX(call.valid(i), "target[", i, "] = ", call.target[i], " is outside [0, ", call.k,
                        ") and is not ignore_index (", call.ignore_index, ")");
  }
};

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
  m.impl("cpu_add_split_", &add_split_);
}

}  // namespace lsk
