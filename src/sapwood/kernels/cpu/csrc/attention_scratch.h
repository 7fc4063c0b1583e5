// What one thread needs to compute attention. Included only by attention.isa.cpp.
#pragma once

#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::size_t kAlign = 64;

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// What is summed over some keys, row by row.
struct Sums {
  float* out;    // [rows, D] unnormalised
  float* max;    // [rows] of the scaled scores, as powers of 2
  float* total;  // [rows, W] to be added up at the end
};

// The scratch of one thread, cut from one buffer.
template <class T>
struct Scratch {
  Sums sums;            // of this segment
  Sums earlier;         // of the segments before
  float* scores;        // [rows, kKeyTile]
  T* q;                 // [rows, D], or [D / per_lane, rows] lanes
  T* probabilities;     // [rows, kKeyTile]
  std::uint32_t* keys;  // [D / per_lane, kKeyTile] lanes, or scores of some rows by key
  std::uint32_t* values;  // [kKeyTile / per_lane, D] lanes
  std::int64_t* rows;     // [2, kKeyTile] offsets of token rows within key(0) and value(0), elements
  std::int64_t* ahead;    // [2, kKeyTile] of rows to be fetched within the caches, bytes
  T* dense;               // [2, kKeyTile, D] a tile that is stored in 8 bits
  T* apart;               // [kKeyTile, D] the keys of a tile that lie apart
  std::size_t bytes;

  Scratch(std::byte* base, int n, int d) {
    std::size_t used = 0;
    const auto cut = [&](auto*& field, std::size_t count) {
      using Element = __typeof__(*field);
      field = reinterpret_cast<Element*>(base + used);
      used += aligned(count * sizeof(Element));
    };
    // Whole tiles of a matrix unit.
    const std::size_t rows_ = (static_cast<std::size_t>(n) + 31) / 32 * 32, d_ = static_cast<std::size_t>(d);
    const auto cut_sums = [&](Sums& of) {
      cut(of.out, rows_ * d_);
      cut(of.max, rows_);
      cut(of.total, rows_ * W);
    };
    cut_sums(sums);
    cut_sums(earlier);
    cut(scores, rows_ * kKeyTile);
    cut(q, rows_ * d_);
    cut(probabilities, rows_ * kKeyTile);
    cut(keys, d_ / Pack<T>::per_lane * kKeyTile);
    cut(values, kKeyTile / Pack<T>::per_lane * d_);
    cut(rows, 2 * kKeyTile);
    cut(ahead, 2 * kKeyTile);
    cut(dense, 2 * kKeyTile * d_);
    cut(apart, kKeyTile * d_);
    bytes = used;
  }
};

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
