// out = x w^T for many rows of bf16 on the matrix unit (AMX), whatever the weight is stored as.
//
// A group of panels (pack.h) stays in the second-level cache of a core while all rows of x pass over the
// group, 32 rows at a time, so that memory is read once for each weight and rarely for x. A weight that is
// not of bf16 is made bf16 when a group comes in: the more rows, the less that costs. With one group in
// work, the next one is fetched, a few cache lines for each product.
//
// Inputs are cut into blocks only where panels are so long that too few would fit; then the sums of a
// task's rows wait in scratch memory for the next block. Included only by *.isa.cpp.
#pragma once

#include "matrix.h"
#include "pack.h"

#if defined(SAPWOOD_AMX)

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kMostPanels = 16;     // of a group
constexpr std::int64_t kGroupLanes = 5120;   // of all panels of a group: 640 KiB of the 1 or 2 MiB of L2
constexpr std::int64_t kBlockLanes = 768;    // of a panel at a time
constexpr std::int64_t kWaitingTiles = 96;   // of 32 x 32 sums: of a task, that wait for another block
constexpr std::int64_t kTasksPerThread = 4;  // at least, where rows allow it

// Scratch memory of a thread: sums, a group's panels as bf16, rows of x.
constexpr std::int64_t kRowStride = kBlockLanes + 16;  // in lanes; copied rows start in different cache sets
constexpr std::int64_t kSumsBytes = kWaitingTiles * kMostPassRows * kPanel * 4;
constexpr std::int64_t kPanelsBytes = kGroupLanes * kPanel * 4;
constexpr std::int64_t kRowsBytes = kMostPassRows * kRowStride * 4;
constexpr std::int64_t kThreadBytes = (kSumsBytes + kPanelsBytes + kRowsBytes + 4095) / 4096 * 4096;
static_assert(kWaitingTiles >= kMostPanels && kGroupLanes >= kBlockLanes);

// x [m, k] of bf16, rows `stride` elements apart, times a weight of n outputs; m is at least 1, k even.
struct ManyRows {
  const bf16* x;
  std::int64_t stride, m, n, k;
  std::byte* scratch;  // kThreadBytes per thread
  Team team;
};

// How the work is cut. A task is a group of panels x some tiles of rows.
struct ManyCut {
  std::int64_t lanes, block, blocks;   // of inputs: all, of a block, and how many blocks
  std::int64_t panels, groups;         // of a group, and how many groups
  std::int64_t height, tiles;          // rows of a tile, and how many tiles
  std::int64_t task_tiles, row_tasks;  // tiles of a task, and tasks of a group

  ManyCut(const ManyRows& a, int threads) {
    const auto pieces = [](std::int64_t all, std::int64_t of) { return (all + of - 1) / of; };
    lanes = a.k / 2;
    blocks = pieces(lanes, kBlockLanes);
    block = pieces(pieces(lanes, blocks), kUnitLanes) * kUnitLanes;
    blocks = pieces(lanes, block);
    const std::int64_t all_panels = pieces(a.n, kPanel);
    tiles = pieces(a.m, kMostPassRows);
    height = pieces(a.m, tiles);
    tiles = pieces(a.m, height);
    // With few rows, groups alone must be enough tasks.
    const std::int64_t wanted = threads * (tiles < 2 * kTasksPerThread ? kTasksPerThread : 1);
    const std::int64_t least_groups = most(wanted, pieces(all_panels, least(kMostPanels, kGroupLanes / block)));
    panels = pieces(all_panels, pieces(least_groups, threads) * threads);
    groups = pieces(all_panels, panels);
    row_tasks = most(1, least(tiles, threads * kTasksPerThread / groups));
    if (blocks > 1) row_tasks = most(row_tasks, pieces(tiles, kWaitingTiles / panels));
    task_tiles = pieces(tiles, row_tasks);
    row_tasks = pieces(tiles, task_tiles);
  }
};

// A part of a weight as bf16: `count` panels of 32 lanes side by side, `step` lanes from panel to panel.
struct Panels {
  const std::uint32_t* at;
  std::int64_t step;
};

// One thread's part of a product. Source and Write are as multiply_many() says.
template <class Source, class Write>
class ManyRowsThread {
 public:
  ManyRowsThread(const ManyRows& args, const ManyCut& cut, const Source& source, const Write& write,
                 std::byte* scratch)
      : a_(args), cut_(cut), source_(source), write_(write), sums_(reinterpret_cast<float*>(scratch)),
        decoded_(reinterpret_cast<std::uint32_t*>(scratch + kSumsBytes)),
        rows_(reinterpret_cast<std::uint32_t*>(scratch + kSumsBytes + kPanelsBytes)) {}

  void run(std::int64_t task) {
    const std::int64_t group = task / cut_.row_tasks;
    first_ = group * cut_.panels;
    count_ = least(cut_.panels, (a_.n + kPanel - 1) / kPanel - first_);
    const std::int64_t first_tile = task % cut_.row_tasks * cut_.task_tiles;
    const std::int64_t last_tile = least(first_tile + cut_.task_tiles, cut_.tiles);
    for (std::int64_t lane = 0; lane < cut_.lanes; lane += cut_.block) {
      const std::int64_t lanes = least(cut_.block, cut_.lanes - lane);
      if (group != group_ || cut_.blocks > 1) panels_ = source_.read(first_, count_, lane, lanes, decoded_);
      for (std::int64_t tile = first_tile; tile < last_tile; tile++) {
        multiply(tile, lane, lanes, cut_.blocks > 1 ? tile - first_tile : 0);
      }
    }
    group_ = group;
  }

