// out = x w^T + bias for many rows of bf16 and a quantised weight, on the matrix unit: the weight becomes
// bf16 while panels come into the cache (resident.h), and x is not rounded. With a few rows products of bytes
// (linear_int8, linear_grouped) or of codes (linear_coded) take less time, since that step is spared.
#include "coded.h"
#include "decoding.h"
#include "groups.h"
#include "quantized.h"
#include "resident.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 32768;  // of the weight; below, a thread costs too much
constexpr int kVectors = kPanel / W;

// Two inputs of some outputs -> lanes of two bf16, rounded.
SAPWOOD_INLINE VU rounded_pair(VF first, VF second) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(bits_as<__m512>(second), bits_as<__m512>(first));
  const __m512i order = bits_as<__m512i>(
      (VU{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} * 0x00010001u) + 0x00100000u);
  return bits_as<VU>(_mm512_permutexvar_epi16(order, (__m512i)halves));
}

// Byte `place` of each lane as an unsigned number.
SAPWOOD_INLINE VF byte_at(VU lane, int place) {
  return __builtin_convertvector(bits_as<VI>((lane >> (8 * place)) & 255u), VF);
}

// ---- what a weight is made bf16 by: all write lanes [lane, lane + lanes) of one panel to `out` ----

// int8, whose scale is left to the end: whole numbers are exact in bf16.
struct Int8Panel {
  explicit Int8Panel(const LinearWeight& weight) : bytes(panel_bytes(weight.kind, weight.k)) {}

  void read(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* out) const {
    const std::byte* from = panel + lane / 2 * kPanel * 4;
    for (std::int64_t i = 0; i < lanes; i += 2, from += kPanel * 4, out += 2 * kPanel) {
      for (int v = 0; v < kVectors; v++) {
        const VU numbers = load_lanes(from + v * W * 4) ^ 0x80808080u;
        __builtin_prefetch(from + v * W * 4 + kAheadBytes, 0, 2);
        store_lanes(out + v * W, pair(int8_at(numbers, 0), int8_at(numbers, 1)));
        store_lanes(out + kPanel + v * W, pair(int8_at(numbers, 2), int8_at(numbers, 3)));
      }
    }
  }

  std::int64_t bytes;
};

template <WeightKind kKind>
struct GroupedPanel {
  static constexpr Layout kLayout = layout_of(kKind);
  static constexpr int kRuns = kGroup / kLayout.run;

  explicit GroupedPanel(const LinearWeight& weight) : bytes(panel_bytes(kKind, weight.k)) {}

  void read(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* out) const {
    constexpr std::int64_t kLanes = kGroup / 2, kGroups = block_groups(kLayout);
    for (std::int64_t group = lane / kLanes; group < (lane + lanes) / kLanes; group++, out += kLanes * kPanel) {
      const std::byte* block = panel + group / kGroups * block_bytes(kLayout);
      const std::byte* from = block + head_bytes(kLayout) + group % kGroups * group_bytes(kLayout);
      for (std::int64_t i = 0; i < group_bytes(kLayout); i += 64) __builtin_prefetch(from + kAheadBytes + i, 0, 2);
      for (int v = 0; v < kVectors; v++) read_group(block, from, v * W, out + v * W);
    }
  }

  std::int64_t bytes;

 private:
  void read_group(const std::byte* block, const std::byte* group, int column, std::uint32_t* out) const {
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
      put(numbers_of<kLayout.bits, false>(numbers, lane), scale[0][0], minimum[0][0], out + 2 * lane * kPanel);
      put(numbers_of<kLayout.bits, true>(numbers, kSecond + lane), scale[kRuns - 1][0], minimum[kRuns - 1][0],
          out + (8 + 2 * lane) * kPanel);
    }
  }

  static void put(VU numbers, VF scale, VF minimum, std::uint32_t* out) {
    const VF base = kLayout.minima ? minimum : scale * splat(-static_cast<float>(kLayout.offset));
    VF values[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) values[i] = byte_at(numbers, i) * scale + base;
    store_lanes(out, rounded_pair(values[0], values[1]));
    store_lanes(out + kPanel, rounded_pair(values[2], values[3]));
  }
};

template <class Decode>
struct CodedPanel {
  explicit CodedPanel(const LinearWeight& weight)
      : layout(*weight.coded), e(extent_of(layout)), decode(layout.codes), bytes(e.panel_bytes) {}

