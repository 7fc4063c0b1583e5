// Ops on rows: norms, activations, convolutions, sampling, numbers of 16 bits.
#pragma once

#include "numbers.h"

namespace sapwood {
namespace {

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

void test_add_to(Context& context, DType dtype) {
  Random random(3);
  for (const std::size_t size : {7u, 1000u}) {
    Array x(dtype, size, random), total(dtype, size, random);
    std::vector<double> expected;
    for (std::size_t i = 0; i < size; i++) expected.push_back(total[i] + x[i]);
    context.ops().add_to(dtype, x.data(), total.data(), static_cast<std::int64_t>(size), context.team());
    check("add_to", total.numbers(), expected, tolerance_of(dtype));
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

void test_xielu(Context& context, DType dtype) {
  Random random(31);
  const double above = 0.8, below = 1.3;
  Array x(dtype, 1203, random, 5), out(dtype, x.size());
  x.set(0, -200);
  std::vector<double> expected;
  for (const double number : x.numbers()) {
    expected.push_back(number / 2 + (number > 0 ? above * number * number : below * (std::exp(number) - 1 - number)));
  }
  context.ops().xielu(dtype, x.data(), out.data(), static_cast<std::int64_t>(x.size()), 0.8f, 1.3f, context.team());
  check("xielu", out.numbers(), expected, tolerance_of(dtype));
}

void test_sums(Context& context) {
  Random random(32);
  Array x(DType::f32, 45, random, 3), sum(DType::f32, 45, random, 3), narrow(DType::bf16, 45);
  std::vector<double> expected;
  for (std::size_t i = 0; i < x.size(); i++) expected.push_back(sum[i] + 0.37 * x[i]);
  context.ops().add_scaled(static_cast<const float*>(x.data()), 0.37f, static_cast<float*>(sum.data()), 45);
  check("add_scaled", sum.numbers(), expected, tolerance_of(DType::f32));
  context.ops().narrow(static_cast<const float*>(sum.data()), narrow.data(), 45);
  check("narrow", narrow.numbers(), expected, tolerance_of(DType::bf16));
}

// Two requests, of which the first has a past; alone and between gates, with one weight and with one per token.
void test_causal_conv(Context& context, DType dtype) {
  Random random(21);
  const std::size_t lens[] = {3, 6}, slots = 3;
  const std::int64_t slot_of[] = {2, 0};
  const std::int32_t query_start[] = {0, 3, 9}, context_len[] = {10, 6};
  for (const std::size_t channels : {5u, 64u, 101u}) {
    for (const std::size_t length : {2u, 3u, 5u}) {
      for (const auto& [gated, each] : {std::pair{false, false}, {true, false}, {false, true}}) {
        const std::size_t past = length - 1, stride = gated ? 3 * channels : channels;
        Array x(dtype, 9 * stride, random), out(dtype, 9 * channels), weight(dtype, (each ? 9 : 1) * channels * length, random);
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
                total += weight[((each ? token * channels : 0) + channel) * length + i] * inputs[inputs.size() - length + i];
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
        args.weight_stride = each ? static_cast<std::int64_t>(channels * length) : 0;
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

// Two adapters on parts of the outputs; a third row has none.
void test_low_rank(Context& context, DType dtype) {
  Random random(22);
  const std::int64_t rows[] = {4, 1, 2, 3}, starts[] = {0, 1, 4};
  for (const std::size_t in : {5u, 64u, 101u}) {
    for (const std::size_t outputs : {3u, 70u}) {
      const std::size_t ranks[] = {5, 16}, out_width = outputs + 7;
      Array x(dtype, 5 * in, random), out(dtype, 5 * out_width, random);
      Array a0(dtype, ranks[0] * in, random), a1(dtype, ranks[1] * in, random);
      Array b0(dtype, ranks[0] * outputs, random), b1(dtype, ranks[1] * outputs, random);
      Array* const a[] = {&a0, &a1};
      Array* const b[] = {&b0, &b1};
      std::vector<double> expected = out.numbers();
      std::vector<float> shrunk(4 * 16);
      std::vector<LowRankPart> parts;
      for (int i = 0; i < 2; i++) {
        parts.push_back({0, static_cast<std::int64_t>(ranks[i]), 7, static_cast<std::int64_t>(outputs), b[i]->data()});
      }
      std::vector<LowRankGroup> groups;
      for (int i = 0; i < 2; i++) {
        groups.push_back({a[i]->data(), static_cast<std::int64_t>(ranks[i]), &parts[static_cast<std::size_t>(i)], 1,
                          rows + starts[i], starts[i + 1] - starts[i], shrunk.data() + 16 * starts[i]});
        for (std::int64_t at = starts[i]; at < starts[i + 1]; at++) {
          const std::size_t row = static_cast<std::size_t>(rows[at]);
          for (std::size_t rank = 0; rank < ranks[i]; rank++) {
            double product = 0;
            for (std::size_t k = 0; k < in; k++) product += x[row * in + k] * (*a[i])[rank * in + k];
            for (std::size_t o = 0; o < outputs; o++) {
              expected[row * out_width + 7 + o] += product * (*b[i])[rank * outputs + o];
            }
          }
        }
      }
      LowRankArgs args{};
      args.groups = groups.data();
      args.num_groups = 2;
      args.x = x.data();
      args.x_stride = args.in = static_cast<std::int64_t>(in);
      args.out = out.data();
      args.out_stride = static_cast<std::int64_t>(out_width);
      args.wide = dtype == DType::f32;
      args.team = context.team();
      context.ops().low_rank(dtype, args);
      check("low_rank", out.numbers(), expected, 4 * tolerance_of(dtype));
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

}  // namespace
}  // namespace sapwood
