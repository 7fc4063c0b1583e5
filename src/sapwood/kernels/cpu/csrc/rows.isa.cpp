// Ops over rows: norms, argmax, and the q/k norm + rotary embedding + KV write.
#include "kv8.h"
#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 16384;  // below this a thread costs more than it saves

template <class T>
float inverse_rms(const T* x, std::int64_t n, float eps) {
  VF squares0{}, squares1{};
  std::int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const VF a = load(x + i), b = load(x + i + W);
    squares0 = a * a + squares0;
    squares1 = b * b + squares1;
  }
  float total = sum(squares0 + squares1);
  for (; i < n; i++) total += to_float(x[i]) * to_float(x[i]);
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
}

template <class T, class U, class V>
void scale_row(const T* x, const U* weight, V* out, std::int64_t n, float factor) {
  std::int64_t i = 0;
  const VF f = splat(factor);
  for (; i + W <= n; i += W) store(out + i, load(x + i) * f * load(weight + i));
  for (; i < n; i++) put(out + i, to_float(x[i]) * factor * to_float(weight[i]));
}

template <class T>
void add_row(const T* x, T* residual, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(residual + i, load(x + i) + load(residual + i));
  for (; i < n; i++) put(residual + i, to_float(x[i]) + to_float(residual[i]));
}

template <class T>
void rms_norm_rows(const T* x, T* residual, const T* weight, T* out, std::int64_t rows,
                   std::int64_t hidden, float eps, const Team& team) {
  const int threads = worth_threads(team.threads, rows * hidden, kElementsPerThread);
  run_pieces(team, threads, rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; row++) {
      const T* from = x + row * hidden;
      if (residual != nullptr) {
        add_row(from, residual + row * hidden, hidden);
        from = residual + row * hidden;
      }
      scale_row(from, weight, out + row * hidden, hidden, inverse_rms(from, hidden, eps));
    }
  });
}

// The gate's factor of each column.
SAPWOOD_INLINE VF gate_of(VF gate, bool logistic) {
  return (logistic ? splat(1.0f) : gate) / (splat(1.0f) + vexp(-gate));
}

// n columns of one row, n <= W: of a gate, or of x times that.
template <class T>
SAPWOOD_INLINE VF load_columns(const T* from, std::int64_t n) {
  if (n >= W) return load(from);
  T some[W] = {};
  for (std::int64_t i = 0; i < n; i++) some[i] = from[i];
  return load(some);
}

template <class T>
void gated_norm_group(const T* x, const T* gate, const T* weight, T* out, const GatedNormArgs& a) {
  const std::int64_t n = a.group;
  VF squares{};
  for (std::int64_t i = 0; i < n; i += W) {
    VF y = load_columns(x + i, n - i);
    if (!a.norm_first) y = y * gate_of(load_columns(gate + i, n - i), a.logistic);
    squares = y * y + squares;
  }
  const VF factor = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + a.eps));
  for (std::int64_t i = 0; i < n; i += W) {
    const std::int64_t left = n - i;
    const VF gated = load_columns(x + i, left) * gate_of(load_columns(gate + i, left), a.logistic);
    const VF y = gated * factor * load_columns(weight + i, left);
    if (left >= W) {
      store(out + i, y);
    } else {
      for (std::int64_t j = 0; j < left; j++) put(out + i + j, y[j]);
    }
  }
}

template <class T>
void multiply_rows(T* x, const T* gate, std::int64_t gate_stride, std::int64_t rows, std::int64_t width,
                   const Team& team) {
  const int threads = worth_threads(team.threads, rows * width, kElementsPerThread);
  run_pieces(team, threads, rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; row++) {
      T* to = x + row * width;
      const T* factors = gate + row * gate_stride;
      std::int64_t i = 0;
      for (; i + W <= width; i += W) store(to + i, load(to + i) * gate_of(load(factors + i), true));
      for (; i < width; i++) put(to + i, to_float(to[i]) * gate_of(splat(to_float(factors[i])), true)[0]);
    }
  });
}

template <class T>
void gated_norm_rows(const GatedNormArgs& a) {
  const std::int64_t groups = a.width / a.group;
  const int threads = worth_threads(a.team.threads, a.rows * a.width, kElementsPerThread);
  run_pieces(a.team, threads, a.rows * groups, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; task++) {
      const std::int64_t row = task / groups, first = task % groups * a.group, at = row * a.width + first;
      gated_norm_group(static_cast<const T*>(a.x) + at, static_cast<const T*>(a.gate) + row * a.gate_stride + first,
                       static_cast<const T*>(a.weight) + first, static_cast<T*>(a.out) + at, a);
    }
  });
}

