// The tasks of a step's attention: checked and cut once per step and window, run in every layer.
#pragma once

#include <cstdint>
#include <map>
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

  // page_table [R, stride] int32 stays owned by the caller and must outlive the plan. Entries of pages
  // that no layer's window reaches are not looked at. The same holds for sees [T] int64, which may be null: each token
  // sees all new tokens up to itself. Bit j: the token sees its request's new token j, itself included, of which there
  // are at most 64 if a bit up to its own is missing; -1: all up to itself.
  // Throws std::invalid_argument / std::out_of_range for lengths or groups that do not fit.
  AttentionPlan(const Shape& shape, std::uintptr_t page_table, std::int64_t page_table_stride,
                std::int64_t max_pages, const Lengths& lengths, const std::vector<Group>& groups, std::uintptr_t sees,
                int threads);

  // Makes the tasks of layers with this window (0: none), if there are none yet; run does so too. A plan
  // belongs to one thread at a time.
  // Throws std::out_of_range for a page that the cache does not have.
  void prepare(std::int64_t window) const { cut_of(window); }

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
    AttentionTraits traits{};
    int value_dim = 0;  // of a result; 0: head_dim
    // Where the plan's pages are single tokens of a cache (see pages.h): the tokens of its pages. 0: the plan's.
    int page_size = 0;
  };

  void run(Context& context, DType dtype, const Tensors& tensors) const;
  // The same, with the context's mutex held by the caller.
  void run_held(Context& context, DType dtype, const Tensors& tensors) const;

  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t num_tasks(std::int64_t window) const { return static_cast<std::int64_t>(cut_of(window).tasks.size()); }
  std::int64_t num_merges(std::int64_t window) const { return static_cast<std::int64_t>(cut_of(window).merges.size()); }

 private:
  // The tasks of one window.
  struct Cut {
    std::int64_t num_partial_rows = 0, num_key_entries = 0, num_first_tasks = 0;
    int rows_per_tile = 1;
    std::vector<AttentionTask> tasks;
    std::vector<AttentionMerge> merges;
    std::vector<std::int32_t> shared_tokens, shared_positions;
  };
  class Cutter;

  const Cut& cut_of(std::int64_t window) const;
  void check_lengths(std::int64_t max_pages, std::size_t request) const;
  void check_group(const Group& group, std::vector<bool>& is_taken) const;

  Shape shape_;
  const std::int32_t* page_table_;
  std::int64_t page_table_stride_;
  Lengths lengths_;
  std::vector<Group> groups_;
  const std::int64_t* sees_;
  int threads_;
  std::int64_t num_tokens_ = 0;
  mutable std::map<std::int64_t, Cut> cuts_;  // by window
};

}  // namespace sapwood
