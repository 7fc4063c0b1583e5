// out = x w^T + bias for any number of rows of bf16 and a quantised weight (digits.h), on the matrix unit: a row's
// result depends on that row and the weight alone.
//
// Up to two rows are multiplied by vectors, in the order in which the unit adds: of 16 lanes the first halves and the
// second ones apart, from zero, then the two, then what was there before. Like the unit, all of this file takes
// denormal numbers for 0, which the unit does whatever the thread's mode is.
// The numbers of a weight, which bf16 holds exactly, are multiplied with x: of codes as it is, of blocks rounded to whole
// multiples of a power of two per group (whole_step), so that fp32 holds the sums in any order and the vectors that
// multiply bytes for fewer rows (linear_grouped) find the same. The sums of a run, which are inputs that share a scale,
// are scaled and added in fp32, run after run. One row goes the same way as a thousand: what
// differs is only how much of a weight becomes bf16 before rows pass over it, and that does not change a number.
#include "digits.h"
#include "resident.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 32768;   // of the weight; below, a thread costs too much
constexpr std::int64_t kStreamBytes = 32 * 1024;     // of the weight per task, with a single tile of rows
constexpr std::int64_t kTaskLanes = kBlockLanes;     // of a panel at a time, with several tiles
constexpr std::int64_t kTileSums = kMostPassRows * kPanel;
constexpr std::int64_t kVectorRows = 2;              // up to so many are multiplied by vectors
constexpr std::int64_t kWaitingRuns = 4;             // whose sums are in memory
constexpr std::int64_t kReadSteps = 4, kReadRuns = 8;  // that are kept of a panel that is read while rows pass over it
static_assert(kStepLanes == kUnitLanes);

// ---- x ----

// x rounded to whole multiples of a power of two for each group of inputs. NaN or infinity makes a group NaN.
void make_whole(const bf16* x, const Shape& shape, bf16* out) {
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (std::int64_t i = 0; i < shape.k; i += kGroup) {
    const float most = magnitude(x + i, kGroup);
    const bool is_number = most < __builtin_inff();
    const float step = most < kLeastMagnitude ? 0.0f : is_number ? whole_step(most, static_cast<int>(shape.bits)) : __builtin_nanf("");
    const VF inverse = splat(step == 0.0f ? 0.0f : 1.0f / step);
    for (std::int64_t j = i; j < i + kGroup; j += W) {
      const VF whole = rounded(rounded(load(x + j) * inverse) + magic) - magic;
      store(out + j, whole * splat(step));
    }
  }
}

void prepare_row(const bf16* x, const Shape& shape, const std::int32_t* order, std::byte* out) {
  bf16* row = reinterpret_cast<bf16*>(out);
  if (order != nullptr) {
    for (std::int64_t i = 0; i < shape.k; i++) std::memcpy(out + 2 * i, x + order[i], 2);
  } else if (shape.bits > 0) {
    make_whole(x, shape, row);
  } else {
    std::memcpy(out, x, static_cast<std::size_t>(2 * shape.k));
  }
  if (shape.sums) {
    float* sums = reinterpret_cast<float*>(out + 4 * shape.lanes);
    for (std::int64_t input = 0; input < shape.k; input += 2 * shape.run) {
      VF added{};
      for (std::int64_t i = 0; i < 2 * shape.run; i += W) added += load(row + input + i);
      *sums++ = sum(added);
    }
  }
  if (!shape.swaps) return;
  for (std::int64_t lane = 0; lane < shape.lanes; lane += W) {
    const __m512i four = _mm512_loadu_si512(out + 4 * lane);
    _mm512_storeu_si512(out + 4 * lane, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(four, 0xd8), 0xd8));
  }
}

// ---- work ----

// A task is `panels` panels x `task_tiles` tiles of `height` rows; a panel is read `block` lanes at a time.
struct DigitsCut {
  std::int64_t block, blocks, panels, groups, height, tiles, task_tiles, row_tasks;
  int threads;

