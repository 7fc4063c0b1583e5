// Rows of latent attention, attention to them, and the keys that an indexer chooses.
#pragma once

#include <numeric>

#include "attention_ops.h"
#include "key_choice.h"

namespace sapwood {
namespace {

constexpr std::int64_t kLatentPages = 13;

// Rotates queries, norms, rotates and writes the rows of all slots, and compares both with plain loops.
void write_rows(Context& context, DType dtype, Cache& cache, int rank) {
  Random random(41);
  const std::int64_t slots = kLatentPages * kPageSize, row = cache.d, rope = row - rank, rotary = rope - 2;
  const std::int64_t key_dim = rope + 5, stride = row + 3;
  constexpr int heads = 2;
  Array q(dtype, static_cast<std::size_t>(slots * heads * key_dim), random);
  Array latent(dtype, static_cast<std::size_t>(slots * stride), random), norm(dtype, static_cast<std::size_t>(rank), random);
  std::vector<double> q_expected = q.numbers(), expected, actual;
  std::vector<float> cos_sin(static_cast<std::size_t>(slots * rotary));
  for (float& x : cos_sin) x = static_cast<float>(random.unit());
  std::vector<std::int64_t> positions, write_index;
  for (std::int64_t i = 0; i < slots; i++) {
    positions.push_back(slots - 1 - i);
    write_index.push_back(i * 7 % slots);  // slots is no multiple of 7
  }
  // The first entries of `x` turn, in halves.
  const auto turn = [&](double* x, std::int64_t token) {
    const float* cosine = cos_sin.data() + positions[static_cast<std::size_t>(token)] * rotary;
    const std::int64_t half = rotary / 2;
    for (std::int64_t i = 0; i < half; i++) {
      const double first = x[i], second = x[half + i];
      x[i] = first * cosine[i] - second * cosine[half + i];
      x[half + i] = first * cosine[half + i] + second * cosine[i];
    }
  };
  for (std::int64_t token = 0; token < slots; token++) {
    for (int head = 0; head < heads; head++) {
      turn(q_expected.data() + (token * heads + head) * key_dim + key_dim - rope, token);
    }
    std::vector<double> x;
    double squares = 0;
    for (std::int64_t i = 0; i < row; i++) x.push_back(latent[static_cast<std::size_t>(token * stride + i)]);
    for (std::int64_t i = 0; i < rank; i++) squares += x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(i)];
    const double factor = 1 / std::sqrt(squares / rank + 1e-5);
    for (std::int64_t i = 0; i < rank; i++) x[static_cast<std::size_t>(i)] *= factor * norm[static_cast<std::size_t>(i)];
    turn(x.data() + rank, token);
    expected.insert(expected.end(), x.begin(), x.end());
  }
  LatentRopeArgs args{};
  args = {q.data(), slots, heads, static_cast<int>(key_dim), latent.data(), stride, rank, static_cast<int>(row),
          static_cast<int>(rotary), static_cast<int>(kPageSize), norm.data(), 1e-5f, cos_sin.data(), positions.data(),
          write_index.data(), cache.bytes.data(), cache.stride(), cache.format, context.team()};
  context.ops().norm_rope_write_latent(dtype, args);
  for (const std::int64_t slot : write_index) {
    for (std::int64_t i = 0; i < row; i++) actual.push_back(cache.at(slot, 0, i));
  }
  const std::string what = std::string("norm_rope_write_latent ") + name_of(dtype);
  check(what + " q", q.numbers(), q_expected, tolerance_of(dtype));
  check(what + " rows", actual, expected,
        cache.format == KvFormat::dense ? tolerance_of(dtype) : kv_tolerance(cache.format));
}

// A decode, a part of a prompt, and a new prompt; then attention to some of the keys alone.
void test_latent_attention(Context& context, DType dtype, KvFormat format, int heads, int row, int rank) {
  Cache cache(format, dtype, kLatentPages, 1, kPageSize, row);
  write_rows(context, dtype, cache, rank);
  Random random(42);
  const AttentionPlan::Lengths lengths{{1, 5, 20}, {90, 40, 20}};
  const std::int64_t max_pages = 6, num_tokens = 26, chosen = 7;
  std::vector<std::int32_t> table(static_cast<std::size_t>(3 * max_pages));
  std::int32_t page = 0;
  std::vector<std::vector<std::int64_t>> slots_of;  // of the keys that each token sees
  for (std::size_t r = 0; r < 3; r++) {
    std::int32_t* own = table.data() + static_cast<std::int64_t>(r) * max_pages;
    for (std::int64_t i = 0; i * kPageSize < lengths.context[r]; i++) own[i] = page++ * 5 % kLatentPages;
    for (std::int64_t i = lengths.context[r] - lengths.query[r]; i < lengths.context[r]; i++) {
      std::vector<std::int64_t> slots;
      for (std::int64_t key = 0; key <= i; key++) slots.push_back(own[key / kPageSize] * kPageSize + key % kPageSize);
      slots_of.push_back(slots);
    }
  }
  const std::size_t width = static_cast<std::size_t>(heads * row), out_width = static_cast<std::size_t>(heads * rank);
  Array q(dtype, num_tokens * width, random), out(dtype, num_tokens * out_width);
  const float scale = 1 / std::sqrt(static_cast<float>(row));
  const auto compare = [&](const AttentionPlan& plan, int page_size, const char* what) {
    plan.run(context, dtype, {q.data(), static_cast<std::int64_t>(width), cache.bytes.data(), cache.stride(),
                              cache.bytes.data(), cache.stride(), format, out.data(), scale, {}, rank, page_size});
    std::vector<double> expected(out.size());
    for (std::size_t i = 0; i < static_cast<std::size_t>(num_tokens * heads); i++) {
      std::vector<double> weights;
      for (const std::int64_t slot : slots_of[i / static_cast<std::size_t>(heads)]) {
        double score = 0;
        for (int d = 0; d < row; d++) score += q[i * static_cast<std::size_t>(row) + static_cast<std::size_t>(d)] * cache.at(slot, 0, d);
        weights.push_back(std::exp(score * scale));
      }
      const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (std::size_t key = 0; key < weights.size(); key++) {
        const std::int64_t slot = slots_of[i / static_cast<std::size_t>(heads)][key];
        for (int d = 0; d < rank; d++) expected[i * static_cast<std::size_t>(rank) + static_cast<std::size_t>(d)] += weights[key] / total * cache.at(slot, 0, d);
      }
    }
    check(std::string(what) + " " + name_of(dtype) + " format " + std::to_string(static_cast<int>(format)) + " heads " +
              std::to_string(heads), out.numbers(), expected, dtype == DType::f32 ? 1e-5 : 0.0079);
  };
  const auto address = [](const std::vector<std::int32_t>& x) { return reinterpret_cast<std::uintptr_t>(x.data()); };
  compare(AttentionPlan({heads, 1, row, static_cast<int>(kPageSize), kLatentPages}, address(table), max_pages, max_pages,
                        lengths, {}, 0, context.threads()), 0, "latent attention");
  std::vector<std::int32_t> places(static_cast<std::size_t>(num_tokens * chosen));
  AttentionPlan::Lengths alone;
  for (std::size_t token = 0; token < slots_of.size(); token++) {
    std::vector<std::int64_t>& slots = slots_of[token];
    while (static_cast<std::int64_t>(slots.size()) > chosen) slots.erase(slots.begin() + random.below(static_cast<int>(slots.size())));
    std::copy(slots.begin(), slots.end(), places.begin() + static_cast<std::int64_t>(token) * chosen);
    alone.query.push_back(1);
    alone.context.push_back(static_cast<std::int64_t>(slots.size()));
  }
  compare(AttentionPlan({heads, 1, row, 1, kLatentPages * kPageSize}, address(places), chosen, chosen, alone, {}, 0,
                        context.threads()), static_cast<int>(kPageSize), "sparse attention");
}

// Each chosen key has at least the score of each that is left out.
void test_choose_keys(Context& context, DType dtype, KvFormat format) {
  constexpr int heads = 5, d = 64;
  constexpr std::int64_t chosen = 6, num_tokens = 12;
  Cache cache(format, dtype, kLatentPages, 1, kPageSize, d);
  write_rows(context, dtype, cache, 32);
  Random random(43);
  const std::vector<std::int32_t> table{4, 2, 9, 0, 7, 1, 3, 0, 0, 0};
  Array q(dtype, num_tokens * heads * d, random), weights(DType::f32, num_tokens * heads, random);
  std::vector<std::int64_t> got(num_tokens * chosen);
  KeyChoice choice{};
  choice.q = q.data();
  choice.weights = weights.wide.data();
  choice.num_heads = heads;
  choice.head_dim = d;
  choice.keys = cache.bytes.data();
  choice.page_stride = cache.stride();
  choice.kv = format;
  choice.num_pages = kLatentPages;
  choice.page_size = static_cast<int>(kPageSize);
  choice.page_table = table.data();
  choice.page_table_stride = choice.max_pages = 5;
  choice.query = {3, 9};
  choice.context = {77, 9};
  choice.num_chosen = chosen;
  choice.out = got.data();
  choose_keys(context, dtype, choice);
  const std::string what = std::string("choose_keys ") + name_of(dtype) + " format " + std::to_string(static_cast<int>(format));
  for (std::size_t token = 0; token < num_tokens; token++) {
    const bool is_first = token < 3;
    const std::int64_t sees = is_first ? 75 + static_cast<std::int64_t>(token) : static_cast<std::int64_t>(token) - 2;
    std::vector<double> scores;
    for (std::int64_t key = 0; key < sees; key++) {
      const std::int64_t slot = table[static_cast<std::size_t>((is_first ? 0 : 5) + key / kPageSize)] * kPageSize + key % kPageSize;
      double score = 0;
      for (std::size_t row = token * heads; row < (token + 1) * heads; row++) {
        double product = 0;
        for (std::size_t i = 0; i < d; i++) product += q[row * d + i] * cache.at(slot, 0, static_cast<std::int64_t>(i));
        score += weights[row] * std::max(product, 0.0);
      }
      scores.push_back(score);
    }
    double least = kInfinity, most_left_out = -kInfinity;
    std::int64_t before = -1;
    std::vector<bool> is_chosen(scores.size());
    for (std::size_t i = 0; i < chosen; i++) {
      const std::int64_t key = got[token * chosen + i];
      if (static_cast<std::int64_t>(i) >= sees) {
        if (key != -1) fail(what, "a key beyond those that are seen");
        continue;
      }
      if (key <= before || key >= sees) return fail(what, "keys that do not ascend, or are not seen");
      before = key;
      is_chosen[static_cast<std::size_t>(key)] = true;
      least = std::min(least, scores[static_cast<std::size_t>(key)]);
    }
    for (std::size_t i = 0; i < scores.size(); i++) {
      if (!is_chosen[i]) most_left_out = std::max(most_left_out, scores[i]);
    }
    const double close = format == KvFormat::dense || dtype == DType::f32 ? 1e-3 : 0.05;  // rounded to bf16 once more
    if (least < most_left_out - close) fail(what, "a key with a lower score than one that is left out");
  }
}

}  // namespace
}  // namespace sapwood
