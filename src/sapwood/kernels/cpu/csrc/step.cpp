#include "step.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace sapwood {
namespace {

constexpr std::int64_t kRowsToFetchAhead = 8;  // with more, the small ops keep all threads busy

}  // namespace

// Cut from one buffer, for all layers.
struct DecoderStep::Activations {
  std::byte* residual;  // [T, hidden] the sum so far
  std::byte* x;         // [T, hidden] what is to be added to it
  std::byte* normed;    // [T, hidden]
  std::byte* qkv;       // [T, (Hq + 2 Hk) D]
  std::byte* q;         // [T, Hq D]
  std::byte* attended;  // [T, Hq D]
  std::byte* gate_up;   // [T, 2 I]
  std::byte* gated;     // [T, I]

  Activations(Buffer& buffer, const Shape& shape, std::int64_t gate_up_width, std::int64_t tokens) {
    const std::int64_t heads = static_cast<std::int64_t>(shape.num_heads) * shape.head_dim;
    const std::int64_t kv_heads = static_cast<std::int64_t>(shape.num_kv_heads) * shape.head_dim;
    const std::pair<std::byte**, std::int64_t> parts[] = {
        {&residual, shape.hidden}, {&x, shape.hidden}, {&normed, shape.hidden},
        {&qkv, heads + 2 * kv_heads}, {&q, heads}, {&attended, heads},
        {&gate_up, gate_up_width}, {&gated, gate_up_width / 2}};
    const std::int64_t element = shape.dtype == DType::f32 ? 4 : 2;
    const auto bytes = [&](std::int64_t width) {
      return static_cast<std::size_t>((tokens * width * element + 63) / 64 * 64);
    };
    std::size_t total = 0;
    for (const auto& [field, width] : parts) total += bytes(width);
    std::byte* next = buffer.at_least(total);
    for (const auto& [field, width] : parts) {
      *field = next;
      next += bytes(width);
    }
  }
};

DecoderStep::DecoderStep(const Shape& shape, const EmbeddingTable& embedding, const float* cos_sin,
                         const void* final_norm, const LinearWeight& lm_head,
                         std::vector<LayerWeights> layers)
    : shape_(shape), embedding_(embedding), cos_sin_(cos_sin), final_norm_(final_norm),
      lm_head_(lm_head), layers_(std::move(layers)) {
  if (layers_.empty()) throw std::invalid_argument("a decoder needs at least one layer");
}

void DecoderStep::check(const AttentionPlan& plan, const Inputs& inputs) const {
  if (plan.num_tokens() != inputs.num_tokens) {
    throw std::invalid_argument("the step has " + std::to_string(inputs.num_tokens) +
                                " tokens but the batch's query lengths add up to " +
                                std::to_string(plan.num_tokens()));
  }
  if (inputs.num_logits > inputs.num_tokens) {
    throw std::invalid_argument("logits of " + std::to_string(inputs.num_logits) + " rows are wanted but there are " +
                                std::to_string(inputs.num_tokens) + " tokens");
  }
  check_indices("token_ids", inputs.token_ids, inputs.num_tokens, shape_.vocab);
  check_indices("positions", inputs.positions, inputs.num_tokens, shape_.max_positions);
  check_indices("write_index", inputs.write_index, inputs.num_tokens,
                shape_.num_pages * shape_.page_size);
  check_indices("logits_index", inputs.logits_index, inputs.num_logits, inputs.num_tokens);
}

void DecoderStep::gather(const void* from, const std::int64_t* rows, std::int64_t n,
                         std::int64_t width, void* to) const {
  const std::size_t bytes = static_cast<std::size_t>(width) * (shape_.dtype == DType::f32 ? 4 : 2);
  for (std::int64_t i = 0; i < n; i++) {
    std::memcpy(static_cast<std::byte*>(to) + static_cast<std::size_t>(i) * bytes,
                static_cast<const std::byte*>(from) + static_cast<std::size_t>(rows[i]) * bytes, bytes);
  }
}

namespace {

// `next`: the weight that is used after this one.
void multiply(Context& context, DType dtype, const LinearWeight& weight, const void* x, void* out,
              std::int64_t rows, const LinearWeight& next) {
  context.linear(weight, dtype, x, weight.k, rows, out);
  if (rows <= kRowsToFetchAhead) context.fetch(next);
}

}  // namespace

