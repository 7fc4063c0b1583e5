#include "context.h"

#include <algorithm>
#include <stdexcept>

#include "coded.h"
#include "pack.h"
#include "quantized.h"

namespace sapwood {
namespace {

// Well below the second-level cache of one core, which holds it until it is read.
constexpr std::size_t kFetchAheadBytes = 512 * 1024;

}  // namespace

Context::Context(const std::string& isa, int threads) {
  const std::vector<const Ops*>& usable = usable_ops();
  ops_ = usable.back();
  if (!isa.empty()) {
    const auto found = std::find_if(usable.begin(), usable.end(),
                                    [&](const Ops* ops) { return isa == ops->name; });
    if (found == usable.end()) {
      std::string known;
      for (const Ops* ops : usable) known += (known.empty() ? "" : ", ") + std::string(ops->name);
      throw std::invalid_argument("this machine cannot run instruction set '" + isa +
                                  "'; it can run: " + known);
    }
    ops_ = *found;
  }
  set_threads(threads);
}

void Context::set_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("the number of threads is " + std::to_string(threads) +
                                " but must be in [1, 1024]");
  }
  const std::lock_guard<std::mutex> lock(mutex);
  pool_ = std::make_unique<Pool>(threads);
  threads_ = threads;
}

Team Context::team() const {
  const auto launch = [](void* pool, int threads, Pool::Run run, const void* body) {
    static_cast<Pool*>(pool)->launch(threads, run, body);
  };
  return {threads_, pool_.get(), launch};
}

void Context::linear(LinearArgs args, DType dtype) {
  if (args.m == 0) return;
  const std::size_t floats = static_cast<std::size_t>(kLinearScratchFloats * threads_);
  args.scratch = reinterpret_cast<float*>(scratch.at_least(floats * sizeof(float)));
  args.team = team();
  ops_->linear(dtype, args);
}

void Context::linear(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                     std::int64_t rows, void* out) {
  if (rows == 0) return;
  if (weight.kind == WeightKind::f32 || weight.kind == WeightKind::bf16) {
    const DType own = weight.kind == WeightKind::f32 ? DType::f32 : DType::bf16;
    if (dtype != own || weight.next != nullptr || weight.out_stride != weight.n) {
      throw std::invalid_argument("a dense weight needs x of its own dtype and makes whole rows");
    }
    linear({x, x_stride, weight.data, weight.bias, out, rows, weight.n, weight.k, nullptr, {}}, dtype);
    return;
  }
  std::byte* begin = static_cast<std::byte*>(out);
  for (const LinearWeight* part = &weight; part != nullptr; part = part->next) {
    if (part->coded != nullptr) {
      linear_coded(*part, dtype, x, x_stride, rows, begin, false);
      begin += part->n * (dtype == DType::f32 ? 4 : 2);
      continue;
    }
    const std::int64_t bytes = quantized_scratch(part->kind, rows, part->k, threads_);
    const QuantizedArgs args{x, x_stride, part, begin, rows,
                             scratch.at_least(static_cast<std::size_t>(bytes)), team()};
    (is_grouped(part->kind) ? ops_->linear_grouped : ops_->linear_int8)(dtype, args);
    begin += part->n * (dtype == DType::f32 ? 4 : 2);
  }
}

void Context::linear_coded(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                           std::int64_t rows, void* out, bool wide) {
  const std::int64_t element = dtype == DType::f32 ? 4 : 2;
  std::byte* own = scratch.at_least(coded_scratch(*weight.coded, rows, element, threads_));
  ops_->linear_coded(dtype, {x, x_stride, &weight, out, rows, wide, own, team()});
}

void Context::fetch(const LinearWeight& weight) {
  const std::int64_t panels = (weight.n + kPanel - 1) / kPanel;
  const std::int64_t all = weight.coded != nullptr ? panels * extent_of(*weight.coded).panel_bytes
                           : weight.kind == WeightKind::f32    ? panels * kPanel * weight.k * 4
                           : weight.kind == WeightKind::bf16 ? panels * kPanel * weight.k * 2
                                                             : panels * panel_bytes(weight.kind, weight.k);
  pool_->fetch(weight.data, static_cast<std::size_t>(all), kFetchAheadBytes);
}

void Context::linear_fp32(const LinearWeight& weight, DType dtype, const void* x,
                          std::int64_t x_stride, std::int64_t rows, float* out) {
  if (rows == 0) return;
  if (dtype == DType::f32) {
    linear(weight, dtype, x, x_stride, rows, out);
    return;
  }
  if (weight.kind == WeightKind::bf16) {
    linear({x, x_stride, weight.data, weight.bias, out, rows, weight.n, weight.k, nullptr, {}, true}, dtype);
    return;
  }
  if (weight.coded != nullptr && weight.next == nullptr) {
    linear_coded(weight, dtype, x, x_stride, rows, out, true);
    return;
  }
  if (weight.bias != nullptr) throw std::invalid_argument("a bf16 bias does not fit an fp32 result");
  const std::size_t size = static_cast<std::size_t>(rows * weight.k);
  std::uint32_t* widened = reinterpret_cast<std::uint32_t*>(wide.at_least(size * sizeof(float)));
  for (std::int64_t row = 0; row < rows; row++) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x) + row * x_stride;
    for (std::int64_t i = 0; i < weight.k; i++) {
      widened[row * weight.k + i] = static_cast<std::uint32_t>(from[i]) << 16;
    }
  }
  linear(weight, DType::f32, widened, weight.k, rows, out);
}

