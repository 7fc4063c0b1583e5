#include "attention_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sapwood {
namespace {

constexpr std::int64_t kMinSplit = 256;  // keys; a shorter part costs more in the merge than it gains
constexpr std::int64_t kTasksPerThread = 4;

}  // namespace

AttentionPlan::AttentionPlan(const Shape& shape, std::uintptr_t page_table,
                             std::int64_t page_table_stride, std::int64_t max_pages,
                             const Lengths& lengths, const std::vector<Group>& groups, int threads)
    : shape_(shape), page_table_(reinterpret_cast<const std::int32_t*>(page_table)),
      page_table_stride_(page_table_stride) {
  if (shape.num_kv_heads < 1 || shape.num_heads % shape.num_kv_heads != 0) {
    throw std::invalid_argument(std::to_string(shape.num_heads) + " query heads are not a multiple of " +
                                std::to_string(shape.num_kv_heads) + " key/value heads");
  }
  if (shape.head_dim % kHeadDimStep != 0 || shape.head_dim < 1 || shape.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim is " + std::to_string(shape.head_dim) +
                                " but must be a multiple of 32 and at most 512");
  }
  if (shape.page_size < 1) throw std::invalid_argument("page_size must be at least 1");
  if (lengths.query.size() != lengths.context.size()) {
    throw std::invalid_argument(std::to_string(lengths.query.size()) + " query lengths but " +
                                std::to_string(lengths.context.size()) + " context lengths");
  }
  std::vector<std::int64_t> first_rows;
  for (std::size_t i = 0; i < lengths.query.size(); i++) {
    check_pages(max_pages, i, lengths);
    first_rows.push_back(num_tokens_);
    num_tokens_ += lengths.query[i];
  }
  std::vector<Shared> shared(lengths.query.size());
  for (const Group& group : groups) {
    check_group(group, lengths, shared);
    add_group(group, first_rows, threads, shared);
  }
  const std::int64_t chunk = split_length(lengths, shared, threads);
  for (std::size_t i = 0; i < lengths.query.size(); i++) add_request(i, first_rows[i], lengths, shared[i], chunk);
  // The longest first: the last tasks to be taken are then the short ones, and threads end together.
  const auto cost = [](const AttentionTask& task) {
    return static_cast<std::int64_t>(task.num_queries + 1) * (task.kv_end - task.kv_begin);
  };
  std::stable_sort(tasks_.begin(), tasks_.end(),
                   [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
}

std::int64_t AttentionPlan::tokens_per_tile() const { return std::max(1, kQueryTile / group()); }

std::int64_t AttentionPlan::split_length(const Lengths& lengths, const std::vector<Shared>& shared,
                                         int threads) const {
  if (threads == 1) return INT64_MAX;
  std::int64_t total = 0, tasks = 0;
  for (std::size_t i = 0; i < lengths.query.size(); i++) {
    const std::int64_t tiles = (lengths.query[i] + tokens_per_tile() - 1) / tokens_per_tile();
    tasks += tiles * shape_.num_kv_heads;
    total += tiles * shape_.num_kv_heads * (lengths.context[i] - shared[i].num_keys);
  }
  if (tasks >= kTasksPerThread * threads * 4) return INT64_MAX;
  const std::int64_t even = (total + kTasksPerThread * threads - 1) / (kTasksPerThread * threads);
  return std::max(kMinSplit, (even + kKeyTile - 1) / kKeyTile * kKeyTile);
}

void AttentionPlan::check_pages(std::int64_t max_pages, std::size_t request, const Lengths& lengths) const {
  const std::int64_t query_len = lengths.query[request], context_len = lengths.context[request];
  const std::string who = "request " + std::to_string(request) + " of the batch ";
  if (query_len < 0 || query_len > context_len) {
    throw std::invalid_argument(who + "has " + std::to_string(query_len) + " new tokens in a context of " +
                                std::to_string(context_len));
  }
  const std::int64_t pages = (context_len + shape_.page_size - 1) / shape_.page_size;
  if (pages > max_pages) {
    throw std::invalid_argument(who + "needs " + std::to_string(pages) +
                                " pages but its row of the page table has " + std::to_string(max_pages));
  }
  const std::int32_t* row = page_table_ + static_cast<std::int64_t>(request) * page_table_stride_;
  for (std::int64_t i = 0; i < pages; i++) {
    if (row[i] < 0 || row[i] >= shape_.num_pages) {
      throw std::out_of_range(who + "names page " + std::to_string(row[i]) +
                              " but the cache has pages 0 to " + std::to_string(shape_.num_pages - 1));
    }
  }
}


void AttentionPlan::check_group(const Group& group, const Lengths& lengths,
                                const std::vector<Shared>& shared) const {
  if (group.requests.size() < 2 || group.num_pages < 1) {
    throw std::invalid_argument("a group that shares pages needs two requests and one page");
  }
  for (const std::int64_t request : group.requests) {
    const std::string who = "request " + std::to_string(request) + " of a group that shares " +
                            std::to_string(group.num_pages) + " pages ";
    if (request < 0 || request >= static_cast<std::int64_t>(lengths.query.size())) {
      throw std::out_of_range(who + "is none of the batch's " + std::to_string(lengths.query.size()));
    }
    const std::size_t i = static_cast<std::size_t>(request);
    if (lengths.query[i] != 1 || group.num_pages * shape_.page_size >= lengths.context[i]) {
      throw std::invalid_argument(who + "has " + std::to_string(lengths.query[i]) + " new tokens in a context of " +
                                  std::to_string(lengths.context[i]) + ", but needs one, after these pages");
    }
    const std::int32_t* pages = page_table_ + request * page_table_stride_;
    const std::int32_t* first = page_table_ + group.requests[0] * page_table_stride_;
    if (shared[i].num_keys > 0 ||
        std::memcmp(pages, first, static_cast<std::size_t>(group.num_pages) * sizeof(*pages)) != 0) {
      throw std::invalid_argument(who + "has other pages there, or is in two groups");
    }
  }
}

void AttentionPlan::add_group(const Group& group, const std::vector<std::int64_t>& first_rows, int threads,
                              std::vector<Shared>& shared) {
  const std::int64_t num_keys = group.num_pages * shape_.page_size;
  const std::int64_t count = static_cast<std::int64_t>(group.requests.size());
  const std::int64_t tiles = (count + tokens_per_tile() - 1) / tokens_per_tile();
  const std::int64_t height = (count + tiles - 1) / tiles;
  // All tiles of all heads together should be several tasks per thread.
  const std::int64_t tasks = tiles * shape_.num_kv_heads;
  const std::int64_t parts = threads == 1 ? 1 : (kTasksPerThread * threads + tasks - 1) / tasks;
  const std::int64_t chunk = std::max(kMinSplit, (num_keys / parts + kKeyTile - 1) / kKeyTile * kKeyTile);
  for (std::int64_t i = 0; i < count; i += height) {
    const std::int64_t num_queries = std::min(height, count - i);
    AttentionTask task{};
    task.request = static_cast<std::int32_t>(group.requests[0]);
    task.shared = static_cast<std::int32_t>(shared_tokens_.size());
    task.num_queries = static_cast<std::int32_t>(num_queries);
    task.first_position = static_cast<std::int32_t>(num_keys);  // every query sees all of these keys
    task.kv_end = static_cast<std::int32_t>(num_keys);
    for (std::int64_t j = i; j < i + num_queries; j++) {
      const std::size_t request = static_cast<std::size_t>(group.requests[static_cast<std::size_t>(j)]);
      shared_tokens_.push_back(static_cast<std::int32_t>(first_rows[request]));
    }
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      task.kv_head = head;
      const AttentionParts parts_of_head = add_tasks(task, chunk, false);
      for (std::int64_t j = 0; head == 0 && j < num_queries; j++) {
        Shared& of = shared[static_cast<std::size_t>(group.requests[static_cast<std::size_t>(i + j)])];
        of.num_keys = num_keys;
        of.parts = parts_of_head;
        of.parts.first_row += static_cast<std::int32_t>(j * this->group());
        of.head_rows = parts_of_head.count * parts_of_head.stride;
      }
    }
  }
}

