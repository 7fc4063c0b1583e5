// Re-ordering coded weights, once per weight, into the layout of coded.h.
#include "coded.h"

#include <cstring>

namespace sapwood {
namespace {

// Exact, or rounded to the nearest even.
std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Source {
  const std::uint8_t* codes;
  const float* scales;
  const float* shifts;
  std::int64_t n, k, groups;
  bool bytes;

  std::uint32_t code(std::int64_t output, std::int64_t input) const {
    if (output >= n || input >= k) return 0;
    if (bytes) return codes[output * k + input];
    return codes[output * ((k + 1) / 2) + input / 2] >> (input % 2 * 4) & 15;
  }

  // The lane of inputs from `input` on.
  std::uint32_t lane(std::int64_t output, std::int64_t input) const {
    std::uint32_t in_order = 0;
    const std::int64_t step = bytes ? 4 : 8;
    if (output < n && input + step <= k && (bytes || k % 2 == 0)) {
      std::memcpy(&in_order, codes + (bytes ? output * k + input : (output * k + input) / 2), 4);
    } else {
      for (std::int64_t i = 0; i < step; i++) in_order |= code(output, input + i) << (i * 32 / step);
    }
    if (bytes) {
      return (in_order & 0xff0000ff) | (in_order & 0xff00) << 8 | (in_order >> 8 & 0xff00);
    }
    return every_other(in_order) | every_other(in_order >> 4) << 16;
  }

  static std::uint32_t every_other(std::uint32_t nibbles) {
    nibbles &= 0x0f0f0f0f;
    nibbles = (nibbles | nibbles >> 4) & 0x00ff00ff;
    return (nibbles | nibbles >> 8) & 0xffff;
  }
};

std::byte* put_head(const Source& from, const CodedLayout& layout, std::int64_t panel, std::int64_t group,
                    std::byte* out) {
  const auto at = [&](const float* numbers, std::int64_t column) {
    return panel + column < from.n ? numbers[(panel + column) * from.groups + group] : 0.0f;
  };
  const auto put_narrow = [&](const float* numbers) {
    for (std::int64_t column = 0; column < kPanel; column++, out += 2) {
      const std::uint16_t bits = to_bf16(at(numbers, column));
      std::memcpy(out, &bits, 2);
    }
  };
  if (layout.narrow) {
    put_narrow(from.scales);
  } else {
    for (std::int64_t column = 0; column < kPanel; column++, out += 4) {
      const float scale = at(from.scales, column);
      std::memcpy(out, &scale, 4);
    }
  }
  if (layout.shifted) put_narrow(from.shifts);
  return out;
}

}  // namespace

void pack_coded(const CodedLayout& layout, const void* codes, const float* scales, const float* shifts,
                std::int64_t n, void* out) {
  const Extent e = extent_of(layout);
  const Source from{static_cast<const std::uint8_t*>(codes), scales, shifts, n, layout.k, e.groups,
                    is_byte(layout.codes)};
  const std::int64_t step = from.bytes ? 4 : 8;
  std::byte* to = static_cast<std::byte*>(out);
  for (std::int64_t panel = 0; panel < n; panel += kPanel) {
    for (std::int64_t group = 0; group < e.groups; group++) {
      to = put_head(from, layout, panel, group, to);
      const std::int64_t begin = group * e.group;
      const std::int64_t end = begin + e.group < e.padded ? begin + e.group : e.padded;
      for (std::int64_t input = begin; input < end; input += step) {
        for (std::int64_t column = panel; column < panel + kPanel; column++, to += 4) {
          const std::uint32_t lane = from.lane(column, input);
          std::memcpy(to, &lane, 4);
        }
      }
    }
  }
}

}  // namespace sapwood
