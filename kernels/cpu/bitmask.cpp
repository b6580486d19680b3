// Hard masks in one bit per logit: bit i % 32 of word i // 32 is S[i] > 0, i counting row by row.
//
// Bytes moved per logit: pack_mask 4 + 1/8, unpack_mask 1/8 + 1, apply_bitmask in bf16 2 + 1/8 + 2.
#include "blocks.h"
#include "convert.h"
#include "kernels.h"
#include "mask.h"
#include "ops.h"
#include "runs.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

static_assert(kBlock % kWordBits == 0, "a block of logits is a whole number of words");

// The bits of floats. Named within a type, since a template's argument loses its attributes.
struct Bits32 {
  typedef uint32_t __attribute__((may_alias)) Storage;
};
struct Bits16 {
  typedef uint16_t __attribute__((may_alias)) Storage;
};

// 1 << i from memory: a shift by a different distance in each lane is more than SSE2 has.
constexpr uint32_t kBit[kWordBits] = {
    0x00000001u, 0x00000002u, 0x00000004u, 0x00000008u, 0x00000010u, 0x00000020u, 0x00000040u, 0x00000080u,
    0x00000100u, 0x00000200u, 0x00000400u, 0x00000800u, 0x00001000u, 0x00002000u, 0x00004000u, 0x00008000u,
    0x00010000u, 0x00020000u, 0x00040000u, 0x00080000u, 0x00100000u, 0x00200000u, 0x00400000u, 0x00800000u,
    0x01000000u, 0x02000000u, 0x04000000u, 0x08000000u, 0x10000000u, 0x20000000u, 0x40000000u, 0x80000000u,
};

// 32 bits from bit `index` on, of which the first `count` >= 1 are wanted: words after those are not read.
inline uint32_t bits_from(const BitWords& bits, int64_t index, int64_t count) {
  const int64_t word = index / kWordBits;
  const int shift = static_cast<int>(index % kWordBits);
  uint64_t pair = bits.words[word * bits.stride];
  if (shift + count > kWordBits) pair |= static_cast<uint64_t>(bits.words[(word + 1) * bits.stride]) << kWordBits;
  return static_cast<uint32_t>(pair >> shift);
}

// All ones where the bit is set, else zero, for bits index, index + step, ...; the buffer is a whole number of words.
void expand(const BitWords& bits, int64_t index, int64_t step, int64_t count, uint32_t* __restrict kept) {
  if (step == 1) {
    for (int64_t i = 0; i < count; i += kWordBits) {
      const uint32_t word = bits_from(bits, index + i, count - i);
      for (int j = 0; j < kWordBits; ++j) kept[i + j] = (word & kBit[j]) != 0 ? 0xffffffffu : 0u;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t bit = index + i * step;
      const uint32_t word = bits.words[bit / kWordBits * bits.stride];
      kept[i] = 0u - (word >> (bit % kWordBits) & 1u);
    }
  }
}

// For scale 1 where the dtype stays: no arithmetic at all, so that the weight keeps its bits.
template <typename Bits>
void select_bits(const void* weight, int64_t weight_stride, const uint32_t* __restrict kept, int64_t n, void* out,
                 int64_t out_stride) {
  using Storage = typename Bits::Storage;
  // Not `auto`: it would lose the attribute, too.
  const Storage* __restrict w = static_cast<const Storage*>(weight);
  Storage* __restrict o = static_cast<Storage*>(out);
  if (weight_stride == 1 && out_stride == 1) {
    for (int64_t i = 0; i < n; ++i) o[i] = static_cast<Storage>(w[i] & kept[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) o[i * out_stride] = static_cast<Storage>(w[i * weight_stride] & kept[i]);
  }
}

void select(const float* __restrict weight, const uint32_t* __restrict kept, float scale, int64_t n,
            float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = float_from_bits(float_bits(weight[i] * scale) & kept[i]);
}

struct Buffers {
  alignas(64) uint32_t kept[kBlock];
  alignas(64) float weight[kBlock];
  alignas(64) float values[kBlock];
};

void apply_run(const ApplyBitmaskArgs& args, const int64_t* offsets, int64_t n, Buffers& buffers) {
  const int inner = args.layout.dims - 1;
  const int64_t out_stride = args.layout.stride[0][inner];
  const int64_t weight_stride = args.layout.stride[1][inner];
  void* out = at(args.out, args.out_dtype, offsets[0]);
  const void* weight = at(args.weight, args.weight_dtype, offsets[1]);
  expand(args.bits, args.start + offsets[2], args.layout.stride[2][inner], n, buffers.kept);
  if (args.scale == 1.0f && args.weight_dtype == args.out_dtype) {
    const bool streams = args.stream && out_stride == 1;
    void* target = streams ? buffers.values : out;
    const int64_t target_stride = streams ? 1 : out_stride;
    if (args.out_dtype == Dtype::float32) {
      select_bits<Bits32>(weight, weight_stride, buffers.kept, n, target, target_stride);
    } else {
      select_bits<Bits16>(weight, weight_stride, buffers.kept, n, target, target_stride);
    }
    if (streams) stream_bytes(out, target, n * size_of(args.out_dtype));
    return;
  }
  const float* w = load(weight, args.weight_dtype, weight_stride, n, buffers.weight);
  select(w, buffers.kept, args.scale, n, buffers.values);
  store(buffers.values, n, out, args.out_dtype, out_stride, args.stream);
}

}  // namespace

