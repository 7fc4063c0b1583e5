// What a CpuKernels object owns: the instruction set, the number of threads, and the buffers that
// grow to the largest step seen and are then reused.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "ops.h"
#include "pool.h"

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

// 64-byte aligned memory that only grows.
class Buffer {
 public:
  std::byte* at_least(std::size_t bytes) {
    if (bytes > size_) {
      data_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

class Context {
 public:
  // isa empty: the fastest usable one. Throws std::invalid_argument for one that cannot run here.
  Context(const std::string& isa, int threads);

  const Ops& ops() const { return *ops_; }
  int threads() const { return threads_; }
  Team team() const;
  // Fills in the scratch and the team; the mutex is held by the caller.
  void linear(LinearArgs args, DType dtype);
  // out [rows, weight.out_stride] = x w^T + bias, for a weight of any kind; x, bias and out are of
  // `dtype`, rows of x x_stride elements apart. The mutex is held by the caller.
  // Throws std::invalid_argument for a dense weight of another dtype.
  void linear(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
              std::int64_t rows, void* out);
  // The same with an fp32 out, whatever `dtype`; x may be converted in `wide`.
  void linear_fp32(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                   std::int64_t rows, float* out);
  // Idle threads fetch the first bytes of a weight that is used next.
  void fetch(const LinearWeight& weight);
  void set_threads(int threads);

  // Held during a call that uses the buffers, since calls run without the interpreter's lock.
  std::mutex mutex;
  Buffer scratch, partials, wide;

 private:
  // wide: an fp32 out, whatever `dtype`
  bool linear_many(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                   std::int64_t rows, void* out, bool wide);
  void linear_coded(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                    std::int64_t rows, void* out, bool wide);

  const Ops* ops_;
  int threads_ = 1;
  std::unique_ptr<Pool> pool_;
};

}  // namespace sapwood
