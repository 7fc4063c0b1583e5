// out = x w^T + bias for any number of rows of bf16 and codes times scales (coded.h), on the matrix unit: a
// row's result depends on that row and the weight alone.
//
// The values of codes, which bf16 holds exactly, are multiplied with x as it is; the sums of a run, which are inputs
// that share a scale, are scaled and added in fp32, run after run. One row goes the same way as a thousand: what
// differs is only how much of a weight becomes bf16 before rows pass over it, and that does not change a number.
#include <cstring>

#include "coded.h"
#include "decoding.h"
#include "resident.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 32768;   // of the weight; below, a thread costs too much
constexpr std::int64_t kAheadBytes = 4096;           // of a panel, prefetched
constexpr std::int64_t kStreamBytes = 32 * 1024;     // of the weight per task, with a single tile of rows
constexpr std::int64_t kMostRunLanes = 128;          // a scale of more inputs counts as several runs'
constexpr std::int64_t kSmallBlockLanes = 128;       // of a panel at a time, with a single tile of rows
constexpr std::int64_t kTileSums = kMostPassRows * kPanel;
constexpr std::int64_t kGatheredRuns = 4;            // whose sums are added to the results in one pass
constexpr int kVectors = kPanel / W;
static_assert(kVectors == 2);

// What the kernel knows of a weight.
struct Shape {
  std::int64_t k = 0, lanes = 0;  // of all inputs
  std::int64_t run = 0;           // lanes of a run; 0: the weight is not for this kernel
  std::int64_t panel_bytes = 0;

  std::int64_t runs() const { return lanes / run; }
  // Bytes of a prepared row: x in the order of the lanes, then the sum of each run. An odd number of cache lines.
  std::int64_t row_bytes() const {
    const std::int64_t lines = (lanes * 4 + runs() * 4 + 63) / 64;
    return (lines % 2 == 0 ? lines + 1 : lines) * 64;
  }
};

Shape shape_of(const LinearWeight& w) {
  Shape shape;
  shape.k = w.k;
  shape.lanes = w.k / 2;
  if (w.kind != WeightKind::coded) return shape;
  const Extent e = extent_of(*w.coded);
  const std::int64_t group = least(e.group, e.padded);
  shape.panel_bytes = e.panel_bytes;
  if (e.padded != w.k || group % (2 * kUnitLanes) != 0 || w.k % group != 0) return shape;
  const std::int64_t units = group / 2 / kUnitLanes;
  for (std::int64_t i = 1; i <= kMostRunLanes / kUnitLanes; i++) {
    if (units % i == 0) shape.run = i * kUnitLanes;
  }
  return shape;
}

// ---- weights: read() writes lanes [lane, lane + lanes) of a panel, which are whole runs, to `digits`, and for each
// run 32 scales and 32 factors of the sum of x to `scales` ----

SAPWOOD_INLINE void put_scales(float* scales, const VF (&scale)[kVectors], const VF (&of_sum)[kVectors]) {
  for (int v = 0; v < kVectors; v++) {
    store(scales + v * W, scale[v]);
    store(scales + kPanel + v * W, of_sum[v]);
  }
}

template <class Decode>
struct CodedBlocks {
  explicit CodedBlocks(const LinearWeight& weight)
      : layout(*weight.coded), e(extent_of(layout)), decode(layout.codes), run(2 * shape_of(weight).run) {}

  void read(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* digits,
            float* scales) const {
    constexpr std::int64_t kInputs = 2 * Decode::kSteps;  // of a lane of codes
    for (std::int64_t input = 2 * lane; input < 2 * (lane + lanes); input += run, scales += 2 * kPanel) {
      const std::int64_t group = input / e.group;
      const std::byte* head = panel + group * e.group_bytes;
      const std::byte* from = head + e.head_bytes + (input - group * e.group) / kInputs * kPanel * 4;
      VF scale[kVectors], of_sum[kVectors] = {};
      for (int v = 0; v < kVectors; v++) {
        scale[v] = layout.narrow ? load(reinterpret_cast<const bf16*>(head) + v * W)
                                 : load(reinterpret_cast<const float*>(head) + v * W);
        const std::byte* shifts = head + (layout.narrow ? 2 : 4) * kPanel;
        if (layout.shifted) of_sum[v] = load(reinterpret_cast<const bf16*>(shifts) + v * W) * scale[v];
      }
      put_scales(scales, scale, of_sum);
      for (std::int64_t i = 0; i < run; i += kInputs, from += kPanel * 4, digits += Decode::kSteps * kPanel) {
        for (int v = 0; v < kVectors; v++) {
          const VU codes = load_lanes(from + v * W * 4);
          __builtin_prefetch(from + v * W * 4 + kAheadBytes, 0, 2);
#pragma GCC unroll 4
          for (int step = 0; step < Decode::kSteps; step++) {
            store_lanes(digits + step * kPanel + v * W, decode.at(codes, step));
          }
        }
      }
    }
  }