void DecoderStep::attend(Context& context, const AttentionPlan& plan, const Inputs& inputs,
                         const LayerWeights& layer, const Activations& a) const {
  const std::int64_t heads = static_cast<std::int64_t>(shape_.num_heads) * shape_.head_dim;
  multiply(context, shape_.dtype, layer.qkv, a.normed, a.qkv, inputs.num_tokens, layer.o);
  RopeArgs rope{};
  rope.qkv = a.qkv;
  rope.q_out = a.q;
  rope.num_tokens = inputs.num_tokens;
  rope.num_heads = shape_.num_heads;
  rope.num_kv_heads = shape_.num_kv_heads;
  rope.head_dim = shape_.head_dim;
  rope.rotary_dim = shape_.rotary_dim;
  rope.page_size = shape_.page_size;
  rope.q_norm = layer.q_norm;
  rope.k_norm = layer.k_norm;
  rope.eps = shape_.eps;
  rope.cos_sin = cos_sin_;
  rope.positions = inputs.positions;
  rope.write_index = inputs.write_index;
  rope.keys = layer.keys;
  rope.values = layer.values;
  rope.key_stride = shape_.key_stride;
  rope.value_stride = shape_.value_stride;
  rope.kv = shape_.kv;
  rope.team = context.team();
  context.ops().qk_norm_rope_write_kv(shape_.dtype, rope);
  plan.run_held(context, shape_.dtype, {a.q, heads, layer.keys, shape_.key_stride, layer.values,
                                        shape_.value_stride, shape_.kv, a.attended, shape_.scale});
}

void DecoderStep::feed_forward(Context& context, const LayerWeights& layer, const Activations& a,
                               std::int64_t rows, const LinearWeight& next) const {
  const Ops& ops = context.ops();
  multiply(context, shape_.dtype, layer.o, a.attended, a.x, rows, layer.gate_up);
  ops.rms_norm(shape_.dtype, a.x, a.residual, layer.post_norm, a.normed, rows, shape_.hidden,
               shape_.eps, context.team());
  multiply(context, shape_.dtype, layer.gate_up, a.normed, a.gate_up, rows, layer.down);
  ops.activate_and_mul(shape_.dtype, Activation::silu, a.gate_up, a.gated, rows, layer.gate_up.out_stride / 2, context.team());
  multiply(context, shape_.dtype, layer.down, a.gated, a.x, rows, next);
}

void DecoderStep::run(Context& context, const AttentionPlan& plan, const Inputs& inputs) {
  const std::lock_guard<std::mutex> lock(context.mutex);
  check(plan, inputs);
  const auto norm = [&](const void* x, void* residual, const void* weight, void* out, std::int64_t rows) {
    context.ops().rms_norm(shape_.dtype, x, residual, weight, out, rows, shape_.hidden, shape_.eps,
                           context.team());
  };
  std::int64_t gate_up_width = 0;
  for (const LayerWeights& layer : layers_) gate_up_width = std::max(gate_up_width, layer.gate_up.out_stride);
  Activations a(buffer_, shape_, gate_up_width, inputs.num_tokens);
  const std::int64_t heads = static_cast<std::int64_t>(shape_.num_heads) * shape_.head_dim;
  embed(context.ops(), embedding_, inputs.token_ids, inputs.num_tokens, shape_.dtype, a.residual);
  norm(a.residual, nullptr, layers_.front().input_norm, a.normed, inputs.num_tokens);
  for (std::size_t i = 0; i + 1 < layers_.size(); i++) {
    attend(context, plan, inputs, layers_[i], a);
    feed_forward(context, layers_[i], a, inputs.num_tokens, layers_[i + 1].qkv);
    // The sum is fused with the norm that follows it.
    norm(a.x, a.residual, layers_[i + 1].input_norm, a.normed, inputs.num_tokens);
  }
  attend(context, plan, inputs, layers_.back(), a);
  if (inputs.num_logits == 0) return;  // all keys and values are written
  // Nothing looks at the other rows any more. q and normed are free, and as large.
  gather(a.attended, inputs.logits_index, inputs.num_logits, heads, a.q);
  gather(a.residual, inputs.logits_index, inputs.num_logits, shape_.hidden, a.normed);
  std::swap(a.attended, a.q);
  std::swap(a.residual, a.normed);
  feed_forward(context, layers_.back(), a, inputs.num_logits, lm_head_);
  norm(a.x, a.residual, final_norm_, a.normed, inputs.num_logits);
  context.linear_fp32(lm_head_, shape_.dtype, a.normed, lm_head_.k, inputs.num_logits, inputs.logits);
}

}  // namespace sapwood
