// Row kernels for the compiler's baseline: SSE2 on x86-64, NEON on aarch64.
#include <math.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LSK_SIMD_BYTES 16
#include "cpu_rows.h"

const lsk::RowKernels* lsk::portable_kernels() { return kTable; }
