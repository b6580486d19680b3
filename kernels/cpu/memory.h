// What the operating system knows and does about memory.
#pragma once

#include <cstdint>

namespace csmask {

// Bytes of the largest cache; 8 MiB where nobody says.
std::int64_t last_level_cache();

// Asks for huge pages where there are any, for memory that has not been written to yet: the first write to each page
// of 4 KiB otherwise costs more than the write.
void prefer_huge_pages(void* data, std::int64_t bytes);

}  // namespace csmask
