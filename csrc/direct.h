// F.cross_entropy without Python: one call from its arguments to a loss that autograd knows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace lsk {

// The loss of logits on the CPU, with PyTorch's own options. Nothing where the call is another one, where somebody
// watches what is computed, and where an argument is wrong: the gate in Python serves it, or says what is wrong.
std::optional<at::Tensor> cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                        const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                        const std::string& reduction, double eps);

}  // namespace lsk
