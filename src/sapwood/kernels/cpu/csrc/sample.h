// Drawing one token per row of logits, without sorting the vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace sapwood {

// How one row's token is drawn: top-k, then top-p of what that kept, then min-p of what is left.
struct Draw {
  double temperature;
  std::int64_t top_k;  // less than 1: all
  double top_p, min_p;
  double number;  // in [0, 1): where in the distribution
};

// logits [draws.size(), vocab] of `dtype` -> out[draws.size()]. A row's token depends on that row's
// logits and draw alone.
void sample(Context& context, DType dtype, const void* logits, std::int64_t vocab,
            const std::vector<Draw>& draws, std::int64_t* out);

}  // namespace sapwood
