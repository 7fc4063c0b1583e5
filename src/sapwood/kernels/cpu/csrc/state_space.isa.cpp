// State space layers: states that decay, are fed keys times values, and are read by queries, token by token.
// A few rows of a state stay in registers over many tokens, so that a prompt reads and writes a state as often
// as it has pieces of kTokens tokens. However a text is cut, each number is computed in the same way.
// Source: Gu and Dao 2023, arXiv:2312.00752; Dao and Gu 2024, arXiv:2405.21060.
#include <type_traits>

#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 65536;  // of states; below this a thread costs more than it saves
constexpr std::int64_t kTokens = 32;                // of a piece: its inputs stay in the first cache
#if defined(__AVX512F__) || defined(SAPWOOD_NEON)
constexpr int kMostVectors = 4;  // of a row; with these and kRows, states and sums fit into registers
#else
constexpr int kMostVectors = 2;
#endif
constexpr int kRows = 4;
enum : std::size_t { X, B, C, DT, GATE };  // of ScanArgs::inputs

// log(1 + e^x), within 1e-6 of it
SAPWOOD_INLINE VF softplus(VF x) {
  const VF u = vexp(x < VF{} ? x : -x);  // at most 1
  const VF z = u / (splat(2.0f) + u), square = z * z;
  VF series = splat(1.0f / 13);
  for (int divisor = 11; divisor > 0; divisor -= 2) {
    series = series * square + splat(1.0f / static_cast<float>(divisor));
  }
  return vmax(x, VF{}) + splat(2.0f) * z * series;
}

// The first n of W entries; the others are 0.
template <class T>
SAPWOOD_INLINE VF load_some(const T* from, std::int64_t n) {
  if (n >= W) return load(from);
  T some[W] = {};
  for (std::int64_t i = 0; i < n; i++) some[i] = from[i];
  return load(some);
}

template <class T>
SAPWOOD_INLINE void store_some(T* to, VF numbers, std::int64_t n) {
  if (n >= W) return store(to, numbers);
  T some[W];
  store(some, numbers);
  for (std::int64_t i = 0; i < n; i++) to[i] = some[i];
}

template <int V>
struct Piece {
  static constexpr int kLanes = V * W;
  alignas(64) float keys[kTokens * kMaxStateSize];     // [tokens, N]
  alignas(64) float queries[kTokens * kMaxStateSize];  // [tokens, N]
  alignas(64) float fed[kTokens * kLanes];             // inputs times time steps
  alignas(64) float sums[kTokens * kLanes];            // outputs
  alignas(64) float steps[kTokens * kLanes];           // of each channel, or of each token
  alignas(64) float decay[kTokens];
  alignas(64) float state[kMaxStateSize * kLanes];  // unless it can be changed where it is
};

// Rows [row, row + R) of a state over a piece's tokens. rates: of these rows, or null.
template <int R, int V>
SAPWOOD_INLINE void advance(Piece<V>& p, float* state, std::int64_t stride, std::int64_t row, std::int64_t size,
                            std::int64_t tokens, const float* rates, std::int64_t rates_stride, std::int64_t n) {
  VF s[R][V], rate[R][V] = {};
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) {
      s[r][v] = load(state + (row + r) * stride + v * W);
      if (rates != nullptr) rate[r][v] = load_some(rates + r * rates_stride + v * W, n - v * W);
    }
  }
  for (std::int64_t t = 0; t < tokens; t++) {
    const float* fed = p.fed + t * p.kLanes;
    float* sums = p.sums + t * p.kLanes;
    VF sum[V];
    for (int v = 0; v < V; v++) sum[v] = load(sums + v * W);
    for (int r = 0; r < R; r++) {
      const VF key = splat(p.keys[t * size + row + r]), query = splat(p.queries[t * size + row + r]);
      for (int v = 0; v < V; v++) {
        const VF decay =
            rates == nullptr ? splat(p.decay[t]) : vexp(rate[r][v] * load(p.steps + t * p.kLanes + v * W));
        s[r][v] = s[r][v] * decay + key * load(fed + v * W);
        sum[v] = sum[v] + query * s[r][v];
      }
    }
    for (int v = 0; v < V; v++) store(sums + v * W, sum[v]);
  }
  for (int r = 0; r < R; r++) {
    for (int v = 0; v < V; v++) store(state + (row + r) * stride + v * W, s[r][v]);
  }
}

