// Compares every op of every instruction set that this processor has with plain loops in double, or,
// where two sets must agree bit by bit, with the first set. Made for processors that only an emulator
// has (tests/kernels/test_arm.py): small sizes, no Python.
//
// Prints the sets, slowest first, then a line for every comparison that failed; ends with 1 if any did.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "attention_plan.h"
#include "coded.h"
#include "context.h"
#include "quantized.h"

namespace sapwood {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kThreads = 2;

// ---- numbers ----

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435761u + 1) {}

  std::uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<std::uint32_t>(state_ >> 33);
  }
  int below(int limit) { return static_cast<int>(bits() % static_cast<std::uint32_t>(limit)); }
  double unit() { return bits() / 2147483648.0 * 2 - 1; }  // in [-1, 1)

 private:
  std::uint64_t state_;
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

double from_bf16(std::uint16_t bits) { return bits_as<float>(static_cast<std::uint32_t>(bits) << 16); }

std::uint16_t to_bf16(float x) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  if (x != x) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double from_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -size : size;
}

// Sign, exponent and `mantissa` bits; no infinities or NaN.
double from_fp8(int code, int mantissa, int bias) {
  const int exponent = (code & 127) >> mantissa, fraction = code & ((1 << mantissa) - 1);
  const double size = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                                    : std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
  return code & 128 ? -size : size;
}

double from_e4m3(int code) { return from_fp8(code, 3, 7); }
double from_e5m2(int code) { return from_fp8(code, 2, 15); }

// Numbers as an op takes and gives them.
struct Array {
  DType dtype;
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;

  Array(DType type, std::size_t size) : dtype(type) {
    type == DType::f32 ? wide.resize(size) : narrow.resize(size);
  }
  Array(DType type, std::size_t size, Random& random, double extent = 1) : Array(type, size) {
    for (std::size_t i = 0; i < size; i++) set(i, random.unit() * extent);
  }

