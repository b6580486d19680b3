#include "parallel.h"

#include <pthread.h>

#include <atomic>

namespace csmask {
namespace {

std::atomic<bool> forked{false};
// When the module is loaded, that is before there can be a fork to be noticed.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

bool is_forked() { return registered == 0 && forked.load(); }

}  // namespace csmask
