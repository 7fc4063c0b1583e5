// The table of kernels that every instruction set provides, and the plain structs they share.
//
// A linear layer of any storage (dense, int8, GGUF's groups) is described by a LinearWeight and
// computed by one call, Context::linear(weight, dtype, x, x_stride, rows, out) of context.h: whoever
// runs a model's layers need not know how their weights are stored.
//
// The files named *.isa.cpp are compiled once per instruction set, each time into its own namespace
// with its own -m flags. They must not instantiate templates or inline functions of the standard
// library: the linker would keep one copy of those, possibly the one with AVX-512 in it, for all.
// Whatever needs the standard library (checks, plans, buffers) lives in the files compiled once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sapwood {

enum class DType : int { f32 = 0, bf16 = 1 };

// How keys and values are stored: as the activations are, or in 8 bits with a scale per token and head
// (see kv8.h). Strides of a cache count its elements: bytes, if it is not dense.
enum class KvFormat : int { dense = 0, int8 = 1, fp8_e4m3 = 2, fp8_e5m2 = 3 };
constexpr int kScaleBytes = 2;

// Elements that a token of one head takes.
constexpr int kv_width(KvFormat format, int head_dim) {
  return format == KvFormat::dense ? head_dim : head_dim + kScaleBytes;
}

// As kernels/activations.py has them, in its order.
enum class Activation : int { silu, gelu, gelu_tanh, relu, relu2, quick_gelu };

// Limits of the attention kernels; the scratch layouts depend on them.
constexpr int kKeyTile = 64;     // keys per tile; tiles begin at multiples of this position
// Keys whose sums are made by themselves and then added to those of the keys before, at multiples of this position:
// so a query's result does not depend on how its keys are shared among tasks.
constexpr int kKeySegment = 8 * kKeyTile;
// Query rows (token x head of the group) per tile at most: a multiple of the register tile's rows
// for the groups that models have.
constexpr int kQueryTile = 120;
constexpr std::int64_t kSamplingBlock = 64;  // entries of a vocabulary that are summed together
constexpr int kMaxHeadDim = 576;
constexpr int kHeadDimStep = 32;
constexpr int kMaxConvLength = 16;  // inputs that an output of a short convolution depends on, at most
constexpr int kMaxStateSize = 256;  // numbers of a key of a state space layer, at most
constexpr int kRowKernelRows = 8;  // up to this many query rows share one pass without repacking K

// The threads that an op may use (see pool.h). launch has Pool::launch's meaning.
struct Team {
  int threads;
  void* pool;
  void (*launch)(void* pool, int threads, void (*run)(const void* body, int thread), const void* body);
};

// Partial results of the same queries: `count` times their rows, `stride` rows apart.
struct AttentionParts {
  std::int32_t first_row, count, stride;
};

// Queries [first_row, first_row + num_queries) of one request and one kv head over keys
// [kv_begin, kv_end). first_position is the position of the first query in its request.
// shared >= 0: the queries are instead the tokens shared_tokens[shared ..] of one or several requests, at
// shared_positions[shared ..]; their pages for these keys are those of `request`, and they see all of
// them, but for a window.
// sees != 0: the only query is a token of a tree. Its keys from position first_new on are those new tokens of its
// request whose bits are set, in their order.
// before, resumed: earlier results of these queries, which this task goes on from: whole segments (count 0: none), and
// the rows of a segment that was begun (-1: none).
// open >= 0: the last segment is not finished; its sums go to these rows.
// partial >= 0: the unnormalised output of what is finished goes to the rows from there on; kNoPart: nothing is.
struct AttentionTask {
  std::int32_t request, kv_head, first_row, shared, num_queries, first_position, kv_begin, kv_end, partial, first_new;
  std::int64_t sees;
  AttentionParts before;
  std::int32_t resumed, open;
};
constexpr std::int32_t kWholeResult = -1, kNoPart = -2;  // AttentionTask::partial

// The parts of the same queries, in the order of their keys: those before, if any, and their own.
struct AttentionMerge {
  std::int32_t kv_head, first_row, num_queries;
  AttentionParts shared, own;
};

// A row of partial results: [D] of unnormalised output, the totals that are still to be added up, the maximum; whole
// cache lines.
constexpr std::int64_t partial_row_floats(int head_dim) { return head_dim + 32; }

