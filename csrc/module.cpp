// The Python module _C: loading it registers the operators; build_info() tells the doctor what runs.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <utility>

#include "cpu_dispatch.h"
#include "cuda/run.h"

namespace {

pybind11::dict build_info() {
  using namespace pybind11::literals;
#if AT_PARALLEL_OPENMP && defined(_OPENMP)
  const char* threads = "openmp";
#elif AT_PARALLEL_NATIVE
  const char* threads = "native";
#else
  const char* threads = "none";
#endif
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
#if defined(LSK_CUDA)
  const char *cuda = LSK_CUDA, *architectures = LSK_ARCHITECTURES;
#else
  const char *cuda = "", *architectures = "";
#endif
  const lsk::InstructionSet& cpu = lsk::instruction_set();
  return pybind11::dict("torch"_a = TORCH_VERSION, "compiler"_a = compiler, "cpu_capability"_a = cpu.name,
                        "cpu_reason"_a = cpu.reason, "threads_api"_a = threads, "num_threads"_a = at::get_num_threads(),
                        "cuda"_a = cuda, "architectures"_a = architectures);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled row operators of labelsmooth_kernels";
  m.def("build_info", &build_info, "Versions of the build, and what the running process selects.");
  m.def(
      "choose_instruction_set",
      [](int aten, int cpu) {
        const auto chosen = lsk::choose_instruction_set(aten, cpu);
        return std::make_pair(chosen.name, chosen.reason);
      },
      "The name of an instruction set and the reason for it, from the widths in bytes that PyTorch uses and the CPU "
      "has.");
#if defined(LSK_CUDA)
  m.def("cuda_capability", &lsk::cuda_capability,
        "What the kernels for a GPU were compiled for; 0 if for none like it.");
#endif
}
