// A whole step in one call: a program of ops over buffers, without an interpreter between the ops.
// kernels/recording.py says what each op computes.
#pragma once

#include <cstdint>
#include <limits>
#include <variant>
#include <vector>

#include "attention_plan.h"
#include "context.h"
#include "experts.h"
#include "head_products.h"
#include "key_choice.h"
#include "low_rank.h"
#include "routing.h"

namespace sapwood {

// A place in the step's memory, [rows, its width] of the step's dtype.
using Place = int;
constexpr Place kNowhere = -1;

// The KV cache of one layer; strides count elements between pages.
struct LayerCache {
  void* keys;
  void* values;
  std::int64_t key_stride, value_stride;
  KvFormat kv;
  std::int64_t num_pages;
  int page_size;
};

struct HeadCounts {
  int num_heads, num_kv_heads, head_dim;
  std::int64_t width() const { return static_cast<std::int64_t>(num_heads) * head_dim; }
};

struct EmbedOp {
  EmbeddingTable table;
  std::int64_t vocab;
  float scale;
  std::size_t index;  // among the step's EmbedOps
  Place out;
};

struct NormOp {
  Place x, residual;  // residual may be kNowhere
  bool centered;      // a LayerNorm, else an RMSNorm
  const void* weight;
  const void* bias;  // of a LayerNorm, or null
  std::int64_t width;
  float eps;
  Place out;
};

struct MultiplyOp {
  Place x;
  LinearWeight weight;
  Place out;
};

// Adapters' additions to the linear layer that comes before.
struct LowRankOp {
  Place x;
  std::int64_t x_width;
  const LowRankLayer* layer;
  Place out;
  std::int64_t out_width;
};

struct RotateAndWriteOp {
  Place x;
  HeadCounts heads;
  const void* q_norm;  // null: no norm; k_norm likewise
  const void* k_norm;
  float eps;
  const float* cos_sin;
  std::int64_t max_positions;
  int rotary_dim;
  LayerCache cache;
  std::size_t group;  // of caches
  Place out;
};

struct AttendOp {
  Place x;
  HeadCounts heads;
  int plan;  // index of the step's plan, in which the window is prepared
  LayerCache cache;
  float scale;
  AttentionTraits traits;
  Place out;
  int value_dim;  // as in AttentionPlan::Tensors
  bool sparse;    // to the keys of the last ChooseKeysOp, if it has chosen any
};

// Chooses nothing in steps whose requests have at most num_chosen tokens each.
struct ChooseKeysOp {
  Place x, q;
  LinearWeight weights;
  float scale;
  KeyChoice choice;   // all but q, weights, page table, lengths and out
  std::size_t group;  // of caches
};

struct RotateLatentOp {
  Place x, q;
  LatentRopeArgs args;  // all but q, latent, tokens, positions, write_index and team
  std::int64_t max_positions, num_pages;
  std::size_t group;  // of caches
};

struct MultiplyHeadsOp {
  Place x;
  HeadProducts* layer;
  std::int64_t kept;
  Place out;
};

// out [rows, width] = columns of x from `first` on, of rows of x_width
struct TakeColumnsOp {
  Place x;
  std::int64_t x_width, first, width;
  Place out;
};

struct ActivateOp {
  Place x;
  Activation activation;
  bool gated;
  std::int64_t width;  // of out
  Place out;
};

struct ConvolveOp {
  Place x;  // inputs from column `first` of rows of x_width; if gated, three for each channel
  std::int64_t x_width, first;
  bool gated, silu;
  std::int64_t channels, length;
  const void* weight;  // of all tokens; null: each token has its own, in `weights`
  Place weights;
  const void* bias;  // or null
  void* states;
  std::int64_t state_stride, num_slots;
  std::size_t group;  // of caches
  Place out;
};

struct GatedNormOp {
  Place x, gate;  // the gate's columns begin at `first`, of rows of gate_width
  std::int64_t first, gate_width;
  GatedNormArgs args;  // all but rows, activations and team
  Place out;
};

struct DeltaOp {
  Place qkv, decay, write;
  std::int64_t decay_first, write_first;  // their columns, of rows as long as the strides in args
  DeltaArgs args;                         // all but activations, slots, lengths, scratch and team
  std::int64_t num_slots;
  std::size_t group;  // of caches
  Place out;
};

struct ScanOp {
  Place inputs[kScanInputs];  // dt and the gate may be kNowhere
  std::int64_t firsts[kScanInputs];  // their columns, of rows as long as the strides in args
  ScanArgs args;                     // all but inputs, slots, lengths and team
  std::int64_t num_slots;
  std::size_t group;  // of caches
  Place out;
};

// Columns of rows of residual_width, from `first` on, += x.
struct AddOp {
  Place x, residual;
  std::int64_t width, first, residual_width;
};

// out [rows, x_width + y_width] = x, then y
struct JoinOp {
  Place x, y;
  std::int64_t x_width, y_width;
  Place out;
};

// out [rows, first + count * new_size] = the columns of x [rows, x_width] before `first`, then `count` heads of `size`
// columns, filled up with zeros or cut.
struct ResizeHeadsOp {
  Place x;
  std::int64_t x_width, first, count, size, new_size;
  Place out;
};

struct ScaleOp {
  Place residual;
  std::int64_t width;
  float factor;
};

struct GateRowsOp {
  Place gate, residual;
  std::int64_t parts, width;  // of a row of residual; of a part
};

struct GateColumnsOp {
  Place gate, residual;  // the gate's columns begin at `first`, of rows of gate_width
  std::int64_t first, gate_width, width;
};

// A router and its experts.
struct MixOp {
  Place x, taken;  // by the router, and by its experts
  LinearWeight router;
  const float* bias;  // [experts], or null
  Routing routing;
  std::int64_t num_identity;  // experts, the last that the router knows, which give what they take
  const ExpertLayers* layers;
  ExpertAdditions additions;
  Place out;
};

// residual += the rows of `table` at the tokens' positions, from row `first` on
struct AddPositionsOp {
  Place residual;
  const void* table;  // of the step's dtype
  std::int64_t first, num_positions, width;
};

// Norms of `count` pieces of a row, each `size` columns, from column `first` on, in place.
struct NormColumnsOp {
  Place residual;
  std::int64_t width, first, size, count;
  bool centered;
  const void* weight;  // [size], or of a LayerNorm null
  const void* bias;    // [size], or null
  float eps;
};

// Columns [first, first + size) times factors, and then plus shifts if there are any.
struct ScaleColumnsOp {
  Place residual;
  std::int64_t width, first, size;
  const void* factors;
  const void* shifts;
};

struct ScaleByPositionOp {
  Place residual;
  std::int64_t width;
  const float* factors;
  std::int64_t num_positions;
};

struct ClipOp {
  Place residual;
  std::int64_t width;
  float limit;
};

struct XieluOp {
  Place x;
  float above, below;
  std::int64_t width;
  Place out;
};

// Of the states that the step hands out, [rows, total]: columns from `first` on = x, or x + more.
struct KeepStatesOp {
  Place x, more;  // more may be kNowhere
  std::int64_t width, first, total;
};

struct SelectRowsOp {
  Place x;
  std::int64_t width;
  Place out;
};

struct LogitsOp {
  Place x;
  LinearWeight weight;
  const LowRankLayer* additions;  // of adapters, or null
  std::int64_t vocab;
};

using StepOp = std::variant<EmbedOp, NormOp, MultiplyOp, RotateAndWriteOp, AttendOp, ConvolveOp, ActivateOp, AddOp,
                            ScaleOp, GateRowsOp, MixOp, AddPositionsOp, NormColumnsOp, ScaleColumnsOp,
                            ScaleByPositionOp, ClipOp, XieluOp, SelectRowsOp, LogitsOp, LowRankOp, GateColumnsOp,
                            GatedNormOp, DeltaOp, ScanOp, KeepStatesOp, RotateLatentOp, MultiplyHeadsOp,
                            TakeColumnsOp, ChooseKeysOp, JoinOp, ResizeHeadsOp>;

struct PageTable {
  const std::int32_t* pages;  // [num_requests, max_pages], rows `stride` entries apart
  std::int64_t stride, max_pages;
};

class RecordedStep {
 public:
  // What a step works on; every address is an int64 array but `logits` [num_logits, vocab] fp32.
  struct Inputs {
    const std::int64_t* token_ids;    // [num_tokens]
    const std::int64_t* positions;    // [num_tokens]
    std::vector<const std::int64_t*> write_index;  // by group of caches; [num_tokens] each
    const std::int64_t* logits_index; // [num_logits]
    std::int64_t num_tokens, num_logits;
    float* logits;
    std::vector<const AttentionPlan*> plans;
    // Of the requests' lengths and states, for programs with states or chosen keys; else empty.
    std::vector<const std::int64_t*> slots;         // by group of caches; [num_requests], null in groups of pages
    const std::int32_t* query_start = nullptr;      // [num_requests + 1]
    const std::int32_t* context_len = nullptr;      // [num_requests]
    std::int64_t num_requests = 0;
    // Of all rows, and of the rows whose logits are wanted.
    AdapterRows adapters, selected_adapters;
    // Of all tokens, of the step's dtype; null: nobody wants them.
    void* states = nullptr;
    // By EmbedOp [num_tokens, its width] of the step's dtype, what takes the place of its result; null: nothing does.
    std::vector<const void*> vectors;
    // By group of caches, for programs that choose keys; else empty.
    std::vector<PageTable> tables;
  };

