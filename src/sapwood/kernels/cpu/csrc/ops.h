// The table of kernels that every instruction set provides, and the plain structs they share.
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

// Limits of the attention kernels; the scratch layouts depend on them.
constexpr int kKeyTile = 64;     // keys per tile
constexpr int kQueryTile = 64;   // query rows (token x head of the group) per tile, if the group allows
constexpr int kMaxHeadDim = 512;
constexpr int kHeadDimStep = 32;
constexpr int kRowKernelRows = 8;  // up to this many query rows share one pass without repacking K

// The threads that an op may use (see pool.h). launch has Pool::launch's meaning.
struct Team {
  int threads;
  void* pool;
  void (*launch)(void* pool, int threads, void (*run)(const void* body, int thread), const void* body);
};

// Queries [first_row, first_row + num_queries) of one request and one kv head over keys
// [kv_begin, kv_end). first_position is the position of the first query in its request.
// partial >= 0: unnormalised output goes to that partial buffer, to be merged.
struct AttentionTask {
  std::int32_t request, kv_head, first_row, num_queries, first_position, kv_begin, kv_end, partial;
};

// The parts [first_partial, first_partial + num_partials) of the same queries.
struct AttentionMerge {
  std::int32_t kv_head, first_row, num_queries, first_partial, num_partials;
};

struct AttentionArgs {
  const AttentionTask* tasks;
  std::int64_t num_tasks;
  std::int64_t num_key_entries;  // read by all tasks, times their query rows
  const AttentionMerge* merges;
  std::int64_t num_merges;
  const std::int32_t* page_table;
  std::int64_t page_table_stride;
  int num_heads, num_kv_heads, head_dim, page_size;
  const void* q;  // [T, Hq, D], rows q_stride elements apart
  std::int64_t q_stride;
  const void* keys;    // [pages, Hk, page_size, D], pages key_stride elements apart
  const void* values;  // likewise
  std::int64_t key_stride, value_stride;
  void* out;  // [T, Hq, D], contiguous
  float scale;
  int rows_per_tile;          // query rows of the largest task
  std::byte* scratch;         // per thread scratch_stride bytes
  std::size_t scratch_stride;
  float* partials;            // per partial rows_per_tile * (D + 2) floats
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
  Team team;
};

struct LinearArgs {
  const void* x;  // [M, K], rows x_stride elements apart; both whole lanes (see pack.h)
  std::int64_t x_stride;
  const void* weight;  // packed, see pack.h
  const void* bias;    // [N] or null
  void* out;           // [M, N]
  std::int64_t m, n, k;
  float* scratch;      // per thread kLinearScratchFloats
  Team team;
};

struct Ops {
  const char* name;
  // residual null: out = rms_norm(x); else x + residual goes to residual first.
  void (*rms_norm)(DType, const void* x, void* residual, const void* weight, void* out,
                   std::int64_t rows, std::int64_t hidden, float eps, const Team& team);
  void (*silu_and_mul)(DType, const void* x, void* out, std::int64_t rows, std::int64_t inner,
                       const Team& team);
  void (*qk_norm_rope_write_kv)(DType, const RopeArgs&);
  void (*paged_attention)(DType, const AttentionArgs&);
  std::size_t (*attention_scratch)(DType, int rows, int head_dim);
  void (*linear)(DType, const LinearArgs&);
};

namespace generic {
extern const Ops ops;
}
namespace avx2 {
extern const Ops ops;
}
namespace avx512 {
extern const Ops ops;
}
namespace avx512_bf16 {
extern const Ops ops;
}

}  // namespace sapwood
