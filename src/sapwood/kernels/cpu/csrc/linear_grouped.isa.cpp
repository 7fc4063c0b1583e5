// out = x w^T + bias for weights in groups of 32 inputs (quantized.h); x is rounded to int8 with one
// scale per group, so that the sums of inputs that share a scale of w are exact integers. They are
// scaled and added in fp32, in order: the result does not depend on the number of rows or threads.
// Of a `fine` weight x is rounded to 16 bits, as two digits of int8: each is a row of bytes, and the sums of
// the two are joined as integers before they are scaled. A matrix unit, where there is one, multiplies the
// bytes of more than a few rows: its sums are the same integers.
#include "groups.h"
#include "integer.h"
#include "matrix.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// What the higher digit of a number of 16 bits counts. Where weights lend x their signs (kSignedBytes), no digit
// may be -128.
template <WeightKind kKind>
constexpr int kDigit = layout_of(kKind).bits == 8 ? 254 : 256;
// Of x in 16 bits: the largest number of two digits, of which the lower one is rounded.
template <WeightKind kKind>
constexpr float kFineLevels = static_cast<float>(127 * kDigit<kKind> + (kDigit<kKind> == 256 ? 127 : 126));

// Bytes of a rounded group of x: after its 32 int8 come a scale, and a correction for each run of inputs.
constexpr std::int64_t kScaleAt = 32, kCorrectionAt = 36;
// Not inlined: otherwise each shape of tile would be compiled once more for each type of x.
#define SAPWOOD_TILE __attribute__((noinline)) static void

// The correction of a run, whose rounded x add up to `sum`: where the kind has minima, that sum times the
// scale of x; else the start of the integer sum, which makes up for the offset of the weight's numbers.
template <WeightKind kKind>
SAPWOOD_INLINE void write_correction(std::byte* group, std::int64_t run, float scale, std::int32_t sum) {
  constexpr Layout kLayout = layout_of(kKind);
  const float minimum_factor = scale * static_cast<float>(sum);
  const std::int32_t start = kLayout.offset == 128 ? offset_correction(sum) : -sum * kLayout.offset;
  __builtin_memcpy(group + kCorrectionAt + run * 4,
                   kLayout.minima ? static_cast<const void*>(&minimum_factor) : &start, 4);
}

// A group of x in fp32, and its range.
struct Range {
  float most;

  bool is_zero() const { return most < kLeastMagnitude; }
  bool is_number() const { return most < __builtin_inff(); }
  // The difference between neighbours of `levels` whole numbers above 0.
  float step(float levels) const { return is_zero() ? 0.0f : is_number() ? most / levels : __builtin_nanf(""); }
  float inverse(float levels) const { return is_zero() || !is_number() ? 0.0f : levels / most; }
};

template <class T, WeightKind kKind>
static inline void round_row(const T* x, std::int64_t k, std::byte* out) {
  constexpr std::int64_t kRun = layout_of(kKind).run;
  for (std::int64_t i = 0; i < k; i += kGroup, out += kGroupBytesOfX) {
    const Range range{magnitude(x + i, kGroup)};
    const float scale = range.step(127.0f);
    __builtin_memcpy(out + kScaleAt, &scale, 4);
    for (std::int64_t run = 0; run < kGroup / kRun; run++) {
      std::int8_t* bytes = reinterpret_cast<std::int8_t*>(out) + run * kRun;
      std::int32_t sum = 0;
      if (!range.is_zero() && range.is_number()) {
        sum = round_to_bytes(x + i + run * kRun, kRun, 127.0f / range.most, bytes);
      } else {
        __builtin_memset(bytes, 0, kRun);
      }
      write_correction<kKind>(out, run, scale, sum);
    }
  }
}

