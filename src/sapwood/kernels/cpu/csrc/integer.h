// What the kernels for quantised weights share: products of bytes, rounding of x, the cut of the
// work, and writing results. Included only by *.isa.cpp.
#pragma once

#include "quantized.h"
#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileHeight = 6;  // rows of a register tile: each has integer and fp32 sums
#else
constexpr int kTileHeight = 2;
#endif
constexpr int kIntVectors = 2;  // vectors of outputs of a register tile

constexpr std::int64_t kStreamTaskBytes = 32 * 1024;   // of the weight per task, when memory is the limit
constexpr std::int64_t kResidentBytes = 320 * 1024;    // of the weight per task that stay in L2
constexpr std::int64_t kMostStreamedRows = 48;         // in all passes over one panel after the other
constexpr std::int64_t kAheadBytes = 4096;             // of the weight, prefetched
constexpr std::int64_t kLineBytes = 64;                // of a cache
constexpr std::int64_t kProductsPerThread = 65536;     // below, a thread costs too much
constexpr float kLeastMagnitude = 1e-30f;  // what is smaller counts as zero: 127 / it must be finite

// Each lane: sum + the four products of w's unsigned and x's signed bytes. kSmall: w's are below 64.
template <bool kSmall>
SAPWOOD_INLINE VI dot_bytes(VI sum, VU w, Factor x) {
#if defined(__AVX512VNNI__)
  return bits_as<VI>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), bits_as<__m512i>(w), bits_as<__m512i>(x)));
#elif defined(__AVX512BW__)
  const __m512i a = bits_as<__m512i>(w), b = bits_as<__m512i>(x);
  if (kSmall) {
    const __m512i pairs = _mm512_maddubs_epi16(a, b);
    return sum + bits_as<VI>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
  return sum + bits_as<VI>(_mm512_add_epi32(even, odd));
#elif defined(__AVX2__)
  const __m256i a = bits_as<__m256i>(w), b = bits_as<__m256i>(x);
  if (kSmall) {
    const __m256i pairs = _mm256_maddubs_epi16(a, b);
    return sum + bits_as<VI>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return sum + bits_as<VI>(_mm256_add_epi32(even, odd));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  const int8x8_t factor = vreinterpret_s8_u32(x);
  return bits_as<VI>(vusdotq_lane_s32(bits_as<int32x4_t>(sum), bits_as<uint8x16_t>(w), factor, 0));
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x8_t factor = vreinterpret_s8_u32(x);
  return bits_as<VI>(vdotq_lane_s32(bits_as<int32x4_t>(sum), bits_as<int8x16_t>(w), factor, 0));
#elif defined(SAPWOOD_NEON)
  // Two products are at most 2 * 128 * 127, which 16 bits hold.
  const int8x16_t a = bits_as<int8x16_t>(w), b = vreinterpretq_s8_u32(vdupq_lane_u32(x, 0));
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return bits_as<VI>(vpadalq_s16(bits_as<int32x4_t>(sum), vpaddq_s16(low, high)));
#else
  const VI a = bits_as<VI>(w), b = bits_as<VI>(x);
  sum += (a & 255) * ((b << 24) >> 24);
  sum += ((a >> 8) & 255) * ((b << 16) >> 24);
  sum += ((a >> 16) & 255) * ((b << 8) >> 24);
  return sum + bits_as<VI>(w >> 24) * (b >> 24);
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
SAPWOOD_INLINE VF to_floats(VI x) { return __builtin_convertvector(x, VF); }

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

// W fp16 -> fp32.
SAPWOOD_INLINE VF load_halves(const std::byte* p) {
#if defined(__AVX512F__)
  return bits_as<VF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
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
// every task; x are the rounded rows from the first one on.
template <class RoundRow, class Multiply>
static inline void run_quantized(const QuantizedArgs& a, const Cut& cut, const RoundRow& round_row,
                                 const Multiply& multiply) {
  const LinearWeight& w = *a.weight;
  const std::int64_t row_bytes = rounded_row_bytes(w.kind, w.k);
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

// What a pass over a group of weights fetches of the memory after it: lines `step` bytes apart from
// the `first` on, `offset` bytes on.
struct Fetch {
  std::int64_t offset, first, step;
};

constexpr Fetch kNoFetch{0, INT64_MAX, 1};

SAPWOOD_INLINE void fetch(const Fetch& lines, const std::byte* group, std::int64_t bytes) {
  for (std::int64_t i = lines.first; i < bytes; i += lines.step) {
    __builtin_prefetch(group + lines.offset + i, 0, 2);
  }
}

// Calls pass(panel, first row, rows, fetch) for all tiles of a task. A few passes go over one panel
// after the other, each fetching its share of the next one, so that memory never rests. More of them
// go over all panels, which the first one brings into the cache.
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
      for (int i = 0; i < W && column + v * W + i < w.n; i++) {
        put(out + v * W + i, results[v][i] + (bias == nullptr ? 0.0f : to_float(bias[v * W + i])));
      }
    }
  }
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
