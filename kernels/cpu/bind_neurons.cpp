// Bindings of scale_neurons, its gradient, and the gradient of logits that the weights of a unit share.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "isa.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace csmask {
namespace {

// What a thread is worth starting for, in elements, and the size of a tile, which is a little more.
constexpr std::int64_t kGrain = kBlocksPerThread * kBlock;
constexpr std::int64_t kTile = 2 * kGrain;
// So many partial sums per unit at most, however many rows there are; and what reading and writing them costs is shared
// by so many rows at least.
constexpr std::int64_t kMostRowTiles = 64;
constexpr std::int64_t kLeastRows = 16;
// Units per tile where their elements lie side by side and the rows are too few to be shared out among threads. Where
// there are enough of them, rows stay whole: cut in pieces, they are read at half the speed.
constexpr std::int64_t kUnitsPerTile = 1024;
constexpr std::int64_t kEnoughRows = 16 * kLeastRows;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The units of dimension `dim`, as elements are walked by layout_of: in the order of the first operand's strides.
Units units_of(const Operand& key, std::int64_t dim) {
  const auto d = static_cast<std::size_t>(dim);
  Units units{key.shape[d], 1};
  for (std::size_t i = 0; i < key.dims; ++i) {
    const bool is_inner = key.strides[i] < key.strides[d] || (key.strides[i] == key.strides[d] && i > d);
    if (units.count == 1 || is_inner) units.inner *= key.shape[i];
  }
  return units;
}

void check_dim(const Operand& array, std::int64_t dim) {
  if (dim >= 0 && dim < static_cast<std::int64_t>(array.dims)) return;
  fail_value("dim must be one of the " + std::to_string(array.dims) + " dimensions of " + array.name +
             ", counted from 0, got " + std::to_string(dim));
}

// ValueError unless `values` is a vector of one entry per index of dimension `dim` of `array`.
void check_per_unit(const Operand& values, const Operand& array, std::int64_t dim) {
  const std::int64_t count = array.shape[dim];
  if (values.dims == 1 && values.numel == count) return;
  fail_value(std::string(values.name) + " must have shape (" + std::to_string(count) + ",) to match dimension " +
             std::to_string(dim) + " of " + array.name + ", got " + std::to_string(values.dims) + " dimensions and " +
             std::to_string(values.numel) + " elements");
}

UnitValues unit_values(const Operand& values, Dtype dtype) { return {values.data, dtype, values.strides[0]}; }

// m of each unit, computed once and not once per element.
std::vector<float> masks_of(const Operand& logits, double temperature, double scale) {
  std::vector<float> masks(static_cast<std::size_t>(logits.numel));
  instruction_set().kernels->unit_masks(reinterpret_cast<const float*>(logits.data), logits.strides[0], logits.numel,
                                        static_cast<float>(temperature), static_cast<float>(scale), masks.data());
  return masks;
}

// By shapes alone, so that results do not depend on the number of threads.
NeuronTiles tiles_of(const Units& units, std::int64_t rows) {
  NeuronTiles tiles{};
  if (units.inner == 1) {
    tiles.units = rows < kEnoughRows ? std::min(units.count, kUnitsPerTile) : units.count;
    tiles.rows = std::max({kLeastRows, ceil_div(kTile, tiles.units), ceil_div(rows, kMostRowTiles)});
  } else {
    tiles.units = std::min(units.count, std::max<std::int64_t>(1, kTile / units.inner));
    tiles.rows = std::max(ceil_div(kTile, tiles.units * units.inner), ceil_div(rows, kMostRowTiles));
  }
  tiles.row_tiles = ceil_div(rows, tiles.rows);
  tiles.unit_tiles = ceil_div(units.count, tiles.units);
  return tiles;
}

// Fills args.sums from `sums`, which it allocates: (row tiles, units), none where there are no elements.
void run_sums(NeuronSumsArgs& args, std::vector<double>& sums, int threads) {
  if (args.layout.numel == 0) return;
  args.rows = args.layout.numel / (args.units.count * args.units.inner);
  args.tiles = tiles_of(args.units, args.rows);
  sums.resize(static_cast<std::size_t>(args.tiles.row_tiles * args.units.count));
  args.sums = sums.data();
  const std::int64_t elements = args.tiles.units * args.units.inner * std::min(args.tiles.rows, args.rows);
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(args.tiles.row_tiles * args.tiles.unit_tiles, ceil_div(kGrain, elements), threads,
               [&](std::int64_t first, std::int64_t last) { kernels.neuron_sums(args, first, last); });
}

NeuronLogitsGradArgs logits_grad_args(const Operand& dlogits, const Operand& logits, double temperature, double dl0,
                                      double scale, bool add) {
  NeuronLogitsGradArgs args{};
  args.units = logits.numel;
  args.logits = reinterpret_cast<const float*>(logits.data);
  args.logits_stride = logits.strides[0];
  args.dlogits_stride = dlogits.strides[0];
  args.add = add;
  args.temperature = static_cast<float>(temperature);
  args.scale = static_cast<float>(scale);
  args.dl0 = dl0;
  return args;
}

void run_logits_grad(NeuronLogitsGradArgs& args, const std::vector<double>& sums, int threads) {
  if (args.units == 0) return;
  args.sums = sums.data();
  args.parts = static_cast<std::int64_t>(sums.size()) / args.units;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(args.units, ceil_div(kGrain, args.parts + 1), threads,
               [&](std::int64_t first, std::int64_t last) { kernels.neuron_logits_grad(args, first, last); });
}

void scale_neurons(const InArray& z, const InArray& mask_logits, double temperature, const std::optional<InArray>& bias,
                   bool hard, double scale, std::int64_t dim, const OutArray& out, int threads,
                   std::optional<bool> stream) {
  const Operand source = operand("z", z);
  const Operand logits = operand("mask_logits", mask_logits);
  const Operand o = operand("out", out);
  ScaleNeuronsArgs args{};
  args.z_dtype = float_dtype(source);
  args.out_dtype = float_dtype(o);
  check_float32(logits);
  check_threads(threads);
  check_writable(o);
  check_dim(source, dim);
  check_per_unit(logits, source, dim);
  args.layout = layout_of({o, source});
  if (bias) {
    const Operand b = operand("bias", *bias);
    check_per_unit(b, source, dim);
    args.bias = unit_values(b, float_dtype(b));
    check_apart(o, b);
  }
  if (args.layout.numel == 0) return;
  check_apart(o, source);
  check_apart(o, logits);
  args.units = units_of(o, dim);
  args.out = out.data();
  args.z = z.data();
  args.hard = hard;
  args.scale = static_cast<float>(scale);
  args.stream = stream.value_or(streams(o.numel * o.itemsize));

  const nb::gil_scoped_release without_gil;
  const std::vector<float> masks = hard ? std::vector<float>() : masks_of(logits, temperature, scale);
  args.masks = hard ? unit_values(logits, Dtype::float32) : UnitValues{masks.data(), Dtype::float32, 1};
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(args.layout.numel), kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.scale_neurons(args, first, last); });
}

