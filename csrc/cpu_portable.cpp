// Row kernels for the compiler's baseline: SSE2 on x86-64, NEON on aarch64. Only here may inline functions of others be
// used (c10::Half): this is the code that every processor can run.
#include <c10/util/Half.h>
#include <math.h>
#include <stdint.h>

#define LSK_SIMD_BYTES 16
#include "cpu_table.h"

const lsk::Kernels* lsk::portable_kernels() { return &kTable; }