template <class T>
float sum_of(const T* x, std::int64_t n) {
  VF sums{};
  std::int64_t i = 0;
  for (; i + W <= n; i += W) sums = load(x + i) + sums;
  float total = sum(sums);
  for (; i < n; i++) total += to_float(x[i]);
  return total;
}

// Of (x - mean)^2.
template <class T>
float sum_of_squares(const T* x, std::int64_t n, float mean) {
  VF squares{};
  std::int64_t i = 0;
  for (; i + W <= n; i += W) {
    const VF away = load(x + i) - splat(mean);
    squares = away * away + squares;
  }
  float total = sum(squares);
  for (; i < n; i++) total += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  return total;
}

template <class T>
void layer_norm_row(const T* x, const T* weight, const T* bias, T* out, std::int64_t n, float eps) {
  const float mean = sum_of(x, n) / static_cast<float>(n);
  const float factor = 1.0f / __builtin_sqrtf(sum_of_squares(x, n, mean) / static_cast<float>(n) + eps);
  std::int64_t i = 0;
  for (; i + W <= n; i += W) {
    VF y = (load(x + i) - splat(mean)) * splat(factor);
    if (weight != nullptr) y = y * load(weight + i);
    if (bias != nullptr) y = y + load(bias + i);
    store(out + i, y);
  }
  for (; i < n; i++) {
    float y = (to_float(x[i]) - mean) * factor;
    if (weight != nullptr) y *= to_float(weight[i]);
    if (bias != nullptr) y += to_float(bias[i]);
    put(out + i, y);
  }
}

template <class T>
void layer_norm_rows(const T* x, const T* weight, const T* bias, T* out, std::int64_t rows, std::int64_t hidden,
                     float eps, const Team& team) {
  const int threads = worth_threads(team.threads, rows * hidden, kElementsPerThread);
  run_pieces(team, threads, rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; row++) {
      layer_norm_row(x + row * hidden, weight, bias, out + row * hidden, hidden, eps);
    }
  });
}

// The first of the largest; NaN is never it, unless all are NaN: then 0.
template <class T>
std::int64_t argmax_row(const T* x, std::int64_t n) {
  constexpr std::int64_t block = 4 * W;
  VF tops[4] = {splat(-__builtin_inff()), splat(-__builtin_inff()), splat(-__builtin_inff()),
                splat(-__builtin_inff())};
  std::int64_t i = 0;
  for (; i + block <= n; i += block) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      const VF y = load(x + i + v * W);
      tops[v] = y > tops[v] ? y : tops[v];
    }
  }
  float top = maximum(vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3])));
  for (; i < n; i++) top = to_float(x[i]) > top ? to_float(x[i]) : top;
  for (i = 0; i + W <= n; i += W) {
    if (any(load(x + i) == splat(top))) break;
  }
  for (; i < n; i++) {
    if (to_float(x[i]) == top) return i;
  }
  return 0;
}

// Entries that are -inf weigh nothing, but all the same in a row that has no others.
template <class T>
void weigh_row(const T* x, std::int64_t n, float inverse_temperature, float* weights, float* block_sum,
               float* block_top) {
  const float top = to_float(x[argmax_row(x, n)]);
  const VF scale = splat(inverse_temperature * 1.44269504f), shift = splat(top);
  for (std::int64_t block = 0; block * kSamplingBlock < n; block++) {
    const std::int64_t begin = block * kSamplingBlock, end = begin + kSamplingBlock;
    VF sums{}, tops{};
    std::int64_t i = begin;
    for (; i < end && i + W <= n; i += W) {
      const VF y = load(x + i);
      // The top itself may be infinite.
      const VF weight = y == shift ? splat(1.0f) : vexp2((y - shift) * scale);
      store(weights + i, weight);
      sums = sums + weight;
      tops = vmax(tops, weight);
    }
    float rest = 0.0f, rest_top = 0.0f;
    for (; i < end; i++) {
      weights[i] = 0.0f;
      if (i >= n) continue;
      const float y = to_float(x[i]);
      weights[i] = y == top ? 1.0f : exp2_1((y - top) * scale[0]);
      rest += weights[i];
      rest_top = weights[i] > rest_top ? weights[i] : rest_top;
    }
    const float most_weight = maximum(tops);
    block_sum[block] = sum(sums) + rest;
    block_top[block] = most_weight > rest_top ? most_weight : rest_top;
  }
}

