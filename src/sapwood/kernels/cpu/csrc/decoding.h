// Lanes of codes to lanes of numbers of x's dtype (coded.h, simd.h): a class for each kind of codes, whose
// at(lane, step) has the next numbers of a lane of codes. Included only by *.isa.cpp.
#pragma once

#include "coded.h"
#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr float kValues[3][16] = {
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6},
    // NormalFloat: quantiles of the normal distribution. Source: Dettmers et al. 2023, arXiv:2305.14314.
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
     0.7229568362236023f, 1.0f}};

template <class T>
struct Nibbles;

#if defined(SAPWOOD_NEON)
// A look-up finds one byte for each of 16 nibbles: entries are looked up byte by byte. What the steps of
// a lane have in common the compiler does once, since their loops are unrolled.
template <int kBytes>
struct Table {
  uint8x16_t bytes[kBytes];

  // entry(i): the bits of number i
  template <class Entry>
  explicit Table(const Entry& entry) {
    for (int b = 0; b < kBytes; b++) {
      std::uint8_t column[16];
      for (int i = 0; i < 16; i++) column[i] = static_cast<std::uint8_t>(entry(i) >> (8 * b));
      bytes[b] = vld1q_u8(column);
    }
  }

  // Bytes kFirst and kFirst + 1 of the entries for the nibbles in bytes 0 and 2 (odd: 1 and 3) of each
  // lane, in their low (high: their high) half.
  template <int kFirst>
  __attribute__((always_inline)) uint16x8_t two_bytes(VU codes, bool odd, bool high) const {
    const uint8x16_t both = bits_as<uint8x16_t>(codes);
    const uint8x16_t index = high ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
    const uint8x16_t first = vqtbl1q_u8(bytes[kFirst], index), second = vqtbl1q_u8(bytes[kFirst + 1], index);
    return vreinterpretq_u16_u8(odd ? vtrn2q_u8(first, second) : vtrn1q_u8(first, second));
  }
};

template <>
struct Nibbles<float> {
  static constexpr int kSteps = 8;
  Table<4> table;

  explicit Nibbles(Codes codes)
      : table([&](int i) { return bits_as<std::uint32_t>(kValues[static_cast<int>(codes)][i]); }) {}
  __attribute__((always_inline)) VU at(VU codes, int step) const {
    const bool odd = step >= 4, high = step / 2 % 2 != 0;
    const uint16x8_t lower = table.two_bytes<0>(codes, odd, high), upper = table.two_bytes<2>(codes, odd, high);
    return bits_as<VU>(step % 2 == 0 ? vtrn1q_u16(lower, upper) : vtrn2q_u16(lower, upper));
  }
};

template <>
struct Nibbles<bf16> {
  static constexpr int kSteps = 4;
  Table<2> table;

  explicit Nibbles(Codes codes) : table([&](int i) { return round_bf16(kValues[static_cast<int>(codes)][i]); }) {}
  __attribute__((always_inline)) VU at(VU codes, int step) const {
    return bits_as<VU>(table.two_bytes<0>(codes, step >= 2, step % 2 != 0));
  }
};
#else
// 16 entries of 32 bits, looked up by the low four bits of a lane.
struct Table {
  alignas(64) std::uint32_t entries[16];

  SAPWOOD_INLINE VU look_in(const std::uint32_t* entries, VU index) {
#if defined(__AVX512F__)
    return bits_as<VU>(_mm512_permutexvar_epi32(bits_as<__m512i>(index), _mm512_load_si512(entries)));
#elif defined(__AVX2__)
    const __m256i i = bits_as<__m256i>(index);
    const __m256i* halves = reinterpret_cast<const __m256i*>(entries);
    const __m256 low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(_mm256_load_si256(halves), i));
    const __m256 high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(_mm256_load_si256(halves + 1), i));
    return bits_as<VU>(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28))));
#else
    VU found;
    for (int i = 0; i < W; i++) found[i] = entries[index[i] & 15];
    return found;
#endif
  }
};

template <>
struct Nibbles<float> {
  static constexpr int kSteps = 8;
  Table table;

  explicit Nibbles(Codes codes) {
    for (int i = 0; i < 16; i++) {
      table.entries[i] = bits_as<std::uint32_t>(kValues[static_cast<int>(codes)][i]);
    }
  }
  VU at(VU codes, int step) const {
    return Table::look_in(table.entries, codes >> (4 * (step / 2 + step % 2 * 4)));
  }
};

