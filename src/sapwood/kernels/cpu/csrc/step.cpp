#include "step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "narrow.h"
#include "states.h"
#include "tasks.h"

namespace sapwood {
namespace {

constexpr std::int64_t kRowsToFetchAhead = 8;  // with more, the small ops keep all threads busy
constexpr std::int64_t kElementsPerPart = 8192;  // of rows that are changed in place

// to[i] = f(to[i], i-th number of `from`) in fp32, for n numbers.
template <typename F>
void change(DType dtype, void* to, const void* from, std::int64_t n, const F& f) {
  if (dtype == DType::f32) {
    float* out = static_cast<float*>(to);
    const float* x = static_cast<const float*>(from);
    for (std::int64_t i = 0; i < n; i++) out[i] = f(out[i], x[i]);
  } else {
    std::uint16_t* out = static_cast<std::uint16_t*>(to);
    const std::uint16_t* x = static_cast<const std::uint16_t*>(from);
    for (std::int64_t i = 0; i < n; i++) out[i] = narrowed(f(widened(out[i]), widened(x[i])));
  }
}

// The sum of a token's weights of experts from `first` on, which give what they take. Their pairs become pairs of
// weight 0 of the first expert.
float take_shares(std::int64_t* ids, float* weights, std::int64_t k, std::int64_t first) {
  double sum = 0;
  for (std::int64_t i = 0; i < k; i++) {
    if (ids[i] < first) continue;
    sum += static_cast<double>(weights[i]);
    ids[i] = 0;
    weights[i] = 0.0f;
  }
  return static_cast<float>(sum);
}

const LinearWeight* weight_of(const StepOp& op) {
  if (const MultiplyOp* multiply = std::get_if<MultiplyOp>(&op)) return &multiply->weight;
  if (const LogitsOp* logits = std::get_if<LogitsOp>(&op)) return &logits->weight;
  if (const MixOp* mix = std::get_if<MixOp>(&op)) return &mix->router;
  return nullptr;
}

}  // namespace

void RecordedStep::add(const StepOp& op) {
  if (const EmbedOp* embed = std::get_if<EmbedOp>(&op)) vocab_ = std::min(vocab_, embed->vocab);
  if (const RotateAndWriteOp* rotate = std::get_if<RotateAndWriteOp>(&op)) {
    max_positions_ = std::min(max_positions_, rotate->max_positions);
    if (rotate->heads.num_kv_heads > 0) {
      count_places(rotate->group, rotate->cache.num_pages * rotate->cache.page_size);
    }
  }
  if (const RotateLatentOp* rotate = std::get_if<RotateLatentOp>(&op)) {
    max_positions_ = std::min(max_positions_, rotate->max_positions);
    count_places(rotate->group, rotate->num_pages * rotate->args.page_size);
  }
  if (const AddPositionsOp* positions = std::get_if<AddPositionsOp>(&op)) {
    max_positions_ = std::min(max_positions_, positions->num_positions);
  }
  if (const ScaleByPositionOp* scaled = std::get_if<ScaleByPositionOp>(&op)) {
    max_positions_ = std::min(max_positions_, scaled->num_positions);
  }
  if (const ConvolveOp* convolve = std::get_if<ConvolveOp>(&op)) {
    count_slots(convolve->group, convolve->num_slots);
  }
  if (const DeltaOp* delta = std::get_if<DeltaOp>(&op)) count_slots(delta->group, delta->num_slots);
  if (const ScanOp* scan = std::get_if<ScanOp>(&op)) count_slots(scan->group, scan->num_slots);
  if (const ChooseKeysOp* choose = std::get_if<ChooseKeysOp>(&op)) {
    num_tables_ = std::max(num_tables_, choose->group + 1);
  }
  if (weight_of(op) != nullptr) {
    for (std::size_t i = ops_.size(); i-- > 0 && next_weight_[i] == 0;) next_weight_[i] = ops_.size();
  }
  ops_.push_back(op);
  next_weight_.push_back(0);
}

void RecordedStep::count_group(std::size_t group) {
  if (group < cache_places_.size()) return;
  cache_places_.resize(group + 1, std::numeric_limits<std::int64_t>::max());
  num_slots_.resize(group + 1, 0);
}

void RecordedStep::count_places(std::size_t group, std::int64_t places) {
  count_group(group);
  cache_places_[group] = std::min(cache_places_[group], places);
}

void RecordedStep::count_slots(std::size_t group, std::int64_t num_slots) {
  count_group(group);
  num_slots_[group] = num_slots;
}

void RecordedStep::check(const Inputs& inputs) const {
  for (const AttentionPlan* plan : inputs.plans) {
    if (plan->num_tokens() == inputs.num_tokens) continue;
    throw std::invalid_argument("the step has " + std::to_string(inputs.num_tokens) +
                                " tokens but the batch's query lengths add up to " +
                                std::to_string(plan->num_tokens()));
  }
  if (inputs.num_logits > inputs.num_tokens) {
    throw std::invalid_argument("logits of " + std::to_string(inputs.num_logits) + " rows are wanted but there are " +
                                std::to_string(inputs.num_tokens) + " tokens");
  }
  check_indices("token_ids", inputs.token_ids, inputs.num_tokens, vocab_);
  check_indices("positions", inputs.positions, inputs.num_tokens, max_positions_);
  if (inputs.write_index.size() != cache_places_.size()) {
    throw std::invalid_argument("there are " + std::to_string(inputs.write_index.size()) + " write indices for " +
                                std::to_string(cache_places_.size()) + " groups of caches");
  }
  for (std::size_t group = 0; group < cache_places_.size(); group++) {
    check_indices("write_index", inputs.write_index[group], inputs.num_tokens, cache_places_[group]);
  }
  check_indices("logits_index", inputs.logits_index, inputs.num_logits, inputs.num_tokens);
  check_states(inputs);
  check_tables(inputs);
  inputs.adapters.check(inputs.num_tokens);
  inputs.selected_adapters.check(inputs.num_logits);
}

void RecordedStep::check_states(const Inputs& inputs) const {
  for (std::size_t group = 0; group < num_slots_.size(); group++) {
    if (num_slots_[group] == 0) continue;
    if (group >= inputs.slots.size() || inputs.slots[group] == nullptr) {
      throw std::invalid_argument("group " + std::to_string(group) + " of caches has states, but there are no slots");
    }
    check_indices("slots", inputs.slots[group], inputs.num_requests, num_slots_[group]);
    check_query_start(inputs.query_start, inputs.num_requests, inputs.num_tokens);
  }
}

void RecordedStep::check_tables(const Inputs& inputs) const {
  if (num_tables_ == 0) return;
  if (inputs.tables.size() < num_tables_ || inputs.context_len == nullptr) {
    throw std::invalid_argument("keys are chosen, but there are no page tables or lengths of requests");
  }
  check_query_start(inputs.query_start, inputs.num_requests, inputs.num_tokens);
}

// Runs one op after the other; `rows` is the number of rows that the current op works on.
class RecordedStep::Runner {
 public:
  Runner(RecordedStep& step, Context& context, const Inputs& inputs)
      : dtype_(step.dtype_), element_(step.dtype_ == DType::f32 ? 4 : 2), context_(context), inputs_(inputs),
        routes_(step.routes_), mixture_(step.mixture_), chosen_(step.chosen_) {
    chosen_.forget();
    std::size_t total = 0;
    std::vector<std::size_t> begins;
    for (const std::int64_t width : step.widths_) {
      begins.push_back(total);
      total += static_cast<std::size_t>((inputs.num_tokens * width * element_ + 63) / 64 * 64);
    }
    std::byte* memory = step.buffer_.at_least(total);
    for (const std::size_t begin : begins) places_.push_back(memory + begin);
  }

