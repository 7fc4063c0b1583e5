#include "low_rank.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace sapwood {

void AdapterRows::check(std::int64_t num_rows) const {
  if (starts.empty()) return;
  if (starts.size() != slots.size() + 1) throw std::invalid_argument("each slot needs the places of its rows");
  check_indices("a row with an adapter", rows, starts.back(), num_rows);
}

void LowRankLayer::place(std::int64_t slot, const void* a, std::int64_t ranks, std::vector<LowRankPart> parts) {
  if (slot < 0) throw std::out_of_range("slots are numbered from 0 on");
  for (const LowRankPart& part : parts) {
    if (part.first_rank < 0 || part.ranks < 1 || part.first_rank + part.ranks > ranks || part.first_out < 0 ||
        part.outputs < 1 || part.first_out + part.outputs > out_) {
      throw std::out_of_range("an addition does not fit a layer of " + std::to_string(in_) + " inputs and " +
                              std::to_string(out_) + " outputs");
    }
  }
  if (static_cast<std::size_t>(slot) >= additions_.size()) additions_.resize(static_cast<std::size_t>(slot) + 1);
  additions_[static_cast<std::size_t>(slot)] = {a, ranks, std::move(parts)};
}

bool LowRankLayer::has(std::int64_t slot) const {
  return slot >= 0 && slot < static_cast<std::int64_t>(additions_.size()) &&
         !additions_[static_cast<std::size_t>(slot)].parts.empty();
}

void LowRankLayer::add(Context& context, DType dtype, const void* x, std::int64_t x_stride, void* out,
                       std::int64_t out_stride, bool wide, const AdapterRows& rows) const {
  add(context.ops(), context.team(), context.scratch, dtype, x, x_stride, out, out_stride, wide, rows);
}

void LowRankLayer::add(const Ops& ops, const Team& team, Buffer& scratch, DType dtype, const void* x,
                       std::int64_t x_stride, void* out, std::int64_t out_stride, bool wide,
                       const AdapterRows& rows) const {
  std::vector<LowRankGroup> groups;
  std::int64_t room = 0;
  for (std::size_t i = 0; i < rows.slots.size(); i++) {
    const std::int64_t count = rows.starts[i + 1] - rows.starts[i];
    if (!has(rows.slots[i]) || count == 0) continue;
    const Addition& addition = additions_[static_cast<std::size_t>(rows.slots[i])];
    groups.push_back({addition.a, addition.ranks, addition.parts.data(),
                      static_cast<std::int64_t>(addition.parts.size()), rows.rows + rows.starts[i], count, nullptr});
    room += count * addition.ranks;
  }
  if (groups.empty()) return;
  float* shrunk = reinterpret_cast<float*>(scratch.at_least(static_cast<std::size_t>(room) * sizeof(float)));
  for (LowRankGroup& group : groups) {
    group.shrunk = shrunk;
    shrunk += group.num_rows * group.ranks;
  }
  ops.low_rank(dtype, {groups.data(), static_cast<std::int64_t>(groups.size()), x, x_stride, in_, out, out_stride,
                       wide || dtype == DType::f32, team});
}

}  // namespace sapwood
