// Bindings of the optimizers' steps on mask logits: argument checks and the split over threads.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "isa.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace csmask {
namespace {

using Sums = std::tuple<double, std::int64_t, std::int64_t>;

// What the step of any optimizer reads and writes, beside its states.
struct Arrays {
  const OutArray& mask_logits;
  const std::optional<OutArray>& masked_weight;
  const std::optional<InArray>& dmasked_weight;
  const InArray& weight;
  const std::optional<InArray>& grad;
};

// A state of the optimizer: fp32 or, where it has scales, codes, of the average with a sign.
Operand state(const char* name, const OutArray& array, bool has_scales, bool is_signed) {
  const Operand state = operand(name, array);
  if (has_scales) {
    check_integer(state, 8, is_signed);
  } else {
    check_float32(state);
  }
  check_writable(state);
  return state;
}

// Where the codes of AdamW's states lie.
StateCodes codes_of(const Layout& layout, const OutArray& first, const OutArray& second, const OutArray& scales) {
  std::int64_t expected = 1;
  for (int dim = layout.dims - 1; dim >= 0; --dim) {
    for (const int state : {5, 6}) {
      if (layout.shape[dim] == 1 || layout.stride[state][dim] == expected) continue;
      fail_value(
          "codes of states must lie without gaps and in the order of mask_logits: load them into an optimizer "
          "of these logits");
    }
    expected *= layout.shape[dim];
  }
  const Operand found = operand("state_scales", scales);
  check_float32(found);
  check_contiguous(found);
  check_numel(found, (layout.numel + kStateBlock - 1) / kStateBlock);
  StateCodes codes{};
  codes.averages = static_cast<std::int8_t*>(first.data());
  codes.squares = static_cast<std::uint8_t*>(second.data());
  codes.scales = static_cast<float*>(scales.data());
  return codes;
}

// The arguments but for the optimizer's own, checked.
MaskStepArgs checked(const Arrays& arrays, const std::optional<OutArray>& first, const std::optional<OutArray>& second,
                     const std::optional<OutArray>& scales, double temperature, double dl0, double scale, double factor,
                     int threads) {
  const Operand logits = operand("mask_logits", arrays.mask_logits);
  const Operand weight = operand("weight", arrays.weight);
  check_float32(logits);
  check_threads(threads);
  check_writable(logits);
  MaskStepArgs args{};
  args.weight_dtype = float_dtype(weight);
  // An operand that is not there walks as the logits do.
  Operand masked = logits, dmasked = logits, grad = logits, one = logits, two = logits;
  if (arrays.masked_weight) {
    masked = operand("masked_weight", *arrays.masked_weight);
    args.masked_weight_dtype = float_dtype(masked);
    check_writable(masked);
  }
  if (arrays.dmasked_weight) {
    dmasked = operand("dmasked_weight", *arrays.dmasked_weight);
    args.dmasked_weight_dtype = float_dtype(dmasked);
  }
  if (arrays.grad) {
    grad = operand("grad", *arrays.grad);
    check_float32(grad);
  }
  if (first) one = state("first", *first, scales.has_value(), true);
  if (second) two = state("second", *second, scales.has_value(), false);
  args.layout = layout_of({logits, masked, weight, dmasked, grad, one, two});
  // What is written must share memory with nothing else.
  std::vector<Operand> written{logits};
  if (arrays.masked_weight) written.push_back(masked);
  if (first) written.push_back(one);
  if (second) written.push_back(two);
  if (scales) written.push_back(operand("state_scales", *scales));
  std::vector<Operand> read{weight};
  if (arrays.dmasked_weight) read.push_back(dmasked);
  if (arrays.grad) read.push_back(grad);
  for (std::size_t i = 0; logits.numel != 0 && i < written.size(); ++i) {
    for (std::size_t j = i + 1; j < written.size(); ++j) check_apart(written[j], written[i]);
    for (const Operand& in : read) check_apart(written[i], in);
  }
  args.logits = static_cast<float*>(arrays.mask_logits.data());
  args.masked_weight = arrays.masked_weight ? arrays.masked_weight->data() : nullptr;
  args.weight = arrays.weight.data();
  args.dmasked_weight = arrays.dmasked_weight ? arrays.dmasked_weight->data() : nullptr;
  args.grad = arrays.grad ? static_cast<const float*>(arrays.grad->data()) : nullptr;
  if (scales) {
    args.codes = codes_of(args.layout, *first, *second, *scales);
  } else {
    args.first = first ? static_cast<float*>(first->data()) : nullptr;
    args.second = second ? static_cast<float*>(second->data()) : nullptr;
  }
  args.temperature = static_cast<float>(temperature);
  args.scale = static_cast<float>(scale);
  args.dl0 = static_cast<float>(dl0);
  args.factor = static_cast<float>(factor);
  args.stream =
      arrays.masked_weight && args.masked_weight_dtype == Dtype::float32 && streams(masked.numel * masked.itemsize);
  return args;
}

Sums run_step(const MaskStepArgs& args, int threads) {
  Sums sums{0.0, 0, 0};
  if (args.layout.numel == 0) return sums;
  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  const std::int64_t blocks = block_count(args.layout.numel);
  std::vector<MaskPartial> partials(static_cast<std::size_t>(blocks));
  parallel_for(blocks, kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.mask_step(args, first, last, partials.data()); });
  for (const MaskPartial& partial : partials) {
    std::get<0>(sums) += partial.sum;
    std::get<1>(sums) += partial.kept;
    std::get<2>(sums) += partial.undecided;
  }
  return sums;
}