template <class T>
void argmax_rows(const T* x, std::int64_t rows, std::int64_t columns, std::int64_t* out,
                 const Team& team) {
  const int threads = worth_threads(team.threads, rows * columns, 4 * kElementsPerThread);
  run_pieces(team, threads, rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; row++) out[row] = argmax_row(x + row * columns, columns);
  });
}

template <class From, class To>
void copy_row(const From* x, To* out, int n) {
  for (int i = 0; i < n; i += W) store(out + i, load(x + i));
}

// One head in fp32: load, norm (if any), rotate. head_dim is a multiple of W.
template <class T>
void rotate_head(const T* x, const T* norm, float eps, const float* cos_sin, int rotary_dim,
                 int head_dim, float* head) {
  const float factor = norm != nullptr ? inverse_rms(x, head_dim, eps) : 1.0f;
  for (int i = 0; i < head_dim; i += W) {
    VF v = load(x + i);
    if (norm != nullptr) v = v * splat(factor) * load(norm + i);
    store(head + i, v);
  }
  const int half = rotary_dim / 2;
  const float* cosine = cos_sin;
  const float* sine = cos_sin + half;
  int i = 0;
  for (; i + W <= half; i += W) {
    const VF a = load(head + i), b = load(head + half + i);
    const VF c = load(cosine + i), s = load(sine + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cosine[i] - b * sine[i];
    head[half + i] = b * cosine[i] + a * sine[i];
  }
}

// One head as rotate_head, but neighbouring entries are a pair.
template <class T>
void rotate_pairs(const T* x, const T* norm, float eps, const float* rotations, int head_dim, T* out) {
  const float factor = norm != nullptr ? inverse_rms(x, head_dim, eps) : 1.0f;
  alignas(64) float head[kMaxHeadDim];
  for (int i = 0; i < head_dim; i++) head[i] = to_float(x[i]) * factor;
  if (norm != nullptr) {
    // Rounded in between, as a norm that is an op of its own rounds.
    for (int i = 0; i < head_dim; i++) put(out + i, head[i] * to_float(norm[i]));
    for (int i = 0; i < head_dim; i++) head[i] = to_float(out[i]);
  }
  if (rotations == nullptr) {
    for (int i = 0; i < head_dim; i++) put(out + i, head[i]);
    return;
  }
  alignas(64) float turned[kMaxHeadDim];
  for (int i = 0; i < head_dim; i += 2) {
    const float a = head[i], b = head[i + 1], cosine = rotations[i], sine = rotations[i + 1];
    turned[i] = a * cosine - b * sine;
    turned[i + 1] = a * sine + b * cosine;
  }
  int i = 0;
  for (; i + W <= head_dim; i += W) store(out + i, load(turned + i));
  for (; i < head_dim; i++) put(out + i, turned[i]);
}

template <class T>
void rotate_rows(const RotateArgs& a) {
  const std::int64_t width = static_cast<std::int64_t>(a.num_heads) * a.head_dim;
  const int threads = worth_threads(a.team.threads, a.rows * width, kElementsPerThread);
  run_pieces(a.team, threads, a.rows, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; row++) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      T* out = static_cast<T*>(a.out) + row * width;
      const float* rotations = a.rotations == nullptr ? nullptr : a.rotations + row * a.head_dim;
      for (int head = 0; head < a.num_heads; head++, x += a.head_dim, out += a.head_dim) {
        rotate_pairs(x, static_cast<const T*>(a.norm), a.eps, rotations, a.head_dim, out);
      }
    }
  });
}

// One layer's keys or values of one token, head by head.
class TokenWriter {
 public:
  // args: RopeArgs or LatentRopeArgs; d: entries of a head
  template <class Args>
  TokenWriter(const Args& a, int d, void* cache, std::int64_t stride, std::int64_t write_index)
      : format_(a.kv), d_(d), page_size_(a.page_size), offset_(write_index % a.page_size),
        page_(write_index / a.page_size * stride), cache_(cache) {}

