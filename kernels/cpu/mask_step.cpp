// mask_step: an optimizer's step on mask logits, from the masked weight's gradient to the next masked weight.
//
//   dS = (grad + (dWm * W + dl0) * scale * T * sigmoid'(T * S)) * factor
//   S, states = update(S, states, dS);  Wm = round(W * scale * sigmoid(T * S));  l0 = sum of that mask
//
// Bytes moved per weight in fp32 with AdamW: 8 (S) + 16 (states, 4.06 in 8 bits) + 4 (dWm) + 4 (W) + 4 (Wm, 8 where
// caches read it first); 30 where the three weights are bf16.
#include "convert.h"
#include "kernels.h"
#include "mask.h"
#include "mask_loops.h"
#include "ops.h"
#include "runs.h"
#include "state_codes.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

// Operands of the layout.
enum Operands { kLogits, kMaskedWeight, kWeight, kDmaskedWeight, kGrad, kFirst, kSecond, kOperands };

struct Buffers {
  alignas(64) float logits[kBlock];
  alignas(64) float weight[kBlock];
  alignas(64) float dmasked_weight[kBlock];
  alignas(64) float gradient[kBlock];
  alignas(64) float first[kBlock];
  alignas(64) float second[kBlock];
  alignas(64) uint32_t held[kBlock];  // by the logits, of states in 8 bits
};

// One run along the innermost dimension, where each operand lies.
struct Run {
  const MaskStepArgs& args;
  const int64_t* offsets;
  int64_t n;
  int64_t stride(int operand) const { return args.layout.stride[operand][args.layout.dims - 1]; }
};

const float* load_weight(const Run& run, float* buffer) {
  const MaskStepArgs& args = run.args;
  return load(at(args.weight, args.weight_dtype, run.offsets[kWeight]), args.weight_dtype, run.stride(kWeight), run.n,
              buffer);
}

// The gradient of the logits.
void gradient_of(const Run& run, const float* logits, const float* weight, Buffers& buffers) {
  const MaskStepArgs& args = run.args;
  float* values = buffers.gradient;
  if (args.dmasked_weight != nullptr || args.dl0 != 0.0f) {
    derivatives(logits, run.n, args.temperature, args.scale, values);
    if (args.dmasked_weight != nullptr) {
      const void* dwm = at(args.dmasked_weight, args.dmasked_weight_dtype, run.offsets[kDmaskedWeight]);
      chain(load(dwm, args.dmasked_weight_dtype, run.stride(kDmaskedWeight), run.n, buffers.dmasked_weight), weight,
            args.dl0, run.n, values);
    } else {
      for (int64_t i = 0; i < run.n; ++i) values[i] *= args.dl0;
    }
  } else {
    for (int64_t i = 0; i < run.n; ++i) values[i] = 0.0f;
  }
  if (args.grad != nullptr) {
    const float* grad =
        load(args.grad + run.offsets[kGrad], Dtype::float32, run.stride(kGrad), run.n, buffers.dmasked_weight);
    for (int64_t i = 0; i < run.n; ++i) values[i] += grad[i];
  }
  for (int64_t i = 0; i < run.n; ++i) values[i] *= args.factor;
}

void average(const AdamW& a, const float* __restrict gradient, int64_t n, float* __restrict average,
             float* __restrict square) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradient[i];
    average[i] = multiply_add(a.taken1, g - average[i], average[i]);
    square[i] = multiply_add(a.beta2, square[i], a.taken2 * g * g);
  }
}

void move(const AdamW& a, const float* __restrict average, const float* __restrict square, int64_t n,
          float* __restrict logits) {
  for (int64_t i = 0; i < n; ++i) {
    const float denominator = __builtin_sqrtf(square[i]) * a.inverse_root_correction2 + a.eps;
    logits[i] = logits[i] * a.decay - a.step_size * average[i] / denominator;
  }
}

void adamw(const AdamW& a, const float* __restrict gradient, int64_t n, float* __restrict logits,
           float* __restrict average, float* __restrict square) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradient[i];
    average[i] = multiply_add(a.taken1, g - average[i], average[i]);
    square[i] = multiply_add(a.beta2, square[i], a.taken2 * g * g);
    const float denominator = __builtin_sqrtf(square[i]) * a.inverse_root_correction2 + a.eps;
    logits[i] = logits[i] * a.decay - a.step_size * average[i] / denominator;
  }
}

void sgd(const Sgd& s, const float* __restrict gradient, int64_t n, float* __restrict logits,
         float* __restrict momentum) {
  for (int64_t i = 0; i < n; ++i) {
    float g = multiply_add(s.weight_decay, logits[i], gradient[i]);
    if (momentum != nullptr) {
      momentum[i] = multiply_add(s.kept_momentum, momentum[i], s.taken * g);
      g = s.nesterov ? multiply_add(s.momentum, momentum[i], g) : momentum[i];
    }
    logits[i] = multiply_add(-s.lr, g, logits[i]);
  }
}

