// Vectors of this instruction set's width, written with the compiler's vector extensions, and the
// few operations where an intrinsic is worth it. Included only by *.isa.cpp (see ops.h).
//
// A "lane" is 32 bits: one float, or two neighbouring bf16. Code for dot products is written once
// over lanes; dot() multiplies what is in them and adds to fp32.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(SAPWOOD_NEON)
#include <arm_neon.h>
#endif

#include "ops.h"

#ifndef SAPWOOD_ISA
#error "SAPWOOD_ISA must name the namespace of this instruction set"
#endif

#define SAPWOOD_INLINE static inline __attribute__((always_inline))

namespace sapwood::SAPWOOD_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats per vector
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums, 2 of the right operand, 1 of the left: 16 registers
#elif defined(SAPWOOD_NEON)
constexpr int W = 4;
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 sums, 4 of the right operand, some of the left: 32 registers
#else
constexpr int W = 4;
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

typedef float VF __attribute__((vector_size(W * 4)));
typedef std::int32_t VI __attribute__((vector_size(W * 4)));
typedef std::uint32_t VU __attribute__((vector_size(W * 4)));
typedef std::uint16_t VH __attribute__((vector_size(W * 2)));
typedef std::int8_t VB __attribute__((vector_size(W)));
typedef float V4 __attribute__((vector_size(16)));

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <class T>
struct Pack;
template <>
struct Pack<float> {
  static constexpr int per_lane = 1;
};
template <>
struct Pack<bf16> {
  static constexpr int per_lane = 2;
};

template <class To, class From>
SAPWOOD_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

SAPWOOD_INLINE constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
SAPWOOD_INLINE constexpr std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

SAPWOOD_INLINE VF splat(float x) { return x - VF{}; }
SAPWOOD_INLINE VU splat_lane(std::uint32_t x) { return x - VU{}; }
SAPWOOD_INLINE VF vmax(VF a, VF b) { return a > b ? a : b; }

// ---- loads and stores ----

