// out = x w^T + bias for weights in GGUF's groups of 32 inputs; x is rounded to int8 with one scale
// per group, so that the sums within a group are exact integers. They are scaled and added in fp32,
// group after group: the result does not depend on the number of rows or threads.
#include "integer.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Of a group of x, after its 32 int8.
constexpr std::int64_t kScaleAt = 32, kCorrectionAt = 36;

// The correction: for q4_1 (a minimum is added to each number) the sum of the rounded x times their
// scale; for q4_0 and q8_0 (8 or 128 must be taken from each number) what the integer sum starts at.
template <class T, WeightKind kKind>
static inline void round_row(const T* x, std::int64_t k, std::byte* out) {
  for (std::int64_t i = 0; i < k; i += kGroup, out += kGroupBytesOfX) {
    const Rounded group = round_group(x + i, kGroup, reinterpret_cast<std::int8_t*>(out));
    const float minimum_factor = group.scale * static_cast<float>(group.sum);
    const std::int32_t start = group.sum * (kKind == WeightKind::q8_0 ? -128 : -8);
    __builtin_memcpy(out + kScaleAt, &group.scale, 4);
    __builtin_memcpy(out + kCorrectionAt,
                     kKind == WeightKind::q4_1 ? static_cast<const void*>(&minimum_factor) : &start, 4);
  }
}

// sums += the numbers of one group. `numbers` are V vectors of outputs, x the group of the first row.
template <WeightKind kKind, int R, int V>
SAPWOOD_INLINE void add_group(VI (&sums)[R][V], const std::byte* numbers, const std::byte* x,
                              std::int64_t row_bytes) {
  constexpr bool kBytes = kKind == WeightKind::q8_0;
#pragma GCC unroll 8
  for (int lane = 0; lane < (kBytes ? 8 : 4); lane++) {
    VU low[V], high[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      const VU both = load_lanes(numbers + (lane * kPanel + v * W) * 4);
      low[v] = kBytes ? both : both & 0x0f0f0f0fu;
      high[v] = (both >> 4) & 0x0f0f0f0fu;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VU first = splat_lane(load_lane(x + r * row_bytes + lane * 4));
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[r][v] = dot_bytes<!kBytes>(sums[r][v], low[v], first);
      if (!kBytes) {
        const VU second = splat_lane(load_lane(x + r * row_bytes + 16 + lane * 4));
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) sums[r][v] = dot_bytes<true>(sums[r][v], high[v], second);
      }
    }
  }
}

// R rows x V vectors of outputs, the first at column `within` of the panel, over all groups.
template <class T, WeightKind kKind, int R, int V, bool kStream>
static inline void tile(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes,
                        const std::byte* panel, std::int64_t row, std::int64_t column, int within) {
  constexpr bool kMinimum = kKind == WeightKind::q4_1;
  constexpr std::int64_t kBytes = group_bytes(kKind);
  const std::int64_t groups = a.weight->k / kGroup;
  VF results[R][V] = {};
  const std::byte* left = x;
  const std::byte* scales = panel + within * 2;
  const std::byte* numbers = panel + scale_bytes(kKind) + within * 4;
  for (std::int64_t group = 0; group < groups; group++) {
    if (kStream && within == 0) {
#pragma GCC unroll 32
      for (std::int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(scales + i + kAheadBytes, 0, 2);
    }
    VI sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const std::uint32_t start = kMinimum ? 0 : load_lane(left + r * row_bytes + kCorrectionAt);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[r][v] = splat_int(static_cast<std::int32_t>(start));
    }
    add_group<kKind, R, V>(sums, numbers, left, row_bytes);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      const VF scale = load_halves(scales + v * W * 2);
      const VF minimum = kMinimum ? load_halves(scales + kPanel * 2 + v * W * 2) : VF{};
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const std::byte* of_row = left + r * row_bytes;
        const VF both = scale * splat(bits_as<float>(load_lane(of_row + kScaleAt)));
        results[r][v] = to_floats(sums[r][v]) * both + results[r][v];
        if (kMinimum) {
          results[r][v] = minimum * splat(bits_as<float>(load_lane(of_row + kCorrectionAt))) + results[r][v];
        }
      }
    }
    left += kGroupBytesOfX;
    scales += kBytes;
    numbers += kBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) write_results<T, V>(a, row + r, column, results[r]);
}

template <class T, WeightKind kKind, bool kStream>
static inline void tile_rows(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes,
                             const std::byte* panel, std::int64_t row, std::int64_t column,
                             std::int64_t rows) {
  for (int within = 0; within < kPanel; within += kIntVectors * W) {
    switch (rows) {
#define SAPWOOD_ROWS(R)                                                                               \
  case R:                                                                                             \
    tile<T, kKind, R, kIntVectors, kStream>(a, x, row_bytes, panel, row, column + within, within);    \
    break;
      SAPWOOD_ROWS(1) SAPWOOD_ROWS(2)
#if defined(__AVX512F__)
      SAPWOOD_ROWS(3) SAPWOOD_ROWS(4) SAPWOOD_ROWS(5) SAPWOOD_ROWS(6)
#endif
#undef SAPWOOD_ROWS
      default: break;
    }
  }
}

template <class T, WeightKind kKind>
void multiply(const QuantizedArgs& a) {
  const LinearWeight& weight = *a.weight;
  const std::int64_t row_bytes = rounded_row_bytes(kKind, weight.k);
  const std::int64_t bytes = panel_bytes(kKind, weight.k);
  const Cut cut = cut_work(a, kTileHeight);
  const auto round = [&](std::int64_t row, std::byte* to) {
    round_row<T, kKind>(static_cast<const T*>(a.x) + row * a.x_stride, weight.k, to);
  };
  run_quantized(a, cut, round, [&](const std::byte* x, std::int64_t panel, std::int64_t panels,
                                   std::int64_t row, std::int64_t rows) {
    for (std::int64_t r = 0; r < rows; r += cut.tile_rows) {
      const std::int64_t count = least(cut.tile_rows, rows - r);
      for (std::int64_t p = panel; p < panel + panels; p++) {
        const std::byte* from = static_cast<const std::byte*>(weight.data) + p * bytes;
        r == 0 ? tile_rows<T, kKind, true>(a, x, row_bytes, from, row, p * kPanel, count)
               : tile_rows<T, kKind, false>(a, x + r * row_bytes, row_bytes, from, row + r, p * kPanel, count);
      }
    }
  });
}

template <class T>
void multiply_any(const QuantizedArgs& a) {
  switch (a.weight->kind) {
    case WeightKind::q8_0: multiply<T, WeightKind::q8_0>(a); break;
    case WeightKind::q4_0: multiply<T, WeightKind::q4_0>(a); break;
    case WeightKind::q4_1: multiply<T, WeightKind::q4_1>(a); break;
    default: break;
  }
}

}  // namespace

void linear_grouped(DType dtype, const QuantizedArgs& args) {
  dtype == DType::f32 ? multiply_any<float>(args) : multiply_any<bf16>(args);
}

}  // namespace sapwood::SAPWOOD_ISA
