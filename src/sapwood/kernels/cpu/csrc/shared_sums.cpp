#include "shared_sums.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "narrow.h"

namespace sapwood {
namespace {

constexpr std::size_t kLine = 64;
// Turns of the loop that looks without giving the core away: some ten microseconds. Ranks come
// together within these, unless one has no core.
constexpr int kSpins = 2000;
constexpr int kYields = 50;
constexpr int kMostRanks = 64;

std::size_t rounded(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while the word has this value, 20 ms at most.
void sleep_while(std::atomic<std::uint32_t>& word, std::uint32_t value) {
#if defined(__linux__)
  const timespec limit{0, 20'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT, value, &limit, nullptr, 0);
#else
  if (word.load() == value) std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

void wake_all(std::atomic<std::uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

constexpr std::int64_t kBlock = 1024;

// out [n] = the places' sum, in their order, a block at a time so that it stays in registers and the
// first cache. Numbers of fp32, or of bf16 as their bits.
template <typename Number>
[[gnu::always_inline]] inline void add_places(void* out, const char* const* places, int ranks, std::int64_t n) {
  float sum[kBlock];
  constexpr bool is_wide = sizeof(Number) == 4;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    const std::int64_t count = std::min(kBlock, n - first);
    for (int rank = 0; rank < ranks; ++rank) {
      const Number* x = reinterpret_cast<const Number*>(places[rank]) + first;
      for (std::int64_t i = 0; i < count; ++i) {
        float value;
        if constexpr (is_wide) value = x[i]; else value = widened(x[i]);
        sum[i] = rank == 0 ? value : sum[i] + value;
      }
    }
    Number* to = static_cast<Number*>(out) + first;
    for (std::int64_t i = 0; i < count; ++i) {
      if constexpr (is_wide) to[i] = sum[i]; else to[i] = narrowed(sum[i]);
    }
  }
}

using AddPlaces = void (*)(void*, const char* const*, int, std::int64_t);

void add_fp32(void* out, const char* const* places, int ranks, std::int64_t n) {
  add_places<float>(out, places, ranks, n);
}

void add_bf16(void* out, const char* const* places, int ranks, std::int64_t n) {
  add_places<std::uint16_t>(out, places, ranks, n);
}

AddPlaces function_for(DType dtype) {
  return dtype == DType::f32 ? add_fp32 : add_bf16;
}

}  // namespace

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "ranks share these words");

struct SharedSums::Arrival {
  // Turns for which the rank has filled its place, and how many sleep until there are more.
  std::atomic<std::uint32_t> turns;
  std::atomic<std::uint32_t> sleepers;
};

struct SharedSums::Header {
  std::atomic<std::uint32_t> is_stopped;
};

std::size_t SharedSums::bytes(int ranks, std::size_t capacity) {
  return kLine * (1 + ranks) + 2 * ranks * rounded(capacity);
}

SharedSums::SharedSums(void* memory, int rank, int ranks, std::size_t capacity)
    : header_(static_cast<Header*>(memory)),
      memory_(static_cast<char*>(memory)),
      rank_(rank),
      ranks_(ranks),
      capacity_(capacity / kLine * kLine) {
  if (ranks < 1 || rank < 0 || rank >= ranks || ranks > kMostRanks || capacity_ == 0)
    throw std::invalid_argument("a rank must be one of the ranks, and exchange something");
}

SharedSums::Arrival& SharedSums::arrival(int rank) const {
  return *reinterpret_cast<Arrival*>(memory_ + kLine * (1 + rank));
}

// Two places per rank take turns. Who is in turn t + 2 has met all others in turn t + 1, so nobody
// reads the places of turn t any more.
char* SharedSums::place(int rank) const {
  return memory_ + kLine * (1 + ranks_) + (2 * rank + turn_ % 2) * capacity_;
}

void SharedSums::meet() {
  Arrival& own = arrival(rank_);
  const std::uint32_t wanted = turn_ + 1;
  own.turns.store(wanted);
  if (own.sleepers.load() != 0) wake_all(own.turns);
  for (int rank = 0; rank < ranks_; ++rank) {
    Arrival& other = arrival(rank);
    int tries = 0;
    for (;;) {
      const std::uint32_t turns = other.turns.load(std::memory_order_acquire);
      if (static_cast<std::int32_t>(turns - wanted) >= 0) break;
      if (header_->is_stopped.load(std::memory_order_relaxed) != 0)
        throw std::runtime_error("another rank has ended");
      if (tries < kSpins) {
        pause_core();
      } else if (tries < kSpins + kYields) {
        std::this_thread::yield();
      } else {
        other.sleepers.fetch_add(1);
        sleep_while(other.turns, turns);
        other.sleepers.fetch_sub(1);
      }
      ++tries;
    }
  }
}

void SharedSums::add_up(DType dtype, void* x, std::int64_t n) {
  if (dtype != DType::f32 && dtype != DType::bf16) throw std::invalid_argument("sums are of float32 or bfloat16");
  const AddPlaces add = function_for(dtype);
  const std::int64_t size = dtype == DType::f32 ? 4 : 2;
  const std::int64_t most = static_cast<std::int64_t>(capacity_) / size;
  const char* places[kMostRanks];
  for (std::int64_t first = 0; first < n; first += most, ++turn_) {
    const std::int64_t count = std::min(most, n - first);
    char* mine = static_cast<char*>(x) + first * size;
    std::memcpy(place(rank_), mine, count * size);
    meet();
    for (int rank = 0; rank < ranks_; ++rank) places[rank] = place(rank);
    add(mine, places, ranks_, count);
  }
}

void SharedSums::gather(const void* x, void* out, std::int64_t rows, std::int64_t row_bytes) {
  // Whole rows at a time, or pieces of one that is longer than a place.
  const std::int64_t piece = std::min<std::int64_t>(row_bytes, capacity_);
  const std::int64_t most = std::max<std::int64_t>(1, static_cast<std::int64_t>(capacity_) / std::max<std::int64_t>(piece, 1));
  for (std::int64_t first = 0; first < rows; first += most) {
    const std::int64_t count = std::min(most, rows - first);
    for (std::int64_t at = 0; at < row_bytes; at += piece, ++turn_) {
      const std::int64_t bytes = std::min(piece, row_bytes - at);
      for (std::int64_t row = 0; row < count; ++row)
        std::memcpy(place(rank_) + row * bytes, static_cast<const char*>(x) + (first + row) * row_bytes + at, bytes);
      meet();
      for (int rank = 0; rank < ranks_; ++rank)
        for (std::int64_t row = 0; row < count; ++row)
          std::memcpy(static_cast<char*>(out) + ((first + row) * ranks_ + rank) * row_bytes + at,
                      place(rank) + row * bytes, bytes);
    }
  }
}

void SharedSums::exchange(const void* x, void* out, const std::int64_t* bytes) {
  // A place has a box for each rank that takes from it; longer pieces go in several turns.
  const std::int64_t box = static_cast<std::int64_t>(capacity_) / ranks_;
  std::int64_t to[kMostRanks], from[kMostRanks];
  std::int64_t sent = 0, received = 0, longest = 0;
  for (int rank = 0; rank < ranks_; ++rank) {
    to[rank] = sent;
    from[rank] = received;
    sent += bytes[rank_ * ranks_ + rank];
    received += bytes[rank * ranks_ + rank_];
    for (int other = 0; other < ranks_; ++other)
      if (other != rank) longest = std::max(longest, bytes[rank * ranks_ + other]);
  }
  const char* source = static_cast<const char*>(x);
  char* target = static_cast<char*>(out);
  std::memcpy(target + from[rank_], source + to[rank_], bytes[rank_ * ranks_ + rank_]);
  for (std::int64_t first = 0; first < longest; first += box, ++turn_) {
    for (int rank = 0; rank < ranks_; ++rank) {
      const std::int64_t count = std::min(box, bytes[rank_ * ranks_ + rank] - first);
      if (rank != rank_ && count > 0) std::memcpy(place(rank_) + rank * box, source + to[rank] + first, count);
    }
    meet();
    for (int rank = 0; rank < ranks_; ++rank) {
      const std::int64_t count = std::min(box, bytes[rank * ranks_ + rank_] - first);
      if (rank != rank_ && count > 0) std::memcpy(target + from[rank] + first, place(rank) + rank_ * box, count);
    }
  }
}

void SharedSums::stop() {
  header_->is_stopped.store(1);
  for (int rank = 0; rank < ranks_; ++rank) wake_all(arrival(rank).turns);
}

}  // namespace sapwood
