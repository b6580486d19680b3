// scale_neurons: out = round(z * m[u] + b[u]), u the unit that an element belongs to; and its gradients, dz =
// round(dout
// * m[u]) with the sums of dout * z over each unit, which become dS[u] = (sum + dl0) * dm/dS.
//
// Bytes moved per element in bf16: 2 (z) + 2 (out); backward 2 (dout) + 2 (z) + 2 (dz), in one pass. The sums alone are
// the gradient of logits that a unit's weights share: dout is then the masked weight's gradient, and z the weight.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"
#include "mask.h"
#include "ops.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

// Sums run in so many interleaved lanes, a multiple of every vector length: one order for all instruction sets.
// Products are rounded to fp32 and added in double.
constexpr int kLanes = 16;
// Elements worked on at a time: all that a pass needs of them stays in the L1 cache.
constexpr int64_t kPiece = 512;
static_assert(kBlock % kPiece == 0, "a block is a whole number of pieces");

// Calls body(unit, done, count) for the elements of a block that belong together: `count` elements of one unit or,
// where inner is 1, one element each of units unit, unit + 1, ...
template <typename Body>
void for_units(const Units& units, int64_t begin, int64_t count, const Body& body) {
  int64_t unit = begin / units.inner % units.count;
  int64_t left = units.inner - begin % units.inner;
  for (int64_t done = 0; done < count;) {
    if (units.inner == 1) left = units.count - unit;
    const int64_t n = left < count - done ? left : count - done;
    body(unit, done, n);
    done += n;
    left = units.inner;
    unit += units.inner == 1 ? n : 1;
    if (unit == units.count) unit = 0;
  }
}

// One value per unit as one per element of a piece: in `buffer` or, where they lie as needed already, where they are.
const float* spread(const Units& units, const UnitValues& values, int64_t begin, int64_t count, float* buffer) {
  const int64_t stride = units.inner == 1 ? values.stride : 0;
  const float* found = buffer;
  for_units(units, begin, count, [&](int64_t unit, int64_t done, int64_t n) {
    const void* run = at(values.data, values.dtype, unit * values.stride);
    if (n == count) {
      found = load(run, values.dtype, stride, n, buffer);
    } else {
      load_into(run, values.dtype, stride, n, buffer + done);
    }
  });
  return found;
}

void multiply(const float* __restrict z, const float* __restrict masks, int64_t n, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = z[i] * masks[i];
}

// A select and not a product, so that an infinite or NaN element of a pruned unit gives +0.
void select(const float* __restrict z, const float* __restrict logits, float scale, int64_t n,
            float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t kept = logits[i] > 0.0f ? 0xffffffffu : 0u;
    values[i] = float_from_bits(float_bits(z[i] * scale) & kept);
  }
}

void add(const float* __restrict terms, int64_t n, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] += terms[i];
}

double dot(const float* a, const float* b, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(a[i + lane] * b[i + lane]);
  }
  for (int lane = 0; i + lane < count; ++lane) lanes[lane] += static_cast<double>(a[i + lane] * b[i + lane]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

void add_products(const float* __restrict a, const float* __restrict b, int64_t n, double* __restrict sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(a[i] * b[i]);
}

struct Buffers {
  alignas(64) float z[kPiece];
  alignas(64) float dout[kPiece];
  alignas(64) float masks[kPiece];
  alignas(64) float values[kPiece];
};

// dz, and sums[u - first_unit] += dout * z, over elements begin <= i < end.
void grad_range(const NeuronSumsArgs& args, int64_t begin, int64_t end, int64_t first_unit, double* sums,
                Buffers& buffers) {
  for (; begin < end; begin += kPiece) {
    const int64_t stop = end - begin < kPiece ? end : begin + kPiece;
    const int64_t count = stop - begin;
    const float* z = gather(args.layout, 1, args.z, args.z_dtype, begin, stop, buffers.z);
    const float* dout = gather(args.layout, 2, args.dout, args.dout_dtype, begin, stop, buffers.dout);
    if (args.dz != nullptr) {
      multiply(dout, spread(args.units, args.masks, begin, count, buffers.masks), count, buffers.values);
      scatter(args.layout, args.dz, args.dz_dtype, begin, stop, buffers.values, args.stream);
    }
    for_units(args.units, begin, count, [&](int64_t unit, int64_t done, int64_t n) {
      if (args.units.inner == 1) {
        add_products(dout + done, z + done, n, sums + (unit - first_unit));
      } else {
        sums[unit - first_unit] += dot(dout + done, z + done, n);
      }
    });
  }
}

}  // namespace

