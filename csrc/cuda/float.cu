#include "kernels.h"

namespace lsk {

LSK_INSTANTIATE(float)

int compiled_capability() { return compiled_for(scale_kernel<float>); }

}  // namespace lsk
