#include "attention_plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace sapwood {
namespace {

constexpr std::int64_t kTasksPerThread = 4;
constexpr std::int64_t kMostPartialBytes = 32 << 20;  // of the parts of requests that are cut

constexpr std::int64_t kMostTreeTokens = 64;

constexpr std::int64_t tile_begin(std::int64_t position) { return position / kKeyTile * kKeyTile; }
constexpr std::int64_t segment_begin(std::int64_t position) { return position / kKeySegment * kKeySegment; }
constexpr std::int64_t num_segments(std::int64_t begin, std::int64_t end) {
  return (end - 1) / kKeySegment - begin / kKeySegment + 1;
}
// Of the new tokens up to the j-th, itself included.
constexpr std::uint64_t up_to(std::int64_t j) { return j >= 63 ? ~std::uint64_t{0} : (std::uint64_t{1} << (j + 1)) - 1; }

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

// Cuts the attention of one window into tasks. However they are cut, and whatever else is in the batch, a query's keys
// are taken in the same tiles and segments, from the first one that it sees on.
class AttentionPlan::Cutter {
 public:
  Cutter(const AttentionPlan& plan, std::int64_t window)
      : plan_(plan), shape_(plan.shape_), lengths_(plan.lengths_), window_(window),
        shared_(static_cast<std::size_t>(plan.num_tokens_)) {}

  Cut make() {
    std::int64_t rows = 0;
    for (std::size_t i = 0; i < lengths_.query.size(); i++) {
      check_pages(i);
      first_rows_.push_back(rows);
      rows += lengths_.query[i];
    }
    for (const Group& group : plan_.groups_) add_group(group);
    for (std::size_t i = 0; i < lengths_.query.size(); i++) {
      if (is_tree(i)) add_beginning_of_tree(i);
    }
    cut_.num_first_tasks = static_cast<std::int64_t>(cut_.tasks.size());
    is_cut_ = should_cut();
    for (std::size_t i = 0; i < lengths_.query.size(); i++) {
      is_tree(i) ? add_tree(i) : add_request(i);
    }
    // The longest first: the last tasks to be taken are then the short ones, and threads end together.
    const auto cost = [](const AttentionTask& task) {
      return static_cast<std::int64_t>(task.num_queries + 1) * (task.kv_end - task.kv_begin);
    };
    const auto is_longer = [&](const auto& a, const auto& b) { return cost(a) > cost(b); };
    const auto others = cut_.tasks.begin() + cut_.num_first_tasks;
    std::stable_sort(cut_.tasks.begin(), others, is_longer);
    std::stable_sort(others, cut_.tasks.end(), is_longer);
    return std::move(cut_);
  }

 private:
  // What a token has from the task that it shared with others.
  struct Shared {
    std::int64_t num_keys = 0;    // the token's own tasks begin after these
    AttentionParts parts{};       // whole segments, of the first kv head
    std::int32_t resumed = -1;    // the rows of a segment that was begun, of the first kv head
    std::int64_t head_rows = 0;   // from one kv head's rows to the next one's
  };
  // A token of a task that is shared.
  struct Member {
    std::int64_t row, position;
  };

  // The first key that a query at this position sees.
  std::int64_t first_key(std::int64_t position) const {
    return window_ == 0 ? 0 : std::max<std::int64_t>(0, position - window_ + 1);
  }
  std::int64_t first_new(std::size_t request) const { return lengths_.context[request] - lengths_.query[request]; }
  int group() const { return shape_.num_heads / shape_.num_kv_heads; }
  std::int64_t tokens_per_tile() const { return std::max(1, kQueryTile / group()); }

  // The new tokens that the j-th one of a request sees, itself included.
  std::uint64_t seen(std::size_t request, std::int64_t j) const {
    return (static_cast<std::uint64_t>(plan_.sees_[first_rows_[request] + j]) & up_to(j)) | (std::uint64_t{1} << j);
  }
  bool is_tree(std::size_t request) const {
    if (plan_.sees_ == nullptr) return false;
    const std::int64_t* sees = plan_.sees_ + first_rows_[request];
    const std::int64_t count = lengths_.query[request];
    for (std::int64_t j = 0; j < count; j++) {
      if (sees[j] == -1 || (j < kMostTreeTokens && seen(request, j) == up_to(j))) continue;
      if (count <= kMostTreeTokens) return true;
      throw std::invalid_argument("request " + std::to_string(request) + " of the batch has a tree of " +
                                  std::to_string(count) + " new tokens, but at most " +
                                  std::to_string(kMostTreeTokens) + " have bits");
    }
    return false;
  }
  // Where a token of a tree would be if only the tokens that it sees were there.
  std::int64_t tree_position(std::size_t request, std::int64_t j) const {
    return first_new(request) + std::popcount(seen(request, j)) - 1;
  }

