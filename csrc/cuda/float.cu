#include "kernels.h"

namespace lsk {

LSK_INSTANTIATE(float)

}  // namespace lsk