  void* data() { return dtype == DType::f32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  std::size_t size() const { return wide.size() + narrow.size(); }
  double operator[](std::size_t i) const { return dtype == DType::f32 ? wide[i] : from_bf16(narrow[i]); }
  void set(std::size_t i, double x) {
    dtype == DType::f32 ? void(wide[i] = static_cast<float>(x)) : void(narrow[i] = to_bf16(static_cast<float>(x)));
  }
  std::vector<double> numbers() const {
    std::vector<double> all(size());
    for (std::size_t i = 0; i < all.size(); i++) all[i] = (*this)[i];
    return all;
  }
};

const char* name_of(DType dtype) { return dtype == DType::f32 ? "fp32" : "bf16"; }

// ---- comparisons ----

int failures = 0;
std::string set_name;  // of the instruction set whose turn it is

void fail(const std::string& what, const std::string& why) {
  failures++;
  std::printf("FAILED %s %s: %s\n", set_name.c_str(), what.c_str(), why.c_str());
}

// Entry by entry: off by `tolerance` times the largest expected number at most; an infinity as it is, and
// for NaN anything that is no finite number.
void check(const std::string& what, const std::vector<double>& actual, const std::vector<double>& expected,
           double tolerance) {
  double largest = 1e-3;
  for (const double x : expected) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  if (actual.size() != expected.size()) return fail(what, "another size");
  for (std::size_t i = 0; i < expected.size(); i++) {
    const double a = actual[i], e = expected[i];
    const bool agree = std::isfinite(e) ? std::fabs(a - e) <= tolerance * largest : e != e ? !std::isfinite(a) : a == e;
    if (agree) continue;
    return fail(what, "entry " + std::to_string(i) + " is " + std::to_string(a) + ", not " + std::to_string(e) +
                          "; the largest is " + std::to_string(largest));
  }
}

// Of sums, and of what is rounded to the dtype in the end.
double tolerance_of(DType dtype) { return dtype == DType::f32 ? 2e-6 : 0.00391; }

// ---- rows ----

void test_rms_norm(Context& context, DType dtype) {
  Random random(1);
  const std::size_t rows = 5;
  for (const std::size_t hidden : {5u, 64u, 101u}) {
    Array x(dtype, rows * hidden, random), residual(dtype, rows * hidden, random), out(dtype, rows * hidden);
    Array weight(dtype, hidden, random);
    std::vector<double> total(rows * hidden), normed(rows * hidden);
    for (std::size_t row = 0; row < rows; row++) {
      double squares = 0;
      for (std::size_t i = row * hidden; i < (row + 1) * hidden; i++) {
        Array sum(dtype, 1);
        sum.set(0, x[i] + residual[i]);
        total[i] = sum[0];
        squares += total[i] * total[i];
      }
      const double factor = 1 / std::sqrt(squares / static_cast<double>(hidden) + 1e-5);
      for (std::size_t i = 0; i < hidden; i++) normed[row * hidden + i] = total[row * hidden + i] * factor * weight[i];
    }
    context.ops().rms_norm(dtype, x.data(), residual.data(), weight.data(), out.data(), rows,
                           static_cast<std::int64_t>(hidden), 1e-5f, context.team());
    check("rms_norm's sum", residual.numbers(), total, 1e-7);
    check("rms_norm", out.numbers(), normed, tolerance_of(dtype));
  }
}

void test_layer_norm(Context& context, DType dtype) {
  Random random(12);
  const std::size_t rows = 5;
  for (const std::size_t hidden : {5u, 64u, 101u}) {
    for (const bool with_weights : {true, false}) {
      Array x(dtype, rows * hidden, random), out(dtype, rows * hidden), weight(dtype, hidden, random);
      Array bias(dtype, hidden, random);
      std::vector<double> expected;
      for (std::size_t row = 0; row < rows; row++) {
        double mean = 0, squares = 0;
        for (std::size_t i = 0; i < hidden; i++) mean += x[row * hidden + i] / static_cast<double>(hidden);
        for (std::size_t i = 0; i < hidden; i++) squares += std::pow(x[row * hidden + i] - mean, 2);
        const double factor = 1 / std::sqrt(squares / static_cast<double>(hidden) + 1e-5);
        for (std::size_t i = 0; i < hidden; i++) {
          const double y = (x[row * hidden + i] - mean) * factor;
          expected.push_back(with_weights ? y * weight[i] + bias[i] : y);
        }
      }
      context.ops().layer_norm(dtype, x.data(), with_weights ? weight.data() : nullptr,
                               with_weights ? bias.data() : nullptr, out.data(), rows,
                               static_cast<std::int64_t>(hidden), 1e-5f, context.team());
      check("layer_norm", out.numbers(), expected, tolerance_of(dtype));
    }
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::relu: return std::max(x, 0.0);
    case Activation::relu2: return std::pow(std::max(x, 0.0), 2);
    default: return x / (1 + std::exp(-1.702 * x));
  }
}

void test_activations(Context& context, DType dtype) {
  Random random(2);
  const std::size_t rows = 3;
  for (int kind = 0; kind <= static_cast<int>(Activation::quick_gelu); kind++) {
    const Activation activation = static_cast<Activation>(kind);
    for (const std::size_t inner : {7u, 640u}) {
      Array x(dtype, rows * inner * 2, random, 9), gated(dtype, rows * inner), alone(dtype, x.size());
      x.set(0, -200);  // e^-x must neither overflow nor be NaN
      x.set(1, activation == Activation::relu2 ? 20 : 200);
      std::vector<double> expected, expected_alone;
      for (const double number : x.numbers()) expected_alone.push_back(activated(activation, number));
      for (std::size_t row = 0; row < rows; row++) {
        for (std::size_t i = 0; i < inner; i++) {
          expected.push_back(expected_alone[row * 2 * inner + i] * x[row * 2 * inner + inner + i]);
        }
      }
      context.ops().activate_and_mul(dtype, activation, x.data(), gated.data(), rows, static_cast<std::int64_t>(inner),
                                     context.team());
      context.ops().activate(dtype, activation, x.data(), alone.data(), static_cast<std::int64_t>(x.size()),
                             context.team());
      const std::string what = " " + std::to_string(kind);
      check("activate_and_mul" + what, gated.numbers(), expected, tolerance_of(dtype));
      check("activate" + what, alone.numbers(), expected_alone, tolerance_of(dtype));
    }
  }
}

// Two requests, of which the first has a past; alone and between gates.
void test_causal_conv(Context& context, DType dtype) {
  Random random(21);
  const std::size_t lens[] = {3, 6}, slots = 3;
  const std::int64_t slot_of[] = {2, 0};
  const std::int32_t query_start[] = {0, 3, 9}, context_len[] = {10, 6};
  for (const std::size_t channels : {5u, 64u, 101u}) {
    for (const std::size_t length : {2u, 3u, 5u}) {
      for (const bool gated : {false, true}) {
        const std::size_t past = length - 1, stride = gated ? 3 * channels : channels;
        Array x(dtype, 9 * stride, random), out(dtype, 9 * channels), weight(dtype, channels * length, random);
        Array bias(dtype, channels, random), states(dtype, slots * channels * past, random);
        std::vector<double> expected(9 * channels), kept = states.numbers();
        for (std::size_t request = 0, begin = 0; request < 2; begin += lens[request++]) {
          const std::size_t state = static_cast<std::size_t>(slot_of[request]) * channels * past;
          for (std::size_t channel = 0; channel < channels; channel++) {
            std::vector<double> inputs;
            for (std::size_t i = 0; i < past; i++) {
              inputs.push_back(request == 0 ? kept[state + channel * past + i] : 0);
            }
            for (std::size_t token = begin; token < begin + lens[request]; token++) {
              const std::size_t at = token * stride + channel;
              inputs.push_back(gated ? x[at] * x[at + 2 * channels] : x[at]);
              double total = bias[channel];
              for (std::size_t i = 0; i < length; i++) {
                total += weight[channel * length + i] * inputs[inputs.size() - length + i];
              }
              expected[token * channels + channel] = gated ? total * x[at + channels] : total;
            }
            for (std::size_t i = 0; i < past; i++) {
              kept[state + channel * past + i] = inputs[inputs.size() - past + i];
            }
          }
        }
        ConvArgs args{};
        args.x = x.data();
        args.x_stride = static_cast<std::int64_t>(stride);
        args.gated = gated;
        args.weight = weight.data();
        args.bias = bias.data();
        args.states = states.data();
        args.state_stride = static_cast<std::int64_t>(channels * past);
        args.slots = slot_of;
        args.query_start = query_start;
        args.context_len = context_len;
        args.num_requests = 2;
        args.channels = static_cast<std::int64_t>(channels);
        args.length = static_cast<std::int64_t>(length);
        args.out = out.data();
        args.team = context.team();
        context.ops().causal_conv(dtype, args);
        const double tolerance = 4 * tolerance_of(dtype);  // products of gates are rounded on the way
        check("causal_conv", out.numbers(), expected, tolerance);
        check("causal_conv's states", states.numbers(), kept, gated ? tolerance : 0);
      }
    }
  }
}

void test_argmax(Context& context, DType dtype) {
  Random random(3);
  for (const std::size_t columns : {1u, 3u, 64u, 1003u}) {
    const std::size_t rows = 4;
    Array x(dtype, rows * columns);
    for (std::size_t i = 0; i < x.size(); i++) x.set(i, random.below(19) - 9);  // many equal ones
    for (std::size_t i = 0; i < columns; i++) {
      if (i % 3 == 0) x.set(columns + i, kNaN);
      x.set(2 * columns + i, kNaN);
      x.set(3 * columns + i, -kInfinity);
    }
    std::vector<double> expected;
    for (std::size_t row = 0; row < rows; row++) {
      std::size_t best = 0;
      for (std::size_t i = 0; i < columns; i++) {
        const double top = x[row * columns + best], y = x[row * columns + i];
        if (y > top || (top != top && y == y)) best = i;
      }
      expected.push_back(static_cast<double>(best));
    }
    std::vector<std::int64_t> out(rows);
    context.ops().argmax(dtype, x.data(), rows, static_cast<std::int64_t>(columns), out.data(), context.team());
    check("argmax", {out.begin(), out.end()}, expected, 0);
  }
}

void test_mask_logits(Context& context, DType dtype) {
  Random random(4);
  const std::size_t columns = 101, stride = 110, words = 4;
  Array x(dtype, 3 * stride, random);
  std::vector<double> expected = x.numbers();
  const std::vector<std::int64_t> rows = {2, 0};
  std::vector<std::uint32_t> masks(rows.size() * words);
  for (std::uint32_t& mask : masks) mask = random.bits() << 1 ^ random.bits();
  masks[1] = 0xffffffff;
  for (std::size_t i = 0; i < rows.size(); i++) {
    for (std::size_t column = 0; column < columns; column++) {
      if (masks[i * words + column / 32] >> column % 32 & 1) continue;
      expected[static_cast<std::size_t>(rows[i]) * stride + column] = -kInfinity;
    }
  }
  context.ops().mask_logits(dtype, x.data(), stride, columns, masks.data(), rows.data(), 2, context.team());
  check("mask_logits", x.numbers(), expected, 0);
}

void test_sampling_weights(Context& context, DType dtype) {
  Random random(5);
  const std::size_t n = 1003, blocks = (n + kSamplingBlock - 1) / kSamplingBlock, size = blocks * kSamplingBlock;
  Array x(dtype, n, random, 20);
  for (std::size_t i = 0; i < n; i += 7) x.set(i, -kInfinity);
  const std::vector<double> numbers = x.numbers();
  const double top = *std::max_element(numbers.begin(), numbers.end());
  std::vector<double> expected(size), sums(blocks), tops(blocks);
  for (std::size_t i = 0; i < n; i++) {
    expected[i] = std::exp((numbers[i] - top) * 1.25);
    sums[i / kSamplingBlock] += expected[i];
    tops[i / kSamplingBlock] = std::max(tops[i / kSamplingBlock], expected[i]);
  }
  std::vector<float> weights(size), block_sum(blocks), block_top(blocks);
  context.ops().sampling_weights(dtype, x.data(), n, 1.25f, weights.data(), block_sum.data(), block_top.data());
  check("sampling_weights", {weights.begin(), weights.end()}, expected, 1e-5);
  check("sampling_weights' sums", {block_sum.begin(), block_sum.end()}, sums, 1e-5);
  check("sampling_weights' tops", {block_top.begin(), block_top.end()}, tops, 1e-5);
}

// All numbers of 16 bits, and an odd number of them.
void test_widen(Context& context) {
  for (const WeightKind kind : {WeightKind::bf16, WeightKind::f16}) {
    std::vector<std::uint16_t> numbers;
    std::vector<double> expected;
    for (std::uint32_t bits = 0; bits < 0x10000; bits++) {
      const bool is_half = kind == WeightKind::f16, is_finite = (bits & 0x7c00) != 0x7c00;
      numbers.push_back(static_cast<std::uint16_t>(bits));
      expected.push_back(!is_half                   ? from_bf16(numbers.back())
                         : is_finite                ? from_half(numbers.back())
                         : (bits & 0x03ff) != 0     ? kNaN
                         : (bits & 0x8000) != 0     ? -kInfinity
                                                    : kInfinity);
    }
    expected.pop_back();
    std::vector<float> out(expected.size());
    context.ops().widen(kind, numbers.data(), out.data(), static_cast<std::int64_t>(out.size()));
    check("widen", {out.begin(), out.end()}, expected, 0);
  }
}

// ---- attention ----

// One layer's cache of keys or values.
struct Cache {
  KvFormat format;
  DType dtype;
  std::int64_t heads, page_size, d;
  std::vector<std::byte> bytes;