  DigitsCut(const Shape& shape, std::int64_t n, std::int64_t m, int all_threads) {
    const auto pieces = [](std::int64_t all, std::int64_t of) { return (all + of - 1) / of; };
    threads = worth_threads(all_threads, n * shape.k * ((m + 7) / 8), kElementsPerThread);
    const std::int64_t all_panels = pieces(n, kPanel);
    tiles = pieces(m, kMostPassRows);
    height = pieces(m, tiles);
    tiles = pieces(m, height);
    if (tiles == 1) {
      const std::int64_t share = most(1, all_panels / (threads * kTasksPerThread));
      panels = least(least(share, kMostPanels), most(1, kStreamBytes / shape.panel_bytes));
      groups = pieces(all_panels, panels);
      block = shape.lanes;
      blocks = row_tasks = task_tiles = 1;
      return;
    }
    blocks = pieces(shape.lanes, kTaskLanes);
    block = pieces(pieces(shape.lanes, blocks), shape.run) * shape.run;
    blocks = pieces(shape.lanes, block);
    const std::int64_t wanted = threads * (tiles < 2 * kTasksPerThread ? kTasksPerThread : 1);
    const std::int64_t fit = most(1, least(kMostPanels, kGroupLanes / block));
    panels = pieces(all_panels, pieces(most(wanted, pieces(all_panels, fit)), threads) * threads);
    groups = pieces(all_panels, panels);
    row_tasks = most(1, least(tiles, threads * kTasksPerThread / groups));
    if (blocks > 1) row_tasks = most(row_tasks, pieces(tiles, kWaitingTiles / panels));
    task_tiles = pieces(tiles, row_tasks);
    row_tasks = pieces(tiles, task_tiles);
  }
};

// Scratch memory of a thread: results of the tiles that wait, numbers and scales of a group of panels, sums.
constexpr std::int64_t kScaleFloats = kGroupLanes * 5;
constexpr std::int64_t kStagger = kTileSums / 2;  // sums are not a multiple of a page from the results of their rows
constexpr std::int64_t kOwnBytes =
    (kWaitingTiles * kTileSums + kGroupLanes * kPanel + kScaleFloats + kStagger + kWaitingRuns * kTileSums) * 4;

// sum += a * b, of b in memory: compilers would pick it from a register by shuffles, which cost more.
SAPWOOD_INLINE void add_product(VF& sum, VF a, const float& b) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(b));
}

template <class Weight>
class Digits {
 public:
  Digits(const QuantizedArgs& args, const Shape& shape, const DigitsCut& cut, const Weight& weight, std::byte* own)
      : a_(args), shape_(shape), cut_(cut), weight_(weight), row_bytes_(shape.row_bytes()),
        run_steps_(shape.run / kStepLanes), run_scales_((shape.sums ? 2 : 1) * kPanel), results_(reinterpret_cast<float*>(own)),
        digits_(reinterpret_cast<std::uint32_t*>(results_ + kWaitingTiles * kTileSums)),
        scales_(reinterpret_cast<float*>(digits_ + kGroupLanes * kPanel)), sums_(scales_ + kScaleFloats + kStagger) {}

  void run(std::int64_t task, const std::byte* x) {
    const std::int64_t group = task / cut_.row_tasks, first = group * cut_.panels;
    const std::int64_t count = least(cut_.panels, (a_.weight->n + kPanel - 1) / kPanel - first);
    const std::byte* data = static_cast<const std::byte*>(a_.weight->data) + first * shape_.panel_bytes;
    if (cut_.tiles == 1) {  // a panel is one stream from memory: it is finished before the next one
      for (std::int64_t p = 0; p < count; p++) {
        if (a_.m <= kVectorRows) {
          const std::byte* panel = data + p * shape_.panel_bytes;
          a_.m == 1 ? few_rows<1>(panel, x, results_ + p * kTileSums) : few_rows<2>(panel, x, results_ + p * kTileSums);
          continue;
        }
        const Part part{data + p * shape_.panel_bytes, 0, shape_.lanes / kStepLanes, digits_, scales_};
        multiply<true>(part, x, static_cast<int>(a_.m), results_ + p * kTileSums);
      }
      write(0, first, count, results_);
      return;
    }
    const std::int64_t first_tile = task % cut_.row_tasks * cut_.task_tiles;
    const std::int64_t last_tile = least(first_tile + cut_.task_tiles, cut_.tiles);
    for (std::int64_t lane = 0; lane < shape_.lanes; lane += cut_.block) {
      const std::int64_t lanes = least(cut_.block, shape_.lanes - lane);
      const auto part = [&](std::int64_t p) {
        return Part{data + p * shape_.panel_bytes, lane / kStepLanes, lanes / kStepLanes,
                    digits_ + p * cut_.block / kStepLanes * kStepNumbers,
                    scales_ + p * (cut_.block / shape_.run) * run_scales_};
      };
      if (group != group_ || cut_.blocks > 1) {
        for (std::int64_t p = 0; p < count; p++) read(part(p));
      }
      for (std::int64_t tile = first_tile; tile < last_tile; tile++) {
        const std::int64_t row = tile * cut_.height;
        const int rows = static_cast<int>(least(cut_.height, a_.m - row));
        float* results = results_ + (cut_.blocks > 1 ? (tile - first_tile) * count * kTileSums : 0);
        for (std::int64_t p = 0; p < count; p++) {
          multiply<false>(part(p), x + row * row_bytes_, rows, results + p * kTileSums);
        }
        if (lane + lanes == shape_.lanes) write(row, first, count, results);
      }
    }
    group_ = group;
  }

