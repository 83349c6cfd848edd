// Label-smoothed cross-entropy over the rows of (N, K) logits on the CPU: loss, statistics and gradient in one pass.
//
// Bytes: the logits are read from memory once and the gradient is written once; nothing else of size N×K exists.
// Threads take rows, or blocks of rows where rows are few and long. Both sum the same blocks in the same order, so that
// the bits of a result do not depend on the number of threads.
// The schemas and the semantics of the operators stand in labelsmooth_kernels/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_kernels.h"

namespace lsk {
namespace {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

constexpr at::ScalarType kScalarTypes[kDtypes] = {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};

struct InstructionSet {
  const char* name;
  const RowKernels* kernels;
};

// ATEN_CPU_CAPABILITY and the CPU decide, as for ATen's own kernels.
const InstructionSet& instruction_set() {
  static const InstructionSet chosen = []() -> InstructionSet {
#if LSK_X86
    const std::string aten = at::get_cpu_capability();
    if (aten == "AVX512") return {"avx512", avx512_kernels()};
    if (aten == "AVX2") return {"avx2", avx2_kernels()};
#endif
    return {"portable", portable_kernels()};
  }();
  return chosen;
}

const RowKernels& check_matrix(const Tensor& t, const char* name, bool written) {
  const auto* dtype = std::find(kScalarTypes, kScalarTypes + kDtypes, t.scalar_type());
  TORCH_CHECK(dtype < kScalarTypes + kDtypes, name, " must be float16, bfloat16, float32 or float64, got ",
              t.scalar_type());
  TORCH_CHECK(t.dim() == 2, name, " must have shape (N, K), got ", t.sizes());
  TORCH_CHECK(t.size(1) >= 1 || t.size(0) == 0, name, " must have at least one class, got shape ", t.sizes());
  TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have unit class stride, got strides ", t.strides());
  TORCH_CHECK(!written || t.size(0) <= 1 || t.stride(0) >= t.size(1), name,
              " is written in place and must not overlap itself, got strides ", t.strides());
  return instruction_set().kernels[dtype - kScalarTypes];
}

void check_target(const Tensor& target, const Tensor& logits, int64_t ignore_index) {
  const int64_t n = logits.size(0), k = logits.size(1);
  TORCH_CHECK(target.scalar_type() == at::kLong, "target must be int64, got ", target.scalar_type());
  TORCH_CHECK(target.dim() == 1 && target.size(0) == n, "target must have shape (", n, "), got ", target.sizes());
  TORCH_CHECK(target.is_contiguous(), "target must be contiguous");
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_INDEX((y[i] >= 0 && y[i] < k) || y[i] == ignore_index, "target[", i, "] = ", y[i], " is outside [0, ",
                      k, ") and is not ignore_index (", ignore_index, ")");
}

at::ScalarType acc_dtype(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A number per row in the dtype of the arithmetic; a stride of 0 gives every row the same one, no data the fallback.
struct Column {
  void* data = nullptr;
  bool wide = false;
  int64_t stride = 1;
  double fallback = 0;

  double operator[](int64_t row) const {
    if (data == nullptr) return fallback;
    return wide ? static_cast<double*>(data)[row * stride] : static_cast<float*>(data)[row * stride];
  }
  void set(int64_t row, double value) const {
    if (data == nullptr) return;
    wide ? static_cast<double*>(data)[row] = value : static_cast<float*>(data)[row] = static_cast<float>(value);
  }
};

Column input_column(const Tensor& t, const char* name, const Tensor& logits, bool one_for_all) {
  const int64_t n = logits.size(0);
  TORCH_CHECK(t.scalar_type() == acc_dtype(logits), name, " must be ", acc_dtype(logits), " for ", logits.scalar_type(),
              " logits, got ", t.scalar_type());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous, got strides ", t.strides());
  TORCH_CHECK(t.numel() == n || (one_for_all && t.numel() == 1), name, " must have ", one_for_all ? "1 or " : "", n,
              " elements, got ", t.numel());
  return {const_cast<void*>(t.const_data_ptr()), t.scalar_type() == at::kDouble, t.numel() == n ? 1 : 0};
}

Column output_column(const Tensor& t) {
  return {t.numel() == 0 ? nullptr : t.mutable_data_ptr(), t.scalar_type() == at::kDouble};
}

// The operands of one call. Strides are in bytes; grad is null where no gradient is wanted.
struct Call {
  const RowKernels& kernels;
  int64_t n, k, element;
  const char* logits;
  int64_t logits_stride;
  const int64_t* target;
  int64_t ignore_index;
  Column eps, scale;
  char* grad = nullptr;
  int64_t grad_stride = 0;

  const char* z(int64_t row, int64_t k = 0) const { return logits + row * logits_stride + k * element; }
  bool ignored(int64_t row) const { return target[row] == ignore_index; }
};

Call make_call(const Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows,
               OptionalTensor row_scale, int64_t ignore_index, bool written = false) {
  const RowKernels& kernels = check_matrix(logits, "logits", written);
  check_target(target, logits, ignore_index);
  const int64_t element = logits.element_size();
  Call call = {kernels,
               logits.size(0),
               logits.size(1),
               element,
               static_cast<const char*>(logits.const_data_ptr()),
               logits.stride(0) * element,
               target.const_data_ptr<int64_t>(),
               ignore_index,
               {},
               {}};
  call.eps.fallback = eps;
  call.scale.fallback = 1;
  if (eps_rows) call.eps = input_column(*eps_rows, "eps_rows", logits, true);
  if (row_scale) call.scale = input_column(*row_scale, "row_scale", logits, true);
  return call;
}

void write_to(Call& call, const Tensor& grad) {
  call.grad = static_cast<char*>(grad.mutable_data_ptr());
  call.grad_stride = grad.stride(0) * call.element;
}

// Most of the time of a large fresh allocation goes into page faults; 2 MiB pages make 512 times fewer of them.
Tensor fresh_grad(const Tensor& logits) {
  const Tensor grad = at::empty(logits.sizes(), logits.options(), at::MemoryFormat::Contiguous);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + grad.nbytes()) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return grad;
}

// ---- threads

constexpr int64_t kBlock = 4096;   // classes: stays in a first-level cache between the two sweeps over it
constexpr int64_t kGrain = 32768;  // elements that are worth waking a thread for

int64_t blocks_of(const Call& call) { return (call.k + kBlock - 1) / kBlock; }
int64_t block_end(const Call& call, int64_t b) { return std::min(call.k, (b + 1) * kBlock); }

template <class F>
void for_rows(int64_t n, int64_t k, const F& f) {
  at::parallel_for(0, n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

template <class F>
void for_blocks(const Call& call, const F& f) {
  const int64_t blocks = blocks_of(call);
  at::parallel_for(0, call.n * blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / blocks, i % blocks);
  });
}

// Too few rows to keep the threads evenly busy.
bool split_rows(const Call& call) { return call.k > kBlock && call.n < 4 * at::get_num_threads(); }

// ---- rows

void write_gradient(const Call& call, int64_t row, double zmax, double logsum, int64_t begin, int64_t end) {
  char* g = call.grad + row * call.grad_stride + begin * call.element;
  if (call.ignored(row)) {
    std::memset(g, 0, (end - begin) * call.element);
    return;
  }
  const Weights<double> w = weights(call.eps[row], double(call.k));
  const GradientRow rule = {zmax, logsum, w.a + w.b, w.b, call.scale[row]};
  call.kernels.gradient(call.z(row, begin), g, end - begin, call.target[row] - begin, rule);
}

void write_gradients(const Call& call, const Column& zmax, const Column& logsum) {
  if (split_rows(call))
    for_blocks(call, [&](int64_t row, int64_t b) {
      write_gradient(call, row, zmax[row], logsum[row], b * kBlock, block_end(call, b));
    });
  else
    for_rows(call.n, call.k, [&](int64_t row) { write_gradient(call, row, zmax[row], logsum[row], 0, call.k); });
}

struct Results {
  Tensor loss, zmax, logsum, nll, prediction;
};

struct Forward {
  const Call& call;
  Column loss, zmax, logsum, nll;
  int64_t* prediction;