  Cache(KvFormat kv, DType type, std::int64_t pages, std::int64_t num_heads, std::int64_t size, std::int64_t head_dim)
      : format(kv), dtype(type), heads(num_heads), page_size(size), d(head_dim),
        bytes(static_cast<std::size_t>(pages * stride() * element())) {}

  std::int64_t element() const { return format != KvFormat::dense ? 1 : dtype == DType::f32 ? 4 : 2; }
  std::int64_t tile() const { return page_size * kv_width(format, static_cast<int>(d)); }
  std::int64_t stride() const { return heads * tile(); }  // elements

  double at(std::int64_t slot, std::int64_t head, std::int64_t i) const {
    const std::int64_t token = slot % page_size;
    const std::byte* from = bytes.data() + (slot / page_size * stride() + head * tile()) * element();
    const auto narrow_at = [&](std::int64_t offset) {
      std::uint16_t bits;
      std::memcpy(&bits, from + offset, 2);
      return from_bf16(bits);
    };
    if (format != KvFormat::dense) {
      const int code = static_cast<int>(from[token * d + i]);
      const double number = format == KvFormat::int8       ? static_cast<std::int8_t>(code)
                            : format == KvFormat::fp8_e4m3 ? from_e4m3(code)
                                                           : from_e5m2(code);
      return number * narrow_at(page_size * d + token * kScaleBytes);
    }
    if (dtype == DType::bf16) return narrow_at((token * d + i) * 2);
    float number;
    std::memcpy(&number, from + (token * d + i) * 4, 4);
    return number;
  }
};

// Half a step of the largest numbers of a format, and a little for the scale, which is rounded up.
double kv_tolerance(KvFormat format) {
  return format == KvFormat::int8 ? 0.0045 : format == KvFormat::fp8_e4m3 ? 0.064 : 0.128;
}

constexpr std::int64_t kPageSize = 16, kKvHeads = 2;

// Rotates and writes the keys and values of all slots, compares them with plain loops, and leaves them
// to the attention.
void write_cache(Context& context, DType dtype, int heads, std::int64_t d, Cache& keys, Cache& values,
                 std::int64_t slots, bool with_norm) {
  Random random(6);
  const std::int64_t all_heads = heads + 2 * kKvHeads, width = all_heads * d, rotary = d / 2 + 4;
  Array qkv(dtype, static_cast<std::size_t>(slots * width), random, 2);
  Array q(dtype, static_cast<std::size_t>(slots * heads * d));
  Array norm(dtype, static_cast<std::size_t>(d), random);
  std::vector<float> cos_sin(static_cast<std::size_t>(slots * rotary));
  std::vector<std::int64_t> positions, write_index;
  for (std::int64_t i = 0; i < slots; i++) {
    positions.push_back(slots - 1 - i);
    write_index.push_back(i * 7 % slots);  // slots is no multiple of 7
  }
  for (float& x : cos_sin) x = static_cast<float>(random.unit());
  RopeArgs args{};
  args = {qkv.data(), q.data(), slots, heads, kKvHeads, static_cast<int>(d), static_cast<int>(rotary),
          static_cast<int>(kPageSize), with_norm ? norm.data() : nullptr, with_norm ? norm.data() : nullptr, 1e-5f,
          cos_sin.data(), positions.data(), write_index.data(), keys.bytes.data(), values.bytes.data(),
          keys.stride(), values.stride(), keys.format, context.team()};
  context.ops().qk_norm_rope_write_kv(dtype, args);

  std::vector<double> q_expected, k_actual, k_expected, v_actual, v_expected;
  for (std::int64_t token = 0; token < slots; token++) {
    for (std::int64_t head = 0; head < heads + kKvHeads; head++) {
      std::vector<double> x(static_cast<std::size_t>(d)), turned;
      double squares = 0;
      for (std::int64_t i = 0; i < d; i++) {
        x[static_cast<std::size_t>(i)] = qkv[static_cast<std::size_t>(token * width + head * d + i)];
        squares += x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(i)];
      }
      const double factor = 1 / std::sqrt(squares / static_cast<double>(d) + 1e-5);
      for (std::size_t i = 0; with_norm && i < x.size(); i++) x[i] *= factor * norm[i];
      turned = x;
      const std::size_t half = static_cast<std::size_t>(rotary / 2);
      const float* cosine = cos_sin.data() + positions[static_cast<std::size_t>(token)] * rotary;
      for (std::size_t i = 0; i < half; i++) {
        turned[i] = x[i] * cosine[i] - x[half + i] * cosine[half + i];
        turned[half + i] = x[half + i] * cosine[i] + x[i] * cosine[half + i];
      }
      (head < heads ? q_expected : k_expected).insert((head < heads ? q_expected : k_expected).end(), turned.begin(), turned.end());
    }
    const std::int64_t slot = write_index[static_cast<std::size_t>(token)];
    for (std::int64_t head = 0; head < kKvHeads; head++) {
      for (std::int64_t i = 0; i < d; i++) {
        k_actual.push_back(keys.at(slot, head, i));
        v_actual.push_back(values.at(slot, head, i));
        v_expected.push_back(qkv[static_cast<std::size_t>(token * width + (heads + kKvHeads + head) * d + i)]);
      }
    }
  }
  const std::string what = std::string("qk_norm_rope_write_kv ") + name_of(dtype) + " format " +
                           std::to_string(static_cast<int>(keys.format));
  const bool dense = keys.format == KvFormat::dense;
  check(what + " q", q.numbers(), q_expected, tolerance_of(dtype));
  check(what + " keys", k_actual, k_expected, dense ? tolerance_of(dtype) : kv_tolerance(keys.format));
  check(what + " values", v_actual, v_expected, dense ? 0 : kv_tolerance(keys.format));
}