  std::int64_t rows = 0;
  const AdapterRows* adapters = nullptr;  // of these rows
  const LinearWeight* next = nullptr;  // the weight that is used after this op's, or null

  void operator()(const EmbedOp& op) const {
    if (op.index < inputs_.vectors.size() && inputs_.vectors[op.index] != nullptr) {
      std::memcpy(at(op.out), inputs_.vectors[op.index], static_cast<std::size_t>(rows * op.table.hidden * element_));
      return;
    }
    embed(context_.ops(), op.table, inputs_.token_ids, rows, dtype_, at(op.out));
    if (op.scale != 1.0f) scale(op.out, op.table.hidden, op.scale);
  }

  void operator()(const NormOp& op) const {
    std::byte* residual = op.residual == kNowhere ? nullptr : at(op.residual);
    if (!op.centered) {
      context_.ops().rms_norm(dtype_, at(op.x), residual, op.weight, at(op.out), rows, op.width, op.eps,
                              context_.team());
      return;
    }
    if (residual != nullptr) add(residual, at(op.x), op.width);
    context_.ops().layer_norm(dtype_, residual == nullptr ? at(op.x) : residual, op.weight, op.bias, at(op.out), rows,
                              op.width, op.eps, context_.team());
  }

  void operator()(const MultiplyOp& op) const {
    context_.linear(op.weight, dtype_, at(op.x), op.weight.k, rows, at(op.out));
    if (rows <= kRowsToFetchAhead && next != nullptr) context_.fetch(*next);
  }

