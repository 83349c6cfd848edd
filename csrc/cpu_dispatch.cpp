// Which of the compiled instruction sets this process uses: decided once, by the CPU and then by PyTorch.
#include "cpu_dispatch.h"

#include <ATen/Version.h>

#if LSK_X86
#include <cpuid.h>
#endif

namespace lsk {
namespace {

// PyTorch believes ATEN_CPU_CAPABILITY even where the CPU has no such instructions.
int aten_bytes() {
  const std::string aten = at::get_cpu_capability();
  return aten == "AVX512" ? 64 : aten == "AVX2" ? 32 : 16;
}

// Every feature in the target pragmas of cpu_avx2.cpp and cpu_avx512.cpp. GCC before 11 does not know "f16c" here.
int cpu_bytes() {
#if LSK_X86
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 16;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 64 : 32;
#else
  return 16;
#endif
}

std::string reason_for(int aten, int cpu) {
#if LSK_X86
  if (aten < cpu) return "ATEN_CPU_CAPABILITY, or the build of PyTorch, asks for it";
  if (cpu >= 64) return "the CPU has it";
  std::string reason = cpu >= 32 ? "the CPU has no AVX-512" : "the CPU lacks AVX2, FMA or F16C";
  if (aten > cpu) reason += ", though ATEN_CPU_CAPABILITY asks for more: PyTorch's own kernels may crash";
  return reason;
#else
  return "the build is not by GCC for x86-64";
#endif
}

}  // namespace

InstructionSet choose_instruction_set(int aten, int cpu) {
  const std::string reason = reason_for(aten, cpu);
#if LSK_X86
  if (aten >= 64 && cpu >= 64) return {"avx512", reason, avx512_kernels()};
  if (aten >= 32 && cpu >= 32) return {"avx2", reason, avx2_kernels()};
#endif
  return {"portable", reason, portable_kernels()};
}

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = choose_instruction_set(aten_bytes(), cpu_bytes());
  return chosen;
}

const Kernels& cpu_kernels() { return *instruction_set().kernels; }

}  // namespace lsk
