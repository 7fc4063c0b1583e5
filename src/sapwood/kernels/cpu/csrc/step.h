// A whole step of a Llama-like decoder in one call: no interpreter between the ops, and activations
// in buffers that are reused.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_plan.h"
#include "context.h"

namespace sapwood {

struct LayerWeights {
  const void* input_norm;
  LinearWeight qkv;
  const void* q_norm;  // null: no norm; k_norm likewise
  const void* k_norm;
  LinearWeight o;
  const void* post_norm;
  LinearWeight gate_up, down;
  void* keys;
  void* values;
};

class DecoderStep {
 public:
  struct Shape {
    DType dtype;
    std::int64_t hidden, vocab, max_positions;
    int num_heads, num_kv_heads, head_dim, rotary_dim, page_size;
    std::int64_t num_pages, key_stride, value_stride;
    KvFormat kv;
    float eps, scale;
  };

  // What a step works on; every address is an int64 array but `logits` [num_logits, vocab] fp32.
  struct Inputs {
    const std::int64_t* token_ids;    // [num_tokens]
    const std::int64_t* positions;    // [num_tokens]
    const std::int64_t* write_index;  // [num_tokens]
    const std::int64_t* logits_index; // [num_logits]
    std::int64_t num_tokens, num_logits;
    float* logits;
  };

  DecoderStep(const Shape& shape, const EmbeddingTable& embedding, const float* cos_sin, const void* final_norm,
              const LinearWeight& lm_head, std::vector<LayerWeights> layers);

  // Throws std::out_of_range for an index outside its table, before anything is written.
  void run(Context& context, const AttentionPlan& plan, const Inputs& inputs);

 private:
  struct Activations;
  void check(const AttentionPlan& plan, const Inputs& inputs) const;
  // From a.normed to a.attended; writes the layer's keys and values.
  void attend(Context& context, const AttentionPlan& plan, const Inputs& inputs,
              const LayerWeights& layer, const Activations& a) const;
  // The rest of the layer: from a.attended and a.residual to a.x, which is still to be added to a.residual.
  // next: the weight that is used after this layer's.
  void feed_forward(Context& context, const LayerWeights& layer, const Activations& a,
                    std::int64_t rows, const LinearWeight& next) const;
  // Rows of `width` elements, one after another.
  void gather(const void* from, const std::int64_t* rows, std::int64_t n, std::int64_t width,
              void* to) const;

  Shape shape_;
  EmbeddingTable embedding_;
  const float* cos_sin_;
  const void* final_norm_;
  LinearWeight lm_head_;
  std::vector<LayerWeights> layers_;
  Buffer buffer_;
};

}  // namespace sapwood
