// The layouts of quantised weights and of rows of x that were rounded for them.
//
// int8: panels of 32 outputs, [ceil(N / 32), ceil(K / 4), 32] lanes of 32 bits: four neighbouring
// inputs of one output as unsigned bytes, the number plus 128. The products of bytes that hardware
// has take one unsigned factor; what the 128 adds is 128 times the sum of the row of x, which is
// known once per row. Entries beyond N and K are 128: zero.
//
// Groups: GGUF's blocks, re-ordered and not changed: [ceil(N / 32), K / 32] groups of 32 inputs of 32
// outputs. Of the types with blocks of 256 inputs, each eight groups come after their outputs' heads.
//   heads     32 fp16 d, then 32 fp16 least where the type has minima
//   scales    without heads: the same two per group instead; with heads: int8, for each run of
//             inputs that share a scale 32 of them, then the minima likewise, and up to 64 bytes
//   numbers   unsigned: the value plus the kind's offset
//             8 bits: 8 x 32 lanes of four inputs each, in order
//             fewer: 4 x 32 lanes of eight inputs, of which byte j of lane l has the low four bits of
//             input 4 l + j in its low half and of input 16 + 4 l + j in its high half; then the rest:
//             5 bits: 32 lanes; byte j has in bit l that of input 4 l + j, in bit 4 + l that of 16 + …
//             6 bits: 2 x 32 lanes; byte j of lane m has two bits each of the inputs 8 m + j,
//             16 + 8 m + j, 8 m + 4 + j and 16 + 8 m + 4 + j, the lowest first
// Everything is a multiple of 64 bytes, and a panel is one contiguous stream.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops.h"
#include "pack.h"

namespace sapwood {

constexpr std::int64_t kGroup = 32;        // inputs that share a scale
constexpr std::int64_t kInt8Group = 64;    // of an int8 layer's x: inputs that share a scale of x
constexpr std::int64_t kOwnRows = 12;      // up to so many rows of x, each thread rounds them all
constexpr std::int64_t kGroupBytesOfX = 44;  // 32 int8, the scale, a correction per run of inputs
constexpr std::int64_t kInt8GroupBytesOfX = 72;  // 64 int8 (fewer at a row's end), likewise
constexpr std::int64_t kBlockGroups = 8;     // of a type with blocks of 256 inputs

// What a kind of groups is made of.
struct Layout {
  int bits;     // of a number
  int run;      // inputs that share a scale: 16 or 32
  bool heads;   // blocks of 256 inputs
  bool minima;
  int offset;   // the number that stands for zero
};

// `static`: the files compiled per instruction set must not share a function's body (see ops.h).
static constexpr bool is_grouped(WeightKind kind) { return kind >= WeightKind::q8_0; }

static constexpr Layout layout_of(WeightKind kind) {
  switch (kind) {
    case WeightKind::q8_0: return {8, 32, false, false, 128};
    case WeightKind::q4_0: return {4, 32, false, false, 8};
    case WeightKind::q4_1: return {4, 32, false, true, 0};
    case WeightKind::q5_0: return {5, 32, false, false, 16};
    case WeightKind::q5_1: return {5, 32, false, true, 0};
    case WeightKind::q2_k: return {4, 16, true, true, 0};
    case WeightKind::q3_k: return {4, 16, true, false, 4};
    case WeightKind::q4_k: return {4, 32, true, true, 0};
    case WeightKind::q5_k: return {5, 32, true, true, 0};
    case WeightKind::q6_k: return {6, 16, true, false, 32};
    case WeightKind::iq4_xs: return {8, 32, true, false, 128};
    default: return {};
  }
}

// Bits of x as whole numbers (LinearWeight::fine, QuantizedArgs::whole), with which the sum of a group is below 2^24,
// so that fp32 has it exactly, in any order; 0: the kind is not multiplied so.
static constexpr int whole_bits(Layout layout) { return layout.run != kGroup ? 0 : layout.bits == 8 ? 12 : 14; }

static constexpr std::int64_t block_groups(Layout layout) { return layout.heads ? kBlockGroups : 1; }

// Bytes before each block of a panel.
static constexpr std::int64_t head_bytes(Layout layout) {
  return layout.heads ? (layout.minima ? 2 : 1) * kPanel * 2 : 0;
}

// Bytes of one group of one panel, before its numbers.
static constexpr std::int64_t scale_bytes(Layout layout) {
  const std::int64_t each = layout.heads ? kGroup / layout.run * kPanel : kPanel * 2;
  return ((layout.minima ? 2 : 1) * each + 63) / 64 * 64;
}

static constexpr std::int64_t group_bytes(Layout layout) {
  return scale_bytes(layout) + kPanel * kGroup * layout.bits / 8;
}

static constexpr std::int64_t block_bytes(Layout layout) {
  return head_bytes(layout) + block_groups(layout) * group_bytes(layout);
}

static constexpr std::int64_t panel_bytes(WeightKind kind, std::int64_t k) {
  const Layout layout = layout_of(kind);
  return is_grouped(kind) ? k / (kGroup * block_groups(layout)) * block_bytes(layout)
                          : (k + 3) / 4 * 4 * kPanel;
}

// Bytes of one rounded row of x. An odd number of cache lines, so that rows start in different sets.
static constexpr std::int64_t rounded_row_bytes(WeightKind kind, std::int64_t k) {
  const std::int64_t bytes =
      is_grouped(kind) ? k / kGroup * kGroupBytesOfX
                       : (k + kInt8Group - 1) / kInt8Group * kInt8GroupBytesOfX;
  return (bytes + 63) / 64 * 64 + ((bytes + 63) / 64 % 2 == 0 ? 64 : 0);
}

// Rows of bytes that a row of x becomes: one, or the digits of numbers of 16 bits.
static constexpr std::int64_t rows_of_bytes(const LinearWeight& weight) { return weight.fine ? 2 : 1; }

static constexpr std::int64_t quantized_scratch(const LinearWeight& weight, std::int64_t m, int threads) {
  return rounded_row_bytes(weight.kind, weight.k) * m * rows_of_bytes(weight) * (m <= kOwnRows ? threads : 1);
}

// The bytes of a packed weight.
std::size_t packed_bytes(WeightKind kind, std::int64_t n, std::int64_t k);
// numbers [n, k] int8, from -127 to 127
void pack_int8(const void* numbers, void* out, std::int64_t n, std::int64_t k);
// Blocks as whole numbers (kernels/blocks.py), null for what the kind does not have; b is k over the
// inputs of a block, g over those that share a scale.
struct Numbers {
  const std::uint8_t* numbers;  // [n, k]
  const std::uint16_t* d;       // [n, b] fp16
  const std::int8_t* scales;    // [n, g]
  const std::uint16_t* least;   // [n, b] fp16
  const std::int8_t* minima;    // [n, g]
};
// Throws std::invalid_argument if k is not whole blocks.
void pack_groups(WeightKind kind, const Numbers& numbers, void* out, std::int64_t n, std::int64_t k);

}  // namespace sapwood
