// Attention of every token to all tokens of its text: the texts of a step become tasks.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"
#include "ops.h"

namespace sapwood {

// q, k, v are [T, H, D], and `*_stride` elements lie between two tokens; out is contiguous.
struct BothWaysInputs {
  int num_heads, head_dim;
  float scale;
  const void *q, *k, *v;
  std::int64_t q_stride, k_stride, v_stride;
  void* out;
};

// Throws std::invalid_argument for sizes that cannot be, std::out_of_range for rows that are no tokens.
void attend_both_ways(Context& context, DType dtype, const BothWaysInputs& inputs,
                      const std::vector<BothWaysText>& texts, std::int64_t num_tokens);

}  // namespace sapwood
