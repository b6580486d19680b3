// Bindings of materialize, mask_sums and logits_grad: argument checks and the split over threads.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

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

Sums run_materialize(const MaterializeArgs& args, int threads) {
  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  const std::int64_t blocks = block_count(args.layout.numel);
  std::vector<MaskPartial> partials(static_cast<std::size_t>(blocks));
  parallel_for(blocks, kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.materialize(args, first, last, partials.data()); });
  Sums sums{0.0, 0, 0};
  for (const MaskPartial& partial : partials) {
    std::get<0>(sums) += partial.sum;
    std::get<1>(sums) += partial.kept;
    std::get<2>(sums) += partial.undecided;
  }
  return sums;
}

Sums materialize(const InArray& weight, const InArray& mask_logits, double temperature, bool hard, double scale,
                 const OutArray& out, bool counts, int threads, std::optional<bool> stream) {
  const Operand w = operand("weight", weight);
  const Operand logits = operand("mask_logits", mask_logits);
  const Operand o = operand("out", out);
  MaterializeArgs args{};
  args.weight_dtype = float_dtype(w);
  args.out_dtype = float_dtype(o);
  check_float32(logits);
  check_threads(threads);
  check_writable(o);
  args.layout = layout_of({o, w, logits});
  if (args.layout.numel == 0) return {0.0, 0, 0};
  check_apart(o, w);
  check_apart(o, logits);
  args.out = out.data();
  args.weight = weight.data();
  args.logits = static_cast<const float*>(mask_logits.data());
  args.mask = {static_cast<float>(temperature), static_cast<float>(scale), hard};
  args.counts = counts;
  // Sixteen-bit results are bound by their arithmetic: streaming them measures slower.
  args.stream = args.out_dtype == Dtype::float32 && stream.value_or(streams(o.numel * o.itemsize));
  return run_materialize(args, threads);
}

Sums mask_sums(const InArray& mask_logits, double temperature, bool hard, double scale, bool counts, int threads) {
  const Operand logits = operand("mask_logits", mask_logits);
  check_float32(logits);
  check_threads(threads);
  MaterializeArgs args{};
  args.layout = layout_of({logits});
  if (args.layout.numel == 0) return {0.0, 0, 0};
  args.logits = static_cast<const float*>(mask_logits.data());
  args.mask = {static_cast<float>(temperature), static_cast<float>(scale), hard};
  args.counts = counts;
  return run_materialize(args, threads);
}

// What both bindings of the kernel share; `taken` is where the masked weight goes, or null.
void run_logits_grad(const OutArray& dlogits, const std::optional<InArray>& dmasked_weight,
                     const std::optional<InArray>& weight, const InArray& mask_logits, double temperature, double dl0,
                     double scale, bool add, int threads, std::optional<bool> stream, void* taken) {
  const Operand out = operand("dlogits", dlogits);
  const Operand logits = operand("mask_logits", mask_logits);
  check_float32(out);
  check_float32(logits);
  check_threads(threads);
  check_writable(out);
  if (dmasked_weight.has_value() != weight.has_value()) {
    fail_value("dmasked_weight and weight must be given together, or neither of them");
  }
  LogitsGradArgs args{};
  if (weight) {
    const Operand w = operand("weight", *weight);
    const Operand dwm = operand("dmasked_weight", *dmasked_weight);
    args.weight_dtype = float_dtype(w);
    args.dmasked_weight_dtype = float_dtype(dwm);
    args.layout = layout_of({out, logits, w, dwm});
    check_apart(out, w);
    check_apart(out, dwm);
    args.weight = weight->data();
    args.dmasked_weight = dmasked_weight->data();
  } else {
    args.layout = layout_of({out, logits});
  }
  if (args.layout.numel == 0) return;
  check_apart(out, logits);
  args.dlogits = static_cast<float*>(dlogits.data());
  args.add = add;
  args.logits = static_cast<const float*>(mask_logits.data());
  args.temperature = static_cast<float>(temperature);
  args.scale = static_cast<float>(scale);
  args.dl0 = static_cast<float>(dl0);
  args.stream = !add && stream.value_or(streams(out.numel * out.itemsize));
  args.masked_weight = taken;

  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(args.layout.numel), kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.logits_grad(args, first, last); });
}