  // x [D] fp32
  template <class T>
  void write(int head, const float* x) const {
    if (format_ == KvFormat::dense) {
      copy_row(x, dense<T>(head), d_);
    } else {
      std::uint8_t* tile = static_cast<std::uint8_t*>(cache_) + tile_of(head);
      quantize_head(format_, x, d_, tile + offset_ * d_, tile + page_size_ * d_ + offset_ * kScaleBytes);
    }
  }

  // x [D] as it came
  template <class T>
  void write(int head, const T* x, float* wide) const {
    if (format_ == KvFormat::dense) {
      __builtin_memcpy(dense<T>(head), x, static_cast<std::size_t>(d_) * sizeof(T));
    } else {
      copy_row(x, wide, d_);
      write<T>(head, wide);
    }
  }

 private:
  std::int64_t tile_of(int head) const { return page_ + head * page_size_ * kv_width(format_, d_); }
  template <class T>
  T* dense(int head) const {
    return static_cast<T*>(cache_) + tile_of(head) + offset_ * d_;
  }

  const KvFormat format_;
  const int d_;
  const std::int64_t page_size_, offset_, page_;
  void* cache_;
};

template <class T>
void rope_token(const RopeArgs& a, std::int64_t token) {
  const int d = a.head_dim;
  const T* x = static_cast<const T*>(a.qkv) + token * (a.num_heads + 2 * a.num_kv_heads) * d;
  const float* cos_sin = a.cos_sin + a.positions[token] * a.rotary_dim;
  T* q = static_cast<T*>(a.q_out) + token * a.num_heads * d;
  alignas(64) float wide[kMaxHeadDim];
  for (int head = 0; head < a.num_heads; head++, x += d, q += d) {
    rotate_head(x, static_cast<const T*>(a.q_norm), a.eps, cos_sin, a.rotary_dim, d, wide);
    copy_row(wide, q, d);
  }
  const TokenWriter keys(a, d, a.keys, a.key_stride, a.write_index[token]);
  for (int head = 0; head < a.num_kv_heads; head++, x += d) {
    rotate_head(x, static_cast<const T*>(a.k_norm), a.eps, cos_sin, a.rotary_dim, d, wide);
    keys.write<T>(head, wide);
  }
  const TokenWriter values(a, d, a.values, a.value_stride, a.write_index[token]);
  for (int head = 0; head < a.num_kv_heads; head++, x += d) {
    values.write(head, x, wide);
  }
}

template <class T>
void rope(const RopeArgs& a) {
  const std::int64_t width = static_cast<std::int64_t>(a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
  const int threads = worth_threads(a.team.threads, a.num_tokens * width, kElementsPerThread);
  run_pieces(a.team, threads, a.num_tokens, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; token++) rope_token<T>(a, token);
  });
}

template <class T>
void rope_latent_token(const LatentRopeArgs& a, std::int64_t token) {
  const float* cos_sin = a.cos_sin + a.positions[token] * a.rotary_dim;
  const int rope_dim = a.row - a.rank;
  alignas(64) float wide[kMaxHeadDim];
  T* q = static_cast<T*>(a.q) + token * a.num_heads * a.key_dim + a.key_dim - rope_dim;
  for (int head = 0; head < a.num_heads; head++, q += a.key_dim) {
    rotate_head(q, static_cast<const T*>(nullptr), 0.0f, cos_sin, a.rotary_dim, rope_dim, wide);
    copy_row(wide, q, rope_dim);
  }
  const T* latent = static_cast<const T*>(a.latent) + token * a.latent_stride;
  scale_row(latent, static_cast<const T*>(a.norm), wide, a.rank, inverse_rms(latent, a.rank, a.eps));
  rotate_head(latent + a.rank, static_cast<const T*>(nullptr), 0.0f, cos_sin, a.rotary_dim, rope_dim, wide + a.rank);
  TokenWriter(a, a.row, a.cache, a.page_stride, a.write_index[token]).write<T>(0, wide);
}

template <class T>
void rope_latent(const LatentRopeArgs& a) {
  const std::int64_t width = static_cast<std::int64_t>(a.num_heads) * (a.row - a.rank) + a.row;
  const int threads = worth_threads(a.team.threads, a.num_tokens * width, kElementsPerThread);
  run_pieces(a.team, threads, a.num_tokens, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; token++) rope_latent_token<T>(a, token);
  });
}

