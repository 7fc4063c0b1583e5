#include "attention_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace sapwood {
namespace {

constexpr std::int64_t kMinSplit = 256;  // keys; a shorter part costs more in the merge than it gains
constexpr std::int64_t kTasksPerThread = 4;

}  // namespace

AttentionPlan::AttentionPlan(const Shape& shape, std::uintptr_t page_table,
                             std::int64_t page_table_stride, std::int64_t max_pages,
                             const Lengths& lengths, const std::vector<Group>& groups, std::uintptr_t sees,
                             int threads)
    : shape_(shape), page_table_(reinterpret_cast<const std::int32_t*>(page_table)),
      page_table_stride_(page_table_stride), lengths_(lengths), groups_(groups),
      sees_(reinterpret_cast<const std::int64_t*>(sees)), threads_(threads) {
  if (shape.num_kv_heads < 1 || shape.num_heads % shape.num_kv_heads != 0) {
    throw std::invalid_argument(std::to_string(shape.num_heads) + " query heads are not a multiple of " +
                                std::to_string(shape.num_kv_heads) + " key/value heads");
  }
  if (shape.head_dim % kHeadDimStep != 0 || shape.head_dim < 1 || shape.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim is " + std::to_string(shape.head_dim) +
                                " but must be a multiple of 32 and at most " + std::to_string(kMaxHeadDim));
  }
  if (shape.page_size < 1) throw std::invalid_argument("page_size must be at least 1");
  if (lengths.query.size() != lengths.context.size()) {
    throw std::invalid_argument(std::to_string(lengths.query.size()) + " query lengths but " +
                                std::to_string(lengths.context.size()) + " context lengths");
  }
  for (std::size_t i = 0; i < lengths.query.size(); i++) {
    check_lengths(max_pages, i);
    num_tokens_ += lengths.query[i];
  }
  std::vector<bool> is_taken(lengths.query.size());
  for (const Group& group : groups) check_group(group, is_taken);
}

void AttentionPlan::check_lengths(std::int64_t max_pages, std::size_t request) const {
  const std::int64_t query_len = lengths_.query[request], context_len = lengths_.context[request];
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
}

void AttentionPlan::check_group(const Group& group, std::vector<bool>& is_taken) const {
  if (group.requests.size() < 2 || group.num_pages < 1) {
    throw std::invalid_argument("a group that shares pages needs two requests and one page");
  }
  for (const std::int64_t request : group.requests) {
    const std::string who = "request " + std::to_string(request) + " of a group that shares " +
                            std::to_string(group.num_pages) + " pages ";
    if (request < 0 || request >= static_cast<std::int64_t>(lengths_.query.size())) {
      throw std::out_of_range(who + "is none of the batch's " + std::to_string(lengths_.query.size()));
    }
    const std::size_t i = static_cast<std::size_t>(request);
    if (lengths_.query[i] != 1 || group.num_pages * shape_.page_size >= lengths_.context[i]) {
      throw std::invalid_argument(who + "has " + std::to_string(lengths_.query[i]) + " new tokens in a context of " +
                                  std::to_string(lengths_.context[i]) + ", but needs one, after these pages");
    }
    const std::int32_t* pages = page_table_ + request * page_table_stride_;
    const std::int32_t* first = page_table_ + group.requests[0] * page_table_stride_;
    if (is_taken[i] ||
        std::memcmp(pages, first, static_cast<std::size_t>(group.num_pages) * sizeof(*pages)) != 0) {
      throw std::invalid_argument(who + "has other pages there, or is in two groups");
    }
    is_taken[i] = true;
  }
}

// Cuts the attention of one window into tasks.
class AttentionPlan::Cutter {
 public:
  Cutter(const AttentionPlan& plan, std::int64_t window)
      : plan_(plan), shape_(plan.shape_), lengths_(plan.lengths_), window_(window),
        shared_(plan.lengths_.query.size()) {}

