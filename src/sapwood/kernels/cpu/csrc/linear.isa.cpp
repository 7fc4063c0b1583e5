// out = x w^T + bias, with the weight packed in panels of 32 outputs (pack.h).
//
// One layout serves every number of rows: a panel is one contiguous stream from memory when there
// are few rows, and the right operand of a register tile when there are many. Around the tile, a
// few rows of x stay in L1 and a chunk of panels in L2 while all rows pass over it. The matrix unit,
// where there is one, takes a panel as it lies, too.
#include "matrix.h"
#include "pack.h"
#include "table.h"
#include "tile.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kStreamBytes = 64 * 1024;    // of the weight per task, when memory is the limit
constexpr std::int64_t kPrefetchLanes = 8192 / 4;   // measured best of 1 to 16 KiB
constexpr std::int64_t kElementsPerThread = 32768;  // of the weight; below, a thread costs too much

// Rows of x that share one pass over a panel, and such passes per task.
#if defined(SAPWOOD_AMX)
template <class T>
constexpr std::int64_t kRowsPerPass = Pack<T>::per_lane == 2 ? kMostPassRows : kLinearRows;
#else
template <class T>
constexpr std::int64_t kRowsPerPass = kLinearRows;
#endif
template <class T>
constexpr std::int64_t kPassesPerTask = kLinearRows * kTaskTiles / kRowsPerPass<T>;
static_assert(kRowsPerPass<bf16> <= kLinearMostRows);

// How the work is cut: a task is `panels` panels x `rows` rows, done `tile_rows` rows at a time.
struct Cut {
  std::int64_t panels, rows, tile_rows, panel_tasks, row_tasks;
};

template <class T>
Cut cut_work(std::int64_t m, std::int64_t all_panels, std::int64_t lanes, int threads) {
  constexpr std::int64_t most_panels = least(kStreamPanels, kLinearSums / (kRowsPerPass<T> * kPanel));
  Cut cut{};
  const std::int64_t tiles = (m + kRowsPerPass<T> - 1) / kRowsPerPass<T>;
  cut.tile_rows = (m + tiles - 1) / tiles;
  const std::int64_t share = most(1, all_panels / (threads * 4));
  const std::int64_t stream = most(1, least(most_panels, kStreamBytes / (lanes * kPanel * 4)));
  cut.panels = least(share, tiles == 1 ? stream : kTaskPanels);
  cut.panel_tasks = (all_panels + cut.panels - 1) / cut.panels;
  const std::int64_t wanted = most(1, threads * 4 / cut.panel_tasks);
  const std::int64_t tiles_per_task = most(1, least(kPassesPerTask<T>, tiles / wanted));
  cut.rows = tiles_per_task * cut.tile_rows;
  cut.row_tasks = (m + cut.rows - 1) / cut.rows;
  return cut;
}

template <class T, bool kAdd, bool kStream>
SAPWOOD_INLINE void multiply_panel(MatrixUnit& unit, const std::uint32_t* x, std::int64_t x_stride,
                                   const std::uint32_t* panel, float* c, std::int64_t c_stride,
                                   int rows, int lanes, const std::uint32_t* ahead) {
#if defined(SAPWOOD_AMX)
  if (uses_unit<T>(rows)) {
    unit.multiply<kAdd, kStream>(x, x_stride, panel, kPanel, c, c_stride, rows, kPanel, lanes, ahead);
    return;
  }
#else
  static_cast<void>(unit);
#endif
#if defined(__AVX512F__)
  // Two vectors cover a panel, so that up to twelve rows share each load of it.
  switch (rows) {
#define SAPWOOD_ROWS(R) \
  case R: tile<T, kAdd, R, 2, kStream>(x, x_stride, panel, kPanel, c, c_stride, lanes, ahead); break;
    SAPWOOD_ROWS(1) SAPWOOD_ROWS(2) SAPWOOD_ROWS(3) SAPWOOD_ROWS(4) SAPWOOD_ROWS(5) SAPWOOD_ROWS(6)
    SAPWOOD_ROWS(7) SAPWOOD_ROWS(8) SAPWOOD_ROWS(9) SAPWOOD_ROWS(10) SAPWOOD_ROWS(11)
    SAPWOOD_ROWS(12)
#undef SAPWOOD_ROWS
    default: break;
  }
#else
  static_cast<void>(ahead);
  multiply_tile<T, kAdd>(x, x_stride, panel, kPanel, c, c_stride, rows, kPanel, lanes);
#endif
}

template <class T>
class Linear {
 public:
  Linear(const LinearArgs& args, const Cut& cut, float* scratch)
      : a_(args), cut_(cut), sums_(scratch),
        x_tile_(reinterpret_cast<std::uint32_t*>(scratch + kLinearSums)),
        lanes_(args.k / Pack<T>::per_lane) {}

