// The gated delta rule: per head, a state S [key_dim, value_dim] forgets, is read with the newest key, and
// is corrected by what that reading got wrong.
//
// The columns of S do not know of each other. A task is one head of one request. Of a prompt, a block of
// columns stays in the first cache while tokens go by, and one pass over it writes one token and reads for
// the next; a single token works on the state where it lies. What a token's queries and keys are is
// computed once per head, for some tokens ahead.
// Source: Yang et al. 2024, arXiv:2412.06464; with a decay per channel: Kimi Team 2025, arXiv:2510.26692.
#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kInPlace = 3;  // tokens up to which a copy of the state would not pay

// log(1 + y) for y from 0 to 1, within 2 ulp: 2 artanh(y / (2 + y)).
SAPWOOD_INLINE VF log1p_of(VF y) {
  const VF z = y / (y + splat(2.0f)), square = z * z;
  VF p = splat(1.0f / 15.0f);
  p = p * square + splat(1.0f / 13.0f);
  p = p * square + splat(1.0f / 11.0f);
  p = p * square + splat(1.0f / 9.0f);
  p = p * square + splat(1.0f / 7.0f);
  p = p * square + splat(1.0f / 5.0f);
  p = p * square + splat(1.0f / 3.0f);
  p = p * square + splat(1.0f);
  return z * p * splat(2.0f);
}

// e^(-rate * log(1 + e^x))
SAPWOOD_INLINE VF decay_of(VF x, VF rate) {
  const VF away = x < VF{} ? x : -x;
  return vexp(-rate * ((x < VF{} ? VF{} : x) + log1p_of(vexp(away))));
}

// e^(lowest / (1 + e^(-rate * x)))
SAPWOOD_INLINE VF bounded_decay_of(VF x, VF rate, VF lowest) {
  return vexp(lowest / (splat(1.0f) + vexp(-rate * x)));
}

// What the state is read with, and what is written to it, for up to kDeltaTokens tokens of one head; each
// array is [tokens, key_dim].
struct Tokens {
  float* key;
  float* kept;        // the decay
  float* read_key;    // key * kept
  float* read_query;  // query * kept
  float dot[kDeltaTokens];    // query * key
  float share[kDeltaTokens];  // of the error, how much is written
};

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

// The tokens [first, first + n) of a head.
template <class T>
void prepare(const DeltaArgs& a, std::int64_t head, std::int64_t first, std::int64_t n, Tokens& to) {
  const std::int64_t dim = a.key_dim, num_keys = a.num_key_heads * dim;
  const std::int64_t key_head = head / (a.num_heads / a.num_key_heads);
  const float root = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  const VF rate = splat(a.rate[head]), lowest = splat(a.lowest);
  const auto kept_of = [&](VF x) { return a.lowest == 0.0f ? decay_of(x, rate) : bounded_decay_of(x, rate, lowest); };
  for (std::int64_t i = 0; i < n; i++) {
    const std::int64_t token = first + i;
    const T* query = static_cast<const T*>(a.qkv) + token * a.qkv_stride + key_head * dim;
    const T* key = query + num_keys;
    VF queries{}, keys{}, both{};
    for (std::int64_t d = 0; d < dim; d += W) {
      const VF q = load_some(query + d, dim - d), k = load_some(key + d, dim - d);
      queries = q * q + queries;
      keys = k * k + keys;
      both = q * k + both;
    }
    const float of_query = root / __builtin_sqrtf(sum(queries) + a.eps);
    const float of_key = 1.0f / __builtin_sqrtf(sum(keys) + a.eps);
    to.dot[i] = sum(both) * of_query * of_key;
    const T write = static_cast<const T*>(a.write)[token * a.write_stride + head];
    to.share[i] = a.write_scale / (1.0f + exp1(-to_float(write)));
    const T* decay = static_cast<const T*>(a.decay) + token * a.decay_stride + (a.per_channel ? head * dim : head);
    const float* shift = a.shift + (a.per_channel ? head * dim : head);
    const VF of_head = a.per_channel ? VF{} : kept_of(splat(to_float(*decay) + *shift));
    const std::int64_t at = i * dim;
    for (std::int64_t d = 0; d < dim; d += W) {
      const std::int64_t left = dim - d;
      const VF k = load_some(key + d, left) * splat(of_key), q = load_some(query + d, left) * splat(of_query);
      const VF kept = a.per_channel ? kept_of(load_some(decay + d, left) + load_some(shift + d, left)) : of_head;
      store_some(to.key + at + d, k, left);
      store_some(to.kept + at + d, kept, left);
      store_some(to.read_key + at + d, k * kept, left);
      store_some(to.read_query + at + d, q * kept, left);
    }
  }
}

