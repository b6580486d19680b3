// Bindings of the bit-packed hard masks: pack_mask, unpack_mask, popcount, apply_bitmask.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <numeric>
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

std::int64_t words_of(std::int64_t bits) { return (bits + kWordBits - 1) / kWordBits; }

BitWords words_in(const Operand& bits) {
  check_integer(bits, 32, true);
  if (bits.dims != 1) {
    fail_value(std::string(bits.name) + " must have 1 dimension, got " + std::to_string(bits.dims));
  }
  return {reinterpret_cast<const std::uint32_t*>(bits.data), bits.strides[0]};
}

void check_bool(const Operand& array) {
  if (array.dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bool) && array.dtype.bits == 8) return;
  fail_type(std::string(array.name) + " must be bool, got dtype code " + std::to_string(array.dtype.code) + " of " +
            std::to_string(array.dtype.bits) + " bits");
}

// An operand that is not in memory: its offsets are numbers of another kind.
Operand index_operand(const Operand& like, const std::vector<std::int64_t>& steps) {
  Operand index = like;
  index.name = "index";
  index.strides = steps.data();
  return index;
}

// Of an array whose rows are all dimensions but the last, in row-major order.
std::vector<std::int64_t> steps_of(const Operand& array, std::int64_t row_step, std::int64_t col_step) {
  std::vector<std::int64_t> steps(array.dims);
  std::int64_t rows = 1;
  for (std::size_t i = array.dims; i-- > 0;) {
    const bool is_last = i + 1 == array.dims;
    steps[i] = is_last ? col_step : row_step * rows;
    if (!is_last) rows *= array.shape[i];
  }
  return steps;
}

void pack_mask(const InArray& mask_logits, const OutArray& bits, int threads) {
  const Operand logits = operand("mask_logits", mask_logits);
  const Operand packed = operand("bits", bits);
  PackMaskArgs args{};
  args.dtype = float_dtype(logits);
  words_in(packed);
  check_threads(threads);
  check_numel(packed, words_of(logits.numel));
  check_contiguous(packed);
  if (logits.numel == 0) return;
  check_apart(packed, logits);
  const std::vector<std::int64_t> steps = steps_of(logits, logits.dims ? logits.shape[logits.dims - 1] : 1, 1);
  args.layout = layout_of({index_operand(logits, steps), logits});
  args.logits = mask_logits.data();
  args.words = static_cast<std::uint32_t*>(bits.data());

  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(logits.numel), kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.pack_mask(args, first, last); });
}

void unpack_mask(const InArray& bits, const OutArray& out, int threads) {
  const Operand packed = operand("bits", bits);
  const Operand kept = operand("out", out);
  UnpackMaskArgs args{};
  args.bits = words_in(packed);
  check_bool(kept);
  check_threads(threads);
  check_numel(packed, words_of(kept.numel));
  check_contiguous(kept);
  if (kept.numel == 0) return;
  check_apart(kept, packed);
  args.kept = static_cast<std::uint8_t*>(out.data());
  args.count = kept.numel;

  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(kept.numel), kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.unpack_mask(args, first, last); });
}

std::int64_t popcount(const InArray& bits, int threads) {
  const Operand packed = operand("bits", bits);
  const BitWords words = words_in(packed);
  check_threads(threads);
  std::vector<std::int64_t> counts(static_cast<std::size_t>(block_count(packed.numel)));

  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(packed.numel), kBlocksPerThread, threads, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t end = std::min((block + 1) * kBlock, packed.numel);
      counts[static_cast<std::size_t>(block)] = kernels.popcount(words, block * kBlock, end);
    }
  });
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

// ValueError unless every element's bit is there.
void check_bits(const Operand& packed, const Operand& weight, std::int64_t start, std::int64_t row_step,
                std::int64_t col_step) {
  const std::int64_t cols = weight.dims ? weight.shape[weight.dims - 1] : 1;
  const std::int64_t row_span = (weight.numel / cols - 1) * row_step;
  const std::int64_t col_span = (cols - 1) * col_step;
  const std::int64_t lowest = start + std::min<std::int64_t>(0, row_span) + std::min<std::int64_t>(0, col_span);
  const std::int64_t highest = start + std::max<std::int64_t>(0, row_span) + std::max<std::int64_t>(0, col_span);
  if (lowest >= 0 && highest < packed.numel * kWordBits) return;
  fail_value("start, row_step and col_step must give bits among the " + std::to_string(packed.numel * kWordBits) +
             " of bits, got " + std::to_string(lowest) + " to " + std::to_string(highest));
}

void apply_bitmask(const InArray& weight, const InArray& bits, std::int64_t start, std::int64_t row_step,
                   std::int64_t col_step, double scale, const OutArray& out, int threads, std::optional<bool> stream) {
  const Operand w = operand("weight", weight);
  const Operand packed = operand("bits", bits);
  const Operand o = operand("out", out);
  ApplyBitmaskArgs args{};
  args.weight_dtype = float_dtype(w);
  args.out_dtype = float_dtype(o);
  args.bits = words_in(packed);
  check_threads(threads);
  check_writable(o);
  const std::vector<std::int64_t> steps = steps_of(w, row_step, col_step);
  args.layout = layout_of({o, w, index_operand(w, steps)});
  if (args.layout.numel == 0) return;
  check_bits(packed, w, start, row_step, col_step);
  check_apart(o, w);
  check_apart(o, packed);
  args.out = out.data();
  args.weight = weight.data();
  args.start = start;
  args.scale = static_cast<float>(scale);
  args.stream = stream.value_or(streams(o.numel * o.itemsize));

  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(args.layout.numel), kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.apply_bitmask(args, first, last); });
}

}  // namespace

void bind_bitmask(nb::module_& module) {
  module.def("pack_mask", &pack_mask, "mask_logits"_a.noconvert(), "bits"_a.noconvert(), "threads"_a,
             R"(Bit i % 32 of word i // 32 is S[i] > 0 (NaN is not), i counting row by row whatever the strides.

mask_logits: any shape and strides, float32, bfloat16 or float16. bits: int32, contiguous, (ceil(n / 32),); bits past the
last logit become 0.
Raises TypeError for a wrong dtype or device; ValueError for sizes that do not match or memory that is shared.)");
  module.def("unpack_mask", &unpack_mask, "bits"_a.noconvert(), "out"_a.noconvert(), "threads"_a,
             "out = the logits' hard mask that pack_mask packed; out is bool, contiguous, of the logits' shape.");
  module.def("popcount", &popcount, "bits"_a.noconvert(), "threads"_a, "How many bits of the words are set.");
  module.def("apply_bitmask", &apply_bitmask, "weight"_a.noconvert(), "bits"_a.noconvert(), "start"_a, "row_step"_a,
             "col_step"_a, "scale"_a, "out"_a.noconvert(), "threads"_a, "stream"_a = nb::none(),
             R"(Writes out = round(weight * scale) where the weight's bit is set, else +0: a select, as in materialize.

The bit of row i, column j is start + i * row_step + j * col_step. Columns are the last dimension, rows all others in
row-major order: for a whole weight, start 0, row_step its last size, col_step 1; for a block of a matrix, row_step the
matrix's row length; transposed, the two steps change places.

weight, out: one shape, any strides; float32, bfloat16 or float16. bits: int32 words, 1-d. threads, stream: as in
materialize.
Raises TypeError for a wrong dtype or device; ValueError for shapes that differ, bits that do not exist, or an out that
overlaps itself or an argument.)");
}

}  // namespace csmask