void check_indices(const char* what, const std::int64_t* index, std::int64_t n, std::int64_t limit) {
  for (std::int64_t i = 0; i < n; i++) {
    if (index[i] < 0 || index[i] >= limit) {
      throw std::out_of_range(std::string(what) + "[" + std::to_string(i) + "] is " +
                              std::to_string(index[i]) + " but must be in [0, " +
                              std::to_string(limit) + ")");
    }
  }
}

namespace {

constexpr std::int64_t kMinSplit = 256;  // keys; a shorter part costs more in the merge than it gains
constexpr std::int64_t kTasksPerThread = 4;

std::int64_t tokens_per_tile(const AttentionPlan::Shape& shape) {
  return std::max<std::int64_t>(1, kQueryTile / (shape.num_heads / shape.num_kv_heads));
}

// Keys per task such that every thread has several tasks, however few requests there are.
std::int64_t split_length(const AttentionPlan::Shape& shape, const std::vector<std::int64_t>& query_lens,
                          const std::vector<std::int64_t>& context_lens, int threads) {
  if (threads == 1) return INT64_MAX;
  std::int64_t total = 0, tasks = 0;
  for (std::size_t i = 0; i < query_lens.size(); i++) {
    const std::int64_t tiles = (query_lens[i] + tokens_per_tile(shape) - 1) / tokens_per_tile(shape);
    tasks += tiles * shape.num_kv_heads;
    total += tiles * shape.num_kv_heads * context_lens[i];
  }
  if (tasks >= kTasksPerThread * threads * 4) return INT64_MAX;
  const std::int64_t even = (total + kTasksPerThread * threads - 1) / (kTasksPerThread * threads);
  return std::max(kMinSplit, (even + kKeyTile - 1) / kKeyTile * kKeyTile);
}

}  // namespace

AttentionPlan::AttentionPlan(const Shape& shape, std::uintptr_t page_table,
                             std::int64_t page_table_stride, std::int64_t max_pages,
                             const std::vector<std::int64_t>& query_lens,
                             const std::vector<std::int64_t>& context_lens, int threads)
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
  if (query_lens.size() != context_lens.size()) {
    throw std::invalid_argument(std::to_string(query_lens.size()) + " query lengths but " +
                                std::to_string(context_lens.size()) + " context lengths");
  }
  for (std::size_t i = 0; i < query_lens.size(); i++) {
    check_pages(max_pages, i, query_lens[i], context_lens[i]);
  }
  const std::int64_t chunk = split_length(shape, query_lens, context_lens, threads);
  for (std::size_t i = 0; i < query_lens.size(); i++) {
    add_tasks(i, num_tokens_, query_lens[i], context_lens[i], chunk);
    num_tokens_ += query_lens[i];
  }
  // The longest first: the last tasks to be taken are then the short ones, and threads end together.
  const auto cost = [](const AttentionTask& task) {
    return static_cast<std::int64_t>(task.num_queries + 1) * (task.kv_end - task.kv_begin);
  };
  std::stable_sort(tasks_.begin(), tasks_.end(),
                   [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
}

void AttentionPlan::check_pages(std::int64_t max_pages, std::size_t request, std::int64_t query_len,
                                std::int64_t context_len) const {
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

void AttentionPlan::add_tasks(std::size_t request, std::int64_t first_row, std::int64_t query_len,
                              std::int64_t context_len, std::int64_t chunk) {
  const int group = shape_.num_heads / shape_.num_kv_heads;
  const std::int64_t tile = tokens_per_tile(shape_);
  for (std::int64_t query = 0; query < query_len; query += tile) {
    const std::int64_t num_queries = std::min(tile, query_len - query);
    const std::int64_t position = context_len - query_len + query;
    const std::int64_t kv_len = position + num_queries;
    const std::int64_t parts = (kv_len - 1) / chunk + 1;
    const std::int64_t part_len = (kv_len + parts - 1) / parts;
    const std::int64_t step = parts == 1 ? kv_len : (part_len + kKeyTile - 1) / kKeyTile * kKeyTile;
    rows_per_tile_ = std::max(rows_per_tile_, static_cast<int>(num_queries) * group);
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      const std::int64_t first_partial = num_partials_;
      for (std::int64_t begin = 0; begin < kv_len; begin += step) {
        num_key_entries_ += std::min(step, kv_len - begin) * shape_.head_dim * num_queries * group;
        const std::int64_t partial = step >= kv_len ? -1 : num_partials_++;
        tasks_.push_back({static_cast<std::int32_t>(request), head, static_cast<std::int32_t>(first_row + query),
                          static_cast<std::int32_t>(num_queries), static_cast<std::int32_t>(position),
                          static_cast<std::int32_t>(begin),
                          static_cast<std::int32_t>(std::min(kv_len, begin + step)),
                          static_cast<std::int32_t>(partial)});
      }
      if (num_partials_ > first_partial) {
        merges_.push_back({head, static_cast<std::int32_t>(first_row + query),
                           static_cast<std::int32_t>(num_queries), static_cast<std::int32_t>(first_partial),
                           static_cast<std::int32_t>(num_partials_ - first_partial)});
      }
    }
  }
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
  args.num_merges = static_cast<std::int64_t>(merges_.size());
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
  args.rows_per_tile = rows_per_tile_;
  args.scratch_stride = context.ops().attention_scratch(dtype, rows_per_tile_, shape_.head_dim);
  args.scratch = context.scratch.at_least(args.scratch_stride * static_cast<std::size_t>(context.threads()));
  const std::int64_t partial_floats = num_partials_ * rows_per_tile_ * (shape_.head_dim + 2);
  args.partials = reinterpret_cast<float*>(
      context.partials.at_least(static_cast<std::size_t>(partial_floats) * sizeof(float)));
  args.team = context.team();
  context.ops().paged_attention(dtype, args);
}

}  // namespace sapwood
