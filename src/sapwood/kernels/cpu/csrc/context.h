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

// The instruction sets that this build has and this machine can run, slowest first. The matrix unit's
// is among them only after its products were compared with those of vectors.
const std::vector<const Ops*>& usable_ops();

// Throws std::out_of_range unless every index[i] is in [0, limit).
void check_indices(const char* what, const std::int64_t* index, std::int64_t n, std::int64_t limit);

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
  void linear_coded(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                    std::int64_t rows, void* out, bool wide);

  const Ops* ops_;
  int threads_ = 1;
  std::unique_ptr<Pool> pool_;
};

// Which thread does which part of a step's attention: checked and cut once, run in every layer.
class AttentionPlan {
 public:
  struct Shape {
    int num_heads, num_kv_heads, head_dim, page_size;
    std::int64_t num_pages;
  };

  // page_table [R, stride] int32 stays owned by the caller and must outlive the plan.
  // Throws std::invalid_argument / std::out_of_range for lengths or pages that do not fit.
  AttentionPlan(const Shape& shape, std::uintptr_t page_table, std::int64_t page_table_stride,
                std::int64_t max_pages, const std::vector<std::int64_t>& query_lens,
                const std::vector<std::int64_t>& context_lens, int threads);

  // One layer's queries, caches and result; shapes as in AttentionArgs.
  struct Tensors {
    const void* q;
    std::int64_t q_stride;
    const void* keys;
    std::int64_t key_stride;
    const void* values;
    std::int64_t value_stride;
    KvFormat kv;
    void* out;
    float scale;
  };

  void run(Context& context, DType dtype, const Tensors& tensors) const;
  // The same, with the context's mutex held by the caller.
  void run_held(Context& context, DType dtype, const Tensors& tensors) const;

  std::int64_t num_tokens() const { return num_tokens_; }
  std::int64_t num_tasks() const { return static_cast<std::int64_t>(tasks_.size()); }
  std::int64_t num_partials() const { return num_partials_; }

 private:
  void check_pages(std::int64_t max_pages, std::size_t request, std::int64_t query_len,
                   std::int64_t context_len) const;
  void add_tasks(std::size_t request, std::int64_t first_row, std::int64_t query_len,
                 std::int64_t context_len, std::int64_t chunk);

  Shape shape_;
  const std::int32_t* page_table_;
  std::int64_t page_table_stride_;
  std::int64_t num_tokens_ = 0, num_partials_ = 0;
  std::int64_t num_key_entries_ = 0;
  int rows_per_tile_ = 1;
  std::vector<AttentionTask> tasks_;
  std::vector<AttentionMerge> merges_;
};

}  // namespace sapwood
