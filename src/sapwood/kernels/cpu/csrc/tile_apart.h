// Products of rows that lie apart in memory, as they lie, for processors without a matrix unit. Included only by
// attention.isa.cpp.
#pragma once

#include "matrix.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Whether multiply_on takes a matrix unit for so many rows of T.
template <class T>
constexpr bool multiplies_on_unit([[maybe_unused]] std::int64_t rows) {
#if defined(SAPWOOD_UNIT)
  return is_only_on_unit<T>() || uses_unit<T>(rows);
#else
  return false;
#endif
}

// c[n, V * W] = rows of lanes that lie apart x b[lanes, V * W], each the sum of kScoreSums. Calls before(first, last) before rows
// [first, last), of which the last ones may be beyond n.
template <class T, int V, class Before>
static inline void tile_apart(const void* const* rows, int n, const std::uint32_t* b, std::int64_t b_stride,
                              int lanes, float* c, const Before& before) {
  constexpr int R = V == 1 ? 8 : kTileRows;  // sums enough that none waits for the one before
  for (int t = 0; t < n; t += R) {
    before(t, t + R);
    const std::uint32_t* left[R];  // beyond n the last row again
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) left[r] = static_cast<const std::uint32_t*>(rows[least(t + r, n - 1)]);
    for (int first = 0; first < kScoreSums; first++) {
      VF sums[R][V] = {};
      for (int lane = first; lane < lanes; lane += kScoreSums) {
        VU right[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) right[v] = load_lanes(b + lane * b_stride + v * W);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
          const Factor factor = load_factor(left[r] + lane);
#pragma GCC unroll 16
          for (int v = 0; v < V; v++) sums[r][v] = dot(tag<T>(), sums[r][v], factor, right[v]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        if (t + r >= n) break;
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
          float* to = c + ((t + r) * V + v) * W;
          store(to, first > 0 ? load(to) + sums[r][v] : sums[r][v]);
        }
      }
    }
  }
}

// tile_apart with `vectors` vectors, at most kTileVectors.
template <class T, class Before>
static inline void multiply_apart(const void* const* rows, int n, const std::uint32_t* b, std::int64_t b_stride,
                                  int lanes, float* c, int vectors, const Before& before) {
  switch (vectors) {
    case 1: tile_apart<T, 1>(rows, n, b, b_stride, lanes, c, before); break;
    case 2: tile_apart<T, 2>(rows, n, b, b_stride, lanes, c, before); break;
    case 3: tile_apart<T, least(3, kTileVectors)>(rows, n, b, b_stride, lanes, c, before); break;
    default: tile_apart<T, kTileVectors>(rows, n, b, b_stride, lanes, c, before); break;
  }
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
