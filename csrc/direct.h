// F.cross_entropy without Python: one call from its arguments to a loss that autograd knows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lsk {

enum class Reduction { kNone, kMean, kSum };

// The loss of logits on the CPU, with PyTorch's own options. There is none where the call is another one, where PyTorch
// traces or transforms it, and where an argument is wrong: the gate in Python serves the call, or says what is wrong.
std::optional<at::Tensor> cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                        const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                        Reduction reduction, double eps);

}  // namespace lsk
