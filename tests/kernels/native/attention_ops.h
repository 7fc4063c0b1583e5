// The KV cache and attention to it.
#pragma once

#include "attention_plan.h"
#include "both_ways.h"
#include "numbers.h"

namespace sapwood {
namespace {

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
  bool has_sinks = false, has_alibi = false, has_tree = false;
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

  // New token j of the request with nine follows token (j - 1) / 2, as in a heap: a tree.
  std::vector<std::int64_t> sees(static_cast<std::size_t>(1 + 70 + 1 + 9 + 1 + 1), -1);
  for (std::int64_t j = 0; j < 9; j++) {
    sees[static_cast<std::size_t>(72 + j)] = std::int64_t{1} << j | (j == 0 ? 0 : sees[static_cast<std::size_t>(72 + (j - 1) / 2)]);
  }
  const AttentionPlan plan({heads, static_cast<int>(kKvHeads), d, static_cast<int>(kPageSize), pages},
                           reinterpret_cast<std::uintptr_t>(reached.data()), max_pages, max_pages, lengths,
                           reached[4 * max_pages] == reached[5 * max_pages] ? std::vector<AttentionPlan::Group>{{{4, 5}, 1}} : std::vector<AttentionPlan::Group>{},
                           traits.has_tree ? reinterpret_cast<std::uintptr_t>(sees.data()) : 0, context.threads());
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
          const std::int64_t first_new = lengths.context[r] - lengths.query[r];
          const bool is_other_branch =
              traits.has_tree && t >= first_new && t - first_new < 64 && (sees[token] >> (t - first_new) & 1) == 0;
          const bool is_hidden = is_other_branch || (traits.window > 0 && t < seen - traits.window);
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
            std::to_string(traits.soft_cap) + (traits.has_sinks ? " sinks" : "") + (traits.has_alibi ? " alibi" : "") + (traits.has_tree ? " tree" : ""),
        out.numbers(), expected, dtype == DType::f32 ? 1e-5 : 0.0079);
}

// Two texts side by side, and one whose tokens lie apart.
void test_both_ways(Context& context, DType dtype, std::int64_t length, int head_dim) {
  Random random(21);
  const int heads = 2;
  const std::int64_t tokens = 3 * length, width = heads * head_dim;
  Array q(dtype, static_cast<std::size_t>(tokens * width), random, 2), k(dtype, q.size(), random), v(dtype, q.size(), random);
  Array out(dtype, q.size());
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < length; i++) rows.push_back(tokens - 1 - i);
  const std::vector<BothWaysText> texts{{nullptr, 0, length}, {nullptr, length, length}, {rows.data(), 0, length}};
  const float scale = 0.3f;
  attend_both_ways(context, dtype, {heads, head_dim, scale, q.data(), k.data(), v.data(), width, width, width, out.data()},
                   texts, tokens);
  std::vector<double> expected(out.size());
  const auto entry = [&](std::int64_t token, int head, int i) {
    return static_cast<std::size_t>(token * width + head * head_dim + i);
  };
  for (std::int64_t token = 0; token < tokens; token++) {
    const std::int64_t first = token / length * length;
    for (int head = 0; head < heads; head++) {
      std::vector<double> weights;
      double total = 0;
      for (std::int64_t key = first; key < first + length; key++) {
        double score = 0;
        for (int i = 0; i < head_dim; i++) score += q[entry(token, head, i)] * k[entry(key, head, i)];
        weights.push_back(std::exp(score * scale));
        total += weights.back();
      }
      for (std::int64_t key = first; key < first + length; key++) {
        for (int i = 0; i < head_dim; i++) {
          expected[entry(token, head, i)] += weights[static_cast<std::size_t>(key - first)] / total * v[entry(key, head, i)];
        }
      }
    }
  }
  check(std::string("both_ways ") + name_of(dtype) + " of " + std::to_string(length), out.numbers(), expected,
        dtype == DType::f32 ? 1e-5 : 0.0079);
}

}  // namespace
}  // namespace sapwood
