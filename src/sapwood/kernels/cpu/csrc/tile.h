// Register tiles and repacking over lanes (see simd.h). Included only by *.isa.cpp.
#pragma once

#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Rows a and b of 2 W bf16 -> lanes[0..1]: lane j holds (a[j], b[j]).
SAPWOOD_INLINE void interleave(const bf16* a, const bf16* b, VU* lanes) {
#if defined(__AVX512BW__)
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                       39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  lanes[0] = bits_as<VU>(_mm512_permutex2var_epi16(x, low, y));
  lanes[1] = bits_as<VU>(_mm512_permutex2var_epi16(x, high, y));
#elif defined(SAPWOOD_NEON)
  const uint16x8_t x = vld1q_u16(&a->bits), y = vld1q_u16(&b->bits);
  lanes[0] = bits_as<VU>(vzip1q_u16(x, y));
  lanes[1] = bits_as<VU>(vzip2q_u16(x, y));
#else
  lanes[0] = load_widened(a) | (load_widened(b) << 16);
  lanes[1] = load_widened(a + W) | (load_widened(b + W) << 16);
#endif
}

#if defined(__AVX512F__)
// A 16 x 16 block of lanes, transposed in registers.
SAPWOOD_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4 q + c] now holds, in its 128-bit quarter p, column 4 p + c of rows 4 q .. 4 q + 3.
#pragma GCC unroll 16
  for (int c = 0; c < 4; c++) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; c++) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}
#elif defined(SAPWOOD_NEON)
// A 4 x 4 block of lanes, transposed in registers.
SAPWOOD_INLINE void transpose4(const uint32x4_t* r, std::uint32_t* out, std::int64_t stride) {
  const uint64x2_t low01 = vreinterpretq_u64_u32(vtrn1q_u32(r[0], r[1]));
  const uint64x2_t low23 = vreinterpretq_u64_u32(vtrn1q_u32(r[2], r[3]));
  const uint64x2_t high01 = vreinterpretq_u64_u32(vtrn2q_u32(r[0], r[1]));
  const uint64x2_t high23 = vreinterpretq_u64_u32(vtrn2q_u32(r[2], r[3]));
  vst1q_u32(out, vreinterpretq_u32_u64(vtrn1q_u64(low01, low23)));
  vst1q_u32(out + stride, vreinterpretq_u32_u64(vtrn1q_u64(high01, high23)));
  vst1q_u32(out + 2 * stride, vreinterpretq_u32_u64(vtrn2q_u64(low01, low23)));
  vst1q_u32(out + 3 * stride, vreinterpretq_u32_u64(vtrn2q_u64(high01, high23)));
}
#endif

// out[lane][t] = lane `lane` of rows[t]; columns from n up to the next multiple of 32 become 0.
// lanes is a multiple of 16, out_stride at least n rounded up to 32.
static inline void transpose_lanes(const void* const* rows, int n, int lanes, std::uint32_t* out,
                                   int out_stride) {
  const int padded = (n + 31) / 32 * 32;
#if defined(__AVX512F__)
  for (int t = 0; t < padded; t += 16) {
    for (int lane = 0; lane < lanes; lane += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        block[i] = t + i < n ? _mm512_loadu_si512(static_cast<const char*>(rows[t + i]) + lane * 4)
                             : _mm512_setzero_si512();
      }
      transpose16(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (lane + i) * out_stride + t, block[i]);
    }
  }
#elif defined(SAPWOOD_NEON)
  for (int t = 0; t < padded; t += 4) {
    for (int lane = 0; lane < lanes; lane += 4) {
      uint32x4_t block[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        block[i] = t + i < n ? vld1q_u32(static_cast<const std::uint32_t*>(rows[t + i]) + lane) : vdupq_n_u32(0);
      }
      transpose4(block, out + lane * out_stride + t, out_stride);
    }
  }
#else
  for (int t = 0; t < padded; t++) {
    for (int lane = 0; lane < lanes; lane++) {
      out[lane * out_stride + t] =
          t < n ? load_lane(static_cast<const char*>(rows[t]) + lane * 4) : 0;
    }
  }
#endif
}

// Memory that is prefetched during a product, since the next product reads it. The hardware's own
// prefetching reaches only 70% of this one's speed.
struct Ahead {
  const std::uint32_t* at = nullptr;
  std::int64_t stride = 0;
};

constexpr int kLineLanes = 16;  // lanes in a cache line

