// Panels of groups (quantized.h) as fp32 or bf16, as products of those take a panel (pack.h). Included only by
// *.isa.cpp.
#pragma once

#include "groups.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kGroupsAheadBytes = 4096;  // of a panel, prefetched

// Numbers of two inputs -> lanes of two bf16, rounded to the nearest even.
SAPWOOD_INLINE VU rounded_pair(VF first, VF second) {
#if defined(__AVX512BF16__)
  const __m512bh halves = _mm512_cvtne2ps_pbh(bits_as<__m512>(second), bits_as<__m512>(first));
  const __m512i order = bits_as<__m512i>(
      (VU{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x00010001u) + 0x00100000u);
  return bits_as<VU>(_mm512_permutexvar_epi16(order, (__m512i)halves));
#else
  const auto rounded = [](VF number) {
    const VU bits = bits_as<VU>(number);
    return bits + splat_lane(0x7fffu) + ((bits >> 16) & 1u);
  };
  return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
#endif
}

// Byte `place` of each lane as an unsigned number.
SAPWOOD_INLINE VF byte_at(VU lane, int place) {
  return __builtin_convertvector(bits_as<VI>((lane >> (8 * place)) & 255u), VF);
}

// Groups of one kind -> numbers of P.
template <WeightKind kKind, class P>
class GroupedPanel {
 public:
  // Lanes [lane, lane + lanes) of a panel, which are whole groups -> out [lanes, 32].
  static void read(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* out) {
    constexpr std::int64_t kGroups = block_groups(kLayout);
    for (std::int64_t group = lane / kLanes; group < (lane + lanes) / kLanes; group++, out += kLanes * kPanel) {
      const std::byte* block = panel + group / kGroups * block_bytes(kLayout);
      const std::byte* from = block + head_bytes(kLayout) + group % kGroups * group_bytes(kLayout);
      for (std::int64_t i = 0; i < group_bytes(kLayout); i += 64) {
        __builtin_prefetch(from + kGroupsAheadBytes + i, 0, 2);
      }
      for (int column = 0; column < kPanel; column += W) read_group(block, from, column, out + column);
    }
  }

 private:
  static constexpr Layout kLayout = layout_of(kKind);
  static constexpr int kRuns = kGroup / kLayout.run;
  static constexpr std::int64_t kLanes = kGroup / Pack<P>::per_lane;  // of a group

  __attribute__((always_inline)) static void read_group(const std::byte* block, const std::byte* group, int column,
                                        std::uint32_t* out) {
    VF d[1] = {}, least[1] = {}, scale[kRuns][1], minimum[kRuns][1] = {};
    if (kLayout.heads) {
      d[0] = load_halves(block + column * 2);
      if (kLayout.minima) least[0] = load_halves(block + (kPanel + column) * 2);
    }
    read_scales<kKind, 0>(group, column, d, least, scale[0], minimum[0]);
    if constexpr (kRuns == 2) read_scales<kKind, 1>(group, column, d, least, scale[1], minimum[1]);
    const std::byte* numbers = group + scale_bytes(kLayout) + column * 4;
#pragma GCC unroll 4
    for (int lane = 0; lane < 4; lane++) {
      constexpr int kSecond = kLayout.bits == 8 ? 4 : 0;
      put(numbers_of<kLayout.bits, false>(numbers, lane), scale[0][0], minimum[0][0], out, 4 * lane);
      put(numbers_of<kLayout.bits, true>(numbers, kSecond + lane), scale[kRuns - 1][0], minimum[kRuns - 1][0],
          out, 16 + 4 * lane);
    }
  }

  // Four inputs of a group, from `input` on.
  __attribute__((always_inline)) static void put(VU numbers, VF scale, VF minimum, std::uint32_t* group, int input) {
    const VF base = kLayout.minima ? minimum : scale * splat(-static_cast<float>(kLayout.offset));
    std::uint32_t* out = group + input / Pack<P>::per_lane * kPanel;
    VF values[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) values[i] = byte_at(numbers, i) * scale + base;
    if constexpr (Pack<P>::per_lane == 2) {
      store_lanes(out, rounded_pair(values[0], values[1]));
      store_lanes(out + kPanel, rounded_pair(values[2], values[3]));
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) store_lanes(out + i * kPanel, bits_as<VU>(values[i]));
    }
  }
};

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
