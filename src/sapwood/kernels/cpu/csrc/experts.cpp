#include "experts.h"

#include <algorithm>
#include <cstring>

#include "narrow.h"
#include "pack.h"
#include "tasks.h"

namespace sapwood {
namespace {

constexpr std::int64_t kElementsPerThread = 32768;    // of weights; below, a thread costs too much
constexpr std::int64_t kTasksPerThread = 8;           // at least, where weights allow it
constexpr std::int64_t kTaskBytes = 64 * 1024;        // of weights in a task, at least
constexpr std::int64_t kTaskRows = 256;               // of a task, at most
constexpr std::int64_t kFewResultBytes = 1024 * 1024; // of all pairs: these stay in the second-level cache
constexpr std::int64_t kPad = 32;                     // elements: rows of x start in different cache sets

std::int64_t up_to(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Whether Products::linear_fp32 takes the weight: a bias has the dtype of x, and only some products can add it.
bool makes_fp32(const LinearWeight& weight, DType dtype) {
  const bool is_coded = weight.coded != nullptr && weight.next == nullptr;
  return weight.bias == nullptr || dtype == DType::f32 || weight.kind == WeightKind::bf16 || is_coded;
}

// [gate, up] of rows becomes [least(gate, limit), up between -limit and limit, + 1]; in bf16 with torch's rounding.
void cut(DType dtype, std::byte* gates, std::int64_t rows, std::int64_t inner, float limit) {
  const auto gate_of = [=](float x) { return x > limit ? limit : x; };
  const auto up_of = [=](float x) { return (x > limit ? limit : x < -limit ? -limit : x) + 1.0f; };
  for (std::int64_t row = 0; row < rows; row++) {
    if (dtype == DType::f32) {
      float* x = reinterpret_cast<float*>(gates) + row * 2 * inner;
      for (std::int64_t i = 0; i < inner; i++) x[i] = gate_of(x[i]);
      for (std::int64_t i = inner; i < 2 * inner; i++) x[i] = up_of(x[i]);
    } else {
      std::uint16_t* x = reinterpret_cast<std::uint16_t*>(gates) + row * 2 * inner;
      for (std::int64_t i = 0; i < inner; i++) x[i] = narrowed(gate_of(widened(x[i])));
      for (std::int64_t i = inner; i < 2 * inner; i++) x[i] = narrowed(up_of(widened(x[i])));
    }
  }
}

// Outputs [begin, begin + width) of an expert, for pairs [first, first + count).
struct Task {
  std::int64_t expert, first, count, begin, width;
};

}  // namespace

// One call of Mixture::run.
class Mixture::Round {
 public:
  Round(Mixture& own, Context& context, DType dtype, const ExpertLayers& layers, const ExpertRows& rows,
        const ExpertAdditions* additions, const AdapterRows* adapters)
      : own_(own), ops_(context.ops()), team_(context.team()), dtype_(dtype), layers_(layers), additions_(additions),
        rows_(rows), element_(dtype == DType::f32 ? 4 : 2), hidden_(layers.hidden()), inner_(layers.inner()),
        ways_(layers.gated() ? 2 : 1), pairs_(rows.tokens * rows.k) {
    own_.workers_.resize(static_cast<std::size_t>(team_.threads));
    if (additions_ == nullptr) return;
    slots_.assign(static_cast<std::size_t>(rows.tokens), -1);
    for (std::size_t i = 0; i < adapters->slots.size(); i++) {
      for (std::int64_t at = adapters->starts[i]; at < adapters->starts[i + 1]; at++) {
        slots_[static_cast<std::size_t>(adapters->rows[at])] = adapters->slots[i];
      }
    }
  }

  void run(void* out) {
    sort_pairs();
    std::byte* activated = own_.activated_.at_least(bytes(pairs_ * inner_, element_));
    const bool splits = additions_ == nullptr && inner_ % kPanel == 0 && each_has_whole_panels(layers_.gate_up);
    const std::vector<Task> gates = cut_work(layers_.gate_up, inner_, splits);
    run_tasks(team_, threads((1 + ways_) * hidden_ * inner_), static_cast<std::int64_t>(gates.size()),
              [&](std::int64_t task, int thread) {
                make_gates(gates[static_cast<std::size_t>(task)], worker(thread), activated);
              });
    pairs_ * hidden_ * 4 <= kFewResultBytes ? add_results(activated, out) : add_by_outputs(activated, out);
    if (additions_ != nullptr) add_low_rank_to_outputs(activated, out);
  }

 private:
  static std::size_t bytes(std::int64_t count, std::int64_t each) { return static_cast<std::size_t>(count * each); }

