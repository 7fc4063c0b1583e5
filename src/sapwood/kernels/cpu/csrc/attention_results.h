// What becomes of the sums of some keys: they are added to those of the keys before, and are then rows of the result,
// or parts that another task goes on from. Included only by attention.isa.cpp.
#pragma once

#include "attention_scratch.h"

namespace sapwood::SAPWOOD_ISA {
namespace {


template <class T>
class AttentionResults {
 public:
  // args must outlive this.
  explicit AttentionResults(const AttentionArgs& args)
      : a_(args), d_(args.head_dim), v_(args.value_dim), group_(args.num_heads / args.num_kv_heads) {}

  // Of the output nothing is set: the first tile's replaces it.
  void clear(const Sums& sums, int rows) const {
    for (int row = 0; row < rows; row++) {
      sums.max[row] = kMinusInfinity;
      store(sums.total + row * W, VF{});
    }
  }

  // Adds a segment to those before it. One function for all tasks: its arithmetic is the same wherever it serves. For a
  // row that has seen no key in one of them, the result is the other one's; its zeros do not matter.
  __attribute__((noinline)) void add(const Sums& to, const Sums& segment, int rows) const {
    float old_factors[W], new_factors[W];
    for (int first = 0; first < rows; first += W) {
      const VF old_max = load(to.max + first), new_max = load(segment.max + first), top = vmax(old_max, new_max);
      store(to.max + first, top);
      const VF nowhere = splat(kMinusInfinity);  // where minus itself would be no number
      store(old_factors, old_max == nowhere ? VF{} : vexp2(old_max - top));
      store(new_factors, new_max == nowhere ? VF{} : vexp2(new_max - top));
      const int last = static_cast<int>(least(first + W, rows));
      for (int row = first; row < last; row++) {
        const VF old_factor = splat(old_factors[row - first]), new_factor = splat(new_factors[row - first]);
        const float *from = segment.out + row * d_, *from_total = segment.total + row * W;
        float *out = to.out + row * d_, *total = to.total + row * W;
        for (int i = 0; i < v_; i += W) store(out + i, load(out + i) * old_factor + load(from + i) * new_factor);
        store(total, load(total) * old_factor + load(from_total) * new_factor);
      }
    }
  }

  // Adds parts to `to`, in order, which has nothing yet if `is_empty`; `own` has room for a part. Returns whether `to`
  // has nothing.
  bool add_parts(const AttentionParts& parts, const Sums& to, bool is_empty, const Sums& own, int rows) const {
    for (int i = 0; i < parts.count; i++, is_empty = false) {
      load_rows(parts.first_row + i * parts.stride, is_empty ? to : own, rows);
      if (!is_empty) add(to, own, rows);
    }
    return is_empty;
  }

  void load_rows(std::int64_t first, const Sums& to, int rows) const {
    for (int row = 0; row < rows; row++) {
      const float* from = partial(first + row);
      __builtin_memcpy(to.out + row * d_, from, sizeof(float) * static_cast<std::size_t>(v_));
      store(to.total + row * W, load(from + d_));
      to.max[row] = from[d_ + W];
    }
  }

  void save_rows(std::int64_t first, const Sums& sums, int rows) const {
    for (int row = 0; row < rows; row++) {
      float* to = partial(first + row);
      __builtin_memcpy(to, sums.out + row * d_, sizeof(float) * static_cast<std::size_t>(v_));
      store(to + d_, load(sums.total + row * W));
      to[d_ + W] = sums.max[row];
    }
  }

  // The result of queries that begin with token `first_row`.
  __attribute__((noinline)) void write(const Sums& sums, int kv_head, std::int64_t first_row, int rows) const {
    for (int row = 0; row < rows; row++) {
      write_row(sums.out + row * d_, sums.max[row], sum(load(sums.total + row * W)), kv_head, first_row, row);
    }
  }

  void merge(const AttentionMerge& m, const Sums& to, const Sums& own) const {
    const int rows = m.num_queries * group_;
    const bool is_empty = add_parts(m.shared, to, true, own, rows);
    add_parts(m.own, to, is_empty, own, rows);
    write(to, m.kv_head, m.first_row, rows);
  }

 private:
  // A whole result: row `row` of queries that begin with token `first_row`.
  void write_row(const float* from, float max, float total, int kv_head, std::int64_t first_row, int row) const {
    const std::int64_t head = static_cast<std::int64_t>(kv_head) * group_ + row % group_;
    float factor = 1.0f / total;
    if (a_.traits.sinks != nullptr) {  // one more score, without a value
      const float sink = a_.traits.sinks[head] * kLog2E, top = sink > max ? sink : max;
      const float own = exp2_1(max - top);
      factor = own / (total * own + exp2_1(sink - top));
    }
    T* to = static_cast<T*>(a_.out) + ((first_row + row / group_) * a_.num_heads + head) * v_;
    for (int i = 0; i < v_; i += W) store(to + i, load(from + i) * splat(factor));
  }

  float* partial(std::int64_t row) const { return a_.partials + row * partial_row_floats(d_); }

  const AttentionArgs& a_;
  const int d_, v_;  // entries of a key, and of a result
  const int group_;
};

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