// Where fp32 values can be changed where they lie; else in the buffer, which `put` writes back.
float* take(float* data, const Run& run, int operand, float* buffer) {
  float* where = data + run.offsets[operand];
  if (run.stride(operand) == 1) return where;
  load(where, Dtype::float32, run.stride(operand), run.n, buffer);
  return buffer;
}

void put(float* data, const Run& run, int operand, const float* values) {
  float* where = data + run.offsets[operand];
  if (values != where) store(values, run.n, where, Dtype::float32, run.stride(operand), false);
}

// Writes what follows from the new logits: themselves, their masks, counts and masked weight.
void finish(const Run& run, const float* logits, const float* weight, float* masks, Buffers& buffers,
            MaskPartial* partial) {
  const MaskStepArgs& args = run.args;
  put(args.logits, run, kLogits, logits);
  const Mask mask = {args.temperature, args.scale, false};
  masks_of(logits, run.n, mask, masks);
  count(logits, run.n, args.temperature, partial);
  if (args.masked_weight == nullptr) return;
  void* out = at(args.masked_weight, args.masked_weight_dtype, run.offsets[kMaskedWeight]);
  for (int64_t i = 0; i < run.n; ++i) buffers.gradient[i] = weight[i] * masks[i];
  store(buffers.gradient, run.n, out, args.masked_weight_dtype, run.stride(kMaskedWeight), args.stream);
}

void step_run(const Run& run, float* masks, Buffers& buffers, MaskPartial* partial) {
  const MaskStepArgs& args = run.args;
  float* logits = take(args.logits, run, kLogits, buffers.logits);
  const float* weight = load_weight(run, buffers.weight);
  gradient_of(run, logits, weight, buffers);
  float* first = args.first == nullptr ? nullptr : take(args.first, run, kFirst, buffers.first);
  if (args.second != nullptr) {
    float* second = take(args.second, run, kSecond, buffers.second);
    adamw(args.adamw, buffers.gradient, run.n, logits, first, second);
    put(args.second, run, kSecond, second);
  } else {
    sgd(args.sgd, buffers.gradient, run.n, logits, first);
  }
  if (first != nullptr) put(args.first, run, kFirst, first);
  finish(run, logits, weight, masks, buffers, partial);
}

// A block whose states are codes: all of its states are there before one is coded, and all codes before a logit moves.
void step_codes(const MaskStepArgs& args, int64_t begin, int64_t end, float* masks, Buffers& buffers,
                MaskPartial* partial) {
  // Until the logits move, those of the whole block lie where their masks will.
  for_runs(args.layout, kOperands, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
    const Run run = {args, offsets, n};
    const float* logits = take(args.logits, run, kLogits, buffers.logits);
    for (int64_t i = 0; i < n; ++i) masks[done + i] = logits[i];
  });
  decode_states(args.codes, begin, end - begin, masks, buffers.first, buffers.second);
  for_runs(args.layout, kOperands, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
    const Run run = {args, offsets, n};
    gradient_of(run, masks + done, load_weight(run, buffers.weight), buffers);
    average(args.adamw, buffers.gradient, n, buffers.first + done, buffers.second + done);
  });
  encode_states(args.codes, begin, end - begin, buffers.first, buffers.second, buffers.held);
  for_runs(args.layout, kOperands, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
    const Run run = {args, offsets, n};
    float* logits = take(args.logits, run, kLogits, buffers.logits);
    move(args.adamw, buffers.first + done, buffers.second + done, n, logits);
    put_quarters(buffers.held + done, n, logits);
    finish(run, logits, load_weight(run, buffers.weight), masks + done, buffers, partial);
  });
}

}  // namespace

void mask_step(const MaskStepArgs& args, int64_t first, int64_t last, MaskPartial* partials) {
  Buffers buffers;
  alignas(64) float masks[kBlock];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = block_end(args.layout, block);
    MaskPartial partial = {0.0, 0, 0};
    if (args.codes.averages != nullptr) {
      step_codes(args, begin, end, masks, buffers, &partial);
    } else {
      for_runs(args.layout, kOperands, begin, end, [&](const int64_t* offsets, int64_t done, int64_t n) {
        step_run({args, offsets, n}, masks + done, buffers, &partial);
      });
    }
    partial.sum = sum(masks, end - begin);
    partials[block] = partial;
  }
  end_streaming(args.stream);
}

void mask_grad_squares(const MaskStepArgs& args, int64_t first, int64_t last, double* partials) {
  Buffers buffers;
  for (int64_t block = first; block < last; ++block) {
    double total = 0.0;
    for_runs(args.layout, kOperands, block * kBlock, block_end(args.layout, block),
             [&](const int64_t* offsets, int64_t, int64_t n) {
               const Run run = {args, offsets, n};
               const float* logits =
                   load(args.logits + offsets[kLogits], Dtype::float32, run.stride(kLogits), n, buffers.logits);
               gradient_of(run, logits, load_weight(run, buffers.weight), buffers);
               for (int64_t i = 0; i < n; ++i) buffers.gradient[i] *= buffers.gradient[i];
               total += sum(buffers.gradient, n);
             });
    partials[block] = total;
  }
}

}  // namespace CSMASK_ISA
}  // namespace csmask
