// What one thread needs to compute attention. Included only by attention.isa.cpp.
#pragma once

#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::size_t kAlign = 64;
constexpr std::size_t kOneTileLanes = 2 * 16 * kKeyTile;  // probabilities of 16 rows, each alone in a lane, twice

constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The scratch of one thread, cut from one buffer.
template <class T>
struct Scratch {
  float* out;           // [rows, D] unnormalised
  float* scores;        // [rows, kKeyTile]
  float* max;           // [rows] of the scaled scores, as powers of 2
  float* total;         // [rows, W] to be added up at the end
  T* q;                 // [rows, D], or [D / per_lane, rows] lanes
  T* probabilities;     // [rows, kKeyTile]
  std::uint32_t* keys;  // [D / per_lane, kKeyTile] lanes, or scores of some rows by key
  std::uint32_t* values;  // [kKeyTile / per_lane, D] lanes, or probabilities where values are read as they lie
  std::int64_t* rows;     // [2, kKeyTile] offsets of token rows within key(0) and value(0), elements
  std::int64_t* ahead;    // [2, kKeyTile] of rows to be fetched within the caches, bytes
  T* dense;               // [2, kKeyTile, D] a tile that is stored in 8 bits, or whose keys lie apart
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
    cut(out, rows_ * d_);
    cut(scores, rows_ * kKeyTile);
    cut(max, rows_);
    cut(total, rows_ * W);
    cut(q, rows_ * d_);
    cut(probabilities, rows_ * kKeyTile);
    cut(keys, d_ / Pack<T>::per_lane * kKeyTile);
    const std::size_t value_lanes = kKeyTile / Pack<T>::per_lane * d_;
    cut(values, value_lanes < kOneTileLanes ? kOneTileLanes : value_lanes);
    cut(rows, 2 * kKeyTile);
    cut(ahead, 2 * kKeyTile);
    cut(dense, 2 * kKeyTile * d_);
    bytes = used;
  }
};

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