 private:
  // Steps of a panel, and where their numbers and scales are or, if they are read meanwhile, where the last are kept.
  struct Part {
    const std::byte* panel;
    std::int64_t first, steps;
    std::uint32_t* digits;
    float* scales;
  };

  // A pass of some rows of x over a part of a panel.
  struct Pass {
    const Part& part;
    const std::byte *x, *sums_of_x;  // of the part's first step
    int rows;
    float* results;
  };

  template <bool kReads>
  std::uint32_t* digits_of(const Part& part, std::int64_t step) const {
    return part.digits + (kReads ? step % kReadSteps : step) * kStepNumbers;
  }

  template <bool kReads>
  float* scales_of(const Part& part, std::int64_t run) const {
    return part.scales + (kReads ? run % kReadRuns : run) * run_scales_;
  }

  template <bool kReads>
  void read_step(const Part& part, std::int64_t step, std::int64_t run, bool begins) const {
    std::uint32_t* digits = digits_of<kReads>(part, step);
    weight_.read(part.panel, part.first + step, begins, scales_of<kReads>(part, run),
                 [digits](int lane, int v, VU lanes) __attribute__((always_inline)) {
                   store_lanes(digits + lane * kPanel + v * W, lanes);
                 });
  }

  void read(const Part& part) const {
    std::int64_t run = 0;
    for (std::int64_t step = 0; step < part.steps; run++) {
      for (std::int64_t i = 0; i < run_steps_; i++) read_step<false>(part, step++, run, i == 0);
    }
  }

  // results [rows, 32] (+)= some rows of x times a part of a panel.
  template <bool kReads>
  void multiply(const Part& part, const std::byte* x, int rows, float* results) {
    if (part.first == 0) std::memset(results, 0, static_cast<std::size_t>(rows * kPanel * 4));
    const std::byte* sums_of_x = x + 4 * shape_.lanes + (shape_.sums ? part.first / run_steps_ * 4 : 0);
    const Pass pass{part, x + part.first * kUnitBytes, sums_of_x, rows, results};
    unit_.begin_steps(rows);
    if (kReads) read_step<true>(part, 0, 0, true);
    const bool is_tall = rows > kUnitRows;
    if (run_steps_ > 1) {
      is_tall ? long_runs<kReads, true>(pass) : long_runs<kReads, false>(pass);
    } else {
      is_tall ? short_runs<kReads, true>(pass) : short_runs<kReads, false>(pass);
    }
  }

