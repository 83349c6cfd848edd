// Registration only: the schemas are defined in Python (labelsmooth_kernels/ops.py), the dispatcher chooses the device.
#include "ops.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CPU, m) {
  m.impl("cpu_forward", &lsk::cpu_forward);
  m.impl("cpu_forward_", &lsk::cpu_forward_);
  m.impl("cpu_backward", &lsk::cpu_backward);
  m.impl("cpu_backward_", &lsk::cpu_backward_);
  m.impl("cpu_scale_", &lsk::cpu_scale_);
}
