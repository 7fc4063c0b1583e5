// out = x w^T + bias for int8 weights with one scale per output; x is rounded to int8 with one scale
// per group of 64 inputs. (One scale per row costs ten times the accuracy: a row of a decoder's
// activations has a few entries far larger than the others.) Sums within a group are exact; groups
// are added in fp32, in order: the result does not depend on the number of rows or threads.
#include "integer.h"
#include "matrix.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// Of a group of x, after its 64 int8.
constexpr std::int64_t kScaleAt = 64, kCorrectionAt = 68;

template <class T>
static inline void round_row(const T* x, std::int64_t k, std::byte* out) {
  for (std::int64_t i = 0; i < k; i += kInt8Group, out += kInt8GroupBytesOfX) {
    const std::int64_t count = least(kInt8Group, k - i);
    std::int8_t* bytes = reinterpret_cast<std::int8_t*>(out);
    const Rounded group = round_group(x + i, count, bytes);
    for (std::int64_t j = count; j % 4 != 0; j++) bytes[j] = 0;
    const std::int32_t correction = offset_correction(group.sum);
    __builtin_memcpy(out + kScaleAt, &group.scale, 4);
    __builtin_memcpy(out + kCorrectionAt, &correction, 4);
  }
}

// results += one group of x times `lanes` lanes of the weight.
template <int R, int V>
SAPWOOD_INLINE void add_group(VF (&results)[R][V], const std::byte* x, std::int64_t row_bytes,
                              const std::byte* w, std::int64_t lanes, const Fetch& lines) {
  fetch(lines, w, lanes * kPanel * 4);
  VI sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      sums[r][v] = splat_int(static_cast<std::int32_t>(load_lane(x + r * row_bytes + kCorrectionAt)));
    }
  const std::byte* left = x;
#pragma GCC unroll 4
  for (std::int64_t lane = 0; lane < lanes; lane++, left += 4, w += kPanel * 4) {
    Right<8> right[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) right[v] = right_of<8>(load_lanes(w + v * W * 4));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Factor factor = load_factor(left + r * row_bytes);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sums[r][v] = dot_bytes(sums[r][v], right[v], factor);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const VF scale = splat(bits_as<float>(load_lane(x + r * row_bytes + kScaleAt)));
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) results[r][v] = to_floats(sums[r][v]) * scale + results[r][v];
  }
}

// R rows x V vectors of outputs, over all inputs.
template <class T, int R, int V>
static inline void tile(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes,
                        const std::byte* w, std::int64_t row, std::int64_t column, const Fetch& lines) {
  constexpr std::int64_t kLanes = kInt8Group / 4;
  const std::int64_t lanes = (a.weight->k + 3) / 4;
  VF results[R][V] = {};
  std::int64_t lane = 0;
  for (; lane + kLanes <= lanes; lane += kLanes, x += kInt8GroupBytesOfX, w += kLanes * kPanel * 4) {
    add_group<R, V>(results, x, row_bytes, w, kLanes, lines);
  }
  if (lane < lanes) add_group<R, V>(results, x, row_bytes, w, lanes - lane, lines);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) results[r][v] *= load(a.weight->scales + column + v * W);
    write_results<T, V>(a, row + r, column, results[r]);
  }
}

// R rows x a panel.
template <class T, int R>
static inline void panel_tile(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes, const std::byte* w,
                              std::int64_t row, std::int64_t column, const Fetch& lines) {
  constexpr int V = int_vectors(R);
  for (std::int64_t v = 0; v < kPanel; v += V * W) {
    tile<T, R, V>(a, x, row_bytes, w + v * 4, row, column + v, v == 0 ? lines : kNoFetch);
  }
}

template <class T>
static inline void tile_rows(const QuantizedArgs& a, const std::byte* x, std::int64_t row_bytes, const std::byte* w,
                             std::int64_t row, std::int64_t column, std::int64_t rows, const Fetch& lines) {
  switch (rows) {
#define SAPWOOD_ROWS(R) \
  case R: panel_tile<T, R>(a, x, row_bytes, w, row, column, lines); break;
    SAPWOOD_ROWS(1) SAPWOOD_ROWS(2)
#if defined(__AVX2__) || defined(SAPWOOD_NEON)
    SAPWOOD_ROWS(3) SAPWOOD_ROWS(4)
#endif
#if defined(__AVX512F__)
    SAPWOOD_ROWS(5) SAPWOOD_ROWS(6)
#endif
#undef SAPWOOD_ROWS
    default: break;
  }
}

