#include "kernels.h"

namespace lsk {

LSK_INSTANTIATE(c10::BFloat16)

}  // namespace lsk
