// Work that several threads share.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace pmvis {

// Calls work(item, thread) for each item from 0 on, in order of their beginning; threads count from
// 0 to threads - 1, the caller is the first. Throws what any call threw, after all have ended.
template <typename Work>
void parallel(int threads, int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr problem;
  const auto run = [&](int thread) {
    try {
      for (int64_t item = next++; item < items && !failed; item = next++) work(item, thread);
    } catch (...) {
      if (!failed.exchange(true)) problem = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  try {
    for (int64_t k = 1; k < std::min<int64_t>(threads, items); ++k) {
      others.emplace_back(run, static_cast<int>(k));
    }
  } catch (const std::system_error&) {
    // Fewer threads than asked for do the same work.
  }
  run(0);
  for (std::thread& other : others) other.join();
  if (problem) std::rethrow_exception(problem);
}

}  // namespace pmvis
