// What the kernels for quantised weights share: products of bytes, rounding of x, the cut of the
// work, and writing results. Included only by *.isa.cpp.
#pragma once

#include "quantized.h"
#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Rows of a register tile, each of which has integer and fp32 sums, and vectors of outputs beside each
// other in it. A panel is as wide as its vectors where a row or two leave room for that.
#if defined(__AVX512F__)
constexpr int kTileHeight = 6;
#elif defined(__AVX2__) || defined(SAPWOOD_NEON)
constexpr int kTileHeight = 4;
#else
constexpr int kTileHeight = 2;
#endif
#if defined(SAPWOOD_NEON)
constexpr int kIntVectors = 4;
constexpr bool kWidePanels = true;
#else
constexpr int kIntVectors = 2;
constexpr bool kWidePanels = W >= 8;
#endif
static constexpr int int_vectors(int rows) {
  return kWidePanels && rows <= 2 ? static_cast<int>(kPanel) / W : kIntVectors;
}

constexpr std::int64_t kStreamTaskBytes = 32 * 1024;   // of the weight per task, when memory is the limit
constexpr std::int64_t kResidentBytes = 320 * 1024;    // of the weight per task that stay in L2
constexpr std::int64_t kMostStreamedRows = 48;         // with more rows, passes go over all panels
constexpr std::int64_t kAheadBytes = 4096;             // of the weight, prefetched
constexpr std::int64_t kLineBytes = 64;                // of a cache
constexpr std::int64_t kProductsPerThread = 65536;     // below, a thread costs too much
constexpr float kLeastMagnitude = 1e-30f;  // smaller numbers count as 0: 127 / this is finite

// ---- products of bytes ----
//
// The instructions that multiply bytes take an unsigned and a signed factor. Weights are unsigned: numbers
// below 64 as they are, and numbers of 8 bits plus 128, which offset_correction takes off the sums. Where
// pairs of products are added in 16 bits, which two products of 255 would exceed, weights of 8 bits become
// signed again (kSignedBytes): their magnitudes are the unsigned factor, and x takes their signs; then
// nothing has to be taken off. ARM processors without i8mm multiply signed factors with signed ones, so
// there, too, weights of 8 bits become signed.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif
#if defined(__AVX512BW__) || defined(__AVX2__)
constexpr bool kSignedBytes = !kHasVnni;
#elif defined(SAPWOOD_NEON) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedBytes = true;
#else
constexpr bool kSignedBytes = false;
#endif

// What to add to a sum of products to take off the 128 that weights of 8 bits have too much; `sum` is the
// sum of the numbers of x.
SAPWOOD_INLINE std::int32_t offset_correction(std::int32_t sum) { return kSignedBytes ? 0 : -128 * sum; }

#if !defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define SAPWOOD_MADD(a, b) bits_as<VU>(_mm512_madd_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)))
#define SAPWOOD_MADDUBS(a, b) bits_as<VU>(_mm512_maddubs_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)))
#define SAPWOOD_ADD16(a, b) bits_as<VU>(_mm512_add_epi16(bits_as<__m512i>(a), bits_as<__m512i>(b)))
#elif !defined(__AVXVNNI__) && !defined(__AVX512BW__) && defined(__AVX2__)
#define SAPWOOD_MADD(a, b) bits_as<VU>(_mm256_madd_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)))
#define SAPWOOD_MADDUBS(a, b) bits_as<VU>(_mm256_maddubs_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)))
#define SAPWOOD_ADD16(a, b) bits_as<VU>(_mm256_add_epi16(bits_as<__m256i>(a), bits_as<__m256i>(b)))
#endif

// A vector of weights as dot_bytes takes it. kBits: of a number.
template <int kBits>
struct Right {
  VU numbers;
};

#if defined(SAPWOOD_MADDUBS)
template <>
struct Right<8> {
#if defined(__AVX512BW__)
  VU magnitudes;
  __mmask64 negative;
#else
  VU numbers, magnitudes;
#endif
};
#endif

template <int kBits>
SAPWOOD_INLINE Right<kBits> right_of(VU numbers) {
#if defined(SAPWOOD_MADDUBS)
  if constexpr (kBits == 8) {
    const VU plain = numbers ^ 0x80808080u;
#if defined(__AVX512BW__)
    return {bits_as<VU>(_mm512_abs_epi8(bits_as<__m512i>(plain))), _mm512_movepi8_mask(bits_as<__m512i>(plain))};
#else
    return {plain, bits_as<VU>(_mm256_abs_epi8(bits_as<__m256i>(plain)))};
#endif
  } else {
    return {numbers};
  }
#elif defined(SAPWOOD_NEON)
  return {kBits == 8 && kSignedBytes ? numbers ^ 0x80808080u : numbers};
#else
  return {numbers};
#endif
}