  bool unread(int64_t row) const { return call.ignored(row) && prediction == nullptr; }

  Stats<double> block(int64_t row, int64_t b) const {
    return call.kernels.block(call.z(row, b * kBlock), block_end(call, b) - b * kBlock);
  }

  // The row's results from its block sums, taken in order.
  template <class F>
  void finish(int64_t row, const F& block) const {
    Stats<double> s = {-INFINITY, 0, 0, 0};
    int64_t best = 0;  // the first block that holds the maximum
    for (int64_t b = 0; b < blocks_of(call) && !unread(row); ++b) {
      const Stats<double> part = block(b);
      if (part.max > s.max) best = b;
      s = merge(s, part);
    }
    const double max = unread(row) ? 0 : s.max, log_sum = unread(row) ? 0 : std::log(s.sum);
    const bool ignored = call.ignored(row);
    const double zy = ignored ? 0 : call.kernels.logit(call.z(row, call.target[row])) - max;
    zmax.set(row, max);
    logsum.set(row, log_sum);
    loss.set(row, ignored ? 0 : row_loss(log_sum, weights(call.eps[row], double(call.k)), zy, s.dev));
    nll.set(row, ignored ? 0 : log_sum - zy);
    if (prediction == nullptr) return;
    const int64_t begin = best * kBlock, end = block_end(call, best);
    prediction[row] = std::min(begin + call.kernels.find(call.z(row, begin), end - begin, max), end - 1);
  }