// A row of x -> its two rows of bytes: the higher digits, then the lower ones.
template <class T, WeightKind kKind>
static inline void round_row_fine(const T* x, std::int64_t k, bool whole, std::byte* out, std::int64_t row_bytes) {
  constexpr std::int64_t kRun = layout_of(kKind).run;
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (std::int64_t i = 0; i < k; i += kGroup, out += kGroupBytesOfX) {
    const Range range{magnitude(x + i, kGroup)};
    float scale = range.step(kFineLevels<kKind>), inverted = range.inverse(kFineLevels<kKind>);
    if (whole && inverted != 0.0f) {
      scale = whole_step(range.most, whole_bits(layout_of(kKind)));
      inverted = 1.0f / scale;
    }
    const VF inverse = splat(inverted);
    for (std::int64_t run = 0; run < kGroup / kRun; run++) {
      VI sums[2] = {};
      for (std::int64_t j = run * kRun; j < (run + 1) * kRun; j += W) {
        const VF scaled = range.is_number() ? rounded(load(x + i + j) * inverse) : VF{};
        const VF whole = rounded(scaled + magic) - magic;
        // With the half, no number is midway between two higher digits: the lower one stays below 128.
        const VF high = rounded(rounded((whole + splat(0.5f)) * splat(1.0f / kDigit<kKind>)) + magic) - magic;
        const VI digits[2] = {__builtin_convertvector(high, VI),
                              __builtin_convertvector(whole - high * splat(kDigit<kKind>), VI)};
        for (int d = 0; d < 2; d++) {
          store_bytes(reinterpret_cast<std::int8_t*>(out + d * row_bytes) + j, digits[d]);
          sums[d] += digits[d];
        }
      }
      // Of the lower digit's row are the scale, and the factor of the minimum for both.
      const std::int32_t high = total(sums[0]), low = total(sums[1]);
      __builtin_memcpy(out + row_bytes + kScaleAt, &scale, 4);
      write_correction<kKind>(out, run, scale, high);
      write_correction<kKind>(out + row_bytes, run, scale, layout_of(kKind).minima ? kDigit<kKind> * high + low : low);
    }
  }
}

// sums += the numbers of 16 inputs: the first of a group, or kHigh the second. `numbers` are the
// group's, for V vectors of outputs; x is the group of the first row.
template <int kBits, bool kHigh, int R, int V>
SAPWOOD_INLINE void add_half(VI (&sums)[R][V], const std::byte* numbers, const std::byte* x,
                             std::int64_t row_bytes) {
  constexpr int kFirst = kBits == 8 && kHigh ? 4 : 0;
  const auto left_of = [&](int r, int lane) {
    return load_factor(x + r * row_bytes + (kHigh ? 16 : 0) + lane * 4);
  };
#if defined(SAPWOOD_MADDUBS)
  if constexpr (kBits != 8) {
    // Pairs of products are at most 2 * 127 * the largest number: of 5 bits eight products fit 16 bits
    // with a sign, of 6 bits four.
    constexpr int kSummed = kBits == 6 ? 2 : 4;
#pragma GCC unroll 2
    for (int first = 0; first < 4; first += kSummed) {
      VU pairs[R][V];
#pragma GCC unroll 4
      for (int lane = first; lane < first + kSummed; lane++) {
        VU right[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) right[v] = numbers_of<kBits, kHigh>(numbers + v * W * 4, kFirst + lane);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const Factor left = left_of(r, lane);
#pragma GCC unroll 16
          for (int v = 0; v < V; v++) {
            const VU both = SAPWOOD_MADDUBS(right[v], left);
            pairs[r][v] = lane == first ? both : SAPWOOD_ADD16(pairs[r][v], both);
          }
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
          sums[r][v] += bits_as<VI>(SAPWOOD_MADD(pairs[r][v], splat_lane(0x00010001u)));
        }
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int lane = 0; lane < 4; lane++) {
    Right<kBits> right[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      right[v] = right_of<kBits>(numbers_of<kBits, kHigh>(numbers + v * W * 4, kFirst + lane));
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Factor left = left_of(r, lane);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[r][v] = dot_bytes(sums[r][v], right[v], left);
    }
  }
}

// result += the sum of run kRun, for a row of x whose scale and factor of the minimum are in `group`.
template <WeightKind kKind, int kRun>
SAPWOOD_INLINE void add_sum(VF& result, VI sum, VF scale, VF minimum, const std::byte* group) {
  const VF both = scale * splat(bits_as<float>(load_lane(group + kScaleAt)));
  result = to_floats(sum) * both + result;
  if (layout_of(kKind).minima) {
    const float factor = bits_as<float>(load_lane(group + kCorrectionAt + kRun * 4));
    result = minimum * splat(factor) + result;
  }
}

// Rows of x that R rows of bytes are.
template <bool kFine, int R>
constexpr int kRowsOfX = kFine ? R / 2 : R;

// results += the products of run kRun of one group, whose numbers share `scale` and `minimum`.
template <WeightKind kKind, int kRun, bool kFine, int R, int V>
SAPWOOD_INLINE void add_run(VF (&results)[kRowsOfX<kFine, R>][V], const VF (&scale)[V], const VF (&minimum)[V],
                            const std::byte* numbers, const std::byte* x, std::int64_t row_bytes) {
  constexpr Layout kLayout = layout_of(kKind);
  VI sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const std::uint32_t start =
        kLayout.minima ? 0 : load_lane(x + r * row_bytes + kCorrectionAt + kRun * 4);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sums[r][v] = splat_int(static_cast<std::int32_t>(start));
  }
  if (kRun == 0) add_half<kLayout.bits, false>(sums, numbers, x, row_bytes);
  if (kRun == 1 || kLayout.run == kGroup) add_half<kLayout.bits, true>(sums, numbers, x, row_bytes);
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) {
#pragma GCC unroll 16
    for (int i = 0; i < kRowsOfX<kFine, R>; i++) {
      const int r = kFine ? 2 * i + 1 : i;
      const VI sum = kFine ? sums[r - (kFine ? 1 : 0)][v] * kDigit<kKind> + sums[r][v] : sums[r][v];
      add_sum<kKind, kRun>(results[i][v], sum, scale[v], minimum[v], x + r * row_bytes);
    }
  }
}

