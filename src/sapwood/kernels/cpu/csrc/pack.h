// The layout of packed weights, the same for every instruction set.
//
// A weight [N, K] becomes panels of 32 outputs: [ceil(N / 32), K / per_lane, 32] lanes of 32 bits,
// where a lane holds 1 fp32 or 2 neighbouring bf16 of one output's row. Outputs beyond N are 0.
#pragma once

#include <cstdint>

namespace sapwood {

constexpr std::int64_t kPanel = 32;
constexpr std::int64_t kLinearRows = 12;     // rows of x that share one pass over a panel
constexpr std::int64_t kTaskTiles = 12;      // such passes per task, over weights that stay in L2
constexpr std::int64_t kTaskPanels = 8;      // panels of a task when there are many rows
constexpr std::int64_t kStreamPanels = 64;   // at most, when one pass is all
constexpr std::int64_t kDepthLanes = 384;    // of k at a time: 8 panels take 384 KiB of L2
constexpr std::int64_t kDepthStride = kDepthLanes + 16;  // copied rows start in different cache sets

constexpr std::int64_t kLinearMostRows = 32;  // of a pass on any instruction set

// Per thread: the sums of a task, then a tile of x.
constexpr std::int64_t kLinearSums = kTaskTiles * kLinearRows * kTaskPanels * kPanel;
constexpr std::int64_t kLinearScratchFloats = kLinearSums + kLinearMostRows * kDepthStride;
static_assert(kLinearSums >= kLinearRows * kStreamPanels * kPanel);

}  // namespace sapwood