// What attention may do beyond its plain form.
struct Traits {
  std::int64_t window = 0;
  float soft_cap = 0;
  bool has_sinks = false, has_alibi = false;
};

// Pages before the window have numbers that are those of no page.
void test_attention(Context& context, DType dtype, KvFormat format, int group, int d, const Traits& traits) {
  Random random(7);
  const int heads = group * static_cast<int>(kKvHeads);
  // A prompt, a part of one, and decodes; the last two have their first 16 tokens in common.
  const AttentionPlan::Lengths lengths{{1, 70, 1, 9, 1, 1}, {130, 70, 5, 80, 33, 40}};
  const std::int64_t max_pages = 9, requests = static_cast<std::int64_t>(lengths.query.size());
  std::vector<std::int32_t> table(static_cast<std::size_t>(requests * max_pages));
  std::int32_t page = 0;
  for (std::size_t r = 0; r < lengths.query.size(); r++) {
    for (std::int64_t i = 0; i * kPageSize < lengths.context[r]; i++) {
      table[r * max_pages + static_cast<std::size_t>(i)] = page++ * 5 % 29;  // 29 pages in all
    }
  }
  table[5 * max_pages] = table[4 * max_pages];
  std::vector<std::int32_t> reached = table;
  for (std::size_t r = 0; traits.window > 0 && r < lengths.query.size(); r++) {
    const std::int64_t first = lengths.context[r] - lengths.query[r] - traits.window + 1;
    for (std::int64_t i = 0; (i + 1) * kPageSize <= first; i++) reached[r * max_pages + static_cast<std::size_t>(i)] = -7;
  }
  const std::int64_t pages = 29, slots = pages * kPageSize;
  Cache keys(format, dtype, pages, kKvHeads, kPageSize, d), values = keys;
  write_cache(context, dtype, heads, d, keys, values, slots, group == 3);

  const AttentionPlan plan({heads, static_cast<int>(kKvHeads), d, static_cast<int>(kPageSize), pages},
                           reinterpret_cast<std::uintptr_t>(reached.data()), max_pages, max_pages, lengths,
                           reached[4 * max_pages] == reached[5 * max_pages] ? std::vector<AttentionPlan::Group>{{{4, 5}, 1}} : std::vector<AttentionPlan::Group>{},
                           context.threads());
  const std::size_t row = static_cast<std::size_t>(heads * d);
  Array q(dtype, static_cast<std::size_t>(plan.num_tokens()) * row, random), out(dtype, q.size());
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  std::vector<float> sinks, slopes;
  for (int head = 0; head < heads; head++) {
    sinks.push_back(static_cast<float>(random.unit()));
    slopes.push_back(static_cast<float>(0.3 / (head + 1)));
  }
  plan.run(context, dtype, {q.data(), heads * d, keys.bytes.data(), keys.stride(), values.bytes.data(),
                            values.stride(), format, out.data(), scale,
                            {traits.window, traits.soft_cap, traits.has_sinks ? sinks.data() : nullptr,
                             traits.has_alibi ? slopes.data() : nullptr}});

  std::vector<double> expected(q.size());
  std::size_t token = 0;
  for (std::size_t r = 0; r < lengths.query.size(); r++) {
    for (std::int64_t query = 0; query < lengths.query[r]; query++, token++) {
      const std::int64_t seen = lengths.context[r] - lengths.query[r] + query + 1;
      for (int head = 0; head < heads; head++) {
        const std::size_t at = token * row + static_cast<std::size_t>(head * d);
        std::vector<double> weights;
        double total = traits.has_sinks ? std::exp(sinks[static_cast<std::size_t>(head)]) : 0;
        const auto slot_of = [&](std::int64_t t) {
          return table[r * max_pages + static_cast<std::size_t>(t / kPageSize)] * kPageSize + t % kPageSize;
        };
        for (std::int64_t t = 0; t < seen; t++) {
          double score = 0;
          for (int i = 0; i < d; i++) score += q[at + static_cast<std::size_t>(i)] * keys.at(slot_of(t), head / group, i);
          score *= scale;
          if (traits.soft_cap > 0) score = traits.soft_cap * std::tanh(score / traits.soft_cap);
          if (traits.has_alibi) score += slopes[static_cast<std::size_t>(head)] * static_cast<double>(t - seen + 1);
          const bool is_hidden = traits.window > 0 && t < seen - traits.window;
          weights.push_back(is_hidden ? 0 : std::exp(score));
          total += weights.back();
        }
        for (std::int64_t t = 0; t < seen; t++) {
          for (int i = 0; i < d; i++) {
            expected[at + static_cast<std::size_t>(i)] +=
                weights[static_cast<std::size_t>(t)] / total * values.at(slot_of(t), head / group, i);
          }
        }
      }
    }
  }
  check(std::string("paged_attention ") + name_of(dtype) + " format " + std::to_string(static_cast<int>(format)) +
            " group " + std::to_string(group) + " window " + std::to_string(traits.window) + " cap " +
            std::to_string(traits.soft_cap) + (traits.has_sinks ? " sinks" : "") + (traits.has_alibi ? " alibi" : ""),
        out.numbers(), expected, dtype == DType::f32 ? 1e-5 : 0.0079);
}

