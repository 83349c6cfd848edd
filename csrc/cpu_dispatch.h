// Which of the compiled instruction sets this process uses, and why.
#pragma once

#include <string>

#include "cpu_kernels.h"

namespace lsk {

struct InstructionSet {
  const char* name;  // "avx512", "avx2" or "portable"
  std::string reason;
  const Kernels* kernels;
};

// The widest set that PyTorch uses and the CPU has, both given as the bytes of a vector: 64 is AVX-512, 32 AVX2, 16 the
// compiler's baseline. The tests ask for every pair.
InstructionSet choose_instruction_set(int aten, int cpu);

const InstructionSet& instruction_set();  // chosen once

}  // namespace lsk