// R rows of bytes x V vectors of outputs, the first at column `within` of the panel, over all groups -> out
// [rows of x, V].
template <WeightKind kKind, bool kFine, int R, int V>
SAPWOOD_TILE tile(const std::byte* x, std::int64_t row_bytes, const std::byte* panel, std::int64_t k,
                  int within, const Fetch& lines, VF* out) {
  constexpr Layout kLayout = layout_of(kKind);
  constexpr std::int64_t kBytes = group_bytes(kLayout);
  const std::int64_t blocks = k / (kGroup * block_groups(kLayout));
  constexpr int kRows = kRowsOfX<kFine, R>;
  VF results[kRows][V] = {};
  for (std::int64_t block = 0; block < blocks; block++) {
    VF d[V] = {}, least[V] = {};
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      if (!kLayout.heads) break;
      d[v] = load_halves(panel + (within + v * W) * 2);
      if (kLayout.minima) least[v] = load_halves(panel + (kPanel + within + v * W) * 2);
    }
    panel += head_bytes(kLayout);
    for (std::int64_t group = 0; group < block_groups(kLayout); group++, panel += kBytes, x += kGroupBytesOfX) {
      if (within == 0) fetch(lines, panel, kBytes);
      const std::byte* numbers = panel + scale_bytes(kLayout) + within * 4;
      VF scale[V], minimum[V] = {};
      read_scales<kKind, 0>(panel, within, d, least, scale, minimum);
      add_run<kKind, 0, kFine, R, V>(results, scale, minimum, numbers, x, row_bytes);
      if (kLayout.run < kGroup) {
        read_scales<kKind, 1>(panel, within, d, least, scale, minimum);
        add_run<kKind, 1, kFine, R, V>(results, scale, minimum, numbers, x, row_bytes);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) out[r * V + v] = results[r][v];
}

// R rows of bytes x a panel; `row` is the first of x.
template <class T, WeightKind kKind, int R>
static inline void panel_tile(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes,
                              const std::byte* panel, std::int64_t row, std::int64_t column, const Fetch& lines) {
  constexpr int V = int_vectors(R);
  for (int within = 0; within < kPanel; within += V * W) {
    VF results[R * V];
    int rows = R;
    if constexpr (R % 2 == 0) {
      if (a.weight->fine) {
        rows = R / 2;
        tile<kKind, true, R, V>(x, row_bytes, panel, a.weight->k, within, lines, results);
      }
    }
    if (rows == R) tile<kKind, false, R, V>(x, row_bytes, panel, a.weight->k, within, lines, results);
    for (int r = 0; r < rows; r++) write_results<T, V>(a, row + r, column + within, results + r * V);
  }
}

template <class T, WeightKind kKind>
static inline void tile_rows(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes,
                             const std::byte* panel, std::int64_t row, std::int64_t column,
                             std::int64_t rows, const Fetch& lines) {
  switch (rows) {
#define SAPWOOD_ROWS(R) \
  case R: panel_tile<T, kKind, R>(a, x, row_bytes, panel, row, column, lines); break;
    SAPWOOD_ROWS(1) SAPWOOD_ROWS(2)
#if defined(__AVX2__) || defined(SAPWOOD_NEON)
    SAPWOOD_ROWS(3) SAPWOOD_ROWS(4)
#endif
#if defined(__AVX512F__)
    SAPWOOD_ROWS(5) SAPWOOD_ROWS(6)
#endif
#undef SAPWOOD_ROWS
    default: break;
  }
}

#if defined(SAPWOOD_AMX)
// Rows of bytes that pass over a group together, and that the unit takes at a time.
constexpr int kPassBytes = 64;

// Rows of bytes x a panel on the unit, group by group. Bit by bit what vectors compute.
template <WeightKind kKind, bool kFine>
class UnitTile {
 public:
  UnitTile(MatrixUnit& unit, const std::byte* x, std::int64_t row_bytes, const std::byte* panel, int rows)
      : unit_(unit), x_(x), row_bytes_(row_bytes), panel_(panel), rows_(rows) {
    for (auto& row : results_) row[0] = row[1] = VF{};
  }

  // The unit is at work on a product while the sums of the one before are added to the results.
  void run(std::int64_t k, const Fetch& lines) {
    const int parts = (rows_ + kMostPassRows - 1) / kMostPassRows;
    Step before{};
    bool is_first = true;
    for (std::int64_t group = 0; group < k / kGroup; group++) {
      const std::byte* block = panel_ + group / kGroups * block_bytes(kLayout);
      const std::byte* from = block + head_bytes(kLayout) + group % kGroups * group_bytes(kLayout);
      fetch(lines, from, group_bytes(kLayout));
      const std::byte* numbers = numbers_as_bytes(from + scale_bytes(kLayout));
      for (int part = 0; part < parts; part++) {
        const Step step{block, from, x_ + group * kGroupBytesOfX + part * kMostPassRows * row_bytes_,
                        sums_[(group * parts + part) % 2], part * kMostPassRows};
        multiply(step, numbers);
        if (!is_first) add(before);
        is_first = false;
        before = step;
      }
    }
    if (!is_first) add(before);
  }

  template <class T>
  void write(const QuantizedArgs& a, std::int64_t row, std::int64_t column) const {
    for (int r = 0; r < (kFine ? rows_ / 2 : rows_); r++) write_results<T, kVectors>(a, row + r, column, results_[r]);
  }

 private:
  static constexpr Layout kLayout = layout_of(kKind);
  static constexpr std::int64_t kGroups = block_groups(kLayout);
  static constexpr int kRuns = kGroup / kLayout.run, kDepth = kLayout.run / 4, kVectors = kPanel / W;
  static constexpr int kTileSums = kMostPassRows * kPanel;
  static_assert(kVectors == 2);

  struct Step {
    const std::byte *block, *group, *x;
    std::int32_t* sums;
    int first;  // row of bytes
  };

  const std::byte* numbers_as_bytes(const std::byte* numbers) {
    if constexpr (kLayout.bits == 8) return numbers;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      const std::byte* from = numbers + v * W * 4;
      std::uint32_t* to = bytes_ + v * W;
#pragma GCC unroll 4
      for (int lane = 0; lane < 4; lane++) {
        store_lanes(to + lane * kPanel, numbers_of<kLayout.bits, false>(from, lane));
        store_lanes(to + (4 + lane) * kPanel, numbers_of<kLayout.bits, true>(from, lane));
      }
    }
    return reinterpret_cast<const std::byte*>(bytes_);
  }

  int rows_of(const Step& step) const { return static_cast<int>(least(kMostPassRows, rows_ - step.first)); }

  void multiply(const Step& step, const std::byte* numbers) {
    for (int run = 0; run < kRuns; run++) {
      unit_.multiply_bytes(step.x + run * kLayout.run, row_bytes_, numbers + run * kDepth * kPanel * 4,
                           step.sums + run * kTileSums, rows_of(step), kDepth);
    }
  }

  void add(const Step& step) {
    VF d[kVectors] = {}, smallest[kVectors] = {};
    for (int v = 0; v < kVectors; v++) {
      if (!kLayout.heads) break;
      d[v] = load_halves(step.block + v * W * 2);
      if (kLayout.minima) smallest[v] = load_halves(step.block + (kPanel + v * W) * 2);
    }
    add_run_of<0>(step, d, smallest);
    if constexpr (kRuns == 2) add_run_of<1>(step, d, smallest);
  }

  template <int kRun>
  void add_run_of(const Step& step, const VF (&d)[kVectors], const VF (&smallest)[kVectors]) {
    constexpr int kRows = kFine ? 2 : 1;
    VF scale[kVectors], minimum[kVectors] = {};
    read_scales<kKind, kRun>(step.group, 0, d, smallest, scale, minimum);
    const std::int32_t* sums = step.sums + kRun * kTileSums;
    const std::byte* group = step.x;
    for (int r = 0; r < rows_of(step); r += kRows, sums += kRows * kPanel, group += kRows * row_bytes_) {
      VF* results = results_[(step.first + r) / kRows];
      const std::byte* last = group + (kRows - 1) * row_bytes_;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) {
        VI sum = sum_of<kRun>(sums + v * W, group);
        if (kFine) sum = sum * kDigit<kKind> + sum_of<kRun>(sums + kPanel + v * W, last);
        add_sum<kKind, kRun>(results[v], sum, scale[v], minimum[v], last);
      }
    }
  }

  template <int kRun>
  SAPWOOD_INLINE VI sum_of(const std::int32_t* sums, const std::byte* group) {
    const VI sum = bits_as<VI>(load_lanes(sums));
    if (kLayout.minima) return sum;
    return sum + splat_int(static_cast<std::int32_t>(load_lane(group + kCorrectionAt + kRun * 4)));
  }

  MatrixUnit& unit_;
  const std::byte* x_;
  const std::int64_t row_bytes_;
  const std::byte* panel_;
  const int rows_;
  VF results_[kFine ? kPassBytes / 2 : kPassBytes][kVectors];
  alignas(64) std::int32_t sums_[2][kRuns * kTileSums];
  alignas(64) std::uint32_t bytes_[kGroup / 4 * kPanel];
};

