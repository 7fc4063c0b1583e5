// A mixture of experts: which experts compute a token, and their feed-forward layers.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

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
           float* weights, std::int64_t* ids);

// x[row] *= 1 / (1 + e^-gate[row]), for x [rows, width] and gate [rows], both of `dtype`.
void gate_rows(DType dtype, void* x, const void* gate, std::int64_t rows, std::int64_t width);

// The layers of all experts, in any format; gate_up[e] makes the gate's outputs first.
struct ExpertLayers {
  std::vector<LinearWeight> gate_up, down;
  Activation activation;

  std::int64_t hidden() const { return gate_up.front().k; }
  std::int64_t inner() const { return down.front().k; }
};

// The rows of x [tokens, hidden] and what is chosen for each: `k` experts and weights.
struct ExpertRows {
  const void* x;
  std::int64_t tokens, k;
  const std::int64_t* ids;
  const float* weights;
};

// out [tokens, hidden] of `dtype`: of each token the sum over its experts of weight * down(activation(gate) * up),
// in fp32 and in the order of the experts. Rows are sorted by expert: each expert that was chosen reads its weights
// once, for all its rows, with the products of a linear layer. Keeps its buffers between calls.
class Mixture {
 public:
  // The context's mutex is held by the caller.
  void run(Context& context, DType dtype, const ExpertLayers& layers, const ExpertRows& rows, void* out);

 private:
  Buffer gathered_, gates_, activated_, result_, sum_;
  std::vector<std::int64_t> begins_, order_;
};

}  // namespace sapwood