template <class T>
void widen_numbers(const T* from, float* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  T rest[W] = {};
  __builtin_memcpy(rest, from + i, static_cast<std::size_t>(n - i) * sizeof(T));
  float wide[W];
  store(wide, load(rest));
  __builtin_memcpy(to + i, wide, static_cast<std::size_t>(n - i) * sizeof(float));
}

}  // namespace

void widen(WeightKind kind, const void* from, float* to, std::int64_t n) {
  switch (kind) {
    case WeightKind::bf16: widen_numbers(static_cast<const bf16*>(from), to, n); break;
    case WeightKind::f16: widen_numbers(static_cast<const f16*>(from), to, n); break;
    default: __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(float));
  }
}

void add_scaled(const float* x, float factor, float* sum, std::int64_t n) {
  const VF by = splat(factor);
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(sum + i, load(x + i) * by + load(sum + i));
  for (; i < n; i++) sum[i] = (splat(x[i]) * by + splat(sum[i]))[0];
}

void narrow(const float* from, void* to, std::int64_t n) {
  bf16* out = static_cast<bf16*>(to);
  std::int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(from + i));
  for (; i < n; i++) put(out + i, from[i]);
}

void rms_norm(DType dtype, const void* x, void* residual, const void* weight, void* out,
              std::int64_t rows, std::int64_t hidden, float eps, const Team& team) {
  if (dtype == DType::f32) {
    rms_norm_rows(static_cast<const float*>(x), static_cast<float*>(residual),
                  static_cast<const float*>(weight), static_cast<float*>(out), rows, hidden, eps,
                  team);
  } else {
    rms_norm_rows(static_cast<const bf16*>(x), static_cast<bf16*>(residual),
                  static_cast<const bf16*>(weight), static_cast<bf16*>(out), rows, hidden, eps,
                  team);
  }
}

void multiply_logistic(DType dtype, void* x, const void* gate, std::int64_t gate_stride, std::int64_t rows,
                       std::int64_t width, const Team& team) {
  dtype == DType::f32 ? multiply_rows(static_cast<float*>(x), static_cast<const float*>(gate), gate_stride, rows, width,
                                      team)
                      : multiply_rows(static_cast<bf16*>(x), static_cast<const bf16*>(gate), gate_stride, rows, width,
                                      team);
}

void gated_rms_norm(DType dtype, const GatedNormArgs& args) {
  dtype == DType::f32 ? gated_norm_rows<float>(args) : gated_norm_rows<bf16>(args);
}

void layer_norm(DType dtype, const void* x, const void* weight, const void* bias, void* out, std::int64_t rows,
                std::int64_t hidden, float eps, const Team& team) {
  if (dtype == DType::f32) {
    layer_norm_rows(static_cast<const float*>(x), static_cast<const float*>(weight), static_cast<const float*>(bias),
                    static_cast<float*>(out), rows, hidden, eps, team);
  } else {
    layer_norm_rows(static_cast<const bf16*>(x), static_cast<const bf16*>(weight), static_cast<const bf16*>(bias),
                    static_cast<bf16*>(out), rows, hidden, eps, team);
  }
}

void argmax(DType dtype, const void* x, std::int64_t rows, std::int64_t columns, std::int64_t* out,
            const Team& team) {
  dtype == DType::f32 ? argmax_rows(static_cast<const float*>(x), rows, columns, out, team)
                      : argmax_rows(static_cast<const bf16*>(x), rows, columns, out, team);
}

void sampling_weights(DType dtype, const void* x, std::int64_t n, float inverse_temperature,
                      float* weights, float* block_sum, float* block_top) {
  dtype == DType::f32
      ? weigh_row(static_cast<const float*>(x), n, inverse_temperature, weights, block_sum, block_top)
      : weigh_row(static_cast<const bf16*>(x), n, inverse_temperature, weights, block_sum, block_top);
}

void qk_norm_rope_write_kv(DType dtype, const RopeArgs& args) {
  dtype == DType::f32 ? rope<float>(args) : rope<bf16>(args);
}

void norm_rotate_heads(DType dtype, const RotateArgs& args) {
  dtype == DType::f32 ? rotate_rows<float>(args) : rotate_rows<bf16>(args);
}

void norm_rope_write_latent(DType dtype, const LatentRopeArgs& args) {
  dtype == DType::f32 ? rope_latent<float>(args) : rope_latent<bf16>(args);
}

}  // namespace sapwood::SAPWOOD_ISA
