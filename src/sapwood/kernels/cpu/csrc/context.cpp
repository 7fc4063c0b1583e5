#include "context.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "coded.h"
#include "pack.h"
#include "quantized.h"

namespace sapwood {
namespace {

// Well below the size of a core's second-level cache, which must hold these bytes until they are read.
constexpr std::size_t kFetchAheadBytes = 512 * 1024;

// Rows from which it takes less time to make a quantised weight bf16 for the processor's matrix unit than to
// multiply the weight as it is stored: as codes, as bytes on the unit, as bytes by vectors. Measured.
constexpr std::int64_t many_rows(const LinearWeight& weight) {
  return weight.coded != nullptr ? kDirectRows + 1 : weight.kind == WeightKind::int8 ? 129 : weight.fine ? 17 : 33;
}

}  // namespace

Context::Context(const std::string& isa, int threads) {
  const std::vector<Ops>& usable = usable_ops();
  ops_ = &usable.back();
  if (!isa.empty()) {
    const auto found = std::find_if(usable.begin(), usable.end(),
                                    [&](const Ops& ops) { return isa == ops.name; });
    if (found == usable.end()) {
      std::string known;
      for (const Ops& ops : usable) known += (known.empty() ? "" : ", ") + std::string(ops.name);
      throw std::invalid_argument("instruction set '" + isa +
                                  "' was not compiled or does not run on this machine; usable: " + known);
    }
    ops_ = &*found;
  }
  set_threads(threads);
}

void Context::set_threads(int threads) {
  if (threads < 1 || threads > 1024) {
    throw std::invalid_argument("the number of threads is " + std::to_string(threads) +
                                " but must be in [1, 1024]");
  }
  const std::lock_guard<std::mutex> lock(mutex);
  pool_ = std::make_unique<Pool>(threads);
  threads_ = threads;
}

Team Context::team() const {
  const auto launch = [](void* pool, int threads, Pool::Run run, const void* body) {
    static_cast<Pool*>(pool)->launch(threads, run, body);
  };
  return {threads_, pool_.get(), launch};
}

void Context::linear(LinearArgs args, DType dtype) {
  if (args.m == 0) return;
  if (is_dense(args.kind) ? dtype == DType::bf16 && args.kind != WeightKind::bf16 : !is_grouped(args.kind)) {
    throw std::invalid_argument("a dense weight of bf16 takes x of fp32 or bf16, any other x of fp32");
  }
  args.scratch = scratch.at_least(ops_->linear_scratch(dtype, args.kind, args.m, args.k, threads_));
  args.team = team();
  args.widens = ops_->widens_bf16;
  if (args.out_stride == 0) args.out_stride = args.n;
  ops_->linear(dtype, args);
}

void Context::linear(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                     std::int64_t rows, void* out) {
  if (rows == 0) return;
  if (is_dense(weight.kind)) {
    if (weight.next != nullptr || weight.out_stride != weight.n) {
      throw std::invalid_argument("a dense weight makes whole rows");
    }
    linear({x, x_stride, weight.kind, weight.data, weight.bias, out, rows, weight.n, weight.k, nullptr, {}}, dtype);
    return;
  }
  std::byte* begin = static_cast<std::byte*>(out);
  for (const LinearWeight* part = &weight; part != nullptr; part = part->next) {
    if (linear_many(*part, dtype, x, x_stride, rows, begin, false)) {
      begin += part->n * 2;
      continue;
    }
    if (part->coded != nullptr) {
      linear_coded(*part, dtype, x, x_stride, rows, begin, false);
      begin += part->n * (dtype == DType::f32 ? 4 : 2);
      continue;
    }
    if (part->fine && rows >= (dtype == DType::f32 ? ops_->decoded_rows : ops_->decoded_rows_bf16)) {
      linear({x, x_stride, part->kind, part->data, part->bias, begin, rows, part->n, part->k, nullptr, {}, false,
              false, part->out_stride}, dtype);
      begin += part->n * (dtype == DType::f32 ? 4 : 2);
      continue;
    }
    const std::int64_t bytes = quantized_scratch(*part, rows, threads_);
    const QuantizedArgs args{x, x_stride, part, begin, rows,
                             scratch.at_least(static_cast<std::size_t>(bytes)), team()};
    (is_grouped(part->kind) ? ops_->linear_grouped : ops_->linear_int8)(dtype, args);
    begin += part->n * (dtype == DType::f32 ? 4 : 2);
  }
}

// Whether the processor's unit for many rows did the product.
bool Context::linear_many(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                          std::int64_t rows, void* out, bool wide) {
  if (ops_->linear_many == nullptr || dtype != DType::bf16 || rows < many_rows(weight)) return false;
  std::byte* own = scratch.at_least(ops_->linear_many_scratch(threads_));
  return ops_->linear_many({x, x_stride, &weight, out, rows, own, team(), wide});
}

void Context::linear_coded(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                           std::int64_t rows, void* out, bool wide) {
  if (linear_many(weight, dtype, x, x_stride, rows, out, wide)) return;
  const std::int64_t element = dtype == DType::f32 ? 4 : 2;
  std::byte* own = scratch.at_least(coded_scratch(*weight.coded, rows, element, threads_));
  ops_->linear_coded(dtype, {x, x_stride, &weight, out, rows, wide, own, team()});
}

void Context::fetch(const LinearWeight& weight) {
  const std::int64_t panels = (weight.n + kPanel - 1) / kPanel;
  const std::int64_t all = weight.coded != nullptr ? panels * extent_of(*weight.coded).panel_bytes
                           : is_dense(weight.kind) ? panels * kPanel * weight.k * dense_bytes(weight.kind)
                                                   : panels * panel_bytes(weight.kind, weight.k);
  pool_->fetch(weight.data, static_cast<std::size_t>(all), kFetchAheadBytes);
}

void Context::linear_fp32(const LinearWeight& weight, DType dtype, const void* x,
                          std::int64_t x_stride, std::int64_t rows, float* out) {
  if (rows == 0) return;
  if (dtype == DType::f32) {
    linear(weight, dtype, x, x_stride, rows, out);
    return;
  }
  if (weight.kind == WeightKind::bf16) {
    linear({x, x_stride, weight.kind, weight.data, weight.bias, out, rows, weight.n, weight.k, nullptr, {}, true}, dtype);
    return;
  }
  if (weight.coded != nullptr && weight.next == nullptr) {
    linear_coded(weight, dtype, x, x_stride, rows, out, true);
    return;
  }
  if (weight.bias != nullptr) throw std::invalid_argument("a bf16 bias does not fit an fp32 result");
  const std::size_t size = static_cast<std::size_t>(rows * weight.k);
  std::uint32_t* widened = reinterpret_cast<std::uint32_t*>(wide.at_least(size * sizeof(float)));
  for (std::int64_t row = 0; row < rows; row++) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x) + row * x_stride;
    for (std::int64_t i = 0; i < weight.k; i++) {
      widened[row * weight.k + i] = static_cast<std::uint32_t>(from[i]) << 16;
    }
  }
  linear(weight, DType::f32, widened, weight.k, rows, out);
}