SAPWOOD_INLINE float to_float(float x) { return x; }
SAPWOOD_INLINE float to_float(bf16 x) {
  return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// Round to nearest even; NaN stays NaN.
SAPWOOD_INLINE std::uint16_t round_bf16(float x) {
  const std::uint32_t u = bits_as<std::uint32_t>(x);
  if (x != x) return static_cast<std::uint16_t>((u >> 16) | 0x40);
  return static_cast<std::uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

SAPWOOD_INLINE void put(float* p, float x) { *p = x; }
SAPWOOD_INLINE void put(bf16* p, float x) { p->bits = round_bf16(x); }

SAPWOOD_INLINE VF load(const float* p) {
  VF v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

SAPWOOD_INLINE VU load_widened(const bf16* p) {
  VH h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, VU);
}

SAPWOOD_INLINE VF load(const bf16* p) {
#if defined(SAPWOOD_NEON)
  return bits_as<VF>(vshll_n_u16(vld1_u16(&p->bits), 16));
#else
  return bits_as<VF>(load_widened(p) << 16);
#endif
}

SAPWOOD_INLINE VF load(const f16* p) {
#if defined(__AVX512F__)
  return bits_as<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bits_as<VF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(SAPWOOD_NEON)
  float16x4_t halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  return bits_as<VF>(vcvt_f32_f16(halves));
#else
  VH h;
  __builtin_memcpy(&h, p, sizeof(h));
  const VU wide = __builtin_convertvector(h, VU);
  // The exponents' biases differ by 112; a product also makes normal numbers of subnormal ones.
  const VU shifted = (wide & 0x7fff) << 13;
  const VU finite = bits_as<VU>(bits_as<VF>(shifted) * splat(0x1p112f));
  const VU magnitude = (wide & 0x7c00) == 0x7c00 ? shifted | 0x7f800000 : finite;
  return bits_as<VF>(magnitude | ((wide & 0x8000) << 16));
#endif
}

SAPWOOD_INLINE VU load_lanes(const void* p) {
  VU v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

SAPWOOD_INLINE std::uint32_t load_lane(const void* p) {
  std::uint32_t v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

SAPWOOD_INLINE void store(float* p, VF v) { __builtin_memcpy(p, &v, sizeof(v)); }
SAPWOOD_INLINE void store_lanes(void* p, VU v) { __builtin_memcpy(p, &v, sizeof(v)); }

SAPWOOD_INLINE void store(bf16* p, VF v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(bits_as<__m512>(v));
  __builtin_memcpy(p, &h, sizeof(h));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  const bfloat16x4_t h = vcvt_bf16_f32(bits_as<float32x4_t>(v));
  __builtin_memcpy(p, &h, sizeof(h));
#else
  const VU u = bits_as<VU>(v);
  const VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VH h = __builtin_convertvector(v == v ? rounded : ((u >> 16) | 0x40), VH);
  __builtin_memcpy(p, &h, sizeof(h));
#endif
}

// W bytes, sign-extended. GCC 12 takes a vector conversion from bytes apart, entry by entry.
SAPWOOD_INLINE VI load_bytes(const void* p) {
#if defined(__AVX512F__)
  return bits_as<VI>(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return bits_as<VI>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#elif defined(SAPWOOD_NEON)
  const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(load_lane(p)));
  return bits_as<VI>(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
#else
  VB bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, VI);
#endif
}

SAPWOOD_INLINE VF to_floats(VI x) { return __builtin_convertvector(x, VF); }

// The lowest byte of each entry.
SAPWOOD_INLINE void store_bytes(void* p, VI v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(bits_as<__m512i>(v)));
#elif defined(SAPWOOD_NEON)
  const uint16x4_t halves = vmovn_u32(bits_as<uint32x4_t>(v));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
  __builtin_memcpy(p, &bytes, W);
#else
  const VB bytes = __builtin_convertvector(v, VB);
  __builtin_memcpy(p, &bytes, sizeof(bytes));
#endif
}

// ---- dot products over lanes ----

SAPWOOD_INLINE VF dot(const float*, VF sum, VU a, VU b) {
  return bits_as<VF>(a) * bits_as<VF>(b) + sum;
}

SAPWOOD_INLINE VF dot(const bf16*, VF sum, VU a, VU b) {
#if defined(__AVX512BF16__)
  return bits_as<VF>(_mm512_dpbf16_ps(bits_as<__m512>(sum), bits_as<__m512bh>(a),
                                      bits_as<__m512bh>(b)));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  // Sums are rounded to odd, not to nearest: up to one unit of the last place each, in either direction.
  return bits_as<VF>(vbfdotq_f32(bits_as<float32x4_t>(sum), bits_as<bfloat16x8_t>(a), bits_as<bfloat16x8_t>(b)));
#else
  sum = bits_as<VF>(a << 16) * bits_as<VF>(b << 16) + sum;
  return bits_as<VF>(a & 0xffff0000u) * bits_as<VF>(b & 0xffff0000u) + sum;
#endif
}

// dot(tag<T>(), ...): the overload for lanes that hold T.
template <class T>
SAPWOOD_INLINE const T* tag() {
  return nullptr;
}

// A lane that is multiplied with every lane of a vector.
#if defined(SAPWOOD_NEON)
typedef uint32x2_t Factor;  // its first entry: products with one entry need no vector full of it

SAPWOOD_INLINE Factor load_factor(const void* p) { return vreinterpret_u32_u64(vcreate_u64(load_lane(p))); }

SAPWOOD_INLINE VF dot(const float*, VF sum, Factor a, VU b) {
  return bits_as<VF>(vfmaq_lane_f32(bits_as<float32x4_t>(sum), bits_as<float32x4_t>(b), vreinterpret_f32_u32(a), 0));
}

SAPWOOD_INLINE VF dot(const bf16*, VF sum, Factor a, VU b) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return bits_as<VF>(vbfdotq_lane_f32(bits_as<float32x4_t>(sum), bits_as<bfloat16x8_t>(b), vreinterpret_bf16_u32(a), 0));
#else
  sum = dot(tag<float>(), sum, vshl_n_u32(a, 16), b << 16);
  return dot(tag<float>(), sum, vand_u32(a, vdup_n_u32(0xffff0000u)), b & 0xffff0000u);
#endif
}
#else
typedef VU Factor;

SAPWOOD_INLINE Factor load_factor(const void* p) { return splat_lane(load_lane(p)); }
#endif

SAPWOOD_INLINE V4 fold4(VF v) {
#if defined(__AVX512F__)
  const __m512 z = bits_as<__m512>(v);
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
  return bits_as<V4>(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#elif defined(__AVX2__)
  const __m256 y = bits_as<__m256>(v);
  return bits_as<V4>(_mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#else
  return v;
#endif
}

typedef std::int32_t V4I __attribute__((vector_size(16)));

// The sums of four vectors, in order.
SAPWOOD_INLINE V4 sum4(VF a, VF b, VF c, VF d) {
#if defined(__AVX512F__)
  const __m512 za = bits_as<__m512>(a), zb = bits_as<__m512>(b);
  const __m512 zc = bits_as<__m512>(c), zd = bits_as<__m512>(d);
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(za, zb), _mm512_unpackhi_ps(za, zb));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(zc, zd), _mm512_unpackhi_ps(zc, zd));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  return fold4(bits_as<VF>(abcd));
#elif defined(SAPWOOD_NEON)
  const float32x4_t ab = vpaddq_f32(bits_as<float32x4_t>(a), bits_as<float32x4_t>(b));
  return bits_as<V4>(vpaddq_f32(ab, vpaddq_f32(bits_as<float32x4_t>(c), bits_as<float32x4_t>(d))));
#else
  const V4 x = fold4(a), y = fold4(b), z = fold4(c), w = fold4(d);
  const V4 xy = __builtin_shuffle(x, y, V4I{0, 4, 1, 5}) + __builtin_shuffle(x, y, V4I{2, 6, 3, 7});
  const V4 zw = __builtin_shuffle(z, w, V4I{0, 4, 1, 5}) + __builtin_shuffle(z, w, V4I{2, 6, 3, 7});
  return __builtin_shuffle(xy, zw, V4I{0, 1, 4, 5}) + __builtin_shuffle(xy, zw, V4I{2, 3, 6, 7});
#endif
}

SAPWOOD_INLINE float sum(VF v) {
  const V4 x = fold4(v);
  return (x[0] + x[2]) + (x[1] + x[3]);
}

SAPWOOD_INLINE bool any(VI v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bits_as<__m512i>(v), bits_as<__m512i>(v)) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(bits_as<__m256i>(v), bits_as<__m256i>(v)) == 0;
#elif defined(SAPWOOD_NEON)
  return vmaxvq_u32(bits_as<uint32x4_t>(v)) != 0;
#else
  int bits = 0;
  for (int i = 0; i < W; i++) bits |= v[i];
  return bits != 0;
#endif
}

SAPWOOD_INLINE float maximum(VF v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bits_as<__m512>(v));
#elif defined(__AVX2__)
  const __m256 y = bits_as<__m256>(v);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
#elif defined(SAPWOOD_NEON)
  return vmaxnmvq_f32(bits_as<float32x4_t>(v));
#else
  float x = v[0];
  for (int i = 1; i < W; i++) x = v[i] > x ? v[i] : x;
  return x;
#endif
}