  void run() const {
    if (split_rows(call)) {
      const int64_t blocks = blocks_of(call);
      std::vector<Stats<double>> parts(call.n * blocks);
      for_blocks(call, [&](int64_t row, int64_t b) {
        if (!unread(row)) parts[row * blocks + b] = block(row, b);
      });
      for (int64_t row = 0; row < call.n; ++row) finish(row, [&](int64_t b) { return parts[row * blocks + b]; });
      if (call.grad != nullptr) write_gradients(call, zmax, logsum);
      return;
    }
    for_rows(call.n, call.k, [&](int64_t row) {
      finish(row, [&](int64_t b) { return block(row, b); });
      if (call.grad != nullptr) write_gradient(call, row, zmax[row], logsum[row], 0, call.k);
    });
  }
};

Results run_forward(const Call& call, const Tensor& logits, bool with_stats) {
  const auto options = logits.options().dtype(acc_dtype(logits));
  const int64_t stats = with_stats ? call.n : 0;
  const Results r = {at::empty({call.n}, options), at::empty({call.n}, options), at::empty({call.n}, options),
                     at::empty({stats}, options), at::empty({stats}, options.dtype(at::kLong))};
  int64_t* prediction = with_stats ? r.prediction.mutable_data_ptr<int64_t>() : nullptr;
  Forward{call, output_column(r.loss), output_column(r.zmax), output_column(r.logsum), output_column(r.nll), prediction}
      .run();
  return r;
}

// ---- operators

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target,
                                                                   double eps, OptionalTensor eps_rows,
                                                                   OptionalTensor row_scale, int64_t ignore_index,
                                                                   bool with_grad, bool with_stats) {
  Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index);
  const Tensor grad = with_grad ? fresh_grad(logits) : at::empty({0}, logits.options());
  if (with_grad) write_to(call, grad);
  const Results r = run_forward(call, logits, with_stats);
  return {r.loss, r.zmax, r.logsum, r.nll, r.prediction, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_(Tensor& logits, const Tensor& target, double eps,
                                                            OptionalTensor eps_rows, OptionalTensor row_scale,
                                                            int64_t ignore_index, bool with_stats) {
  Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index, true);
  write_to(call, logits);
  const Results r = run_forward(call, logits, with_stats);
  return {r.loss, r.zmax, r.logsum, r.nll, r.prediction};
}

void run_backward(Call call, const Tensor& logits, const Tensor& grad, const Tensor& zmax, const Tensor& logsum) {
  write_to(call, grad);
  write_gradients(call, input_column(zmax, "zmax", logits, false), input_column(logsum, "logsum", logits, false));
}

Tensor backward(const Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows,
                OptionalTensor row_scale, int64_t ignore_index, const Tensor& zmax, const Tensor& logsum) {
  const Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index);
  const Tensor grad = fresh_grad(logits);
  run_backward(call, logits, grad, zmax, logsum);
  return grad;
}

void backward_(Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows, OptionalTensor row_scale,
               int64_t ignore_index, const Tensor& zmax, const Tensor& logsum) {
  const Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index, true);
  run_backward(call, logits, logits, zmax, logsum);
}

void scale_(Tensor& grad, const Tensor& scale) {
  const RowKernels& kernels = check_matrix(grad, "grad", true);
  TORCH_CHECK(scale.scalar_type() == acc_dtype(grad) && scale.numel() == 1, "scale must be one ", acc_dtype(grad),
              " element for a ", grad.scalar_type(), " grad, got ", scale.numel(), " of ", scale.scalar_type());
  const double factor = scale.item().toDouble();
  if (factor == 1) return;
  char* g = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t k = grad.size(1), stride = grad.stride(0) * grad.element_size();
  for_rows(grad.size(0), k, [&](int64_t row) { kernels.scale(g + row * stride, k, factor); });
}

}  // namespace

const char* cpu_capability() { return instruction_set().name; }

TORCH_LIBRARY_IMPL(labelsmooth_kernels, CPU, m) {
  m.impl("cpu_forward", &forward);
  m.impl("cpu_forward_", &forward_);
  m.impl("cpu_backward", &backward);
  m.impl("cpu_backward_", &backward_);
  m.impl("cpu_scale_", &scale_);
}

}  // namespace lsk
