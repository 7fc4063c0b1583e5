// The layouts of quantised weights and of rows of x that were rounded for them.
//
// int8: panels of 32 outputs, [ceil(N / 32), ceil(K / 4), 32] lanes of 32 bits: four neighbouring
// inputs of one output as unsigned bytes, the number plus 128. The products of bytes that hardware
// has take one unsigned factor; what the 128 adds is 128 times the sum of the row of x, which is
// known once per row. Entries beyond N and K are 128: zero.
//
// Groups: GGUF's blocks, re-ordered and not changed (but for the top bit of q8_0's bytes, flipped for
// the same reason). [ceil(N / 32), K / 32] groups of 32 inputs of 32 outputs:
//   scales    32 fp16
//   minima    32 fp16, q4_1 only
//   numbers   q8_0: 8 x 32 lanes of four inputs each, in order
//             q4_0, q4_1: 4 x 32 lanes of eight inputs: a byte has input i in its low half and
//             input 16 + i in its high half, as in the file
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
constexpr std::int64_t kGroupBytesOfX = 40;  // 32 int8, the scale, the correction
constexpr std::int64_t kInt8GroupBytesOfX = 72;  // 64 int8 (fewer at a row's end), likewise

// `static`: the files compiled per instruction set must not share a function's body (see ops.h).
static constexpr bool is_grouped(WeightKind kind) { return kind >= WeightKind::q8_0; }

static constexpr std::int64_t scale_bytes(WeightKind kind) {
  return (kind == WeightKind::q4_1 ? 2 : 1) * kPanel * 2;
}

// Of one group of one panel.
static constexpr std::int64_t group_bytes(WeightKind kind) {
  return scale_bytes(kind) + kPanel * kGroup / (kind == WeightKind::q8_0 ? 1 : 2);
}

static constexpr std::int64_t panel_bytes(WeightKind kind, std::int64_t k) {
  return is_grouped(kind) ? k / kGroup * group_bytes(kind) : (k + 3) / 4 * 4 * kPanel;
}

// Of one rounded row of x. An odd number of cache lines, so that rows start in different sets.
static constexpr std::int64_t rounded_row_bytes(WeightKind kind, std::int64_t k) {
  const std::int64_t bytes =
      is_grouped(kind) ? k / kGroup * kGroupBytesOfX
                       : (k + kInt8Group - 1) / kInt8Group * kInt8GroupBytesOfX;
  return (bytes + 63) / 64 * 64 + ((bytes + 63) / 64 % 2 == 0 ? 64 : 0);
}

static constexpr std::int64_t quantized_scratch(WeightKind kind, std::int64_t m, std::int64_t k,
                                                int threads) {
  return rounded_row_bytes(kind, k) * m * (m <= kOwnRows ? threads : 1);
}

// The bytes of a packed weight.
std::size_t packed_bytes(WeightKind kind, std::int64_t n, std::int64_t k);
// numbers [n, k] int8, from -127 to 127
void pack_int8(const void* numbers, void* out, std::int64_t n, std::int64_t k);
// blocks [n, k / 32] as GGUF stores them
void pack_groups(WeightKind kind, const void* blocks, void* out, std::int64_t n, std::int64_t k);

}  // namespace sapwood
