// From a call that was checked to launches, for the operators and for tests. Raises where a launch fails.
#pragma once

#include <functional>

#include "plan.h"

namespace lsk {

// `allocate` gives so many bytes of the device, which live until the stream has passed.
void gpu_forward(const Call& call, const Device& device, void* stream, const std::function<void*(int64_t)>& allocate);
void gpu_backward(const Call& call, const Device& device, void* stream);
void gpu_scale(const View& grad, int64_t n, int64_t k, const void* scale, const Device& device, void* stream);

// Of the code for the current GPU; 0 where the kernels were not compiled for it.
int compiled_capability();
int cuda_capability(int index);  // the same of a GPU by its number
// How many clusters of 1, 2, 4 and 8 blocks the current GPU runs at a time; none where the code has no clusters.
void count_clusters(Device& device);

// Of one dtype; instantiated in a translation unit each.
template <class T>
void forward_of(const Call& call, const Plan& plan, void* workspace, void* stream);
template <class T>
void backward_of(const Call& call, const Plan& plan, void* stream);
template <class T>
void scale_of(const View& grad, const void* scale, int64_t n, int64_t k, const Plan& plan, void* stream);

}  // namespace lsk