#if defined(SAPWOOD_AMX)
// Up to kMostPassRows rows x a panel, group by group. Bit by bit what vectors compute.
template <class T>
static inline void unit_tile(MatrixUnit& unit, const QuantizedArgs& a, const std::byte* x,
                             std::int64_t row_bytes, const std::byte* w, std::int64_t row,
                             std::int64_t column, int rows, const Fetch& lines) {
  constexpr int V = kPanel / W;
  constexpr std::int64_t bytes = kInt8Group * kPanel;
  alignas(64) std::int32_t sums[kMostPassRows * kPanel];
  VF results[kMostPassRows][V];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < V; v++) results[r][v] = VF{};
  for (std::int64_t i = 0; i < a.weight->k; i += kInt8Group, x += kInt8GroupBytesOfX, w += bytes) {
    unit.multiply_bytes(x, row_bytes, w, sums, rows);
    fetch(lines, w, bytes);
    for (int r = 0; r < rows; r++) {
      const std::byte* group = x + r * row_bytes;
      const VI correction = splat_int(static_cast<std::int32_t>(load_lane(group + kCorrectionAt)));
      const VF scale = splat(bits_as<float>(load_lane(group + kScaleAt)));
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const VI sum = bits_as<VI>(load_lanes(sums + r * kPanel + v * W)) + correction;
        results[r][v] = to_floats(sum) * scale + results[r][v];
      }
    }
  }
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < V; v++) results[r][v] *= load(a.weight->scales + column + v * W);
    write_results<T, V>(a, row + r, column, results[r]);
  }
}
#endif

// A panel with the rows of one tile.
template <class T>
static inline void tile_panel(MatrixUnit& unit, const QuantizedArgs& a, const std::byte* x,
                              std::int64_t row_bytes, const std::byte* w, std::int64_t row,
                              std::int64_t column, std::int64_t rows, const Fetch& lines) {
#if defined(SAPWOOD_AMX)
  if (rows > kTileHeight) {
    unit_tile<T>(unit, a, x, row_bytes, w, row, column, static_cast<int>(rows), lines);
    return;
  }
#else
  static_cast<void>(unit);
#endif
  tile_rows<T>(a, x, row_bytes, w, row, column, rows, lines);
}

// Rows that share one pass over a panel.
static inline std::int64_t rows_per_pass(const QuantizedArgs& a) {
#if defined(SAPWOOD_AMX)
  if (a.weight->k % kInt8Group == 0) return kMostPassRows;
#else
  static_cast<void>(a);
#endif
  return kTileHeight;
}

template <class T>
void multiply(const QuantizedArgs& a) {
  const LinearWeight& weight = *a.weight;
  const std::int64_t row_bytes = rounded_row_bytes(weight.kind, weight.k);
  const std::int64_t bytes = panel_bytes(weight.kind, weight.k);
  const Cut cut = cut_work(a, rows_per_pass(a));
  const auto round = [&](std::int64_t row, std::byte* to) {
    round_row(static_cast<const T*>(a.x) + row * a.x_stride, weight.k, to);
  };
  run_quantized(a, cut, round, [&](const std::byte* x, std::int64_t panel, std::int64_t panels,
                                   std::int64_t row, std::int64_t rows) {
    MatrixUnit unit;
    const std::byte* w = static_cast<const std::byte*>(weight.data) + panel * bytes;
    each_pass(cut, panels, rows, bytes, [&](std::int64_t p, std::int64_t r, std::int64_t count, const Fetch& lines) {
      tile_panel<T>(unit, a, x + r * row_bytes, row_bytes, w + p * bytes, row + r, (panel + p) * kPanel, count, lines);
    });
  });
}

}  // namespace

void linear_int8(DType dtype, const QuantizedArgs& args) {
  dtype == DType::f32 ? multiply<float>(args) : multiply<bf16>(args);
}

}  // namespace sapwood::SAPWOOD_ISA
