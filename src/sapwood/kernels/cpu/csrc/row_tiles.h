// Register tiles of attention's two products for rows of one token: keys and values as they lie. Results are those of
// the products of many rows, bit by bit. Included only by attention.isa.cpp.
#pragma once

#include "tile.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Where registers are 32 of 16 floats, 16 sums hide that a product takes six cycles, of which two begin in each.
// Others keep sums that fit beside the factors.
constexpr bool kWideRowTiles = W == 16;
constexpr int kBlocks = W / 4;  // of four lanes in a vector
constexpr int kScoredKeys = W, kScoredRows = kWideRowTiles ? 4 : 2;
constexpr int kSummedVectors = 2, kSummedRows = kWideRowTiles ? 8 : 4;
// Up to this many query rows of a token leave rows that are keys and values as they lie; for more, to repack them pays.
constexpr int kLongRowKernelRows = kWideRowTiles ? 64 : kRowKernelRows;
constexpr int kFetchTo = 2;  // the second-level cache
constexpr int kLineBytes = 64;

// One cache line of each of `count` rows, which begin `rows` bytes after where the line is in a row at 0.
struct FetchedLines {
  const char* line;
  const std::int64_t* rows;
  int count;
};

// Inlined by force: a call of a function that only prefetches has no effect that GCC knows of, and is dropped.
SAPWOOD_INLINE void fetch(const FetchedLines& lines, int begin, int end) {
  for (int i = begin; i < end; i++) __builtin_prefetch(lines.line + lines.rows[i], 0, kFetchTo);
}

// Four vectors, from element i on of the keys t, t + 4, t + 8 ..: chunks[c] has the c-th four lanes of each.
template <class T>
SAPWOOD_INLINE void load_chunks(const T* const* keys, int t, int i, VU* chunks) {
#if defined(__AVX512F__)
  const __m512i a = _mm512_loadu_si512(keys[t] + i), b = _mm512_loadu_si512(keys[t + 4] + i);
  const __m512i c = _mm512_loadu_si512(keys[t + 8] + i), d = _mm512_loadu_si512(keys[t + 12] + i);
  const __m512i ab_even = _mm512_shuffle_i32x4(a, b, 0x88), ab_odd = _mm512_shuffle_i32x4(a, b, 0xdd);
  const __m512i cd_even = _mm512_shuffle_i32x4(c, d, 0x88), cd_odd = _mm512_shuffle_i32x4(c, d, 0xdd);
  chunks[0] = bits_as<VU>(_mm512_shuffle_i32x4(ab_even, cd_even, 0x88));
  chunks[1] = bits_as<VU>(_mm512_shuffle_i32x4(ab_odd, cd_odd, 0x88));
  chunks[2] = bits_as<VU>(_mm512_shuffle_i32x4(ab_even, cd_even, 0xdd));
  chunks[3] = bits_as<VU>(_mm512_shuffle_i32x4(ab_odd, cd_odd, 0xdd));
#elif defined(__AVX2__)
  const __m256i a = bits_as<__m256i>(load_lanes(keys[t] + i)), b = bits_as<__m256i>(load_lanes(keys[t + 4] + i));
  chunks[0] = bits_as<VU>(_mm256_permute2x128_si256(a, b, 0x20));
  chunks[1] = bits_as<VU>(_mm256_permute2x128_si256(a, b, 0x31));
#else
  chunks[0] = load_lanes(keys[t] + i);
#endif
}