Sums mask_adamw(const OutArray& mask_logits, const OutArray& exp_avg, const OutArray& exp_avg_sq,
                const std::optional<OutArray>& state_scales, const std::optional<OutArray>& masked_weight,
                const std::optional<InArray>& dmasked_weight, const InArray& weight, const std::optional<InArray>& grad,
                double temperature, double dl0, double scale, double factor, double step, double lr, double beta1,
                double beta2, double eps, double weight_decay, int threads) {
  const Arrays arrays{mask_logits, masked_weight, dmasked_weight, weight, grad};
  MaskStepArgs args = checked(arrays, exp_avg, exp_avg_sq, state_scales, temperature, dl0, scale, factor, threads);
  if (!(step >= 1)) fail_value("step must be >= 1, got " + std::to_string(step));
  args.adamw.taken1 = static_cast<float>(1.0 - beta1);
  args.adamw.beta2 = static_cast<float>(beta2);
  args.adamw.taken2 = static_cast<float>(1.0 - beta2);
  args.adamw.eps = static_cast<float>(eps);
  args.adamw.decay = static_cast<float>(1.0 - lr * weight_decay);
  args.adamw.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  args.adamw.inverse_root_correction2 = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  const auto unit = [&](double t) {
    return static_cast<float>(t > 0 ? (1.0 - std::pow(beta1, t)) / std::sqrt(1.0 - std::pow(beta2, t)) : 0.0);
  };
  const double power1 = std::pow(beta1, step);
  args.codes.unit_before = unit(step - 1);
  args.codes.unit = unit(step);
  args.codes.residue =
      static_cast<float>(beta1 / (1.0 - beta1) / (1.0 - power1 * beta1 / (1.0 + beta1)) * (1.0 - power1));
  args.codes.step = static_cast<std::uint32_t>(step);
  return run_step(args, threads);
}

Sums mask_sgd(const OutArray& mask_logits, const std::optional<OutArray>& momentum_buffer,
              const std::optional<OutArray>& masked_weight, const std::optional<InArray>& dmasked_weight,
              const InArray& weight, const std::optional<InArray>& grad, double temperature, double dl0, double scale,
              double factor, double step, double lr, double momentum, double dampening, double weight_decay,
              bool nesterov, int threads) {
  const Arrays arrays{mask_logits, masked_weight, dmasked_weight, weight, grad};
  MaskStepArgs args =
      checked(arrays, momentum_buffer, std::nullopt, std::nullopt, temperature, dl0, scale, factor, threads);
  const bool is_first = step <= 1;
  args.sgd.lr = static_cast<float>(lr);
  args.sgd.momentum = static_cast<float>(momentum);
  args.sgd.kept_momentum = static_cast<float>(is_first ? 0.0 : momentum);
  args.sgd.taken = static_cast<float>(is_first ? 1.0 : 1.0 - dampening);
  args.sgd.weight_decay = static_cast<float>(weight_decay);
  args.sgd.nesterov = nesterov;
  return run_step(args, threads);
}