void scale_neurons_grad(const InArray& dout, const InArray& z, const InArray& mask_logits, double temperature,
                        double dl0, double scale, std::int64_t dim, const OutArray& dz, const OutArray& dlogits,
                        int threads, std::optional<bool> stream) {
  const Operand d = operand("dout", dout);
  const Operand source = operand("z", z);
  const Operand logits = operand("mask_logits", mask_logits);
  const Operand o = operand("dz", dz);
  const Operand grad = operand("dlogits", dlogits);
  NeuronSumsArgs args{};
  args.dout_dtype = float_dtype(d);
  args.z_dtype = float_dtype(source);
  args.dz_dtype = float_dtype(o);
  check_float32(logits);
  check_float32(grad);
  check_threads(threads);
  check_writable(o);
  check_writable(grad);
  check_dim(source, dim);
  check_per_unit(logits, source, dim);
  check_per_unit(grad, source, dim);
  args.layout = layout_of({o, source, d});
  for (const Operand& out : {o, grad}) {
    for (const Operand& in : {source, d, logits}) check_apart(out, in);
  }
  check_apart(o, grad);
  args.units = units_of(o, dim);
  args.dz = dz.data();
  args.z = z.data();
  args.dout = dout.data();
  args.stream = stream.value_or(streams(o.numel * o.itemsize));
  NeuronLogitsGradArgs last = logits_grad_args(grad, logits, temperature, dl0, scale, false);
  last.dlogits = static_cast<float*>(dlogits.data());

  const nb::gil_scoped_release without_gil;
  const std::vector<float> masks = masks_of(logits, temperature, scale);
  args.masks = {masks.data(), Dtype::float32, 1};
  std::vector<double> sums;
  run_sums(args, sums, threads);
  run_logits_grad(last, sums, threads);
}