  Cut make() {
    std::int64_t rows = 0;
    for (std::size_t i = 0; i < lengths_.query.size(); i++) {
      check_pages(i);
      first_rows_.push_back(rows);
      rows += lengths_.query[i];
    }
    for (const Group& group : plan_.groups_) add_group(group);
    const std::int64_t chunk = split_length();
    for (std::size_t i = 0; i < lengths_.query.size(); i++) add_request(i, chunk);
    // The longest first: the last tasks to be taken are then the short ones, and threads end together.
    const auto cost = [](const AttentionTask& task) {
      return static_cast<std::int64_t>(task.num_queries + 1) * (task.kv_end - task.kv_begin);
    };
    std::stable_sort(cut_.tasks.begin(), cut_.tasks.end(),
                     [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
    return std::move(cut_);
  }

 private:
  // Where the partial results are that one request has from its group.
  struct Shared {
    std::int64_t num_keys = 0;  // the request's own tasks begin after these
    AttentionParts parts{};     // of the first kv head
    std::int64_t head_rows = 0;  // from one kv head's parts to the next one's
  };

  // The first key that a query at this position sees.
  std::int64_t first_key(std::int64_t position) const {
    return window_ == 0 ? 0 : std::max<std::int64_t>(0, position - window_ + 1);
  }
  // The first key that any of a request's new tokens sees.
  std::int64_t first_key_of(std::size_t request) const {
    return first_key(lengths_.context[request] - lengths_.query[request]);
  }
  int group() const { return shape_.num_heads / shape_.num_kv_heads; }
  std::int64_t tokens_per_tile() const { return std::max(1, kQueryTile / group()); }

  // What lies before the window may have been given away: its entries may be anything.
  void check_pages(std::size_t request) const {
    const std::int64_t end = (lengths_.context[request] + shape_.page_size - 1) / shape_.page_size;
    const std::int32_t* row = plan_.page_table_ + static_cast<std::int64_t>(request) * plan_.page_table_stride_;
    for (std::int64_t i = first_key_of(request) / shape_.page_size; i < end; i++) {
      if (row[i] < 0 || row[i] >= shape_.num_pages) {
        throw std::out_of_range("request " + std::to_string(request) + " of the batch names page " +
                                std::to_string(row[i]) + " but the cache has pages 0 to " +
                                std::to_string(shape_.num_pages - 1));
      }
    }
  }

  // Keys per task such that every thread has several tasks, however few requests there are.
  std::int64_t split_length() const {
    const int threads = plan_.threads_;
    if (threads == 1) return INT64_MAX;
    std::int64_t total = 0, tasks = 0;
    for (std::size_t i = 0; i < lengths_.query.size(); i++) {
      const std::int64_t tiles = (lengths_.query[i] + tokens_per_tile() - 1) / tokens_per_tile();
      std::int64_t keys = lengths_.context[i] - std::max(shared_[i].num_keys, first_key_of(i));
      if (window_ > 0) keys = std::min(keys, window_ + tokens_per_tile());
      tasks += tiles * shape_.num_kv_heads;
      total += tiles * shape_.num_kv_heads * keys;
    }
    if (tasks >= kTasksPerThread * threads * 4) return INT64_MAX;
    const std::int64_t even = (total + kTasksPerThread * threads - 1) / (kTasksPerThread * threads);
    return std::max(kMinSplit, (even + kKeyTile - 1) / kKeyTile * kKeyTile);
  }

  void add_group(const Group& group) {
    const std::int64_t count = static_cast<std::int64_t>(group.requests.size());
    const std::int64_t tiles = (count + tokens_per_tile() - 1) / tokens_per_tile();
    const std::int64_t height = (count + tiles - 1) / tiles;
    for (std::int64_t i = 0; i < count; i += height) {
      add_shared_tile(group, i, std::min(height, count - i), tiles);
    }
  }

  // The requests [begin, begin + num_queries) of a group.
  void add_shared_tile(const Group& group, std::int64_t begin, std::int64_t num_queries, std::int64_t tiles) {
    const auto request_at = [&](std::int64_t i) { return static_cast<std::size_t>(group.requests[static_cast<std::size_t>(begin + i)]); };
    const std::int64_t end = group.num_pages * shape_.page_size;
    std::int64_t first = end;
    for (std::int64_t i = 0; i < num_queries; i++) first = std::min(first, first_key_of(request_at(i)));
    if (first == end) return;  // all windows begin after these pages
    // All tiles of all heads together should be several tasks per thread.
    const std::int64_t tasks = tiles * shape_.num_kv_heads;
    const std::int64_t parts = plan_.threads_ == 1 ? 1 : (kTasksPerThread * plan_.threads_ + tasks - 1) / tasks;
    const std::int64_t chunk = std::max(kMinSplit, ((end - first) / parts + kKeyTile - 1) / kKeyTile * kKeyTile);
    AttentionTask task{};
    task.request = static_cast<std::int32_t>(group.requests[0]);
    task.shared = static_cast<std::int32_t>(cut_.shared_tokens.size());
    task.num_queries = static_cast<std::int32_t>(num_queries);
    task.kv_begin = static_cast<std::int32_t>(first);
    task.kv_end = static_cast<std::int32_t>(end);
    for (std::int64_t i = 0; i < num_queries; i++) {
      const std::size_t request = request_at(i);
      cut_.shared_tokens.push_back(static_cast<std::int32_t>(first_rows_[request]));
      cut_.shared_positions.push_back(static_cast<std::int32_t>(lengths_.context[request] - 1));
    }
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      task.kv_head = head;
      const AttentionParts parts_of_head = add_tasks(task, chunk, false);
      for (std::int64_t i = 0; head == 0 && i < num_queries; i++) {
        Shared& of = shared_[request_at(i)];
        of.num_keys = end;
        of.parts = parts_of_head;
        of.parts.first_row += static_cast<std::int32_t>(i * this->group());
        of.head_rows = parts_of_head.count * parts_of_head.stride;
      }
    }
  }

  void add_request(std::size_t request, std::int64_t chunk) {
    const std::int64_t query_len = lengths_.query[request], context_len = lengths_.context[request];
    const Shared& shared = shared_[request];
    for (std::int64_t query = 0; query < query_len; query += tokens_per_tile()) {
      AttentionTask task{};
      task.request = static_cast<std::int32_t>(request);
      task.first_row = static_cast<std::int32_t>(first_rows_[request] + query);
      task.shared = -1;
      task.num_queries = static_cast<std::int32_t>(std::min(tokens_per_tile(), query_len - query));
      task.first_new = static_cast<std::int32_t>(context_len - query_len);
      task.first_position = static_cast<std::int32_t>(context_len - query_len + query);
      task.kv_begin = static_cast<std::int32_t>(std::max(shared.num_keys, first_key(task.first_position)));
      task.kv_end = task.first_position + task.num_queries;
      for (int head = 0; head < shape_.num_kv_heads; head++) {
        task.kv_head = head;
        const AttentionParts own = add_tasks(task, chunk, shared.parts.count == 0);
        if (own.count == 0) continue;
        AttentionParts before = shared.parts;
        before.first_row += static_cast<std::int32_t>(head * shared.head_rows);
        cut_.merges.push_back({head, task.first_row, task.num_queries, before, own});
      }
    }
  }

  // Returns the parts that the task's keys were cut into; none if the result is whole.
  AttentionParts add_tasks(AttentionTask task, std::int64_t chunk, bool whole) {
    const std::int64_t begin = task.kv_begin, num_keys = task.kv_end - begin;
    const std::int64_t parts = (num_keys - 1) / chunk + 1;
    const std::int64_t part_len = (num_keys + parts - 1) / parts;
    const std::int64_t step = parts == 1 ? num_keys : (part_len + kKeyTile - 1) / kKeyTile * kKeyTile;
    const int rows = task.num_queries * group();
    cut_.rows_per_tile = std::max(cut_.rows_per_tile, rows);
    AttentionParts made{static_cast<std::int32_t>(cut_.num_partial_rows), 0, rows};
    for (std::int64_t done = 0; done < num_keys; done += step) {
      task.kv_begin = static_cast<std::int32_t>(begin + done);
      task.kv_end = static_cast<std::int32_t>(begin + std::min(num_keys, done + step));
      cut_.num_key_entries += static_cast<std::int64_t>(task.kv_end - task.kv_begin) * shape_.head_dim * rows;
      task.partial = -1;
      if (!whole || step < num_keys) {
        task.partial = static_cast<std::int32_t>(cut_.num_partial_rows);
        cut_.num_partial_rows += rows;
        made.count++;
      }
      cut_.tasks.push_back(task);
    }
    return made;
  }

  const AttentionPlan& plan_;
  const Shape& shape_;
  const Lengths& lengths_;
  const std::int64_t window_;
  std::vector<std::int64_t> first_rows_;
  std::vector<Shared> shared_;
  Cut cut_;
};

const AttentionPlan::Cut& AttentionPlan::cut_of(std::int64_t window) const {
  if (window < 0) throw std::invalid_argument("a window has " + std::to_string(window) + " tokens; 0 is none");
  const auto found = cuts_.find(window);
  if (found != cuts_.end()) return found->second;
  return cuts_.emplace(window, Cutter(*this, window).make()).first->second;
}

void AttentionPlan::run(Context& context, DType dtype, const Tensors& tensors) const {
  const std::lock_guard<std::mutex> lock(context.mutex);
  run_held(context, dtype, tensors);
}

void AttentionPlan::run_held(Context& context, DType dtype, const Tensors& tensors) const {
  const Cut& cut = cut_of(tensors.traits.window);
  if (tensors.value_dim % kHeadDimStep != 0 || tensors.value_dim < 0 || tensors.value_dim > shape_.head_dim) {
    throw std::invalid_argument("a result of " + std::to_string(tensors.value_dim) + " entries cannot be made of heads of " +
                                std::to_string(shape_.head_dim));
  }
  if (tensors.page_size != 0 && (tensors.page_size < 1 || shape_.page_size != 1)) {
    throw std::invalid_argument("pages of " + std::to_string(tensors.page_size) + " tokens need a plan of single tokens");
  }
  AttentionArgs args{};
  args.tasks = cut.tasks.data();
  args.num_tasks = static_cast<std::int64_t>(cut.tasks.size());
  args.num_key_entries = cut.num_key_entries;
  args.merges = cut.merges.data();
  args.num_merges = static_cast<std::int64_t>(cut.merges.size());
  args.page_table = page_table_;
  args.page_table_stride = page_table_stride_;
  args.num_heads = shape_.num_heads;
  args.num_kv_heads = shape_.num_kv_heads;
  args.head_dim = shape_.head_dim;
  args.page_size = tensors.page_size == 0 ? shape_.page_size : tensors.page_size;
  args.entry_size = shape_.page_size;
  args.q = tensors.q;
  args.q_stride = tensors.q_stride;
  args.keys = tensors.keys;
  args.values = tensors.values;
  args.key_stride = tensors.key_stride;
  args.value_stride = tensors.value_stride;
  args.kv = tensors.kv;
  args.value_dim = tensors.value_dim == 0 ? shape_.head_dim : tensors.value_dim;
  args.out = tensors.out;
  args.scale = tensors.scale;
  args.traits = tensors.traits;
  args.shared_tokens = cut.shared_tokens.data();
  args.shared_positions = cut.shared_positions.data();
  args.sees = sees_;
  args.scratch_stride = context.ops().attention_scratch(dtype, cut.rows_per_tile, shape_.head_dim);
  args.scratch = context.scratch.at_least(args.scratch_stride * static_cast<std::size_t>(context.threads()));
  args.rows_per_tile = cut.rows_per_tile;
  const std::int64_t partial_floats = cut.num_partial_rows * partial_row_floats(shape_.head_dim);
  args.partials = reinterpret_cast<float*>(
      context.partials.at_least(static_cast<std::size_t>(partial_floats) * sizeof(float)));
  args.team = context.team();
  context.ops().paged_attention(dtype, args);
}

}  // namespace sapwood
