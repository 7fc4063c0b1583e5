// Weights -> q4_1 blocks whose scale and minimum make the squared error small; the search is that of
// kernels/reference/quantized.py. A vector holds the same entry of W blocks.
#include "integer.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr int kBlockBytes = 20;
constexpr int kCandidates = 10;
constexpr float kFirstLevels = 13.5f, kLevelsStep = 0.5f;
constexpr std::int64_t kBlocksPerPiece = 256;

typedef VF Blocks[kGroup];

SAPWOOD_INLINE VF vmin(VF a, VF b) { return a < b ? a : b; }

SAPWOOD_INLINE VF round_to_levels(VF x) {
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return vmin(vmax((rounded(x) + magic) - magic, VF{}), splat(15.0f));
}

// Rounded to the nearest even fp16; beyond its range the largest number.
static inline std::uint16_t to_half(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x), sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477fefff) return static_cast<std::uint16_t>(sign | 0x7bff);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the bits of its multiple of 2^-24
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_as<std::uint32_t>(shifted) - 0x3f000000));
  }
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

struct Fit {
  VF scale, minimum;
};

static inline Fit fit(const Blocks& x) {
  VF low = x[0], high = x[0], sum_x{};
  for (int i = 0; i < kGroup; i++) {
    low = vmin(low, x[i]);
    high = vmax(high, x[i]);
    sum_x += x[i];
  }
  const VF middle = (low + high) * splat(0.5f), extent = high - low;
  VF best = splat(-__builtin_inff());
  Fit found{VF{}, low};
  for (int candidate = 0; candidate < kCandidates; candidate++) {
    const VF levels = splat(kFirstLevels + kLevelsStep * static_cast<float>(candidate));
    const VF inverse = extent > VF{} ? levels / extent : VF{};
    VF sum_q{}, sum_qq{}, sum_qx{};
    for (int i = 0; i < kGroup; i++) {
      const VF q = round_to_levels((x[i] - middle) * inverse + splat(7.5f));
      sum_q += q;
      sum_qq += q * q;
      sum_qx += q * x[i];
    }
    const VF spread = sum_qq * splat(kGroup) - sum_q * sum_q;
    const VF scale = (sum_qx * splat(kGroup) - sum_q * sum_x) / (spread > VF{} ? spread : splat(1.0f));
    const VF minimum = (sum_x - scale * sum_q) * splat(1.0f / kGroup);
    // The squared error is the sum of squares of x less this.
    const VF gain = scale * sum_qx + minimum * sum_x;
    const VI better = (gain > best) & (spread > VF{});
    best = better ? gain : best;
    found.scale = better ? scale : found.scale;
    found.minimum = better ? minimum : found.minimum;
  }
  return found;
}

// The first `count` of W blocks.
static inline void write_blocks(const Blocks& x, const Fit& found, std::int64_t count, std::byte* out) {
  alignas(64) std::uint16_t scales[W], minima[W];
  for (int i = 0; i < W; i++) {
    scales[i] = to_half(found.scale[i]);
    minima[i] = to_half(found.minimum[i]);
  }
  const VF scale = load_halves(reinterpret_cast<const std::byte*>(scales));
  const VF minimum = load_halves(reinterpret_cast<const std::byte*>(minima));
  const VF inverse = scale > VF{} ? splat(1.0f) / scale : VF{};
  for (std::int64_t b = 0; b < count; b++) {
    __builtin_memcpy(out + b * kBlockBytes, &scales[b], 2);
    __builtin_memcpy(out + b * kBlockBytes + 2, &minima[b], 2);
  }
  for (int i = 0; i < kGroup / 2; i++) {
    const VF low = round_to_levels((x[i] - minimum) * inverse);
    const VF high = round_to_levels((x[i + kGroup / 2] - minimum) * inverse);
    const VI both = __builtin_convertvector(low + high * splat(16.0f), VI);
    for (std::int64_t b = 0; b < count; b++) {
      out[b * kBlockBytes + 4 + i] = static_cast<std::byte>(both[b]);
    }
  }
}

template <class T>
void quantize(const T* weights, std::int64_t num_blocks, std::byte* out) {
  for (std::int64_t first = 0; first < num_blocks; first += W) {
    const std::int64_t count = least(W, num_blocks - first);
    alignas(64) float entries[kGroup][W];
    for (int b = 0; b < W; b++) {
      const T* block = weights + (first + least(b, count - 1)) * kGroup;
      for (int i = 0; i < kGroup; i++) entries[i][b] = to_float(block[i]);
    }
    Blocks x;
    for (int i = 0; i < kGroup; i++) x[i] = load(entries[i]);
    write_blocks(x, fit(x), count, out + first * kBlockBytes);
  }
}

}  // namespace

void quantize_q4_1(DType dtype, const void* weights, void* blocks, std::int64_t num_blocks,
                   const Team& team) {
  const std::int64_t pieces = (num_blocks + kBlocksPerPiece - 1) / kBlocksPerPiece;
  std::int64_t next = 0;
  run_parallel(team, least(team.threads, pieces), [&](int) {
    for (std::int64_t piece; (piece = take(&next)) < pieces;) {
      const std::int64_t first = piece * kBlocksPerPiece;
      const std::int64_t count = least(kBlocksPerPiece, num_blocks - first);
      std::byte* out = static_cast<std::byte*>(blocks) + first * kBlockBytes;
      dtype == DType::f32 ? quantize(static_cast<const float*>(weights) + first * kGroup, count, out)
                          : quantize(static_cast<const bf16*>(weights) + first * kGroup, count, out);
    }
  });
}

}  // namespace sapwood::SAPWOOD_ISA
