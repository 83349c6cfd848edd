// The operators of labelsmooth_kernels/ops.py as C++ functions, one set per device; the schemas and semantics are there.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace lsk {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu_forward(const Tensor& logits, const Tensor& target,
                                                                       double eps, OptionalTensor eps_rows,
                                                                       OptionalTensor row_scale, int64_t ignore_index,
                                                                       bool with_grad, bool with_stats);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_forward_(Tensor& logits, const Tensor& target, double eps,
                                                                OptionalTensor eps_rows, OptionalTensor row_scale,
                                                                int64_t ignore_index, bool with_stats);
Tensor cpu_backward(const Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows,
                    OptionalTensor row_scale, int64_t ignore_index, const Tensor& zmax, const Tensor& logsum);
void cpu_backward_(Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows, OptionalTensor row_scale,
                   int64_t ignore_index, const Tensor& zmax, const Tensor& logsum);
void cpu_scale_(Tensor& grad, const Tensor& scale);

// The instruction set that the row kernels use in this process: "avx512", "avx2" or "portable".
std::string cpu_capability();

}  // namespace lsk
