// Where rows are few and short the host takes most of the time. A forward and backward of 256 rows of 10 classes spends
// 10 µs in the kernels; Python's gate, its reduction and its autograd.Functions spend 250 µs. Here are the two forms of
// labelsmooth_kernels/autograd.py once more, one pass and recompute.
#include "direct.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/PythonFallbackKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <cmath>

namespace lsk {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using OptionalTensor = const std::optional<Tensor>&;

// Calls an operator, which is looked up once.
template <const char* name, class Result, class... Arguments>
Result invoke(Arguments... arguments) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>();
  return op.call(arguments...);
}

at::SmallVector<int64_t, 5> row_shape(const Tensor& input) {
  at::SmallVector<int64_t, 5> shape(input.sizes().begin(), input.sizes().end());
  shape.erase(shape.begin() + (shape.size() > 1));
  return shape;
}

constexpr char kReduced[] = "labelsmooth_kernels::cpu_reduced", kScale[] = "labelsmooth_kernels::cpu_scale_",
               kForward[] = "labelsmooth_kernels::cpu_forward", kBackward[] = "labelsmooth_kernels::cpu_backward",
               kGradient[] = "labelsmooth_kernels::cpu_gradient";

// A view with the classes last, as the operators want them.
Tensor classes_last(const Tensor& t) {
  return t.dim() == 1 ? t.unsqueeze(0) : t.dim() == 2 ? t : t.flatten(2).transpose(1, 2);
}

// The inverse.
Tensor as_before(const Tensor& rows, at::IntArrayRef shape) {
  return shape.size() == 2 ? rows : (shape.size() == 1 ? rows : rows.transpose(1, 2)).reshape(shape);
}

struct Options {
  std::optional<Tensor> weight;
  double eps;
  int64_t ignore_index;
};

// Rows holds the tensors of a call as the operators take them, and calls these.
struct Rows : Options {
  Tensor logits, target;

  Rows(const Tensor& input, const Tensor& given, Options options) : Options(std::move(options)) {
    logits = classes_last(input);
    target = given.is_floating_point() ? classes_last(given) : given.dim() == 1 ? given : given.reshape(-1);
    if (!given.is_floating_point()) target = target.contiguous();
  }

  // (loss, scale, saved, grad)
  std::tuple<Tensor, Tensor, Tensor, Tensor> reduced(Reduction reduction, bool with_saved, bool with_grad) const {
    return invoke<kReduced, std::tuple<Tensor, Tensor, Tensor, Tensor>, const Tensor&, const Tensor&, OptionalTensor,
                  double, int64_t, bool, bool, bool>(logits, target, weight, eps, ignore_index,
                                                     reduction == Reduction::kMean, with_saved, with_grad);
  }

  // (losses, saved)
  std::pair<Tensor, Tensor> losses() const {
    const auto [loss, saved, stats, prediction, grad] =
        with_options<kForward, std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>, bool, int64_t>({}, false, 0);
    return {loss, saved};
  }

  Tensor gradient(const Tensor& scale, const Tensor& saved) const {
    return with_options<kBackward, Tensor, const Tensor&>(scale, saved);
  }

  // The same gradient, which autograd can differentiate again.
  Tensor differentiable_gradient(const Tensor& scale) const {
    return invoke<kGradient, Tensor, const Tensor&, const Tensor&, OptionalTensor, const Tensor&, double, int64_t>(
        logits, target, weight, scale, eps, ignore_index);
  }

 private:
  template <const char* name, class Result, class... Own>
  Result with_options(OptionalTensor row_scale, Own... own) const {
    return invoke<name, Result, const Tensor&, const Tensor&, OptionalTensor, OptionalTensor, double, OptionalTensor,
                  OptionalTensor, int64_t, bool, bool, double, double, double, std::optional<double>, Own...>(
        logits, target, weight, {}, eps, {}, row_scale, ignore_index, false, false, 0, 0, 1, {}, own...);
  }
};

bool is_wrapped(const Tensor& t) { return !(t.key_set() & at::kTensorSubclassLike).empty(); }

