// What the bindings and the kernels share: plain data only, and the table of one instruction set's kernels.
//
// Kernel sources are compiled once per instruction set, each time into the namespace csmask::CSMASK_ISA. They share no
// inline function or template of the C++ standard library: the linker would keep one copy of it, in whichever
// instruction set it met first.
#pragma once

#include <stdint.h>

namespace csmask {

enum class Dtype { float32, bfloat16, float16 };

constexpr int kMaxDims = 64;  // as in PyTorch
constexpr int kMaxOperands = 4;

// Elements per block: the unit of work and of partial sums. A fixed number, so that neither the partials nor the order
// of their sum depends on how many threads there are. Three buffers of 2048 floats stay in the L1 cache.
constexpr int64_t kBlock = 2048;

// How the elements of several operands of one shape are walked: dimensions outermost first, strides in elements.
struct Layout {
  int dims;
  int64_t numel;
  int64_t shape[kMaxDims];
  int64_t stride[kMaxOperands][kMaxDims];
};

// m = scale * sigmoid(temperature * S), or where hard scale * (S > 0).
struct Mask {
  float temperature;
  float scale;
  bool hard;
};

struct MaskPartial {
  double sum;         // of m
  int64_t kept;       // S > 0
  int64_t undecided;  // |temperature * S| < 4
};

struct MaterializeArgs {
  Layout layout;  // operands: out, weight, logits; or logits alone
  void* out;      // null where only the sums are wanted
  Dtype out_dtype;
  const void* weight;
  Dtype weight_dtype;
  const float* logits;
  Mask mask;
  bool counts;
  bool stream;  // write past the caches
};

struct LogitsGradArgs {
  Layout layout;  // operands: dlogits, logits, weight, dmasked_weight
  float* dlogits;
  bool add;  // to what dlogits holds
  const float* logits;
  const void* weight;  // null, as dmasked_weight, where only l0 has a gradient
  Dtype weight_dtype;
  const void* dmasked_weight;
  Dtype dmasked_weight_dtype;
  float temperature;
  float scale;
  float dl0;
  bool stream;
};

// The kernels of one instruction set. Each does blocks first <= b < last of its operands' elements.
struct Kernels {
  // out = round(weight * m), partials[b] = sums of the mask
  void (*materialize)(const MaterializeArgs& args, int64_t first, int64_t last, MaskPartial* partials);
  // dlogits (+)= (dmasked_weight * weight + dl0) * dm/dS
  void (*logits_grad)(const LogitsGradArgs& args, int64_t first, int64_t last);
};

}  // namespace csmask
