// Work on torch's threads in tasks that need room of their own.
#pragma once

#include <atomic>
#include <memory>
#include <new>

#include "ops/common/stable_tensor.h"

namespace pmvis {

// Runs body(task, scratch) for each task, each call with `bytes` of its own.
template <typename Body>
void for_each_task(int64_t tasks, int64_t bytes, const Body& body) {
  std::atomic<bool> exhausted{false};
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new (std::nothrow) char[static_cast<size_t>(bytes)]);
    if (scratch == nullptr) {
      exhausted = true;
      return;
    }
    for (int64_t task = begin; task < end; ++task) body(task, scratch.get());
  });
  if (exhausted) throw std::bad_alloc();
}

}  // namespace pmvis
