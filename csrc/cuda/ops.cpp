// The operators of an NVIDIA GPU: nothing here waits for it, and all memory is torch's.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>

#include "../operands.h"
#include "run.h"

namespace lsk {

int cuda_capability(int index) {
  static std::array<std::atomic<int>, 64> known = {};  // capability + 1
  const bool keeps = index < static_cast<int>(known.size());
  if (keeps && known[index] > 0) return known[index] - 1;
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
  const int capability = compiled_capability();
  if (keeps) known[index] = capability + 1;
  return capability;
}

namespace {

struct Cuda {
  static Tensor fresh(Tensor untouched) { return untouched; }

  static void forward(const Call& call, const Tensor& logits) {
    const Here here(logits);
    Tensor workspace;  // freed before the kernels have run, which is right on their own stream
    const auto allocate = [&](int64_t bytes) {
      workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
      return workspace.mutable_data_ptr();
    };
    gpu_forward(call, here.device, here.stream, allocate);
  }

  static void backward(const Call& call, const Tensor& logits) {
    const Here here(logits);
    gpu_backward(call, here.device, here.stream);
  }

  static void scale(const View& view, const Tensor& rows, const Tensor& scale) {
    const Here here(rows);
    gpu_scale(view, rows.numel() / rows.size(-1), rows.size(-1), scale.const_data_ptr(), here.device, here.stream);
  }

 private:
  struct Here {
    const c10::cuda::CUDAGuard guard;
    Device device;
    void* const stream;

    explicit Here(const Tensor& t) : guard(t.device()), stream(c10::cuda::getCurrentCUDAStream()) {
      const int index = t.get_device();
      device.capability = cuda_capability(index);
      TORCH_CHECK(device.capability > 0, "the CUDA kernels were not compiled for GPU ", index);
      device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
      device.room(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
    }

    static int attribute(cudaDeviceAttr name, int index) {
      int value = 0;
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
      return value;
    }
  };
};

}  // namespace

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CUDA, m) { implement<Cuda>(m, "cuda"); }

}  // namespace lsk