// ---- linear layers ----

// A weight, packed and as plain numbers.
struct Layer {
  std::string name;
  LinearWeight weight{};
  CodedLayout coded{};
  std::vector<std::byte> packed;
  std::vector<float> scales;
  std::vector<std::int32_t> order;
  std::vector<double> plain;  // [n, k]
  bool rounds_x = false;      // to int8
};

constexpr std::int64_t kOutputs = 70;  // two panels and a part of one

const char* name_of(WeightKind kind) {
  return kind == WeightKind::f32 ? "fp32" : kind == WeightKind::bf16 ? "bf16" : "fp16";
}

// A dense weight's panels (pack.h). k is even for bf16.
void make_dense(Layer& layer, WeightKind kind, std::int64_t k, Random& random) {
  const std::int64_t panels = (kOutputs + kPanel - 1) / kPanel, together = kind == WeightKind::bf16 ? 2 : 1;
  layer.name = std::string("linear of ") + name_of(kind);
  layer.packed.resize(static_cast<std::size_t>(panels * k * kPanel * dense_bytes(kind)));
  for (std::int64_t n = 0; n < kOutputs; n++) {
    for (std::int64_t i = 0; i < k; i++) {
      const float number = static_cast<float>(random.unit());
      const std::uint16_t half = static_cast<std::uint16_t>(0x2c00 + random.below(0x1000) + (number < 0 ? 0x8000 : 0));
      const std::uint16_t narrow = kind == WeightKind::f16 ? half : to_bf16(number);
      const std::int64_t at = ((n / kPanel * (k / together) + i / together) * kPanel + n % kPanel) * together + i % together;
      std::byte* to = layer.packed.data() + at * dense_bytes(kind);
      kind == WeightKind::f32 ? std::memcpy(to, &number, 4) : std::memcpy(to, &narrow, 2);
      layer.plain.push_back(kind == WeightKind::f32 ? number : kind == WeightKind::f16 ? from_half(half) : from_bf16(narrow));
    }
  }
  layer.weight.kind = kind;
}

