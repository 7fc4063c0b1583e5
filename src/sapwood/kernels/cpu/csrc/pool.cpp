#include "pool.h"

#include <unistd.h>

#include <chrono>

namespace sapwood {
namespace {

constexpr std::uint64_t kOpen = 1u << 31;
constexpr int kEpochShift = 32;
constexpr std::chrono::microseconds kSpin{200};  // longer than Python needs between two ops
constexpr int kPausesPerLook = 64;

void pause() {
#if defined(SAPWOOD_X86)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

Pool::Pool(int threads) : process_(getpid()) {
  for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
  if (getpid() != process_) {
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  stop_.store(true);
  gate_.fetch_add(std::uint64_t{1} << kEpochShift);
  gate_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::launch(int threads, Run run, const void* body) {
  const std::unique_lock<std::mutex> lock(launching_, std::try_to_lock);
  if (threads <= 1 || !lock.owns_lock()) {
    run(body, 0);
    return;
  }
  run_ = run;
  body_ = body;
  limit_ = threads;
  left_.store(0, std::memory_order_relaxed);
  const std::uint64_t epoch = (gate_.load(std::memory_order_relaxed) >> kEpochShift) + 1;
  gate_.store(epoch << kEpochShift | kOpen);  // seq_cst, as sleepers_: a sleeper sees one or the other
  if (sleepers_.load() > 0) gate_.notify_all();
  run(body, 0);
  const std::uint64_t gate = gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  const std::uint32_t entered = static_cast<std::uint32_t>(gate & (kOpen - 1));
  for (int i = 1; left_.load(std::memory_order_acquire) != entered; i++) {
    // A worker in the job that lost its core needs ours, if there are too few.
    i % 4096 == 0 ? std::this_thread::yield() : pause();
  }
}

bool Pool::enter(std::uint64_t gate, int thread) {
  if (!gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acq_rel)) return false;
  if (thread < limit_) run_(body_, thread);
  left_.fetch_add(1, std::memory_order_release);
  return true;
}

void Pool::work(int thread) {
  std::uint64_t seen = 0;  // epoch of the last job entered or missed
  auto idle_since = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < kPausesPerLook; i++) {
      const std::uint64_t gate = gate_.load(std::memory_order_acquire);
      if (gate >> kEpochShift == seen) {
        pause();
      } else if ((gate & kOpen) == 0) {
        seen = gate >> kEpochShift;
      } else if (enter(gate, thread)) {
        seen = gate >> kEpochShift;
        idle_since = std::chrono::steady_clock::now();
      }
    }
    if (stop_.load()) return;
    if (std::chrono::steady_clock::now() - idle_since < kSpin) continue;
    sleepers_.fetch_add(1);
    const std::uint64_t gate = gate_.load();
    if (gate >> kEpochShift == seen && !stop_.load()) gate_.wait(gate);
    sleepers_.fetch_sub(1);
    idle_since = std::chrono::steady_clock::now();
  }
}

}  // namespace sapwood
