// The KV cache in 8 bits: a head's part of a page (its tile) holds page_size * D numbers, then a bf16
// scale per token; an entry is number * scale. Included only by *.isa.cpp.
//
// The scale is the largest entry's size over the format's largest number, rounded up, so that nothing
// saturates. The steps of fp8 double at powers of two, so that up to twice that scale may fit the
// entries better: of a few, the one with the smallest squared error is taken (kernels/kv_cache.py).
// Entries that are infinite or NaN make the scale so: they must show.
// Source of the fp8 formats: OCP 8-bit Floating Point Specification, revision 1.0 (2023).
#pragma once

#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr float kSmallestTop = 1e-30f;  // a vector whose entries are all smaller is zero

// 2^(-i / 8): what share of the format's largest number the largest entry may become.
constexpr double kShares[] = {1.0, 0.9170040432046712, 0.8408964152537145, 0.7711054127039704,
                              0.7071067811865476, 0.6484197773255048, 0.5946035575013605, 0.5452538663326288};

SAPWOOD_INLINE VI rounded_to_int(VF x) {
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return bits_as<VI>(x + magic) - bits_as<VI>(magic);
}

SAPWOOD_INLINE float power_of_2(int n) { return bits_as<float>((127 + n) << 23); }

struct Int8 {
  static constexpr float largest = 127.0f;
  static constexpr bool is_float = false;
  static VI encode(VF x) { return rounded_to_int(x); }
  static VF decode(VI number) { return __builtin_convertvector(number, VF); }
};

// Sign, exponent and M bits of mantissa; an exponent is kBias less than fp32's.
template <int M, int kBias, int kLargest>
struct Float8 {
  static constexpr float largest = kLargest;
  static constexpr bool is_float = true;
  static constexpr int shift = 23 - M;

  // To the nearest, ties to even.
  static VI encode(VF x) {
    const VI bits = bits_as<VI>(x), size = bits & 0x7fffffff;
    const VI normal = ((size + ((1 << (shift - 1)) - 1) + ((size >> shift) & 1)) >> shift) - (kBias << M);
    const VI subnormal = rounded_to_int(bits_as<VF>(size) * splat(power_of_2(126 - kBias + M)));
    const VI number = size < ((kBias + 1) << 23) ? subnormal : normal;
    return number | ((bits >> 24) & 0x80);
  }

  // To a number of so many bits of mantissa, of any exponent: subnormal numbers are rounded less than
  // they would be, by too little to matter.
  static VF rounded(VF x) {
    return bits_as<VF>((bits_as<VI>(x) + (1 << (shift - 1))) & ~((1 << shift) - 1));
  }

  // The bits at their place in an fp32, whose exponent is then kBias too small.
  static VF decode(VI number) {
    const VI bits = (number << shift) & static_cast<std::int32_t>(0x80000000u | (0x7fu << shift));
    return bits_as<VF>(bits) * splat(power_of_2(kBias));
  }
};

typedef Float8<3, 120, 448> E4M3;
typedef Float8<2, 112, 57344> E5M2;

// Calls body(format) with the format's struct above.
template <class Body>
SAPWOOD_INLINE void with_format(KvFormat format, const Body& body) {
  switch (format) {
    case KvFormat::int8: body(Int8()); break;
    case KvFormat::fp8_e4m3: body(E4M3()); break;
    case KvFormat::fp8_e5m2: body(E5M2()); break;
    case KvFormat::dense: break;
  }
}

// Not smaller than size.
SAPWOOD_INLINE bf16 rounded_up(float size) {
  return bf16{static_cast<std::uint16_t>((bits_as<std::uint32_t>(size) + 0xffff) >> 16)};
}

// The scale with the smallest squared error for x [d]: one that makes its largest entry, `top`, become
// one of kShares of the format's largest number.
template <class Format>
SAPWOOD_INLINE bf16 closest_scale(const float* x, int d, float top) {
  bf16 best{0};
  float least_error = 0, first_scale = 0;
  for (const double share : kShares) {
    const bf16 one = rounded_up(top / static_cast<float>(Format::largest * share));
    const float scale = to_float(one);
    const VF inverse = splat(1.0f / scale);
    VF squares{};
    for (int i = 0; i < d; i += W) {
      const VF number = load(x + i) * inverse;
      const VF error = Format::rounded(number) - number;
      squares += error * error;
    }
    if (share == 1.0) first_scale = scale;
    const float factor = scale / first_scale;  // of errors; squares of scales might overflow
    const float error = sum(squares) * factor * factor;
    if (share < 1.0 && !(error < least_error)) continue;
    least_error = error;
    best = one;
  }
  return best;
}

// x [d] -> its numbers and its scale.
static inline void quantize_head(KvFormat format, const float* x, int d, std::uint8_t* numbers,
                                 std::uint8_t* scale) {
  VI tops{};  // of the bits, in whose order NaN is above all
  for (int i = 0; i < d; i += W) {
    const VI size = bits_as<VI>(load(x + i)) & 0x7fffffff;
    tops = size > tops ? size : tops;
  }
  std::int32_t top_bits = 0;
  for (int i = 0; i < W; i++) top_bits = tops[i] > top_bits ? tops[i] : top_bits;
  const float top = bits_as<float>(top_bits);
  with_format(format, [&](auto f) {
    using Format = decltype(f);
    bf16 one{0};
    if (top != top) one.bits = 0x7fc0;
    if (top >= kSmallestTop) one = rounded_up(top / Format::largest);
    if constexpr (Format::is_float) {
      if (top >= kSmallestTop && top_bits < 0x7f800000) one = closest_scale<Format>(x, d, top);
    }
    __builtin_memcpy(scale, &one, sizeof(one));
    const VF inverse = splat(top >= kSmallestTop ? 1.0f / to_float(one) : 0.0f);
    for (int i = 0; i < d; i += W) {
      store_bytes(numbers + i, Format::encode(load(x + i) * inverse));
    }
  });
}

SAPWOOD_INLINE void store_two(float* p, VF low, VF high) {
  store(p, low);
  store(p + W, high);
}

SAPWOOD_INLINE void store_two(bf16* p, VF low, VF high) {
#if defined(__AVX512BF16__)
  const __m512bh both = _mm512_cvtne2ps_pbh(bits_as<__m512>(high), bits_as<__m512>(low));
  __builtin_memcpy(p, &both, sizeof(both));
#else
  store(p, low);
  store(p + W, high);
#endif
}

// n neighbouring tokens of one tile -> [n, d]
template <class T>
static inline void dequantize_rows(KvFormat format, const std::uint8_t* numbers,
                                   const std::uint8_t* scales, int n, int d, T* out) {
  with_format(format, [&](auto f) {
    using Format = decltype(f);
    for (int t = 0; t < n; t++, numbers += d, out += d) {
      bf16 one;
      __builtin_memcpy(&one, scales + t * sizeof(one), sizeof(one));
      const VF scale = splat(to_float(one));
      for (int i = 0; i < d; i += 2 * W) {
        const VF low = Format::decode(load_bytes(numbers + i)) * scale;
        const VF high = Format::decode(load_bytes(numbers + i + W)) * scale;
        store_two(out + i, low, high);
      }
    }
  });
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
