// The operators of the CUDA backend on CPU tensors, for tests: csrc/cuda on the threads of device.h.
#include <optional>
#include <string>

#include "../../csrc/operands.h"
#include "cuda/run.h"
#include "device.h"

namespace lsk {
namespace {

// Small enough for rows of a hundred classes to take every path.
Device small_device() {
  Device device;
  device.capability = 90;
  device.multiprocessors = 5;
  device.threads = 64;
  device.few_threads = 64;
  device.warp_bytes = 64;
  device.part_bytes = 256;
  device.unit_bytes = device.least_bytes = 128;
  device.clusters[0] = 5, device.clusters[1] = 2;
  return device;
}

// A GPU whose launches are written down instead of run.
std::optional<Device> pretended;
std::optional<Device> resized;

Device device() { return pretended ? *pretended : resized ? *resized : small_device(); }

// Other numbers than the small device's, and launches are written down; 0 bytes: its own.
void resize(int64_t part_bytes, int64_t largest_cluster, int64_t capability) {
  resized = std::nullopt;
  write_down = part_bytes > 0;
  written_down.clear();
  if (part_bytes == 0) return;
  resized = small_device();
  resized->part_bytes = part_bytes;
  resized->capability = static_cast<int>(capability);
  for (int i = 0; i < 4; ++i) resized->clusters[i] = (1 << i) <= largest_cluster ? 8 >> i : 0;
}

void pretend(int64_t capability, int64_t multiprocessors, int64_t shared_bytes) {
  pretended = std::nullopt;
  write_down = only_write_down = capability > 0;
  written_down.clear();
  if (!only_write_down) return;
  pretended.emplace();
  pretended->capability = static_cast<int>(capability);
  pretended->multiprocessors = static_cast<int>(multiprocessors);
  pretended->room(shared_bytes);
  const int blocks = static_cast<int>(shared_bytes / (1024 + kMailboxBytes + pretended->part_bytes));
  for (int i = 0; i < 4 && capability >= 90; ++i)  // where clusters fit into every group of multiprocessors
    pretended->clusters[i] = static_cast<int>(blocks * multiprocessors >> i);
}

// A line for each launch since the last look: blocks, threads, bytes of shared memory, cluster, kernel.
std::string launched() {
  std::string lines;
  for (const auto& [kernel, grid] : written_down) {
    for (const int64_t number : {grid.blocks, int64_t(grid.threads), grid.shared_bytes, int64_t(grid.cluster)})
      lines += std::to_string(number) + " ";
    lines += kernel + "\n";
  }
  written_down.clear();
  return lines;
}

struct Shim {
  static Tensor fresh(Tensor untouched) { return untouched; }

  static void forward(const Call& call, const Tensor& logits) {
    Tensor workspace;
    const auto allocate = [&](int64_t bytes) {
      workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
      return workspace.mutable_data_ptr();
    };
    gpu_forward(call, device(), nullptr, allocate);
  }

  static void backward(const Call& call, const Tensor&) { gpu_backward(call, device(), nullptr); }

  static void scale(const View& view, const Tensor& rows, const Tensor& scale) {
    gpu_scale(view, rows.numel() / rows.size(-1), rows.size(-1), scale.const_data_ptr(), device(), nullptr);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CPU, m) { implement<Shim>(m, "cuda"); }

TORCH_LIBRARY(labelsmooth_cuda_shim, m) {
  m.def("refuse_launches(bool refuse) -> ()", [](bool refuse) { refuse_launches = refuse; });
  m.def("worsen(int ulps) -> ()", [](int64_t ulps) { ulps_of_powers = static_cast<int>(ulps); });
  m.def("resize(int part_bytes, int largest_cluster, int capability) -> ()", resize);
  m.def("pretend(int capability, int multiprocessors, int shared_bytes) -> ()", pretend);
  m.def("launched() -> str", launched);
}

}  // namespace lsk
