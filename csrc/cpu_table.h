// The table of an instruction set's kernels.
#pragma once

#include "cpu_few.h"

namespace lsk {
namespace {

template <class T>
constexpr RowKernels row_kernels() {
  return {value<T>,          block<T>, class_block<T>,   find<T>,          gradient<T>,
          class_gradient<T>, scale<T>, convert<T, true>, convert<T, false>};
}

template <class T>
constexpr BlockKernels block_kernels() {
  return {transform<T>, sum<T>, spread<T>, mix<T>, target_gradient<T>, multiply<T>, few_forward<T>, few_backward<T>};
}

constexpr Kernels kTable = {
    {row_kernels<Half>(), row_kernels<BFloat16>(), row_kernels<float>(), row_kernels<double>()},
    {pair_kernels<Half>(), pair_kernels<BFloat16>(), pair_kernels<float>(), pair_kernels<double>()},
    {block_kernels<float>(), block_kernels<double>()},
    add_split,
    count_targets};

}  // namespace
}  // namespace lsk
