#include "both_ways.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

namespace sapwood {
namespace {

constexpr std::int64_t kLeastQueries = 128, kMostQueries = 1024;  // of a task: it packs keys for all of them once
constexpr std::int64_t kTasksPerThread = 4;                       // so that threads end together
constexpr std::int64_t kQueryStep = 32;

void check(const BothWaysInputs& inputs, const std::vector<BothWaysText>& texts, std::int64_t num_tokens) {
  if (inputs.num_heads < 1 || inputs.head_dim < 1 || !(inputs.scale > 0)) {
    throw std::invalid_argument("attention needs heads, entries and a positive scale; it was given " +
                                std::to_string(inputs.num_heads) + ", " + std::to_string(inputs.head_dim) + " and " +
                                std::to_string(inputs.scale));
  }
  for (const BothWaysText& text : texts) {
    if (text.length < 1) throw std::invalid_argument("a text needs a token");
    if (text.rows != nullptr) {
      check_indices("row of a text", text.rows, text.length, num_tokens);
    } else if (text.first < 0 || text.first > num_tokens - text.length) {
      throw std::out_of_range("a text ends behind the tokens");
    }
  }
}

}  // namespace

void attend_both_ways(Context& context, DType dtype, const BothWaysInputs& inputs,
                      const std::vector<BothWaysText>& texts, std::int64_t num_tokens) {
  check(inputs, texts, num_tokens);
  BothWaysArgs args{};
  std::int64_t num_queries = 0;
  for (const BothWaysText& text : texts) {
    num_queries += text.length * inputs.num_heads;
    args.num_products += text.length * text.length * inputs.num_heads;
  }
  const std::int64_t even = num_queries / (kTasksPerThread * context.threads());
  args.queries_of_task = (std::clamp(even, kLeastQueries, kMostQueries) + kQueryStep - 1) / kQueryStep * kQueryStep;
  std::vector<BothWaysTask> tasks;
  for (std::size_t i = 0; i < texts.size(); i++) {
    for (int head = 0; head < inputs.num_heads; head++) {
      for (std::int64_t begin = 0; begin < texts[i].length; begin += args.queries_of_task) {
        tasks.push_back({static_cast<std::int64_t>(i), head, begin, std::min(begin + args.queries_of_task, texts[i].length)});
      }
    }
  }
  args.texts = texts.data();
  args.tasks = tasks.data();
  args.num_tasks = static_cast<std::int64_t>(tasks.size());
  args.num_heads = inputs.num_heads;
  args.head_dim = inputs.head_dim;
  args.scale = inputs.scale;
  args.q = inputs.q;
  args.k = inputs.k;
  args.v = inputs.v;
  args.q_stride = inputs.q_stride;
  args.k_stride = inputs.k_stride;
  args.v_stride = inputs.v_stride;
  args.out = inputs.out;
  const std::lock_guard<std::mutex> lock(context.mutex);
  args.team = context.team();
  args.scratch_stride = context.ops().both_ways_scratch(dtype, args);
  args.scratch = context.scratch.at_least(args.scratch_stride * static_cast<std::size_t>(context.threads()));
  context.ops().both_ways(dtype, args);
}

}  // namespace sapwood
