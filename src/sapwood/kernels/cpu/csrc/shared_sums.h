// Sums over the ranks of one machine, in memory that their processes share.
//
// Sockets cost a sum of few numbers hundreds of microseconds: system calls, copies, and a thread of the
// library between. Here each rank copies its numbers to its place, waits until all have done so, and
// adds all places up by itself, in the ranks' order: so every rank has the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops.h"

namespace sapwood {

class SharedSums {
 public:
  // Bytes of shared memory for so many ranks, of which each exchanges `capacity` bytes at a time.
  static std::size_t bytes(int ranks, std::size_t capacity);

  // memory: zero when the first rank begins; it must outlive the object.
  SharedSums(void* memory, int rank, int ranks, std::size_t capacity);

  // x [n] = the sum over all ranks; bf16 is added in fp32. Throws std::invalid_argument for another dtype,
  // and std::runtime_error once a rank has called stop.
  void add_up(DType dtype, void* x, std::int64_t n);
  // out [rows, ranks * row_bytes] = every rank's x [rows, row_bytes] side by side. Throws likewise.
  void gather(const void* x, void* out, std::int64_t rows, std::int64_t row_bytes);
  // Sends pieces of x, which lie in it by rank, one to each rank, and receives theirs, by rank, in out.
  // bytes [ranks * ranks], alike on all ranks: of the piece from rank i to rank j at i * ranks + j. Throws likewise.
  void exchange(const void* x, void* out, const std::int64_t* bytes);
  // All ranks that wait, or will wait, throw: one of them is gone.
  void stop();

 private:
  struct Arrival;
  struct Header;
  char* place(int rank) const;
  Arrival& arrival(int rank) const;
  // Waits until every rank has filled its place of this turn; then the places may be read, until the
  // next turn but one.
  void meet();

  Header* header_;
  char* memory_;
  int rank_;
  int ranks_;
  std::size_t capacity_;
  std::uint32_t turn_ = 0;
};

}  // namespace sapwood
