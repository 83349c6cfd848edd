#include "kernels.h"

namespace lsk {

LSK_INSTANTIATE(c10::Half)

}  // namespace lsk
