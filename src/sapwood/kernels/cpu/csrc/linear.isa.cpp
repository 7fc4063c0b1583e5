// out = x w^T + bias, with the weight packed in panels of 32 outputs (pack.h).
//
// One layout serves every number of rows: a panel is one contiguous stream from memory when there
// are few rows, and the right operand of a register tile when there are many. Around the tile, a
// few rows of x stay in L1 and a chunk of panels in L2 while all rows pass over it. The matrix unit,
// where there is one, takes a panel as it lies, too.
//
// Products are of bf16 where the processor has them, fast, and both factors are bf16, else of fp32. A
// weight of 16 bits is then widened: in registers for a few rows, into a cache for more, so that
// memory is read in 16 bits. Each output adds its products in the order of the inputs, whatever the
// weight is stored as and however many rows there are: an fp32 copy of the weight gives the same bits.
//
// A weight in groups of quantised numbers is decoded into the cache likewise. That takes many rows to be
// faster than products of bytes (linear_grouped).
#include "grouped_panels.h"
#include "matrix.h"
#include "pack.h"
#include "resident.h"
#include "table.h"
#include "tile.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kVectorRows = 12;            // of x that share one pass over a panel, by vectors
constexpr std::int64_t kStreamBytes = 64 * 1024;    // of the weight per task, when memory is the limit
constexpr std::int64_t kStreamPanels = 64;          // of such a task, at most
constexpr std::int64_t kAheadBytes = 8192;          // prefetched in a stream: measured best of 1 to 16 KiB
constexpr std::int64_t kElementsPerThread = 32768;  // of the weight; below, a thread costs too much
#if defined(__AVX512F__)
constexpr std::int64_t kWidenedInRegisters = kVectorRows;  // up to so many rows
#else
constexpr std::int64_t kWidenedInRegisters = 2;
#endif
constexpr std::int64_t kOwnRows = 12;               // of x: up to so many, each thread widens them for itself
constexpr std::int64_t kTaskRows = 144;             // over panels that stay in L2
#if defined(__AVX512F__)
constexpr std::int64_t kTaskPanels = 8;
#else
constexpr std::int64_t kTaskPanels = 4;  // L2 has 256 KiB on older processors
#endif
constexpr std::int64_t kDepthLanes = 384;                // of k at a time: in a panel they take 48 KiB
constexpr std::int64_t kDepthStride = kDepthLanes + 16;  // copied rows start in different cache sets

// A few passes finish one part of a panel before the next part, which is fetched meanwhile, so that neither
// memory nor products wait. With more rows the products take so much longer that it is enough to read a
// task's panels during the first pass.
constexpr std::int64_t kMostStreamedRows = 96;
constexpr std::int64_t kPartLanes = 96;  // of k: with the rows of x they stay in the first-level cache

// Rows of x that share one pass over a panel.
#if defined(SAPWOOD_AMX)
template <class P>
constexpr std::int64_t kRowsPerPass = Pack<P>::per_lane == 2 ? kMostPassRows : kVectorRows;
constexpr int kStreamedLines = 2 * kUnitLanes;  // cache lines of 16 lanes of a panel
constexpr std::int64_t kMostRows = kMostPassRows;
#else
template <class P>
constexpr std::int64_t kRowsPerPass = kVectorRows;
constexpr std::int64_t kMostRows = kVectorRows;
#endif

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
constexpr bool kMultipliesBf16 = true;
#else
constexpr bool kMultipliesBf16 = false;
#endif

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

struct Groups {};  // what a weight is stored as, if in groups of any kind

template <class P, class S>
constexpr bool streams(std::int64_t m) {
  constexpr bool has_unit = kRowsPerPass<P> != kVectorRows;
  return !kSame<S, Groups> && m <= (has_unit ? kRowsPerPass<P> : kMostStreamedRows);
}

// Per thread: the sums of a task, a tile of x, widened panels.
constexpr std::int64_t kTaskSums = kTaskRows * kTaskPanels * kPanel;
constexpr std::int64_t kTileOfX = kMostRows * kDepthStride;
constexpr std::int64_t kWidened = kTaskPanels * kDepthLanes * kPanel;
constexpr std::int64_t kThreadFloats = kTaskSums + kTileOfX + kWidened;
static_assert(kTaskSums >= kMostRows * kPanel && kThreadFloats % 16 == 0);