  // results [R, 32] = rows of x times a panel, by vectors.
  template <int R>
  void few_rows(const std::byte* panel, const std::byte* x, float* results) {
    VF result[R][kVectors] = {};
    const std::byte* sums_of_x = x + 4 * shape_.lanes;
    for (std::int64_t step = 0; step < shape_.lanes / kStepLanes;) {
      VF sums[R][kVectors] = {};
      for (std::int64_t i = 0; i < run_steps_; i++, step++) add_step<R>(panel, step, i == 0, x, sums);
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) {
          result[r][v] = sums[r][v] * load(scales_ + v * W) + result[r][v];
          if (!shape_.sums) continue;
          const VF sum_of_x = splat(bits_as<float>(load_lane(sums_of_x + r * row_bytes_)));
          result[r][v] = sum_of_x * load(scales_ + kPanel + v * W) + result[r][v];
        }
      }
      sums_of_x += 4;
    }
    for (int r = 0; r < R; r++) {
      for (int v = 0; v < kVectors; v++) store(results + r * kPanel + v * W, result[r][v]);
    }
  }

  // sums += rows of x times a step of a panel, whose scales, if a run begins with it, come into scales_.
  template <int R>
  __attribute__((always_inline)) void add_step(const std::byte* panel, std::int64_t step, bool begins, const std::byte* x,
                                               VF (&sums)[R][kVectors]) {
    alignas(64) float left[R][2][kStepLanes];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      const VU lanes = load_lanes(x + r * row_bytes_ + step * kUnitBytes);
      store(left[r][0], bits_as<VF>(lanes << 16));
      store(left[r][1], bits_as<VF>(lanes & 0xffff0000u));
    }
    VF halves[R][kVectors][2] = {};
    weight_.read(panel, step, begins, scales_, [&](int lane, int v, VU lanes) __attribute__((always_inline)) {
      const VF first = bits_as<VF>(lanes << 16), second = bits_as<VF>(lanes & 0xffff0000u);
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) {
        add_product(halves[r][v][0], first, left[r][0][lane]);
        add_product(halves[r][v][1], second, left[r][1][lane]);
      }
    });
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) sums[r][v] += halves[r][v][0] + halves[r][v][1];
  }

  float* sums_of(std::int64_t run) const { return sums_ + run % kWaitingRuns * kTileSums; }

  // Runs of a single step. While some are in the unit, or on their way from it, the sums of two before are added.
  template <bool kReads, bool kTall>
  void short_runs(const Pass& pass) {
    const std::int64_t runs = pass.part.steps;
    constexpr std::int64_t kBehind = 3;
    const int half = kTall ? kUnitRows : pass.rows;
    for (std::int64_t run = 0; run < runs + kBehind; run++) {
      if (kReads && run + 1 < runs) read_step<true>(pass.part, run + 1, run + 1, true);
      const std::byte* x = pass.x + run * kUnitBytes;
      if (run < runs) {
        unit_.load_right(digits_of<kReads>(pass.part, run));
        kTall || run % 2 == 0 ? start<0>(x) : start<1>(x);
      }
      if (run > 0 && run <= runs) {
        float* sums = sums_of(run - 1);
        kTall ? unit_.template save_pair<1>(sums + kUnitRows * kPanel)
              : run % 2 == 1 ? unit_.template save_pair<0>(sums) : unit_.template save_pair<1>(sums);
      }
      const bool adds = run % 2 == 1 && run >= kBehind;
      if (adds) add<kReads>(pass, run - kBehind, runs, 0, half);
      if (!kTall) continue;
      if (run < runs) {
        start<1>(x + kUnitRows * row_bytes_);
        unit_.template save_pair<0>(sums_of(run));
      }
      if (adds) add<kReads>(pass, run - kBehind, runs, half, pass.rows);
    }
  }

  template <int kPair>
  void start(const std::byte* x) {
    unit_.template zero_pair<kPair>();
    unit_.template load_left<kPair>(x, row_bytes_);
    unit_.template add_step<kPair>();
  }

  // Runs of several steps, whose sums stay in the unit meanwhile.
  template <bool kReads, bool kTall>
  void long_runs(const Pass& pass) {
    const std::int64_t run_steps = run_steps_, runs = pass.part.steps / run_steps;
    for (std::int64_t run = 0; run < runs; run++) {
      unit_.template zero_pair<0>();
      if (kTall) unit_.template zero_pair<1>();
      for (std::int64_t step = run * run_steps; step < (run + 1) * run_steps; step++) {
        const bool is_last = step + 1 == (run + 1) * run_steps_;
        if (kReads && step + 1 < pass.part.steps) read_step<true>(pass.part, step + 1, run + is_last, is_last);
        const std::byte* x = pass.x + step * kUnitBytes;
        const std::uint32_t* digits = digits_of<kReads>(pass.part, step);
        unit_.template load_left<0>(x, row_bytes_);
        if (kTall) unit_.template load_left<1>(x + kUnitRows * row_bytes_, row_bytes_);
        unit_.load_right(digits);
        unit_.template add_step<0>();
        if (kTall) unit_.template add_step<1>();
      }
      unit_.template save_pair<0>(sums_of(run));
      if (kTall) unit_.template save_pair<1>(sums_of(run) + kUnitRows * kPanel);
      if (run > 0) add<kReads>(pass, run - 1, run, 0, pass.rows);
    }
    add<kReads>(pass, runs - 1, runs, 0, pass.rows);
  }

  // Adds the scaled sums of run `first`, and of the next one if it is below `end`, for rows [begin, last).
  template <bool kReads>
  void add(const Pass& pass, std::int64_t first, std::int64_t end, int begin, int last) const {
    const float* scales = scales_of<kReads>(pass.part, first);
    const bool two = first + 1 < end;
    if (shape_.sums) {
      two ? add_runs<2, true>(pass, first, scales, begin, last) : add_runs<1, true>(pass, first, scales, begin, last);
    } else {
      two ? add_runs<2, false>(pass, first, scales, begin, last) : add_runs<1, false>(pass, first, scales, begin, last);
    }
  }

  template <int kRuns, bool kSumsOfX>
  void add_runs(const Pass& pass, std::int64_t first, const float* scales, int begin, int last) const {
    constexpr std::int64_t kScales = (kSumsOfX ? 2 : 1) * kPanel;
    const float* sums = sums_of(first);
    const std::byte* sums_of_x = pass.sums_of_x + first * 4;
    for (int r = begin; r < last; r++) {
      VF result[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) result[v] = load(pass.results + r * kPanel + v * W);
#pragma GCC unroll 2
      for (int i = 0; i < kRuns; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) {
          result[v] = load(sums + i * kTileSums + r * kPanel + v * W) * load(scales + i * kScales + v * W) + result[v];
        }
        if constexpr (kSumsOfX) {
          const VF sum_of_x = splat(bits_as<float>(load_lane(sums_of_x + r * row_bytes_ + i * 4)));
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; v++) {
            result[v] = sum_of_x * load(scales + i * kScales + kPanel + v * W) + result[v];
          }
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) store(pass.results + r * kPanel + v * W, result[v]);
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
  const DigitsCut& cut_;
  const Weight& weight_;
  const std::int64_t row_bytes_, run_steps_, run_scales_;
  float* results_;          // [tiles, panels, rows, 32] of a task
  std::uint32_t* digits_;   // [panels, steps of a block, 16, 32]
  float* scales_;           // [panels, runs of a block, 1 or 2, 32]
  float* sums_;             // [kWaitingRuns, rows, 32]
  std::int64_t group_ = -1; // whose panels were read
  MatrixUnit unit_;
};