  void run(std::int64_t task) {
    const std::int64_t all_panels = (a_.n + kPanel - 1) / kPanel;
    first_ = task % cut_.panel_tasks * cut_.panels;
    panels_ = least(cut_.panels, all_panels - first_);
    const std::int64_t row = task / cut_.panel_tasks * cut_.rows;
    const std::int64_t rows = least(cut_.rows, a_.m - row);
    // With one tile, x is small, and splitting k would only cut the stream of weights.
    const bool streams = a_.m <= kRowsPerPass<T>;
    const std::int64_t depth = streams ? lanes_ : kDepthLanes;
    for (std::int64_t k = 0; k < lanes_; k += depth) {
      for (std::int64_t r = 0; r < rows; r += cut_.tile_rows) {
        run_tile(row + r, static_cast<int>(least(cut_.tile_rows, rows - r)), k,
                 static_cast<int>(least(depth, lanes_ - k)), sums_ + r * panels_ * kPanel, r == 0, streams);
      }
    }
    const std::int64_t columns = least(a_.n - first_ * kPanel, panels_ * kPanel);
    for (std::int64_t r = 0; r < rows; r++) write_row(row + r, sums_ + r * panels_ * kPanel, columns);
  }

 private:
  // Lanes [k, k + lanes) of some rows, for all panels of the task. The first tile brings the panels
  // into the cache for the others.
  void run_tile(std::int64_t row, int rows, std::int64_t k, int lanes, float* sums, bool from_memory,
                bool streams) {
    const std::uint32_t* x =
        reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(a_.x) + row * a_.x_stride) + k;
    std::int64_t x_stride = a_.x_stride / Pack<T>::per_lane;
    if (!streams) {
      // Rows a power of two apart would fall into the same few cache sets.
      for (int r = 0; r < rows; r++) {
        __builtin_memcpy(x_tile_ + r * kDepthStride, x + r * x_stride, static_cast<std::size_t>(lanes) * 4);
      }
      x = x_tile_;
      x_stride = kDepthStride;
    }
    const std::uint32_t* w = static_cast<const std::uint32_t*>(a_.weight) + first_ * lanes_ * kPanel;
    const std::int64_t sums_stride = panels_ * kPanel;
    for (std::int64_t p = 0; p < panels_; p++) {
      const std::uint32_t* panel = w + (p * lanes_ + k) * kPanel;
      float* c = sums + p * kPanel;
      // What is read next: further on in the panel, or the same lanes of the next one.
      const std::uint32_t* ahead = panel + (lanes == lanes_ ? kPrefetchLanes : lanes_ * kPanel);
      if (from_memory) {
        k > 0 ? multiply_panel<T, true, true>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead)
              : multiply_panel<T, false, true>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead);
      } else {
        k > 0 ? multiply_panel<T, true, false>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead)
              : multiply_panel<T, false, false>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead);
      }
    }
  }

  void write_row(std::int64_t row, const float* sums, std::int64_t n) const {
    a_.wide ? write_to(static_cast<float*>(a_.out), row, sums, n)
            : write_to(static_cast<T*>(a_.out), row, sums, n);
  }

  template <class Out>
  void write_to(Out* all, std::int64_t row, const float* sums, std::int64_t n) const {
    const std::int64_t column = first_ * kPanel;
    Out* out = all + row * a_.n + column;
    const T* bias = a_.bias == nullptr ? nullptr : static_cast<const T*>(a_.bias) + column;
    std::int64_t i = 0;
    for (; i + W <= n; i += W) {
      const VF sum = load(sums + i);
      store(out + i, bias == nullptr ? sum : sum + load(bias + i));
    }
    for (; i < n; i++) put(out + i, sums[i] + (bias == nullptr ? 0.0f : to_float(bias[i])));
  }

  const LinearArgs& a_;
  const Cut& cut_;
  float* sums_;            // [rows, panels * kPanel] of a task
  std::uint32_t* x_tile_;  // [kRowsPerPass, kDepthStride]
  const std::int64_t lanes_;
  std::int64_t first_ = 0, panels_ = 0;  // the task's panels
  MatrixUnit unit_;
};

template <class T>
void multiply(const LinearArgs& a) {
  const int threads = worth_threads(a.team.threads, a.n * a.k * ((a.m + 7) / 8), kElementsPerThread);
  const Cut cut = cut_work<T>(a.m, (a.n + kPanel - 1) / kPanel, a.k / Pack<T>::per_lane, threads);
  const std::int64_t tasks = cut.panel_tasks * cut.row_tasks;
  Shares shares(tasks, threads);
  run_parallel(a.team, least(threads, tasks), [&](int thread) {
    int helped = 0;
    Linear<T> linear(a, cut, a.scratch + thread * kLinearScratchFloats);
    for (std::int64_t i; (i = shares.take_next(thread, &helped)) < tasks;) linear.run(i);
  });
}

}  // namespace

void linear(DType dtype, const LinearArgs& args) {
  dtype == DType::f32 ? multiply<float>(args) : multiply<bf16>(args);
}

}  // namespace sapwood::SAPWOOD_ISA