// How the work is cut: a task is `panels` panels x `rows` rows, done `tile_rows` rows at a time.
struct Cut {
  std::int64_t panels, rows, tile_rows, panel_tasks, row_tasks;
};

template <class P, class S>
Cut cut_work(std::int64_t m, std::int64_t all_panels, std::int64_t k, int threads) {
  Cut cut{};
  const std::int64_t tiles = (m + kRowsPerPass<P> - 1) / kRowsPerPass<P>;
  const std::int64_t most_panels = least(kStreamPanels, kTaskSums / (tiles * kRowsPerPass<P> * kPanel));
  cut.tile_rows = (m + tiles - 1) / tiles;
  const std::int64_t share = most(1, all_panels / (threads * 4));
  const std::int64_t panel_bytes = k * kPanel * static_cast<std::int64_t>(sizeof(S));
  const std::int64_t stream = most(1, least(most_panels, kStreamBytes / panel_bytes));
  cut.panels = least(share, streams<P, S>(m) ? stream : kTaskPanels);
  cut.panel_tasks = (all_panels + cut.panels - 1) / cut.panels;
  const std::int64_t wanted = streams<P, S>(m) ? 1 : most(1, threads * 4 / cut.panel_tasks);
  const std::int64_t tiles_per_task = most(1, least(kTaskRows / kRowsPerPass<P>, tiles / wanted));
  cut.rows = tiles_per_task * cut.tile_rows;
  cut.row_tasks = (m + cut.rows - 1) / cut.rows;
  return cut;
}

// exact: sums are the same whatever the number of rows. The unit of Intel processors adds in an order that
// vectors do not have, so it then takes a single row, too; that of ARM processors adds as vectors do (mmla.h).
template <class P, bool kAdd, int kFetched>
SAPWOOD_INLINE void multiply_panel(MatrixUnit& unit, [[maybe_unused]] bool exact, const std::uint32_t* x,
                                   std::int64_t x_stride, const std::uint32_t* panel, float* c, std::int64_t c_stride,
                                   int rows, int lanes, const Ahead& ahead) {
#if defined(SAPWOOD_UNIT)
#if defined(SAPWOOD_AMX)
  if (uses_unit<P>(exact ? kLeastUnitRows : rows)) {
#else
  if (uses_unit<P>(rows)) {
#endif
#if defined(SAPWOOD_AMX)
    unit.multiply<kAdd>(x, x_stride, panel, kPanel, c, c_stride, rows, kPanel, lanes,
                        reinterpret_cast<const std::byte*>(ahead.at), kFetched > 0 ? kStreamedLines : 0);
#else
    unit.multiply<kAdd, kFetched>(x, x_stride, panel, kPanel, c, c_stride, rows, kPanel, lanes, ahead);
#endif
    return;
  }
#else
  static_cast<void>(unit);
#endif
  // All vectors of a panel, so that as many rows as registers allow share each load of it.
  constexpr int V = kPanel / W;
  switch (rows) {
#define SAPWOOD_ROWS(R) \
  case R: tile<P, kAdd, R, V, kFetched>(x, x_stride, panel, kPanel, c, c_stride, lanes, ahead); break;
    SAPWOOD_ROWS(1) SAPWOOD_ROWS(2)
#if defined(__AVX512F__)
    SAPWOOD_ROWS(3) SAPWOOD_ROWS(4) SAPWOOD_ROWS(5) SAPWOOD_ROWS(6) SAPWOOD_ROWS(7) SAPWOOD_ROWS(8)
    SAPWOOD_ROWS(9) SAPWOOD_ROWS(10) SAPWOOD_ROWS(11) SAPWOOD_ROWS(12)
    default: break;
#else
    default:
      multiply_tile<P, kAdd, kFetched>(x, x_stride, panel, kPanel, c, c_stride, rows, kPanel, lanes, ahead);
#endif
#undef SAPWOOD_ROWS
  }
}

// ---- weights of 16 bits as fp32 ----

// Calls body(input, vectors): the weights of each input for the 32 outputs of a panel, widened.
template <class Body>
SAPWOOD_INLINE void each_input(const bf16* panel, std::int64_t inputs, const Body& body) {
  constexpr int V = kPanel / W;
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < inputs; i += 2, panel += 2 * kPanel) {
    VU lanes[V];
    VF numbers[V];
    __builtin_prefetch(reinterpret_cast<const std::byte*>(panel) + kAheadBytes, 0, 2);
    __builtin_prefetch(reinterpret_cast<const std::byte*>(panel) + kAheadBytes + 64, 0, 2);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      lanes[v] = load_lanes(panel + 2 * v * W);
      numbers[v] = bits_as<VF>(lanes[v] << 16);
    }
    body(i, numbers);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) numbers[v] = bits_as<VF>(lanes[v] & 0xffff0000u);
    body(i + 1, numbers);
  }
}