// The four lanes at p, kBlocks times.
SAPWOOD_INLINE VU repeat_chunk(const void* p) {
#if defined(__AVX512F__)
  return bits_as<VU>(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bits_as<VU>(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  return load_lanes(p);
#endif
}

// Each block of four lanes of four vectors, transposed in place.
SAPWOOD_INLINE void transpose_blocks(VF* v) {
#if defined(__AVX512F__)
  const __m512 a = bits_as<__m512>(v[0]), b = bits_as<__m512>(v[1]), c = bits_as<__m512>(v[2]), d = bits_as<__m512>(v[3]);
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
  v[0] = bits_as<VF>(_mm512_unpacklo_pd(ab_low, cd_low));
  v[1] = bits_as<VF>(_mm512_unpackhi_pd(ab_low, cd_low));
  v[2] = bits_as<VF>(_mm512_unpacklo_pd(ab_high, cd_high));
  v[3] = bits_as<VF>(_mm512_unpackhi_pd(ab_high, cd_high));
#elif defined(__AVX2__)
  const __m256 a = bits_as<__m256>(v[0]), b = bits_as<__m256>(v[1]), c = bits_as<__m256>(v[2]), d = bits_as<__m256>(v[3]);
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  v[0] = bits_as<VF>(_mm256_unpacklo_pd(ab_low, cd_low));
  v[1] = bits_as<VF>(_mm256_unpackhi_pd(ab_low, cd_low));
  v[2] = bits_as<VF>(_mm256_unpacklo_pd(ab_high, cd_high));
  v[3] = bits_as<VF>(_mm256_unpackhi_pd(ab_high, cd_high));
#else
  const VF a = v[0], b = v[1], c = v[2], d = v[3];
  v[0] = VF{a[0], b[0], c[0], d[0]};
  v[1] = VF{a[1], b[1], c[1], d[1]};
  v[2] = VF{a[2], b[2], c[2], d[2]};
  v[3] = VF{a[3], b[3], c[3], d[3]};
#endif
}

// scores[r * score_stride + t] = q[r * d ..] x keys[t][0 .. d), for R queries and kScoredKeys keys.
// A score has kScoreSums sums, as wherever no matrix unit makes it (see kScoreSums).
template <class T, int R>
static inline void score_tile(const T* q, const T* const* keys, int d, float* scores, std::int64_t score_stride) {
  constexpr int chunk = 4 * Pack<T>::per_lane;
  VF sums[R][4] = {};
  for (int i = 0; i < d; i += kBlocks * chunk) {
#pragma GCC unroll 4
    for (int t = 0; t < 4; t++) {
      VU chunks[kBlocks];
      load_chunks(keys, t, i, chunks);
#pragma GCC unroll 4
      for (int c = 0; c < kBlocks; c++) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          sums[r][t] = dot(tag<T>(), sums[r][t], repeat_chunk(q + r * d + i + c * chunk), chunks[c]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    transpose_blocks(sums[r]);
    store(scores + r * score_stride, sums[r][0] + sums[r][1] + sums[r][2] + sums[r][3]);
  }
}

// The scores of R rows and two vectors of keys, both repacked: lanes of a row one sum after the other, keys lane by lane.
template <class T, int R>
static inline void score_packed_tile(const std::uint32_t* q, int lanes, const std::uint32_t* keys, float* scores) {
  const int each = lanes / kScoreSums;
  VF totals[R][2];
#pragma GCC unroll 4
  for (int part = 0; part < kScoreSums; part++) {
    VF sums[R][2] = {};
    for (int i = 0; i < each; i++) {
      const std::uint32_t* at = keys + (i * kScoreSums + part) * kKeyTile;
      const VU first = load_lanes(at), second = load_lanes(at + W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Factor left = load_factor(q + r * lanes + part * each + i);
        sums[r][0] = dot(tag<T>(), sums[r][0], left, first);
        sums[r][1] = dot(tag<T>(), sums[r][1], left, second);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) totals[r][v] = part == 0 ? sums[r][v] : totals[r][v] + sums[r][v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    store(scores + r * kKeyTile, totals[r][0]);
    store(scores + r * kKeyTile + W, totals[r][1]);
  }
}

// columns: a multiple of two vectors
template <class T>
static inline void score_packed_rows(const std::uint32_t* q, int lanes, const std::uint32_t* keys, float* scores,
                                     int rows, int columns) {
  for (int column = 0; column < columns; column += 2 * W) {
    for (int r = 0; r < rows; r += kTileRows) {
      const std::uint32_t* from = q + r * lanes;
      float* to = scores + r * kKeyTile + column;
      switch (rows - r) {
        case 1: score_packed_tile<T, 1>(from, lanes, keys + column, to); break;
        case 2: score_packed_tile<T, 2>(from, lanes, keys + column, to); break;
        case 3: score_packed_tile<T, 3>(from, lanes, keys + column, to); break;
        case 4: score_packed_tile<T, 4>(from, lanes, keys + column, to); break;
        case 5: score_packed_tile<T, least(5, kTileRows)>(from, lanes, keys + column, to); break;
        default: score_packed_tile<T, kTileRows>(from, lanes, keys + column, to); break;
      }
    }
  }
}

// Two vectors of columns of one lane's tokens, from column d on: lane j holds column d + j of each token.
template <class T>
SAPWOOD_INLINE void load_pair(const T* values, const std::int64_t* rows, int d, VU* lanes) {
  if constexpr (Pack<T>::per_lane == 1) {
    lanes[0] = load_lanes(values + rows[0] + d);
    lanes[1] = load_lanes(values + rows[0] + d + W);
  } else {
    interleave(values + rows[0] + d, values + rows[1] + d, lanes);
  }
}

// out[r * out_stride ..] += weights[r * weights_stride ..] x values, for R rows and kSummedVectors vectors of columns.
// rows: where the values of each token begin, `pairs` lanes of them. `fetched` is fetched evenly meanwhile.
template <class T, int R>
static inline void add_tile(const T* weights, std::int64_t weights_stride, const T* values, const std::int64_t* rows,
                            int pairs, float* out, std::int64_t out_stride, const FetchedLines& fetched) {
  constexpr int pack = Pack<T>::per_lane;
  const int per_pair = (fetched.count + pairs - 1) / pairs;
  VF sums[R][kSummedVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kSummedVectors; v++) sums[r][v] = load(out + r * out_stride + v * W);
  for (int pair = 0; pair < pairs; pair++) {
    VU lanes[kSummedVectors];
    load_pair(values, rows + pair * pack, 0, lanes);
    fetch(fetched, pair * per_pair, static_cast<int>(least((pair + 1) * per_pair, fetched.count)));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Factor weight = load_factor(weights + r * weights_stride + pair * pack);
#pragma GCC unroll 8
      for (int v = 0; v < kSummedVectors; v++) sums[r][v] = dot(tag<T>(), sums[r][v], weight, lanes[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < kSummedVectors; v++) store(out + r * out_stride + v * W, sums[r][v]);
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