void AttentionPlan::add_request(std::size_t request, std::int64_t first_row, const Lengths& lengths,
                                const Shared& shared, std::int64_t chunk) {
  const std::int64_t query_len = lengths.query[request], context_len = lengths.context[request];
  for (std::int64_t query = 0; query < query_len; query += tokens_per_tile()) {
    AttentionTask task{};
    task.request = static_cast<std::int32_t>(request);
    task.first_row = static_cast<std::int32_t>(first_row + query);
    task.shared = -1;
    task.num_queries = static_cast<std::int32_t>(std::min(tokens_per_tile(), query_len - query));
    task.first_position = static_cast<std::int32_t>(context_len - query_len + query);
    task.kv_begin = static_cast<std::int32_t>(shared.num_keys);
    task.kv_end = task.first_position + task.num_queries;
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      task.kv_head = head;
      const AttentionParts own = add_tasks(task, chunk, shared.parts.count == 0);
      if (own.count == 0) continue;
      AttentionParts before = shared.parts;
      before.first_row += static_cast<std::int32_t>(head * shared.head_rows);
      merges_.push_back({head, task.first_row, task.num_queries, before, own});
    }
  }
}

AttentionParts AttentionPlan::add_tasks(AttentionTask task, std::int64_t chunk, bool whole) {
  const std::int64_t begin = task.kv_begin, num_keys = task.kv_end - begin;
  const std::int64_t parts = (num_keys - 1) / chunk + 1;
  const std::int64_t part_len = (num_keys + parts - 1) / parts;
  const std::int64_t step = parts == 1 ? num_keys : (part_len + kKeyTile - 1) / kKeyTile * kKeyTile;
  const int rows = task.num_queries * group();
  rows_per_tile_ = std::max(rows_per_tile_, rows);
  AttentionParts made{static_cast<std::int32_t>(num_partial_rows_), 0, rows};
  for (std::int64_t done = 0; done < num_keys; done += step) {
    task.kv_begin = static_cast<std::int32_t>(begin + done);
    task.kv_end = static_cast<std::int32_t>(begin + std::min(num_keys, done + step));
    num_key_entries_ += static_cast<std::int64_t>(task.kv_end - task.kv_begin) * shape_.head_dim * rows;
    task.partial = -1;
    if (!whole || step < num_keys) {
      task.partial = static_cast<std::int32_t>(num_partial_rows_);
      num_partial_rows_ += rows;
      made.count++;
    }
    tasks_.push_back(task);
  }
  return made;
}

