#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "narrow.h"

namespace sapwood {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kRowsToFetchAhead = 8;        // as in a recorded step
constexpr std::int64_t kElementsPerThread = 65536;   // of rows that are copied or added

// Places of the `count` largest of n scores, of equal ones the first. NaN counts as the least.
void best(const float* scores, std::int64_t n, std::int64_t count, std::vector<std::int64_t>& places) {
  const auto value = [&](std::int64_t i) { return scores[i] != scores[i] ? kNever : scores[i]; };
  places.resize(static_cast<std::size_t>(n));
  std::iota(places.begin(), places.end(), 0);
  std::partial_sort(places.begin(), places.begin() + count, places.end(), [&](std::int64_t a, std::int64_t b) {
    const float left = value(a), right = value(b);
    return left > right || (left == right && a < b);
  });
}

// x[i] becomes e^(x[i] - the largest), and then its share of their sum.
void softmax(float* x, std::int64_t n) {
  const float top = *std::max_element(x, x + n);
  float sum = 0.0f;
  for (std::int64_t i = 0; i < n; i++) sum += x[i] = std::exp(x[i] - top);
  for (std::int64_t i = 0; i < n; i++) x[i] /= sum;
}

struct Scratch {
  std::vector<float> scores, wanted, sorted, of_groups;
  std::vector<std::int64_t> places;
};

// wanted[i] = -inf outside the best groups
void keep_groups(const Routing& r, Scratch& s, std::int64_t experts) {
  const std::int64_t size = experts / r.groups;
  s.of_groups.resize(static_cast<std::size_t>(r.groups));
  for (std::int64_t g = 0; g < r.groups; g++) {
    const float* group = s.wanted.data() + g * size;
    best(group, size, r.group_best, s.places);
    float sum = 0.0f;
    for (std::int64_t i = 0; i < r.group_best; i++) sum += group[s.places[static_cast<std::size_t>(i)]];
    s.of_groups[static_cast<std::size_t>(g)] = sum;
  }
  best(s.of_groups.data(), r.groups, r.groups_chosen, s.places);
  std::vector<bool> is_in(static_cast<std::size_t>(r.groups));
  for (std::int64_t i = 0; i < r.groups_chosen; i++) {
    is_in[static_cast<std::size_t>(s.places[static_cast<std::size_t>(i)])] = true;
  }
  for (std::int64_t i = 0; i < experts; i++) {
    if (!is_in[static_cast<std::size_t>(i / size)]) s.wanted[static_cast<std::size_t>(i)] = kNever;
  }
}

void sparsemixer(const Routing& r, const float* logits, std::int64_t experts, Scratch& s, float* weights,
                 std::int64_t* ids) {
  s.wanted.assign(logits, logits + experts);
  for (std::int64_t i = 0; i < r.chosen; i++) {
    best(s.wanted.data(), experts, 1, s.places);
    const std::int64_t chosen = s.places[0];
    const float top = s.wanted[static_cast<std::size_t>(chosen)];
    s.scores = s.wanted;
    for (std::int64_t e = 0; e < experts; e++) {
      const float size = std::max(std::abs(logits[e]), top);
      if ((top - logits[e]) / size > 2 * r.jitter) s.scores[static_cast<std::size_t>(e)] = kNever;
    }
    softmax(s.scores.data(), experts);
    weights[i] = s.scores[static_cast<std::size_t>(chosen)] * r.scale;
    ids[i] = chosen;
    s.wanted[static_cast<std::size_t>(chosen)] = kNever;
  }
}

// Calls body(begin, end) with parts of [0, rows), on several threads if the rows are long enough together.
template <class Body>
void each_rows(const Team& team, std::int64_t rows, std::int64_t width, const Body& body) {
  const std::int64_t worth = rows * width / kElementsPerThread;
  const int threads = static_cast<int>(std::clamp<std::int64_t>(worth, 1, std::min<std::int64_t>(team.threads, rows)));
  if (threads == 1) return body(0, rows);
  std::atomic<int> next{0};
  const auto take = [&] {
    for (int part; (part = next++) < threads;) body(rows * part / threads, rows * (part + 1) / threads);
  };
  const auto run = [](const void* job, int) { (*static_cast<const decltype(take)*>(job))(); };
  team.launch(team.pool, threads, run, &take);
}

}  // namespace

void route(const Routing& r, const float* logits, const float* bias, std::int64_t tokens, std::int64_t experts,
           float* weights, std::int64_t* ids) {
  Scratch s;
  for (std::int64_t t = 0; t < tokens; t++, logits += experts, weights += r.chosen, ids += r.chosen) {
    if (r.scores == Scores::sparsemixer) {
      sparsemixer(r, logits, experts, s, weights, ids);
      continue;
    }
    s.scores.assign(logits, logits + experts);
    if (r.scores == Scores::softmax) {
      softmax(s.scores.data(), experts);
    } else {
      for (float& score : s.scores) score = 1.0f / (1.0f + std::exp(-score));
    }
    s.wanted = s.scores;
    for (std::int64_t e = 0; bias != nullptr && e < experts; e++) s.wanted[static_cast<std::size_t>(e)] += bias[e];
    if (r.groups_chosen < r.groups) keep_groups(r, s, experts);
    best(s.wanted.data(), experts, r.chosen, s.places);
    float sum = 0.0f;
    for (std::int64_t i = 0; i < r.chosen; i++) {
      ids[i] = s.places[static_cast<std::size_t>(i)];
      sum += weights[i] = s.scores[static_cast<std::size_t>(ids[i])];
    }
    for (std::int64_t i = 0; i < r.chosen; i++) {
      if (r.renormalise) weights[i] /= std::max(sum, r.least_sum);
      weights[i] *= r.scale;
    }
  }
}