  const CodedLayout& layout;
  const Extent e;
  const Decode decode;
  const std::int64_t run;
};

// ---- x ----

void prepare_row(const bf16* x, const Shape& shape, const std::int32_t* order, std::byte* out) {
  if (order != nullptr) {
    for (std::int64_t i = 0; i < shape.k; i++) std::memcpy(out + 2 * i, x + order[i], 2);
  } else {
    std::memcpy(out, x, static_cast<std::size_t>(2 * shape.k));
  }
  const bf16* row = reinterpret_cast<const bf16*>(out);
  float* sums = reinterpret_cast<float*>(out + 4 * shape.lanes);
  for (std::int64_t run = 0; run < shape.runs(); run++) {
    VF added{};
    for (std::int64_t i = 0; i < 2 * shape.run; i += W) added += load(row + 2 * run * shape.run + i);
    sums[run] = sum(added);
  }
}

// ---- work ----

// A task is `panels` panels x `task_tiles` tiles of `height` rows; a panel is read `block` lanes at a time.
struct Cut {
  std::int64_t block, blocks, panels, groups, height, tiles, task_tiles, row_tasks;
  int threads;

  Cut(const Shape& shape, std::int64_t n, std::int64_t m, int all_threads) {
    const auto pieces = [](std::int64_t all, std::int64_t of) { return (all + of - 1) / of; };
    threads = worth_threads(all_threads, n * shape.k * ((m + 7) / 8), kElementsPerThread);
    const std::int64_t all_panels = pieces(n, kPanel);
    const std::int64_t step = shape.run;
    tiles = pieces(m, kMostPassRows);
    height = pieces(m, tiles);
    tiles = pieces(m, height);
    blocks = pieces(shape.lanes, tiles == 1 ? most(kSmallBlockLanes, step) : kBlockLanes);
    block = pieces(pieces(shape.lanes, blocks), step) * step;
    blocks = pieces(shape.lanes, block);
    if (tiles == 1) {
      const std::int64_t share = most(1, all_panels / (threads * kTasksPerThread));
      panels = least(least(share, kMostPanels), most(1, kStreamBytes / shape.panel_bytes));
      groups = pieces(all_panels, panels);
      row_tasks = task_tiles = 1;
      return;
    }
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

// Scratch memory of a thread: results of the tiles that wait, numbers and scales of a group of panels, sums.
constexpr std::int64_t kScaleFloats = kGroupLanes / 8 * 2 * kPanel;
constexpr std::int64_t kOwnBytes =
    (kWaitingTiles * kTileSums + kGroupLanes * kPanel + kScaleFloats + 2 * kGatheredRuns * kTileSums) * 4;

template <class Weight>
class Digits {
 public:
  Digits(const QuantizedArgs& args, const Shape& shape, const Cut& cut, const Weight& weight, std::byte* own)
      : a_(args), shape_(shape), cut_(cut), weight_(weight), results_(reinterpret_cast<float*>(own)),
        digits_(reinterpret_cast<std::uint32_t*>(results_ + kWaitingTiles * kTileSums)),
        scales_(reinterpret_cast<float*>(digits_ + kGroupLanes * kPanel)), sums_(scales_ + kScaleFloats) {}

  void run(std::int64_t task, const std::byte* x) {
    const std::int64_t group = task / cut_.row_tasks, first = group * cut_.panels;
    const std::int64_t count = least(cut_.panels, (a_.weight->n + kPanel - 1) / kPanel - first);
    const std::int64_t first_tile = task % cut_.row_tasks * cut_.task_tiles;
    const std::int64_t last_tile = least(first_tile + cut_.task_tiles, cut_.tiles);
    const std::byte* data = static_cast<const std::byte*>(a_.weight->data) + first * shape_.panel_bytes;
    if (cut_.tiles == 1) {  // a panel is one stream from memory: it is finished before the next one
      for (std::int64_t p = 0; p < count; p++) {
        for (std::int64_t lane = 0; lane < shape_.lanes; lane += cut_.block) {
          const std::int64_t lanes = least(cut_.block, shape_.lanes - lane);
          weight_.read(data + p * shape_.panel_bytes, lane, lanes, digits_, scales_);
          multiply(x, static_cast<int>(a_.m), lane, lanes, 0, results_ + p * kTileSums);
        }
      }
      write(0, first, count, results_);
      return;
    }
    for (std::int64_t lane = 0; lane < shape_.lanes; lane += cut_.block) {
      const std::int64_t lanes = least(cut_.block, shape_.lanes - lane);
      if (group != group_ || cut_.blocks > 1) {
        for (std::int64_t p = 0; p < count; p++) {
          weight_.read(data + p * shape_.panel_bytes, lane, lanes, digits_ + p * cut_.block * kPanel,
                       scales_ + p * cut_.block / shape_.run * 2 * kPanel);
        }
      }
      for (std::int64_t tile = first_tile; tile < last_tile; tile++) {
        const std::int64_t row = tile * cut_.height;
        const int rows = static_cast<int>(least(cut_.height, a_.m - row));
        float* results = results_ + (cut_.blocks > 1 ? (tile - first_tile) * count * kTileSums : 0);
        for (std::int64_t p = 0; p < count; p++) {
          multiply(x + row * shape_.row_bytes(), rows, lane, lanes, p, results + p * kTileSums);
        }
        if (lane + lanes == shape_.lanes) write(row, first, count, results);
      }
    }
    group_ = group;
  }

 private:
  // results [rows, 32] (+)= some rows of x times lanes of a panel, the p-th of those that were read. The sums of the
  // next runs are on their way in the unit while those of the runs before are added.
  void multiply(const std::byte* x, int rows, std::int64_t lane, std::int64_t lanes, std::int64_t p, float* results) {
    if (lane == 0) std::memset(results, 0, static_cast<std::size_t>(rows * kPanel * 4));
    const std::int64_t runs = lanes / shape_.run, stride = shape_.row_bytes();
    const std::uint32_t* digits = digits_ + p * cut_.block * kPanel;
    const float* scales = scales_ + p * cut_.block / shape_.run * 2 * kPanel;
    const std::byte* sums_of_x = x + 4 * shape_.lanes + lane / shape_.run * 4;
    const auto product = [&](std::int64_t run) {
      float* sums = sums_ + run % (2 * kGatheredRuns) * kTileSums;
      unit_.multiply_run(x + (lane + run * shape_.run) * 4, stride, digits + run * shape_.run * kPanel, sums, rows,
                         static_cast<int>(shape_.run));
    };
    for (std::int64_t run = 0; run < least(kGatheredRuns, runs); run++) product(run);
    for (std::int64_t run = 0; run < runs; run += kGatheredRuns) {
      const std::int64_t now = least(kGatheredRuns, runs - run);
      const float* sums = sums_ + run % (2 * kGatheredRuns) * kTileSums;
      for (std::int64_t i = 0; i < kGatheredRuns; i++) {
        if (run + kGatheredRuns + i < runs) product(run + kGatheredRuns + i);
        const int begin = static_cast<int>(rows * i / kGatheredRuns);
        const int end = static_cast<int>(rows * (i + 1) / kGatheredRuns);
        add(now, sums, scales + run * 2 * kPanel, sums_of_x + run * 4, begin, end, results);
      }
    }
  }

  void add(std::int64_t runs, const float* sums, const float* scales, const std::byte* sums_of_x, int begin, int end,
           float* results) const {
    switch (runs) {
      case 4: return add_runs<4>(sums, scales, sums_of_x, begin, end, results);
      case 3: return add_runs<3>(sums, scales, sums_of_x, begin, end, results);
      case 2: return add_runs<2>(sums, scales, sums_of_x, begin, end, results);
      default: add_runs<1>(sums, scales, sums_of_x, begin, end, results);
    }
  }

  template <int kRuns>
  void add_runs(const float* sums, const float* scales, const std::byte* sums_of_x, int begin, int end,
                float* results) const {
    VF scale[kRuns][kVectors], of_sum[kRuns][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRuns; i++) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) {
        scale[i][v] = load(scales + i * 2 * kPanel + v * W);
        of_sum[i][v] = load(scales + (i * 2 + 1) * kPanel + v * W);
      }
    }
    const std::int64_t stride = shape_.row_bytes();
    for (int r = begin; r < end; r++) {
      VF result[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) result[v] = load(results + r * kPanel + v * W);
#pragma GCC unroll 4
      for (int i = 0; i < kRuns; i++) {
        const VF sum_of_x = splat(bits_as<float>(load_lane(sums_of_x + r * stride + i * 4)));
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) {
          result[v] = load(sums + i * kTileSums + r * kPanel + v * W) * scale[i][v] + result[v];
          result[v] = sum_of_x * of_sum[i][v] + result[v];
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) store(results + r * kPanel + v * W, result[v]);
    }
  }