// What attention does beyond scores, causal mask and softmax; AttentionTraits in kernels/interface.py
// has the formulas.
struct AttentionTraits {
  std::int64_t window = 0;         // 0: a query sees all keys up to itself
  float soft_cap = 0.0f;           // 0: none
  const float* sinks = nullptr;    // [Hq], or null
  const float* alibi = nullptr;    // [Hq] slopes, or null
};

struct AttentionArgs {
  const AttentionTask* tasks;
  std::int64_t num_tasks;
  std::int64_t num_first_tasks;  // of these: others go on from their results
  std::int64_t num_key_entries;  // read by all tasks, times their query rows
  const AttentionMerge* merges;
  std::int64_t num_merges;
  const std::int32_t* page_table;
  std::int64_t page_table_stride;
  const std::int32_t* shared_tokens;
  const std::int32_t* shared_positions;
  int num_heads, num_kv_heads, head_dim, page_size;
  int entry_size;  // tokens of an entry of page_table: page_size, or 1 (see pages.h)
  const void* q;  // [T, Hq, D], rows q_stride elements apart
  std::int64_t q_stride;
  const void* keys;    // [pages, Hk, page_size, D], pages key_stride elements apart
  const void* values;  // likewise; the keys themselves, if a row is both
  std::int64_t key_stride, value_stride;
  KvFormat kv;
  int value_dim;  // entries of a result: the first ones of a value; a multiple of kHeadDimStep
  void* out;  // [T, Hq, value_dim], contiguous
  float scale;
  AttentionTraits traits;
  int rows_per_tile;          // query rows of the largest task
  std::byte* scratch;         // per thread scratch_stride bytes
  std::size_t scratch_stride;
  float* partials;            // rows of partial_row_floats(D)
  Team team;
};

struct RopeArgs {
  const void* qkv;
  void* q_out;
  std::int64_t num_tokens;
  int num_heads, num_kv_heads, head_dim, rotary_dim, page_size;
  const void* q_norm;  // null: no norm
  const void* k_norm;
  float eps;
  const float* cos_sin;
  const std::int64_t* positions;
  const std::int64_t* write_index;
  void* keys;
  void* values;
  std::int64_t key_stride, value_stride;
  KvFormat kv;
  Team team;
};

// The rotation of queries and the write of rows of latent attention; the row is a key of one head.
struct LatentRopeArgs {
  void* q;  // [T, Hq, key_dim]: the last row - rank entries of each head are rotated in place
  std::int64_t num_tokens;
  int num_heads, key_dim;
  const void* latent;  // [T, row], rows latent_stride elements apart: `rank` that are normed, and others that rotate
  std::int64_t latent_stride;
  int rank, row, rotary_dim, page_size;  // rank and row: multiples of kHeadDimStep, of which row is at most kMaxHeadDim
  const void* norm;                      // [rank]
  float eps;
  const float* cos_sin;
  const std::int64_t* positions;
  const std::int64_t* write_index;
  void* cache;
  std::int64_t page_stride;
  KvFormat kv;
  Team team;
};

// Keys [kv_begin, kv_end) of a request, where kv_begin is a multiple of kKeyTile, for its tokens from row first_row
// on. The score of row first_row + i and key j goes to scores[i * score_stride + j]; there is room for whole tiles.
struct IndexTask {
  std::int32_t request;
  std::int64_t first_row, num_rows, kv_begin, kv_end;
  float* scores;
  std::int64_t score_stride;
};

// The scores of an indexer's keys: the sum over heads of weight * relu(query * key).
struct IndexArgs {
  const IndexTask* tasks;
  std::int64_t num_tasks;
  std::int64_t num_products;  // of queries and keys, by all tasks
  std::int64_t most_rows;     // heads of a task's tokens, at most
  int num_heads, head_dim, page_size;  // head_dim: a multiple of kHeadDimStep
  const void* q;         // [T, H, D], contiguous
  const float* weights;  // [T, H]
  const void* keys;      // [pages, 1, page_size, D], pages page_stride elements apart
  std::int64_t page_stride;
  KvFormat kv;
  const std::int32_t* page_table;
  std::int64_t page_table_stride;
  std::byte* scratch;    // per thread scratch_stride bytes
  std::size_t scratch_stride;
  Team team;
};

