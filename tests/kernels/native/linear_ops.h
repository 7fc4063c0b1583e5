// Linear layers in every form of their weights, and quantisation.
#pragma once

#include "coded.h"
#include "numbers.h"

namespace sapwood {
namespace {

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

}  // namespace
}  // namespace sapwood