// Each lane: sum + the four products of the weight's and x's bytes.
template <int kBits>
SAPWOOD_INLINE VI dot_bytes(VI sum, const Right<kBits>& w, Factor x) {
#if defined(__AVX512VNNI__)
  return bits_as<VI>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(w.numbers), bits_as<__m512i>(x)));
#elif defined(__AVXVNNI__)
  return bits_as<VI>(_mm256_dpbusd_avx_epi32(bits_as<__m256i>(sum), bits_as<__m256i>(w.numbers), bits_as<__m256i>(x)));
#elif defined(SAPWOOD_MADDUBS)
  const VU ones = splat_lane(0x00010001u);
  if constexpr (kBits == 8) {
#if defined(__AVX512BW__)
    const VU turned = bits_as<VU>(_mm512_mask_sub_epi8(bits_as<__m512i>(x), w.negative, _mm512_setzero_si512(),
                                                       bits_as<__m512i>(x)));
#else
    const VU turned = bits_as<VU>(_mm256_sign_epi8(bits_as<__m256i>(x), bits_as<__m256i>(w.numbers)));
#endif
    return sum + bits_as<VI>(SAPWOOD_MADD(SAPWOOD_MADDUBS(w.magnitudes, turned), ones));
  } else {
    return sum + bits_as<VI>(SAPWOOD_MADD(SAPWOOD_MADDUBS(w.numbers, x), ones));
  }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  const int8x8_t factor = vreinterpret_s8_u32(x);
  return bits_as<VI>(vusdotq_lane_s32(bits_as<int32x4_t>(sum), bits_as<uint8x16_t>(w.numbers), factor, 0));
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x8_t factor = vreinterpret_s8_u32(x);
  return bits_as<VI>(vdotq_lane_s32(bits_as<int32x4_t>(sum), bits_as<int8x16_t>(w.numbers), factor, 0));