// A text whose tokens see one another: tokens first .. first + length - 1, or `rows` if that is not null.
struct BothWaysText {
  const std::int64_t* rows;
  std::int64_t first, length;
};

// Queries [begin, end) of a text, of one head.
struct BothWaysTask {
  std::int64_t text;
  int head;
  std::int64_t begin, end;
};

// Attention of every token to all tokens of its text.
struct BothWaysArgs {
  const BothWaysText* texts;
  const BothWaysTask* tasks;
  std::int64_t num_tasks;
  std::int64_t num_products;     // of queries and keys, by all tasks
  std::int64_t queries_of_task;  // at most
  int num_heads, head_dim;
  float scale;
  const void *q, *k, *v;  // [T, H, D], tokens *_stride elements apart
  std::int64_t q_stride, k_stride, v_stride;
  void* out;              // [T, H, D], contiguous
  std::byte* scratch;     // per thread scratch_stride bytes
  std::size_t scratch_stride;
  Team team;
};

// How the weight of a linear layer is stored; the layouts are in pack.h and quantized.h.
//   f32, bf16, f16  dense; x is fp32, or bf16 as well
//   int8       signed numbers, one fp32 scale per output; x is rounded to int8, one scale per 64 inputs
//   coded      codes times scales, x as it is: coded.h
//   the others GGUF's blocks, as numbers of 4 to 8 bits; layout_of in quantized.h says what each has.
//              x is rounded to int8, one scale per 32 inputs, or to two digits of int8 (LinearWeight::fine)
enum class WeightKind : int {
  f32 = 0, bf16 = 1, f16 = 2, int8 = 3, q8_0 = 4, q4_0 = 5, q4_1 = 6,
  q5_0 = 7, q5_1 = 8, q2_k = 9, q3_k = 10, q4_k = 11, q5_k = 12, q6_k = 13, iq4_xs = 14,
  coded = 100,
};

static constexpr bool is_dense(WeightKind kind) { return kind <= WeightKind::f16; }
static constexpr std::int64_t dense_bytes(WeightKind kind) { return kind == WeightKind::f32 ? 4 : 2; }

// out = x w^T + bias for a dense weight, or for one in groups that is to be decoded.
struct LinearArgs {
  const void* x;  // [M, K], rows x_stride elements apart; of bf16 both even
  std::int64_t x_stride;
  WeightKind kind;     // bf16 if x is, or of groups
  const void* weight;  // packed, see pack.h; groups: quantized.h
  const void* bias;    // [N] of x's dtype, or null
  void* out;           // [M, N]
  std::int64_t m, n, k;
  std::byte* scratch;  // Ops::linear_scratch(...) bytes, 64-byte aligned
  Team team;
  bool wide = false;   // out is fp32, whatever the dtype of x and bias
  bool widens = false; // factors of bf16 are multiplied as fp32 (Ops::widens_bf16)
  bool exact = true;   // one order of summation for any number of rows (Ops::exact_products)
  std::int64_t out_stride = 0; // elements between the rows of out; Context fills in n for 0
};

struct CodedLayout;  // coded.h

// The whole of a linear layer, or the first of its parts.
struct LinearWeight {
  WeightKind kind;
  const void* data;          // packed
  const float* scales;       // int8: [n rounded up to 32]; coded: likewise, or null for 1; else null
  const void* bias;          // [n] of x's dtype, or null
  std::int64_t n, k;         // outputs; inputs, which is how many elements a row of x has
  std::int64_t out_stride;   // elements between the rows of out: the outputs of all parts
  const LinearWeight* next;  // the outputs that follow, stored in another way; or null
  const CodedLayout* coded = nullptr;  // of a coded weight
  bool fine = false;         // of groups: x is rounded to 16 bits, and so takes two rows of bytes
};

// out[m, n] = x w^T + bias for a weight that is not dense.
struct QuantizedArgs {
  const void* x;  // [m, k] fp32 or bf16, rows x_stride elements apart
  std::int64_t x_stride;
  const LinearWeight* weight;  // without its `next`
  void* out;                   // rows weight->out_stride elements apart, of x's dtype
  std::int64_t m;
  std::byte* scratch;          // quantized_scratch(...) bytes, 64-byte aligned
  Team team;
  bool wide = false;           // out is fp32, whatever the dtype of x and bias; linear_many and linear_digits only
  bool whole = false;          // of a `fine` weight: x is rounded as for linear_digits (whole_step in integer.h)
};

