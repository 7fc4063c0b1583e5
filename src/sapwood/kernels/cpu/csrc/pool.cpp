#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace sapwood {
namespace {

constexpr std::uint64_t kOpen = 1u << 31;
constexpr int kEpochShift = 32;
constexpr std::chrono::microseconds kSpin{200};  // longer than Python needs between two ops
constexpr int kPausesPerLook = 64;
constexpr std::uintptr_t kFetchBytes = 512;  // between two looks for a job

void pause() {
#if defined(SAPWOOD_X86)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // waits as long as x86's pause does; "yield" does nothing on most
#else
  std::this_thread::yield();
#endif
}

// Whether this thread may launch; until its end no other may, if so.
class Turn {
 public:
  explicit Turn(std::atomic<bool>& taken) : is_ours(!taken.exchange(true, std::memory_order_acquire)), taken_(taken) {}
  ~Turn() {
    if (is_ours) taken_.store(false, std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  const bool is_ours;

 private:
  std::atomic<bool>& taken_;
};

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
  const Turn turn(launching_);
  if (threads <= 1 || !turn.is_ours) {
    run(body, 0);
    return;
  }
  run_ = run;
  body_ = body;
  limit_ = threads;
  left_.store(0, std::memory_order_relaxed);
  const std::uint64_t epoch = (gate_.load(std::memory_order_relaxed) >> kEpochShift) + 1;
  gate_.store(epoch << kEpochShift | kOpen);  // seq_cst, as sleepers_: we see a sleeper, or it sees the job
  if (sleepers_.load() > 0) gate_.notify_all();
  run(body, 0);
  const std::uint64_t gate = gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
  const std::uint32_t entered = static_cast<std::uint32_t>(gate & (kOpen - 1));
  for (int i = 1; left_.load(std::memory_order_acquire) != entered; i++) {
    // A worker that lost its core in the job may need ours, if there are too few cores.
    i % 4096 == 0 ? std::this_thread::yield() : pause();
  }
}

void Pool::fetch(const void* begin, std::size_t bytes, std::size_t limit) {
  hint_begin_.store(reinterpret_cast<std::uintptr_t>(begin), std::memory_order_relaxed);
  hint_bytes_.store(bytes, std::memory_order_relaxed);
  hint_limit_.store(limit, std::memory_order_relaxed);
  hint_.fetch_add(1, std::memory_order_release);
}

bool Pool::fetch_some(int thread, Ahead& ahead) const {
  const std::uint32_t hint = hint_.load(std::memory_order_acquire);
  if (hint != ahead.hint) {
    ahead.hint = hint;
    const std::uintptr_t bytes = hint_bytes_.load(std::memory_order_relaxed);
    const std::uintptr_t threads = workers_.size() + 1, own = static_cast<std::uintptr_t>(thread);
    const std::uintptr_t first = bytes * own / threads, last = bytes * (own + 1) / threads;
    ahead.next = hint_begin_.load(std::memory_order_relaxed) + first;
    ahead.end = ahead.next + std::min(last - first, hint_limit_.load(std::memory_order_relaxed));
  }
  if (ahead.next >= ahead.end) return false;
  // Into the second-level cache; an address that is no memory any more does nothing.
  for (std::uintptr_t i = 0; i < kFetchBytes; i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead.next + i), 0, 2);
  }
  ahead.next += kFetchBytes;
  return true;
}

bool Pool::enter(std::uint64_t gate, int thread) {
  if (!gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acq_rel)) return false;
  if (thread < limit_) run_(body_, thread);
  left_.fetch_add(1, std::memory_order_release);
  return true;
}

void Pool::work(int thread) {
  Ahead ahead;
  std::uint64_t seen = 0;  // epoch of the last job entered or missed
  auto idle_since = std::chrono::steady_clock::now();
  for (;;) {
    for (int i = 0; i < kPausesPerLook; i++) {
      const std::uint64_t gate = gate_.load(std::memory_order_acquire);
      if (gate >> kEpochShift == seen) {
        if (!fetch_some(thread, ahead)) pause();
      } else if ((gate & kOpen) == 0) {
        seen = gate >> kEpochShift;
      } else if (enter(gate, thread)) {
        seen = gate >> kEpochShift;
        ahead.end = 0;  // the job has read the bytes of that hint
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
