// The low-rank additions of adapters to one linear layer (kernels/low_rank.py).
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace sapwood {

// Which rows of a step have which adapter: slot i has the rows [starts[i], starts[i + 1]) of `rows`.
struct AdapterRows {
  std::vector<std::int64_t> slots, starts;
  const std::int64_t* rows = nullptr;
  // Throws std::out_of_range for a row that is not below num_rows.
  void check(std::int64_t num_rows) const;
};

class LowRankLayer {
 public:
  LowRankLayer(std::int64_t in, std::int64_t out) : in_(in), out_(out) {}

  // From now on the slot has this addition; without parts, none. What is pointed to must stay.
  void place(std::int64_t slot, const void* a, std::int64_t ranks, std::vector<LowRankPart> parts);

  bool has(std::int64_t slot) const;

  // As Ops::low_rank, for all adapters of the step. `out` has out_stride elements between rows.
  void add(Context& context, DType dtype, const void* x, std::int64_t x_stride, void* out, std::int64_t out_stride,
           bool wide, const AdapterRows& rows) const;

  // The same by other threads than the context's.
  void add(const Ops& ops, const Team& team, Buffer& scratch, DType dtype, const void* x, std::int64_t x_stride,
           void* out, std::int64_t out_stride, bool wide, const AdapterRows& rows) const;

 private:
  struct Addition {
    const void* a = nullptr;
    std::int64_t ranks = 0;
    std::vector<LowRankPart> parts;
  };
  std::int64_t in_, out_;
  std::vector<Addition> additions_;  // by slot
};

}  // namespace sapwood
