// Activations, alone and of a gate, and sums of two arrays.
// Source of GELU and its approximations: Hendrycks and Gimpel 2016, arXiv:1606.08415; of relu2: So et al.
// 2021, arXiv:2109.08668; of xIELU: Huang and Schlag 2024, arXiv:2411.13010.
#include "functions.h"
#include "simd.h"
#include "table.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr std::int64_t kElementsPerThread = 8192;  // below this a thread costs more than it saves
constexpr std::int64_t kPiece = 512;               // columns of a row that are a task

// x / y for y from 1 to e^88, as it is good enough for a number that is rounded to T.
template <class T>
SAPWOOD_INLINE VF quotient(VF x, VF y) {
#if defined(__AVX512F__)
  // Within 2^-14, in a sixth of the time that a division takes.
  if constexpr (Pack<T>::per_lane == 2) return x * bits_as<VF>(_mm512_rcp14_ps(bits_as<__m512>(y)));
#endif
  return x / y;
}

template <Activation kind, class T>
SAPWOOD_INLINE VF activated(VF x) {
  if constexpr (kind == Activation::silu) {
    return quotient<T>(x, splat(1.0f) + vexp(-x));
  } else if constexpr (kind == Activation::gelu) {
    // x times the share of a normal distribution that is below x.
    const VF above = verfc((x < VF{} ? -x : x) * splat(0.70710678f)) * splat(0.5f);
    return x * (x < VF{} ? above : splat(1.0f) - above);
  } else if constexpr (kind == Activation::gelu_tanh) {
    // 0.5 * (1 + tanh(y)) is the logistic function of 2 y.
    const VF y = splat(0.79788456f) * (x + splat(0.044715f) * x * x * x);
    return quotient<T>(x, splat(1.0f) + vexp(splat(-2.0f) * y));
  } else if constexpr (kind == Activation::quick_gelu) {
    return quotient<T>(x, splat(1.0f) + vexp(splat(-1.702f) * x));
  } else {
    const VF positive = x < VF{} ? VF{} : x;  // NaN stays
    return kind == Activation::relu ? positive : positive * positive;
  }
}

// What is left over of a row.
template <Activation kind, class T>
SAPWOOD_INLINE float activated_1(T x) {
  return activated<kind, T>(splat(to_float(x)))[0];
}

struct Arrays {
  const void* x;
  void* out;
  std::int64_t rows, inner;
};

template <Activation kind, class T>
void gate_rows(const Arrays& a, const Team& team) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const std::int64_t pieces = (a.inner + kPiece - 1) / kPiece;
  const int threads = worth_threads(team.threads, a.rows * a.inner, kElementsPerThread);
  run_pieces(team, threads, a.rows * pieces, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; task++) {
      const std::int64_t row = task / pieces, first = task % pieces * kPiece;
      const std::int64_t n = least(kPiece, a.inner - first);
      const T* gate = x + row * 2 * a.inner + first;
      const T* up = gate + a.inner;
      T* to = out + row * a.inner + first;
      std::int64_t i = 0;
      for (; i + W <= n; i += W) store(to + i, activated<kind, T>(load(gate + i)) * load(up + i));
      for (; i < n; i++) put(to + i, activated_1<kind>(gate[i]) * to_float(up[i]));
    }
  });
}

template <Activation kind, class T>
void activate_all(const Arrays& a, const Team& team) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  const int threads = worth_threads(team.threads, a.inner, kElementsPerThread);
  run_pieces(team, threads, (a.inner + kPiece - 1) / kPiece, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t n = least(a.inner, end * kPiece);
    std::int64_t i = begin * kPiece;
    for (; i + W <= n; i += W) store(out + i, activated<kind, T>(load(x + i)));
    for (; i < n; i++) put(out + i, activated_1<kind>(x[i]));
  });
}

template <class T>
void add_all(const T* x, T* total, std::int64_t n, const Team& team) {
  const int threads = worth_threads(team.threads, n, kElementsPerThread);
  run_pieces(team, threads, (n + kPiece - 1) / kPiece, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t last = least(n, end * kPiece);
    std::int64_t i = begin * kPiece;
    for (; i + W <= last; i += W) store(total + i, load(total + i) + load(x + i));
    for (; i < last; i++) put(total + i, to_float(total[i]) + to_float(x[i]));
  });
}

// The largest x below 0 that e^x is taken of, as torch's own module has it.
constexpr float kBelow = -1e-6f;

SAPWOOD_INLINE VF xielu_of(VF x, VF above, VF below) {
  const VF least_x = x > splat(kBelow) ? splat(kBelow) : x;  // NaN stays
  const VF curve = x > VF{} ? above * x * x : (vexp(least_x) - splat(1.0f) - x) * below;
  return curve + splat(0.5f) * x;
}

template <class T>
void xielu_all(const T* x, T* out, std::int64_t n, float above, float below, const Team& team) {
  const VF up = splat(above), down = splat(below);
  const int threads = worth_threads(team.threads, n, kElementsPerThread);
  run_pieces(team, threads, (n + kPiece - 1) / kPiece, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t last = least(n, end * kPiece);
    std::int64_t i = begin * kPiece;
    for (; i + W <= last; i += W) store(out + i, xielu_of(load(x + i), up, down));
    for (; i < last; i++) put(out + i, xielu_of(splat(to_float(x[i])), up, down)[0]);
  });
}

template <Activation kind>
void run(DType dtype, bool gated, const Arrays& a, const Team& team) {
  if (gated) {
    dtype == DType::f32 ? gate_rows<kind, float>(a, team) : gate_rows<kind, bf16>(a, team);
  } else {
    dtype == DType::f32 ? activate_all<kind, float>(a, team) : activate_all<kind, bf16>(a, team);
  }
}

void run_any(DType dtype, Activation activation, bool gated, const Arrays& a, const Team& team) {
  switch (activation) {
    case Activation::silu: run<Activation::silu>(dtype, gated, a, team); break;
    case Activation::gelu: run<Activation::gelu>(dtype, gated, a, team); break;
    case Activation::gelu_tanh: run<Activation::gelu_tanh>(dtype, gated, a, team); break;
    case Activation::relu: run<Activation::relu>(dtype, gated, a, team); break;
    case Activation::relu2: run<Activation::relu2>(dtype, gated, a, team); break;
    case Activation::quick_gelu: run<Activation::quick_gelu>(dtype, gated, a, team); break;
  }
}

}  // namespace

void add_to(DType dtype, const void* x, void* total, std::int64_t n, const Team& team) {
  dtype == DType::f32 ? add_all(static_cast<const float*>(x), static_cast<float*>(total), n, team)
                      : add_all(static_cast<const bf16*>(x), static_cast<bf16*>(total), n, team);
}

void activate(DType dtype, Activation activation, const void* x, void* out, std::int64_t n, const Team& team) {
  run_any(dtype, activation, false, {x, out, 1, n}, team);
}

void xielu(DType dtype, const void* x, void* out, std::int64_t n, float above, float below, const Team& team) {
  dtype == DType::f32 ? xielu_all(static_cast<const float*>(x), static_cast<float*>(out), n, above, below, team)
                      : xielu_all(static_cast<const bf16*>(x), static_cast<bf16*>(out), n, above, below, team);
}

void activate_and_mul(DType dtype, Activation activation, const void* x, void* out, std::int64_t rows,
                      std::int64_t inner, const Team& team) {
  run_any(dtype, activation, true, {x, out, rows, inner}, team);
}

}  // namespace sapwood::SAPWOOD_ISA
