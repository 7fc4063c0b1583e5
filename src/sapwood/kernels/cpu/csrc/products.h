// Products with the weights of linear layers, whatever they are stored as.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "ops.h"

namespace sapwood {

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

// The bytes of a packed weight without its `next`, panel by panel (pack.h).
std::int64_t panel_bytes_of(const LinearWeight& weight);

// Outputs [begin, begin + count) of a weight without its `next`; begin is a multiple of a panel's outputs.
// `element`: the bytes of an entry of the bias.
LinearWeight slice_of(const LinearWeight& weight, std::int64_t begin, std::int64_t count, std::int64_t element);

// Whether every part of a weight begins with a panel of its own, so that slices may begin at any panel.
bool has_whole_panels(const LinearWeight& weight);

// Who computes a product, and in which memory.
struct Products {
  const Ops& ops;
  Team team;
  Buffer& scratch;
  Buffer& wide;  // for x that was converted

  // Fills in the scratch, the team and, if it is 0, out_stride.
  void dense(LinearArgs args, DType dtype) const;
  // out [rows, weight.out_stride] = x w^T + bias, for a weight of any kind; x, bias and out are of
  // `dtype`, rows of x x_stride elements apart.
  // Throws std::invalid_argument for a dense weight of another dtype. was_bf16: x is of fp32, widened from bf16.
  void linear(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
              std::int64_t rows, void* out, bool was_bf16 = false) const;
  // The same with an fp32 out, whatever `dtype`.
  void linear_fp32(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                   std::int64_t rows, float* out) const;
  // Whether the processor's unit for many rows did the product, which with exact products depends on the weight
  // alone; wide: out is fp32, whatever `dtype`.
  bool many(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride, std::int64_t rows,
            void* out, bool wide) const;

 private:
  void coded(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride, std::int64_t rows,
             void* out, bool wide) const;
};

}  // namespace sapwood