template <>
struct Nibbles<bf16> {
  static constexpr int kSteps = 4;
  alignas(64) std::uint16_t entries[32];  // twice the 16: a look-up of 16 bits minds five of the index
  Table table;

  explicit Nibbles(Codes codes) {
    for (int i = 0; i < 32; i++) entries[i] = round_bf16(kValues[static_cast<int>(codes)][i % 16]);
    for (int i = 0; i < 16; i++) table.entries[i] = entries[i];
  }
  VU at(VU codes, int step) const {
#if defined(__AVX512BW__)
    return bits_as<VU>(_mm512_permutexvar_epi16(bits_as<__m512i>(codes >> (4 * step)), _mm512_load_si512(entries)));
#else
    const VU first = Table::look_in(table.entries, codes >> (4 * step));
    return first | (Table::look_in(table.entries, codes >> (4 * step + 16)) << 16);
#endif
  }
};
#endif

// Two fp32 that bf16 holds exactly -> one lane.
SAPWOOD_INLINE VU pair(VF first, VF second) { return (bits_as<VU>(first) >> 16) | bits_as<VU>(second); }

// Byte `place` of each lane as int8.
SAPWOOD_INLINE VF int8_at(VU codes, int place) {
  return __builtin_convertvector(bits_as<VI>(codes << (24 - 8 * place)) >> 24, VF);
}

SAPWOOD_INLINE VF e4m3_at(VU codes, int place) {
  const VU code = codes >> (8 * place);
  // The exponents' biases differ by 120; a product also makes normal numbers of subnormal ones.
  const VF magnitude = bits_as<VF>((code & 0x7f) << 20) * splat(0x1p120f);
  return bits_as<VF>(bits_as<VU>(magnitude) | ((code & 0x80) << 24));
}

constexpr int kPlace[] = {0, 2, 1, 3};  // the byte of each of four inputs

template <class T, VF (*number_at)(VU, int)>
struct Bytes;

template <VF (*number_at)(VU, int)>
struct Bytes<float, number_at> {
  static constexpr int kSteps = 4;
  explicit Bytes(Codes) {}
  VU at(VU codes, int step) const { return bits_as<VU>(number_at(codes, kPlace[step])); }
};

template <VF (*number_at)(VU, int)>
struct Bytes<bf16, number_at> {
  static constexpr int kSteps = 2;
  explicit Bytes(Codes) {}
  VU at(VU codes, int step) const { return pair(number_at(codes, step), number_at(codes, step + 2)); }
};

template <class T>
using Int8 = Bytes<T, int8_at>;

#if defined(__AVX512BW__)
template <class T>
struct E4m3 : Bytes<T, e4m3_at> {
  using Bytes<T, e4m3_at>::Bytes;
};

// In words: exponent and mantissa are moved to where bf16 has them, and subnormal numbers looked up.
template <>
struct E4m3<bf16> {
  static constexpr int kSteps = 2;
  alignas(64) std::uint16_t subnormal[32];

  explicit E4m3(Codes) {
    for (int i = 0; i < 32; i++) subnormal[i] = round_bf16(static_cast<float>(i % 8) * 0x1p-9f);
  }
  VU at(VU codes, int step) const {
    const __m512i c = bits_as<__m512i>(codes);
    const __m512i magnitude = _mm512_and_si512(step == 0 ? _mm512_slli_epi16(c, 4) : _mm512_srli_epi16(c, 4),
                                               _mm512_set1_epi16(0x07f0));
    const __m512i normal = _mm512_add_epi16(magnitude, _mm512_set1_epi16(0x3c00));
    const __mmask32 is_subnormal = _mm512_testn_epi16_mask(magnitude, _mm512_set1_epi16(0x0780));
    const __m512i number = _mm512_mask_permutexvar_epi16(
        normal, is_subnormal, step == 0 ? c : _mm512_srli_epi16(c, 8), _mm512_load_si512(subnormal));
    const __m512i sign = step == 0 ? _mm512_slli_epi16(c, 8) : c;
    return bits_as<VU>(_mm512_ternarylogic_epi32(number, sign, _mm512_set1_epi16(-0x8000), 0xf8));
  }
};
#else
template <class T>
using E4m3 = Bytes<T, e4m3_at>;
#endif

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