template <class Body>
SAPWOOD_INLINE void each_input(const f16* panel, std::int64_t inputs, const Body& body) {
  constexpr int V = kPanel / W;
  for (std::int64_t i = 0; i < inputs; i++, panel += kPanel) {
    VF numbers[V];
    __builtin_prefetch(reinterpret_cast<const std::byte*>(panel) + kAheadBytes, 0, 2);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) numbers[v] = load(panel + v * W);
    body(i, numbers);
  }
}

// Inputs of a panel -> [inputs, 32] fp32.
template <class S>
static inline void widen(const S* panel, std::int64_t inputs, float* to) {
  each_input(panel, inputs, [&](std::int64_t i, const VF* numbers) {
#pragma GCC unroll 16
    for (int v = 0; v < kPanel / W; v++) store(to + i * kPanel + v * W, numbers[v]);
  });
}

// c[R, 32] = x[R, inputs] x a panel.
template <class S, int R>
static inline void widening_tile(const float* x, std::int64_t x_stride, const S* panel, float* c,
                                 std::int64_t c_stride, std::int64_t inputs) {
  constexpr int V = kPanel / W;
  VF sums[R][V] = {};
  each_input(panel, inputs, [&](std::int64_t i, const VF* numbers) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Factor left = load_factor(x + r * x_stride + i);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[r][v] = dot(tag<float>(), sums[r][v], left, bits_as<VU>(numbers[v]));
    }
  });
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(c + r * c_stride + v * W, sums[r][v]);
}

template <class S>
static inline void widening_tile_rows(const float* x, std::int64_t x_stride, const S* panel, float* c,
                                      std::int64_t c_stride, std::int64_t inputs, std::int64_t rows) {
  switch (rows) {
#define SAPWOOD_ROWS(R) \
  case R: widening_tile<S, R>(x, x_stride, panel, c, c_stride, inputs); break;
    SAPWOOD_ROWS(1) SAPWOOD_ROWS(2)
#if defined(__AVX512F__)
    SAPWOOD_ROWS(3) SAPWOOD_ROWS(4) SAPWOOD_ROWS(5) SAPWOOD_ROWS(6) SAPWOOD_ROWS(7) SAPWOOD_ROWS(8)
    SAPWOOD_ROWS(9) SAPWOOD_ROWS(10) SAPWOOD_ROWS(11) SAPWOOD_ROWS(12)
#endif
#undef SAPWOOD_ROWS
    default: break;
  }
}

// ---- weights in groups ----

typedef void (*Read)(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* out);

// Decodes lanes of a panel as products of P take them; null for a dense kind.
template <class P>
static Read reader_of(WeightKind kind) {
  switch (kind) {
#define SAPWOOD_KIND(kind) \
  case WeightKind::kind: return GroupedPanel<WeightKind::kind, P>::read;
    SAPWOOD_KIND(q8_0) SAPWOOD_KIND(q4_0) SAPWOOD_KIND(q4_1) SAPWOOD_KIND(q5_0) SAPWOOD_KIND(q5_1)
    SAPWOOD_KIND(q2_k) SAPWOOD_KIND(q3_k) SAPWOOD_KIND(q4_k) SAPWOOD_KIND(q5_k) SAPWOOD_KIND(q6_k)
    SAPWOOD_KIND(iq4_xs)
#undef SAPWOOD_KIND
    default: return nullptr;
  }
}

// ---- tasks ----

// Products of P; the weight is stored as S; bias and out are T.
template <class P, class S, class T>
class Linear {
 public:
  Linear(const LinearArgs& args, const P* x, std::int64_t x_stride, const Cut& cut, float* scratch)
      : a_(args), cut_(cut), x_(x), x_stride_(x_stride), sums_(scratch),
        x_tile_(reinterpret_cast<std::uint32_t*>(scratch + kTaskSums)),
        widened_(scratch + kTaskSums + kTileOfX), lanes_(args.k / kLaneInputs), read_(reader_of<P>(args.kind)) {}

