// csmask_kernels._cpu: each bind_*.cpp checks its ops' arguments and splits the work; the arithmetic is in the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "arrays.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_cpu, module) {
  module.doc() = "C++ kernels of csmask for the CPU.";
  csmask::bind_masks(module);
  csmask::bind_step(module);
  csmask::bind_neurons(module);
  csmask::bind_bitmask(module);
  csmask::bind_philox(module);
  module.def(
      "instruction_set", [] { return std::string(csmask::instruction_set().name); }, "The instruction set in use.");
  module.def("instruction_sets", &csmask::instruction_sets, "Those this CPU can run, best first.");
  module.def("force_instruction_set", &csmask::force_instruction_set, "name"_a,
             "For tests only: use this instruction set. ValueError where it is unknown or this CPU cannot run it.");
  module.def(
      "shares_threads", [] { return csmask::openmp() != nullptr; },
      "Whether kernels run on the OpenMP threads that are there already, PyTorch's; else on threads of their own.");
  module.def("last_level_cache", &csmask::last_level_cache, "Bytes of this machine's largest cache.");
  module.def(
      "prefer_huge_pages",
      [](std::uintptr_t address, std::int64_t bytes) {
        csmask::prefer_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      "address"_a, "bytes"_a, "Asks the operating system for huge pages for new memory.");
}
