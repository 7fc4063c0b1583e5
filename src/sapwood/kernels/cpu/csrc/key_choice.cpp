#include "key_choice.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "tasks.h"

namespace sapwood {
namespace {

constexpr std::int64_t kRowsOfTask = 256;         // tokens x heads of one product, or one token's heads
constexpr std::int64_t kKeysOfTask = 8 * kKeyTile;
constexpr std::int64_t kScoresAtOnce = 1 << 22;   // 16 MiB; or of one token
constexpr std::int64_t kLeastKeysPerThread = 4096;  // to choose from

// In the order of their numbers, NaN above all: a sort needs an order even then.
std::int32_t sortable(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// A token that sees more keys than it may choose.
struct Row {
  std::int64_t token, num_keys;
  const float* scores;
};

class Chooser {
 public:
  Chooser(Context& context, DType dtype, const KeyChoice& choice) : context_(context), dtype_(dtype), c_(choice) {
    tokens_of_task_ = std::max<std::int64_t>(1, kRowsOfTask / c_.num_heads);
  }

  void run() {
    std::int64_t first = 0;
    for (std::size_t request = 0; request < c_.query.size(); request++) {
      const std::int64_t num_new = c_.query[request], before = c_.context[request] - num_new;
      for (std::int64_t done = 0; done < num_new;) {
        const std::int64_t sees = before + done + 1;  // the next token
        if (sees <= c_.num_chosen) {
          take_all(first + done++, sees);
          continue;
        }
        const std::int64_t fitting = std::max<std::int64_t>(1, kScoresAtOnce / (sees + tokens_of_task_ + kKeyTile));
        const std::int64_t count = std::min({tokens_of_task_, num_new - done, fitting});
        add_block(request, first + done, count, sees);
        done += count;
      }
      first += num_new;
    }
    flush();
  }

 private:
  // Tokens of one request that are scored together; `sees`: keys that the first of them sees; `begin`: its place
  // among the scores, whose rows are `stride` apart.
  struct Block {
    std::size_t request;
    std::int64_t token, count, sees, stride, begin;
  };

  void take_all(std::int64_t token, std::int64_t sees) const {
    std::int64_t* out = c_.out + token * c_.num_chosen;
    for (std::int64_t i = 0; i < c_.num_chosen; i++) out[i] = i < sees ? i : -1;
  }

  void add_block(std::size_t request, std::int64_t token, std::int64_t count, std::int64_t sees) {
    const std::int64_t stride = (sees + count - 1 + kKeyTile - 1) / kKeyTile * kKeyTile;
    if (num_scores_ > 0 && num_scores_ + count * stride > kScoresAtOnce) flush();
    blocks_.push_back({request, token, count, sees, stride, num_scores_});
    num_scores_ += count * stride;
  }

  // Chooses for the blocks that have been added.
  void flush() {
    if (blocks_.empty()) return;
    scores_.resize(static_cast<std::size_t>(num_scores_));
    std::vector<IndexTask> tasks;
    std::vector<Row> rows;
    IndexArgs args{};
    for (const Block& block : blocks_) {
      float* own = scores_.data() + block.begin;
      const std::int64_t end = block.sees + block.count - 1;
      for (std::int64_t key = 0; key < end; key += kKeysOfTask) {
        tasks.push_back({static_cast<std::int32_t>(block.request), block.token, block.count, key,
                         std::min(end, key + kKeysOfTask), own, block.stride});
      }
      for (std::int64_t i = 0; i < block.count; i++) {
        rows.push_back({block.token + i, block.sees + i, own + i * block.stride});
      }
      args.num_products += block.count * end * c_.num_heads;
      args.most_rows = std::max(args.most_rows, block.count * c_.num_heads);
    }
    score(args, tasks);
    const Team team = context_.team();
    const std::int64_t threads = std::clamp<std::int64_t>(num_scores_ / kLeastKeysPerThread, 1, team.threads);
    std::vector<std::vector<std::int32_t>> room(static_cast<std::size_t>(threads));
    run_tasks(team, threads, static_cast<std::int64_t>(rows.size()), [&](std::int64_t i, int thread) {
      take_best(rows[static_cast<std::size_t>(i)], room[static_cast<std::size_t>(thread)]);
    });
    blocks_.clear();
    num_scores_ = 0;
  }

  void score(IndexArgs& args, const std::vector<IndexTask>& tasks) {
    args.tasks = tasks.data();
    args.num_tasks = static_cast<std::int64_t>(tasks.size());
    args.num_heads = c_.num_heads;
    args.head_dim = c_.head_dim;
    args.page_size = c_.page_size;
    args.q = c_.q;
    args.weights = c_.weights;
    args.keys = c_.keys;
    args.page_stride = c_.page_stride;
    args.kv = c_.kv;
    args.page_table = c_.page_table;
    args.page_table_stride = c_.page_table_stride;
    args.team = context_.team();
    args.scratch_stride = context_.ops().index_scratch(dtype_, args);
    args.scratch = context_.scratch.at_least(args.scratch_stride * static_cast<std::size_t>(context_.threads()));
    context_.ops().index_scores(dtype_, args);
  }

  // The best num_chosen keys of a row, ascending: those above the last of them, and of its equals the first ones.
  void take_best(const Row& row, std::vector<std::int32_t>& room) const {
    room.resize(static_cast<std::size_t>(row.num_keys));
    for (std::int64_t i = 0; i < row.num_keys; i++) room[static_cast<std::size_t>(i)] = sortable(row.scores[i]);
    const auto last = room.begin() + c_.num_chosen - 1;
    std::nth_element(room.begin(), last, room.end(), std::greater<>());
    const std::int32_t least = *last;
    std::int64_t equals = 1 + std::count(room.begin(), last, least);
    std::int64_t* out = c_.out + row.token * c_.num_chosen;
    for (std::int64_t i = 0; i < row.num_keys; i++) {
      const std::int32_t own = sortable(row.scores[i]);
      if (own < least || (own == least && equals-- <= 0)) continue;
      *out++ = i;
    }
  }

  Context& context_;
  const DType dtype_;
  const KeyChoice& c_;
  std::int64_t tokens_of_task_;
  std::int64_t num_scores_ = 0;
  std::vector<Block> blocks_;
  std::vector<float> scores_;
};

void check(const KeyChoice& c) {
  if (c.head_dim % kHeadDimStep != 0 || c.head_dim < 1 || c.num_heads < 1 || c.num_chosen < 1 || c.page_size < 1) {
    throw std::invalid_argument("an indexer of " + std::to_string(c.num_heads) + " heads of " +
                                std::to_string(c.head_dim) + " entries cannot choose " + std::to_string(c.num_chosen) +
                                " keys from pages of " + std::to_string(c.page_size));
  }
  for (std::size_t request = 0; request < c.query.size(); request++) {
    const std::int64_t length = c.context[request], pages = (length + c.page_size - 1) / c.page_size;
    const std::string who = "request " + std::to_string(request) + " of the batch ";
    if (c.query[request] < 0 || c.query[request] > length || pages > c.max_pages) {
      throw std::invalid_argument(who + "has " + std::to_string(c.query[request]) + " new tokens in a context of " +
                                  std::to_string(length) + ", and " + std::to_string(c.max_pages) + " pages");
    }
    const std::int32_t* row = c.page_table + static_cast<std::int64_t>(request) * c.page_table_stride;
    for (std::int64_t i = 0; i < pages; i++) {
      if (row[i] >= 0 && row[i] < c.num_pages) continue;
      throw std::out_of_range(who + "names page " + std::to_string(row[i]) + " but the cache has pages 0 to " +
                              std::to_string(c.num_pages - 1));
    }
  }
}

}  // namespace

void choose_keys(Context& context, DType dtype, const KeyChoice& choice) {
  const std::lock_guard<std::mutex> lock(context.mutex);
  choose_keys_held(context, dtype, choice);
}

void choose_keys_held(Context& context, DType dtype, const KeyChoice& choice) {
  if (choice.query.size() != choice.context.size()) throw std::invalid_argument("lengths of different requests");
  check(choice);
  Chooser(context, dtype, choice).run();
}

void ChosenKeys::choose(Context& context, DType dtype, KeyChoice choice) {
  forget();
  plan_.reset();
  std::int64_t num_tokens = 0;
  lengths_.context.clear();
  std::vector<const std::int32_t*> pages;  // of each token's request
  for (std::size_t request = 0; request < choice.query.size(); request++) {
    const std::int64_t num_new = choice.query[request];
    for (std::int64_t i = 1; i <= num_new; i++) {
      lengths_.context.push_back(std::min(choice.num_chosen, choice.context[request] - num_new + i));
      pages.push_back(choice.page_table + static_cast<std::int64_t>(request) * choice.page_table_stride);
    }
    num_tokens += num_new;
  }
  lengths_.query.assign(static_cast<std::size_t>(num_tokens), 1);
  keys_.resize(static_cast<std::size_t>(num_tokens * choice.num_chosen));
  places_.resize(keys_.size());
  choice.out = keys_.data();
  choose_keys_held(context, dtype, choice);
  run_parts(context.team(), num_tokens, std::max<std::int64_t>(1, kLeastKeysPerThread / choice.num_chosen),
            [&](std::int64_t begin, std::int64_t end) {
              for (std::int64_t token = begin; token < end; token++) {
                const std::int64_t first = token * choice.num_chosen;
                const std::int32_t* own = pages[static_cast<std::size_t>(token)];
                for (std::int64_t i = 0; i < lengths_.context[static_cast<std::size_t>(token)]; i++) {
                  const std::int64_t key = keys_[static_cast<std::size_t>(first + i)];
                  places_[static_cast<std::size_t>(first + i)] =
                      own[key / choice.page_size] * choice.page_size + static_cast<std::int32_t>(key % choice.page_size);
                }
              }
            });
  num_tokens_ = num_tokens;
  num_chosen_ = choice.num_chosen;
  num_places_ = choice.num_pages * choice.page_size;
}

const AttentionPlan& ChosenKeys::plan(const Context& context, int num_heads, int row) {
  if (!plan_ || num_heads != num_heads_ || row != row_) {
    plan_.emplace(AttentionPlan::Shape{num_heads, 1, row, 1, num_places_},
                  reinterpret_cast<std::uintptr_t>(places_.data()), num_chosen_, num_chosen_, lengths_,
                  std::vector<AttentionPlan::Group>(), 0, context.threads());
    num_heads_ = num_heads;
    row_ = row;
  }
  return *plan_;
}

}  // namespace sapwood