void unit_masks(const float* logits, int64_t stride, int64_t count, float temperature, float scale, float* masks) {
  load_into(logits, Dtype::float32, stride, count, masks);
  for (int64_t i = 0; i < count; ++i) masks[i] = scale * sigmoid(temperature * masks[i]);
}

void scale_neurons(const ScaleNeuronsArgs& args, int64_t first, int64_t last) {
  Buffers buffers;
  const int64_t end = last * kBlock < args.layout.numel ? last * kBlock : args.layout.numel;
  for (int64_t begin = first * kBlock; begin < end; begin += kPiece) {
    const int64_t stop = end - begin < kPiece ? end : begin + kPiece;
    const int64_t count = stop - begin;
    const float* z = gather(args.layout, 1, args.z, args.z_dtype, begin, stop, buffers.z);
    const float* masks = spread(args.units, args.masks, begin, count, buffers.masks);
    if (args.hard) {
      select(z, masks, args.scale, count, buffers.values);
    } else {
      multiply(z, masks, count, buffers.values);
    }
    if (args.bias.data != nullptr) {
      add(spread(args.units, args.bias, begin, count, buffers.masks), count, buffers.values);
    }
    scatter(args.layout, args.out, args.out_dtype, begin, stop, buffers.values, args.stream);
  }
  end_streaming(args.stream);
}

void neuron_sums(const NeuronSumsArgs& args, int64_t first, int64_t last) {
  Buffers buffers;
  const NeuronTiles& tiles = args.tiles;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t row_tile = tile / tiles.unit_tiles;
    const int64_t unit = tile % tiles.unit_tiles * tiles.units;
    const int64_t row = row_tile * tiles.rows;
    const int64_t row_end = args.rows - row < tiles.rows ? args.rows : row + tiles.rows;
    const int64_t units = args.units.count - unit < tiles.units ? args.units.count - unit : tiles.units;
    const int64_t length = units * args.units.inner;
    const int64_t row_length = args.units.count * args.units.inner;
    double* sums = args.sums + row_tile * args.units.count + unit;
    if (length == row_length) {  // whole rows: one range, cut into whole blocks however short a row is
      grad_range(args, row * row_length, row_end * row_length, 0, sums, buffers);
    } else {
      for (int64_t r = row; r < row_end; ++r) {
        const int64_t begin = r * row_length + unit * args.units.inner;
        grad_range(args, begin, begin + length, unit, sums, buffers);
      }
    }
  }
  end_streaming(args.stream);
}

void neuron_logits_grad(const NeuronLogitsGradArgs& args, int64_t first, int64_t last) {
  constexpr int64_t kUnits = 256;
  double sums[kUnits];
  for (int64_t begin = first; begin < last; begin += kUnits) {
    const int64_t count = last - begin < kUnits ? last - begin : kUnits;
    for (int64_t i = 0; i < count; ++i) sums[i] = args.dl0;
    for (int64_t part = 0; part < args.parts; ++part) {
      const double* terms = args.sums + part * args.units + begin;
      for (int64_t i = 0; i < count; ++i) sums[i] += terms[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const float logit = args.logits[(begin + i) * args.logits_stride];
      const float derivative = args.temperature * sigmoid_derivative(args.temperature * logit) * args.scale;
      float* dlogit = args.dlogits + (begin + i) * args.dlogits_stride;
      const float value = static_cast<float>(sums[i]) * derivative;
      *dlogit = args.add ? *dlogit + value : value;
    }
  }
}

}  // namespace CSMASK_ISA
}  // namespace csmask
