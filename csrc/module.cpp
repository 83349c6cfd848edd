// The Python module _C: loading it registers the operators; build_info() tells the doctor what runs.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <utility>

#include "cpu_dispatch.h"
#include "cuda/run.h"
#include "direct.h"

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

std::optional<int64_t> whole_number(pybind11::handle h) {
  if (!PyLong_CheckExact(h.ptr())) return {};
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(h.ptr(), &overflow);
  return overflow == 0 ? std::optional(value) : std::nullopt;
}

std::optional<double> real_number(pybind11::handle h) {
  if (PyFloat_CheckExact(h.ptr())) return PyFloat_AS_DOUBLE(h.ptr());
  return whole_number(h);
}

std::optional<lsk::Reduction> reduction_named(pybind11::handle h) {
  if (!PyUnicode_CheckExact(h.ptr())) return {};
  const auto is = [&](const char* name) { return PyUnicode_CompareWithASCIIString(h.ptr(), name) == 0; };
  if (is("mean")) return lsk::Reduction::kMean;
  if (is("sum")) return lsk::Reduction::kSum;
  return is("none") ? std::optional(lsk::Reduction::kNone) : std::nullopt;
}

// lsk::cross_entropy of any objects. Those of a subclass (a bool, a tensor with __torch_function__) are left to Python.
pybind11::object cross_entropy(pybind11::handle input, pybind11::handle target, pybind11::handle weight,
                               pybind11::handle ignore_index, pybind11::handle reduction, pybind11::handle eps) {
  const auto is_tensor = [](pybind11::handle h) { return THPVariable_CheckExact(h.ptr()); };
  const auto ignored = whole_number(ignore_index);
  const auto reduced = reduction_named(reduction);
  const auto smoothing = real_number(eps);
  if (!is_tensor(input) || !is_tensor(target) || !(weight.is_none() || is_tensor(weight)) || !ignored || !reduced ||
      !smoothing)
    return pybind11::none();
  const at::Tensor x = THPVariable_Unpack(input.ptr()), y = THPVariable_Unpack(target.ptr());
  const auto w = weight.is_none() ? std::nullopt : std::optional<at::Tensor>(THPVariable_Unpack(weight.ptr()));
  std::optional<at::Tensor> loss;
  {
    const pybind11::gil_scoped_release released;
    loss = lsk::cross_entropy(x, y, w, *ignored, *reduced, *smoothing);
  }
  return loss ? pybind11::cast(*loss) : pybind11::none();
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
  m.def("cross_entropy", &cross_entropy,
        "The loss of a call that needs no Python, None of another: (input, target, weight, ignore_index, reduction, "
        "label_smoothing).");
#if defined(LSK_CUDA)
  m.def("cuda_capability", &lsk::cuda_capability,
        "What the kernels for a GPU were compiled for; 0 if for none like it.");
#endif
}
