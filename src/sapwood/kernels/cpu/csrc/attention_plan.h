// The tasks of a step's attention: checked and cut once per step, run in every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "context.h"

namespace sapwood {

class AttentionPlan {
 public:
  struct Shape {
    int num_heads, num_kv_heads, head_dim, page_size;
    std::int64_t num_pages;
  };

  // Requests with one new token each whose first pages are the same. All of them attend to these
  // together: keys and values are read once, and their queries are rows of the same tiles.
  struct Group {
    std::vector<std::int64_t> requests;  // ascending; each request in at most one group
    std::int64_t num_pages;
  };

  // The batch's requests, one entry each.
  struct Lengths {
    std::vector<std::int64_t> query, context;
  };

  // page_table [R, stride] int32 stays owned by the caller and must outlive the plan.
  // Throws std::invalid_argument / std::out_of_range for lengths, pages or groups that do not fit.
  AttentionPlan(const Shape& shape, std::uintptr_t page_table, std::int64_t page_table_stride,
                std::int64_t max_pages, const Lengths& lengths, const std::vector<Group>& groups, int threads);

  // One layer's queries, caches and result; shapes as in AttentionArgs.
  struct Tensors {
    const void* q;
    std::int64_t q_stride;
    const void* keys;
    std::int64_t key_stride;
    const void* values;
    std::int64_t value_stride;
    KvFormat kv;
    void* out;
    float scale;
  };

  void run(Context& context, DType dtype, const Tensors& tensors) const;
  // The same, with the context's mutex held by the caller.
  void run_held(Context& context, DType dtype, const Tensors& tensors) const;

  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t num_tasks() const { return static_cast<std::int64_t>(tasks_.size()); }
  std::int64_t num_merges() const { return static_cast<std::int64_t>(merges_.size()); }

 private:
  // Where the partial results are that one request has from its group.
  struct Shared {
    std::int64_t num_keys = 0;  // the request's own tasks begin after these
    AttentionParts parts{};     // of the first kv head
    std::int64_t head_rows = 0;  // from one kv head's parts to the next one's
  };

  void check_pages(std::int64_t max_pages, std::size_t request, const Lengths& lengths) const;
  void check_group(const Group& group, const Lengths& lengths, const std::vector<Shared>& shared) const;
  void add_group(const Group& group, const std::vector<std::int64_t>& first_rows, int threads,
                 std::vector<Shared>& shared);
  void add_request(std::size_t request, std::int64_t first_row, const Lengths& lengths,
                   const Shared& shared, std::int64_t chunk);
  // Returns the parts that the keys [begin, end) were cut into; none if the result is whole.
  AttentionParts add_tasks(AttentionTask task, std::int64_t chunk, bool whole);

  int group() const { return shape_.num_heads / shape_.num_kv_heads; }
  std::int64_t tokens_per_tile() const;
  // Keys per task such that every thread has several tasks, however few requests there are.
  std::int64_t split_length(const Lengths& lengths, const std::vector<Shared>& shared, int threads) const;

  Shape shape_;
  const std::int32_t* page_table_;
  std::int64_t page_table_stride_;
  std::int64_t num_tokens_ = 0, num_partial_rows_ = 0;
  std::int64_t num_key_entries_ = 0;
  int rows_per_tile_ = 1;
  std::vector<AttentionTask> tasks_;
  std::vector<AttentionMerge> merges_;
  std::vector<std::int32_t> shared_tokens_;
};

}  // namespace sapwood