// What becomes of a product's sums, where a template asks for kAdd: they replace c (false), begin with c (true), or
// are made by themselves and then added to c.
constexpr int kAddAfter = 2;

// Lanes l, l + 4, l + 8 .. of a query and a key are multiplied and added up in order; the four sums of a score are
// added in order in the end. Products of a few rows, which read keys as they lie, and of many, which repack them, are
// both fast in this order, and so have the same result. Only matrix units of x86 have an order of their own, and there
// all products are theirs.
constexpr int kScoreSums = 4;

// c[R, V * W] (+)= a[R, lanes] x b[lanes, V * W]: a's lane is broadcast against b's vectors.
// kFetched: cache lines that are prefetched per lane, from `ahead.at` on, lanes' `ahead.stride` apart.
template <class T, int kAdd, int R, int V, int kFetched = 0>
static inline void tile(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b,
                        std::int64_t b_stride, float* c, std::int64_t c_stride, int lanes,
                        const Ahead& ahead = {}) {
  VF sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) sums[r][v] = kAdd == 1 ? load(c + r * c_stride + v * W) : VF{};
  for (int lane = 0; lane < lanes; lane++) {
#pragma GCC unroll 2
    for (int i = 0; i < kFetched; i++) {
      __builtin_prefetch(ahead.at + lane * ahead.stride + i * kLineLanes, 0, 2);
    }
    VU right[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) right[v] = load_lanes(b + lane * b_stride + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Factor left = load_factor(a + r * a_stride + lane);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[r][v] = dot(tag<T>(), sums[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      float* to = c + r * c_stride + v * W;
      store(to, kAdd == kAddAfter ? load(to) + sums[r][v] : sums[r][v]);
    }
}

// Rows that are left over, fewer than kTileRows.
template <class T, int kAdd, int V, int kFetched>
static inline void tile_rest(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b,
                             std::int64_t b_stride, float* c, std::int64_t c_stride, int rows, int lanes,
                             const Ahead& ahead) {
  switch (rows) {
    case 5: tile<T, kAdd, 5, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, lanes, ahead); break;
    case 4: tile<T, kAdd, 4, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, lanes, ahead); break;
    case 3: tile<T, kAdd, 3, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, lanes, ahead); break;
    case 2: tile<T, kAdd, 2, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, lanes, ahead); break;
    case 1: tile<T, kAdd, 1, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, lanes, ahead); break;
    default: break;
  }
}

// Only the first rows fetch what is `ahead`.
template <class T, int kAdd, int V, int kFetched>
static inline void tile_rows(const std::uint32_t* a, std::int64_t a_stride, const std::uint32_t* b,
                             std::int64_t b_stride, float* c, std::int64_t c_stride, int rows, int lanes,
                             const Ahead& ahead) {
  if (rows < kTileRows) {
    tile_rest<T, kAdd, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, rows, lanes, ahead);
    return;
  }
  tile<T, kAdd, kTileRows, V, kFetched>(a, a_stride, b, b_stride, c, c_stride, lanes, ahead);
  int r = kTileRows;
  for (; r + kTileRows <= rows; r += kTileRows) {
    tile<T, kAdd, kTileRows, V>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, lanes);
  }
  tile_rest<T, kAdd, V, 0>(a + r * a_stride, a_stride, b, b_stride, c + r * c_stride, c_stride, rows - r, lanes, {});
}

// c[rows, columns] (+)= a[rows, lanes] x b[lanes, columns]; columns is a multiple of 32.
template <class T, int kAdd, int kFetched = 0>
static inline void multiply_tile(const std::uint32_t* a, std::int64_t a_stride,
                                 const std::uint32_t* b, std::int64_t b_stride, float* c,
                                 std::int64_t c_stride, int rows, int columns, int lanes,
                                 const Ahead& ahead = {}) {
  int column = 0;
  for (; column + kTileVectors * W <= columns; column += kTileVectors * W) {
    if (kFetched > 0 && column == 0) {
      tile_rows<T, kAdd, kTileVectors, kFetched>(a, a_stride, b, b_stride, c, c_stride, rows, lanes, ahead);
    } else {
      tile_rows<T, kAdd, kTileVectors, 0>(a, a_stride, b + column, b_stride, c + column, c_stride, rows, lanes, {});
    }
  }
  if (column < columns) {  // 32 columns of a tile that is 64 wide
    tile_rows<T, kAdd, 32 / W < kTileVectors ? 32 / W : kTileVectors, 0>(
        a, a_stride, b + column, b_stride, c + column, c_stride, rows, lanes, {});
  }
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
