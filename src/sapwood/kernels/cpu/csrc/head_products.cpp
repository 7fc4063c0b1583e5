#include "head_products.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "tasks.h"

namespace sapwood {
namespace {

constexpr std::int64_t kProductsPerThread = 1 << 16;  // a tiny step is done before another thread has woken

}  // namespace

HeadProducts::HeadProducts(std::vector<LinearWeight> weights) : weights_(std::move(weights)) {
  if (weights_.empty()) throw std::invalid_argument("products of heads need a head");
  for (const LinearWeight& weight : weights_) {
    const bool is_alike = weight.n == weights_[0].n && weight.k == weights_[0].k;
    if (!is_alike || !is_dense(weight.kind) || weight.next != nullptr) {
      throw std::invalid_argument("products of heads need a dense weight of one size for each head");
    }
  }
}

void HeadProducts::run(Context& context, DType dtype, const HeadRows& x, const HeadRows& out, std::int64_t tokens,
                       std::int64_t kept) {
  const std::int64_t element = dtype == DType::f32 ? 4 : 2;
  const std::int64_t heads = static_cast<std::int64_t>(weights_.size());
  const std::int64_t products = tokens * heads * weights_[0].n * weights_[0].k;
  const std::int64_t threads = std::clamp<std::int64_t>(products / kProductsPerThread, 1, context.threads());
  if (workers_.size() < static_cast<std::size_t>(threads)) workers_.resize(static_cast<std::size_t>(threads));
  run_tasks(context.team(), threads, heads, [&](std::int64_t head, int thread) {
    Worker& own = workers_[static_cast<std::size_t>(thread)];
    const Products alone{context.ops(), Team{1, nullptr, nullptr}, own.scratch, own.wide};
    LinearWeight weight = weights_[static_cast<std::size_t>(head)];
    weight.out_stride = out.token;
    const std::byte* from = static_cast<const std::byte*>(x.data) + head * x.head * element;
    std::byte* to = static_cast<std::byte*>(out.data) + head * out.head * element;
    alone.linear(weight, dtype, from, x.token, tokens, to);
    for (std::int64_t token = 0; kept > 0 && token < tokens; token++) {
      std::memcpy(to + (token * out.token + weight.n) * element, from + (token * x.token + weight.k) * element,
                  static_cast<std::size_t>(kept * element));
    }
  });
}

}  // namespace sapwood