void make_int8(Layer& layer, std::int64_t k, Random& random) {
  layer.name = "linear_int8";
  layer.rounds_x = true;
  std::vector<std::int8_t> numbers(static_cast<std::size_t>(kOutputs * k));
  layer.scales.resize(96);
  for (std::size_t i = 0; i < layer.scales.size(); i++) layer.scales[i] = static_cast<float>(random.unit());
  for (std::size_t i = 0; i < numbers.size(); i++) {
    numbers[i] = static_cast<std::int8_t>(i % 64 < 8 ? 127 - 254 * (i % 2) : static_cast<std::size_t>(random.below(255) - 127));
    layer.plain.push_back(numbers[i] * static_cast<double>(layer.scales[i / static_cast<std::size_t>(k)]));
  }
  layer.packed.resize(packed_bytes(WeightKind::int8, kOutputs, k));
  pack_int8(numbers.data(), layer.packed.data(), kOutputs, k);
  layer.weight.kind = WeightKind::int8;
  layer.weight.scales = layer.scales.data();
}

void make_grouped(Layer& layer, WeightKind kind, std::int64_t k, Random& random) {
  const Layout layout = layout_of(kind);
  const std::int64_t block = kGroup * block_groups(layout);
  layer.name = "linear_grouped " + std::to_string(static_cast<int>(kind));
  layer.rounds_x = true;
  std::vector<std::uint8_t> numbers(static_cast<std::size_t>(kOutputs * k));
  std::vector<std::uint16_t> d(static_cast<std::size_t>(kOutputs * k / block)), least(d.size());
  std::vector<std::int8_t> scales(static_cast<std::size_t>(kOutputs * k / layout.run)), minima(scales.size());
  for (auto& x : numbers) x = static_cast<std::uint8_t>(random.below(1 << layout.bits));
  for (auto& x : d) x = static_cast<std::uint16_t>(0x2000 + random.below(0x800));
  for (auto& x : least) x = static_cast<std::uint16_t>(0xa000 + random.below(0x800));
  for (auto& x : scales) x = static_cast<std::int8_t>(random.below(127) - 63);
  for (auto& x : minima) x = static_cast<std::int8_t>(random.below(64));
  least[0] = 0x8012;  // subnormal
  for (std::int64_t i = 0; i < kOutputs * k; i++) {
    const std::size_t b = static_cast<std::size_t>(i / block), run = static_cast<std::size_t>(i / layout.run);
    double x = (numbers[static_cast<std::size_t>(i)] - layout.offset) * from_half(d[b]) * (layout.heads ? scales[run] : 1);
    if (layout.minima) x += from_half(least[b]) * (layout.heads ? minima[run] : 1);
    layer.plain.push_back(x);
  }
  layer.packed.resize(packed_bytes(kind, kOutputs, k));
  pack_groups(kind, {numbers.data(), d.data(), scales.data(), least.data(), minima.data()}, layer.packed.data(), kOutputs, k);
  layer.weight.kind = kind;
}

