// The work of the CPU's operators, on operands that were checked.
#pragma once

#include <ATen/core/Tensor.h>

#include "call.h"

namespace lsk {

// A tensor whose memory is yet untouched. Most of the time of a large fresh allocation goes into page faults; 2 MiB
// pages make 512 times fewer of them.
at::Tensor in_large_pages(at::Tensor fresh);

void run_forward(const Call& call);
void run_backward(const Call& call);
void run_few(const Call& call, bool forward);                           // the same two, of a call of few classes
void run_scale(const View& grad, int64_t n, int64_t k, double factor);  // of unit class stride
void run_add_split(uint16_t* high, uint8_t* low, const uint16_t* x, int64_t n, bool last);

}  // namespace lsk
