// The feed-forward layers of a mixture of experts.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"
#include "low_rank.h"

namespace sapwood {

// The layers of all experts, in any format; gate_up[e] makes the gate's outputs first, or has no gate.
struct ExpertLayers {
  std::vector<LinearWeight> gate_up, down;
  Activation activation;
  float limit;  // of the gate and the other factor, to which 1 is added then; 0: none

  std::int64_t hidden() const { return gate_up.front().k; }
  std::int64_t inner() const { return down.front().k; }
  // Whether the first layers have outputs besides the activation's.
  bool gated() const {
    std::int64_t outputs = 0;
    for (const LinearWeight* part = &gate_up.front(); part != nullptr; part = part->next) outputs += part->n;
    return outputs > inner();
  }
};

// The rows of x [tokens, hidden] and what is chosen for each: `k` experts and weights.
struct ExpertRows {
  const void* x;
  std::int64_t tokens, k;
  const std::int64_t* ids;
  const float* weights;
};

// What adapters add to the layers of each expert; empty: no adapter can add.
struct ExpertAdditions {
  std::vector<const LowRankLayer*> gate_up, down;

  // Whether an adapter of the step adds to one of these layers.
  bool has(const AdapterRows& rows) const;
};

// out [tokens, hidden] of `dtype`: of each token the sum over its experts of weight * down(activation(gate) * up), or
// without gates of weight * down(activation(up)),
// in fp32 and in the order of the experts. Keeps its buffers between calls.
//
// A pair is a token and one of its experts; pairs are sorted by expert. There are two rounds of tasks, each of which
// multiplies some pairs of one expert with some of its outputs, by one thread alone. So each expert that was chosen
// is read once per round, and the threads meet twice. The second round begins with activation(gate) * up:
//   few pairs   a task makes outputs of down for its pairs; what is then added up stays in the cache
//   many pairs  a task makes some outputs for all pairs, expert by expert, and adds them up itself: results of all
//               pairs would go to memory and back
// If adapters add to experts, a task of the first round has all outputs of its expert, to which the adapters of its
// pairs add before the activation; what adapters add to down comes in a third round, token by token.
class Mixture {
 public:
  // The context's mutex is held by the caller. additions: null, or of these layers; adapters: of the rows
  void run(Context& context, DType dtype, const ExpertLayers& layers, const ExpertRows& rows, void* out,
           const ExpertAdditions* additions = nullptr, const AdapterRows* adapters = nullptr);

 private:
  class Round;
  struct Worker {
    Buffer rows, gates, results, scratch, wide, shrunk;
    AdapterRows adapters;                // of a task's pairs
    std::vector<std::int64_t> adapted;  // the rows of `adapters`
  };

  std::vector<Worker> workers_;
  Buffer activated_, results_, sums_;
  std::vector<std::int64_t> begins_, order_;
};

}  // namespace sapwood