#elif defined(SAPWOOD_NEON)
  // Two products are at most 2 * 128 * 127, which 16 bits hold.
  const int8x16_t a = bits_as<int8x16_t>(w.numbers), b = vreinterpretq_s8_u32(vdupq_lane_u32(x, 0));
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return bits_as<VI>(vpadalq_s16(bits_as<int32x4_t>(sum), vpaddq_s16(low, high)));
#elif defined(__SSE2__)
  const __m128i a = bits_as<__m128i>(w.numbers), b = bits_as<__m128i>(x);
  const __m128i even = _mm_madd_epi16(_mm_and_si128(a, _mm_set1_epi16(255)),
                                      _mm_srai_epi16(_mm_slli_epi16(b, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srli_epi16(a, 8), _mm_srai_epi16(b, 8));
  return sum + bits_as<VI>(_mm_add_epi32(even, odd));
#else
  const VI a = bits_as<VI>(w.numbers), b = bits_as<VI>(x);
  sum += (a & 255) * ((b << 24) >> 24);
  sum += ((a >> 8) & 255) * ((b << 16) >> 24);
  sum += ((a >> 16) & 255) * ((b << 8) >> 24);
  return sum + bits_as<VI>(w.numbers >> 24) * (b >> 24);
#endif
}

// x, hidden from the compiler, so that a product is rounded before something is added to it: results
// must not depend on whether an instruction set multiplies and adds in one rounding.
SAPWOOD_INLINE VF rounded(VF x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

SAPWOOD_INLINE VI splat_int(std::int32_t x) { return x - VI{}; }

SAPWOOD_INLINE std::int32_t largest(VI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(bits_as<__m512i>(v));
#elif defined(SAPWOOD_NEON)
  return vmaxvq_s32(bits_as<int32x4_t>(v));
#else
  std::int32_t x = v[0];
  for (int i = 1; i < W; i++) x = v[i] > x ? v[i] : x;
  return x;
#endif
}

SAPWOOD_INLINE std::int32_t total(VI v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(bits_as<__m512i>(v));
#elif defined(SAPWOOD_NEON)
  return vaddvq_s32(bits_as<int32x4_t>(v));
#else
  std::int32_t x = v[0];
  for (int i = 1; i < W; i++) x += v[i];
  return x;
#endif
}

// ---- x ----

// The largest magnitude, as bits: they order as the numbers do, with NaN above all.
template <class T>
SAPWOOD_INLINE float magnitude(const T* x, std::int64_t k) {
  VI most_bits{};
  std::int64_t i = 0;
  for (; i + W <= k; i += W) {
    const VI bits = bits_as<VI>(load(x + i)) & 0x7fffffff;
    most_bits = bits > most_bits ? bits : most_bits;
  }
  std::int32_t found = largest(most_bits);
  for (; i < k; i++) {
    const std::int32_t bits = bits_as<std::int32_t>(to_float(x[i])) & 0x7fffffff;
    found = bits > found ? bits : found;
  }
  return bits_as<float>(found);
}

// The power of two that numbers up to `most`, which is finite and not tiny, are whole multiples of with `bits` bits. What
// bf16 holds is still held after it was rounded to such a multiple.
SAPWOOD_INLINE float whole_step(float most, int bits) {
  const std::uint32_t exponent = bits_as<std::uint32_t>(most) >> 23;
  return bits_as<float>((exponent + 1 - static_cast<std::uint32_t>(bits)) << 23);
}

// k numbers times `inverse`, rounded to the nearest even integer -> int8; returns their sum.
template <class T>
SAPWOOD_INLINE std::int32_t round_to_bytes(const T* x, std::int64_t k, float inverse, std::int8_t* out) {
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  VI sums{};
  std::int64_t i = 0;
  for (; i + W <= k; i += W) {
    const VF scaled = rounded(load(x + i) * splat(inverse));
    const VI whole = bits_as<VI>(scaled + magic) - bits_as<VI>(magic);
    sums += whole;
    store_bytes(out + i, whole);
  }
  std::int32_t sum = total(sums);
  for (; i < k; i++) {
    const VF scaled = rounded(splat(to_float(x[i]) * inverse));
    const std::int32_t whole = (bits_as<VI>(scaled + magic) - bits_as<VI>(magic))[0];
    out[i] = static_cast<std::int8_t>(whole);
    sum += whole;
  }
  return sum;
}

struct Rounded {
  float scale;
  std::int32_t sum;  // of the int8
};

// k numbers -> int8 with one scale. NaN or infinity among them makes the scale NaN, so that it shows
// in the result.
template <class T>
SAPWOOD_INLINE Rounded round_group(const T* x, std::int64_t k, std::int8_t* out) {
  const float most = magnitude(x, k);
  if (most >= kLeastMagnitude && most < __builtin_inff()) {
    return {most / 127.0f, round_to_bytes(x, k, 127.0f / most, out)};
  }
  __builtin_memset(out, 0, static_cast<std::size_t>(k));
  return {most < kLeastMagnitude ? 0.0f : __builtin_nanf(""), 0};
}

// ---- work ----

// A task is `panels` panels x `rows` rows, done `tile_rows` rows at a time.
struct Cut {
  std::int64_t panels, rows, tile_rows, panel_tasks, tasks;
  int threads;
};

static inline Cut cut_work(const QuantizedArgs& a, std::int64_t rows_per_tile) {
  const LinearWeight& w = *a.weight;
  const std::int64_t all_panels = (w.n + kPanel - 1) / kPanel;
  const std::int64_t tiles = (a.m + rows_per_tile - 1) / rows_per_tile;
  Cut cut{};
  cut.threads = worth_threads(a.team.threads, w.n * w.k * ((a.m + 3) / 4), kProductsPerThread);
  cut.tile_rows = (a.m + tiles - 1) / tiles;
  const std::int64_t share = most(1, all_panels / (cut.threads * 4));
  const std::int64_t bytes = a.m <= kMostStreamedRows ? kStreamTaskBytes : kResidentBytes;
  cut.panels = least(share, most(1, bytes / panel_bytes(w.kind, w.k)));
  cut.panel_tasks = (all_panels + cut.panels - 1) / cut.panels;
  // Rows are cut only where panels alone are too few: each cut reads the weight again.
  const std::int64_t wanted = a.m <= kMostStreamedRows ? 1 : most(1, cut.threads * 4 / cut.panel_tasks);
  cut.rows = (tiles + wanted - 1) / wanted * cut.tile_rows;
  cut.tasks = cut.panel_tasks * ((a.m + cut.rows - 1) / cut.rows);
  return cut;
}

// Rounds x with round_row(row, to), then runs multiply(x, first panel, panels, first row, rows) for
// every task; x are the rounded rows from the first one on. Rows are those of a.x, each of which may
// become several rows of bytes.
template <class RoundRow, class Multiply>
static inline void run_quantized(const QuantizedArgs& a, const Cut& cut, const RoundRow& round_row,
                                 const Multiply& multiply) {
  const LinearWeight& w = *a.weight;
  const std::int64_t row_bytes = rounded_row_bytes(w.kind, w.k) * rows_of_bytes(w);
  const std::int64_t all_panels = (w.n + kPanel - 1) / kPanel;
  // For a few rows it is cheaper to round them once per thread than to wait for another thread.
  const bool own = a.m <= kOwnRows;
  if (!own) {
    run_pieces(a.team, cut.threads, a.m, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; row++) round_row(row, a.scratch + row * row_bytes);
    });
  }
  Shares shares(cut.tasks, cut.threads);
  run_parallel(a.team, least(cut.threads, cut.tasks), [&](int thread) {
    int helped = 0;
    std::byte* x = a.scratch + (own ? thread * a.m * row_bytes : 0);
    bool rounded = !own;
    for (std::int64_t task; (task = shares.take_next(thread, &helped)) < cut.tasks;) {
      for (std::int64_t row = 0; !rounded && row < a.m; row++) round_row(row, x + row * row_bytes);
      rounded = true;
      const std::int64_t panel = task % cut.panel_tasks * cut.panels;
      const std::int64_t row = task / cut.panel_tasks * cut.rows;
      multiply(x + row * row_bytes, panel, least(cut.panels, all_panels - panel), row,
               least(cut.rows, a.m - row));
    }
  });
}

