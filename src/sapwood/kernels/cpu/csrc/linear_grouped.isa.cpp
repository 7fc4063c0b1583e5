// out = x w^T + bias for weights in groups of 32 inputs (quantized.h); x is rounded to int8 with one
// scale per group, so that the sums of inputs that share a scale of w are exact integers. They are
// scaled and added in fp32, in order: the result does not depend on the number of rows or threads.
// Of a `fine` weight x is rounded to 16 bits, as two digits of int8: each is a row of bytes with a scale
// of its own, and the two rows' results are added at the end.
#include "groups.h"
#include "integer.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

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
static inline void round_row_fine(const T* x, std::int64_t k, std::byte* out, std::int64_t row_bytes) {
  constexpr std::int64_t kRun = layout_of(kKind).run;
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (std::int64_t i = 0; i < k; i += kGroup, out += kGroupBytesOfX) {
    const Range range{magnitude(x + i, kGroup)};
    const VF inverse = splat(range.inverse(kFineLevels));
    const float scales[2] = {range.step(kFineLevels) * kFineStep, range.step(kFineLevels)};
    for (std::int64_t run = 0; run < kGroup / kRun; run++) {
      VI sums[2] = {};
      for (std::int64_t j = run * kRun; j < (run + 1) * kRun; j += W) {
        const VF scaled = range.is_number() ? rounded(load(x + i + j) * inverse) : VF{};
        const VF whole = rounded(scaled + magic) - magic;
        const VF high = rounded(rounded(whole * splat(1.0f / kFineStep)) + magic) - magic;
        const VI digits[2] = {__builtin_convertvector(high, VI),
                              __builtin_convertvector(whole - high * splat(kFineStep), VI)};
        for (int d = 0; d < 2; d++) {
          store_bytes(reinterpret_cast<std::int8_t*>(out + d * row_bytes) + j, digits[d]);
          sums[d] += digits[d];
        }
      }
      for (int d = 0; d < 2; d++) {
        __builtin_memcpy(out + d * row_bytes + kScaleAt, &scales[d], 4);
        write_correction<kKind>(out + d * row_bytes, run, scales[d], total(sums[d]));
      }
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

// results += the products of run kRun of one group, whose numbers share `scale` and `minimum`.
template <WeightKind kKind, int kRun, int R, int V>
SAPWOOD_INLINE void add_run(VF (&results)[R][V], const VF (&scale)[V], const VF (&minimum)[V],
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
    for (int r = 0; r < R; r++) {
      const std::byte* of_row = x + r * row_bytes;
      const VF both = scale[v] * splat(bits_as<float>(load_lane(of_row + kScaleAt)));
      results[r][v] = to_floats(sums[r][v]) * both + results[r][v];
      if (kLayout.minima) {
        const float factor = bits_as<float>(load_lane(of_row + kCorrectionAt + kRun * 4));
        results[r][v] = minimum[v] * splat(factor) + results[r][v];
      }
    }
  }
}

// R rows x V vectors of outputs, the first at column `within` of the panel, over all groups -> out
// [R, V].
template <WeightKind kKind, int R, int V>
SAPWOOD_TILE tile(const std::byte* x, std::int64_t row_bytes, const std::byte* panel, std::int64_t k,
                  int within, const Fetch& lines, VF* out) {
  constexpr Layout kLayout = layout_of(kKind);
  constexpr std::int64_t kBytes = group_bytes(kLayout);
  const std::int64_t blocks = k / (kGroup * block_groups(kLayout));
  VF results[R][V] = {};
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
      add_run<kKind, 0>(results, scale, minimum, numbers, x, row_bytes);
      if (kLayout.run < kGroup) {
        read_scales<kKind, 1>(panel, within, d, least, scale, minimum);
        add_run<kKind, 1>(results, scale, minimum, numbers, x, row_bytes);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
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
    tile<kKind, R, V>(x, row_bytes, panel, a.weight->k, within, lines, results);
    if (!a.weight->fine) {
      for (int r = 0; r < R; r++) write_results<T, V>(a, row + r, column + within, results + r * V);
      continue;
    }
    for (int r = 0; r + 1 < R; r += 2) {
      VF both[V];
      for (int v = 0; v < V; v++) both[v] = results[r * V + v] + results[(r + 1) * V + v];
      write_results<T, V>(a, row + r / 2, column + within, both);
    }
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

template <class T, WeightKind kKind>
void multiply(const QuantizedArgs& a) {
  const LinearWeight& weight = *a.weight;
  const std::int64_t row_bytes = rounded_row_bytes(kKind, weight.k);
  const std::int64_t bytes = panel_bytes(kKind, weight.k), height = rows_of_bytes(weight);
  const Cut cut = cut_work(a, kTileHeight / height);
  const auto round = [&](std::int64_t row, std::byte* to) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    weight.fine ? round_row_fine<T, kKind>(x, weight.k, to, row_bytes) : round_row<T, kKind>(x, weight.k, to);
  };
  run_quantized(a, cut, round, [&](const std::byte* x, std::int64_t panel, std::int64_t panels,
                                   std::int64_t row, std::int64_t rows) {
    const std::byte* w = static_cast<const std::byte*>(weight.data) + panel * bytes;
    each_pass(cut, panels, rows, bytes, [&](std::int64_t p, std::int64_t r, std::int64_t count, const Fetch& lines) {
      tile_rows<T, kKind>(a, x + r * height * row_bytes, row_bytes, w + p * bytes, row + r, (panel + p) * kPanel,
                          count * height, lines);
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
