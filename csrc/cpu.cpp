// Label-smoothed cross-entropy over the rows of (N, K) logits on the CPU: loss, statistics and gradient in one pass.
//
// Bytes: the logits are read from memory once and the gradient is written once; nothing else of size N×K exists.
// Rows go over ATen's threads, and where there are fewer rows than threads would like, blocks of rows do. Both ways sum
// the same blocks in the same order, so that results do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <cmath>
#include <limits>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu_kernels.h"
#include "ops.h"

namespace lsk {
namespace {

// ATEN_CPU_CAPABILITY and the CPU decide, as for ATen's own kernels.
const char* capability() {
#if defined(__x86_64__)
  static const std::string aten = at::get_cpu_capability();
  if (aten.rfind("AVX512", 0) == 0) return "avx512";
  if (aten == "AVX2") return "avx2";
#endif
  return "portable";
}

const RowKernels& kernels_for(const Tensor& logits) {
  static const RowKernels* const table = [] {
    [[maybe_unused]] const std::string name = capability();
#if defined(__x86_64__)
    if (name == "avx512") return avx512_kernels();
    if (name == "avx2") return avx2_kernels();
#endif
    return portable_kernels();
  }();
  switch (logits.scalar_type()) {
    case at::kHalf:
      return table[kFloat16];
    case at::kBFloat16:
      return table[kBFloat16];
    case at::kFloat:
      return table[kFloat32];
    default:
      return table[kFloat64];
  }
}

at::ScalarType acc_dtype(const Tensor& logits) { return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// ---- what Python hands over, checked

// A per-row number in the arithmetic's dtype: absent, one for all rows, or one per row.
struct PerRow {
  const void* data = nullptr;
  bool wide = false;
  int64_t stride = 0;
  double fallback;

  double operator[](int64_t row) const {
    if (data == nullptr) return fallback;
    return wide ? static_cast<const double*>(data)[row * stride] : static_cast<const float*>(data)[row * stride];
  }
};

PerRow per_row(OptionalTensor values, const char* name, const Tensor& logits, double fallback, bool one_is_enough = true) {
  PerRow rows;
  rows.fallback = fallback;
  if (!values.has_value()) return rows;
  const Tensor& t = *values;
  const int64_t n = logits.size(0);
  TORCH_CHECK(t.scalar_type() == acc_dtype(logits), name, " must be ", acc_dtype(logits), " for ", logits.scalar_type(),
              " logits, got ", t.scalar_type());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK(t.numel() == n || (one_is_enough && t.numel() == 1), name, " must have ", one_is_enough ? "1 or " : "", n,
              " elements, got ", t.numel());
  rows.data = t.const_data_ptr();
  rows.wide = t.scalar_type() == at::kDouble;
  rows.stride = t.numel() == n ? 1 : 0;
  return rows;
}

void check_matrix(const Tensor& t, const char* name, bool written) {
  const auto dtype = t.scalar_type();
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, name,
              " must be float16, bfloat16, float32 or float64, got ", dtype);
  TORCH_CHECK(t.dim() == 2, name, " must have shape (N, K), got ", t.sizes());
  TORCH_CHECK(t.size(1) >= 1 || t.size(0) == 0, name, " must have at least one class, got shape ", t.sizes());
  TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, " must have unit class stride, got strides ", t.strides());
  TORCH_CHECK(!written || t.size(0) <= 1 || t.stride(0) >= t.size(1), name,
              " is written in place and must not overlap itself, got strides ", t.strides());
}

void check_target(const Tensor& target, const Tensor& logits, int64_t ignore_index) {
  const int64_t n = logits.size(0), k = logits.size(1);
  TORCH_CHECK(target.scalar_type() == at::kLong, "target must be int64, got ", target.scalar_type());
  TORCH_CHECK(target.dim() == 1 && target.size(0) == n, "target must have shape (", n, "), got ", target.sizes());
  TORCH_CHECK(target.is_contiguous(), "target must be contiguous");
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    TORCH_CHECK_INDEX((y[i] >= 0 && y[i] < k) || y[i] == ignore_index, "target[", i, "] = ", y[i], " is outside [0, ", k,
                      ") and is not ignore_index (", ignore_index, ")");
}

// ---- one call: the rows' operands, and what is wanted of them

struct Call {
  const RowKernels& kernels;
  int64_t n, k;
  const char* logits;
  int64_t logits_stride;  // in bytes, as element
  int64_t element;
  const int64_t* target;
  int64_t ignore_index;
  PerRow eps, scale;
  char* grad = nullptr;
  int64_t grad_stride = 0;
  bool stream = false;

