// What a group of weights holds (quantized.h): numbers, scales and minima. Included only by *.isa.cpp.
#pragma once

#include "quantized.h"
#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// W fp16 -> fp32.
SAPWOOD_INLINE VF load_halves(const std::byte* p) { return load(reinterpret_cast<const f16*>(p)); }

// The bits above the lowest four of the numbers in lane `lane` of the first (kHigh: the second) 16 inputs.
// `numbers` are the group's.
template <int kBits, bool kHigh>
SAPWOOD_INLINE VU top_bits(const std::byte* numbers, int lane) {
  if (kBits == 5) {
    const VU rest = load_lanes(numbers + 4 * kPanel * 4);
    return (kHigh ? rest >> lane : rest << (4 - lane)) & 0x10101010u;
  }
  const VU rest = load_lanes(numbers + (4 + lane / 2) * kPanel * 4);
  const bool upper = lane % 2 != 0;
  if (kHigh) return (upper ? rest >> 2 : rest << 2) & 0x30303030u;
  return (upper ? rest : rest << 4) & 0x30303030u;
}

template <int kBits, bool kHigh>
SAPWOOD_INLINE VU numbers_of(const std::byte* numbers, int lane) {
  const VU both = load_lanes(numbers + lane * kPanel * 4);
  if (kBits == 8) return both;
  const VU four = (kHigh ? both >> 4 : both) & 0x0f0f0f0fu;
  return kBits == 4 ? four : four | top_bits<kBits, kHigh>(numbers, lane);
}

// The scales and minima of run kRun of a group: d and least of its block, times the run's integers; or, in
// a layout without heads, the group's own fp16 numbers.
template <WeightKind kKind, int kRun, int V>
SAPWOOD_INLINE void read_scales(const std::byte* group, int within, const VF (&d)[V], const VF (&least)[V],
                                VF (&scale)[V], VF (&minimum)[V]) {
  constexpr Layout kLayout = layout_of(kKind);
  constexpr int kRuns = kGroup / kLayout.run;
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) {
    const int column = within + v * W;
    if (kLayout.heads) {
      scale[v] = d[v] * to_floats(load_bytes(group + kRun * kPanel + column));
      if (kLayout.minima) minimum[v] = least[v] * to_floats(load_bytes(group + (kRuns + kRun) * kPanel + column));
    } else {
      scale[v] = load_halves(group + column * 2);
      if (kLayout.minima) minimum[v] = load_halves(group + (kPanel + column) * 2);
    }
  }
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
