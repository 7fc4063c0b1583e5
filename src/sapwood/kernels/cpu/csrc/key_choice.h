// The keys that an indexer chooses; see Kernels.choose_keys.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "attention_plan.h"
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
// The same, with the context's mutex held by the caller.
void choose_keys_held(Context& context, DType dtype, const KeyChoice& choice);

// A choice of keys, and attention to them: each token is a request of its own, whose pages are single keys.
class ChosenKeys {
 public:
  // choice.out is not looked at. As choose_keys_held; nothing is chosen if that throws.
  void choose(Context& context, DType dtype, KeyChoice choice);
  void forget() { num_tokens_ = 0; }
  bool any() const { return num_tokens_ > 0; }

  // Of heads that all read the same rows, [pages, page_size, row]; valid until the next choice.
  const AttentionPlan& plan(const Context& context, int num_heads, int row);

 private:
  std::int64_t num_tokens_ = 0, num_chosen_ = 0, num_places_ = 0;
  std::vector<std::int64_t> keys_;    // [tokens, num_chosen]
  std::vector<std::int32_t> places_;  // [tokens, num_chosen]: page * page_size + offset; after the last key anything
  AttentionPlan::Lengths lengths_;    // of the tokens
  std::optional<AttentionPlan> plan_;
  int num_heads_ = 0, row_ = 0;  // of the plan
};

}  // namespace sapwood
