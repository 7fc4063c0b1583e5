// out = x w^T + bias for weights that are codes times scales (coded.h), x not rounded.
//
// For a few rows codes become bf16 or fp32 in registers, so that memory is read in the codes' width;
// for more, a few panels are decoded once and used for all rows. Sums of a group are taken in fp32,
// scaled and added group after group, the same way for any number of rows and threads.
#include "coded.h"
#include "decoding.h"
#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kStreamBytes = 64 * 1024;    // of the weight per task, when memory is the limit
constexpr std::int64_t kAheadBytes = 4096;          // of a panel, prefetched
constexpr std::int64_t kElementsPerThread = 32768;  // of the weight; below, a thread costs too much
constexpr std::int64_t kTasksPerThread = 4;         // at least, where panels are decoded first
// A register tile's rows, and its vectors of outputs per panel.
#if defined(__AVX512F__)
constexpr int kRows = 12, kVectors = 2;
#elif defined(SAPWOOD_NEON)
constexpr int kRows = 4, kVectors = 4;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// Panels that were decoded before.
template <class T>
struct Decoded {
  static constexpr int kSteps = 1;
  explicit Decoded(Codes) {}
  VU at(VU lane, int) const { return lane; }
};

// ---- products ----

// A weight as one pass reads it: groups' heads and lanes may lie in different places.
struct Streams {
  const std::byte* heads;
  const std::byte* lanes;
  std::int64_t head_step, lane_step;    // from group to group
  std::int64_t head_panel, lane_panel;  // from panel to panel
};

template <class T>
class Product {
 public:
  explicit Product(const CodedArgs& args)
      : a_(args), layout_(*args.weight->coded), e_(extent_of(layout_)),
        row_bytes_(prepared_row_bytes(layout_, sizeof(T))),
        panels_((args.weight->n + kPanel - 1) / kPanel),
        threads_(worth_threads(args.team.threads, args.weight->n * layout_.k * ((args.m + 7) / 8),
                               kElementsPerThread)) {}

  template <class Decode>
  void run() const {
    const Decode decode(layout_.codes);
    a_.m <= kDirectRows ? run_direct(decode) : run_decoded(decode);
  }

 private:
  static constexpr int kPerLane = Pack<T>::per_lane;

  // A row of x in the weight's order, filled up with zeros, then the groups' sums.
  void prepare(std::int64_t row, std::byte* to) const {
    const T* from = static_cast<const T*>(a_.x) + row * a_.x_stride;
    T* x = reinterpret_cast<T*>(to);
    if (layout_.order == nullptr) {
      __builtin_memcpy(x, from, static_cast<std::size_t>(layout_.k) * sizeof(T));
    } else {
      for (std::int64_t i = 0; i < layout_.k; i++) x[i] = from[layout_.order[i]];
    }
    __builtin_memset(x + layout_.k, 0, static_cast<std::size_t>(e_.padded - layout_.k) * sizeof(T));
    if (!layout_.shifted) return;
    float* sums = reinterpret_cast<float*>(x + e_.padded);
    for (std::int64_t group = 0; group < e_.groups; group++) sums[group] = sum_of(x, group);
  }

  float sum_of(const T* x, std::int64_t group) const {
    const std::int64_t end = least((group + 1) * e_.group, e_.padded);
    std::int64_t i = group * e_.group;
    VF sums{};
    for (; i + W <= end; i += W) sums += load(x + i);
    float total = sum(sums);
    for (; i < end; i++) total += to_float(x[i]);
    return total;
  }

