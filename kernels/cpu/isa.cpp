#include "isa.h"

#ifdef CSMASK_HAVE_avx2
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>

namespace csmask {

#ifdef CSMASK_HAVE_avx512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef CSMASK_HAVE_avx2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef CSMASK_HAVE_neon
namespace neon {
extern const Kernels kernels;
}
#endif
#ifdef CSMASK_HAVE_baseline
namespace baseline {
extern const Kernels kernels;
}
#endif

namespace {

[[maybe_unused]] bool always() { return true; }

#ifdef CSMASK_HAVE_avx2
// F16C by its CPUID bit: compilers learnt its name only lately.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif
#ifdef CSMASK_HAVE_avx512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") &&
         has_f16c();
}
#endif
#ifdef CSMASK_HAVE_avx2
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
#endif

// Best first.
const InstructionSet kBuilt[] = {
#ifdef CSMASK_HAVE_avx512
    {"avx512", has_avx512, &avx512::kernels},
#endif
#ifdef CSMASK_HAVE_avx2
    {"avx2", has_avx2, &avx2::kernels},
#endif
#ifdef CSMASK_HAVE_neon
    {"neon", always, &neon::kernels},
#endif
#ifdef CSMASK_HAVE_baseline
    {"baseline", always, &baseline::kernels},
#endif
};

const InstructionSet* best() {
  for (const InstructionSet& set : kBuilt) {
    if (set.supported()) return &set;
  }
  throw std::runtime_error("no instruction set of this build runs on this CPU");
}

std::atomic<const InstructionSet*>& in_use() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *in_use().load(); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : kBuilt) {
    if (set.supported()) names.emplace_back(set.name);
  }
  return names;
}

void force_instruction_set(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : kBuilt) {
    if (!set.supported()) continue;
    if (name == set.name) {
      in_use().store(&set);
      return;
    }
    known += known.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::invalid_argument("instruction set must be one that this CPU can run (" + known + "), got " + name);
}

}  // namespace csmask
