// Work for the threads of a team, in the files that are compiled once; simd.h has the same for the others.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "ops.h"

namespace sapwood {

// Calls body(task, thread) for tasks [0, count) on up to `threads` threads. Each begins with a contiguous share,
// so that it reads memory in long streams, and then helps with what others have left.
template <class Body>
void run_tasks(const Team& team, std::int64_t threads, std::int64_t count, const Body& body) {
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (std::int64_t task = 0; task < count; task++) body(task, 0);
    return;
  }
  struct alignas(64) Counter {
    std::atomic<std::int64_t> value;
  };
  std::vector<Counter> next(static_cast<std::size_t>(threads));
  const auto begin = [&](std::int64_t share) { return count * share / threads; };
  for (std::int64_t i = 0; i < threads; i++) next[static_cast<std::size_t>(i)].value = begin(i);
  const auto work = [&](int thread) {
    for (std::int64_t helped = 0; helped < threads; helped++) {
      const std::int64_t share = (thread + helped) % threads;
      std::atomic<std::int64_t>& counter = next[static_cast<std::size_t>(share)].value;
      for (std::int64_t task; (task = counter++) < begin(share + 1);) body(task, thread);
    }
  };
  const auto run = [](const void* job, int thread) { (*static_cast<const decltype(work)*>(job))(thread); };
  team.launch(team.pool, static_cast<int>(threads), run, &work);
}

// Calls body(begin, end) with parts of [0, n), of at least `grain` each.
template <class Body>
void run_parts(const Team& team, std::int64_t n, std::int64_t grain, const Body& body) {
  const std::int64_t parts = std::clamp<std::int64_t>(n / grain, 1, 4 * team.threads);
  run_tasks(team, team.threads, parts, [&](std::int64_t part, int) { body(n * part / parts, n * (part + 1) / parts); });
}

}  // namespace sapwood
