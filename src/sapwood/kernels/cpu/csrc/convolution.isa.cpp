// The short convolution over the tokens of requests, alone and between two gates.
// Source: Gu and Dao 2023, arXiv:2312.00752.
#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 16384;  // below this a thread costs more than it saves

// The first n of W entries; the others are 0.
template <class T>
SAPWOOD_INLINE VF load_some(const T* from, std::int64_t n) {
  if (n == W) return load(from);
  T some[W] = {};
  for (std::int64_t i = 0; i < n; i++) some[i] = from[i];
  return load(some);
}

template <class T>
SAPWOOD_INLINE void store_some(T* to, VF numbers, std::int64_t n) {
  if (n == W) return store(to, numbers);
  T some[W];
  store(some, numbers);
  for (std::int64_t i = 0; i < n; i++) to[i] = some[i];
}

// As if it had been stored and loaded.
SAPWOOD_INLINE VF rounded(VF x, const float*) { return x; }
SAPWOOD_INLINE VF rounded(VF x, const bf16*) {
  bf16 stored[W];
  store(stored, x);
  return load(stored);
}

// Column `column` of n rows, `length` entries each.
template <class T>
SAPWOOD_INLINE VF column_of(const T* rows, std::int64_t length, std::int64_t column, std::int64_t n) {
  float lane[W] = {};
  for (std::int64_t i = 0; i < n; i++) lane[i] = to_float(rows[i * length + column]);
  return load(lane);
}

// All columns of n rows.
template <class T>
SAPWOOD_INLINE void read_columns(const T* rows, std::int64_t length, std::int64_t n, VF* to) {
  for (std::int64_t i = 0; i < length; i++) to[i] = column_of(rows, length, i, n);
}

// Channels [first, first + n) of all tokens, n <= W. kLength: the length, if it is known here, or 0.
template <class T, int kLength>
void convolve(const ConvArgs& a, std::int64_t first, std::int64_t n) {
  const std::int64_t length = kLength == 0 ? a.length : kLength, num_past = length - 1;
  VF weight[kLength == 0 ? kMaxConvLength : kLength], inputs[kLength == 0 ? kMaxConvLength : kLength];
  const T* weights = static_cast<const T*>(a.weight) + first * length;
  read_columns(weights, length, n, weight);
  const VF bias = a.bias == nullptr ? VF{} : load_some(static_cast<const T*>(a.bias) + first, n);
  const T* x = static_cast<const T*>(a.x) + first;
  T* out = static_cast<T*>(a.out) + first;
  for (std::int64_t request = 0; request < a.num_requests; request++) {
    const std::int64_t begin = a.query_start[request], end = a.query_start[request + 1];
    T* state = static_cast<T*>(a.states) + a.slots[request] * a.state_stride + first * num_past;
    const bool has_past = a.context_len[request] > end - begin;
    for (std::int64_t i = 0; i < num_past; i++) inputs[i] = has_past ? column_of(state, num_past, i, n) : VF{};
    for (std::int64_t token = begin; token < end; token++) {
      if (a.weight_stride != 0) read_columns(weights + token * a.weight_stride, length, n, weight);
      const T* row = x + token * a.x_stride;
      VF newest = load_some(row, n);
      // Each step is rounded, as the single ops do.
      if (a.gated) newest = rounded(newest * load_some(row + 2 * a.channels, n), x);
      inputs[num_past] = newest;
      VF total = weight[0] * inputs[0];
      for (std::int64_t i = 1; i < length; i++) total = total + weight[i] * inputs[i];
      if (a.bias != nullptr) total = total + bias;
      if (a.silu) total = total / (splat(1.0f) + vexp(-total));
      if (a.gated) total = rounded(total, x) * load_some(row + a.channels, n);
      store_some(out + token * a.channels, total, n);
      for (std::int64_t i = 0; i < num_past; i++) inputs[i] = inputs[i + 1];
    }
    for (std::int64_t i = 0; i < num_past; i++) {
      T newest[W];
      store(newest, inputs[i]);
      for (std::int64_t channel = 0; channel < n; channel++) state[channel * num_past + i] = newest[channel];
    }
  }
}

template <class T>
void convolve_all(const ConvArgs& a) {
  const std::int64_t pieces = (a.channels + W - 1) / W;
  const std::int64_t num_tokens = a.query_start[a.num_requests];
  const int threads = worth_threads(a.team.threads, num_tokens * a.channels, kElementsPerThread);
  run_pieces(a.team, threads, pieces, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t piece = begin; piece < end; piece++) {
      const std::int64_t first = piece * W, n = least(W, a.channels - first);
      switch (a.length) {
        case 3: convolve<T, 3>(a, first, n); break;
        case 4: convolve<T, 4>(a, first, n); break;
        default: convolve<T, 0>(a, first, n);
      }
    }
  });
}

}  // namespace

void causal_conv(DType dtype, const ConvArgs& args) {
  if (dtype == DType::f32) {
    convolve_all<float>(args);
  } else {
    convolve_all<bf16>(args);
  }
}

}  // namespace sapwood::SAPWOOD_ISA
