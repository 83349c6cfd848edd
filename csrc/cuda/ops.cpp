// The operators of an NVIDIA GPU: nothing here waits for it, and all memory is torch's.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

#include "../operands.h"
#include "run.h"

namespace lsk {

namespace {

int attribute(cudaDeviceAttr name, int index) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
  return value;
}

// Asked once for each GPU, the first time that one of its tensors comes: the current GPU is `index`.
const Device& known(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;  // whose elements stay where they are
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = devices.find(index);
  if (found != devices.end()) return found->second;
  Device device;
  device.capability = compiled_capability();
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.room(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  count_clusters(device);
  return devices.emplace(index, device).first->second;
}

}  // namespace

int cuda_capability(int index) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
  return known(index).capability;
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
    const Device& device;
    void* const stream;

    explicit Here(const Tensor& t)
        : guard(t.device()), device(known(t.get_device())), stream(c10::cuda::getCurrentCUDAStream()) {
      TORCH_CHECK(device.capability > 0, "the CUDA kernels were not compiled for GPU ", t.get_device());
    }
  };
};

}  // namespace

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CUDA, m) { implement<Cuda>(m, "cuda"); }

}  // namespace lsk