  // widths: of the places, in elements
  RecordedStep(DType dtype, std::vector<std::int64_t> widths) : dtype_(dtype), widths_(std::move(widths)) {}

  void add(const StepOp& op);
  // The ops that are added from here on work on the rows whose logits are wanted.
  void select() { num_before_ = ops_.size(); }

  // Throws std::out_of_range for an index outside its table, before anything is written.
  void run(Context& context, const Inputs& inputs);

 private:
  class Runner;
  void check(const Inputs& inputs) const;
  void check_states(const Inputs& inputs) const;
  void check_tables(const Inputs& inputs) const;
  void count_group(std::size_t group);
  void count_places(std::size_t group, std::int64_t places);
  void count_slots(std::size_t group, std::int64_t num_slots);

  DType dtype_;
  std::vector<std::int64_t> widths_;
  std::vector<StepOp> ops_;
  std::size_t num_before_ = std::numeric_limits<std::size_t>::max();
  // By op: index of the op that uses a weight next after this one, or 0.
  std::vector<std::size_t> next_weight_;
  std::int64_t vocab_ = std::numeric_limits<std::int64_t>::max();
  std::int64_t max_positions_ = vocab_;
  std::vector<std::int64_t> cache_places_;  // by group of caches
  std::vector<std::int64_t> num_slots_;     // by group of caches; 0: a group of pages
  std::size_t num_tables_ = 0;              // groups of caches up to the last one in which keys are chosen
  Buffer buffer_, routes_;
  Mixture mixture_;
  ChosenKeys chosen_;
};

}  // namespace sapwood
