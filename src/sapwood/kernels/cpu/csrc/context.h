// What a CpuKernels object owns: the instruction set, the number of threads, and the buffers that
// grow to the largest step seen and are then reused.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ops.h"
#include "pool.h"
#include "products.h"

namespace sapwood {

// The instruction sets that this build has and this machine can run, slowest first. The set with the
// matrix unit is among them only if the unit's products agree with those of vectors.
const std::vector<Ops>& usable_ops();

// Throws std::out_of_range unless every index[i] is in [0, limit).
void check_indices(const char* what, const std::int64_t* index, std::int64_t n, std::int64_t limit);

// Throws std::invalid_argument unless query_start [num_requests + 1] goes from 0 up to num_tokens.
void check_query_start(const std::int32_t* query_start, std::int64_t num_requests, std::int64_t num_tokens);

// Vectors of tokens, [vocab, hidden] of a dense kind.
struct EmbeddingTable {
  WeightKind kind;
  const void* rows;
  std::int64_t hidden;
};

// Rows of the table -> out [n, hidden]. bf16 rows stay bf16 or become fp32, all others become fp32;
// throws std::invalid_argument for anything else.
void embed(const Ops& ops, const EmbeddingTable& table, const std::int64_t* ids, std::int64_t n, DType dtype,
           void* out);

class Context {
 public:
  // isa empty: the fastest usable one. Throws std::invalid_argument for one that cannot run here.
  Context(const std::string& isa, int threads);

  const Ops& ops() const { return ops_; }
  // See Ops::exact_products. Set before the first product.
  bool exact_products() const { return ops_.exact_products; }
  void set_exact_products(bool exact) { ops_.exact_products = exact; }
  int threads() const { return threads_; }
  Team team() const;
  // Of all threads, in the context's buffers; the mutex is held by the caller.
  Products products() { return {ops_, team(), scratch, wide}; }
  // As Products::linear, by all threads; the mutex is held by the caller.
  void linear(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
              std::int64_t rows, void* out) {
    products().linear(weight, dtype, x, x_stride, rows, out);
  }
  // As Products::linear_fp32, likewise.
  void linear_fp32(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                   std::int64_t rows, float* out) {
    products().linear_fp32(weight, dtype, x, x_stride, rows, out);
  }
  // Idle threads fetch the first bytes of a weight that is used next.
  void fetch(const LinearWeight& weight);
  void set_threads(int threads);

  // Held during a call that uses the buffers, since calls run without the interpreter's lock.
  std::mutex mutex;
  Buffer scratch, partials, wide;

 private:
  Ops ops_;
  int threads_ = 1;
  std::unique_ptr<Pool> pool_;
};

}  // namespace sapwood