  // What lies before the window may have been given away: its entries may be anything.
  void check_pages(std::size_t request) const {
    const std::int64_t end = (lengths_.context[request] + shape_.page_size - 1) / shape_.page_size;
    const std::int32_t* row = plan_.page_table_ + static_cast<std::int64_t>(request) * plan_.page_table_stride_;
    for (std::int64_t i = first_key(first_new(request)) / shape_.page_size; i < end; i++) {
      if (row[i] < 0 || row[i] >= shape_.num_pages) {
        throw std::out_of_range("request " + std::to_string(request) + " of the batch names page " +
                                std::to_string(row[i]) + " but the cache has pages 0 to " +
                                std::to_string(shape_.num_pages - 1));
      }
    }
  }

  // Whether requests are cut into a task for each segment, so that every thread has several, however few requests
  // there are. It makes no difference to results.
  bool should_cut() const {
    const int threads = plan_.threads_;
    if (threads == 1) return false;
    std::int64_t tasks = 0, rows = 0;
    for (std::size_t i = 0; i < lengths_.query.size(); i++) {
      const std::int64_t tiles = (lengths_.query[i] + tokens_per_tile() - 1) / tokens_per_tile();
      std::int64_t keys = lengths_.context[i] - (lengths_.query[i] == 1 ? shared_of(i).num_keys : 0);
      if (window_ > 0) keys = std::min(keys, window_ + tokens_per_tile() + kKeySegment);
      tasks += tiles * shape_.num_kv_heads;
      rows += lengths_.query[i] * shape_.num_heads * (keys / kKeySegment + 1);
    }
    const std::int64_t row_bytes = partial_row_floats(shape_.head_dim) * static_cast<std::int64_t>(sizeof(float));
    return tasks < kTasksPerThread * threads * 4 && rows * row_bytes <= kMostPartialBytes;
  }
  const Shared& shared_of(std::size_t request) const { return shared_[static_cast<std::size_t>(first_rows_[request])]; }

  void add_group(const Group& group) {
    std::vector<Member> members;
    for (const std::int64_t request : group.requests) {
      const std::size_t i = static_cast<std::size_t>(request);
      members.push_back({first_rows_[i], lengths_.context[i] - 1});
    }
    add_members(static_cast<std::int32_t>(group.requests[0]), members, tile_begin(group.num_pages * shape_.page_size));
  }

  // All tokens of a tree see what was there before.
  void add_beginning_of_tree(std::size_t request) {
    std::vector<Member> members;
    for (std::int64_t j = 0; j < lengths_.query[request]; j++) {
      members.push_back({first_rows_[request] + j, tree_position(request, j)});
    }
    add_members(static_cast<std::int32_t>(request), members, tile_begin(first_new(request)));
  }

  // Tokens that see the same keys up to `end`, in tiles of about equal size.
  void add_members(std::int32_t request, const std::vector<Member>& members, std::int64_t end) {
    const std::int64_t count = static_cast<std::int64_t>(members.size());
    const std::int64_t tiles = (count + tokens_per_tile() - 1) / tokens_per_tile();
    const std::int64_t height = (count + tiles - 1) / tiles;
    const bool is_cut = plan_.threads_ > 1 && tiles * shape_.num_kv_heads < kTasksPerThread * plan_.threads_;
    for (std::int64_t i = 0; i < count; i += height) {
      add_shared_tile(request, members.data() + i, std::min(height, count - i), end, is_cut);
    }
  }