  void operator()(const LowRankOp& op) const {
    if (adapters->slots.empty()) return;
    op.layer->add(context_, dtype_, at(op.x), op.x_width, at(op.out), op.out_width, false, *adapters);
  }

  void operator()(const RotateAndWriteOp& op) const {
    RopeArgs rope{};
    rope.qkv = at(op.x);
    rope.q_out = at(op.out);
    rope.num_tokens = rows;
    rope.num_heads = op.heads.num_heads;
    rope.num_kv_heads = op.heads.num_kv_heads;
    rope.head_dim = op.heads.head_dim;
    rope.rotary_dim = op.rotary_dim;
    rope.page_size = op.cache.page_size;
    rope.q_norm = op.q_norm;
    rope.k_norm = op.k_norm;
    rope.eps = op.eps;
    rope.cos_sin = op.cos_sin;
    rope.positions = inputs_.positions;
    rope.write_index = inputs_.write_index[op.group];
    rope.keys = op.cache.keys;
    rope.values = op.cache.values;
    rope.key_stride = op.cache.key_stride;
    rope.value_stride = op.cache.value_stride;
    rope.kv = op.cache.kv;
    rope.team = context_.team();
    context_.ops().qk_norm_rope_write_kv(dtype_, rope);
  }

  void operator()(const AttendOp& op) const {
    AttentionPlan::Tensors tensors{at(op.x), op.heads.width(), op.cache.keys, op.cache.key_stride, op.cache.values,
                                   op.cache.value_stride, op.cache.kv, at(op.out), op.scale, op.traits,
                                   op.value_dim};
    if (op.sparse && chosen_.any()) {
      tensors.page_size = op.cache.page_size;
      chosen_.plan(context_, op.heads.num_heads, op.heads.head_dim).run_held(context_, dtype_, tensors);
      return;
    }
    inputs_.plans.at(static_cast<std::size_t>(op.plan))->run_held(context_, dtype_, tensors);
  }

  void operator()(const ChooseKeysOp& op) const {
    const std::int32_t* lengths = inputs_.context_len;
    chosen_.forget();
    if (std::all_of(lengths, lengths + inputs_.num_requests, [&](std::int32_t n) { return n <= op.choice.num_chosen; })) {
      return;
    }
    const std::int64_t count = rows * op.choice.num_heads;
    float* weights = reinterpret_cast<float*>(routes_.at_least(static_cast<std::size_t>(count) * sizeof(float)));
    context_.linear_fp32(op.weights, dtype_, at(op.x), op.weights.k, rows, weights);
    for (std::int64_t i = 0; i < count; i++) weights[i] *= op.scale;
    KeyChoice choice = op.choice;
    choice.q = at(op.q);
    choice.weights = weights;
    const PageTable& table = inputs_.tables[op.group];
    choice.page_table = table.pages;
    choice.page_table_stride = table.stride;
    choice.max_pages = table.max_pages;
    for (std::int64_t i = 0; i < inputs_.num_requests; i++) {
      choice.query.push_back(inputs_.query_start[i + 1] - inputs_.query_start[i]);
      choice.context.push_back(lengths[i]);
    }
    chosen_.choose(context_, dtype_, std::move(choice));
  }

  void operator()(const RotateLatentOp& op) const {
    LatentRopeArgs rope = op.args;
    rope.q = at(op.q);
    rope.num_tokens = rows;
    rope.latent = at(op.x);
    rope.positions = inputs_.positions;
    rope.write_index = inputs_.write_index[op.group];
    rope.team = context_.team();
    context_.ops().norm_rope_write_latent(dtype_, rope);
  }

