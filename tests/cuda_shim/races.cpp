// The CUDA kernels on the threads of a CPU, for ThreadSanitizer: every form, every dtype, a few rows. Prints what it
// ran; the sanitizer makes the exit status. `races one`: one case; `races all`: the whole product; else a quarter of
// it, in which each width and dtype meets every value of the other factors, and all widths together every pair.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdio>
#include <string_view>
#include <vector>

#include "cuda/run.h"

namespace {

using namespace lsk;

std::vector<std::vector<char>> workspaces;

void* allocate(int64_t bytes) { return workspaces.emplace_back(bytes).data(); }

template <class V>
Column column(std::vector<V>& values, int64_t offset = 0) {
  return {reinterpret_cast<char*>(values.data() + offset), sizeof(V) == 8, 1, 1};
}

// Logits from element `shift` of their memory on, which is aligned for shift 0.
template <class T, class V>
void run(Dtype dtype, int64_t n, int64_t k, int64_t shift, bool general, const Device& device) {
  struct alignas(16) Line {
    char bytes[16];
  };
  std::vector<Line> logits_memory((n * k + shift) * sizeof(T) / 16 + 1), grad_memory(logits_memory.size());
  T *logits = reinterpret_cast<T*>(logits_memory.data()) + shift,
    *grad = reinterpret_cast<T*>(grad_memory.data()) + shift;
  for (int64_t i = 0; i < n * k; ++i) logits[i] = static_cast<T>(static_cast<float>(i % 23) * 0.25f);
  std::vector<int64_t> target(n), prediction(n);
  for (int64_t i = 0; i < n; ++i) target[i] = i == 1 ? -100 : i % k;
  std::vector<V> weight(k, V(0.5)), loss(n), saved(4 * n), nll(n), entropy(n);

  Call call;
  call.n = n;
  call.k = k;
  call.wide = sizeof(V) == 8;
  call.logits = {reinterpret_cast<char*>(logits), dtype, sizeof(T), n, 0, k, 1};
  call.grad = call.logits;
  call.grad.data = reinterpret_cast<char*>(grad);
  call.target = target.data();
  call.eps.fallback = 0.1;
  if (general) {
    call.weight = call.rest = column(weight);
    call.finite = true;
    call.softcap = 30;
    call.entropy = column(entropy);
  }
  call.loss = column(loss);
  call.nll = column(nll);
  call.prediction = prediction.data();
  call.zmax = column(saved);
  call.logsum = column(saved, n);
  call.mass = column(saved, 2 * n);
  call.count = column(saved, 3 * n);
  const char* const forms[] = {"rows", "on chip", "cluster", "split"};
  const char* form = forms[forward_plan(call, device).form];
  gpu_forward(call, device, nullptr, allocate);
  gpu_backward(call, device, nullptr);
  call.grad = call.logits;
  gpu_forward(call, device, nullptr, allocate);
  V scale = 0.5;
  gpu_scale(call.grad, n, k, &scale, device, nullptr);
  std::printf("%s: dtype %d, %d rows of %d classes, shifted by %d%s: loss %g\n", form, int(dtype), int(n), int(k),
              int(shift), general ? ", options" : "", double(loss[0]));
}

}  // namespace

int main(int arguments, char** argument) {
  const std::string_view asked = arguments > 1 ? argument[1] : "few";
  Device device;
  device.multiprocessors = 5;
  device.threads = device.few_threads = 64;
  device.warp_bytes = 64;
  device.part_bytes = device.unit_bytes = 256;
  device.least_bytes = 128;
  if (asked == "one") {  // a block of two warps, on one row after the other
    device.capability = 75;
    return run<float, float>(kFloat32, 3, 400, 0, false, device), 0;
  }
  for (int capability : {75, 80, 90})
    for (bool general : {false, true})
      for (int64_t n : {1, 3}) {
        const int pair = 2 * (general != (capability == 90)) + ((n == 3) != (capability == 90));  // of opposites
        device.capability = capability;
        device.clusters[0] = capability == 90 ? 4 : 0, device.clusters[1] = capability == 90 ? 2 : 0;
        int quarter = 0;
        for (int64_t k : {9, 61, 100, 400}) {
          auto chosen = [&] { return asked == "all" || quarter++ % 4 == pair; };
          if (chosen()) run<float, float>(kFloat32, n, k, k % 4, general, device);
          if (chosen()) run<c10::BFloat16, float>(kBFloat16, n, k, k % 3, general, device);
          if (k != 100) continue;
          if (chosen()) run<c10::Half, float>(kFloat16, n, k, 1, general, device);
          if (chosen()) run<double, double>(kFloat64, n, k, 1, general, device);
        }
      }
  device.part_bytes = 1 << 13;  // in several batches, the last of them not full, in clusters of two blocks and in one
  for (int64_t k : {1801, 3701}) run<float, float>(kFloat32, 2, k, 1, false, device);
}
