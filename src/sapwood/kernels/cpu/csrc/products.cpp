#include "products.h"

#include <stdexcept>

#include "coded.h"
#include "pack.h"
#include "quantized.h"

namespace sapwood {
namespace {

// Rows from which it takes less time to make a quantised weight bf16 for the processor's matrix unit than to
// multiply the weight as it is stored: as codes, as bytes on the unit, as bytes by vectors. Measured.
constexpr std::int64_t many_rows(const LinearWeight& weight) {
  return weight.coded != nullptr ? kDirectRows + 1 : weight.kind == WeightKind::int8 ? 129 : weight.fine ? 17 : 33;
}

// Rows of blocks below which exact products of vectors (linear_grouped) take less time than those of the unit.
constexpr std::int64_t kLeastDigitRows = 4;

// Whether exact products of bf16 with a weight round x to whole multiples of a power of two, so that vectors and the
// unit compute the same.
bool is_whole(const Ops& ops, const LinearWeight& weight) {
  return ops.exact_products && ops.linear_digits != nullptr && weight.fine && is_grouped(weight.kind) &&
         whole_bits(layout_of(weight.kind)) > 0;
}

}  // namespace

std::int64_t panel_bytes_of(const LinearWeight& weight) {
  return weight.coded != nullptr ? extent_of(*weight.coded).panel_bytes
         : is_dense(weight.kind) ? kPanel * weight.k * dense_bytes(weight.kind)
                                 : panel_bytes(weight.kind, weight.k);
}

LinearWeight slice_of(const LinearWeight& weight, std::int64_t begin, std::int64_t count, std::int64_t element) {
  LinearWeight slice = weight;
  slice.data = static_cast<const std::byte*>(weight.data) + begin / kPanel * panel_bytes_of(weight);
  if (weight.scales != nullptr) slice.scales = weight.scales + begin;
  if (weight.bias != nullptr) slice.bias = static_cast<const std::byte*>(weight.bias) + begin * element;
  slice.n = count;
  slice.next = nullptr;
  return slice;
}

bool has_whole_panels(const LinearWeight& weight) {
  for (const LinearWeight* part = &weight; part->next != nullptr; part = part->next) {
    if (part->n % kPanel != 0) return false;
  }
  return true;
}

void Products::dense(LinearArgs args, DType dtype) const {
  if (args.m == 0) return;
  if (is_dense(args.kind) ? dtype == DType::bf16 && args.kind != WeightKind::bf16 : !is_grouped(args.kind)) {
    throw std::invalid_argument("a dense weight of bf16 takes x of fp32 or bf16, any other x of fp32");
  }
  args.scratch = scratch.at_least(ops.linear_scratch(dtype, args.kind, args.m, args.k, team.threads));
  args.team = team;
  args.widens = ops.widens_bf16;
  args.exact = ops.exact_products;
  if (args.out_stride == 0) args.out_stride = args.n;
  ops.linear(dtype, args);
}

void Products::linear(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                      std::int64_t rows, void* out, bool was_bf16) const {
  if (rows == 0) return;
  if (is_dense(weight.kind)) {
    if (weight.next != nullptr) throw std::invalid_argument("a dense weight has no parts");
    dense({x, x_stride, weight.kind, weight.data, weight.bias, out, rows, weight.n, weight.k, nullptr, {}, false,
           false, true, weight.out_stride}, dtype);
    return;
  }
  std::byte* begin = static_cast<std::byte*>(out);
  for (const LinearWeight* part = &weight; part != nullptr; part = part->next) {
    if (many(*part, dtype, x, x_stride, rows, begin, false)) {
      begin += part->n * 2;
      continue;
    }
    if (part->coded != nullptr) {
      coded(*part, dtype, x, x_stride, rows, begin, false);
      begin += part->n * (dtype == DType::f32 ? 4 : 2);
      continue;
    }
    if (part->fine && !ops.exact_products &&
        rows >= (dtype == DType::f32 ? ops.decoded_rows : ops.decoded_rows_bf16)) {
      dense({x, x_stride, part->kind, part->data, part->bias, begin, rows, part->n, part->k, nullptr, {}, false,
             false, true, part->out_stride}, dtype);
      begin += part->n * (dtype == DType::f32 ? 4 : 2);
      continue;
    }
    const std::int64_t bytes = quantized_scratch(*part, rows, team.threads);
    const QuantizedArgs args{x, x_stride, part, begin, rows,
                             scratch.at_least(static_cast<std::size_t>(bytes)), team, false,
                             (dtype == DType::bf16 || was_bf16) && is_whole(ops, *part)};
    (is_grouped(part->kind) ? ops.linear_grouped : ops.linear_int8)(dtype, args);
    begin += part->n * (dtype == DType::f32 ? 4 : 2);
  }
}

bool Products::many(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride, std::int64_t rows,
                    void* out, bool wide_out) const {
  if (dtype != DType::bf16) return false;
  if (ops.exact_products) {
    if (ops.linear_digits == nullptr || (is_whole(ops, weight) && rows < kLeastDigitRows)) return false;
    const std::size_t bytes = ops.linear_digits_scratch(weight, rows, team.threads);
    return bytes > 0 && ops.linear_digits({x, x_stride, &weight, out, rows, scratch.at_least(bytes), team, wide_out});
  }
  if (ops.linear_many == nullptr || rows < many_rows(weight)) return false;
  std::byte* own = scratch.at_least(ops.linear_many_scratch(team.threads));
  return ops.linear_many({x, x_stride, &weight, out, rows, own, team, wide_out});
}

void Products::coded(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride, std::int64_t rows,
                     void* out, bool wide_out) const {
  if (many(weight, dtype, x, x_stride, rows, out, wide_out)) return;
  const std::int64_t element = dtype == DType::f32 ? 4 : 2;
  std::byte* own = scratch.at_least(coded_scratch(*weight.coded, rows, element, team.threads));
  ops.linear_coded(dtype, {x, x_stride, &weight, out, rows, wide_out, own, team});
}

void Products::linear_fp32(const LinearWeight& weight, DType dtype, const void* x, std::int64_t x_stride,
                           std::int64_t rows, float* out) const {
  if (rows == 0) return;
  if (dtype == DType::f32) {
    linear(weight, dtype, x, x_stride, rows, out);
    return;
  }
  if (weight.kind == WeightKind::bf16) {
    dense({x, x_stride, weight.kind, weight.data, weight.bias, out, rows, weight.n, weight.k, nullptr, {}, true,
           false, true, weight.out_stride}, dtype);
    return;
  }
  if (weight.coded != nullptr && weight.next == nullptr) {
    coded(weight, dtype, x, x_stride, rows, out, true);
    return;
  }
  if (ops.exact_products && weight.next == nullptr && many(weight, dtype, x, x_stride, rows, out, true)) return;
  if (weight.bias != nullptr) throw std::invalid_argument("a bf16 bias does not fit an fp32 result");
  const std::size_t size = static_cast<std::size_t>(rows * weight.k);
  std::uint32_t* widened = reinterpret_cast<std::uint32_t*>(wide.at_least(size * sizeof(float)));
  for (std::int64_t row = 0; row < rows; row++) {
    const std::uint16_t* from = static_cast<const std::uint16_t*>(x) + row * x_stride;
    for (std::int64_t i = 0; i < weight.k; i++) {
      widened[row * weight.k + i] = static_cast<std::uint32_t>(from[i]) << 16;
    }
  }
  linear(weight, DType::f32, widened, weight.k, rows, out, true);
}

}  // namespace sapwood