void pack_mask(const PackMaskArgs& args, int64_t first, int64_t last) {
  alignas(64) float buffer[kBlock];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = block_end(args.layout, block);
    const float* logits = gather(args.layout, 1, args.logits, args.dtype, begin, end, buffer);
    uint32_t* words = args.words + begin / kWordBits;
    const int64_t whole = (end - begin) / kWordBits;
    for (int64_t i = 0; i < whole; ++i) {
      uint32_t word = 0;
      for (int j = 0; j < kWordBits; ++j) word |= logits[i * kWordBits + j] > 0.0f ? kBit[j] : 0u;
      words[i] = word;
    }
    const int64_t rest = (end - begin) % kWordBits;
    if (rest > 0) {
      uint32_t word = 0;
      for (int64_t j = 0; j < rest; ++j) word |= logits[whole * kWordBits + j] > 0.0f ? kBit[j] : 0u;
      words[whole] = word;
    }
  }
}

void unpack_mask(const UnpackMaskArgs& args, int64_t first, int64_t last) {
  const BitWords bits = args.bits;
  uint8_t* __restrict kept = args.kept;
  const int64_t end = last * kBlock < args.count ? last * kBlock : args.count;
  for (int64_t begin = first * kBlock; begin < end; begin += kWordBits) {
    const uint32_t word = bits.words[begin / kWordBits * bits.stride];
    if (end - begin >= kWordBits) {
      for (int j = 0; j < kWordBits; ++j) kept[begin + j] = (word & kBit[j]) != 0 ? 1 : 0;
    } else {
      for (int64_t j = 0; j < end - begin; ++j) kept[begin + j] = (word & kBit[j]) != 0 ? 1 : 0;
    }
  }
}

// Adds neighbouring bits, pairs, nibbles in place, as vectors do too; the product adds up the four bytes.
int64_t popcount(const BitWords& bits, int64_t first, int64_t last) {
  int64_t total = 0;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = last - begin < kBlock ? last - begin : kBlock;
    const uint32_t* words = bits.words + begin * bits.stride;
    uint32_t sum = 0;  // of at most 32 * kBlock
    for (int64_t i = 0; i < count; ++i) {
      uint32_t word = words[i * bits.stride];
      word -= word >> 1 & 0x55555555u;
      word = (word & 0x33333333u) + (word >> 2 & 0x33333333u);
      word = (word + (word >> 4)) & 0x0f0f0f0fu;
      sum += word * 0x01010101u >> 24;
    }
    total += sum;
  }
  return total;
}

void apply_bitmask(const ApplyBitmaskArgs& args, int64_t first, int64_t last) {
  Buffers buffers;
  for (int64_t block = first; block < last; ++block) {
    for_runs(args.layout, 3, block * kBlock, block_end(args.layout, block),
             [&](const int64_t* offsets, int64_t, int64_t n) { apply_run(args, offsets, n, buffers); });
  }
  end_streaming(args.stream);
}

}  // namespace CSMASK_ISA
}  // namespace csmask
