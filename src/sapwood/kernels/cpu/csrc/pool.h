// The threads of a CpuKernels object.
//
// A job is a body that takes its work from a shared counter until there is none. So a thread that
// comes late, or not at all because another process has its core, is not waited for: whoever is there
// does all the work, and only threads that have entered the job must leave it. (A fork-join barrier
// waits for every thread, and costs a scheduler's time slice whenever one has no core.)
//
// Between jobs a thread spins for a while, since the next op of a step follows within microseconds,
// and then sleeps. While it spins it can fetch what the next job reads into the cache: a step of few
// rows is limited by memory, which would rest during the small ops that one thread does alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace sapwood {

class Pool {
 public:
  using Run = void (*)(const void* body, int thread);

  // Starts threads - 1 workers; the thread that launches a job is the first one.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // run(body, thread) on the caller as thread 0 and on whichever workers 1 .. threads - 1 are free.
  // Returns when every worker that has entered the job has left it. While another thread is launching here, the
  // caller does all the work itself.
  void launch(int threads, Run run, const void* body);

  // Until the next job, each idle worker fetches the first `limit` bytes of its share of these: thread
  // i's begins at bytes * i / threads. A hint: nothing depends on it, and the memory may be freed at
  // any time. It replaces the hint before.
  void fetch(const void* begin, std::size_t bytes, std::size_t limit);

 private:
  void work(int thread);
  // The bytes that one worker still has to fetch, and the number of the hint that named them.
  struct Ahead {
    std::uint32_t hint = 0;
    std::uintptr_t next = 0, end = 0;
  };
  bool fetch_some(int thread, Ahead& ahead) const;
  bool enter(std::uint64_t gate, int thread);

  // epoch of the job << 32 | open << 31 | how many workers have entered
  alignas(64) std::atomic<std::uint64_t> gate_{0};
  alignas(64) std::atomic<std::uint32_t> left_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  // Read one by one: a worker that sees parts of two hints fetches something useless, once.
  alignas(64) std::atomic<std::uint32_t> hint_{0};  // counts them
  std::atomic<std::uintptr_t> hint_begin_{0}, hint_bytes_{0}, hint_limit_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> launching_{false};  // no std::mutex: trying one needs a C library of 2021
  Run run_ = nullptr;
  const void* body_ = nullptr;
  int limit_ = 0;
  const int process_;  // workers do not survive a fork; then the caller does all the work
  std::vector<std::thread> workers_;
};

}  // namespace sapwood
