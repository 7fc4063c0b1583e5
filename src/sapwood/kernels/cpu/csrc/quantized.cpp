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

// 32 numbers of one output -> its lanes of a group, kPanel lanes apart.
void pack_numbers(int bits, const std::uint8_t* numbers, std::byte* out) {
  const int lanes = bits == 8 ? 8 : 4;
  std::uint32_t rest[2] = {0, 0};
  for (int lane = 0; lane < lanes; lane++) {
    std::uint32_t packed = 0;
    for (int j = 0; j < 4; j++) {
      const std::uint32_t low = numbers[lane * 4 + j];
      if (bits == 8) {
        packed |= low << (8 * j);
        continue;
      }
      const std::uint32_t high = numbers[16 + lane * 4 + j];
      packed |= ((low & 15) | (high & 15) << 4) << (8 * j);
      if (bits == 5) rest[0] |= (low >> 4 << lane | high >> 4 << (4 + lane)) << (8 * j);
      if (bits == 6) rest[lane / 2] |= (low >> 4 | high >> 4 << 2) << (8 * j + lane % 2 * 4);
    }
    std::memcpy(out + lane * kPanel * 4, &packed, 4);
  }
  for (int i = 0; i < bits - 4 && bits < 8; i++) {
    std::memcpy(out + (lanes + i) * kPanel * 4, &rest[i], 4);
  }
}

// Group `group` of one output, which lies in the given column of a panel.
void pack_group(Layout layout, const Numbers& from, std::int64_t group, std::byte* out,
                std::int64_t column) {
  const std::int64_t runs = kGroup / layout.run;
  if (layout.heads) {
    std::byte* minima = out + runs * kPanel;
    for (std::int64_t run = 0; run < runs; run++) {
      out[run * kPanel + column] = static_cast<std::byte>(from.scales[group * runs + run]);
      if (layout.minima) minima[run * kPanel + column] = static_cast<std::byte>(from.minima[group * runs + run]);
    }
  } else {
    std::memcpy(out + column * 2, from.d + group, 2);
    if (layout.minima) std::memcpy(out + kPanel * 2 + column * 2, from.least + group, 2);
  }
  pack_numbers(layout.bits, from.numbers + group * kGroup, out + scale_bytes(layout) + column * 4);
}

// Block `block` of all outputs.
void pack_block(Layout layout, const Numbers& from, std::int64_t block, std::byte* out, std::int64_t column) {
  if (layout.heads) {
    std::memcpy(out + column * 2, from.d + block, 2);
    if (layout.minima) std::memcpy(out + kPanel * 2 + column * 2, from.least + block, 2);
  }
  const std::int64_t groups = block_groups(layout);
  for (std::int64_t group = 0; group < groups; group++) {
    pack_group(layout, from, block * groups + group, out + head_bytes(layout) + group * group_bytes(layout),
               column);
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

void pack_groups(WeightKind kind, const Numbers& from, void* out, std::int64_t n, std::int64_t k) {
  const Layout layout = layout_of(kind);
  if (!is_grouped(kind) || k % (kGroup * block_groups(layout)) != 0) {
    throw std::invalid_argument("a weight's inputs must be whole blocks");
  }
  const std::int64_t blocks = k / (kGroup * block_groups(layout));
  std::byte* to = static_cast<std::byte*>(out);
  std::memset(out, 0, packed_bytes(kind, n, k));  // a scale of 0 for outputs beyond n
  for (std::int64_t panel = 0; panel < n; panel += kPanel) {
    for (std::int64_t block = 0; block < blocks; block++, to += block_bytes(layout)) {
      for (std::int64_t column = 0; column < std::min(kPanel, n - panel); column++) {
        pack_block(layout, from, (panel + column) * blocks + block, to, column);
      }
    }
  }
}

}  // namespace sapwood