// ---- exp ----

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;

// e^x, within 2 ulp; 0 below -87.3 (so that exp(-inf) is 0), at most e^88.
SAPWOOD_INLINE VF vexp(VF x) {
  const VI underflow = x < splat(-87.3f);
  x = underflow ? splat(-87.3f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VF shifted = x * splat(1.44269504088896341f) + magic;
  const VF n = shifted - magic;
  VF r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  VF p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const VI exponent = (bits_as<VI>(shifted) - bits_as<VI>(magic) + 127) << 23;
  const VF y = p * bits_as<VF>(exponent);
  return underflow ? VF{} : y;
}

SAPWOOD_INLINE float exp1(float x) { return vexp(splat(x))[0]; }

// 2^x, within 2 ulp, for x up to 126; 0 below -125 (so that 2^-inf is 0).
SAPWOOD_INLINE VF vexp2(VF x) {
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps(bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  const VF r = x - bits_as<VF>(n);
  VF p = splat(1.5403530e-4f);  // ln(2)^i / i!
  p = p * r + splat(1.3333558e-3f);
  p = p * r + splat(9.6181291e-3f);
  p = p * r + splat(5.5504109e-2f);
  p = p * r + splat(0.24022651f);
  p = p * r + splat(0.69314718f);
  p = p * r + splat(1.0f);
  const __mmask16 in_range =
      _mm512_cmp_ps_mask(bits_as<__m512>(x), _mm512_set1_ps(-125.0f), _CMP_GE_OQ);
  return bits_as<VF>(_mm512_maskz_scalef_ps(in_range, bits_as<__m512>(p), n));
#else
  return vexp(x * splat(0.69314718f));
#endif
}

SAPWOOD_INLINE float exp2_1(float x) { return vexp2(splat(x))[0]; }

// ---- work ----

SAPWOOD_INLINE std::int64_t take(std::int64_t* counter) {
  return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
}

// Runs body(thread) on up to `threads` threads, perhaps fewer: a body takes its work from a counter.
template <class Body>
static inline void run_parallel(const Team& team, std::int64_t threads, const Body& body) {
  if (threads <= 1) {
    body(0);
    return;
  }
  const auto run = [](const void* b, int thread) { (*static_cast<const Body*>(b))(thread); };
  team.launch(team.pool, static_cast<int>(threads), run, &body);
}

// Runs body(begin, end) over pieces of [0, n), two per thread.
template <class Body>
static inline void run_pieces(const Team& team, std::int64_t threads, std::int64_t n, const Body& body) {
  if (threads <= 1) {
    body(std::int64_t{0}, n);
    return;
  }
  const std::int64_t pieces = least(n, 2 * threads);
  std::int64_t next = 0;
  run_parallel(team, least(threads, pieces), [&](int) {
    for (std::int64_t i; (i = take(&next)) < pieces;) body(n * i / pieces, n * (i + 1) / pieces);
  });
}

// Tasks [0, n) in one contiguous share per thread: memory streams that the hardware can follow are read
// half as fast again as tasks from one common counter, each thread leaping over the others' (measured
// with tasks of 36 KiB). A thread that is done with its own share goes on with what others have left.
class Shares {
 public:
  Shares(std::int64_t n, std::int64_t threads)
      : n_(n), count_(static_cast<int>(most(1, least(threads, kMaxShares)))) {
    for (int i = 0; i < count_; i++) next_[i].value = begin(i);
  }

  // The next task, or n. `helped`: how many shares this thread has found empty; 0 at first.
  std::int64_t take_next(int thread, int* helped) {
    for (; *helped < count_; ++*helped) {
      const int share = (thread + *helped) % count_;
      const std::int64_t task = take(&next_[share].value);
      if (task < begin(share + 1)) return task;
    }
    return n_;
  }

 private:
  static constexpr std::int64_t kMaxShares = 64;
  struct alignas(64) Counter {
    std::int64_t value;
  };

  std::int64_t begin(int share) const { return n_ * share / count_; }

  const std::int64_t n_;
  const int count_;
  Counter next_[kMaxShares];
};

// The first n, below W, of a vector of results. Not inline: only the last outputs of a weight come here.
template <class Out, class T>
__attribute__((noinline)) void write_tail(Out* out, const T* bias, VF result, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i++) put(out + i, result[i] + (bias == nullptr ? 0.0f : to_float(bias[i])));
}

// How many threads are worth waking when each should have at least `grain` elements.
SAPWOOD_INLINE int worth_threads(int threads, std::int64_t elements, std::int64_t grain) {
  return static_cast<int>(most(1, least(threads, elements / grain)));
}

}  // namespace sapwood::SAPWOOD_ISA
