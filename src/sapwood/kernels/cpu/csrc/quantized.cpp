// Re-ordering quantised weights, once per weight, into the layouts of quantized.h.
#include "quantized.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace sapwood {
namespace {

constexpr std::uint32_t kTopBits = 0x80808080u;

std::uint32_t lane_at(const std::byte* p) {
  std::uint32_t lane;
  std::memcpy(&lane, p, sizeof(lane));
  return lane;
}

// One group of one panel; blocks [columns], row_bytes apart.
void pack_group(WeightKind kind, const std::byte* blocks, std::int64_t row_bytes, std::byte* out,
                std::int64_t columns) {
  const std::int64_t head = scale_bytes(kind) / kPanel;  // of a block: its scale and minimum
  const std::int64_t lanes = (group_bytes(kind) - scale_bytes(kind)) / (kPanel * 4);
  const std::uint32_t flip = kind == WeightKind::q8_0 ? kTopBits : 0;
  for (std::int64_t column = 0; column < columns; column++) {
    const std::byte* block = blocks + column * row_bytes;
    for (std::int64_t half = 0; half < head; half += 2) {
      std::memcpy(out + half * kPanel + column * 2, block + half, 2);
    }
    std::byte* numbers = out + scale_bytes(kind) + column * 4;
    for (std::int64_t lane = 0; lane < lanes; lane++) {
      const std::uint32_t bits = lane_at(block + head + lane * 4) ^ flip;
      std::memcpy(numbers + lane * kPanel * 4, &bits, 4);
    }
  }
}

}  // namespace

std::size_t packed_bytes(WeightKind kind, std::int64_t n, std::int64_t k) {
  if (kind < WeightKind::int8) throw std::invalid_argument("a dense weight is packed by pack_weight");
  return static_cast<std::size_t>((n + kPanel - 1) / kPanel * panel_bytes(kind, k));
}

void pack_int8(const void* numbers, void* out, std::int64_t n, std::int64_t k) {
  const std::byte* from = static_cast<const std::byte*>(numbers);
  std::byte* to = static_cast<std::byte*>(out);
  for (std::int64_t panel = 0; panel < n; panel += kPanel) {
    for (std::int64_t i = 0; i < k; i += 4) {
      for (std::int64_t column = panel; column < panel + kPanel; column++, to += 4) {
        const std::byte* numbers = from + column * k + i;
        std::uint32_t lane = 0;
        if (column < n && i + 4 <= k) {
          lane = lane_at(numbers);
        } else if (column < n) {
          std::memcpy(&lane, numbers, static_cast<std::size_t>(k - i));
        }
        lane ^= kTopBits;
        std::memcpy(to, &lane, 4);
      }
    }
  }
}

void pack_groups(WeightKind kind, const void* blocks, void* out, std::int64_t n, std::int64_t k) {
  if (!is_grouped(kind) || k % kGroup != 0) {
    throw std::invalid_argument("grouped weights need a number of inputs that is a multiple of 32");
  }
  const std::int64_t groups = k / kGroup;
  const std::int64_t block_bytes = group_bytes(kind) / kPanel;
  const std::byte* from = static_cast<const std::byte*>(blocks);
  std::byte* to = static_cast<std::byte*>(out);
  std::memset(out, 0, packed_bytes(kind, n, k));  // a scale of 0 for outputs beyond n
  for (std::int64_t panel = 0; panel < n; panel += kPanel) {
    for (std::int64_t group = 0; group < groups; group++, to += group_bytes(kind)) {
      pack_group(kind, from + (panel * groups + group) * block_bytes, groups * block_bytes, to,
                 std::min(kPanel, n - panel));
    }
  }
}

}  // namespace sapwood
