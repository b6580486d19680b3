#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <mutex>

namespace csmask {
namespace {

std::atomic<bool> forked{false};
// When the module is loaded, that is before there can be a fork to be noticed.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

const OpenMP* openmp() {
  static OpenMP runtime{};
  static std::atomic<bool> found{false};
  static std::mutex lookup;
  if (found.load(std::memory_order_acquire)) return &runtime;
  const std::lock_guard<std::mutex> lock(lookup);
  if (found.load(std::memory_order_relaxed)) return &runtime;
  // Not found is not for good: PyTorch may be imported later.
  const auto symbol = [](const char* name) { return dlsym(RTLD_DEFAULT, name); };
  OpenMP loaded{};
  loaded.parallel = reinterpret_cast<decltype(loaded.parallel)>(symbol("GOMP_parallel"));
  loaded.thread_num = reinterpret_cast<decltype(loaded.thread_num)>(symbol("omp_get_thread_num"));
  loaded.num_threads = reinterpret_cast<decltype(loaded.num_threads)>(symbol("omp_get_num_threads"));
  if (loaded.parallel == nullptr || loaded.thread_num == nullptr || loaded.num_threads == nullptr) return nullptr;
  runtime = loaded;
  found.store(true, std::memory_order_release);
  return &runtime;
}

bool is_forked() { return registered == 0 && forked.load(); }

}  // namespace csmask
