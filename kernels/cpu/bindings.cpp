// csmask_kernels._cpu: argument checks and the split over threads; the arithmetic is in the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "materialize.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace csmask {
namespace {

// No dtype and no layout in the types: nanobind would convert, that is copy, an argument that does not match, and an
// output written through a copy is lost. The checks below refuse it instead, by name.
using InArray = nb::ndarray<nb::ro, nb::device::cpu>;
using OutArray = nb::ndarray<nb::device::cpu>;

// One thread per 16 blocks (32,768 weights: 30 us or so of work with AVX2), about what starting a thread costs.
constexpr std::int64_t kBlocksPerThread = 16;

std::string dtype_name(nb::dlpack::dtype dtype) {
  const char* kind = "dtype of code ";
  switch (static_cast<nb::dlpack::dtype_code>(dtype.code)) {
    case nb::dlpack::dtype_code::Int: kind = "int"; break;
    case nb::dlpack::dtype_code::UInt: kind = "uint"; break;
    case nb::dlpack::dtype_code::Float: kind = "float"; break;
    case nb::dlpack::dtype_code::Bfloat: kind = "bfloat"; break;
    case nb::dlpack::dtype_code::Complex: kind = "complex"; break;
    case nb::dlpack::dtype_code::Bool: kind = "bool"; break;
    default: return kind + std::to_string(dtype.code);
  }
  return kind + std::to_string(dtype.bits);
}

bool is_float32(nb::dlpack::dtype dtype) { return dtype == nb::dtype<float>(); }

bool is_bfloat16(nb::dlpack::dtype dtype) {
  return dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16 &&
         dtype.lanes == 1;
}

Dtype weight_dtype(const char* name, nb::dlpack::dtype dtype) {
  if (is_float32(dtype)) return Dtype::float32;
  if (is_bfloat16(dtype)) return Dtype::bfloat16;
  throw nb::type_error((std::string(name) + " must be float32 or bfloat16, got " + dtype_name(dtype)).c_str());
}

template <typename Array>
void check_contiguous(const char* name, const Array& array) {
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    const auto extent = static_cast<std::int64_t>(array.shape(i));
    if (extent == 0) return;
    if (extent != 1 && array.stride(i) != expected) {
      throw nb::value_error((std::string(name) + " must be contiguous, got stride " + std::to_string(array.stride(i)) +
                             " where " + std::to_string(expected) + " was expected; call .contiguous() first")
                                .c_str());
    }
    expected *= extent;
  }
}

void check_count(const char* name, std::int64_t got, std::int64_t expected) {
  if (got != expected) {
    throw nb::value_error(
        (std::string(name) + " must have " + std::to_string(expected) + " elements, got " + std::to_string(got))
            .c_str());
  }
}

double materialize(const InArray& weight, const InArray& mask_logits, double temperature, bool hard, double scale,
                   std::int64_t units, std::int64_t inner, const OutArray& out, int threads) {
  const auto numel = static_cast<std::int64_t>(weight.size());
  MaterializeArgs args{};
  args.weight_dtype = weight_dtype("weight", weight.dtype());
  args.out_dtype = weight_dtype("out", out.dtype());
  if (!is_float32(mask_logits.dtype())) {
    throw nb::type_error(("mask_logits must be float32, got " + dtype_name(mask_logits.dtype())).c_str());
  }
  check_contiguous("weight", weight);
  check_contiguous("mask_logits", mask_logits);
  check_contiguous("out", out);
  if (units < 0 || inner < 1 || threads < 1) {
    throw nb::value_error(("units must be >= 0, inner and threads >= 1, got " + std::to_string(units) + ", " +
                           std::to_string(inner) + ", " + std::to_string(threads))
                              .c_str());
  }
  check_count("mask_logits", static_cast<std::int64_t>(mask_logits.size()), units);
  check_count("out", static_cast<std::int64_t>(out.size()), numel);
  if (numel == 0) return 0.0;
  if (units == 0 || numel % units != 0 || (numel / units) % inner != 0) {
    throw nb::value_error(("weight's elements must be a multiple of units * inner = " + std::to_string(units) + " * " +
                           std::to_string(inner) + ", got " + std::to_string(numel))
                              .c_str());
  }
  const auto* weight_begin = static_cast<const char*>(weight.data());
  const auto* out_begin = static_cast<const char*>(out.data());
  if (weight_begin < out_begin + out.nbytes() && out_begin < weight_begin + weight.nbytes()) {
    throw nb::value_error("out must not share memory with weight");
  }
  args.weight = weight.data();
  args.out = out.data();
  args.numel = numel;
  args.logits = static_cast<const float*>(mask_logits.data());
  args.units = units;
  args.inner = inner;
  args.temperature = static_cast<float>(temperature);
  args.scale = static_cast<float>(scale);
  args.hard = hard;

  const nb::gil_scoped_release without_gil;
  const MaterializeKernels& kernels = *instruction_set().materialize;
  std::vector<float> unit_masks;
  if (!hard && units != numel) {
    unit_masks.resize(static_cast<std::size_t>(units));
    kernels.soft_masks(args.logits, units, args.temperature, args.scale, unit_masks.data());
    args.unit_masks = unit_masks.data();
  }
  const std::int64_t block_count = (numel + kMaterializeBlock - 1) / kMaterializeBlock;
  std::vector<double> partials(static_cast<std::size_t>(block_count));
  parallel_for(block_count, kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.blocks(args, first, last, partials.data()); });
  double l0 = 0.0;
  for (const double partial : partials) l0 += partial;
  return l0;
}

}  // namespace
}  // namespace csmask

NB_MODULE(_cpu, module) {
  module.doc() = "C++ kernels of csmask for the CPU.";
  module.def("materialize", &csmask::materialize, "weight"_a.noconvert(), "mask_logits"_a.noconvert(), "temperature"_a,
             "hard"_a, "scale"_a, "units"_a, "inner"_a, "out"_a.noconvert(), "threads"_a,
             R"(Writes out = round(weight * m) and returns l0, the sum of m over the weights.

m = scale * sigmoid(temperature * S) in fp32 (soft), or hard: scale where S > 0, else 0, as a select (an infinite or NaN
weight outside gives +0, and scale 1 keeps the weight's bits). Element i of the weight uses logit (i / inner) % units.
The result depends neither on threads nor on the instruction set.

weight: contiguous, any shape, float32 or bfloat16, not requiring grad.
mask_logits: contiguous, units elements, float32.
out: contiguous, as many elements as weight, float32 or bfloat16.
threads: how many threads at most, >= 1.
Raises TypeError for a wrong dtype or device, ValueError for a wrong size or layout.)");
  module.def(
      "instruction_set", [] { return std::string(csmask::instruction_set().name); }, "The instruction set in use.");
  module.def("instruction_sets", &csmask::instruction_sets, "Those this CPU can run, best first.");
  module.def("force_instruction_set", &csmask::force_instruction_set, "name"_a,
             "For tests only: use this instruction set. ValueError where it is unknown or this CPU cannot run it.");
}