// n tokens over V vectors of columns, `columns` of which are there; the state's rows are `stride` apart.
template <int V, class T>
void walk(float* state, std::int64_t stride, std::int64_t dim, const Tokens& tokens, std::int64_t n, const T* values,
          std::int64_t values_stride, T* out, std::int64_t out_stride, std::int64_t columns) {
  VF by_key[V] = {}, by_query[V] = {};
  for (std::int64_t d = 0; d < dim; d++) {
    const VF key = splat(tokens.read_key[d]), query = splat(tokens.read_query[d]);
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
      const VF s = load(state + d * stride + i * W);
      by_key[i] = s * key + by_key[i];
      by_query[i] = s * query + by_query[i];
    }
  }
  for (std::int64_t t = 0; t < n; t++) {
    VF wrong[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
      const std::int64_t left = columns - i * W;
      wrong[i] = splat(tokens.share[t]) * (load_some(values + t * values_stride + i * W, left) - by_key[i]);
      store_some(out + t * out_stride + i * W, wrong[i] * splat(tokens.dot[t]) + by_query[i], left);
      by_key[i] = by_query[i] = VF{};
    }
    const float* key = tokens.key + t * dim;
    const float* kept = tokens.kept + t * dim;
    if (t + 1 == n) {
      for (std::int64_t d = 0; d < dim; d++) {
        const VF k = splat(key[d]), keep = splat(kept[d]);
#pragma GCC unroll 8
        for (int i = 0; i < V; i++) {
          float* at = state + d * stride + i * W;
          store(at, load(at) * keep + k * wrong[i]);
        }
      }
      return;
    }
    const float* read_key = tokens.read_key + (t + 1) * dim;
    const float* read_query = tokens.read_query + (t + 1) * dim;
    for (std::int64_t d = 0; d < dim; d++) {
      const VF k = splat(key[d]), keep = splat(kept[d]), next_key = splat(read_key[d]), query = splat(read_query[d]);
#pragma GCC unroll 8
      for (int i = 0; i < V; i++) {
        float* at = state + d * stride + i * W;
        const VF s = load(at) * keep + k * wrong[i];
        store(at, s);
        by_key[i] = s * next_key + by_key[i];
        by_query[i] = s * query + by_query[i];
      }
    }
  }
}

// Calls body(first column, vectors, columns) for blocks of at most `most` vectors, a power of 2.
template <class Body>
SAPWOOD_INLINE void each_block(std::int64_t columns, std::int64_t most, const Body& body) {
  for (std::int64_t first = 0; first < columns;) {
    const std::int64_t vectors = (columns - first + W - 1) / W;
    std::int64_t taken = most;
    while (taken > vectors) taken /= 2;
    body(first, taken, least(columns - first, taken * W));
    first += taken * W;
  }
}

template <class T>
void walk_block(std::int64_t vectors, float* state, std::int64_t stride, std::int64_t dim, const Tokens& tokens,
                std::int64_t n, const T* values, std::int64_t values_stride, T* out, std::int64_t out_stride,
                std::int64_t columns) {
  const auto run = [&](auto walk_some) {
    walk_some(state, stride, dim, tokens, n, values, values_stride, out, out_stride, columns);
  };
  switch (vectors) {
    case 1: return run(walk<1, T>);
    case 2: return run(walk<2, T>);
    case 4: return run(walk<4, T>);
    default: return run(walk<8, T>);
  }
}

