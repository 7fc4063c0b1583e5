// A linear layer of each head, as latent attention has between queries, rows and results.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace sapwood {

// Heads of tokens, entries of the dtype of a call: where token t, head h begins is t * token + h * head.
struct HeadRows {
  void* data;
  std::int64_t token, head;
};

class HeadProducts {
 public:
  // A dense weight per head, all of one size. Throws std::invalid_argument for others.
  explicit HeadProducts(std::vector<LinearWeight> weights);
  HeadProducts(const HeadProducts&) = delete;
  HeadProducts& operator=(const HeadProducts&) = delete;

  // out[t, h] = weight[h] x[t, h], and then the `kept` entries that follow in x[t, h]. One thread computes a
  // head: each weight is read once. The context's mutex is held by the caller.
  void run(Context& context, DType dtype, const HeadRows& x, const HeadRows& out, std::int64_t tokens,
           std::int64_t kept);

  std::int64_t num_heads() const { return static_cast<std::int64_t>(weights_.size()); }
  std::int64_t num_out() const { return weights_[0].n; }
  std::int64_t num_in() const { return weights_[0].k; }

 private:
  struct Worker {
    Buffer scratch, wide;
  };
  std::vector<LinearWeight> weights_;
  std::vector<Worker> workers_;
};

}  // namespace sapwood
