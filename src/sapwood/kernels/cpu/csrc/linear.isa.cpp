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

// A few passes go over one part of a panel after the other, while the next part is on its way, so that
// neither memory nor products wait. With more of them products take so much longer that a task's panels
// are read in the first one.
constexpr std::int64_t kMostStreamedRows = 96;
constexpr std::int64_t kPartLanes = 96;  // of k: with the rows of x they stay in the first-level cache

template <class T>
constexpr bool streams(std::int64_t m) {
  constexpr bool has_unit = kRowsPerPass<T> != kLinearRows;
  return m <= (has_unit ? kRowsPerPass<T> : kMostStreamedRows);
}

template <class T>
Cut cut_work(std::int64_t m, std::int64_t all_panels, std::int64_t lanes, int threads) {
  Cut cut{};
  const std::int64_t tiles = (m + kRowsPerPass<T> - 1) / kRowsPerPass<T>;
  const std::int64_t most_panels = least(kStreamPanels, kLinearSums / (tiles * kRowsPerPass<T> * kPanel));
  cut.tile_rows = (m + tiles - 1) / tiles;
  const std::int64_t share = most(1, all_panels / (threads * 4));
  const std::int64_t stream = most(1, least(most_panels, kStreamBytes / (lanes * kPanel * 4)));
  cut.panels = least(share, streams<T>(m) ? stream : kTaskPanels);
  cut.panel_tasks = (all_panels + cut.panels - 1) / cut.panels;
  const std::int64_t wanted = streams<T>(m) ? 1 : most(1, threads * 4 / cut.panel_tasks);
  const std::int64_t tiles_per_task = most(1, least(kPassesPerTask<T>, tiles / wanted));
  cut.rows = tiles_per_task * cut.tile_rows;
  cut.row_tasks = (m + cut.rows - 1) / cut.rows;
  return cut;
}

template <class T, bool kAdd, int kFetched>
SAPWOOD_INLINE void multiply_panel(MatrixUnit& unit, const std::uint32_t* x, std::int64_t x_stride,
                                   const std::uint32_t* panel, float* c, std::int64_t c_stride,
                                   int rows, int lanes, const Ahead& ahead) {
#if defined(SAPWOOD_AMX)
  if (uses_unit<T>(rows)) {
    unit.multiply<kAdd, (kFetched > 0)>(x, x_stride, panel, kPanel, c, c_stride, rows, kPanel, lanes, ahead.at);
    return;
  }
#else
  static_cast<void>(unit);
#endif
#if defined(__AVX512F__)
  // Two vectors cover a panel, so that up to twelve rows share each load of it.
  switch (rows) {
#define SAPWOOD_ROWS(R) \
  case R: tile<T, kAdd, R, 2, kFetched>(x, x_stride, panel, kPanel, c, c_stride, lanes, ahead); break;
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
    if (streams<T>(a_.m)) {
      for (std::int64_t p = 0; p < panels_; p++) stream_panel(p);
    } else {
      for (std::int64_t k = 0; k < lanes_; k += kDepthLanes) {
        for (std::int64_t r = 0; r < rows; r += cut_.tile_rows) {
          run_tile(row + r, static_cast<int>(least(cut_.tile_rows, rows - r)), k,
                   static_cast<int>(least(kDepthLanes, lanes_ - k)), sums_ + r * panels_ * kPanel, r == 0);
        }
      }
    }
    const std::int64_t columns = least(a_.n - first_ * kPanel, panels_ * kPanel);
    for (std::int64_t r = 0; r < rows; r++) write_row(row + r, sums_ + r * panels_ * kPanel, columns);
  }

 private:
  const std::uint32_t* row_of_x(std::int64_t row) const {
    return reinterpret_cast<const std::uint32_t*>(static_cast<const T*>(a_.x) + row * a_.x_stride);
  }

  // All rows of x with a panel, which is read once from beginning to end. One pass takes it as a
  // whole. Several take a part of it each in turn, and each fetches its share of the next part.
  void stream_panel(std::int64_t p) {
    const std::int64_t x_stride = a_.x_stride / Pack<T>::per_lane, sums_stride = panels_ * kPanel;
    const std::uint32_t* panel = static_cast<const std::uint32_t*>(a_.weight) + (first_ + p) * lanes_ * kPanel;
    float* c = sums_ + p * kPanel;
    if (a_.m <= kRowsPerPass<T>) {
      multiply_panel<T, false, 2>(unit_, row_of_x(0), x_stride, panel, c, sums_stride, static_cast<int>(a_.m),
                                  static_cast<int>(lanes_), {panel + kPrefetchLanes, kPanel});
      return;
    }
    const std::int64_t passes = (a_.m + cut_.tile_rows - 1) / cut_.tile_rows;
    const std::int64_t step = (kPanel + passes - 1) / passes;  // of the next part, per lane of this one
    for (std::int64_t k = 0; k < lanes_; k += kPartLanes) {
      const int lanes = static_cast<int>(least(kPartLanes, lanes_ - k));
      const std::uint32_t* part = panel + k * kPanel;
      Ahead ahead{part + lanes * kPanel, step};
      for (std::int64_t r = 0; r < a_.m; r += cut_.tile_rows, ahead.at += lanes * step) {
        const int rows = static_cast<int>(least(cut_.tile_rows, a_.m - r));
        const std::uint32_t* x = row_of_x(r) + k;
        k > 0 ? multiply_panel<T, true, 1>(unit_, x, x_stride, part, c + r * sums_stride, sums_stride, rows, lanes, ahead)
              : multiply_panel<T, false, 1>(unit_, x, x_stride, part, c + r * sums_stride, sums_stride, rows, lanes, ahead);
      }
    }
  }

  // Lanes [k, k + lanes) of some rows, for all panels of the task. The first tile brings the panels
  // into the cache for the others.
  void run_tile(std::int64_t row, int rows, std::int64_t k, int lanes, float* sums, bool from_memory) {
    // Rows a power of two apart would fall into the same few cache sets.
    for (int r = 0; r < rows; r++) {
      __builtin_memcpy(x_tile_ + r * kDepthStride, row_of_x(row + r) + k, static_cast<std::size_t>(lanes) * 4);
    }
    const std::uint32_t* x = x_tile_;
    constexpr std::int64_t x_stride = kDepthStride;
    const std::uint32_t* w = static_cast<const std::uint32_t*>(a_.weight) + first_ * lanes_ * kPanel;
    const std::int64_t sums_stride = panels_ * kPanel;
    for (std::int64_t p = 0; p < panels_; p++) {
      const std::uint32_t* panel = w + (p * lanes_ + k) * kPanel;
      float* c = sums + p * kPanel;
      const Ahead ahead{panel + lanes_ * kPanel, kPanel};  // the same lanes of the next one
      if (from_memory) {
        k > 0 ? multiply_panel<T, true, 2>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead)
              : multiply_panel<T, false, 2>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead);
      } else {
        k > 0 ? multiply_panel<T, true, 0>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead)
              : multiply_panel<T, false, 0>(unit_, x, x_stride, panel, c, sums_stride, rows, lanes, ahead);
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