  void operator()(const MultiplyHeadsOp& op) const {
    const HeadProducts& layer = *op.layer;
    const std::int64_t in = layer.num_in() + op.kept, out = layer.num_out() + op.kept;
    op.layer->run(context_, dtype_, {at(op.x), layer.num_heads() * in, in}, {at(op.out), layer.num_heads() * out, out},
                  rows, op.kept);
  }

  void operator()(const TakeColumnsOp& op) const {
    const std::byte* from = at(op.x) + op.first * element_;
    each_row(op.out, op.width, [&](std::int64_t row, std::byte* to) {
      std::memcpy(to, from + row * op.x_width * element_, static_cast<std::size_t>(op.width * element_));
    });
  }

  void operator()(const ConvolveOp& op) const {
    ConvArgs conv{};
    conv.x = at(op.x) + op.first * element_;
    conv.x_stride = op.x_width;
    conv.gated = op.gated;
    conv.silu = op.silu;
    conv.weight = op.weight != nullptr ? op.weight : at(op.weights);
    conv.weight_stride = op.weight != nullptr ? 0 : op.channels * op.length;
    conv.bias = op.bias;
    conv.states = op.states;
    conv.state_stride = op.state_stride;
    conv.slots = inputs_.slots[op.group];
    conv.query_start = inputs_.query_start;
    conv.context_len = inputs_.context_len;
    conv.num_requests = inputs_.num_requests;
    conv.channels = op.channels;
    conv.length = op.length;
    conv.out = at(op.out);
    conv.team = context_.team();
    context_.ops().causal_conv(dtype_, conv);
  }

  void operator()(const ScanOp& op) const {
    ScanArgs scan = op.args;
    for (std::size_t i = 0; i < kScanInputs; i++) {
      scan.inputs[i] = op.inputs[i] == kNowhere ? nullptr : at(op.inputs[i]) + op.firsts[i] * element_;
    }
    scan.slots = inputs_.slots[op.group];
    scan.query_start = inputs_.query_start;
    scan.context_len = inputs_.context_len;
    scan.num_requests = inputs_.num_requests;
    scan.out = at(op.out);
    scan.team = context_.team();
    context_.ops().scan(dtype_, scan);
  }

  void operator()(const ActivateOp& op) const {
    const Ops& ops = context_.ops();
    if (op.gated) {
      ops.activate_and_mul(dtype_, op.activation, at(op.x), at(op.out), rows, op.width, context_.team());
    } else {
      ops.activate(dtype_, op.activation, at(op.x), at(op.out), rows * op.width, context_.team());
    }
  }

  void operator()(const GatedNormOp& op) const {
    GatedNormArgs norm = op.args;
    norm.x = at(op.x);
    norm.gate = at(op.gate) + op.first * element_;
    norm.gate_stride = op.gate_width;
    norm.rows = rows;
    norm.out = at(op.out);
    norm.team = context_.team();
    context_.ops().gated_rms_norm(dtype_, norm);
  }

  void operator()(const DeltaOp& op) const {
    DeltaArgs delta = op.args;
    delta.qkv = at(op.qkv);
    delta.decay = at(op.decay) + op.decay_first * element_;
    delta.write = at(op.write) + op.write_first * element_;
    delta.slots = inputs_.slots[op.group];
    delta.query_start = inputs_.query_start;
    delta.context_len = inputs_.context_len;
    delta.num_requests = inputs_.num_requests;
    delta.out = at(op.out);
    run_delta_rule(context_, dtype_, delta);
  }

  void operator()(const AddOp& op) const {
    if (op.width == op.residual_width) return add(at(op.residual), at(op.x), op.width);
    const std::byte* from = at(op.x);
    each_row(op.residual, op.residual_width, [&](std::int64_t row, std::byte* to) {
      change(dtype_, to + op.first * element_, from + row * op.width * element_, op.width,
             [](float total, float more) { return total + more; });
    });
  }

  void operator()(const JoinOp& op) const {
    const std::size_t x_bytes = bytes(op.x_width), y_bytes = bytes(op.y_width);
    const std::byte* x = at(op.x);
    const std::byte* y = at(op.y);
    each_row(op.out, op.x_width + op.y_width, [&](std::int64_t row, std::byte* to) {
      std::memcpy(to, x + static_cast<std::size_t>(row) * x_bytes, x_bytes);
      std::memcpy(to + x_bytes, y + static_cast<std::size_t>(row) * y_bytes, y_bytes);
    });
  }