  Worker& worker(int thread) const { return own_.workers_[static_cast<std::size_t>(thread)]; }

  // By one thread alone.
  Products alone(Worker& worker) const { return {ops_, {1, nullptr, nullptr}, worker.scratch, worker.wide}; }

  std::int64_t count_of(std::int64_t expert) const {
    return own_.begins_[static_cast<std::size_t>(expert) + 1] - own_.begins_[static_cast<std::size_t>(expert)];
  }

  std::int64_t token_of(std::int64_t pair) const { return own_.order_[static_cast<std::size_t>(pair)] / rows_.k; }

  float weight_of(std::int64_t pair) const { return rows_.weights[own_.order_[static_cast<std::size_t>(pair)]]; }

  // Threads for tasks that multiply so many weights per expert.
  std::int64_t threads(std::int64_t weights) const {
    return std::clamp<std::int64_t>(active_ * weights / kElementsPerThread, 1, team_.threads);
  }

  static bool each_has_whole_panels(const std::vector<LinearWeight>& layers) {
    return std::all_of(layers.begin(), layers.end(), has_whole_panels);
  }

  void sort_pairs() {
    std::vector<std::int64_t>& begins = own_.begins_;
    const std::size_t experts = layers_.gate_up.size();
    check_indices("an expert", rows_.ids, pairs_, static_cast<std::int64_t>(experts));
    begins.assign(experts + 1, 0);
    for (std::int64_t i = 0; i < pairs_; i++) begins[static_cast<std::size_t>(rows_.ids[i]) + 1]++;
    active_ = 0;
    for (std::size_t e = 1; e < begins.size(); e++) {
      active_ += begins[e] > 0 ? 1 : 0;
      begins[e] += begins[e - 1];
    }
    own_.order_.resize(static_cast<std::size_t>(pairs_));
    std::vector<std::int64_t> next(begins.begin(), begins.end() - 1);
    for (std::int64_t i = 0; i < pairs_; i++) {
      own_.order_[static_cast<std::size_t>(next[static_cast<std::size_t>(rows_.ids[i])]++)] = i;
    }
  }

  // Tasks for all pairs: enough of them for the threads to share, each long enough to be read as a stream.
  // outputs: of a layer, of which a task takes some if it `splits`
  std::vector<Task> cut_work(const std::vector<LinearWeight>& layers, std::int64_t outputs, bool splits) const {
    const std::int64_t least_tasks = team_.threads == 1 ? 1 : team_.threads * kTasksPerThread;
    const std::int64_t panels = up_to(outputs, kPanel) / kPanel;
    const std::int64_t expert_bytes = up_to(layers.front().n, kPanel) / kPanel * panel_bytes_of(layers.front());
    const std::int64_t most = std::clamp<std::int64_t>(expert_bytes / kTaskBytes, 1, panels);
    const std::int64_t blocks = splits ? std::min(most, (least_tasks + active_ - 1) / active_) : 1;
    std::vector<Task> tasks;
    for (std::int64_t expert = 0; expert + 1 < static_cast<std::int64_t>(own_.begins_.size()); expert++) {
      const std::int64_t count = count_of(expert), first = own_.begins_[static_cast<std::size_t>(expert)];
      const std::int64_t chunks = (count + kTaskRows - 1) / kTaskRows;
      for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
        const std::int64_t from = first + count * chunk / chunks, to = first + count * (chunk + 1) / chunks;
        for (std::int64_t block = 0; block < blocks; block++) {
          const std::int64_t begin = panels * block / blocks * kPanel;
          const std::int64_t end = std::min(outputs, panels * (block + 1) / blocks * kPanel);
          tasks.push_back({expert, from, to - from, begin, end - begin});
        }
      }
    }
    return tasks;
  }