double value_of(Codes codes, int code, DType dtype) {
  constexpr double fp4[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  constexpr float nf4[] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                           -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                           0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                           0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
  switch (codes) {
    case Codes::int4: return code - 8;
    case Codes::fp4: return code < 8 ? fp4[code] : -fp4[code - 8];
    case Codes::nf4: return dtype == DType::f32 ? nf4[code] : from_bf16(to_bf16(nf4[code]));
    case Codes::int8: return static_cast<std::int8_t>(code);
    default: return from_e4m3(code);
  }
}

void make_coded(Layer& layer, Codes codes, DType dtype, std::int64_t k, std::int64_t group, bool narrow, bool shifted,
                Random& random) {
  const bool bytes = is_byte(codes);
  layer.name = "linear_coded " + std::to_string(static_cast<int>(codes));
  for (std::int64_t i = 0; i < k; i++) layer.order.push_back(static_cast<std::int32_t>(i * 11 % k));  // k is no multiple of 11
  layer.coded = {codes, k, group, narrow, shifted, shifted ? layer.order.data() : nullptr};
  const std::size_t groups = static_cast<std::size_t>(extent_of(layer.coded).groups);
  const std::size_t row = static_cast<std::size_t>(bytes ? k : (k + 1) / 2);
  std::vector<std::uint8_t> packed(kOutputs * row);
  std::vector<float> scales(kOutputs * groups), shifts(scales.size());
  for (auto& x : packed) x = static_cast<std::uint8_t>(random.below(codes == Codes::e4m3 ? 127 : 256));
  for (auto& x : scales) x = static_cast<float>(from_bf16(to_bf16(static_cast<float>(random.unit()))));
  for (auto& x : shifts) x = static_cast<float>(random.below(17) - 8);
  layer.scales.resize(96);
  for (auto& x : layer.scales) x = static_cast<float>(random.unit());
  layer.plain.resize(static_cast<std::size_t>(kOutputs * k));
  for (std::int64_t n = 0; n < kOutputs; n++) {
    for (std::int64_t i = 0; i < k; i++) {
      const std::size_t at = static_cast<std::size_t>(n) * row + static_cast<std::size_t>(bytes ? i : i / 2);
      const int code = bytes ? packed[at] : packed[at] >> (i % 2 * 4) & 15;
      const std::size_t head = static_cast<std::size_t>(n) * groups + static_cast<std::size_t>(i / std::min(group, k));
      const double number = value_of(codes, code, dtype) + (shifted ? shifts[head] : 0);
      layer.plain[static_cast<std::size_t>(n * k + (shifted ? layer.order[static_cast<std::size_t>(i)] : i))] =
          number * scales[head] * layer.scales[static_cast<std::size_t>(n)];
    }
  }
  layer.packed.resize(static_cast<std::size_t>((kOutputs + kPanel - 1) / kPanel * extent_of(layer.coded).panel_bytes));
  pack_coded(layer.coded, packed.data(), scales.data(), shifted ? shifts.data() : nullptr, kOutputs, layer.packed.data());
  layer.weight.kind = WeightKind::coded;
  layer.weight.scales = layer.scales.data();
  layer.weight.coded = &layer.coded;
}

// x w^T + bias for several numbers of rows, the first ones of the same x. In `exact` mode x are small whole
// numbers, which rounding to int8 leaves as they are; else one row has a NaN, which must stay in it, and
// results are also appended to `results`, to be compared bit by bit.
void run_layer(Context& context, Layer& layer, DType dtype, std::int64_t k, bool exact, std::vector<double>* results) {
  constexpr std::int64_t kBroken = 4;
  // Tiles of all heights; with many inputs also parts of a panel, and panels that stay in the cache.
  const std::vector<std::int64_t> few = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13}, many = {2, 13, 100};
  Random random(8);
  layer.weight.data = layer.packed.data();
  layer.weight.n = layer.weight.out_stride = kOutputs;
  layer.weight.k = k;
  Array bias(dtype, kOutputs, random);
  layer.weight.bias = bias.data();
  const std::int64_t stride = k + 2, most_rows = k < 500 ? few.back() : many.back();
  Array x(dtype, static_cast<std::size_t>(most_rows * stride), random, 3);
  for (std::size_t i = 0; exact && i < x.size(); i++) {
    const std::size_t column = i % static_cast<std::size_t>(stride);
    x.set(i, column % 32 == 5 ? 127 : random.below(31) - 15);
  }
  if (!exact) x.set(static_cast<std::size_t>(kBroken * stride + 3), k % 4 == 0 ? kNaN : kInfinity);
  std::vector<double> expected;
  for (std::int64_t row = 0; row < most_rows; row++) {
    for (std::int64_t n = 0; n < kOutputs; n++) {
      double sum = bias[static_cast<std::size_t>(n)];
      for (std::int64_t i = 0; i < k; i++) {
        sum += x[static_cast<std::size_t>(row * stride + i)] * layer.plain[static_cast<std::size_t>(n * k + i)];
      }
      expected.push_back(!exact && row == kBroken ? kNaN : sum);
    }
  }
  for (const std::int64_t rows : k < 500 ? few : many) {
    Array out(dtype, static_cast<std::size_t>(rows * kOutputs));
    context.linear(layer.weight, dtype, x.data(), stride, rows, out.data());
    const std::vector<double> numbers = out.numbers();
    const std::string what = layer.name + " " + name_of(dtype) + " k " + std::to_string(k) + " rows " + std::to_string(rows);
    check(what + (exact ? " exact" : ""), numbers, {expected.begin(), expected.begin() + rows * kOutputs},
          layer.weight.fine ? std::max(2e-4, tolerance_of(dtype)) : layer.rounds_x && !exact ? 0.012 : tolerance_of(dtype));
    if (results != nullptr) results->insert(results->end(), numbers.begin(), numbers.end());
  }
}

// An fp32 result of bf16: the sums themselves.
void test_wide(Context& context, std::int64_t k) {
  Random random(9);
  Layer layer;
  make_dense(layer, WeightKind::bf16, k, random);
  layer.weight.data = layer.packed.data();
  layer.weight.n = layer.weight.out_stride = kOutputs;
  layer.weight.k = k;
  for (const std::int64_t rows : {1, 4, 11, 100}) {
    Array x(DType::bf16, static_cast<std::size_t>(rows * k), random);
    std::vector<float> out(static_cast<std::size_t>(rows * kOutputs));
    context.linear_fp32(layer.weight, DType::bf16, x.data(), k, rows, out.data());
    std::vector<double> expected;
    for (std::int64_t row = 0; row < rows; row++) {
      for (std::int64_t n = 0; n < kOutputs; n++) {
        double sum = 0;
        for (std::int64_t i = 0; i < k; i++) {
          sum += x[static_cast<std::size_t>(row * k + i)] * layer.plain[static_cast<std::size_t>(n * k + i)];
        }
        expected.push_back(sum);
      }
    }
    check("linear bf16 to fp32, k " + std::to_string(k) + " rows " + std::to_string(rows),
          {out.begin(), out.end()}, expected, 2e-6);
  }
}

