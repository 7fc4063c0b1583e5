// Register tiles of attention's two products for rows of one token: keys and values as they lie. Included only by
// attention.isa.cpp.
#pragma once

#include "tile.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Where registers are 32 of 16 floats, 16 sums hide that a product takes six cycles, of which two begin in each.
// Others keep sums that fit beside the factors.
constexpr bool kWideRowTiles = W == 16;
constexpr int kScoredKeys = 4, kScoredRows = kWideRowTiles ? 4 : 1;
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

// scores[r * score_stride + t] = q[r * d ..] x keys[t][0 .. d), for R queries and kScoredKeys keys.
template <class T, int R>
static inline void score_tile(const T* q, const T* const* keys, int d, float* scores, std::int64_t score_stride) {
  constexpr int step = W * Pack<T>::per_lane;
  VF sums[R][kScoredKeys] = {};
  const T *k0 = keys[0], *k1 = keys[1], *k2 = keys[2], *k3 = keys[3];
  for (int i = 0; i < d; i += step) {
    const VU a = load_lanes(k0 + i), b = load_lanes(k1 + i), c = load_lanes(k2 + i), e = load_lanes(k3 + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const VU lanes = load_lanes(q + r * d + i);
      sums[r][0] = dot(tag<T>(), sums[r][0], lanes, a);
      sums[r][1] = dot(tag<T>(), sums[r][1], lanes, b);
      sums[r][2] = dot(tag<T>(), sums[r][2], lanes, c);
      sums[r][3] = dot(tag<T>(), sums[r][3], lanes, e);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const V4 four = sum4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    __builtin_memcpy(scores + r * score_stride, &four, sizeof(four));
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
