// Sampling one token per row of logits, without sorting the vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace sapwood {

// How one row's token is sampled: top-k, then top-p among the tokens that top-k keeps, then min-p among
// those that are left. An entry of the Python side's SamplingSettings, which has those of all rows.
struct SamplingSettings {
  double temperature;
  std::int64_t top_k;  // less than 1: all
  double top_p, min_p;
  double number;  // in [0, 1): the token's place in the distribution
};

// logits [n, vocab] of `dtype`, settings of n rows -> out [n]. A row's token depends on that row's logits
// and settings alone.
void sample(Context& context, DType dtype, const void* logits, std::int64_t vocab,
            const std::vector<SamplingSettings>& settings_of_rows, std::int64_t* out);

}  // namespace sapwood
