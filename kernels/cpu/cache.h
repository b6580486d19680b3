// What the operating system says of this machine's caches, in bytes.
#pragma once

#include <cstdint>

namespace csmask {

// Of the largest cache; 8 MiB where nobody says.
std::int64_t last_level_cache();

}  // namespace csmask
