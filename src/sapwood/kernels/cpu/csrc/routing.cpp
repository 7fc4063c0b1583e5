#include "routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "narrow.h"
#include "tasks.h"

namespace sapwood {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kScoresPerThread = 2048;

// Places of the `count` largest of n scores, of equal ones the first. NaN counts as the least.
void best(const float* scores, std::int64_t n, std::int64_t count, std::vector<std::int64_t>& places) {
  const auto value = [&](std::int64_t i) { return scores[i] != scores[i] ? kNever : scores[i]; };
  places.clear();
  for (std::int64_t i = 0; i < n; i++) {
    const float own = value(i);
    if (static_cast<std::int64_t>(places.size()) == count) {
      if (own <= value(places.back())) continue;
      places.pop_back();
    }
    auto at = places.end();
    while (at != places.begin() && value(*(at - 1)) < own) --at;
    places.insert(at, i);
  }
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

void route_tokens(const Routing& r, const float* logits, const float* bias, std::int64_t tokens, std::int64_t experts,
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

}  // namespace

void route(const Routing& r, const float* logits, const float* bias, std::int64_t tokens, std::int64_t experts,
           float* weights, std::int64_t* ids, const Team& team) {
  const std::int64_t grain = std::max<std::int64_t>(1, kScoresPerThread / experts);
  run_parts(team, tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    route_tokens(r, logits + begin * experts, bias, end - begin, experts, weights + begin * r.chosen,
                 ids + begin * r.chosen);
  });
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

}  // namespace sapwood