double mask_grad_norm(const OutArray& mask_logits, const std::optional<InArray>& dmasked_weight, const InArray& weight,
                      const std::optional<InArray>& grad, double temperature, double dl0, double scale, int threads) {
  const std::optional<OutArray> none;
  const Arrays arrays{mask_logits, none, dmasked_weight, weight, grad};
  const MaskStepArgs args = checked(arrays, none, none, none, temperature, dl0, scale, 1.0, threads);
  if (args.layout.numel == 0) return 0.0;
  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  const std::int64_t blocks = block_count(args.layout.numel);
  std::vector<double> partials(static_cast<std::size_t>(blocks));
  parallel_for(blocks, kBlocksPerThread, threads, [&](std::int64_t first, std::int64_t last) {
    kernels.mask_grad_squares(args, first, last, partials.data());
  });
  double total = 0.0;
  for (const double partial : partials) total += partial;
  return std::sqrt(total);
}

}  // namespace

void bind_step(nb::module_& module) {
  module.def("mask_adamw", &mask_adamw, "mask_logits"_a.noconvert(), "exp_avg"_a.noconvert(),
             "exp_avg_sq"_a.noconvert(), "state_scales"_a.noconvert().none(), "masked_weight"_a.noconvert().none(),
             "dmasked_weight"_a.noconvert().none(), "weight"_a.noconvert(), "grad"_a.noconvert().none(),
             "temperature"_a, "dl0"_a, "scale"_a, "factor"_a, "step"_a, "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
             "weight_decay"_a, "threads"_a,
             R"(One step of AdamW on mask logits, and the next masked weight; returns its (l0, kept, undecided).

dS = (grad + (dmasked_weight * weight + dl0) * scale * T * sigmoid'(T * S)) * factor; S, exp_avg, exp_avg_sq as in AdamW
with decoupled weight decay; then masked_weight = round(weight * scale * sigmoid(T * S)). All in fp32, rounded once.

One shape, any strides. mask_logits, exp_avg, exp_avg_sq, grad: float32; weight, masked_weight, dmasked_weight: float32,
bfloat16 or float16. With state_scales, float32 (ceil(elements / 256),), exp_avg and exp_avg_sq are int8 and uint8 codes
in the order of mask_logits, whose last four bits belong to them: see csmask/state_codes.py. None: states in float32, a gradient of zeros, a masked_weight that is not wanted. step: 1 for the first.
Raises TypeError for a wrong dtype or device; ValueError for shapes that differ, or memory that is shared with a result.)");
  module.def("mask_sgd", &mask_sgd, "mask_logits"_a.noconvert(), "momentum_buffer"_a.noconvert().none(),
             "masked_weight"_a.noconvert().none(), "dmasked_weight"_a.noconvert().none(), "weight"_a.noconvert(),
             "grad"_a.noconvert().none(), "temperature"_a, "dl0"_a, "scale"_a, "factor"_a, "step"_a, "lr"_a,
             "momentum"_a, "dampening"_a, "weight_decay"_a, "nesterov"_a, "threads"_a,
             "The same for SGD, torch.optim.SGD's formulas; momentum_buffer None for none.");
  module.def("mask_grad_norm", &mask_grad_norm, "mask_logits"_a.noconvert(), "dmasked_weight"_a.noconvert().none(),
             "weight"_a.noconvert(), "grad"_a.noconvert().none(), "temperature"_a, "dl0"_a, "scale"_a, "threads"_a,
             "The 2-norm of the gradient that these steps take, before `factor`; nothing is written.");
}

}  // namespace csmask
