// Forbidding tokens: entries of a row become -inf where their bit is 0.
#include "table.h"
#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr int kBits = 32;                            // of a word of the mask
constexpr std::int64_t kEntriesPerThread = 4 * 16384;  // below this a thread costs more than it saves
constexpr std::uint32_t kForbidden = 0xff80;         // -inf as bf16

// The 32 entries of one word.
SAPWOOD_INLINE void forbid(float* x, std::uint32_t word) {
#if defined(__AVX512F__)
  const __m512 forbidden = _mm512_set1_ps(-__builtin_inff());
  for (int half = 0; half < 2; half++) {
    const auto kept = static_cast<__mmask16>(word >> (16 * half));
    _mm512_storeu_ps(x + 16 * half,
                     _mm512_mask_blend_ps(kept, forbidden, _mm512_loadu_ps(x + 16 * half)));
  }
#else
  VU lane;
  for (int i = 0; i < W; i++) lane[i] = 1u << i;
  for (int first = 0; first < kBits; first += W) {
    const VI kept = (splat_lane(word >> first) & lane) != VU{};
    store(x + first, kept ? load(x + first) : splat(-__builtin_inff()));
  }
#endif
}

SAPWOOD_INLINE void forbid(bf16* x, std::uint32_t word) {
#if defined(__AVX512BW__)
  const __m512i forbidden = _mm512_set1_epi16(static_cast<short>(kForbidden));
  _mm512_storeu_si512(x, _mm512_mask_blend_epi16(word, forbidden, _mm512_loadu_si512(x)));
#else
  VU lane;
  for (int i = 0; i < W; i++) lane[i] = 1u << i;
  for (int first = 0; first < kBits; first += W) {
    const VI kept = (splat_lane(word >> first) & lane) != VU{};
    const VU left = kept ? load_widened(x + first) : splat_lane(kForbidden);
    const VH narrow = __builtin_convertvector(left, VH);
    __builtin_memcpy(x + first, &narrow, sizeof(narrow));
  }
#endif
}

SAPWOOD_INLINE void forbid_one(float* x) { *x = -__builtin_inff(); }
SAPWOOD_INLINE void forbid_one(bf16* x) { x->bits = kForbidden; }

template <class T>
void mask_row(T* x, const std::uint32_t* mask, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kBits <= n; i += kBits) {
    // Inside a string a grammar allows nearly everything: most words are all ones.
    if (const std::uint32_t word = mask[i / kBits]; word != 0xffffffffu) forbid(x + i, word);
  }
  for (const std::int64_t first = i; i < n; i++) {
    if ((mask[first / kBits] >> (i - first) & 1u) == 0) forbid_one(x + i);
  }
}

template <class T>
void mask_rows(T* x, std::int64_t stride, std::int64_t columns, const std::uint32_t* masks,
               const std::int64_t* rows, std::int64_t count, const Team& team) {
  const std::int64_t words = (columns + kBits - 1) / kBits;
  const int threads = worth_threads(team.threads, count * columns, kEntriesPerThread);
  run_pieces(team, threads, count, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; i++) mask_row(x + rows[i] * stride, masks + i * words, columns);
  });
}

}  // namespace

void mask_logits(DType dtype, void* x, std::int64_t stride, std::int64_t columns,
                 const std::uint32_t* masks, const std::int64_t* rows, std::int64_t count,
                 const Team& team) {
  dtype == DType::f32 ? mask_rows(static_cast<float*>(x), stride, columns, masks, rows, count, team)
                      : mask_rows(static_cast<bf16*>(x), stride, columns, masks, rows, count, team);
}

}  // namespace sapwood::SAPWOOD_ISA