  void write(std::int64_t row, std::int64_t first, std::int64_t count, const float* results) const {
    const LinearWeight& w = *a_.weight;
    const std::int64_t rows = least(cut_.height, a_.m - row);
    for (std::int64_t p = 0; p < count; p++, results += kTileSums) {
      const std::int64_t column = (first + p) * kPanel;
      for (std::int64_t r = 0; r < rows; r++) {
        write_row(results + r * kPanel, least(kPanel, w.n - column), w.scales, w.bias, a_.wide, a_.out, w.out_stride,
                  row + r, column);
      }
    }
  }

  const QuantizedArgs& a_;
  const Shape& shape_;
  const Cut& cut_;
  const Weight& weight_;
  float* results_;          // [tiles, panels, rows, 32] of a task
  std::uint32_t* digits_;   // [panels, lanes of a block, 32]
  float* scales_;           // [panels, runs of a block, 2, 32]
  float* sums_;             // [2 * kGatheredRuns, rows, 32]
  std::int64_t group_ = -1; // whose panels were read
  MatrixUnit unit_;
};

// For a few rows it is cheaper to prepare them once per thread than to wait for another thread.
constexpr bool has_own_rows(std::int64_t m) { return m <= 12; }

template <class Weight>
bool multiply(const QuantizedArgs& a) {
  const LinearWeight& w = *a.weight;
  const Shape shape = shape_of(w);
  const Cut cut(shape, w.n, a.m, a.team.threads);
  const Weight weight(w);
  const std::int64_t row_bytes = shape.row_bytes();
  const std::int32_t* order = w.coded->order;
  std::byte* const shared = a.scratch + a.team.threads * kOwnBytes;
  const auto prepare = [&](std::int64_t begin, std::int64_t end, std::byte* to) {
    for (std::int64_t row = begin; row < end; row++) {
      prepare_row(static_cast<const bf16*>(a.x) + row * a.x_stride, shape, order, to + row * row_bytes);
    }
  };
  const bool own = has_own_rows(a.m);
  if (!own) {
    run_pieces(a.team, cut.threads, a.m, [&](std::int64_t begin, std::int64_t end) { prepare(begin, end, shared); });
  }
  const std::int64_t tasks = cut.groups * cut.row_tasks;
  Shares shares(tasks, cut.threads);
  run_parallel(a.team, least(cut.threads, tasks), [&](int thread) {
    int helped = 0;
    std::byte* x = shared + (own ? thread * a.m * row_bytes : 0);
    bool is_prepared = !own;
    Digits<Weight> mine(a, shape, cut, weight, a.scratch + thread * kOwnBytes);
    for (std::int64_t task; (task = shares.take_next(thread, &helped)) < tasks;) {
      if (!is_prepared) prepare(0, a.m, x);
      is_prepared = true;
      mine.run(task, x);
    }
  });
  return true;
}

}  // namespace

bool linear_digits(const QuantizedArgs& a) {
  switch (a.weight->coded->codes) {
    case Codes::int8: return multiply<CodedBlocks<Int8<bf16>>>(a);
    case Codes::e4m3: return multiply<CodedBlocks<E4m3<bf16>>>(a);
    default: return multiply<CodedBlocks<Nibbles<bf16>>>(a);
  }
}

std::size_t linear_digits_scratch(const LinearWeight& weight, std::int64_t m, int threads) {
  const Shape shape = shape_of(weight);
  if (shape.run == 0) return 0;
  const std::int64_t copies = has_own_rows(m) ? threads : 1;
  return static_cast<std::size_t>(threads * kOwnBytes + copies * m * shape.row_bytes());
}

}  // namespace sapwood::SAPWOOD_ISA