// out[m, n] = x w^T + bias for a coded weight.
struct CodedArgs {
  const void* x;  // [m, k] fp32 or bf16, rows x_stride elements apart
  std::int64_t x_stride;
  const LinearWeight* weight;  // without its `next`
  void* out;                   // rows weight->out_stride elements apart
  std::int64_t m;
  bool wide;                   // out is fp32, whatever the dtype of x and bias
  std::byte* scratch;          // coded_scratch(...) bytes, 64-byte aligned
  Team team;
};

// weights [n, k] -> numbers of `kind`: int8, q8_0 or q4_1
struct QuantizeArgs {
  WeightKind kind;
  const void* weights;
  void* out;      // int8: [n, k]; else blocks as GGUF stores them
  float* scales;  // int8: [n]; else null
  std::int64_t n, k;
  Team team;
};

// Where products of bytes are so fast that decoding never takes less time: prompts are decoded all the same,
// since x is then not rounded at all, and a dense weight would take as long.
constexpr std::int64_t kDecodedRowsOfPrompts = 33;

// out[t] = bias + the sum over i of weight[:, i] * input[t - length + 1 + i], for each request's tokens; with
// silu, SiLU of that.
// Inputs are the rows of x; or with gates rows are [b, c, y], inputs are b * y, and outputs c times that.
struct ConvArgs {
  const void* x;  // [tokens, channels, or three times as many], rows x_stride elements apart
  std::int64_t x_stride;
  bool gated, silu;
  const void* weight;          // [channels, length], of each token or of all
  std::int64_t weight_stride;  // elements between tokens' weights; 0: all have the same
  const void* bias;    // [channels] or null
  void* states;        // slots state_stride elements apart, each [channels, length - 1]: the newest inputs
  std::int64_t state_stride;
  const std::int64_t* slots;        // [num_requests]
  const std::int32_t* query_start;  // [num_requests + 1]
  const std::int32_t* context_len;  // [num_requests]: as long as its new tokens, and a request has no state yet
  std::int64_t num_requests, channels, length;
  void* out;  // [tokens, channels]
  Team team;
};

// Heads of a state space layer, whose states are [state_size, head_dim] each.
struct ScanLayer {
  std::int64_t heads, head_dim, groups, state_size;
  bool own_rates;        // each entry of a state has a rate, and each channel a time step
  const float* rates;    // [heads], or of each entry of the states
  const float* dt_bias;  // as many as time steps of a token; null: all steps are 1
  const float* skip;     // likewise, or null
  float dt_least, dt_most;
};

constexpr std::size_t kScanInputs = 5;

// States decay, are fed keys (b) times values (x), and are read by queries (c).
struct ScanArgs {
  ScanLayer layer;
  // x [tokens, heads * head_dim], b and c [tokens, groups * state_size], dt [tokens, heads], or with own_rates
  // [tokens, heads * head_dim], or null without time steps, and gate [tokens, heads * head_dim], whose SiLU
  // multiplies the output, or null; rows are `strides` elements apart
  const void* inputs[kScanInputs];
  std::int64_t strides[kScanInputs];
  void* states;  // of state_dtype; slots state_stride elements apart, each [heads, state_size, head_dim]
  DType state_dtype;
  std::int64_t state_stride;
  const std::int64_t* slots;        // [num_requests]
  const std::int32_t* query_start;  // [num_requests + 1]
  const std::int32_t* context_len;  // [num_requests]: as ConvArgs
  std::int64_t num_requests;
  void* out;  // [tokens, heads * head_dim]
  Team team;
};

// Norms of groups of columns, and a gate; see kernels/state_forms.py.
struct GatedNormArgs {
  const void* x;  // [rows, width]
  const void* gate;  // rows gate_stride elements apart
  std::int64_t gate_stride;
  const void* weight;  // [width]
  void* out;           // [rows, width]
  std::int64_t rows, width, group;
  float eps;
  bool norm_first, logistic;
  Team team;
};

