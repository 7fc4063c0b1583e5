// Single numbers of bf16.
#pragma once

#include <bit>
#include <cstdint>

namespace sapwood {

inline float widened(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

// Rounded to the nearest bf16, ties to even, as torch does.
inline std::uint16_t narrowed(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace sapwood
