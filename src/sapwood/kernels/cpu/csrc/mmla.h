// Products on the matrix instructions of ARM processors that have bf16 (BFMMLA).
//
// An instruction multiplies two rows of four bf16 with two columns of four, which is as many products
// as two dot products (BFDOT) of two, in the same order and with the same rounding: results do not
// depend on which of them served. What lies in memory needs no other layout: two lanes (see simd.h) of
// four columns, zipped, are two pairs of columns. Rows of a are put side by side once for all columns.
// Source: Arm Architecture Reference Manual for A-profile architecture, BFMMLA (vector).
// Included only by matrix.h.
#pragma once

#include "tile.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr int kLeastUnitRows = 4;  // with fewer rows, preparing them costs more than is gained
constexpr int kMostPassRows = 12;  // in pairs, times 8 columns: 24 registers of sums

class MatrixUnit {
 public:
  // c[rows, columns] (+)= a[rows, lanes] x b[lanes, columns] of bf16; columns is a multiple of 32.
  // Strides in lanes. kFetched lines are prefetched per lane, as in tile(). kAddAfter: of at most kMostLanes lanes.
  template <int kAdd, int kFetched = 0>
  void multiply(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b,
                std::int64_t b_stride, float* c, std::int64_t c_stride, int rows, int columns, int lanes,
                const Ahead& ahead = {}) {
    const int whole = lanes / 2 * 2;
    const int passes = (rows + kMostPassRows - 1) / kMostPassRows;
    const int height = ((rows + passes - 1) / passes + 1) / 2 * 2;
    for (int first = 0; first < whole; first += kMostLanes) {
      const int count = static_cast<int>(least(kMostLanes, whole - first));
      for (int r = 0; r < rows; r += height) {
        const Pass pass{b + first * b_stride, b_stride, c + r * c_stride, c_stride,
                        static_cast<int>(least(height, rows - r)), columns, count,
                        kAdd == 1 || first > 0, kAdd == kAddAfter && lanes <= kMostLanes};
        const Ahead from{ahead.at + first * ahead.stride, ahead.stride};
        pair_up(a + r * a_stride + first, a_stride, pass.rows, count);
        r == 0 ? run<kFetched>(pass, from) : run<0>(pass, from);
      }
    }
    if (whole == lanes) return;
    if (whole > 0) {
      multiply_tile<bf16, true>(a + whole, a_stride, b + whole * b_stride, b_stride, c, c_stride, rows, columns, 1);
    } else {
      multiply_tile<bf16, kAdd>(a, a_stride, b, b_stride, c, c_stride, rows, columns, 1);
    }
  }

 private:
  static constexpr int kMostLanes = 384;

  struct Pass {
    const std::uint32_t* b;
    std::int64_t b_stride;
    float* c;
    std::int64_t c_stride;
    int rows, columns, lanes;
    bool adds, adds_after;  // to what c holds: from the first product on, or the sum of all
  };

  // pairs_[lanes / 2, pairs]: two lanes of a row, then those of the row below it, or zeros.
  void pair_up(const std::uint32_t* a, std::int64_t a_stride, int rows, int lanes) {
    const int pairs = (rows + 1) / 2;
    for (int p = 0; p < pairs; p++) {
      const std::uint32_t* upper = a + 2 * p * a_stride;
      const bool is_whole = 2 * p + 1 < rows;
      for (int lane = 0; lane < lanes; lane += 2) {
        const uint32x2_t below = is_whole ? vld1_u32(upper + a_stride + lane) : vdup_n_u32(0);
        vst1q_u32(pairs_ + (lane / 2 * pairs + p) * 4, vcombine_u32(vld1_u32(upper + lane), below));
      }
    }
  }

  template <int kFetched>
  void run(const Pass& pass, const Ahead& ahead) const {
    switch ((pass.rows + 1) / 2) {
#define SAPWOOD_PAIRS(P) \
  case P: multiply_pairs<P, kFetched>(pass, ahead); break;
      SAPWOOD_PAIRS(1) SAPWOOD_PAIRS(2) SAPWOOD_PAIRS(3) SAPWOOD_PAIRS(4) SAPWOOD_PAIRS(5) SAPWOOD_PAIRS(6)
#undef SAPWOOD_PAIRS
      default: break;
    }
  }

  template <int P, int kFetched>
  void multiply_pairs(const Pass& pass, const Ahead& ahead) const {
    multiply_columns<P, kFetched>(pass, 0, ahead);
    for (int column = kColumns; column < pass.columns; column += kColumns) multiply_columns<P, 0>(pass, column, {});
  }

  static constexpr int kColumns = 8;

  // A register of sums is two rows by two columns; of a row, `kColumns` are two vectors.
  template <int P, int kFetched>
  void multiply_columns(const Pass& pass, int column, const Ahead& ahead) const {
    float* c = pass.c + column;
    float32x4_t sums[P][4];
#pragma GCC unroll 6
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const bool has_below = 2 * p + 1 < pass.rows;
        const float* at = c + 2 * p * pass.c_stride + 4 * v;
        const VF upper = pass.adds ? load(at) : VF{}, below = pass.adds && has_below ? load(at + pass.c_stride) : VF{};
        sums[p][2 * v] = low_halves(bits_as<float32x4_t>(upper), bits_as<float32x4_t>(below));
        sums[p][2 * v + 1] = high_halves(bits_as<float32x4_t>(upper), bits_as<float32x4_t>(below));
      }
    }
    const std::uint32_t* left = pairs_;
    const std::uint32_t* b = pass.b + column;
    for (int lane = 0; lane < pass.lanes; lane += 2, b += 2 * pass.b_stride) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kFetched; i++) {
        __builtin_prefetch(ahead.at + (lane + i % 2) * ahead.stride + i / 2 * kLineLanes, 0, 2);
      }
      bfloat16x8_t right[4];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        const uint32x4_t first = vld1q_u32(b + 4 * v), second = vld1q_u32(b + pass.b_stride + 4 * v);
        right[2 * v] = vreinterpretq_bf16_u32(vzip1q_u32(first, second));
        right[2 * v + 1] = vreinterpretq_bf16_u32(vzip2q_u32(first, second));
      }
#pragma GCC unroll 6
      for (int p = 0; p < P; p++, left += 4) {
        const bfloat16x8_t rows = vreinterpretq_bf16_u32(vld1q_u32(left));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[p][i] = vbfmmlaq_f32(sums[p][i], rows, right[i]);
      }
    }
#pragma GCC unroll 6
    for (int p = 0; p < P; p++) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) {
        float* at = c + 2 * p * pass.c_stride + 4 * v;
        put(pass, at, low_halves(sums[p][2 * v], sums[p][2 * v + 1]));
        if (2 * p + 1 < pass.rows) put(pass, at + pass.c_stride, high_halves(sums[p][2 * v], sums[p][2 * v + 1]));
      }
    }
  }

  static void put(const Pass& pass, float* at, float32x4_t sums) {
    vst1q_f32(at, pass.adds_after ? vaddq_f32(vld1q_f32(at), sums) : sums);
  }

  static float32x4_t low_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }
  static float32x4_t high_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  }

  alignas(64) std::uint32_t pairs_[kMostLanes / 2 * kMostPassRows / 2 * 4];
};

// Whether the unit multiplies so many rows of T.
template <class T>
constexpr bool uses_unit(std::int64_t rows) {
  return Pack<T>::per_lane == 2 && rows >= kLeastUnitRows;
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
