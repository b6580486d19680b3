// Binding of philox_.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <optional>
#include <string>

#include "arrays.h"
#include "isa.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace csmask {
namespace {

PhiloxKind kind_of(const std::string& kind) {
  if (kind == "words") return PhiloxKind::words;
  if (kind == "uniform") return PhiloxKind::uniform;
  if (kind == "normal") return PhiloxKind::normal;
  fail_value("kind must be 'words', 'uniform' or 'normal', got '" + kind + "'");
}

std::uint32_t word(const char* name, std::int64_t value) {
  if (value >= 0 && value <= std::int64_t{0xffffffff}) return static_cast<std::uint32_t>(value);
  fail_value(std::string(name) + " must be in [0, 2**32), got " + std::to_string(value));
}

void philox_(const OutArray& out, const std::string& kind, std::int64_t seed_lo, std::int64_t seed_hi,
             std::int64_t stream, std::int64_t purpose, double scale, int threads, std::uint64_t first_block,
             std::optional<bool> past_caches) {
  const Operand o = operand("out", out);
  PhiloxArgs args{};
  args.kind = kind_of(kind);
  args.seed_lo = word("seed_lo", seed_lo);
  args.seed_hi = word("seed_hi", seed_hi);
  args.stream_index = word("stream", stream);
  args.purpose = word("purpose", purpose);
  if (args.kind == PhiloxKind::words) {
    check_integer(o, 64, true);
  } else {
    args.dtype = float_dtype(o);
  }
  check_threads(threads);
  check_contiguous(o);
  args.out = out.data();
  args.count = o.numel;
  args.first_block = first_block;
  args.scale = static_cast<float>(scale);
  args.stream = past_caches.value_or(streams(o.numel * o.itemsize));

  const nb::gil_scoped_release without_gil;
  const Kernels& kernels = *instruction_set().kernels;
  parallel_for(block_count(args.count), kBlocksPerThread, threads,
               [&](std::int64_t first, std::int64_t last) { kernels.philox(args, first, last); });
}

}  // namespace

void bind_philox(nb::module_& module) {
  module.def("philox_", &philox_, "out"_a.noconvert(), "kind"_a, "seed_lo"_a, "seed_hi"_a, "stream"_a, "purpose"_a,
             "scale"_a, "threads"_a, "first_block"_a = 0, "past_caches"_a = nb::none(),
             R"(Fills out with draws of Philox4x32-10, bit for bit those of csmask.philox.

kind: "words" (out int64: element i is word i % 4 of block i // 4), "uniform" on (-scale, scale) or "normal" of standard
deviation scale (out float32, bfloat16 or float16; computed in fp32, rounded once).
seed_lo, seed_hi, stream, purpose: the 32-bit words of the key and of the counter's upper half.
first_block: the block that element 0 is drawn from. past_caches: as `stream` in materialize.
Raises TypeError for a wrong dtype or device; ValueError for an unknown kind, a number out of range, or a strided out.)");
}

}  // namespace csmask