bool transformed() {  // torch.func is at work
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The gradient is asked for as a function: by autograd, by torch.func or by forward mode.
bool differentiated(const Tensor& upstream) {
  return at::GradMode::is_enabled() || transformed() || upstream._fw_grad(0).defined();
}

// The loss, by the reduction one number or one of each row.
struct Loss : Function<Loss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& target, const Options& options,
                        Reduction reduction) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Rows rows(input, target, options);
    Tensor loss, scale, saved, grad;
    if (reduction == Reduction::kNone) {
      std::tie(loss, saved) = rows.losses();
      loss = loss.view(row_shape(input));
    } else {  // a loss scale must multiply before half precision rounds
      const bool half = input.scalar_type() == at::kHalf;
      std::tie(loss, scale, saved, grad) = rows.reduced(reduction, half, !half);
      (half ? grad : saved) = Tensor();
    }
    ctx->save_for_backward({input, target, options.weight.value_or(Tensor()), scale, saved, grad});
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstreams) {
    if (!upstreams[0].defined()) return variable_list(4);
    const variable_list t = ctx->get_saved_variables();
    const Tensor &input = t[0], &target = t[1], &weight = t[2], &scale = t[3], &saved = t[4];
    Tensor grad = t[5], upstream = scale.defined() ? upstreams[0] : upstreams[0].reshape(-1);
    const bool again = differentiated(upstream), wrapped = is_wrapped(upstream);
    if (!again && grad.defined()) {
      if (wrapped || torch::autograd::get_current_graph_task_keep_graph())
        grad = grad * upstream;
      else
        invoke<kScale, void, Tensor&, const Tensor&>(grad, upstream);
    } else {
      const Rows rows(input, target,
                      {weight.defined() ? std::optional(weight) : std::nullopt, ctx->saved_data["eps"].toDouble(),
                       ctx->saved_data["ignore_index"].toInt()});
      if (scale.defined()) upstream = upstream * scale;
      grad = again || wrapped ? rows.differentiable_gradient(upstream) : rows.gradient(upstream.contiguous(), saved);
    }
    return {as_before(grad, input.sizes()), {}, {}, {}};
  }
};

// PyTorch traces or transforms what is computed. Other modes see the operators that are called here.
bool is_traced() {
  using Mode = c10::impl::TorchDispatchModeKey;
  const auto active = [](Mode mode) { return c10::impl::TorchDispatchModeTLS::get_mode(mode).has_value(); };
  return transformed() || active(Mode::FAKE) || active(Mode::PROXY) || active(Mode::FUNCTIONAL) ||
         at::impl::torch_function_mode_enabled() || torch::jit::tracer::isTracing();
}

// A tensor of numbers on the CPU, without a tangent.
bool is_plain(const Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && !is_wrapped(t) && !t.is_neg() && !t._fw_grad(0).defined();
}

bool is_number(const Tensor& t) {
  const auto dtype = t.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

// The arguments are what the operators ask for, and of their gradients only that of the logits is wanted.
bool is_served(const Tensor& input, const Tensor& target, OptionalTensor weight, int64_t ignore_index, double eps) {
  if (is_traced() || !is_plain(input) || !is_plain(target) || target.requires_grad()) return false;
  if (!is_number(input) || input.dim() < 1 || input.numel() == 0) return false;
  const bool soft = target.sizes() == input.sizes();
  if (soft ? !is_number(target) || ignore_index >= 0
           : target.scalar_type() != at::kLong || target.sizes() != at::IntArrayRef(row_shape(input)))
    return false;
  if (weight && (!is_plain(*weight) || !is_number(*weight) || weight->requires_grad() || weight->dim() != 1 ||
                 weight->size(0) != input.size(input.dim() > 1)))
    return false;
  return eps > -INFINITY && eps <= 1;
}

}  // namespace

std::optional<Tensor> cross_entropy(const Tensor& input, const Tensor& target, OptionalTensor weight,
                                    int64_t ignore_index, Reduction reduction, double eps) {
  if (!is_served(input, target, weight, ignore_index, eps)) return {};
  const bool recorded = at::GradMode::is_enabled() && input.requires_grad();
  if (recorded && (target.is_inference() || (weight && weight->is_inference()))) return {};  // autograd cannot save it
  Options options = {{}, eps, ignore_index};
  if (weight) options.weight = weight->to(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  if (recorded) return Loss::apply(input, target, options, reduction);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;  // so that the losses are no view
  const Rows rows(input, target, options);
  if (reduction == Reduction::kNone) return rows.losses().first.view(row_shape(input));
  return std::get<0>(rows.reduced(reduction, false, false));
}

}  // namespace lsk
