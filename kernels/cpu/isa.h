// Which instruction sets this build has, which this CPU can run, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace csmask {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;
};

// The best one this CPU can run, unless a test has forced another.
const InstructionSet& instruction_set();

// Names of those this CPU can run, best first.
std::vector<std::string> instruction_sets();

// For tests only. Throws std::invalid_argument for a name that is unknown or that this CPU cannot run.
void force_instruction_set(const std::string& name);

}  // namespace csmask
