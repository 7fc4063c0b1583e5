// The keys that an indexer chooses; see Kernels.choose_keys.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace sapwood {

struct KeyChoice {
  const void* q;         // [T, H, D], contiguous
  const float* weights;  // [T, H]
  int num_heads, head_dim;  // head_dim: a multiple of kHeadDimStep
  const void* keys;      // [pages, 1, page_size, D], pages page_stride elements apart
  std::int64_t page_stride;
  KvFormat kv;
  std::int64_t num_pages;
  int page_size;
  const std::int32_t* page_table;
  std::int64_t page_table_stride, max_pages;
  std::vector<std::int64_t> query, context;  // lengths of the requests
  std::int64_t num_chosen;
  std::int64_t* out;     // [T, num_chosen]
};

// Of keys with the same score those come first that lie earlier in the text.
// Throws std::invalid_argument or std::out_of_range for sizes, lengths or pages that do not fit.
void choose_keys(Context& context, DType dtype, const KeyChoice& choice);

}  // namespace sapwood