  void operator()(const ResizeHeadsOp& op) const {
    const std::size_t before = bytes(op.first), old_bytes = bytes(op.size), new_bytes = bytes(op.new_size);
    const std::size_t kept = std::min(old_bytes, new_bytes);
    const std::byte* x = at(op.x);
    each_row(op.out, op.first + op.count * op.new_size, [&](std::int64_t row, std::byte* to) {
      const std::byte* from = x + static_cast<std::size_t>(row) * bytes(op.x_width);
      std::memcpy(to, from, before);
      from += before;
      to += before;
      for (std::int64_t head = 0; head < op.count; head++, from += old_bytes, to += new_bytes) {
        std::memcpy(to, from, kept);
        std::memset(to + kept, 0, new_bytes - kept);
      }
    });
  }

  void operator()(const ScaleOp& op) const { scale(op.residual, op.width, op.factor); }

  void operator()(const GateRowsOp& op) const { 
    gate_rows(dtype_, at(op.residual), at(op.gate), rows * op.parts, op.width);
  }

  void operator()(const GateColumnsOp& op) const {
    const std::byte* gate = at(op.gate) + op.first * element_;
    context_.ops().multiply_logistic(dtype_, at(op.residual), gate, op.gate_width, rows, op.width, context_.team());
  }

  void operator()(const MixOp& op) const {
    const std::int64_t experts = op.router.n, k = op.routing.chosen;
    const std::int64_t width = op.layers->hidden(), numbers = rows * (experts + 3 * k);
    const std::int64_t kept_rows = op.num_identity > 0 ? rows : 0;
    std::byte* memory = routes_.at_least(static_cast<std::size_t>(numbers * 4 + kept_rows * width * element_));
    // What is 8 bytes wide comes first.
    std::int64_t* ids = reinterpret_cast<std::int64_t*>(memory);
    float* logits = reinterpret_cast<float*>(memory);
    float* weights = logits + 2 * rows * k;
    logits = weights + rows * k;
    context_.linear_fp32(op.router, dtype_, at(op.x), op.router.k, rows, logits);
    route(op.routing, logits, op.bias, rows, experts, weights, ids, context_.team());
    std::byte* kept = memory + numbers * 4;
    for (std::int64_t row = 0; row < kept_rows; row++) {
      const float share = take_shares(ids + row * k, weights + row * k, k, experts - op.num_identity);
      const std::int64_t at_row = row * width * element_;
      change(dtype_, kept + at_row, at(op.taken) + at_row, width, [=](float, float x) { return x * share; });
    }
    mixture_.run(context_, dtype_, *op.layers, {at(op.taken), rows, k, ids, weights}, at(op.out),
                 &op.additions, adapters);
    // Apart from the product, so that no compiler makes one rounding of two.
    if (kept_rows > 0) add(at(op.out), kept, width);
    if (rows <= kRowsToFetchAhead && next != nullptr) context_.fetch(*next);
  }

  void operator()(const AddPositionsOp& op) const {
    const std::size_t bytes = static_cast<std::size_t>(op.width * element_);
    each_row(op.residual, op.width, [&](std::int64_t row, std::byte* x) {
      const std::size_t from = static_cast<std::size_t>(op.first + inputs_.positions[row]);
      change(dtype_, x, static_cast<const std::byte*>(op.table) + from * bytes, op.width,
             [](float sum, float more) { return sum + more; });
    });
  }

  void operator()(const NormColumnsOp& op) const {
    const Ops& ops = context_.ops();
    const Team alone{1, nullptr, nullptr};
    each_row(op.residual, op.width, [&](std::int64_t, std::byte* row) {
      std::byte* x = row + op.first * element_;
      if (op.centered) return ops.layer_norm(dtype_, x, op.weight, op.bias, x, op.count, op.size, op.eps, alone);
      ops.rms_norm(dtype_, x, nullptr, op.weight, x, op.count, op.size, op.eps, alone);
    });
  }

  void operator()(const ScaleColumnsOp& op) const {
    each_row(op.residual, op.width, [&](std::int64_t, std::byte* row) {
      std::byte* x = row + op.first * element_;
      change(dtype_, x, op.factors, op.size, [](float value, float factor) { return value * factor; });
      if (op.shifts == nullptr) return;
      change(dtype_, x, op.shifts, op.size, [](float value, float shift) { return value + shift; });
    });
  }