template <class T, WeightKind kKind, bool kFine>
SAPWOOD_TILE unit_tile(MatrixUnit& unit, const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes,
                       const std::byte* panel, std::int64_t row, std::int64_t column, int rows, const Fetch& lines) {
  UnitTile<kKind, kFine> tile(unit, x, row_bytes, panel, rows);
  tile.run(a.weight->k, lines);
  tile.template write<T>(a, row, column);
}
#endif

// Rows of bytes that share one pass over a panel.
static inline std::int64_t most_pass_bytes([[maybe_unused]] std::int64_t rows) {
#if defined(SAPWOOD_AMX)
  if (rows > kTileHeight) return kPassBytes;
#endif
  return kTileHeight;
}

// A panel with the rows of bytes of one pass.
template <class T, WeightKind kKind>
static inline void pass_panel([[maybe_unused]] MatrixUnit& unit, const QuantizedArgs& a, const std::byte* x,
                              std::int64_t row_bytes, const std::byte* panel, std::int64_t row, std::int64_t column,
                              std::int64_t rows, const Fetch& lines) {
#if defined(SAPWOOD_AMX)
  if (rows > kTileHeight) {
    const auto multiply = a.weight->fine ? unit_tile<T, kKind, true> : unit_tile<T, kKind, false>;
    return multiply(unit, a, x, row_bytes, panel, row, column, static_cast<int>(rows), lines);
  }
#endif
  tile_rows<T, kKind>(a, x, row_bytes, panel, row, column, rows, lines);
}

