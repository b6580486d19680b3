// What the bindings and the kernels share: plain data only, and the table of one instruction set's kernels.
//
// Kernel sources are compiled once per instruction set, each time into the namespace csmask::CSMASK_ISA. They share no
// inline function or template of the C++ standard library: the linker would keep one copy of it, in whichever
// instruction set it met first.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace csmask {

enum class Dtype { float32, bfloat16, float16 };

constexpr int kMaxDims = 64;  // as in PyTorch
constexpr int kMaxOperands = 7;

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
  void* masked_weight;  // null, or where dmasked_weight lies: the soft masked weight takes its place
  float temperature;
  float scale;
  float dl0;
  bool stream;
};

// S = S * decay - step_size * average / (sqrt(square) * inverse_root_correction2 + eps)
struct AdamW {
  float taken1;  // 1 - beta1, rounded once
  float beta2;
  float taken2;
  float eps;
  float decay;                     // 1 - lr * weight_decay
  float step_size;                 // lr / (1 - beta1^t)
  float inverse_root_correction2;  // (1 - beta2^t)^-1/2
};

// g += weight_decay * S; buffer = kept_momentum * buffer + taken * g; S -= lr * (g or what momentum makes of it)
struct Sgd {
  float lr;
  float momentum;
  float kept_momentum;  // 0 in the first step
  float taken;          // 1 - dampening, 1 in the first step
  float weight_decay;
  bool nesterov;
};

// Elements that share a scale of states in 8 bits; kBlock is a multiple of it.
constexpr int64_t kStateBlock = 256;

// AdamW's states in 8 bits, in the order of the layout: see state_codes.h.
struct StateCodes {
  int8_t* averages;  // null where the states are fp32
  uint8_t* squares;
  float* scales;      // of the squares' blocks
  float unit_before;  // of the averages, as the last step left them
  float unit;         // as this one leaves them
  float residue;      // what the logits take of their rounding, over a step
  uint32_t step;
};

struct MaskStepArgs {
  Layout layout;  // operands: logits, masked_weight, weight, dmasked_weight, grad, first, second; logits for a null
  float* logits;
  void* masked_weight;  // null where it is not wanted
  Dtype masked_weight_dtype;
  const void* weight;
  Dtype weight_dtype;
  const void* dmasked_weight;  // null for zeros
  Dtype dmasked_weight_dtype;
  const float* grad;  // null for zeros
  float* first;       // AdamW's average; SGD's momentum, null for none
  float* second;      // AdamW's average of squares; null for SGD
  StateCodes codes;   // instead of both
  float temperature;
  float scale;
  float dl0;
  float factor;  // of the gradient: of clipping, negative to go up
  AdamW adamw;
  Sgd sgd;
  bool stream;
};

// Element i of a layout belongs to unit i / inner % count.
struct Units {
  int64_t count;
  int64_t inner;
};

// One value for each unit.
struct UnitValues {
  const void* data;  // null for none
  Dtype dtype;
  int64_t stride;
};

struct ScaleNeuronsArgs {
  Layout layout;  // operands: out, z
  Units units;
  void* out;
  Dtype out_dtype;
  const void* z;
  Dtype z_dtype;
  UnitValues masks;  // m or, where hard, the logits
  UnitValues bias;
  bool hard;
  float scale;  // of a hard mask
  bool stream;
};

// Rows are units * inner elements. A tile is `rows` of them by `units`: the unit of work and of partial sums.
struct NeuronTiles {
  int64_t rows;
  int64_t units;
  int64_t row_tiles;   // tiles one below the other
  int64_t unit_tiles;  // tiles side by side
};

struct NeuronSumsArgs {
  Layout layout;  // operands: dz (z where there is none), z, dout
  Units units;
  int64_t rows;
  NeuronTiles tiles;
  void* dz;  // null where only the sums are wanted
  Dtype dz_dtype;
  const void* z;
  Dtype z_dtype;
  const void* dout;
  Dtype dout_dtype;
  UnitValues masks;  // m
  double* sums;      // (row_tiles, units), zeros before
  bool stream;
};