  // activated [pairs, inner], of the task's pairs and columns
  void make_gates(const Task& task, Worker& worker, std::byte* activated) const {
    std::int64_t x_stride = hidden_;
    const std::byte* x = static_cast<const std::byte*>(rows_.x) + bytes(token_of(task.first) * hidden_, element_);
    if (task.count > 1) {
      x_stride = hidden_ + kPad;
      x = gather(task, worker.rows.at_least(bytes(task.count * x_stride, element_)), x_stride);
    }
    const LinearWeight& weight = layers_.gate_up[static_cast<std::size_t>(task.expert)];
    const Products products = alone(worker);
    std::byte* gates = worker.gates.at_least(bytes(task.count * ways_ * task.width, element_));
    if (task.width == inner_) {
      products.linear(weight, dtype_, x, x_stride, task.count, gates);
    } else {
      for (std::int64_t way = 0; way < ways_; way++) {
        multiply(products, weight, {way * inner_ + task.begin, task.width, ways_ * task.width}, x, x_stride,
                 task.count, gates + bytes(way * task.width, element_));
      }
    }
    if (additions_ != nullptr) add_low_rank_to_gates(task, x, x_stride, gates, worker);
    if (layers_.limit != 0.0f) cut(dtype_, gates, task.count, task.width, layers_.limit);
    std::byte* to = activated + bytes(task.first * inner_ + task.begin, element_);
    const bool is_whole = task.width == inner_;
    for (std::int64_t row = 0; row < task.count; row += is_whole ? task.count : 1) {
      const std::byte* from = gates + bytes(row * ways_ * task.width, element_);
      std::byte* out = to + bytes(row * inner_, element_);
      const std::int64_t rows = is_whole ? task.count : 1;
      if (ways_ == 2) {
        ops_.activate_and_mul(dtype_, layers_.activation, from, out, rows, task.width, products.team);
      } else {
        ops_.activate(dtype_, layers_.activation, from, out, rows * task.width, products.team);
      }
    }
  }

  // What adapters add to the gates of the task's pairs, whose rows of x are x_stride apart.
  void add_low_rank_to_gates(const Task& task, const void* x, std::int64_t x_stride, void* gates,
                             Worker& worker) const {
    AdapterRows& rows = worker.adapters;
    rows.slots.clear();
    rows.starts.assign(1, 0);
    worker.adapted.clear();
    for (std::int64_t i = 0; i < task.count; i++) {
      const std::int64_t slot = slot_of(task.first + i);
      if (slot < 0 || std::find(rows.slots.begin(), rows.slots.end(), slot) != rows.slots.end()) continue;
      rows.slots.push_back(slot);
      for (std::int64_t row = i; row < task.count; row++) {
        if (slot_of(task.first + row) == slot) worker.adapted.push_back(row);
      }
      rows.starts.push_back(static_cast<std::int64_t>(worker.adapted.size()));
    }
    rows.rows = worker.adapted.data();
    additions_->gate_up[static_cast<std::size_t>(task.expert)]->add(
        ops_, {1, nullptr, nullptr}, worker.shrunk, dtype_, x, x_stride, gates, ways_ * inner_, false, rows);
  }

  std::int64_t slot_of(std::int64_t pair) const { return slots_[static_cast<std::size_t>(token_of(pair))]; }

  // What adapters add to down of each token's experts, by the experts' weights.
  void add_low_rank_to_outputs(const std::byte* activated, void* out) const {
    std::vector<std::int64_t> tokens;
    for (std::int64_t token = 0; token < rows_.tokens; token++) {
      if (slots_[static_cast<std::size_t>(token)] >= 0) tokens.push_back(token);
    }
    const std::vector<std::int64_t> pairs_of = pairs_by_token();
    run_tasks(team_, team_.threads, static_cast<std::int64_t>(tokens.size()), [&](std::int64_t index, int thread) {
      const std::int64_t token = tokens[static_cast<std::size_t>(index)];
      Worker& own = worker(thread);
      float* sum = reinterpret_cast<float*>(own.results.at_least(bytes(2 * hidden_, 4)));
      float* added = sum + hidden_;
      const std::int64_t row = 0;
      own.adapters = {{slots_[static_cast<std::size_t>(token)]}, {0, 1}, &row};
      std::fill(sum, sum + hidden_, 0.0f);
      bool has_some = false;
      for (std::int64_t i = 0; i < rows_.k; i++) {
        const std::int64_t pair = pairs_of[static_cast<std::size_t>(token * rows_.k + i)];
        const std::int64_t expert = rows_.ids[own_.order_[static_cast<std::size_t>(pair)]];
        const LowRankLayer& layer = *additions_->down[static_cast<std::size_t>(expert)];
        if (!layer.has(own.adapters.slots.front())) continue;
        has_some = true;
        std::fill(added, added + hidden_, 0.0f);
        layer.add(ops_, {1, nullptr, nullptr}, own.shrunk, dtype_, activated + bytes(pair * inner_, element_), inner_,
                  added, hidden_, true, own.adapters);
        ops_.add_scaled(added, weight_of(pair), sum, hidden_);
      }
      if (has_some) add_to_row(sum, out, token);
    });
  }