template <class T>
SAPWOOD_INLINE void widen_row(const T* from, float* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; i++) to[i] = to_float(from[i]);
}

// Time steps and decays of `tokens` tokens from `token` on, for the channels [first, first + n) of a head.
template <class T, int V>
void find_steps(const ScanArgs& a, Piece<V>& p, std::int64_t head, std::int64_t first, std::int64_t n,
                std::int64_t token, std::int64_t tokens) {
  const T* dt = static_cast<const T*>(a.inputs[DT]) + token * a.strides[DT];
  const auto step_of = [&](VF raw) {
    const VF step = vmax(softplus(raw), splat(a.layer.dt_least));
    return step > splat(a.layer.dt_most) ? splat(a.layer.dt_most) : step;
  };
  if (a.layer.own_rates) {
    const std::int64_t channel = head * a.layer.head_dim + first;
    for (std::int64_t t = 0; t < tokens; t++) {
      for (int v = 0; v < V; v++) {
        const std::int64_t left = n - v * W;
        const VF raw = load_some(dt + t * a.strides[DT] + channel + v * W, left);
        store(p.steps + t * p.kLanes + v * W, step_of(raw + load_some(a.layer.dt_bias + channel + v * W, left)));
      }
    }
    return;
  }
  float raw[kTokens] = {};
  for (std::int64_t t = 0; t < tokens; t++) raw[t] = to_float(dt[t * a.strides[DT] + head]) + a.layer.dt_bias[head];
  for (std::int64_t t = 0; t < tokens; t += W) {
    const VF step = step_of(load(raw + t));
    store(p.steps + t, step);
    store(p.decay + t, vexp(step * splat(a.layer.rates[head])));
  }
}

