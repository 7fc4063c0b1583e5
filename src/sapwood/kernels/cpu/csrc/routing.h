// Which experts compute a token.
#pragma once

#include <cstdint>

#include "ops.h"

namespace sapwood {

enum class Scores : int { softmax = 0, sigmoid = 1, sparsemixer = 2 };

// A rule; kernels/routing.py says what its numbers mean.
struct Routing {
  Scores scores;
  std::int64_t chosen, groups, groups_chosen, group_best;
  bool renormalise;
  float least_sum, scale, jitter;
};

// logits [tokens, experts], bias [experts] or null -> weights and ids [tokens, routing.chosen].
void route(const Routing& routing, const float* logits, const float* bias, std::int64_t tokens, std::int64_t experts,
           float* weights, std::int64_t* ids, const Team& team);

// x[row] *= 1 / (1 + e^-gate[row]), for x [rows, width] and gate [rows], both of `dtype`.
void gate_rows(DType dtype, void* x, const void* gate, std::int64_t rows, std::int64_t width);

}  // namespace sapwood