  void add_to_row(const float* sum, void* out, std::int64_t token) const {
    if (dtype_ == DType::f32) {
      float* to = static_cast<float*>(out) + token * hidden_;
      for (std::int64_t i = 0; i < hidden_; i++) to[i] += sum[i];
    } else {
      std::uint16_t* to = static_cast<std::uint16_t*>(out) + token * hidden_;
      for (std::int64_t i = 0; i < hidden_; i++) to[i] = narrowed(widened(to[i]) + sum[i]);
    }
  }

  // [tokens, k] the pairs of each token, in the order of the experts.
  std::vector<std::int64_t> pairs_by_token() const {
    std::vector<std::int64_t> pairs_of(static_cast<std::size_t>(pairs_)), next(static_cast<std::size_t>(rows_.tokens));
    for (std::int64_t pair = 0; pair < pairs_; pair++) {
      const std::int64_t token = token_of(pair);
      pairs_of[static_cast<std::size_t>(token * rows_.k + next[static_cast<std::size_t>(token)]++)] = pair;
    }
    return pairs_of;
  }

  const std::byte* gather(const Task& task, std::byte* to, std::int64_t stride) const {
    const std::size_t row_bytes = bytes(hidden_, element_);
    for (std::int64_t i = 0; i < task.count; i++) {
      const std::byte* from = static_cast<const std::byte*>(rows_.x) + bytes(token_of(task.first + i), 1) * row_bytes;
      std::memcpy(to + bytes(i * stride, element_), from, row_bytes);
    }
    return to;
  }

  // Outputs of a layer, and how far apart their rows are.
  struct Columns {
    std::int64_t begin, count, stride;
  };

  // Some outputs, of `dtype` or, with `wide`, fp32. Parts of a layer begin with whole panels.
  void multiply(const Products& products, const LinearWeight& weight, const Columns& columns, const void* x,
                std::int64_t x_stride, std::int64_t count, std::byte* out, bool wide = false) const {
    const std::int64_t each = wide ? 4 : element_;
    std::int64_t part_begin = 0;
    for (const LinearWeight* part = &weight; part != nullptr; part_begin += part->n, part = part->next) {
      const std::int64_t begin = std::max(columns.begin, part_begin);
      const std::int64_t end = std::min(columns.begin + columns.count, part_begin + part->n);
      if (begin >= end) continue;
      LinearWeight slice = slice_of(*part, begin - part_begin, end - begin, element_);
      slice.out_stride = columns.stride;
      std::byte* to = out + bytes(begin - columns.begin, each);
      if (!wide) {
        products.linear(slice, dtype_, x, x_stride, count, to);
      } else if (!is_dense(slice.kind) && products.many(slice, dtype_, x, x_stride, count, to, true)) {
        continue;
      } else {
        products.linear_fp32(slice, dtype_, x, x_stride, count, reinterpret_cast<float*>(to));
      }
    }
  }

  // fp32 outputs of down, whatever adds its bias.
  void multiply_down(const Products& products, const Task& task, const std::byte* activated, std::int64_t stride,
                     Worker& worker, float* out) const {
    const LinearWeight& weight = layers_.down[static_cast<std::size_t>(task.expert)];
    const std::byte* x = activated + bytes(task.first * inner_, element_);
    if (makes_fp32(weight, dtype_)) {
      return multiply(products, weight, {task.begin, task.width, stride}, x, inner_, task.count,
                      reinterpret_cast<std::byte*>(out), true);
    }
    std::byte* narrow = worker.gates.at_least(bytes(task.count * task.width, element_));
    multiply(products, weight, {task.begin, task.width, task.width}, x, inner_, task.count, narrow);
    const std::uint16_t* from = reinterpret_cast<const std::uint16_t*>(narrow);
    for (std::int64_t row = 0; row < task.count; row++, from += task.width) {
      for (std::int64_t i = 0; i < task.width; i++) out[row * stride + i] = widened(from[i]);
    }
  }

  // Few pairs.
  void add_results(const std::byte* activated, void* out) const {
    const bool splits = each_has_whole_panels(layers_.down);
    const std::vector<Task> tasks = cut_work(layers_.down, hidden_, splits);
    float* results = reinterpret_cast<float*>(own_.results_.at_least(bytes(pairs_ * hidden_, 4)));
    run_tasks(team_, threads(hidden_ * inner_), static_cast<std::int64_t>(tasks.size()),
              [&](std::int64_t index, int thread) {
                const Task& task = tasks[static_cast<std::size_t>(index)];
                multiply_down(alone(worker(thread)), task, activated, hidden_, worker(thread),
                              results + task.first * hidden_ + task.begin);
              });
    float* sums = reinterpret_cast<float*>(own_.sums_.at_least(bytes(rows_.tokens * hidden_, 4)));
    const std::vector<std::int64_t> pairs_of = pairs_by_token();
    run_parts(team_, rows_.tokens, std::max<std::int64_t>(1, kElementsPerThread / (rows_.k * hidden_)),
              [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t token = begin; token < end; token++) {
                  float* sum = sums + token * hidden_;
                  std::fill(sum, sum + hidden_, 0.0f);
                  for (std::int64_t i = 0; i < rows_.k; i++) {
                    const std::int64_t pair = pairs_of[static_cast<std::size_t>(token * rows_.k + i)];
                    ops_.add_scaled(results + pair * hidden_, weight_of(pair), sum, hidden_);
                  }
                  write(sum, out, token, 0, hidden_);
                }
              });
  }