void embed(const Ops& ops, const EmbeddingTable& table, const std::int64_t* ids, std::int64_t n, DType dtype,
           void* out) {
  const std::size_t bytes = static_cast<std::size_t>(table.hidden * dense_bytes(table.kind));
  if (dtype == DType::bf16 && table.kind != WeightKind::bf16) {
    throw std::invalid_argument("an embedding becomes bf16 only if it is stored so");
  }
  const bool same = (table.kind == WeightKind::f32) == (dtype == DType::f32);
  for (std::int64_t i = 0; i < n; i++) {
    const std::byte* row = static_cast<const std::byte*>(table.rows) + static_cast<std::size_t>(ids[i]) * bytes;
    if (same) {
      std::memcpy(static_cast<std::byte*>(out) + static_cast<std::size_t>(i) * bytes, row, bytes);
    } else {
      ops.widen(table.kind, row, static_cast<float*>(out) + i * table.hidden, table.hidden);
    }
  }
}

void check_query_start(const std::int32_t* query_start, std::int64_t num_requests, std::int64_t num_tokens) {
  bool is_right = query_start[0] == 0 && query_start[num_requests] == num_tokens;
  for (std::int64_t i = 0; i < num_requests; i++) is_right = is_right && query_start[i] <= query_start[i + 1];
  if (!is_right) {
    throw std::invalid_argument("query_start does not go from 0 up to the " + std::to_string(num_tokens) + " tokens");
  }
}

void check_indices(const char* what, const std::int64_t* index, std::int64_t n, std::int64_t limit) {
  for (std::int64_t i = 0; i < n; i++) {
    if (index[i] < 0 || index[i] >= limit) {
      throw std::out_of_range(std::string(what) + "[" + std::to_string(i) + "] is " +
                              std::to_string(index[i]) + " but must be in [0, " +
                              std::to_string(limit) + ")");
    }
  }
}

}  // namespace sapwood