// While one of these lives, this thread takes denormal numbers for 0.
class Flushing {
 public:
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;
  ~Flushing() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// For a few rows it is cheaper to prepare them once per thread than to wait for another thread.
constexpr bool has_own_rows(std::int64_t m) { return m <= 12; }

template <class Weight>
bool multiply(const QuantizedArgs& a) {
  const LinearWeight& w = *a.weight;
  const Shape shape = Weight::shape(w);
  const DigitsCut cut(shape, w.n, a.m, a.team.threads);
  const Weight weight(w);
  const std::int64_t row_bytes = shape.row_bytes();
  const std::int32_t* order = w.coded == nullptr ? nullptr : w.coded->order;
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
    const Flushing flushing;
    Digits<Weight> mine(a, shape, cut, weight, a.scratch + thread * kOwnBytes);
    for (std::int64_t task; (task = shares.take_next(thread, &helped)) < tasks;) {
      if (!is_prepared) prepare(0, a.m, x);
      is_prepared = true;
      mine.run(task, x);
    }
  });
  return true;
}

// Calls with(reader's type) for a weight that this kernel may multiply.
template <class With>
auto with_reader(const LinearWeight& weight, const With& with) {
  if (weight.coded != nullptr) {
    switch (weight.coded->codes) {
      case Codes::int8: return with(static_cast<CodedDigits<Int8<bf16>>*>(nullptr));
      case Codes::e4m3: return with(static_cast<CodedDigits<E4m3<bf16>>*>(nullptr));
      default: return with(static_cast<CodedDigits<Nibbles<bf16>>*>(nullptr));
    }
  }
  switch (weight.kind) {
#define SAPWOOD_KIND(kind) \
  case WeightKind::kind: return with(static_cast<GroupDigits<WeightKind::kind>*>(nullptr));
    SAPWOOD_KIND(q8_0) SAPWOOD_KIND(q4_0) SAPWOOD_KIND(q4_1) SAPWOOD_KIND(q5_0) SAPWOOD_KIND(q5_1)
    SAPWOOD_KIND(q4_k) SAPWOOD_KIND(q5_k)
    default: return with(static_cast<GroupDigits<WeightKind::iq4_xs>*>(nullptr));
#undef SAPWOOD_KIND
  }
}

template <class Reader>
Reader reader_at(Reader*);  // names the type that a pointer points to

}  // namespace

bool linear_digits(const QuantizedArgs& a) {
  return with_reader(*a.weight, [&](auto* reader) { return multiply<decltype(reader_at(reader))>(a); });
}

std::size_t linear_digits_scratch(const LinearWeight& weight, std::int64_t m, int threads) {
  if (weight.coded == nullptr && (!weight.fine || whole_bits(layout_of(weight.kind)) == 0)) return 0;
  const Shape shape = with_reader(weight, [&](auto* reader) { return decltype(reader_at(reader))::shape(weight); });
  if (shape.run == 0) return 0;
  const std::int64_t copies = has_own_rows(m) ? threads : 1;
  return static_cast<std::size_t>(threads * kOwnBytes + copies * m * shape.row_bytes());
}

}  // namespace sapwood::SAPWOOD_ISA