  template <class Decode>
  void run_direct(const Decode& decode) const {
    const std::int64_t share = most(1, panels_ / (threads_ * 4));
    const std::int64_t stream = (most(1, kStreamBytes / e_.panel_bytes) + 3) / 4 * 4;
    const std::int64_t step = least(share, stream), tasks = (panels_ + step - 1) / step;
    Shares shares(tasks, threads_);
    run_parallel(a_.team, least(threads_, tasks), [&](int thread) {
      int helped = 0;
      // For a few rows it is cheaper to prepare them once per thread than to wait for another thread.
      std::byte* x = a_.scratch + thread * a_.m * row_bytes_;
      bool prepared = false;
      for (std::int64_t task; (task = shares.take_next(thread, &helped)) < tasks;) {
        for (std::int64_t row = 0; !prepared && row < a_.m; row++) prepare(row, x + row * row_bytes_);
        prepared = true;
        const std::int64_t first = task * step;
        multiply(decode, streams_of(first), x, 0, a_.m, first, least(step, panels_ - first));
      }
    });
  }

  template <class Decode>
  void run_decoded(const Decode& decode) const {
    std::byte* const x = a_.scratch;
    run_pieces(a_.team, threads_, a_.m, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; row++) prepare(row, x + row * row_bytes_);
    });
    const std::int64_t panel_lanes = e_.padded / kPerLane * kPanel * 4;
    // As many tasks for each thread, a few at least: the last one should not leave the others idle.
    const std::int64_t most_panels = decoded_panels(e_, sizeof(T));
    const std::int64_t rounds = most(kTasksPerThread, (panels_ + threads_ * most_panels - 1) / (threads_ * most_panels));
    const std::int64_t step = (panels_ + threads_ * rounds - 1) / (threads_ * rounds);
    const std::int64_t panel_tasks = (panels_ + step - 1) / step;
    // Rows are cut only where panels alone are too few: each cut decodes the weight again.
    const std::int64_t tiles = (a_.m + kRows - 1) / kRows;
    const std::int64_t cuts = most(1, least(tiles / 4, threads_ * 2 / panel_tasks));
    const std::int64_t rows = (tiles + cuts - 1) / cuts * kRows;
    const std::int64_t tasks = panel_tasks * ((a_.m + rows - 1) / rows);
    Shares shares(tasks, threads_);
    run_parallel(a_.team, least(threads_, tasks), [&](int thread) {
      int helped = 0;
      std::byte* decoded = x + a_.m * row_bytes_ + thread * decoded_panels(e_, sizeof(T)) * panel_lanes;
      for (std::int64_t task; (task = shares.take_next(thread, &helped)) < tasks;) {
        const std::int64_t first = task % panel_tasks * step, count = least(step, panels_ - first);
        const std::int64_t row = task / panel_tasks * rows;
        Streams streams = streams_of(first);
        for (std::int64_t i = 0; i < count; i++) {
          decode_panel(decode, streams.lanes + i * e_.panel_bytes, decoded + i * panel_lanes);
        }
        streams.lanes = decoded;
        streams.lane_step = e_.group / kPerLane * kPanel * 4;
        streams.lane_panel = panel_lanes;
        multiply(Decoded<T>(layout_.codes), streams, x, row, least(rows, a_.m - row), first, count);
      }
    });
  }

  Streams streams_of(std::int64_t panel) const {
    const std::byte* from = static_cast<const std::byte*>(a_.weight->data) + panel * e_.panel_bytes;
    return {from, from + e_.head_bytes, e_.group_bytes, e_.group_bytes, e_.panel_bytes, e_.panel_bytes};
  }

  std::int64_t inputs_of(std::int64_t group) const {
    return group + 1 < e_.groups ? e_.group : e_.padded - group * e_.group;
  }

  template <class Decode>
  void decode_panel(const Decode& decode, const std::byte* codes, std::byte* out) const {
    constexpr int kInputs = Decode::kSteps * kPerLane;  // of a lane of codes
    for (std::int64_t group = 0; group < e_.groups; group++) {
      const std::byte* from = codes + group * e_.group_bytes;
      for (std::int64_t i = inputs_of(group) / kInputs; i > 0; i--, from += kPanel * 4) {
        for (int v = 0; v < kPanel / W; v++) {
          const VU lane = load_lanes(from + v * W * 4);
          __builtin_prefetch(from + v * W * 4 + kAheadBytes, 0, 2);
#pragma GCC unroll 8
          for (int step = 0; step < Decode::kSteps; step++) {
            store_lanes(out + (step * kPanel + v * W) * 4, decode.at(lane, step));
          }
        }
        out += Decode::kSteps * kPanel * 4;
      }
    }
  }

  // Rows [row, row + rows) of x times panels [first, first + count), which begin at `streams`.
  template <class Decode>
  void multiply(const Decode& decode, Streams streams, const std::byte* x, std::int64_t row,
                std::int64_t rows, std::int64_t first, std::int64_t count) const {
    const std::int64_t tiles = (rows + kRows - 1) / kRows, height = (rows + tiles - 1) / tiles;
    for (std::int64_t r = 0; r < rows; r += height) {
      const std::int64_t from = row + r;
      const int tile = static_cast<int>(least(height, rows - r));
      Streams at = streams;
      for (std::int64_t p = 0; p < count;) {
        const int panels = multiply_panels(decode, at, x + from * row_bytes_, from, tile, (first + p) * kPanel, count - p);
        at.heads += panels * at.head_panel;
        at.lanes += panels * at.lane_panel;
        p += panels;
      }
    }
  }

  // Returns how many panels it did, of the `left` that there are.
  template <class Decode>
  int multiply_panels(const Decode& decode, const Streams& at, const std::byte* x, std::int64_t row,
                      int rows, std::int64_t column, std::int64_t left) const {
#if defined(__AVX512F__)
    // A sum waits for the one before it: several panels at once fill the time.
    if (rows == 1 && left >= 4) return tile<Decode, 1, 4>(decode, at, x, row, column, 0), 4;
    if (rows <= 2 && left >= 2) {
      rows == 1 ? tile<Decode, 1, 2>(decode, at, x, row, column, 0)
                : tile<Decode, 2, 2>(decode, at, x, row, column, 0);
      return 2;
    }
#else
    static_cast<void>(left);
#endif
    for (int within = 0; within < kPanel; within += kVectors * W) {
      switch (rows) {
#define SAPWOOD_ROWS(R) case R: tile<Decode, R, 1>(decode, at, x, row, column, within); break;
        SAPWOOD_ROWS(1) SAPWOOD_ROWS(2) SAPWOOD_ROWS(3) SAPWOOD_ROWS(4)
#if defined(__AVX512F__)
        SAPWOOD_ROWS(5) SAPWOOD_ROWS(6)
        default: tall_tile(decode, at, x, row, rows, column); break;
#endif
#undef SAPWOOD_ROWS
      }
    }
    return 1;
  }

