// What the bindings of all ops need: arrays as they come from Python, their checks, and their common layout.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels.h"

namespace csmask {

// No dtype and no layout in the types: nanobind would convert, that is copy, an argument that does not match, and an
// output written through a copy is lost. The checks below refuse it instead, by name.
using InArray = nanobind::ndarray<nanobind::ro, nanobind::device::cpu>;
using OutArray = nanobind::ndarray<nanobind::device::cpu>;

// An array without the type that says whether it may be written to.
struct Operand {
  const char* name;
  const char* data;
  nanobind::dlpack::dtype dtype;
  std::size_t dims;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::int64_t numel;
  std::int64_t itemsize;
};

template <typename Array>
Operand operand(const char* name, const Array& array) {
  return {name,
          static_cast<const char*>(array.data()),
          array.dtype(),
          array.ndim(),
          array.shape_ptr(),
          array.stride_ptr(),
          static_cast<std::int64_t>(array.size()),
          static_cast<std::int64_t>(array.itemsize())};
}

[[noreturn]] void fail_value(const std::string& message);
[[noreturn]] void fail_type(const std::string& message);

// float32, bfloat16 or float16, else TypeError.
Dtype float_dtype(const Operand& operand);
// TypeError unless the dtype is float32.
void check_float32(const Operand& operand);
// TypeError unless the dtype is the integer of so many bits.
void check_integer(const Operand& operand, int bits, bool is_signed);
// ValueError unless contiguous.
void check_contiguous(const Operand& operand);
void check_numel(const Operand& operand, std::int64_t expected);
// ValueError unless `threads` >= 1.
void check_threads(int threads);
// ValueError where the two share memory: the bytes between the first and the last element of each overlap.
void check_apart(const Operand& out, const Operand& in);
// ValueError where two indices of the output lie at one address.
void check_writable(const Operand& out);

// The layout of operands of one shape, dimensions in the order of the first one's strides and merged where they can be.
// ValueError where shapes differ.
Layout layout_of(std::initializer_list<Operand> operands);

// Whether a result of so many bytes is to be written past the caches: they would not hold it anyway.
bool streams(std::int64_t bytes);

inline std::int64_t block_count(std::int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// One thread per so many blocks (16,384 elements: about 5 us of work), more than waking one takes.
constexpr std::int64_t kBlocksPerThread = 8;

void bind_masks(nanobind::module_& module);
void bind_step(nanobind::module_& module);
void bind_neurons(nanobind::module_& module);
void bind_bitmask(nanobind::module_& module);
void bind_philox(nanobind::module_& module);

}  // namespace csmask