void AttentionPlan::run(Context& context, DType dtype, const Tensors& tensors) const {
  const std::lock_guard<std::mutex> lock(context.mutex);
  run_held(context, dtype, tensors);
}

void AttentionPlan::run_held(Context& context, DType dtype, const Tensors& tensors) const {
  AttentionArgs args{};
  args.tasks = tasks_.data();
  args.num_tasks = num_tasks();
  args.num_key_entries = num_key_entries_;
  args.merges = merges_.data();
  args.num_merges = num_merges();
  args.page_table = page_table_;
  args.page_table_stride = page_table_stride_;
  args.num_heads = shape_.num_heads;
  args.num_kv_heads = shape_.num_kv_heads;
  args.head_dim = shape_.head_dim;
  args.page_size = shape_.page_size;
  args.q = tensors.q;
  args.q_stride = tensors.q_stride;
  args.keys = tensors.keys;
  args.values = tensors.values;
  args.key_stride = tensors.key_stride;
  args.value_stride = tensors.value_stride;
  args.kv = tensors.kv;
  args.out = tensors.out;
  args.scale = tensors.scale;
  args.shared_tokens = shared_tokens_.data();
  args.scratch_stride = context.ops().attention_scratch(dtype, rows_per_tile_, shape_.head_dim);
  args.scratch = context.scratch.at_least(args.scratch_stride * static_cast<std::size_t>(context.threads()));
  args.rows_per_tile = rows_per_tile_;
  const std::int64_t partial_floats = num_partial_rows_ * partial_row_floats(shape_.head_dim);
  args.partials = reinterpret_cast<float*>(
      context.partials.at_least(static_cast<std::size_t>(partial_floats) * sizeof(float)));
  args.team = context.team();
  context.ops().paged_attention(dtype, args);
}

}  // namespace sapwood