void logits_grad(const OutArray& dlogits, const std::optional<InArray>& dmasked_weight,
                 const std::optional<InArray>& weight, const InArray& mask_logits, double temperature, double dl0,
                 double scale, bool add, int threads, std::optional<bool> stream) {
  run_logits_grad(dlogits, dmasked_weight, weight, mask_logits, temperature, dl0, scale, add, threads, stream, nullptr);
}

void logits_grad_and_mask(const OutArray& dlogits, const OutArray& dmasked_weight, const InArray& weight,
                          const InArray& mask_logits, double temperature, double dl0, double scale, bool add,
                          int threads, std::optional<bool> stream) {
  const Operand taken = operand("dmasked_weight", dmasked_weight);
  check_writable(taken);
  check_apart(taken, operand("weight", weight));
  check_apart(taken, operand("mask_logits", mask_logits));
  run_logits_grad(dlogits, InArray(dmasked_weight), weight, mask_logits, temperature, dl0, scale, add, threads, stream,
                  dmasked_weight.data());
}

}  // namespace

void bind_masks(nb::module_& module) {
  module.def("materialize", &materialize, "weight"_a.noconvert(), "mask_logits"_a.noconvert(), "temperature"_a,
             "hard"_a, "scale"_a, "out"_a.noconvert(), "counts"_a, "threads"_a, "stream"_a = nb::none(),
             R"(Writes out = round(weight * m); returns (l0, kept, undecided), sums over the weights.

m = scale * sigmoid(temperature * S) in fp32 (soft), or hard: scale where S > 0, else 0, as a select (an infinite or NaN
weight outside gives +0, and scale 1 keeps the weight's bits). l0 is the sum of m; kept counts S > 0, undecided
|temperature * S| < 4, both 0 unless `counts`. Results do not depend on threads, nor on the instruction set where it has fused products (all but baseline).

weight, mask_logits, out: one shape, any strides (logits shared by several weights are expanded: stride 0).
weight, out: float32, bfloat16 or float16; mask_logits float32; none requiring grad.
threads: how many threads at most, >= 1.
stream: write a float32 out past the caches; by default where it is larger than half of the largest one.
Raises TypeError for a wrong dtype or device; ValueError for shapes that differ, or an out that overlaps itself or an
argument.)");
  module.def("mask_sums", &mask_sums, "mask_logits"_a.noconvert(), "temperature"_a, "hard"_a, "scale"_a, "counts"_a,
             "threads"_a, "What materialize returns, without a weight: one pass over the logits.");
  module.def("logits_grad", &logits_grad, "dlogits"_a.noconvert(), "dmasked_weight"_a.noconvert().none(),
             "weight"_a.noconvert().none(), "mask_logits"_a.noconvert(), "temperature"_a, "dl0"_a, "scale"_a, "add"_a,
             "threads"_a, "stream"_a = nb::none(),
             R"(dlogits (+)= (dmasked_weight * weight + dl0) * scale * T * e / (1 + e)^2, with e = exp(-|T * S|).

Arrays as in materialize: one shape, any strides; dlogits and mask_logits float32. dmasked_weight and weight None stand
for zeros: the gradient of l0 alone. `add`: to what dlogits holds.)");
  module.def("logits_grad_and_mask", &logits_grad_and_mask, "dlogits"_a.noconvert(), "dmasked_weight"_a.noconvert(),
             "weight"_a.noconvert(), "mask_logits"_a.noconvert(), "temperature"_a, "dl0"_a, "scale"_a, "add"_a,
             "threads"_a, "stream"_a = nb::none(),
             R"(logits_grad, after which the soft masked weight, as materialize rounds it, is in dmasked_weight's place.

dmasked_weight: its own memory, of which no index lies where another one does.)");
}

}  // namespace csmask