  const char* z(int64_t row) const { return logits + row * logits_stride; }
  bool ignored(int64_t row) const { return target[row] == ignore_index; }
  int64_t blocks() const { return (k + kBlock - 1) / kBlock; }
  Stats<double> block(int64_t row, int64_t b) const {
    return kernels.block(z(row) + b * kBlock * element, std::min(kBlock, k - b * kBlock));
  }
};

Call make_call(const Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows, OptionalTensor row_scale,
               int64_t ignore_index, bool written) {
  check_matrix(logits, "logits", written);
  check_target(target, logits, ignore_index);
  const int64_t element = logits.element_size();
  return {kernels_for(logits),
          logits.size(0),
          logits.size(1),
          static_cast<const char*>(logits.const_data_ptr()),
          logits.stride(0) * element,
          element,
          target.const_data_ptr<int64_t>(),
          ignore_index,
          per_row(eps_rows, "eps_rows", logits, eps),
          per_row(row_scale, "row_scale", logits, 1.0)};
}

// Of a large fresh allocation most of the time goes into page faults; 2 MiB pages make 512 times fewer of them.
constexpr int64_t kHugePage = int64_t(2) << 20;

Tensor fresh_grad(const Tensor& logits) {
  Tensor grad = at::empty({logits.size(0), logits.size(1)}, logits.options().memory_format(at::MemoryFormat::Contiguous));
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(grad.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + grad.nbytes()) / kHugePage * kHugePage;
  if (!getenv("LSK_NOHUGE") && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return grad;
}

// Streaming stores save reading the lines that they fill; a gradient that the caches can hold is better left in them.
constexpr int64_t kStreamBytes = int64_t(4) << 20;

void write_to(Call& call, Tensor& grad, bool fresh) {
  call.grad = static_cast<char*>(grad.mutable_data_ptr());
  call.grad_stride = grad.stride(0) * call.element;
  call.stream = !getenv("LSK_NOSTREAM") && fresh && int64_t(grad.nbytes()) >= kStreamBytes;
}

// ---- threads

// Enough elements for a thread to be worth waking.
constexpr int64_t kGrain = 32768;

// f(row, begin, end) over all classes of all rows: whole rows per thread, or blocks of rows where rows are few and long.
bool split_rows(const Call& call) {
  return call.n < 4 * at::get_num_threads() && call.blocks() > 1 && call.n * call.k > kGrain;
}

template <class F>
void for_rows(const Call& call, const F& f) {
  at::parallel_for(0, call.n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.k)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

template <class F>
void for_blocks(const Call& call, const F& f) {
  const int64_t blocks = call.blocks();
  at::parallel_for(0, call.n * blocks, std::max<int64_t>(1, kGrain / kBlock), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i / blocks, i % blocks);
  });
}

// ---- rows

void gradient(const Call& call, int64_t row, double zmax, double logsum, int64_t begin, int64_t end) {
  char* g = call.grad + row * call.grad_stride + begin * call.element;
  if (call.ignored(row)) {
    std::memset(g, 0, (end - begin) * call.element);
    return;
  }
  const Weights<double> w = weights(call.eps[row], double(call.k));
  const GradientRow rule = {zmax, logsum, w.a + w.b, w.b, call.scale[row]};
  call.kernels.gradient(call.z(row) + begin * call.element, g, end - begin, call.target[row] - begin, rule, call.stream);
}

template <class A>
struct Rows {  // the per-row results, nll and prediction null where not wanted
  A *loss, *zmax, *logsum, *nll;
  int64_t* prediction;
};

// A row's block sums in order, and the first block that holds the maximum.
struct RowSum {
  Stats<double> stats = no_stats<double>();
  int64_t best = 0;

