// out = x w^T + bias for many rows of bf16 and a quantised weight, on the matrix unit: the weight becomes
// bf16 while panels come into the cache (resident.h), and x is not rounded. With a few rows products of bytes
// (linear_int8, linear_grouped) or of codes (linear_coded) take less time, since that step is spared.
#include "coded.h"
#include "decoding.h"
#include "grouped_panels.h"
#include "quantized.h"
#include "resident.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 32768;  // of the weight; below, a thread costs too much
constexpr std::int64_t kAheadBytes = 4096;          // of a panel, prefetched
constexpr int kVectors = kPanel / W;

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
struct Grouped {
  explicit Grouped(const LinearWeight& weight) : bytes(panel_bytes(kKind, weight.k)) {}

  void read(const std::byte* panel, std::int64_t lane, std::int64_t lanes, std::uint32_t* out) const {
    GroupedPanel<kKind, bf16>::read(panel, lane, lanes, out);
  }

  std::int64_t bytes;
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
  case WeightKind::kind: return multiply<Grouped<WeightKind::kind>>(a);
    SAPWOOD_KIND(q8_0) SAPWOOD_KIND(q4_0) SAPWOOD_KIND(q4_1) SAPWOOD_KIND(q5_0) SAPWOOD_KIND(q5_1)
    SAPWOOD_KIND(q2_k) SAPWOOD_KIND(q3_k) SAPWOOD_KIND(q4_k) SAPWOOD_KIND(q5_k) SAPWOOD_KIND(q6_k)
    SAPWOOD_KIND(iq4_xs)
#undef SAPWOOD_KIND
    default: return false;
  }
}

std::size_t linear_many_scratch(int threads) { return static_cast<std::size_t>(threads * kThreadBytes); }

}  // namespace sapwood::SAPWOOD_ISA
