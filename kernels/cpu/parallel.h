// Fork and join: a static split of [0, count) over the OpenMP threads that PyTorch runs on, where they can be had.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace csmask {

// GNU's OpenMP runtime, which PyTorch has loaded (LLVM's has the same entry points on Linux). Looked up and not linked
// with: a second runtime would have threads of its own, that compete with PyTorch's for the cores.
struct OpenMP {
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};

// Null where no runtime is loaded.
const OpenMP* openmp();

// Whether this process was forked: the runtime's threads did not come along, and waiting for them would take forever.
bool is_forked();

template <typename Work>
struct Split {
  const Work& work;
  std::int64_t count;
  std::int64_t parts;

  void run(std::int64_t part) const { work(boundary(part), boundary(part + 1)); }

 private:
  std::int64_t boundary(std::int64_t part) const {
    const std::int64_t base = count / parts;
    const std::int64_t longer = count % parts;
    return part * base + (part < longer ? part : longer);
  }
};

// Calls work(first, last) over at most `threads` contiguous ranges of [0, count), each at least `grain` long but the
// last; the caller's thread takes the first. `work` must not throw.
template <typename Work>
void parallel_for(std::int64_t count, std::int64_t grain, int threads, const Work& work) {
  if (count <= 0) return;
  std::int64_t parts = (count + grain - 1) / grain;
  if (parts > threads) parts = threads;
  const Split<Work> split{work, count, parts};
  if (parts == 1) {
    split.run(0);
    return;
  }
  const OpenMP* const runtime = is_forked() ? nullptr : openmp();
  if (runtime != nullptr) {
    // The team can be smaller than what was asked for, in a parallel region of the caller's it is one thread.
    struct Team {
      const Split<Work>& split;
      const OpenMP& runtime;
    } team{split, *runtime};
    const auto body = [](void* data) {
      const auto& ours = *static_cast<const Team*>(data);
      const std::int64_t size = ours.runtime.num_threads();
      for (std::int64_t part = ours.runtime.thread_num(); part < ours.split.parts; part += size) ours.split.run(part);
    };
    // The whole team, as PyTorch asks for: for a smaller one the runtime ends threads, which the next call starts
    // again.
    runtime->parallel(body, &team, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  std::int64_t started = 1;
  for (; started < parts; ++started) {
    try {
      workers.emplace_back([&split, started] { split.run(started); });
    } catch (const std::system_error&) {
      break;  // the process may not start more threads: the caller does the rest
    }
  }
  split.run(0);
  for (std::int64_t part = started; part < parts; ++part) split.run(part);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace csmask
