#include "arrays.h"

#include <algorithm>
#include <vector>

#include "memory.h"

namespace nb = nanobind;

namespace csmask {
namespace {

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

bool is_float(nb::dlpack::dtype dtype, int bits) {
  return dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && dtype.bits == bits &&
         dtype.lanes == 1;
}

bool is_bfloat16(nb::dlpack::dtype dtype) {
  return dtype.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16 &&
         dtype.lanes == 1;
}

std::string shape_name(const Operand& operand) {
  std::string text = "(";
  for (std::size_t i = 0; i < operand.dims; ++i) text += (i ? ", " : "") + std::to_string(operand.shape[i]);
  return text + ")";
}

// The bytes from an operand's first element in memory to the end of its last; strides may be negative.
std::pair<const char*, const char*> span(const Operand& operand) {
  std::int64_t first = 0;
  std::int64_t last = 0;
  for (std::size_t i = 0; operand.numel != 0 && i < operand.dims; ++i) {
    const std::int64_t steps = (operand.shape[i] - 1) * operand.strides[i];
    (steps < 0 ? first : last) += steps;
  }
  const std::int64_t end = operand.numel == 0 ? 0 : last + 1;
  return {operand.data + first * operand.itemsize, operand.data + end * operand.itemsize};
}

}  // namespace

void fail_value(const std::string& message) { throw nb::value_error(message.c_str()); }
void fail_type(const std::string& message) { throw nb::type_error(message.c_str()); }

Dtype float_dtype(const Operand& operand) {
  if (is_float(operand.dtype, 32)) return Dtype::float32;
  if (is_bfloat16(operand.dtype)) return Dtype::bfloat16;
  if (is_float(operand.dtype, 16)) return Dtype::float16;
  fail_type(std::string(operand.name) + " must be float32, bfloat16 or float16, got " + dtype_name(operand.dtype));
}

void check_float32(const Operand& operand) {
  if (is_float(operand.dtype, 32)) return;
  fail_type(std::string(operand.name) + " must be float32, got " + dtype_name(operand.dtype));
}

void check_integer(const Operand& operand, int bits, bool is_signed) {
  const auto code = is_signed ? nb::dlpack::dtype_code::Int : nb::dlpack::dtype_code::UInt;
  if (operand.dtype.code == static_cast<std::uint8_t>(code) && operand.dtype.bits == bits) return;
  fail_type(std::string(operand.name) + " must be " + (is_signed ? "int" : "uint") + std::to_string(bits) + ", got " +
            dtype_name(operand.dtype));
}

void check_contiguous(const Operand& operand) {
  std::int64_t expected = 1;
  for (std::size_t i = operand.dims; i-- > 0;) {
    if (operand.shape[i] == 0) return;
    if (operand.shape[i] != 1 && operand.strides[i] != expected) {
      fail_value(std::string(operand.name) + " must be contiguous, got stride " + std::to_string(operand.strides[i]) +
                 " where " + std::to_string(expected) + " was expected; call .contiguous() first");
    }
    expected *= operand.shape[i];
  }
}

void check_numel(const Operand& operand, std::int64_t expected) {
  if (operand.numel == expected) return;
  fail_value(std::string(operand.name) + " must have " + std::to_string(expected) + " elements, got " +
             std::to_string(operand.numel));
}

void check_threads(int threads) {
  if (threads < 1) fail_value("threads must be >= 1, got " + std::to_string(threads));
}

void check_apart(const Operand& out, const Operand& in) {
  const auto [out_begin, out_end] = span(out);
  const auto [in_begin, in_end] = span(in);
  if (out_begin < in_end && in_begin < out_end) {
    fail_value(std::string(out.name) + " must not share memory with " + in.name);
  }
}

void check_writable(const Operand& out) {
  // By rising stride, each dimension must step over all of the ones before it.
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::size_t i = 0; i < out.dims; ++i) {
    if (out.shape[i] != 1) dims.emplace_back(out.strides[i], out.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  std::int64_t reached = 0;
  for (const auto& [stride, size] : dims) {
    if (out.numel != 0 && stride <= reached) {
      fail_value(std::string(out.name) + " must have an address of its own for each element, got stride " +
                 std::to_string(stride) + " for a dimension of size " + std::to_string(size) +
                 "; call .contiguous() first");
    }
    reached += (size - 1) * stride;
  }
}

Layout layout_of(std::initializer_list<Operand> operands) {
  const Operand& key = *operands.begin();
  for (const Operand& other : operands) {
    if (other.dims != key.dims || !std::equal(key.shape, key.shape + key.dims, other.shape)) {
      fail_value(std::string(other.name) + " must have shape " + shape_name(key) + " like " + key.name + ", got " +
                 shape_name(other));
    }
  }
  if (key.dims > static_cast<std::size_t>(kMaxDims)) {
    fail_value(std::string(key.name) + " must have at most " + std::to_string(kMaxDims) + " dimensions, got " +
               std::to_string(key.dims));
  }
  std::vector<std::size_t> order;
  for (std::size_t i = 0; i < key.dims; ++i) {
    if (key.shape[i] != 1) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return key.strides[a] > key.strides[b]; });
  Layout layout{};
  layout.numel = key.numel;
  for (const std::size_t dim : order) {
    const int last = layout.dims - 1;
    bool merges = layout.dims > 0;
    int k = 0;
    for (const Operand& one : operands) {
      merges = merges && layout.stride[k++][last] == one.strides[dim] * one.shape[dim];
    }
    const int target = merges ? last : layout.dims++;
    layout.shape[target] = (merges ? layout.shape[target] : 1) * key.shape[dim];
    k = 0;
    for (const Operand& one : operands) layout.stride[k++][target] = one.strides[dim];
  }
  if (layout.dims == 0) {  // one element
    layout.dims = 1;
    layout.shape[0] = 1;
    for (std::size_t k = 0; k < operands.size(); ++k) layout.stride[k][0] = 1;
  }
  return layout;
}

bool streams(std::int64_t bytes) { return bytes > last_level_cache() / 2; }

}  // namespace csmask