  void run(std::int64_t task) {
    const std::int64_t all_panels = (a_.n + kPanel - 1) / kPanel;
    first_ = task % cut_.panel_tasks * cut_.panels;
    panels_ = least(cut_.panels, all_panels - first_);
    const std::int64_t row = task / cut_.panel_tasks * cut_.rows;
    const std::int64_t rows = least(cut_.rows, a_.m - row);
    if (streams<P, S>(a_.m)) {
      if constexpr (!kSame<S, Groups>) {
        for (std::int64_t p = 0; p < panels_; p++) stream_panel(p);
      }
    } else {
      for (std::int64_t k = 0; k < lanes_; k += kDepthLanes) {
        const int lanes = static_cast<int>(least(kDepthLanes, lanes_ - k));
        if constexpr (kWidens) {
          for (std::int64_t p = 0; p < panels_; p++) widen_panel(p, k, lanes, widened_ + p * kDepthLanes * kPanel);
        }
        for (std::int64_t r = 0; r < rows; r += cut_.tile_rows) {
          run_tile(row + r, static_cast<int>(least(cut_.tile_rows, rows - r)), k, lanes,
                   sums_ + r * panels_ * kPanel, r == 0);
        }
      }
    }
    const std::int64_t columns = least(a_.n - first_ * kPanel, panels_ * kPanel);
    for (std::int64_t r = 0; r < rows; r++) write_row(row + r, sums_ + r * panels_ * kPanel, columns);
  }

 private:
  static constexpr int kLaneInputs = Pack<P>::per_lane;
  static constexpr bool kWidens = !kSame<P, S>;

  const std::uint32_t* row_of_x(std::int64_t row) const {
    return reinterpret_cast<const std::uint32_t*>(x_ + row * x_stride_);
  }

  // Panel p of the task from lane k on.
  const S* stored(std::int64_t p, std::int64_t k) const {
    return static_cast<const S*>(a_.weight) + ((first_ + p) * lanes_ + k) * kLaneInputs * kPanel;
  }

  void widen_panel(std::int64_t p, std::int64_t k, std::int64_t lanes, float* to) const {
    if constexpr (kSame<S, Groups>) {
      const std::byte* panel = static_cast<const std::byte*>(a_.weight) + (first_ + p) * panel_bytes(a_.kind, a_.k);
      read_(panel, k, lanes, reinterpret_cast<std::uint32_t*>(to));
    } else {
      widen(stored(p, k), lanes, to);
    }
  }

  // Multiplies all rows of x with a panel, which is read once from beginning to end. A single pass takes
  // the panel as a whole. Several passes take it part by part, and each fetches its share of the next part.
  void stream_panel(std::int64_t p) {
    const std::int64_t x_stride = x_stride_ / kLaneInputs, sums_stride = panels_ * kPanel;
    float* c = sums_ + p * kPanel;
    const S* panel = stored(p, 0);
    if constexpr (kWidens) {
      if (a_.m <= kWidenedInRegisters) {
        return widening_tile_rows(x_, x_stride_, panel, c, sums_stride, lanes_, a_.m);
      }
    } else if (a_.m <= kRowsPerPass<P>) {
      const std::uint32_t* lanes = reinterpret_cast<const std::uint32_t*>(panel);
      multiply_panel<P, false, 2>(unit_, a_.exact, row_of_x(0), x_stride, lanes, c, sums_stride, static_cast<int>(a_.m),
                                  static_cast<int>(lanes_), {lanes + kAheadBytes / 4, kPanel});
      return;
    }
    const std::int64_t passes = (a_.m + cut_.tile_rows - 1) / cut_.tile_rows;
    // Lanes of 32 bits that the weights of one lane take as they are stored; fetches are counted in these.
    constexpr std::int64_t kStoredLanes = kPanel * kLaneInputs * static_cast<std::int64_t>(sizeof(S)) / 4;
    const std::int64_t step = (kStoredLanes + passes - 1) / passes;
    for (std::int64_t k = 0; k < lanes_; k += kPartLanes) {
      const int lanes = static_cast<int>(least(kPartLanes, lanes_ - k));
      const S* part = stored(p, k);
      const std::uint32_t* right = reinterpret_cast<const std::uint32_t*>(part);
      Ahead ahead{right + lanes * kStoredLanes, step};
      if constexpr (kWidens) {
        widen_panel(p, k, lanes, widened_);
        right = reinterpret_cast<const std::uint32_t*>(widened_);
      }
      for (std::int64_t r = 0; r < a_.m; r += cut_.tile_rows, ahead.at += lanes * step) {
        const int rows = static_cast<int>(least(cut_.tile_rows, a_.m - r));
        const std::uint32_t* x = row_of_x(r) + k;
        k > 0 ? multiply_panel<P, true, 1>(unit_, a_.exact, x, x_stride, right, c + r * sums_stride, sums_stride, rows, lanes, ahead)
              : multiply_panel<P, false, 1>(unit_, a_.exact, x, x_stride, right, c + r * sums_stride, sums_stride, rows, lanes, ahead);
      }
    }
  }