struct NeuronLogitsGradArgs {
  const double* sums;  // (parts, units)
  int64_t parts;
  int64_t units;
  const float* logits;
  int64_t logits_stride;
  float* dlogits;
  int64_t dlogits_stride;
  bool add;  // to what dlogits holds
  float temperature;
  float scale;
  double dl0;  // times the weights of a unit
};

constexpr int kWordBits = 32;

struct BitWords {
  const uint32_t* words;
  int64_t stride;
};

struct PackMaskArgs {
  Layout layout;  // operands: the logical order, logits
  const void* logits;
  Dtype dtype;
  uint32_t* words;
};

struct UnpackMaskArgs {
  BitWords bits;
  uint8_t* kept;  // contiguous, 0 or 1
  int64_t count;
};

struct ApplyBitmaskArgs {
  Layout layout;  // operands: out, weight, index of the element's bit less `start`
  void* out;
  Dtype out_dtype;
  const void* weight;
  Dtype weight_dtype;
  BitWords bits;
  int64_t start;
  float scale;
  bool stream;
};

enum class PhiloxKind { words, uniform, normal };

struct PhiloxArgs {
  void* out;  // contiguous; int64 for words
  Dtype dtype;
  int64_t count;
  PhiloxKind kind;
  uint64_t first_block;  // the counter that element 0 is drawn from
  uint32_t seed_lo;
  uint32_t seed_hi;
  uint32_t stream_index;
  uint32_t purpose;
  float scale;
  bool stream;
};

// The kernels of one instruction set. Each does blocks first <= b < last of its operands' elements.
struct Kernels {
  // out = round(weight * m), partials[b] = sums of the mask
  void (*materialize)(const MaterializeArgs& args, int64_t first, int64_t last, MaskPartial* partials);
  // dlogits (+)= (dmasked_weight * weight + dl0) * dm/dS; if asked for, dmasked_weight = round(weight * m) afterwards
  void (*logits_grad)(const LogitsGradArgs& args, int64_t first, int64_t last);
  // an optimizer's step and the next masked weight, partials[b] = sums of its mask
  void (*mask_step)(const MaskStepArgs& args, int64_t first, int64_t last, MaskPartial* partials);
  // partials[b] = sum of squares of the gradient that mask_step would take
  void (*mask_grad_squares)(const MaskStepArgs& args, int64_t first, int64_t last, double* partials);
  // masks[u] = scale * sigmoid(temperature * logits[u])
  void (*unit_masks)(const float* logits, int64_t stride, int64_t count, float temperature, float scale, float* masks);
  // out = round(z * m[u] + bias[u])
  void (*scale_neurons)(const ScaleNeuronsArgs& args, int64_t first, int64_t last);
  // dz = round(dout * m[u]), sums = partial sums of dout * z over each unit, by tiles instead of blocks
  void (*neuron_sums)(const NeuronSumsArgs& args, int64_t first, int64_t last);
  // dlogits (+)= (sum of the partial sums + dl0) * dm/dS, by units instead of blocks
  void (*neuron_logits_grad)(const NeuronLogitsGradArgs& args, int64_t first, int64_t last);
  // words = S > 0, bit by bit
  void (*pack_mask)(const PackMaskArgs& args, int64_t first, int64_t last);
  // kept = the bits, a byte each
  void (*unpack_mask)(const UnpackMaskArgs& args, int64_t first, int64_t last);
  // how many bits are set, by words instead of blocks
  int64_t (*popcount)(const BitWords& bits, int64_t first, int64_t last);
  // out = round(weight * scale) where the bit is set, else 0
  void (*apply_bitmask)(const ApplyBitmaskArgs& args, int64_t first, int64_t last);
  // out = random draws
  void (*philox)(const PhiloxArgs& args, int64_t first, int64_t last);
};

}  // namespace csmask
