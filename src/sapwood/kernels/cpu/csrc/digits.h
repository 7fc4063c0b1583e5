// Weights as whole numbers of bf16 and fp32 scales, for products with x of bf16 (linear_digits). Included only by
// *.isa.cpp of the sets with a matrix unit of x86.
//
// A panel (pack.h) is read a step at a time: 32 inputs, as 16 lanes of two numbers of 32 outputs each. Numbers that
// share a scale are a run. A reader says what a weight's Shape is, and read() calls put(lane, vector, lanes) for all, with
// the lanes of one vector of outputs in order, and writes, if the step begins a run, the run's scales: 32 of the
// numbers, then 32 of the run's sum of x.
#pragma once

#include <cstring>

#include "coded.h"
#include "decoding.h"
#include "groups.h"
#include "integer.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kStepLanes = 16;              // of x and of numbers
constexpr std::int64_t kStepNumbers = kStepLanes * kPanel;
constexpr std::int64_t kMostRunLanes = 128;          // a scale of more inputs counts as several runs'
constexpr std::int64_t kReadAheadBytes = 4096;       // of a panel, prefetched
constexpr int kVectors = kPanel / W;
static_assert(kVectors == 2);

// What the kernel knows of a weight.
struct Shape {
  std::int64_t k = 0, lanes = 0;  // of all inputs
  std::int64_t run = 0;           // lanes of a run; 0: the weight is not for this kernel
  bool sums = false;              // x of a run is added up, for a scale of its own
  std::int64_t bits = 0;          // of x as whole numbers, see whole_step(); 0: x is taken as it is
  std::int64_t panel_bytes = 0;
  bool swaps = false;             // of each four inputs the two in the middle change places

  // Bytes of a prepared row: x in the order of the lanes, then its sums. An odd number of cache lines.
  std::int64_t row_bytes() const {
    const std::int64_t lines = (lanes * 4 + (sums ? lanes / run * 4 : 0) + 63) / 64;
    return (lines % 2 == 0 ? lines + 1 : lines) * 64;
  }
};

SAPWOOD_INLINE VU shifted_words(VU lanes, int bits) {
  return bits_as<VU>(_mm512_srl_epi16(bits_as<__m512i>(lanes), _mm_cvtsi32_si128(bits)));
}

// ---- codes (coded.h) ----

template <class Decode>
class CodedDigits {
 public:
  explicit CodedDigits(const LinearWeight& weight)
      : layout_(*weight.coded), e_(extent_of(layout_)), decode_(layout_.codes) {}

  static Shape shape(const LinearWeight& w) {
    Shape shape;
    const Extent e = extent_of(*w.coded);
    const std::int64_t group = least(e.group, e.padded), units = group / 2 / kStepLanes;
    shape.k = w.k;
    shape.lanes = w.k / 2;
    shape.panel_bytes = e.panel_bytes;
    if (e.padded != w.k || group % (2 * kStepLanes) != 0 || w.k % group != 0) return shape;
    for (std::int64_t i = 1; i <= kMostRunLanes / kStepLanes; i++) {
      if (units % i == 0) shape.run = i * kStepLanes;
    }
    shape.sums = w.coded->shifted;
    return shape;
  }

  template <class Put>
  __attribute__((always_inline)) void read(const std::byte* panel, std::int64_t step, bool begins, float* scales,
                                           const Put& put) const {
    constexpr std::int64_t kInputs = 2 * Decode::kSteps;  // of a lane of codes
    const std::int64_t input = 2 * kStepLanes * step, group = input / e_.group;
    const std::byte* head = panel + group * e_.group_bytes;
    const std::byte* from = head + e_.head_bytes + (input - group * e_.group) / kInputs * kPanel * 4;
    if (begins) read_scales_of(head, scales);
#pragma GCC unroll 8
    for (int lane = 0; lane < kStepLanes; lane += Decode::kSteps, from += kPanel * 4) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) {
        const VU codes = load_lanes(from + v * W * 4);
        __builtin_prefetch(from + v * W * 4 + kReadAheadBytes, 0, 2);
#pragma GCC unroll 4
        for (int at = 0; at < Decode::kSteps; at++) put(lane + at, v, decode_.at(codes, at));
      }
    }
  }

 private:
  void read_scales_of(const std::byte* head, float* scales) const {
    for (int v = 0; v < kVectors; v++) {
      const VF scale = layout_.narrow ? load(reinterpret_cast<const bf16*>(head) + v * W)
                                      : load(reinterpret_cast<const float*>(head) + v * W);
      store(scales + v * W, scale);
      if (!layout_.shifted) continue;
      const std::byte* shifts = head + (layout_.narrow ? 2 : 4) * kPanel;
      store(scales + kPanel + v * W, load(reinterpret_cast<const bf16*>(shifts) + v * W) * scale);
    }
  }

  const CodedLayout& layout_;
  const Extent e_;
  const Decode decode_;
};