  // Multiplies lanes [k, k + lanes) of some rows with all panels of the task. The first tile brings the panels
  // into the cache for the others, unless they were widened before.
  void run_tile(std::int64_t row, int rows, std::int64_t k, int lanes, float* sums, bool is_first) {
    // Rows a power of two apart would fall into the same few cache sets.
    for (int r = 0; r < rows; r++) {
      __builtin_memcpy(x_tile_ + r * kDepthStride, row_of_x(row + r) + k, static_cast<std::size_t>(lanes) * 4);
    }
    const std::uint32_t* x = x_tile_;
    constexpr std::int64_t x_stride = kDepthStride;
    const std::int64_t sums_stride = panels_ * kPanel;
    for (std::int64_t p = 0; p < panels_; p++) {
      const std::uint32_t* panel =
          kWidens ? reinterpret_cast<const std::uint32_t*>(widened_ + p * kDepthLanes * kPanel)
                  : reinterpret_cast<const std::uint32_t*>(stored(p, k));
      float* c = sums + p * kPanel;
      const Ahead ahead{panel + lanes_ * kPanel, kPanel};  // the same lanes of the next panel
      if (!kWidens && is_first) {
        k > 0 ? multiply_panel<P, true, 2>(unit_, a_.exact, x, x_stride, panel, c, sums_stride, rows, lanes, ahead)
              : multiply_panel<P, false, 2>(unit_, a_.exact, x, x_stride, panel, c, sums_stride, rows, lanes, ahead);
      } else {
        k > 0 ? multiply_panel<P, true, 0>(unit_, a_.exact, x, x_stride, panel, c, sums_stride, rows, lanes, ahead)
              : multiply_panel<P, false, 0>(unit_, a_.exact, x, x_stride, panel, c, sums_stride, rows, lanes, ahead);
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
    Out* out = all + row * a_.out_stride + column;
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
  const P* x_;
  const std::int64_t x_stride_;
  float* sums_;            // [rows, panels * kPanel] of a task
  std::uint32_t* x_tile_;  // [kRowsPerPass, kDepthStride]
  float* widened_;         // [panels, kDepthLanes, kPanel], or a part of one panel
  const std::int64_t lanes_;
  const Read read_;                      // of groups
  std::int64_t first_ = 0, panels_ = 0;  // the task's panels
  MatrixUnit unit_;
};

// x_of(thread): the rows that this thread reads.
template <class P, class S, class T, class Rows>
void multiply(const LinearArgs& a, std::int64_t x_stride, float* scratch, const Rows& x_of) {
  const int threads = worth_threads(a.team.threads, a.n * a.k * ((a.m + 7) / 8), kElementsPerThread);
  const Cut cut = cut_work<P, S>(a.m, (a.n + kPanel - 1) / kPanel, a.k, threads);
  const std::int64_t tasks = cut.panel_tasks * cut.row_tasks;
  Shares shares(tasks, threads);
  run_parallel(a.team, least(threads, tasks), [&](int thread) {
    int helped = 0;
    Linear<P, S, T> linear(a, x_of(thread), x_stride, cut, scratch + thread * kThreadFloats);
    for (std::int64_t i; (i = shares.take_next(thread, &helped)) < tasks;) linear.run(i);
  });
}

template <class P, class S, class T>
void multiply(const LinearArgs& a, const P* x, float* scratch) {
  multiply<P, S, T>(a, a.x_stride, scratch, [x](int) { return x; });
}

// Floats of a copy of x in fp32; whole cache lines.
constexpr std::int64_t copy_floats(std::int64_t m, std::int64_t k) { return (m * k + 15) / 16 * 16; }

// A thread that reads what another one has just written waits 0.1 us for each line of the cache, which
// is more than widening a few rows itself.
constexpr bool has_own_copies(std::int64_t m) { return m <= kOwnRows; }

void widen_rows(const LinearArgs& a, std::int64_t begin, std::int64_t end, float* wide) {
  for (std::int64_t row = begin; row < end; row++) {
    const bf16* from = static_cast<const bf16*>(a.x) + row * a.x_stride;
    float* to = wide + row * a.k;
    std::int64_t i = 0;
    for (; i + W <= a.k; i += W) store(to + i, load(from + i));
    for (; i < a.k; i++) to[i] = to_float(from[i]);
  }
}

// x of bf16 and a weight stored as S, by products of fp32.
template <class S>
void multiply_widened(const LinearArgs& a) {
  float* wide = reinterpret_cast<float*>(a.scratch);
  const std::int64_t copy = copy_floats(a.m, a.k);
  if (has_own_copies(a.m)) {
    return multiply<float, S, bf16>(a, a.k, wide + a.team.threads * copy, [&](int thread) {
      float* own = wide + thread * copy;
      widen_rows(a, 0, a.m, own);
      return own;
    });
  }
  const int threads = worth_threads(a.team.threads, a.m * a.k, kElementsPerThread);
  run_pieces(a.team, threads, a.m, [&](std::int64_t begin, std::int64_t end) { widen_rows(a, begin, end, wide); });
  multiply<float, S, bf16>(a, a.k, wide + copy, [wide](int) { return wide; });
}

#if defined(SAPWOOD_AMX)
// A weight of bf16, which multiply_many() reads as it lies.
struct DensePanels {
  static constexpr bool kFetches = true;
  const std::uint32_t* weight;
  std::int64_t lanes;

  Panels read(std::int64_t first, std::int64_t, std::int64_t lane, std::int64_t, std::uint32_t*) const {
    return {weight + (first * lanes + lane) * kPanel, lanes * kPanel};
  }
};

void multiply_many(const LinearArgs& a) {
  const ManyRows rows{static_cast<const bf16*>(a.x), a.x_stride, a.m, a.n, a.k, a.scratch, a.team};
  const int threads = worth_threads(a.team.threads, a.n * a.k * ((a.m + 7) / 8), kElementsPerThread);
  multiply_many(rows, threads, DensePanels{static_cast<const std::uint32_t*>(a.weight), a.k / 2},
                [&](std::int64_t row, std::int64_t column, const float* sums, std::int64_t n) {
                  write_row(sums, n, nullptr, a.bias, a.wide, a.out, a.out_stride, row, column);
                });
}
#endif

}  // namespace

void linear(DType dtype, const LinearArgs& a) {
  float* scratch = reinterpret_cast<float*>(a.scratch);
  if (!is_dense(a.kind)) {
    if (dtype == DType::f32) return multiply<float, Groups, float>(a, static_cast<const float*>(a.x), scratch);
    if constexpr (kMultipliesBf16) {
      if (!a.widens) return multiply<bf16, Groups, bf16>(a, static_cast<const bf16*>(a.x), scratch);
    }
    return multiply_widened<Groups>(a);
  }
  if (dtype == DType::bf16) {
#if defined(SAPWOOD_AMX)
    if (!a.widens && a.m > kMostPassRows) return multiply_many(a);
#endif
    if constexpr (kMultipliesBf16) {
      if (!a.widens) return multiply<bf16, bf16, bf16>(a, static_cast<const bf16*>(a.x), scratch);
    }
    return multiply_widened<bf16>(a);
  }
  const float* x = static_cast<const float*>(a.x);
  switch (a.kind) {
    case WeightKind::bf16: multiply<float, bf16, float>(a, x, scratch); break;
    case WeightKind::f16: multiply<float, f16, float>(a, x, scratch); break;
    default: multiply<float, float, float>(a, x, scratch);
  }
}

std::size_t linear_scratch(DType dtype, WeightKind, std::int64_t m, std::int64_t k, int threads) {
  const std::int64_t copies = dtype != DType::bf16 ? 0 : has_own_copies(m) ? threads : 1;
  const std::int64_t wide = copies * copy_floats(m, k);
  std::size_t bytes = static_cast<std::size_t>(wide + threads * kThreadFloats) * sizeof(float);
#if defined(SAPWOOD_AMX)
  bytes = most(bytes, threads * kThreadBytes);
#endif
  return bytes;
}

}  // namespace sapwood::SAPWOOD_ISA
