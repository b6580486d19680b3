// Fork and join: a static split of [0, count) over threads that live for one call, so that nothing survives a fork().
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace csmask {

// Calls work(first, last) over at most `threads` contiguous ranges of [0, count), each at least `grain` long but the
// last; the caller's thread takes the first. `work` must not throw.
template <typename Work>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Work& work) {
  if (count <= 0) return;
  std::int64_t parts = (count + grain - 1) / grain;
  if (parts > threads) parts = threads;
  const auto boundary = [&](std::int64_t part) {
    const std::int64_t base = count / parts;
    const std::int64_t longer = count % parts;
    return part * base + (part < longer ? part : longer);
  };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  for (; started < parts; ++started) {
    try {
      workers.emplace_back(work, boundary(started), boundary(started + 1));
    } catch (const std::system_error&) {
      break;  // the process may not start more threads: the caller does the rest
    }
  }
  work(0, boundary(1));
  if (started < parts) work(boundary(started), count);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace csmask
