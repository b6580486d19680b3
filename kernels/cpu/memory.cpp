#include "memory.h"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/mman.h>
#endif

namespace csmask {
namespace {

constexpr std::int64_t kUnknown = std::int64_t{8} << 20;

std::int64_t largest() {
  std::int64_t found = 0;
#if defined(__APPLE__)
  for (const char* name : {"hw.perflevel0.l2cachesize", "hw.l2cachesize", "hw.l3cachesize"}) {
    std::int64_t value = 0;
    std::size_t size = sizeof(value);
    if (sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value > found) found = value;
  }
#elif defined(__linux__)
  // Not sysconf: on some processors it gives the sum of all caches of a level, of which a core uses one.
  for (const int index : {2, 3}) {
    char path[80];
    std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    std::FILE* file = std::fopen(path, "r");
    if (file == nullptr) continue;
    long long kilobytes = 0;
    if (std::fscanf(file, "%lldK", &kilobytes) == 1 && kilobytes * 1024 > found) found = kilobytes * 1024;
    std::fclose(file);
  }
#endif
  return found > 0 ? found : kUnknown;
}

}  // namespace

std::int64_t last_level_cache() {
  static const std::int64_t size = largest();
  return size;
}

void prefer_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  // Advice: where it is not taken, pages are small.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace csmask
