#include "run.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lsk {
namespace {

constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
constexpr int64_t kScaleBlocks = 32;  // to a multiprocessor: where the scale is 1, they are all that is done

int64_t ratio_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Grid grid_of(int64_t blocks, int threads) {
  return {std::min(blocks, kMostBlocks), threads, 1, kSlotBytes, kSlotBytes};
}

template <class F>
void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case kFloat16:
      return f(c10::Half());
    case kBFloat16:
      return f(c10::BFloat16());
    case kFloat32:
      return f(float());
    default:
      return f(double());
  }
}

// A failed launch is reported with what was asked for.
template <class F>
void with_shape(const char* what, int64_t n, int64_t k, Dtype dtype, const F& f) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
  try {
    f();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(what) + " of " + std::to_string(n) + " rows of " + std::to_string(k) + " " +
                             kNames[dtype] + " classes: " + error.what());
  }
}

}  // namespace

// How many blocks share a row on chip; 0 where it does not fit. The fewest, as a GPU full of rows is fastest with;
// where rows are few, twice as many as long as all of them run at a time.
int cluster_of(const Call& call, const Device& device) {
  int found = 0;
  for (int i = 0; i < 4; ++i) {
    const int blocks = 1 << i;
    const int64_t part = 16 * vectors_of_part(call.k * call.logits.element, blocks);
    if (device.clusters[i] == 0 || part > device.part_bytes || call.n > kMostBlocks / blocks) continue;
    if (found == 0 || (call.n <= device.clusters[i] && part >= device.least_bytes)) found = blocks;
  }
  return found;
}

Plan forward_plan(const Call& call, const Device& device) {
  const int64_t element = call.logits.element, bytes = call.k * element;
  Plan plan;
  if (bytes <= device.warp_bytes) {
    plan.team_threads = kWarp;
    plan.grid = grid_of(ratio_up(call.n, device.few_threads / kWarp), device.few_threads);
    return plan;
  }
  plan.team_threads = device.threads;
  // On chip a row is read once for both; the copies are of adjacent classes, and there is no such kernel of float64.
  const bool may_stay = call.grad && call.logits.class_stride == 1 && element < 8;
  if (const int blocks = may_stay ? cluster_of(call, device) : 0; blocks > 0) {
    plan.form = Plan::kCluster;
    plan.grid = largest_cluster(blocks, device);
    plan.grid.blocks = call.n * blocks;
    plan.each = vectors_of_part(bytes, blocks);
    plan.grid.shared_bytes = kMailboxBytes + 16 * plan.each;
    return plan;
  }
  if (2 * call.n > device.multiprocessors || bytes < 2 * device.unit_bytes) {
    plan.grid = grid_of(call.n, device.threads);
    if (may_stay && device.capability >= 80 && device.capability < 90 && bytes <= device.part_bytes) {
      plan.form = Plan::kOnChip;
      plan.grid.shared_bytes = kSlotBytes + ratio_up(bytes, 16) * 16;
      plan.grid.most_shared_bytes = kSlotBytes + device.part_bytes;
    }
    return plan;
  }
  plan.form = Plan::kSplit;
  plan.parts =
      static_cast<int>(std::min(ratio_up(2 * device.multiprocessors, call.n), ratio_up(bytes, device.unit_bytes)));
  plan.each = vectors_of_part(bytes, plan.parts);
  plan.grid = grid_of(call.n * plan.parts, device.threads);
  plan.second_grid = grid_of(ratio_up(call.n, device.few_threads / kWarp), device.few_threads);
  plan.workspace_bytes = call.n * plan.parts * int64_t(call.wide ? sizeof(Stats<double>) : sizeof(Stats<float>));
  return plan;
}

Plan part_plan(int64_t n, int64_t k, int64_t element, const Device& device) {
  Plan plan;
  const bool few = k * element <= device.warp_bytes;
  plan.team_threads = few ? kWarp : device.threads;
  plan.parts = static_cast<int>(ratio_up(k * element, device.unit_bytes));
  plan.each = vectors_of_part(k * element, plan.parts);
  plan.grid = few ? grid_of(ratio_up(n, device.few_threads / kWarp), device.few_threads)
                  : grid_of(n * plan.parts, device.threads);
  return plan;
}

void gpu_forward(const Call& call, const Device& device, void* stream, const std::function<void*(int64_t)>& allocate) {
  if (call.n == 0) return;
  const Plan plan = forward_plan(call, device);
  void* workspace = plan.workspace_bytes > 0 ? allocate(plan.workspace_bytes) : nullptr;
  with_shape("the loss", call.n, call.k, call.logits.dtype, [&] {
    for_dtype(call.logits.dtype, [&](auto zero) { forward_of<decltype(zero)>(call, plan, workspace, stream); });
  });
  if (plan.form == Plan::kSplit && call.grad) gpu_backward(call, device, stream);
}

void gpu_backward(const Call& call, const Device& device, void* stream) {
  if (call.n == 0) return;
  const Plan plan = part_plan(call.n, call.k, call.logits.element, device);
  with_shape("the gradient", call.n, call.k, call.logits.dtype, [&] {
    for_dtype(call.logits.dtype, [&](auto zero) { backward_of<decltype(zero)>(call, plan, stream); });
  });
}

void gpu_scale(const View& grad, int64_t n, int64_t k, const void* scale, const Device& device, void* stream) {
  if (n == 0 || k == 0) return;
  const bool dense =
      grad.class_stride == 1 && grad.row_stride == k && (n == grad.inner || grad.outer_stride == grad.inner * k);
  if (dense && n > 1) return gpu_scale(grad, 1, n * k, scale, device, stream);  // short rows would leave threads idle
  Plan plan;
  plan.parts = static_cast<int>(ratio_up(k * grad.element, device.unit_bytes));
  plan.each = vectors_of_part(k * grad.element, plan.parts);
  plan.grid = grid_of(std::min(n * plan.parts, kScaleBlocks * device.multiprocessors), device.threads);
  with_shape("the scaled gradient", n, k, grad.dtype, [&] {
    for_dtype(grad.dtype, [&](auto zero) { scale_of<decltype(zero)>(grad, scale, n, k, plan, stream); });
  });
}

}  // namespace lsk