void logits_grad_units(const OutArray& dlogits, const InArray& dmasked_weight, const InArray& weight,
                       const InArray& mask_logits, std::int64_t dim, double temperature, double dl0, double scale,
                       bool add, int threads) {
  const Operand grad = operand("dlogits", dlogits);
  const Operand dwm = operand("dmasked_weight", dmasked_weight);
  const Operand w = operand("weight", weight);
  const Operand logits = operand("mask_logits", mask_logits);
  NeuronSumsArgs args{};
  args.z_dtype = float_dtype(w);
  args.dout_dtype = float_dtype(dwm);
  check_float32(logits);
  check_float32(grad);
  check_threads(threads);
  check_writable(grad);
  check_dim(w, dim);
  check_per_unit(logits, w, dim);
  check_per_unit(grad, w, dim);
  args.layout = layout_of({w, w, dwm});
  for (const Operand& in : {w, dwm, logits}) check_apart(grad, in);
  args.units = units_of(w, dim);
  args.z = weight.data();
  args.dout = dmasked_weight.data();
  NeuronLogitsGradArgs last = logits_grad_args(grad, logits, temperature, dl0, scale, add);
  last.dlogits = static_cast<float*>(dlogits.data());

  const nb::gil_scoped_release without_gil;
  std::vector<double> sums;
  run_sums(args, sums, threads);
  run_logits_grad(last, sums, threads);
}

}  // namespace

void bind_neurons(nb::module_& module) {
  module.def("scale_neurons", &scale_neurons, "z"_a.noconvert(), "mask_logits"_a.noconvert(), "temperature"_a,
             "bias"_a.noconvert().none(), "hard"_a, "scale"_a, "dim"_a, "out"_a.noconvert(), "threads"_a,
             "stream"_a = nb::none(),
             R"(Writes out = round(z * m[u] + bias[u]) along dimension `dim`, with m as in materialize.

A hard mask selects: an infinite or NaN z of a pruned unit gives +0, and then its bias. Rounded once; results depend
neither on threads nor on strides.

z, out: one shape, any rank >= 1 and strides; float32, bfloat16 or float16. bias: (units,) of such a dtype, or None.
mask_logits: (units,), float32. dim: >= 0. threads, stream: as in materialize.
Raises TypeError for a wrong dtype or device; ValueError for shapes that do not match, a dimension that does not exist,
or an out that overlaps itself or an argument.)");
  module.def("scale_neurons_grad", &scale_neurons_grad, "dout"_a.noconvert(), "z"_a.noconvert(),
             "mask_logits"_a.noconvert(), "temperature"_a, "dl0"_a, "scale"_a, "dim"_a, "dz"_a.noconvert(),
             "dlogits"_a.noconvert(), "threads"_a, "stream"_a = nb::none(),
             R"(The gradients of scale_neurons with a soft mask, in one pass: dz = round(dout * m[u]) and
dlogits[u] = (sum over u of dout * z + dl0) * dm/dS.

Arrays as in scale_neurons: dz, z and dout of one shape, dlogits as mask_logits. dl0: the gradient of l0, times the
weights that one logit decides about. Products are rounded to fp32 and added in double, in an order that depends on
shapes and on dz's strides only.)");
  module.def("logits_grad_units", &logits_grad_units, "dlogits"_a.noconvert(), "dmasked_weight"_a.noconvert(),
             "weight"_a.noconvert(), "mask_logits"_a.noconvert(), "dim"_a, "temperature"_a, "dl0"_a, "scale"_a, "add"_a,
             "threads"_a,
             R"(dlogits[u] (+)= (sum of dmasked_weight * weight over index u of dimension `dim` + dl0) * dm/dS.

weight, dmasked_weight: one shape, any strides and float dtypes. The rest as in scale_neurons_grad. `add`: to what
dlogits holds.)");
}

}  // namespace csmask