// The gated delta rule; see Kernels.gated_delta_rule and kernels/state_forms.py. Strides count elements.
struct DeltaArgs {
  const void* qkv;  // rows of all queries, all keys, all values
  std::int64_t qkv_stride;
  const void* decay;  // rows of [num_heads], or per channel of [num_heads, key_dim]
  std::int64_t decay_stride;
  const void* write;  // rows of [num_heads]
  std::int64_t write_stride;
  const float* rate;   // [num_heads]
  const float* shift;  // as a row of decay
  bool per_channel;
  std::int64_t num_key_heads, num_heads, key_dim, value_dim;
  float write_scale, eps;
  float lowest;  // logarithm of the lowest decay, or 0: decays have no bound
  void* states;  // slots state_stride elements apart, each [num_heads, key_dim, value_dim]
  DType state_dtype;
  std::int64_t state_stride;
  const std::int64_t* slots;        // [num_requests]
  const std::int32_t* query_start;  // [num_requests + 1]
  const std::int32_t* context_len;  // [num_requests], as in ConvArgs
  std::int64_t num_requests;
  void* out;       // [tokens, num_heads * value_dim]
  float* scratch;  // delta_scratch() floats per thread
  Team team;
};
constexpr std::int64_t kDeltaTokens = 16;  // of a head that are prepared at once
// Of one thread: what tokens are read and written with, and a state with whole vectors of columns.
constexpr std::int64_t delta_scratch(std::int64_t key_dim, std::int64_t value_dim) {
  return key_dim * (4 * kDeltaTokens + (value_dim + 63) / 64 * 64);
}

// Outputs that some ranks of an adapter's addition are expanded to.
struct LowRankPart {
  std::int64_t first_rank, ranks, first_out, outputs;
  const void* b;  // [ranks, outputs]
};

// An adapter's addition to a linear layer, and the rows of this step that have the adapter.
struct LowRankGroup {
  const void* a;  // [ranks, in]
  std::int64_t ranks;
  const LowRankPart* parts;
  std::int64_t num_parts;
  const std::int64_t* rows;
  std::int64_t num_rows;
  float* shrunk;  // [num_rows, ranks]: room for the products with a
};

// out[row] += (x[row] a^T) b for the rows of each group, in fp32.
struct LowRankArgs {
  const LowRankGroup* groups;
  std::int64_t num_groups;
  const void* x;  // rows x_stride elements apart, of the dtype of a and b
  std::int64_t x_stride, in;
  void* out;  // rows out_stride elements apart
  std::int64_t out_stride;
  bool wide;  // out is fp32, whatever the dtype of x
  Team team;
};

// Each head's norm, then neighbouring pairs of its entries rotated.
struct RotateArgs {
  const void* x;  // rows x_stride elements apart, each num_heads * head_dim
  std::int64_t x_stride;
  const void* norm;         // [head_dim]; null: no norm
  const float* rotations;   // [rows, head_dim]: cosine and sine of each pair; null: nothing rotates
  void* out;                // [rows, num_heads, head_dim]
  std::int64_t rows;
  int num_heads, head_dim;  // head_dim: even, at most kMaxHeadDim
  float eps;
  Team team;
};

