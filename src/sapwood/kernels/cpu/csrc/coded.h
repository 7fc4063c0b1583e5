// Weights that are codes times scales, multiplied with x as it is: w = (value of the code + shift) *
// scale * the output's scale. Values are small enough for bf16 to hold them exactly, but for nf4's.
//
// Layout: panels of 32 outputs, a panel one contiguous stream of groups. A group of inputs:
//   scales  32 fp32, or 32 bf16 where that is exact (`narrow`)
//   shifts  32 bf16, if the layout has them: what is added to a value, such as 8 less a zero point
//   codes   lanes of 32 bits, one per output. 4 bits: eight inputs, input 2 j in nibble j and input
//           2 j + 1 in nibble 4 + j. 8 bits: four inputs, in bytes 0, 2, 1, 3.
// So a lane shifted right has two neighbouring inputs in its 16-bit halves, as products of bf16 want
// them. The last group may be shorter; inputs are filled up to a multiple of 8, and x there is 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pack.h"

namespace sapwood {

enum class Codes : int { int4 = 0, fp4 = 1, nf4 = 2, int8 = 3, e4m3 = 4 };

static constexpr bool is_byte(Codes codes) { return codes >= Codes::int8; }

struct CodedLayout {
  Codes codes;
  std::int64_t k;           // inputs
  std::int64_t group;       // inputs that share a scale; a multiple of 8, or at least k
  bool narrow, shifted;
  const std::int32_t* order;  // [k]: input i of the weight is input order[i] of x; null: they agree
};

// The sizes of a layout, worked out once per call.
struct Extent {
  std::int64_t padded;       // inputs, a multiple of 8
  std::int64_t groups;
  std::int64_t group;        // inputs of all groups but the last
  std::int64_t head_bytes;   // of a group: its scales and shifts
  std::int64_t group_bytes;  // of all groups but the last
  std::int64_t panel_bytes;
};

static inline Extent extent_of(const CodedLayout& layout) {
  Extent e{};
  e.padded = (layout.k + 7) / 8 * 8;
  e.group = layout.group < layout.k ? layout.group : e.padded;
  e.groups = (e.padded + e.group - 1) / e.group;
  e.head_bytes = kPanel * ((layout.narrow ? 2 : 4) + (layout.shifted ? 2 : 0));
  const std::int64_t per_input = is_byte(layout.codes) ? 2 : 1;  // half bytes
  e.group_bytes = e.head_bytes + e.group * kPanel * per_input / 2;
  e.panel_bytes = e.groups * e.head_bytes + e.padded * kPanel * per_input / 2;
  return e;
}

// Bytes of a prepared row of x: its numbers in the weight's order, then the sum of each group if the
// layout is shifted. An odd number of cache lines, so that rows start in different sets.
static inline std::int64_t prepared_row_bytes(const CodedLayout& layout, std::int64_t element) {
  const Extent e = extent_of(layout);
  const std::int64_t bytes = e.padded * element + (layout.shifted ? e.groups * 4 : 0);
  const std::int64_t lines = (bytes + 63) / 64;
  return (lines % 2 == 0 ? lines + 1 : lines) * 64;
}

constexpr std::int64_t kDirectRows = 6;            // up to so many rows, codes are decoded in registers
constexpr std::int64_t kDecodedBytes = 512 * 1024;  // of decoded panels per thread, which stay in L2

// Panels that a thread decodes at a time when there are many rows.
static inline std::int64_t decoded_panels(const Extent& e, std::int64_t element) {
  const std::int64_t panels = kDecodedBytes / (e.padded * element * kPanel);
  return panels < 1 ? 1 : panels > 4 ? 4 : panels;
}

static inline std::size_t coded_scratch(const CodedLayout& layout, std::int64_t m, std::int64_t element,
                                        int threads) {
  const Extent e = extent_of(layout);
  const std::int64_t row = prepared_row_bytes(layout, element);
  if (m <= kDirectRows) return static_cast<std::size_t>(row * m * threads);
  const std::int64_t decoded = decoded_panels(e, element) * e.padded * element * kPanel;
  return static_cast<std::size_t>(row * m + decoded * threads);
}

// codes [n, k / 2] (the even input in the low half) or [n, k] bytes; scales and shifts [n, groups]
// fp32, shifts null if the layout has none -> n rounded up to 32 outputs, panel by panel.
void pack_coded(const CodedLayout& layout, const void* codes, const float* scales, const float* shifts,
                std::int64_t n, void* out);

}  // namespace sapwood