  void add(const Stats<double>& part, int64_t b) {
    if (part.max > stats.max) best = b;
    stats = merge(stats, part);
  }
};

int64_t find(const Call& call, int64_t row, int64_t begin, int64_t end, double value) {
  return begin + call.kernels.find(call.z(row) + begin * call.element, end - begin, value);
}

double logit(const Call& call, int64_t row, int64_t k) {
  return call.kernels.block(call.z(row) + k * call.element, 1).max;
}

template <class A>
void finish(const Call& call, const Rows<A>& out, int64_t row, const RowSum& sum) {
  double zmax = sum.stats.max;
  const double logsum = std::log(sum.stats.sum);
  int64_t prediction = -1;
  if (std::isnan(logsum)) {  // the maximum skipped NaN; torch's does not
    prediction = find(call, row, 0, call.k, logsum);
    if (prediction < call.k) zmax = logsum;
  }
  out.zmax[row] = A(zmax);
  out.logsum[row] = A(logsum);
  const bool ignored = call.ignored(row);
  const double zy = ignored ? 0 : logit(call, row, call.target[row]) - zmax;
  const Weights<double> w = weights(call.eps[row], double(call.k));
  out.loss[row] = ignored ? A(0) : A(row_loss(logsum, w, zy, sum.stats.dev));
  if (out.nll != nullptr) {
    out.nll[row] = ignored ? A(0) : A(logsum - zy);
    if (prediction < 0 || prediction == call.k) {
      const int64_t begin = sum.best * kBlock;
      prediction = find(call, row, begin, std::min(call.k, begin + kBlock), zmax);
    }
    out.prediction[row] = prediction;
  }
}

template <class A>
void forward_rows(const Call& call, const Rows<A>& out) {
  const bool with_stats = out.nll != nullptr;
  const auto unread = [&](int64_t row) { return !with_stats && call.ignored(row); };
  const auto write = [&](int64_t row, int64_t begin, int64_t end) {
    if (call.grad != nullptr) gradient(call, row, out.zmax[row], out.logsum[row], begin, end);
  };
  const auto reduce = [&](int64_t row, const auto& part) {
    if (unread(row)) {
      out.loss[row] = out.zmax[row] = out.logsum[row] = 0;
      return;
    }
    RowSum sum;
    for (int64_t b = 0; b < call.blocks(); ++b) sum.add(part(row, b), b);
    finish(call, out, row, sum);
  };
  if (!split_rows(call)) {
    for_rows(call, [&](int64_t row) {
      reduce(row, [&](int64_t r, int64_t b) { return call.block(r, b); });
      write(row, 0, call.k);
    });
    return;
  }
  std::vector<Stats<double>> parts(call.n * call.blocks());
  for_blocks(call, [&](int64_t row, int64_t b) {
    if (!unread(row)) parts[row * call.blocks() + b] = call.block(row, b);
  });
  for (int64_t row = 0; row < call.n; ++row)
    reduce(row, [&](int64_t r, int64_t b) { return parts[r * call.blocks() + b]; });
  for_blocks(call, [&](int64_t row, int64_t b) { write(row, b * kBlock, std::min(call.k, (b + 1) * kBlock)); });
}

template <class A>
A* data_or_null(const Tensor& t) {
  return t.numel() == 0 ? nullptr : t.mutable_data_ptr<A>();
}

struct Results {
  Tensor loss, zmax, logsum, nll, prediction;
};

Results forward(const Call& call, const Tensor& logits, bool with_stats) {
  const auto options = logits.options().dtype(acc_dtype(logits));
  const int64_t stats = with_stats ? call.n : 0;
  const Results r = {at::empty({call.n}, options), at::empty({call.n}, options), at::empty({call.n}, options),
                     at::empty({stats}, options), at::empty({stats}, options.dtype(at::kLong))};
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    forward_rows<A>(call, {data_or_null<A>(r.loss), data_or_null<A>(r.zmax), data_or_null<A>(r.logsum),
                           data_or_null<A>(r.nll), data_or_null<int64_t>(r.prediction)});
  };
  logits.scalar_type() == at::kDouble ? run(double()) : run(float());
  return r;
}