  void read(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* out) const {
    constexpr std::int64_t kInputs = 2 * Decode::kSteps;  // of a lane of codes
    const std::int64_t end = 2 * (lane + lanes);
    for (std::int64_t input = 2 * lane; input < end;) {
      const std::int64_t group = input / e.group, last = least((group + 1) * e.group, end);
      const std::byte* head = panel + group * e.group_bytes;
      const std::byte* from = head + e.head_bytes + (input - group * e.group) / kInputs * kPanel * 4;
      VF scale[kVectors], shift[kVectors];
      for (int v = 0; v < kVectors; v++) {
        scale[v] = layout.narrow ? load(reinterpret_cast<const bf16*>(head) + v * W)
                                 : load(reinterpret_cast<const float*>(head) + v * W);
        const std::byte* shifts = head + (layout.narrow ? 2 : 4) * kPanel;
        shift[v] = layout.shifted ? load(reinterpret_cast<const bf16*>(shifts) + v * W) : VF{};
      }
      for (; input < last; input += kInputs, from += kPanel * 4) {
        for (int v = 0; v < kVectors; v++) {
          const VU codes = load_lanes(from + v * W * 4);
          __builtin_prefetch(from + v * W * 4 + kAheadBytes, 0, 2);
#pragma GCC unroll 4
          for (int step = 0; step < Decode::kSteps; step++) {
            const VU values = decode.at(codes, step);
            const VF first = bits_as<VF>(values << 16), second = bits_as<VF>(values & 0xffff0000u);
            store_lanes(out + step * kPanel + v * W,
                        rounded_pair((first + shift[v]) * scale[v], (second + shift[v]) * scale[v]));
          }
        }
        out += Decode::kSteps * kPanel;
      }
    }
  }

  const CodedLayout& layout;
  const Extent e;
  const Decode decode;
  const std::int64_t bytes;
};

template <class Panel>
struct Source {
  static constexpr bool kFetches = false;  // what is read is fetched while it becomes bf16
  const std::byte* data;
  Panel panel;

  Panels read(std::int64_t first, std::int64_t count, std::int64_t lane, std::int64_t lanes,
              std::uint32_t* decoded) const {
    for (std::int64_t p = 0; p < count; p++) {
      panel.read(data + (first + p) * panel.bytes, lane, lanes, decoded + p * lanes * kPanel);
    }
    return {decoded, lanes * kPanel};
  }
};

template <class Panel>
bool multiply(const QuantizedArgs& a) {
  const LinearWeight& w = *a.weight;
  const ManyRows rows{static_cast<const bf16*>(a.x), a.x_stride, a.m, w.n, w.k, a.scratch, a.team};
  const int threads = worth_threads(a.team.threads, w.n * w.k * ((a.m + 7) / 8), kElementsPerThread);
  multiply_many(rows, threads, Source<Panel>{static_cast<const std::byte*>(w.data), Panel(w)},
                [&](std::int64_t row, std::int64_t column, const float* sums, std::int64_t n) {
                  write_row(sums, n, w.scales, w.bias, a.wide, a.out, w.out_stride, row, column);
                });
  return true;
}

bool multiply_coded(const QuantizedArgs& a) {
  const CodedLayout& layout = *a.weight->coded;
  if (layout.order != nullptr || layout.k % 8 != 0) return false;
  switch (layout.codes) {
    case Codes::int8: return multiply<CodedPanel<Int8<bf16>>>(a);
    case Codes::e4m3: return multiply<CodedPanel<E4m3<bf16>>>(a);
    default: return multiply<CodedPanel<Nibbles<bf16>>>(a);
  }
}

}  // namespace

bool linear_many(const QuantizedArgs& a) {
  const LinearWeight& w = *a.weight;
  if (a.x_stride % 2 != 0) return false;
  switch (w.kind) {
    case WeightKind::coded: return multiply_coded(a);
    case WeightKind::int8: return w.k % 4 == 0 && multiply<Int8Panel>(a);
#define SAPWOOD_KIND(kind) \
  case WeightKind::kind: return multiply<GroupedPanel<WeightKind::kind>>(a);
    SAPWOOD_KIND(q8_0) SAPWOOD_KIND(q4_0) SAPWOOD_KIND(q4_1) SAPWOOD_KIND(q5_0) SAPWOOD_KIND(q5_1)
    SAPWOOD_KIND(q2_k) SAPWOOD_KIND(q3_k) SAPWOOD_KIND(q4_k) SAPWOOD_KIND(q5_k) SAPWOOD_KIND(q6_k)
    SAPWOOD_KIND(iq4_xs)
#undef SAPWOOD_KIND
    default: return false;
  }
}

std::size_t linear_many_scratch(int threads) { return static_cast<std::size_t>(threads * kThreadBytes); }

}  // namespace sapwood::SAPWOOD_ISA