// The cache lines that a pass over a group of weights prefetches: `step` bytes apart, from the `first`
// byte of the memory on that begins `offset` bytes after the group.
struct Fetch {
  std::int64_t offset, first, step;
};

constexpr Fetch kNoFetch{0, INT64_MAX, 1};

SAPWOOD_INLINE void fetch(const Fetch& lines, const std::byte* group, std::int64_t bytes) {
  for (std::int64_t i = lines.first; i < bytes; i += lines.step) {
    __builtin_prefetch(group + lines.offset + i, 0, 2);
  }
}

// Calls pass(panel, first row, rows, fetch) for all tiles of a task. If a panel needs only a few passes,
// these finish it before the next panel, and each fetches its share of that, so that memory never rests.
// Otherwise each pass goes over all panels, which the first pass brings into the cache.
template <class Pass>
static inline void each_pass(const Cut& cut, std::int64_t panels, std::int64_t rows, std::int64_t bytes,
                             const Pass& pass) {
  const std::int64_t passes = (rows + cut.tile_rows - 1) / cut.tile_rows;
  const Fetch all{kAheadBytes, 0, kLineBytes};
  const auto run = [&](std::int64_t panel, std::int64_t i, const Fetch& lines) {
    pass(panel, i * cut.tile_rows, least(cut.tile_rows, rows - i * cut.tile_rows), lines);
  };
  if (passes == 1) {
    for (std::int64_t p = 0; p < panels; p++) run(p, 0, all);
  } else if (rows <= kMostStreamedRows) {
    for (std::int64_t p = 0; p < panels; p++) {
      for (std::int64_t i = 0; i < passes; i++) run(p, i, {bytes, i * kLineBytes, passes * kLineBytes});
    }
  } else {
    for (std::int64_t i = 0; i < passes; i++) {
      for (std::int64_t p = 0; p < panels; p++) run(p, i, i == 0 ? all : kNoFetch);
    }
  }
}

// Results of one row, columns [column, column + width) of a panel's 32; those beyond n are dropped.
template <class T, int V>
SAPWOOD_INLINE void write_results(const QuantizedArgs& a, std::int64_t row, std::int64_t column,
                                  const VF* results) {
  const LinearWeight& w = *a.weight;
  T* out = static_cast<T*>(a.out) + row * w.out_stride + column;
  const T* bias = w.bias == nullptr ? nullptr : static_cast<const T*>(w.bias) + column;
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) {
    if (column + (v + 1) * W <= w.n) {
      store(out + v * W, bias == nullptr ? results[v] : results[v] + load(bias + v * W));
    } else {
      write_tail<T, T>(out + v * W, bias == nullptr ? nullptr : bias + v * W, results[v], w.n - column - v * W);
    }
  }
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