// Results of products of bytes, which do not depend on the instruction set, are appended to `results`.
void test_linear(Context& context, DType dtype, std::vector<double>* results) {
  Random random(10);
  const auto make = [&](const std::function<void(Layer&)>& how, std::int64_t k) {
    Layer layer;
    how(layer);
    run_layer(context, layer, dtype, k, true, nullptr);
    run_layer(context, layer, dtype, k, false, layer.rounds_x ? results : nullptr);
  };
  for (const std::int64_t k : {6, 70, 900}) {
    make([&](Layer& l) { make_dense(l, WeightKind::bf16, k, random); }, k);
    if (dtype == DType::bf16) continue;  // takes no other weights
    make([&](Layer& l) { make_dense(l, WeightKind::f32, k, random); }, k);
    make([&](Layer& l) { make_dense(l, WeightKind::f16, k + 1, random); }, k + 1);
  }
  for (const std::int64_t k : {64, 101, 576}) make([&](Layer& l) { make_int8(l, k, random); }, k);
  for (int kind = static_cast<int>(WeightKind::q8_0); kind <= static_cast<int>(WeightKind::iq4_xs); kind++) {
    const bool heads = layout_of(static_cast<WeightKind>(kind)).heads;
    const std::int64_t k = heads ? 256 : 160;
    make([&](Layer& l) { make_grouped(l, static_cast<WeightKind>(kind), k, random); }, k);
    Layer fine;  // x in 16 bits; from some rows on weights are decoded, which differs from set to set
    make_grouped(fine, static_cast<WeightKind>(kind), k, random);
    fine.name += " fine";
    fine.weight.fine = true;
    run_layer(context, fine, dtype, k, false, nullptr);
  }
  for (const Codes codes : {Codes::int4, Codes::fp4, Codes::nf4, Codes::int8, Codes::e4m3}) {
    make([&](Layer& l) { make_coded(l, codes, dtype, 70, 32, true, true, random); }, 70);
    make([&](Layer& l) { make_coded(l, codes, dtype, 256, 128, false, false, random); }, 256);
  }
}

// ---- quantisation ----

void test_quantize(Context& context, DType dtype, std::vector<double>* results) {
  Random random(11);
  const std::int64_t n = 9, k = 96;
  Array weights(dtype, static_cast<std::size_t>(n * k), random);
  for (std::size_t i = 0; i < 32; i++) weights.set(i, 0);
  weights.set(40, 1e-9);
  for (const WeightKind kind : {WeightKind::int8, WeightKind::q8_0, WeightKind::q4_1}) {
    std::vector<std::uint8_t> out(static_cast<std::size_t>(kind == WeightKind::int8 ? n * k : n * k / 32 * (kind == WeightKind::q8_0 ? 34 : 20)));
    std::vector<float> scales(static_cast<std::size_t>(n));
    context.ops().quantize(dtype, {kind, weights.data(), out.data(), scales.data(), n, k, context.team()});
    results->insert(results->end(), out.begin(), out.end());
    std::vector<double> actual;
    for (std::size_t i = 0; i < weights.size(); i++) {
      const auto half_at = [&](std::size_t at) {
        return from_half(static_cast<std::uint16_t>(out[at] | out[at + 1] << 8));
      };
      const std::size_t block = i / 32, j = i % 32;
      if (kind == WeightKind::int8) {
        actual.push_back(static_cast<std::int8_t>(out[i]) * static_cast<double>(scales[i / static_cast<std::size_t>(k)]));
      } else if (kind == WeightKind::q8_0) {
        actual.push_back(static_cast<std::int8_t>(out[block * 34 + 2 + j]) * half_at(block * 34));
      } else {
        const int both = out[block * 20 + 4 + j % 16];
        actual.push_back((j < 16 ? both & 15 : both >> 4) * half_at(block * 20) + half_at(block * 20 + 2));
      }
    }
    check("quantize to " + std::to_string(static_cast<int>(kind)), actual, weights.numbers(),
          kind == WeightKind::q4_1 ? 0.09 : 0.0042);
  }
}

// Appends to `same` what must be equal for all sets.
void test_all(Context& context, std::vector<double>* same) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    test_rms_norm(context, dtype);
    test_layer_norm(context, dtype);
    test_activations(context, dtype);
    test_causal_conv(context, dtype);
    test_argmax(context, dtype);
    test_mask_logits(context, dtype);
    test_sampling_weights(context, dtype);
    test_linear(context, dtype, same);
    test_quantize(context, dtype, same);
    for (const KvFormat format : {KvFormat::dense, KvFormat::int8, KvFormat::fp8_e4m3, KvFormat::fp8_e5m2}) {
      test_attention(context, dtype, format, 3, 64, {});
      test_attention(context, dtype, format, 1, 32, {});
      test_attention(context, dtype, format, 3, 64, {.window = 20, .has_sinks = true});
      test_attention(context, dtype, format, 1, 32, {.soft_cap = 0.7f, .has_alibi = true});
      test_attention(context, dtype, format, 3, 32, {.window = 3, .soft_cap = 2, .has_sinks = true, .has_alibi = true});
    }
  }
  for (const std::int64_t k : {6, 576, 900}) test_wide(context, k);
  test_widen(context);
}

}  // namespace
}  // namespace sapwood

int main() {
  using namespace sapwood;
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);  // what was found must be seen if an instruction ends this
  std::vector<double> first;
  for (const Ops& ops : usable_ops()) std::printf("%s%s", &ops == &usable_ops().front() ? "" : " ", ops.name);
  std::printf("\n");
  for (const Ops& ops : usable_ops()) {
    set_name = ops.name;
    Context context(set_name, kThreads);
    std::vector<double> same;
    test_all(context, &same);
    if (first.empty()) first = same;
    check("what does not depend on the instruction set", same, first, 0);
  }
  return failures == 0 ? 0 : 1;
}