  // Many pairs: a task has all experts' outputs [begin, begin + width).
  void add_by_outputs(const std::byte* activated, void* out) const {
    const std::int64_t panels = up_to(hidden_, kPanel) / kPanel;
    const bool splits = each_has_whole_panels(layers_.down);
    const std::int64_t blocks = splits && team_.threads > 1 ? std::min<std::int64_t>(panels, 4 * team_.threads) : 1;
    const std::int64_t widest = up_to(panels, blocks) / blocks * kPanel;
    float* sums = reinterpret_cast<float*>(own_.sums_.at_least(bytes(rows_.tokens * widest * blocks, 4)));
    run_tasks(team_, team_.threads, blocks, [&](std::int64_t block, int thread) {
      Task task{0, 0, 0, panels * block / blocks * kPanel, 0};
      task.width = std::min(hidden_, panels * (block + 1) / blocks * kPanel) - task.begin;
      float* sum = sums + block * rows_.tokens * widest;
      std::fill(sum, sum + rows_.tokens * task.width, 0.0f);
      Worker& own = worker(thread);
      float* results = reinterpret_cast<float*>(own.results.at_least(bytes(kTaskRows * task.width, 4)));
      for (; task.expert + 1 < static_cast<std::int64_t>(own_.begins_.size()); task.expert++) {
        const std::int64_t end = own_.begins_[static_cast<std::size_t>(task.expert) + 1];
        for (task.first = own_.begins_[static_cast<std::size_t>(task.expert)]; task.first < end; task.first += task.count) {
          task.count = std::min(kTaskRows, end - task.first);
          multiply_down(alone(own), task, activated, task.width, own, results);
          for (std::int64_t i = 0; i < task.count; i++) {
            ops_.add_scaled(results + i * task.width, weight_of(task.first + i),
                            sum + token_of(task.first + i) * task.width, task.width);
          }
        }
      }
      for (std::int64_t token = 0; token < rows_.tokens; token++) {
        write(sum + token * task.width, out, token, task.begin, task.width);
      }
    });
  }

  void write(const float* sum, void* out, std::int64_t token, std::int64_t begin, std::int64_t width) const {
    std::byte* to = static_cast<std::byte*>(out) + bytes(token * hidden_ + begin, element_);
    if (dtype_ == DType::f32) {
      std::memcpy(to, sum, bytes(width, 4));
    } else {
      ops_.narrow(sum, to, width);
    }
  }

  Mixture& own_;
  const Ops& ops_;
  const Team team_;
  const DType dtype_;
  const ExpertLayers& layers_;
  const ExpertAdditions* const additions_;  // null: no adapter of the step adds
  std::vector<std::int64_t> slots_;         // of the tokens' adapters, or -1
  const ExpertRows& rows_;
  const std::int64_t element_, hidden_, inner_, ways_, pairs_;
  std::int64_t active_ = 0;  // experts with pairs
};

bool ExpertAdditions::has(const AdapterRows& rows) const {
  const auto adds = [&](const LowRankLayer* layer) {
    return std::any_of(rows.slots.begin(), rows.slots.end(), [&](std::int64_t slot) { return layer->has(slot); });
  };
  return std::any_of(gate_up.begin(), gate_up.end(), adds) || std::any_of(down.begin(), down.end(), adds);
}

void Mixture::run(Context& context, DType dtype, const ExpertLayers& layers, const ExpertRows& rows, void* out,
                  const ExpertAdditions* additions, const AdapterRows* adapters) {
  if (additions != nullptr && !additions->has(*adapters)) additions = nullptr;
  if (rows.tokens * rows.k > 0) {
    Round(*this, context, dtype, layers, rows, additions, adapters).run(out);
  } else {
    std::memset(out, 0, static_cast<std::size_t>(rows.tokens * layers.hidden() * (dtype == DType::f32 ? 4 : 2)));
  }
}

}  // namespace sapwood