void gate_rows(DType dtype, void* x, const void* gate, std::int64_t rows, std::int64_t width) {
  const auto factor = [](float logit) { return 1.0f / (1.0f + std::exp(-logit)); };
  for (std::int64_t row = 0; row < rows; row++) {
    if (dtype == DType::f32) {
      const float by = factor(static_cast<const float*>(gate)[row]);
      float* own = static_cast<float*>(x) + row * width;
      for (std::int64_t i = 0; i < width; i++) own[i] *= by;
    } else {
      const float by = factor(widened(static_cast<const std::uint16_t*>(gate)[row]));
      std::uint16_t* own = static_cast<std::uint16_t*>(x) + row * width;
      for (std::int64_t i = 0; i < width; i++) own[i] = narrowed(widened(own[i]) * by);
    }
  }
}

void Mixture::run(Context& context, DType dtype, const ExpertLayers& layers, const ExpertRows& rows, void* out) {
  const std::int64_t hidden = layers.hidden(), inner = layers.inner(), pairs = rows.tokens * rows.k;
  const std::int64_t experts = static_cast<std::int64_t>(layers.gate_up.size());
  check_indices("an expert", rows.ids, pairs, experts);
  // The pairs of a token and one of its experts, sorted by expert.
  begins_.assign(static_cast<std::size_t>(experts) + 1, 0);
  for (std::int64_t i = 0; i < pairs; i++) begins_[static_cast<std::size_t>(rows.ids[i]) + 1]++;
  std::int64_t most = 0;
  for (std::size_t e = 1; e < begins_.size(); e++) {
    most = std::max(most, begins_[e]);
    begins_[e] += begins_[e - 1];
  }
  order_.resize(static_cast<std::size_t>(pairs));
  std::vector<std::int64_t> next(begins_.begin(), begins_.end() - 1);
  for (std::int64_t i = 0; i < pairs; i++) {
    order_[static_cast<std::size_t>(next[static_cast<std::size_t>(rows.ids[i])]++)] = i;
  }
  const std::size_t element = dtype == DType::f32 ? 4 : 2;
  const auto bytes = [&](std::int64_t width, std::size_t each) { return static_cast<std::size_t>(most * width) * each; };
  std::byte* gathered = gathered_.at_least(bytes(hidden, element));
  std::byte* gates = gates_.at_least(bytes(2 * inner, element));
  std::byte* activated = activated_.at_least(bytes(inner, element));
  float* result = reinterpret_cast<float*>(result_.at_least(bytes(hidden, 4)));
  float* sum = reinterpret_cast<float*>(sum_.at_least(static_cast<std::size_t>(rows.tokens * hidden) * 4));
  std::fill(sum, sum + rows.tokens * hidden, 0.0f);
  const Team team = context.team();
  for (std::size_t e = 0; e < layers.gate_up.size(); e++) {
    const std::int64_t count = begins_[e + 1] - begins_[e];
    if (count == 0) continue;
    const std::int64_t* own = order_.data() + begins_[e];
    each_rows(team, count, hidden, [&](std::int64_t begin, std::int64_t end) {
      const std::size_t row_bytes = static_cast<std::size_t>(hidden) * element;
      for (std::int64_t i = begin; i < end; i++) {
        std::memcpy(gathered + static_cast<std::size_t>(i) * row_bytes,
                    static_cast<const std::byte*>(rows.x) + static_cast<std::size_t>(own[i] / rows.k) * row_bytes,
                    row_bytes);
      }
    });
    const bool fetches = count <= kRowsToFetchAhead;
    context.linear(layers.gate_up[e], dtype, gathered, hidden, count, gates);
    if (fetches) context.fetch(layers.down[e]);
    context.ops().activate_and_mul(dtype, layers.activation, gates, activated, count, inner, team);
    context.linear_fp32(layers.down[e], dtype, activated, inner, count, result);
    std::size_t following = e + 1;
    while (following + 1 < begins_.size() && begins_[following + 1] == begins_[following]) following++;
    if (fetches && following + 1 < begins_.size()) context.fetch(layers.gate_up[following]);
    each_rows(team, count, hidden, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; i++) {
        const float weight = rows.weights[own[i]];
        float* to = sum + own[i] / rows.k * hidden;
        for (std::int64_t j = 0; j < hidden; j++) to[j] += weight * result[i * hidden + j];
      }
    });
  }
  if (dtype == DType::f32) {
    std::memcpy(out, sum, static_cast<std::size_t>(rows.tokens * hidden) * 4);
  } else {
    std::uint16_t* to = static_cast<std::uint16_t*>(out);
    for (std::int64_t i = 0; i < rows.tokens * hidden; i++) to[i] = narrowed(sum[i]);
  }
}

}  // namespace sapwood
