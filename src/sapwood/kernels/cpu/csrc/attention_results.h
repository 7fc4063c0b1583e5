// What becomes of a task's sums: rows of the result, or parts that are merged. Included only by attention.isa.cpp.
#pragma once

#include "attention_scratch.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;

template <class T>
class AttentionResults {
 public:
  // Both must outlive this.
  AttentionResults(const AttentionArgs& args, const Scratch<T>& scratch)
      : a_(args), s_(scratch), d_(args.head_dim), v_(args.value_dim), group_(args.num_heads / args.num_kv_heads) {}

  // Of the scratch's `rows` rows: the result, or a part of it.
  void write(const AttentionTask& task, int rows) const {
    for (int row = 0; row < rows; row++) {
      const float* from = s_.out + row * d_;
      const float max = s_.max[row], total = sum(load(s_.total + row * W));
      if (task.partial < 0) {
        write_row(from, max, total, task.kv_head, task.first_row, row);
        continue;
      }
      float* to = partial(task.partial + row);
      __builtin_memcpy(to, from, sizeof(float) * static_cast<std::size_t>(d_));
      to[d_] = max;
      to[d_ + 1] = total;
    }
  }

  void merge(const AttentionMerge& m) const {
    const int rows = m.num_queries * group_;
    for (int row = 0; row < rows; row++) {
      float top = kMinusInfinity;
      each_part(m, row, [&](const float* part) { top = part[d_] > top ? part[d_] : top; });
      float* out = s_.out;
      __builtin_memset(out, 0, sizeof(float) * static_cast<std::size_t>(d_));
      float total = 0.0f;
      each_part(m, row, [&](const float* part) {
        const float factor = exp2_1(part[d_] - top);
        total += part[d_ + 1] * factor;
        for (int d = 0; d < v_; d += W) store(out + d, load(part + d) * splat(factor) + load(out + d));
      });
      write_row(out, top, total, m.kv_head, m.first_row, row);
    }
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

  // Calls body(partial result) for each part of one of the merged rows.
  template <class Body>
  void each_part(const AttentionMerge& m, int row, const Body& body) const {
    for (int i = 0; i < m.shared.count; i++) body(partial(m.shared.first_row + i * m.shared.stride + row));
    for (int i = 0; i < m.own.count; i++) body(partial(m.own.first_row + i * m.own.stride + row));
  }

  const AttentionArgs& a_;
  const Scratch<T>& s_;
  const int d_, v_;  // entries of a key, and of a result
  const int group_;
};

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