// All new tokens of one head of one request; S is the type of states.
template <class T, class S>
void scan_head(const DeltaArgs& a, std::int64_t request, std::int64_t head, float* scratch) {
  const std::int64_t begin = a.query_start[request], end = a.query_start[request + 1];
  if (begin == end) return;
  const std::int64_t dim = a.key_dim, width = a.value_dim, out_stride = a.num_heads * width;
  const bool has_past = a.context_len[request] > end - begin;
  S* state = static_cast<S*>(a.states) + a.slots[request] * a.state_stride + head * dim * width;
  Tokens tokens{};
  const std::int64_t array = kDeltaTokens * dim;
  tokens.key = scratch;
  tokens.kept = scratch + array;
  tokens.read_key = scratch + 2 * array;
  tokens.read_query = scratch + 3 * array;
  const T* values = static_cast<const T*>(a.qkv) + 2 * a.num_key_heads * dim + head * width;
  T* out = static_cast<T*>(a.out) + head * width;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (has_past && end - begin <= kInPlace && width % W == 0) {
      prepare<T>(a, head, begin, end - begin, tokens);
      each_block(width, 2 * kTileVectors, [&](std::int64_t first, std::int64_t vectors, std::int64_t columns) {
        walk_block(vectors, state + first, width, dim, tokens, end - begin, values + begin * a.qkv_stride + first,
                   a.qkv_stride, out + begin * out_stride + first, out_stride, columns);
      });
      return;
    }
  }
  // A copy in which a block's rows lie together; columns that are not there are zeros.
  float* copy = scratch + 4 * array;
  each_block(width, kTileVectors, [&](std::int64_t first, std::int64_t vectors, std::int64_t columns) {
    float* block = copy + first * dim;
    for (std::int64_t d = 0; d < dim; d++) {
      for (std::int64_t i = 0; i < vectors; i++) {
        const S* from = state + d * width + first + i * W;
        store(block + (d * vectors + i) * W, has_past ? load_some(from, columns - i * W) : VF{});
      }
    }
  });
  for (std::int64_t at = begin; at < end; at += kDeltaTokens) {
    const std::int64_t n = least(kDeltaTokens, end - at);
    prepare<T>(a, head, at, n, tokens);
    each_block(width, kTileVectors, [&](std::int64_t first, std::int64_t vectors, std::int64_t columns) {
      walk_block(vectors, copy + first * dim, vectors * W, dim, tokens, n, values + at * a.qkv_stride + first,
                 a.qkv_stride, out + at * out_stride + first, out_stride, columns);
    });
  }
  each_block(width, kTileVectors, [&](std::int64_t first, std::int64_t vectors, std::int64_t columns) {
    const float* block = copy + first * dim;
    for (std::int64_t d = 0; d < dim; d++) {
      for (std::int64_t i = 0; i < vectors; i++) {
        store_some(state + d * width + first + i * W, load(block + (d * vectors + i) * W), columns - i * W);
      }
    }
  });
}

template <class T, class S>
void scan_all(const DeltaArgs& a) {
  const std::int64_t per_thread = delta_scratch(a.key_dim, a.value_dim), tasks = a.num_requests * a.num_heads;
  std::int64_t next = 0;
  run_parallel(a.team, least(a.team.threads, tasks), [&](int thread) {
    float* scratch = a.scratch + thread * per_thread;
    for (std::int64_t task; (task = take(&next)) < tasks;) {
      scan_head<T, S>(a, task / a.num_heads, task % a.num_heads, scratch);
    }
  });
}

}  // namespace

void gated_delta_rule(DType dtype, const DeltaArgs& args) {
  const bool is_wide = args.state_dtype == DType::f32;
  if (dtype == DType::f32) {
    is_wide ? scan_all<float, float>(args) : scan_all<float, bf16>(args);
  } else {
    is_wide ? scan_all<bf16, float>(args) : scan_all<bf16, bf16>(args);
  }
}

}  // namespace sapwood::SAPWOOD_ISA