struct Ops {
  const char* name;
  // residual null: out = rms_norm(x); else x + residual goes to residual first.
  void (*rms_norm)(DType, const void* x, void* residual, const void* weight, void* out,
                   std::int64_t rows, std::int64_t hidden, float eps, const Team& team);
  // out = (x - mean) / deviation * weight + bias, row by row; weight and bias may be null.
  void (*layer_norm)(DType, const void* x, const void* weight, const void* bias, void* out, std::int64_t rows,
                     std::int64_t hidden, float eps, const Team& team);
  // x [n] -> out [n]
  void (*add_to)(DType, const void* x, void* total, std::int64_t n, const Team& team);  // total += x
  void (*activate)(DType, Activation, const void* x, void* out, std::int64_t n, const Team& team);
  // x [rows, 2 * inner] -> out [rows, inner]: activation(first half) * second half
  void (*activate_and_mul)(DType, Activation, const void* x, void* out, std::int64_t rows, std::int64_t inner,
                           const Team& team);
  // x [n] -> out [n]: above x² + x / 2 where x is more than 0, else below (e^x - 1 - x) + x / 2
  void (*xielu)(DType, const void* x, void* out, std::int64_t n, float above, float below, const Team& team);
  // sum[i] += factor * x[i]
  void (*add_scaled)(const float* x, float factor, float* sum, std::int64_t n);
  // n numbers of fp32 -> bf16
  void (*narrow)(const float* from, void* to, std::int64_t n);
  // out[row]: the first of the row's largest; NaN is never it, unless all are NaN (then 0).
  void (*argmax)(DType, const void* x, std::int64_t rows, std::int64_t columns, std::int64_t* out,
                 const Team& team);
  // x[rows[i]][t] = -inf where bit t % 32 of word t / 32 of masks[i] is 0. Rows of x have `columns`
  // entries, `stride` apart, those of masks as many words as these need; the `count` rows differ.
  void (*mask_logits)(DType, void* x, std::int64_t stride, std::int64_t columns,
                      const std::uint32_t* masks, const std::int64_t* rows, std::int64_t count,
                      const Team& team);
  // weights[i] = e^((x[i] - largest of x) * inverse_temperature) of one row, 0 up to a whole block,
  // and the sum and the largest of each block.
  void (*sampling_weights)(DType, const void* x, std::int64_t n, float inverse_temperature,
                           float* weights, float* block_sum, float* block_top);
  // n numbers of a dense kind -> fp32
  void (*widen)(WeightKind, const void* from, float* to, std::int64_t n);
  void (*qk_norm_rope_write_kv)(DType, const RopeArgs&);
  void (*norm_rotate_heads)(DType, const RotateArgs&);
  void (*paged_attention)(DType, const AttentionArgs&);
  std::size_t (*attention_scratch)(DType, int rows, int head_dim);
  void (*linear)(DType, const LinearArgs&);
  std::size_t (*linear_scratch)(DType, WeightKind, std::int64_t m, std::int64_t k, int threads);
  void (*linear_int8)(DType, const QuantizedArgs&);
  void (*linear_grouped)(DType, const QuantizedArgs&);
  void (*quantize)(DType, const QuantizeArgs&);
  void (*linear_coded)(DType, const CodedArgs&);
  void (*causal_conv)(DType, const ConvArgs&);
  // x[rows, width] *= logistic(gate), whose rows are gate_stride elements apart
  void (*multiply_logistic)(DType, void* x, const void* gate, std::int64_t gate_stride, std::int64_t rows,
                            std::int64_t width, const Team& team);
  void (*gated_rms_norm)(DType, const GatedNormArgs&);
  void (*gated_delta_rule)(DType, const DeltaArgs&);
  void (*low_rank)(DType, const LowRankArgs&);
  void (*scan)(DType, const ScanArgs&);
  void (*norm_rope_write_latent)(DType, const LatentRopeArgs&);
  void (*index_scores)(DType, const IndexArgs&);
  std::size_t (*index_scratch)(DType, const IndexArgs&);  // bytes per thread
  void (*both_ways)(DType, const BothWaysArgs&);
  std::size_t (*both_ways_scratch)(DType, const BothWaysArgs&);  // bytes per thread
  // Rows of x in fp32, and in bf16, from which a `fine` weight is decoded instead of multiplying its bytes
  // twice: that takes less time. Measured, but for ARM.
  std::int64_t decoded_rows, decoded_rows_bf16;
  // For many rows of bf16 and a quantised weight, on a matrix unit; false: not for this weight, the op for
  // its kind serves. Null where the processor has no such unit.
  bool (*linear_many)(const QuantizedArgs&) = nullptr;
  std::size_t (*linear_many_scratch)(int threads) = nullptr;
  // For any number of rows of bf16 and a quantised weight, on a matrix unit: whole numbers times x, scaled in fp32.
  // A row's result does not depend on the others. False, null: as of linear_many.
  bool (*linear_digits)(const QuantizedArgs&) = nullptr;
  std::size_t (*linear_digits_scratch)(const LinearWeight&, std::int64_t m, int threads) = nullptr;
  // The processor has products of bf16 that are slower than widening both factors.
  bool widens_bf16 = false;
  // A row's result depends on the row and the weight alone: kernels are chosen by the weight, never by the
  // number of rows. Without it, many rows may be multiplied by a faster kernel that rounds otherwise.
  bool exact_products = true;
};

}  // namespace sapwood