void backward(const Call& call, const Tensor& logits, const Tensor& zmax, const Tensor& logsum) {
  const PerRow m = per_row(zmax, "zmax", logits, 0, false), s = per_row(logsum, "logsum", logits, 0, false);
  const auto write = [&](int64_t row, int64_t begin, int64_t end) { gradient(call, row, m[row], s[row], begin, end); };
  if (split_rows(call))
    for_blocks(call, [&](int64_t row, int64_t b) { write(row, b * kBlock, std::min(call.k, (b + 1) * kBlock)); });
  else
    for_rows(call, [&](int64_t row) { write(row, 0, call.k); });
}

}  // namespace

std::string cpu_capability() { return capability(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu_forward(const Tensor& logits, const Tensor& target,
                                                                       double eps, OptionalTensor eps_rows,
                                                                       OptionalTensor row_scale, int64_t ignore_index,
                                                                       bool with_grad, bool with_stats) {
  Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index, false);
  Tensor grad = with_grad ? fresh_grad(logits) : at::empty({0}, logits.options());
  if (with_grad) write_to(call, grad, true);
  const Results r = forward(call, logits, with_stats);
  return {r.loss, r.zmax, r.logsum, r.nll, r.prediction, grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_forward_(Tensor& logits, const Tensor& target, double eps,
                                                                OptionalTensor eps_rows, OptionalTensor row_scale,
                                                                int64_t ignore_index, bool with_stats) {
  Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index, true);
  write_to(call, logits, false);
  const Results r = forward(call, logits, with_stats);
  return {r.loss, r.zmax, r.logsum, r.nll, r.prediction};
}

Tensor cpu_backward(const Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows,
                    OptionalTensor row_scale, int64_t ignore_index, const Tensor& zmax, const Tensor& logsum) {
  Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index, false);
  Tensor grad = fresh_grad(logits);
  write_to(call, grad, true);
  backward(call, logits, zmax, logsum);
  return grad;
}

void cpu_backward_(Tensor& logits, const Tensor& target, double eps, OptionalTensor eps_rows, OptionalTensor row_scale,
                   int64_t ignore_index, const Tensor& zmax, const Tensor& logsum) {
  Call call = make_call(logits, target, eps, eps_rows, row_scale, ignore_index, true);
  write_to(call, logits, false);
  backward(call, logits, zmax, logsum);
}

void cpu_scale_(Tensor& grad, const Tensor& scale) {
  check_matrix(grad, "grad", true);
  TORCH_CHECK(scale.scalar_type() == acc_dtype(grad) && scale.numel() == 1, "scale must be one ", acc_dtype(grad),
              " element for a ", grad.scalar_type(), " grad, got ", scale.numel(), " of ", scale.scalar_type());
  const double factor = scale.item().toDouble();
  if (factor == 1) return;
  const RowKernels& kernels = kernels_for(grad);
  char* g = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t k = grad.size(1), stride = grad.stride(0) * grad.element_size();
  at::parallel_for(0, grad.size(0), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, k)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) kernels.scale(g + row * stride, k, factor);
  });
}

}  // namespace lsk
