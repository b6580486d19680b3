// philox_: draws of the counter-based generator Philox4x32-10, bit for bit those of csmask/philox.py.
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, https://doi.org/10.1145/2063384.2063405.
// Element i is word i % 4 of block i // 4, or made of block i where it is normal; nothing but what is written moves.
#include "convert.h"
#include "kernels.h"
#include "ops.h"

namespace csmask {
namespace CSMASK_ISA {
namespace {

constexpr int kLanes = 16;  // blocks at a time: a whole vector of 32-bit words on every instruction set
constexpr int kRounds = 10;
constexpr int kWords = 4;
static_assert(kBlock % (kLanes * kWords) == 0, "a block of elements is a whole number of vectors");

struct Lanes {
  alignas(64) uint32_t words[kWords][kLanes];
};

// The words of blocks first, ..., first + 15.
void draw(const PhiloxArgs& args, uint64_t first, Lanes& __restrict lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t block = first + static_cast<uint64_t>(lane);
    uint32_t c0 = static_cast<uint32_t>(block);
    uint32_t c1 = static_cast<uint32_t>(block >> 32);
    uint32_t c2 = args.stream_index;
    uint32_t c3 = args.purpose;
    uint32_t k0 = args.seed_lo;
    uint32_t k1 = args.seed_hi;
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xd2511f53u;
      const uint64_t p1 = static_cast<uint64_t>(c2) * 0xcd9e8d57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    lanes.words[0][lane] = c0;
    lanes.words[1][lane] = c1;
    lanes.words[2][lane] = c2;
    lanes.words[3][lane] = c3;
  }
}

void words(const Lanes& lanes, int64_t* __restrict values) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int k = 0; k < kWords; ++k) values[lane * kWords + k] = lanes.words[k][lane];
  }
}

// An odd multiple of 2^-24 on the open interval (-1, 1), exact in fp32; times scale.
void uniform(const Lanes& lanes, float scale, float* __restrict values) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int k = 0; k < kWords; ++k) {
      const int32_t numerator = static_cast<int32_t>(2u * (lanes.words[k][lane] >> 8) + 1u) - (1 << 24);
      values[lane * kWords + k] = static_cast<float>(numerator) * 0x1p-24f * scale;
    }
  }
}

// The standardised sum of the block's 16 bytes, of mean 16 * 255 / 2 and variance 16 * (256^2 - 1) / 12; times scale.
void normal(const Lanes& lanes, float scale, float* __restrict values) {
  const float inverse_std = 0x1.bb688cp-9f;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t sum = 0;
    for (int k = 0; k < kWords; ++k) {
      const uint32_t word = lanes.words[k][lane];
      sum += (word & 0xffu) + (word >> 8 & 0xffu) + (word >> 16 & 0xffu) + (word >> 24);
    }
    values[lane] = static_cast<float>(static_cast<int32_t>(sum) - 2040) * inverse_std * scale;
  }
}

}  // namespace

void philox(const PhiloxArgs& args, int64_t first, int64_t last) {
  Lanes lanes;
  alignas(64) float values[kBlock];
  const int64_t per_draw = args.kind == PhiloxKind::normal ? kLanes : kLanes * kWords;
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t count = args.count - begin < kBlock ? args.count - begin : kBlock;
    for (int64_t i = 0; i < count; i += per_draw) {
      const int64_t index = args.kind == PhiloxKind::normal ? begin + i : (begin + i) / kWords;
      draw(args, args.first_block + static_cast<uint64_t>(index), lanes);
      if (args.kind == PhiloxKind::uniform) {
        uniform(lanes, args.scale, values + i);
      } else if (args.kind == PhiloxKind::normal) {
        normal(lanes, args.scale, values + i);
      } else {
        alignas(64) int64_t drawn[kLanes * kWords];
        words(lanes, drawn);
        const int64_t wanted = count - i < per_draw ? count - i : per_draw;
        __builtin_memcpy(static_cast<int64_t*>(args.out) + begin + i, drawn, static_cast<size_t>(wanted) * 8);
      }
    }
    if (args.kind != PhiloxKind::words) {
      store(values, count, at(args.out, args.dtype, begin), args.dtype, 1, args.stream);
    }
  }
  end_streaming(args.stream && args.kind != PhiloxKind::words);
}

}  // namespace CSMASK_ISA
}  // namespace csmask