#if defined(__AVX512F__)
  template <class Decode>
  void tall_tile(const Decode& decode, const Streams& at, const std::byte* x, std::int64_t row, int rows,
                 std::int64_t column) const {
    if constexpr (Decode::kSteps == 1) {  // more rows than kDirectRows come with decoded panels
      switch (rows) {
#define SAPWOOD_ROWS(R) case R: tile<Decode, R, 1>(decode, at, x, row, column, 0); break;
        SAPWOOD_ROWS(7) SAPWOOD_ROWS(8) SAPWOOD_ROWS(9) SAPWOOD_ROWS(10) SAPWOOD_ROWS(11) SAPWOOD_ROWS(12)
#undef SAPWOOD_ROWS
      }
    }
  }
#endif

  // R rows x V vectors of outputs, from column `within` of P panels on, over all groups.
  template <class Decode, int R, int P>
  void tile(const Decode& decode, const Streams& at, const std::byte* x, std::int64_t row,
            std::int64_t column, int within) const {
    constexpr int V = P * kVectors;
    constexpr int kInputs = Decode::kSteps * kPerLane;
    constexpr bool kStream = Decode::kSteps > 1;
    VF results[R][V] = {};
    const std::byte* left = x;
    for (std::int64_t group = 0; group < e_.groups; group++) {
      VF sums[R][V] = {};
      const std::byte* lanes = at.lanes + group * at.lane_step + within * 4;
      for (std::int64_t i = inputs_of(group) / kInputs; i > 0; i--, lanes += kPanel * 4) {
        VU codes[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
          const std::byte* from = lanes + v / kVectors * at.lane_panel + v % kVectors * W * 4;
          codes[v] = load_lanes(from);
          if (kStream) __builtin_prefetch(from + kAheadBytes, 0, 2);
        }
#pragma GCC unroll 8
        for (int step = 0; step < Decode::kSteps; step++, left += 4) {
          VU right[V];
#pragma GCC unroll 16
          for (int v = 0; v < V; v++) right[v] = decode.at(codes[v], step);
#pragma GCC unroll 16
          for (int r = 0; r < R; r++) {
            const Factor factor = load_factor(left + r * row_bytes_);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++) sums[r][v] = dot(tag<T>(), sums[r][v], factor, right[v]);
          }
        }
      }
      scale<R, V>(at, x, group, within, sums, results);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) {
        write(row + r, column + v / kVectors * kPanel + within + v % kVectors * W, results[r][v]);
      }
    }
  }

  // results += (sums + shift * the sum of x) * scale
  template <int R, int V>
  __attribute__((always_inline)) void scale(const Streams& at, const std::byte* x, std::int64_t group,
                                            int within, VF (&sums)[R][V], VF (&results)[R][V]) const {
    const std::byte* sums_of_x = x + e_.padded * static_cast<std::int64_t>(sizeof(T)) + group * 4;
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      const std::byte* head = at.heads + group * at.head_step + v / kVectors * at.head_panel;
      const int entry = within + v % kVectors * W;
      const VF scale = layout_.narrow ? load(reinterpret_cast<const bf16*>(head) + entry)
                                      : load(reinterpret_cast<const float*>(head) + entry);
      if (layout_.shifted) {
        const std::byte* shifts = head + (layout_.narrow ? 2 : 4) * kPanel;
        const VF shift = load(reinterpret_cast<const bf16*>(shifts) + entry);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const float sum_of_x = bits_as<float>(load_lane(sums_of_x + r * row_bytes_));
          sums[r][v] = shift * splat(sum_of_x) + sums[r][v];
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) results[r][v] = sums[r][v] * scale + results[r][v];
    }
  }

  void write(std::int64_t row, std::int64_t column, VF result) const {
    if (column >= a_.weight->n) return;
    if (a_.weight->scales != nullptr) result *= load(a_.weight->scales + column);
    a_.wide ? write_to(static_cast<float*>(a_.out), row, column, result)
            : write_to(static_cast<T*>(a_.out), row, column, result);
  }

  template <class Out>
  void write_to(Out* all, std::int64_t row, std::int64_t column, VF result) const {
    const LinearWeight& w = *a_.weight;
    Out* out = all + row * w.out_stride + column;
    const T* bias = w.bias == nullptr ? nullptr : static_cast<const T*>(w.bias) + column;
    if (column + W <= w.n) {
      store(out, bias == nullptr ? result : result + load(bias));
      return;
    }
    // Not inline: a tile has up to 24 results, and the compiler needs ten times as long where each has its
    // own copy of this loop.
    write_tail(out, bias, result, w.n - column);
  }

  const CodedArgs& a_;
  const CodedLayout& layout_;
  const Extent e_;
  const std::int64_t row_bytes_, panels_;
  const int threads_;
};

template <class T>
void multiply_any(const CodedArgs& args) {
  const Product<T> product(args);
  switch (args.weight->coded->codes) {
    case Codes::int8: product.template run<Int8<T>>(); break;
    case Codes::e4m3: product.template run<E4m3<T>>(); break;
    default: product.template run<Nibbles<T>>(); break;
  }
}

}  // namespace

void linear_coded(DType dtype, const CodedArgs& args) {
  dtype == DType::f32 ? multiply_any<float>(args) : multiply_any<bf16>(args);
}

}  // namespace sapwood::SAPWOOD_ISA