// ---- GGUF's blocks (quantized.h) ----

// Numbers of kinds whose inputs share a scale by 32, less the kind's offset. x is made whole (whole_step), so that sums
// are the same whatever the order: those of vectors, too, which linear_grouped makes of a few rows.
template <WeightKind kKind>
class GroupDigits {
  static constexpr Layout kLayout = layout_of(kKind);
  static constexpr std::int64_t kGroups = block_groups(kLayout);
  static_assert(kLayout.run == kGroup);

 public:
  explicit GroupDigits(const LinearWeight&) {
    for (int i = 0; i < 32; i++) values_[i] = round_bf16(static_cast<float>(i % (1 << kLayout.bits) - kLayout.offset));
  }

  static Shape shape(const LinearWeight& w) {
    Shape shape;
    shape.k = w.k;
    shape.lanes = w.k / 2;
    shape.run = kGroup / 2;
    shape.sums = kLayout.minima;
    shape.bits = whole_bits(kLayout);
    shape.panel_bytes = panel_bytes(kKind, w.k);
    shape.swaps = true;
    return shape;
  }

  template <class Put>
  __attribute__((always_inline)) void read(const std::byte* panel, std::int64_t step, bool, float* scales,
                                           const Put& put) const {
    const std::byte* block = panel + step / kGroups * block_bytes(kLayout);
    const std::byte* group = block + head_bytes(kLayout) + step % kGroups * group_bytes(kLayout);
    for (std::int64_t i = 0; i < group_bytes(kLayout); i += 64) __builtin_prefetch(group + kReadAheadBytes + i, 0, 2);
    const std::byte* numbers = group + scale_bytes(kLayout);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      write_scales(block, group, v * W, scales);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        put_four<false>(numbers + v * W * 4, i, v, put);
        put_four<true>(numbers + v * W * 4, i, v, put);
      }
    }
  }

 private:
  __attribute__((always_inline)) static void write_scales(const std::byte* block, const std::byte* group, int column,
                                                          float* scales) {
    VF d[1] = {}, smallest[1] = {}, scale[1], minimum[1] = {};
    if (kLayout.heads) {
      d[0] = load_halves(block + column * 2);
      if (kLayout.minima) smallest[0] = load_halves(block + (kPanel + column) * 2);
    }
    read_scales<kKind, 0>(group, column, d, smallest, scale, minimum);
    store(scales + column, scale[0]);
    if (kLayout.minima) store(scales + kPanel + column, minimum[0]);
  }

  // The i-th four inputs of either half of a group, in the order 0, 2, 1, 3, as two lanes of vector v.
  template <bool kHigh, class Put>
  __attribute__((always_inline)) void put_four(const std::byte* numbers, int i, int v, const Put& put) const {
    const __m512i table = _mm512_load_si512(values_);
    const int lane = (kHigh ? 8 : 0) + 2 * i;
    const auto value_at = [table](VU lanes, int shift) __attribute__((always_inline)) {
      const VU index = shift == 0 ? lanes : shifted_words(lanes, shift);
      return bits_as<VU>(_mm512_permutexvar_epi16(bits_as<__m512i>(index), table));
    };
    if constexpr (kLayout.bits == 4) {  // look-ups mind five bits, and values come twice
      const VU both = load_lanes(numbers + i * kPanel * 4);
      put(lane, v, value_at(both, kHigh ? 4 : 0));
      put(lane + 1, v, value_at(both, kHigh ? 12 : 8));
    } else if constexpr (kLayout.bits == 5) {
      const VU bytes = numbers_of<5, kHigh>(numbers, i);
      put(lane, v, value_at(bytes, 0));
      put(lane + 1, v, value_at(bytes, 8));
    } else {
      const VU bytes = load_lanes(numbers + ((kHigh ? 4 : 0) + i) * kPanel * 4);
      put(lane, v, pair(byte_as_float(bytes), byte_as_float(bytes >> 16)));
      put(lane + 1, v, pair(byte_as_float(bytes >> 8), byte_as_float(bytes >> 24)));
    }
  }

  // Of the lowest byte of each lane.
  __attribute__((always_inline)) static VF byte_as_float(VU lanes) {
    return bits_as<VF>((lanes & 0xffu) | 0x4b000000u) - splat(8388608.0f + 128.0f);
  }

  alignas(64) std::uint16_t values_[32];  // of numbers, as bf16; where there are 16, they come twice
};

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