template <class T, WeightKind kKind>
void multiply(const QuantizedArgs& a) {
  const LinearWeight& weight = *a.weight;
  const std::int64_t row_bytes = rounded_row_bytes(kKind, weight.k);
  const std::int64_t bytes = panel_bytes(kKind, weight.k), height = rows_of_bytes(weight);
  const Cut cut = cut_work(a, most_pass_bytes(a.m * height) / height);
  const auto round = [&](std::int64_t row, std::byte* to) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    weight.fine ? round_row_fine<T, kKind>(x, weight.k, a.whole, to, row_bytes) : round_row<T, kKind>(x, weight.k, to);
  };
  run_quantized(a, cut, round, [&](const std::byte* x, std::int64_t panel, std::int64_t panels,
                                   std::int64_t row, std::int64_t rows) {
    MatrixUnit unit;
    const std::byte* w = static_cast<const std::byte*>(weight.data) + panel * bytes;
    each_pass(cut, panels, rows, bytes, [&](std::int64_t p, std::int64_t r, std::int64_t count, const Fetch& lines) {
      pass_panel<T, kKind>(unit, a, x + r * height * row_bytes, row_bytes, w + p * bytes, row + r,
                           (panel + p) * kPanel, count * height, lines);
    });
  });
}

template <class T>
void multiply_any(const QuantizedArgs& a) {
  switch (a.weight->kind) {
#define SAPWOOD_KIND(kind) \
  case WeightKind::kind: multiply<T, WeightKind::kind>(a); break;
    SAPWOOD_KIND(q8_0) SAPWOOD_KIND(q4_0) SAPWOOD_KIND(q4_1) SAPWOOD_KIND(q5_0) SAPWOOD_KIND(q5_1)
    SAPWOOD_KIND(q2_k) SAPWOOD_KIND(q3_k) SAPWOOD_KIND(q4_k) SAPWOOD_KIND(q5_k) SAPWOOD_KIND(q6_k)
    SAPWOOD_KIND(iq4_xs)
#undef SAPWOOD_KIND
    default: break;
  }
}

}  // namespace

void linear_grouped(DType dtype, const QuantizedArgs& args) {
  dtype == DType::f32 ? multiply_any<float>(args) : multiply_any<bf16>(args);
}

}  // namespace sapwood::SAPWOOD_ISA