 private:
  void multiply(std::int64_t tile, std::int64_t lane, std::int64_t lanes, std::int64_t place) {
    const std::int64_t row = tile * cut_.height, rows = least(cut_.height, a_.m - row);
    const std::int64_t sums_stride = count_ * kPanel;
    float* sums = sums_ + place * kMostPassRows * sums_stride;
    std::int64_t stride = a_.stride / 2;
    const std::uint32_t* x = reinterpret_cast<const std::uint32_t*>(a_.x) + row * stride + lane;
    if (stride % kLineConflict == 0) {
      // Rows a power of two apart would fall into the same few cache sets.
      for (std::int64_t r = 0; r < rows; r++) {
        __builtin_memcpy(rows_ + r * kRowStride, x + r * stride, static_cast<std::size_t>(lanes) * 4);
      }
      x = rows_;
      stride = kRowStride;
    }
    const int lines = source_.kFetches && cut_.blocks == 1
                          ? static_cast<int>((kGroupLines + cut_.tiles - 1) / cut_.tiles) : 0;
    const std::byte* ahead = reinterpret_cast<const std::byte*>(panels_.at + cut_.panels * panels_.step) +
                             tile * count_ * lanes / kUnitLanes * lines * kCacheLine;
    for (std::int64_t p = 0; p < count_; p++) {
      const std::uint32_t* panel = panels_.at + p * panels_.step;
      float* c = sums + p * kPanel;
      lane > 0 ? unit_.multiply<true>(x, stride, panel, kPanel, c, sums_stride, static_cast<int>(rows), kPanel,
                                      static_cast<int>(lanes), ahead, lines)
               : unit_.multiply<false>(x, stride, panel, kPanel, c, sums_stride, static_cast<int>(rows), kPanel,
                                       static_cast<int>(lanes), ahead, lines);
      ahead += lanes / kUnitLanes * lines * kCacheLine;
    }
    if (lane + lanes < cut_.lanes) return;
    const std::int64_t columns = least(a_.n - first_ * kPanel, sums_stride);
    for (std::int64_t r = 0; r < rows; r++) write_(row + r, first_ * kPanel, sums + r * sums_stride, columns);
  }

  static constexpr std::int64_t kGroupLines = 32;      // of a panel, for each 16 lanes
  static constexpr std::int64_t kLineConflict = 512;   // lanes: rows that share two sets or fewer

  const ManyRows& a_;
  const ManyCut& cut_;
  const Source& source_;
  const Write& write_;
  float* sums_;             // [rows of the task's tiles, count_ * kPanel]
  std::uint32_t* decoded_;  // [count_, lanes of a block, kPanel]
  std::uint32_t* rows_;     // [rows of a tile, kRowStride]
  MatrixUnit unit_;
  Panels panels_{};
  std::int64_t group_ = -1, first_ = 0, count_ = 0;
};

// Calls write(row, first output, sums, count) for all rows and outputs; sums are fp32.
// source.read(first panel, count, lane, lanes, decoded) says where lanes [lane, lane + lanes) of some
// panels are as bf16, or puts them to `decoded`. kFetches: the next group follows in memory.
template <class Source, class Write>
void multiply_many(const ManyRows& a, int threads, const Source& source, const Write& write) {
  const ManyCut cut(a, threads);
  const std::int64_t tasks = cut.groups * cut.row_tasks;
  Shares shares(tasks, threads);
  run_parallel(a.team, least(threads, tasks), [&](int thread) {
    int helped = 0;
    ManyRowsThread<Source, Write> mine(a, cut, source, write, a.scratch + thread * kThreadBytes);
    for (std::int64_t task; (task = shares.take_next(thread, &helped)) < tasks;) mine.run(task);
  });
}

// out[i] = sums[i] * scales[i] + bias[i] for n outputs of a row. scales and bias may be null; scales are
// as many as whole panels have.
template <class Out>
void write_sums(const float* sums, std::int64_t n, const float* scales, const bf16* bias, Out* out) {
  for (std::int64_t i = 0; i < n; i += W) {
    VF result = load(sums + i);
    if (scales != nullptr) result *= load(scales + i);
    if (i + W <= n) {
      store(out + i, bias == nullptr ? result : result + load(bias + i));
    } else {
      write_tail<Out, bf16>(out + i, bias == nullptr ? nullptr : bias + i, result, n - i);
    }
  }
}

// The same to row `row` of out, `stride` elements apart, from output `column` on; wide: out is fp32, else bf16.
static inline void write_row(const float* sums, std::int64_t n, const float* scales, const void* bias, bool wide,
                             void* out, std::int64_t stride, std::int64_t row, std::int64_t column) {
  const bf16* added = bias == nullptr ? nullptr : static_cast<const bf16*>(bias) + column;
  const float* factors = scales == nullptr ? nullptr : scales + column;
  const std::int64_t at = row * stride + column;
  wide ? write_sums(sums, n, factors, added, static_cast<float*>(out) + at)
       : write_sums(sums, n, factors, added, static_cast<bf16*>(out) + at);
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA

#endif
