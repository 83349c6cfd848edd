#include "kernels.h"

namespace lsk {

LSK_INSTANTIATE(double)

}  // namespace lsk
