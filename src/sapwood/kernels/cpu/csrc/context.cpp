#include "context.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "pack.h"

namespace sapwood {
namespace {

// Well below the size of a core's second-level cache, which must hold these bytes until they are read.
constexpr std::size_t kFetchAheadBytes = 512 * 1024;

}  // namespace

Context::Context(const std::string& isa, int threads) : ops_(usable_ops().back()) {
  const std::vector<Ops>& usable = usable_ops();
  if (!isa.empty()) {
    const auto found = std::find_if(usable.begin(), usable.end(),
                                    [&](const Ops& ops) { return isa == ops.name; });
    if (found == usable.end()) {
      std::string known;
      for (const Ops& ops : usable) known += (known.empty() ? "" : ", ") + std::string(ops.name);
      throw std::invalid_argument("instruction set '" + isa +
                                  "' was not compiled or does not run on this machine; usable: " + known);
    }
    ops_ = *found;
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

void Context::fetch(const LinearWeight& weight) {
  const std::int64_t panels = (weight.n + kPanel - 1) / kPanel;
  pool_->fetch(weight.data, static_cast<std::size_t>(panels * panel_bytes_of(weight)), kFetchAheadBytes);
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
