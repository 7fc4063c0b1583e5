// Weights -> int8 rows, q8_0 blocks, or q4_1 blocks whose scale and minimum make the squared error
// small, as kernels/reference/quantized.py defines them: int8 and q8_0 bit by bit. A vector holds a
// part of a row or block, or, of q4_1, the same entry of W blocks.
#include "groups.h"
#include "integer.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kBlockBytes = 20;      // of q4_1
constexpr std::int64_t kByteBlockBytes = 34;  // of q8_0
constexpr int kCandidates = 10;
constexpr float kFirstLevels = 13.5f, kLevelsStep = 0.5f;
constexpr std::int64_t kPieceNumbers = 8192;

typedef VF Blocks[kGroup];

SAPWOOD_INLINE VF vmin(VF a, VF b) { return a < b ? a : b; }

SAPWOOD_INLINE VF round_to_levels(VF x) {
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return vmin(vmax((rounded(x) + magic) - magic, VF{}), splat(15.0f));
}

// Rounded to the nearest even fp16; what is finite and beyond its range becomes the largest.
static inline std::uint16_t to_half(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x), sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;
  if (magnitude == 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7c00);
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
  // NaN or infinity among the weights must show.
  found.minimum = sum_x - sum_x == VF{} ? found.minimum : sum_x - sum_x;
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
void to_q4_1(const T* weights, std::int64_t num_blocks, std::byte* out) {
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

template <class T>
void to_q8_0(const T* weights, std::int64_t num_blocks, std::byte* out) {
  const VF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (std::int64_t b = 0; b < num_blocks; b++, weights += kGroup, out += kByteBlockBytes) {
    alignas(64) std::uint16_t halves[W] = {to_half(magnitude(weights, kGroup) / 127.0f)};
    const float scale = load_halves(reinterpret_cast<const std::byte*>(halves))[0];
    const VF inverse = splat(scale > 0.0f ? 1.0f / scale : 0.0f);
    __builtin_memcpy(out, halves, 2);
    for (std::int64_t i = 0; i < kGroup; i += W) {
      // A tiny scale is rounded far down: its numbers may be beyond 127.
      const VF scaled = vmin(vmax(rounded(load(weights + i) * inverse), splat(-127.0f)), splat(127.0f));
      store_bytes(out + 2 + i, bits_as<VI>(scaled + magic) - bits_as<VI>(magic));
    }
  }
}

// `count` rows or blocks from the one at `first` on.
template <class T>
void quantize(const QuantizeArgs& a, std::int64_t first, std::int64_t count) {
  const T* weights = static_cast<const T*>(a.weights);
  std::byte* out = static_cast<std::byte*>(a.out);
  if (a.kind == WeightKind::q4_1) return to_q4_1(weights + first * kGroup, count, out + first * kBlockBytes);
  if (a.kind == WeightKind::q8_0) {
    return to_q8_0(weights + first * kGroup, count, out + first * kByteBlockBytes);
  }
  for (std::int64_t row = first; row < first + count; row++) {
    std::int8_t* numbers = reinterpret_cast<std::int8_t*>(out) + row * a.k;
    a.scales[row] = round_group(weights + row * a.k, a.k, numbers).scale;
  }
}

}  // namespace

void quantize(DType dtype, const QuantizeArgs& a) {
  const bool is_int8 = a.kind == WeightKind::int8;
  const std::int64_t units = is_int8 ? a.n : a.n * a.k / kGroup;
  const std::int64_t step = most(1, kPieceNumbers / most(1, is_int8 ? a.k : kGroup));
  const std::int64_t pieces = (units + step - 1) / step;
  std::int64_t next = 0;
  run_parallel(a.team, least(a.team.threads, pieces), [&](int) {
    for (std::int64_t piece; (piece = take(&next)) < pieces;) {
      const std::int64_t first = piece * step, count = least(step, units - first);
      dtype == DType::f32 ? quantize<float>(a, first, count) : quantize<bf16>(a, first, count);
    }
  });
}

}  // namespace sapwood::SAPWOOD_ISA
