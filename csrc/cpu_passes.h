// The work of the CPU's operators, on operands that were checked.
#pragma once

#include "call.h"

namespace lsk {

void run_forward(const Call& call);
void run_backward(const Call& call);
void run_scale(const View& grad, int64_t n, int64_t k, double factor);  // of unit class stride
void run_add_split(uint16_t* high, uint8_t* low, const uint16_t* x, int64_t n, bool last);

}  // namespace lsk