  void add_shared_tile(std::int32_t request, const Member* members, std::int64_t count, std::int64_t end, bool is_cut) {
    std::int64_t first = end;
    for (std::int64_t i = 0; i < count; i++) first = std::min(first, first_key(members[i].position));
    if (first == end) return;  // all windows begin after these keys
    AttentionTask task{};
    task.request = request;
    task.shared = static_cast<std::int32_t>(cut_.shared_tokens.size());
    task.num_queries = static_cast<std::int32_t>(count);
    task.resumed = -1;
    const int rows = task.num_queries * group();
    const std::int64_t whole_end = segment_begin(end);  // of the segments that are finished
    const std::int64_t whole = first < whole_end ? num_segments(first, whole_end) : 0;
    const std::int64_t parts = is_cut ? whole : std::min<std::int64_t>(whole, 1);
    const std::int64_t head_rows = (parts + (end > whole_end ? 1 : 0)) * rows, first_row = cut_.num_partial_rows;
    for (std::int64_t i = 0; i < count; i++) {
      cut_.shared_tokens.push_back(static_cast<std::int32_t>(members[i].row));
      cut_.shared_positions.push_back(static_cast<std::int32_t>(members[i].position));
      const std::int32_t row = static_cast<std::int32_t>(first_row + i * group());
      const std::int32_t resumed = end > whole_end ? static_cast<std::int32_t>(row + parts * rows) : -1;
      shared_[static_cast<std::size_t>(members[i].row)] = {end, {row, static_cast<std::int32_t>(parts), rows}, resumed, head_rows};
    }
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      task.kv_head = head;
      std::int64_t row = first_row + head * head_rows;
      const std::int32_t open = end > whole_end ? static_cast<std::int32_t>(row + parts * rows) : -1;
      for (std::int64_t begin = first; begin < end;) {
        const std::int64_t until = is_cut ? std::min(end, segment_begin(begin) + kKeySegment) : end;
        task.partial = begin < whole_end ? static_cast<std::int32_t>(row) : kNoPart;
        task.open = until == end ? open : -1;
        add_task(task, begin, until);
        begin = until;
        row += rows;
      }
    }
    cut_.num_partial_rows += head_rows * shape_.num_kv_heads;
  }

  void add_request(std::size_t request) {
    const std::int64_t query_len = lengths_.query[request];
    for (std::int64_t query = 0; query < query_len; query += tokens_per_tile()) {
      AttentionTask task = task_of(request, query);
      task.num_queries = static_cast<std::int32_t>(std::min(tokens_per_tile(), query_len - query));
      task.first_position = static_cast<std::int32_t>(first_new(request) + query);
      add_own(task);
    }
  }

  // Each token by itself: others are between the keys that it sees.
  void add_tree(std::size_t request) {
    for (std::int64_t j = 0; j < lengths_.query[request]; j++) {
      AttentionTask task = task_of(request, j);
      task.num_queries = 1;
      task.first_position = static_cast<std::int32_t>(tree_position(request, j));
      task.sees = static_cast<std::int64_t>(seen(request, j));
      add_own(task);
    }
  }

  AttentionTask task_of(std::size_t request, std::int64_t query) const {
    AttentionTask task{};
    task.request = static_cast<std::int32_t>(request);
    task.first_row = static_cast<std::int32_t>(first_rows_[request] + query);
    task.shared = -1;
    task.first_new = static_cast<std::int32_t>(first_new(request));
    task.open = -1;
    return task;
  }

  // The tasks of queries that are neighbours, after what they have shared with others.
  void add_own(AttentionTask task) {
    const Shared& shared = shared_[static_cast<std::size_t>(task.first_row)];
    const std::int64_t begin = std::max(shared.num_keys, first_key(task.first_position));
    const std::int64_t end = task.first_position + task.num_queries;
    const std::int64_t parts = num_segments(begin, end);
    const int rows = task.num_queries * group();
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      const std::int32_t from = static_cast<std::int32_t>(head * shared.head_rows);
      task.kv_head = head;
      task.before = shared.parts;
      task.before.first_row += from;
      task.resumed = shared.resumed < 0 ? -1 : shared.resumed + from;
      task.partial = kWholeResult;
      if (!is_cut_ || parts == 1) {
        add_task(task, begin, end);
        continue;
      }
      const AttentionParts own{static_cast<std::int32_t>(cut_.num_partial_rows), static_cast<std::int32_t>(parts), rows};
      cut_.merges.push_back({head, task.first_row, task.num_queries, task.before, own});
      cut_.num_partial_rows += parts * rows;
      task.before.count = 0;
      task.partial = own.first_row;
      for (std::int64_t key = begin; key < end; task.partial += rows, task.resumed = -1) {
        const std::int64_t until = std::min(end, segment_begin(key) + kKeySegment);
        add_task(task, key, until);
        key = until;
      }
    }
  }

  void add_task(AttentionTask task, std::int64_t begin, std::int64_t end) {
    const int rows = task.num_queries * group();
    cut_.rows_per_tile = std::max(cut_.rows_per_tile, rows);
    cut_.num_key_entries += (end - begin) * shape_.head_dim * rows;
    task.kv_begin = static_cast<std::int32_t>(begin);
    task.kv_end = static_cast<std::int32_t>(end);
    cut_.tasks.push_back(task);
  }

  const AttentionPlan& plan_;
  const Shape& shape_;
  const Lengths& lengths_;
  const std::int64_t window_;
  std::vector<std::int64_t> first_rows_;
  std::vector<Shared> shared_;  // by token
  bool is_cut_ = false;
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
  args.num_first_tasks = cut.num_first_tasks;
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