  void operator()(const ScaleByPositionOp& op) const {
    each_row(op.residual, op.width, [&](std::int64_t row, std::byte* x) {
      const float factor = op.factors[inputs_.positions[row]];
      change(dtype_, x, x, op.width, [=](float value, float) { return value * factor; });
    });
  }

  void operator()(const ClipOp& op) const {
    const float limit = dtype_ == DType::f32 ? op.limit : widened(narrowed(op.limit));
    const auto clipped = [=](float x, float) { return x > limit ? limit : x < -limit ? -limit : x; };
    each_row(op.residual, op.width, [&](std::int64_t, std::byte* x) { change(dtype_, x, x, op.width, clipped); });
  }

  void operator()(const XieluOp& op) const {
    context_.ops().xielu(dtype_, at(op.x), at(op.out), rows * op.width, op.above, op.below, context_.team());
  }

  void operator()(const KeepStatesOp& op) const {
    if (inputs_.states == nullptr) return;
    const std::size_t bytes = static_cast<std::size_t>(op.width * element_);
    std::byte* states = static_cast<std::byte*>(inputs_.states);
    for (std::int64_t row = 0; row < rows; row++) {
      std::byte* to = states + (row * op.total + op.first) * element_;
      std::memcpy(to, at(op.x) + static_cast<std::size_t>(row) * bytes, bytes);
      if (op.more == kNowhere) continue;
      change(dtype_, to, at(op.more) + static_cast<std::size_t>(row) * bytes, op.width,
             [](float sum, float more) { return sum + more; });
    }
  }

  void operator()(const SelectRowsOp& op) const {
    const std::size_t bytes = static_cast<std::size_t>(op.width * element_);
    for (std::int64_t i = 0; i < rows; i++) {
      std::memcpy(at(op.out) + static_cast<std::size_t>(i) * bytes,
                  at(op.x) + static_cast<std::size_t>(inputs_.logits_index[i]) * bytes, bytes);
    }
  }

  void operator()(const LogitsOp& op) const {
    context_.linear_fp32(op.weight, dtype_, at(op.x), op.weight.k, rows, inputs_.logits);
    if (op.additions == nullptr || adapters->slots.empty()) return;
    op.additions->add(context_, dtype_, at(op.x), op.weight.k, inputs_.logits, op.vocab, true, *adapters);
  }

 private:
  std::size_t bytes(std::int64_t columns) const { return static_cast<std::size_t>(columns * element_); }

  std::byte* at(Place place) const { return places_.at(static_cast<std::size_t>(place)); }

  void add(std::byte* sum, const std::byte* x, std::int64_t width) const {
    change(dtype_, sum, x, rows * width, [](float total, float more) { return total + more; });
  }

  // Calls change_row(row, its numbers) for all rows of a place.
  template <class ChangeRow>
  void each_row(Place place, std::int64_t width, const ChangeRow& change_row) const {
    std::byte* all = at(place);
    const std::int64_t grain = std::max<std::int64_t>(1, kElementsPerPart / width);
    run_parts(context_.team(), rows, grain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; row++) change_row(row, all + row * width * element_);
    });
  }

  void scale(Place place, std::int64_t width, float factor) const {
    change(dtype_, at(place), at(place), rows * width, [=](float x, float) { return x * factor; });
  }

  DType dtype_;
  std::int64_t element_;
  Context& context_;
  const Inputs& inputs_;
  std::vector<std::byte*> places_;
  Buffer& routes_;
  Mixture& mixture_;
  ChosenKeys& chosen_;
};

void RecordedStep::run(Context& context, const Inputs& inputs) {
  const std::lock_guard<std::mutex> lock(context.mutex);
  check(inputs);
  Runner runner(*this, context, inputs);
  runner.rows = inputs.num_tokens;
  runner.adapters = &inputs.adapters;
  for (std::size_t i = 0; i < ops_.size(); i++) {
    if (i == num_before_) {
      if (inputs.num_logits == 0) return;  // all keys and values are written
      runner.rows = inputs.num_logits;
      runner.adapters = &inputs.selected_adapters;
    }
    runner.next = next_weight_[i] == 0 ? nullptr : weight_of(ops_[next_weight_[i]]);
    std::visit(runner, ops_[i]);
  }
}

}  // namespace sapwood