// Channels [first, first + n) of a head, over all new tokens of a request; n <= V * W.
template <class T, class S, int V>
void scan_channels(const ScanArgs& a, Piece<V>& p, std::int64_t request, std::int64_t head, std::int64_t first,
                   std::int64_t n) {
  const std::int64_t begin = a.query_start[request], end = a.query_start[request + 1], size = a.layer.state_size;
  const bool has_past = a.context_len[request] > end - begin;
  S* kept = static_cast<S*>(a.states) + a.slots[request] * a.state_stride + head * size * a.layer.head_dim + first;
  float* state = p.state;
  std::int64_t stride = p.kLanes;
  bool in_place = false;
  if constexpr (std::is_same_v<S, float>) {
    in_place = n == p.kLanes;
    if (in_place) {
      state = kept;
      stride = a.layer.head_dim;
    }
  }
  for (std::int64_t row = 0; row < size && !(in_place && has_past); row++) {
    for (int v = 0; v < V; v++) {
      store(state + row * stride + v * W, has_past ? load_some(kept + row * a.layer.head_dim + v * W, n - v * W) : VF{});
    }
  }
  const std::int64_t group = head / (a.layer.heads / a.layer.groups) * size, channel = head * a.layer.head_dim + first;
  for (std::int64_t token = begin; token < end; token += kTokens) {
    const std::int64_t tokens = least(kTokens, end - token);
    if (a.inputs[DT] != nullptr) find_steps<T>(a, p, head, first, n, token, tokens);
    for (std::int64_t t = 0; t < tokens; t++) {
      widen_row(static_cast<const T*>(a.inputs[B]) + (token + t) * a.strides[B] + group, p.keys + t * size, size);
      widen_row(static_cast<const T*>(a.inputs[C]) + (token + t) * a.strides[C] + group, p.queries + t * size, size);
      if (a.inputs[DT] == nullptr) p.decay[t] = exp1(a.layer.rates[head]);
      for (int v = 0; v < V; v++) {
        const std::int64_t at = t * p.kLanes + v * W, left = n - v * W;
        const VF x = load_some(static_cast<const T*>(a.inputs[X]) + (token + t) * a.strides[X] + channel + v * W, left);
        VF skip{};
        if (a.layer.skip != nullptr) skip = a.layer.own_rates ? load_some(a.layer.skip + channel + v * W, left) : splat(a.layer.skip[head]);
        store(p.sums + at, skip * x);
        if (a.inputs[DT] == nullptr) {
          store(p.fed + at, x);
        } else {
          store(p.fed + at, x * (a.layer.own_rates ? load(p.steps + at) : splat(p.steps[t])));
        }
      }
    }
    std::int64_t row = 0;
    if (a.layer.own_rates) {
      for (; row < size; row++) {
        const float* rates = a.layer.rates + (head * size + row) * a.layer.head_dim + first;
        advance<1>(p, state, stride, row, size, tokens, rates, a.layer.head_dim, n);
      }
    } else {
      for (; row + kRows <= size; row += kRows) advance<kRows>(p, state, stride, row, size, tokens, nullptr, 0, n);
      for (; row < size; row++) advance<1>(p, state, stride, row, size, tokens, nullptr, 0, n);
    }
    for (std::int64_t t = 0; t < tokens; t++) {
      T* out = static_cast<T*>(a.out) + (token + t) * a.layer.heads * a.layer.head_dim + channel;
      const T* gates = a.inputs[GATE] == nullptr ? nullptr : static_cast<const T*>(a.inputs[GATE]) + (token + t) * a.strides[GATE] + channel;
      for (int v = 0; v < V && v * W < n; v++) {
        VF sum = load(p.sums + t * p.kLanes + v * W);
        if (gates != nullptr) {
          const VF gate = load_some(gates + v * W, n - v * W);
          sum = sum * (gate / (splat(1.0f) + vexp(-gate)));
        }
        store_some(out + v * W, sum, n - v * W);
      }
    }
  }
  for (std::int64_t row = 0; row < size && !in_place; row++) {
    for (int v = 0; v < V; v++) {
      store_some(kept + row * a.layer.head_dim + v * W, load(state + row * stride + v * W), n - v * W);
    }
  }
}

template <class T, class S, int V>
void scan_all(const ScanArgs& a) {
  const std::int64_t blocks = (a.layer.head_dim + V * W - 1) / (V * W);
  const std::int64_t elements = a.query_start[a.num_requests] * a.layer.heads * a.layer.head_dim * a.layer.state_size;
  const int threads = worth_threads(a.team.threads, elements, kElementsPerThread);
  // Requests may be of very different lengths: each piece of work has some heads of all of them.
  run_pieces(a.team, threads, a.layer.heads * blocks * a.num_requests, [&](std::int64_t begin, std::int64_t end) {
    Piece<V> piece;
    for (std::int64_t task = begin; task < end; task++) {
      const std::int64_t block = task / a.num_requests, first = block % blocks * V * W;
      scan_channels<T, S, V>(a, piece, task % a.num_requests, block / blocks, first,
                             least(V * W, a.layer.head_dim - first));
    }
  });
}

template <class T, class S>
void scan_heads(const ScanArgs& a) {
  if (kMostVectors > 2 && a.layer.head_dim > 2 * W) {
    scan_all<T, S, kMostVectors>(a);
  } else if (a.layer.head_dim > W) {
    scan_all<T, S, 2>(a);
  } else {
    scan_all<T, S, 1>(a);
  }
}

}  // namespace

void scan(DType dtype, const ScanArgs& args) {
  if (dtype == DType::f32) {
    args.state_dtype == DType::f32 ? scan_heads<float, float>(args) : scan_heads<float, bf16>(args);
  } else {
    args.state_dtype == DType::f32 ? scan_heads<bf16, float>(args) : scan_heads<bf16, bf16>(args);
  }
}

}  // namespace sapwood::SAPWOOD_ISA
