// The Python module `_native`. Tensors arrive as addresses and strides; sapwood.kernels.cpu.native
// checks their dtype and layout, this file checks the indices that tensors hold.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "coded.h"
#include "attention_plan.h"
#include "bindings.h"
#include "both_ways.h"
#include "context.h"
#include "low_rank.h"
#include "pack.h"
#include "quantized.h"
#include "sample.h"
#include "shared_sums.h"
#include "step.h"
#include "tasks.h"

namespace nb = nanobind;

namespace sapwood {
namespace {

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Ops& ops : usable_ops()) names.emplace_back(ops.name);
  return names;
}

// weight [vocab, hidden] of a dense kind -> out [tokens, hidden] of dtype
void embedding(const Context& c, Address token_ids, int kind, Address weight, int dtype, Address out,
               I64 tokens, I64 vocab, I64 hidden) {
  const I64* ids = static_cast<const I64*>(in(token_ids));
  check_indices("token_ids", ids, tokens, vocab);
  embed(c.ops(), {static_cast<WeightKind>(kind), in(weight), hidden}, ids, tokens, static_cast<DType>(dtype),
        to(out));
}

void rms_norm(const Context& c, int dtype, Address x, Address residual, Address weight, Address out,
              I64 rows, I64 hidden, float eps) {
  c.ops().rms_norm(static_cast<DType>(dtype), in(x), to(residual), in(weight), to(out), rows, hidden,
                   eps, c.team());
}

// weight and bias may be 0
void layer_norm(const Context& c, int dtype, Address x, Address weight, Address bias, Address out, I64 rows,
                I64 hidden, float eps) {
  c.ops().layer_norm(static_cast<DType>(dtype), in(x), in(weight), in(bias), to(out), rows, hidden, eps, c.team());
}

void add_to(const Context& c, int dtype, Address x, Address total, I64 n) {
  c.ops().add_to(static_cast<DType>(dtype), in(x), to(total), n, c.team());
}

// strides: bytes from row to row; pairs: n rows to read, then the n rows to write
void carry_rows(const Context& c, Address source, I64 source_stride, Address target, I64 target_stride, I64 bytes,
                Address pairs, I64 n) {
  constexpr I64 kPart = 1 << 16;  // enough to be worth a task, little enough that the threads end together
  const I64 parts = (bytes + kPart - 1) / kPart;
  const I64* rows = static_cast<const I64*>(in(pairs));
  run_tasks(c.team(), c.team().threads, n * parts, [&](I64 task, int) {
    const I64 pair = task / parts, begin = task % parts * kPart;
    std::memcpy(static_cast<char*>(to(target)) + rows[n + pair] * target_stride + begin,
                static_cast<const char*>(in(source)) + rows[pair] * source_stride + begin,
                static_cast<std::size_t>(std::min(kPart, bytes - begin)));
  });
}

// norm and rotations may be 0
void norm_rotate_heads(const Context& c, int dtype, Address x, I64 x_stride, Address norm, float eps,
                       Address rotations, Address out, I64 rows, int num_heads, int head_dim) {
  if (head_dim % 2 != 0 || head_dim > kMaxHeadDim) throw std::invalid_argument("heads of this size cannot be rotated");
  c.ops().norm_rotate_heads(static_cast<DType>(dtype),
                            {in(x), x_stride, in(norm), static_cast<const float*>(in(rotations)), to(out), rows,
                             num_heads, head_dim, eps, c.team()});
}

void activate(const Context& c, int dtype, int activation, Address x, Address out, I64 n) {
  c.ops().activate(static_cast<DType>(dtype), static_cast<Activation>(activation), in(x), to(out), n, c.team());
}

// texts: (rows or 0, first token, length); strides: elements between two tokens of q, k and v
void attend_to_texts(Context& c, int dtype, const std::tuple<Address, Address, Address>& qkv,
                     const std::tuple<I64, I64, I64>& strides, const std::tuple<I64, int, int>& shape, float scale,
                     const std::vector<std::tuple<Address, I64, I64>>& texts, Address out) {
  const auto [q, k, v] = qkv;
  const auto [tokens, heads, head_dim] = shape;
  std::vector<BothWaysText> own;
  for (const auto& [rows, first, length] : texts) own.push_back({static_cast<const I64*>(in(rows)), first, length});
  const BothWaysInputs inputs{heads, head_dim, scale, in(q), in(k), in(v), std::get<0>(strides), std::get<1>(strides),
                              std::get<2>(strides), to(out)};
  attend_both_ways(c, static_cast<DType>(dtype), inputs, own, tokens);
}

void xielu(const Context& c, int dtype, Address x, Address out, I64 n, float above, float below) {
  c.ops().xielu(static_cast<DType>(dtype), in(x), to(out), n, above, below, c.team());
}

void activate_and_mul(const Context& c, int dtype, int activation, Address x, Address out, I64 rows, I64 inner) {
  c.ops().activate_and_mul(static_cast<DType>(dtype), static_cast<Activation>(activation), in(x), to(out), rows,
                           inner, c.team());
}

void argmax(const Context& c, int dtype, Address x, I64 rows, I64 columns, Address out) {
  c.ops().argmax(static_cast<DType>(dtype), in(x), rows, columns, static_cast<I64*>(to(out)),
                 c.team());
}

// x [num_rows, columns], rows stride elements apart
void mask_logits(const Context& c, int dtype, Address x, I64 num_rows, I64 stride, I64 columns,
                 Address masks, const std::vector<I64>& rows) {
  const nb::gil_scoped_release unlocked;
  const I64 count = static_cast<I64>(rows.size());
  check_indices("rows", rows.data(), count, num_rows);
  c.ops().mask_logits(static_cast<DType>(dtype), to(x), stride, columns,
                      static_cast<const std::uint32_t*>(in(masks)), rows.data(), count, c.team());
}

// Each row's (temperature, top_k, top_p, min_p, number), the fields of SamplingSettings.
void sample_rows(Context& c, int dtype, Address logits, I64 vocab, const std::vector<double>& temperatures,
                 const std::vector<I64>& top_ks, const std::vector<double>& top_ps,
                 const std::vector<double>& min_ps, const std::vector<double>& numbers, Address out) {
  std::vector<SamplingSettings> settings;
  for (std::size_t i = 0; i < numbers.size(); i++) {
    settings.push_back({temperatures.at(i), top_ks.at(i), top_ps.at(i), min_ps.at(i), numbers[i]});
  }
  const nb::gil_scoped_release unlocked;
  const std::lock_guard<std::mutex> lock(c.mutex);
  sample(c, static_cast<DType>(dtype), in(logits), vocab, settings, static_cast<I64*>(to(out)));
}

void qk_norm_rope_write_kv(const Context& c, int dtype, Address qkv, Address q_out, I64 tokens,
                           int num_heads, int num_kv_heads, int head_dim, int rotary_dim,
                           Address q_norm, Address k_norm, float eps, Address cos_sin,
                           I64 max_positions, Address positions, Address write_index, Address keys,
                           I64 key_stride, Address values, I64 value_stride, int kv,
                           I64 num_pages, int page_size) {
  RopeArgs a{};
  a.positions = static_cast<const I64*>(in(positions));
  a.write_index = static_cast<const I64*>(in(write_index));
  check_indices("positions", a.positions, tokens, max_positions);
  check_indices("write_index", a.write_index, tokens, num_pages * page_size);
  a.qkv = in(qkv);
  a.q_out = to(q_out);
  a.num_tokens = tokens;
  a.num_heads = num_heads;
  a.num_kv_heads = num_kv_heads;
  a.head_dim = head_dim;
  a.rotary_dim = rotary_dim;
  a.page_size = page_size;
  a.q_norm = in(q_norm);
  a.k_norm = in(k_norm);
  a.eps = eps;
  a.cos_sin = static_cast<const float*>(in(cos_sin));
  a.keys = to(keys);
  a.values = to(values);
  a.key_stride = key_stride;
  a.value_stride = value_stride;
  a.kv = static_cast<KvFormat>(kv);
  a.team = c.team();
  c.ops().qk_norm_rope_write_kv(static_cast<DType>(dtype), a);
}

template <class Unit>
void pack_units(const Unit* from, Unit* packed, I64 n, I64 units) {
  for (I64 panel = 0; panel < n; panel += kPanel) {
    for (I64 unit = 0; unit < units; unit++) {
      for (I64 column = panel; column < panel + kPanel; column++, packed++) {
        *packed = column < n ? from[column * units + unit] : Unit{0};
      }
    }
  }
}

// weight [n, k] of a dense kind -> out, packed as pack.h says; k is even for bf16.
void pack_weight(int kind, Address weight, Address out, I64 n, I64 k) {
  switch (static_cast<WeightKind>(kind)) {
    case WeightKind::f16:
      pack_units(static_cast<const std::uint16_t*>(in(weight)), static_cast<std::uint16_t*>(to(out)), n, k);
      break;
    case WeightKind::bf16: k /= 2; [[fallthrough]];
    default: pack_units(static_cast<const std::uint32_t*>(in(weight)), static_cast<std::uint32_t*>(to(out)), n, k);
  }
}

void linear(Context& c, int dtype, Address x, I64 x_stride, int kind, Address weight, Address bias,
            Address out, I64 m, I64 n, I64 k, bool wide) {
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.products().dense({in(x), x_stride, static_cast<WeightKind>(kind), in(weight), in(bias), to(out), m, n, k, nullptr, {}, wide},
           static_cast<DType>(dtype));
}

void make_linear_weight(LinearWeight* self, int kind, Address data, Address scales, Address bias, I64 n,
                        I64 k, I64 out_stride, const LinearWeight* next, bool fine) {
  new (self) LinearWeight{static_cast<WeightKind>(kind), in(data), static_cast<const float*>(in(scales)),
                          in(bias), n, k, out_stride, next, nullptr, fine};
}

void pack_int8_weight(Address numbers, Address out, I64 n, I64 k) { pack_int8(in(numbers), to(out), n, k); }

void pack_blocks(int kind, Address numbers, Address d, Address scales, Address least, Address minima,
                 Address out, I64 n, I64 k) {
  const auto halves = [](Address address) { return static_cast<const std::uint16_t*>(in(address)); };
  const auto bytes = [](Address address) { return static_cast<const std::int8_t*>(in(address)); };
  pack_groups(static_cast<WeightKind>(kind),
              {static_cast<const std::uint8_t*>(in(numbers)), halves(d), bytes(scales), halves(least),
               bytes(minima)},
              to(out), n, k);
}

void quantize(const Context& c, int kind, int dtype, Address weights, Address out, Address scales, I64 n,
              I64 k) {
  const WeightKind of = static_cast<WeightKind>(kind);
  if (of != WeightKind::int8 && of != WeightKind::q8_0 && of != WeightKind::q4_1) {
    throw std::invalid_argument("weights can be quantised to int8, q8_0 and q4_1 only");
  }
  if (of != WeightKind::int8 && k % kGroup != 0) {
    throw std::invalid_argument("blocks take a multiple of 32 inputs");
  }
  c.ops().quantize(static_cast<DType>(dtype),
                   {of, in(weights), to(out), static_cast<float*>(to(scales)), n, k, c.team()});
}

void linear_any(Context& c, const LinearWeight& weight, int dtype, Address x, I64 x_stride, I64 rows,
                Address out) {
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.linear(weight, static_cast<DType>(dtype), in(x), x_stride, rows, to(out));
}

void linear_fp32(Context& c, const LinearWeight& weight, int dtype, Address x, I64 x_stride, I64 rows,
                 Address out) {
  const std::lock_guard<std::mutex> lock(c.mutex);
  c.linear_fp32(weight, static_cast<DType>(dtype), in(x), x_stride, rows, static_cast<float*>(to(out)));
}

void make_coded_layout(CodedLayout* self, int codes, I64 k, I64 group, bool narrow, bool shifted,
                       Address order) {
  if (group < 1 || (group < k && group % 8 != 0)) {
    throw std::invalid_argument("groups of " + std::to_string(group) + " inputs: they must be multiples of 8");
  }
  const std::int32_t* inputs = static_cast<const std::int32_t*>(in(order));
  for (I64 i = 0; inputs != nullptr && i < k; i++) {
    if (inputs[i] < 0 || inputs[i] >= k) throw std::out_of_range("the order of inputs names one that is not there");
  }
  new (self) CodedLayout{static_cast<Codes>(codes), k, group, narrow, shifted, inputs};
}

void pack_codes(const CodedLayout& layout, Address codes, Address scales, Address shifts, I64 n, Address out) {
  pack_coded(layout, in(codes), static_cast<const float*>(in(scales)), static_cast<const float*>(in(shifts)),
             n, to(out));
}

void make_coded_weight(LinearWeight* self, const CodedLayout* layout, Address data, Address scales,
                       Address bias, I64 n, I64 out_stride, const LinearWeight* next) {
  new (self) LinearWeight{WeightKind::coded, in(data), static_cast<const float*>(in(scales)), in(bias), n,
                          layout->k, out_stride, next, layout};
}

void attend(const AttentionPlan& plan, Context& c, int dtype, Address q, I64 q_stride, Address keys,
            I64 key_stride, Address values, I64 value_stride, int kv, Address out, float scale, I64 window,
            float soft_cap, Address sinks, Address alibi, int value_dim, int page_size) {
  const auto numbers = [](Address address) { return static_cast<const float*>(in(address)); };
  plan.run(c, static_cast<DType>(dtype),
           {in(q), q_stride, in(keys), key_stride, in(values), value_stride, static_cast<KvFormat>(kv),
            to(out), scale, {window, soft_cap, numbers(sinks), numbers(alibi)}, value_dim, page_size});
}

// (keys, values, key_stride, value_stride, kv, num_pages, page_size)
using CacheTuple = std::tuple<Address, Address, I64, I64, int, I64, int>;
using HeadTuple = std::tuple<int, int, int>;  // query heads, key and value heads, head size

LayerCache cache_of(const CacheTuple& cache) {
  const auto& [keys, values, key_stride, value_stride, kv, num_pages, page_size] = cache;
  return {to(keys), to(values), key_stride, value_stride, static_cast<KvFormat>(kv), num_pages, page_size};
}

HeadCounts heads_of(const HeadTuple& heads) { return {std::get<0>(heads), std::get<1>(heads), std::get<2>(heads)}; }

using TraitTuple = std::tuple<I64, float, Address, Address>;  // as AttentionTraits

AttentionTraits traits_of(const TraitTuple& traits) {
  const auto& [window, soft_cap, sinks, alibi] = traits;
  return {window, soft_cap, static_cast<const float*>(in(sinks)), static_cast<const float*>(in(alibi))};
}

// (scores, chosen, groups, groups_chosen, group_best, renormalise, least_sum, scale, jitter)
using RoutingTuple = std::tuple<int, I64, I64, I64, I64, bool, float, float, float>;

Routing routing_of(const RoutingTuple& routing) {
  const auto& [scores, chosen, groups, groups_chosen, group_best, renormalise, least_sum, scale, jitter] = routing;
  return {static_cast<Scores>(scores), chosen, groups, groups_chosen, group_best, renormalise, least_sum, scale, jitter};
}

void route_tokens(const RoutingTuple& routing, Address logits, Address bias, I64 tokens, I64 experts, Address weights,
                  Address ids) {
  route(routing_of(routing), static_cast<const float*>(in(logits)), static_cast<const float*>(in(bias)), tokens,
        experts, static_cast<float*>(to(weights)), static_cast<I64*>(to(ids)), {1, nullptr, nullptr});
}

void make_experts(ExpertLayers* self, const std::vector<const LinearWeight*>& gate_up,
                  const std::vector<const LinearWeight*>& down, int activation, float limit) {
  new (self) ExpertLayers{};
  for (const LinearWeight* weight : gate_up) self->gate_up.push_back(*weight);
  for (const LinearWeight* weight : down) self->down.push_back(*weight);
  self->activation = static_cast<Activation>(activation);
  self->limit = limit;
}

void mix(Mixture& mixture, const ExpertLayers& layers, Context& c, int dtype, Address x, I64 tokens, I64 k, Address ids, Address weights,
         Address out) {
  const std::lock_guard<std::mutex> lock(c.mutex);
  mixture.run(
      c, static_cast<DType>(dtype), layers,
      {in(x), tokens, k, static_cast<const I64*>(in(ids)), static_cast<const float*>(in(weights))}, to(out));
}

void bind_experts(nb::module_& m) {
  m.def("route", &route_tokens, Unlocked());
  m.def("gate_rows",
        [](int dtype, Address x, Address gate, I64 rows, I64 width) {
          gate_rows(static_cast<DType>(dtype), to(x), in(gate), rows, width);
        },
        Unlocked());
  nb::class_<ExpertLayers>(m, "ExpertLayers").def("__init__", &make_experts);
  nb::class_<Mixture>(m, "Mixture").def(nb::init<>()).def("run", &mix, Unlocked());
}

// (slots, starts, address of the rows)
using AdapterTuple = std::tuple<std::vector<I64>, std::vector<I64>, Address>;

AdapterRows adapter_rows_of(const AdapterTuple& rows) {
  const auto& [slots, starts, address] = rows;
  return {slots, starts, static_cast<const I64*>(in(address))};
}

void bind_low_rank(nb::module_& m) {
  using PartTuple = std::tuple<I64, I64, I64, I64, Address>;  // as LowRankPart
  nb::class_<LowRankLayer>(m, "LowRankLayer")
      .def(nb::init<I64, I64>())
      .def("place",
           [](LowRankLayer& layer, I64 slot, Address a, I64 ranks, const std::vector<PartTuple>& parts) {
             std::vector<LowRankPart> found;
             for (const auto& [first_rank, of_part, first_out, outputs, b] : parts) {
               found.push_back({first_rank, of_part, first_out, outputs, in(b)});
             }
             layer.place(slot, in(a), ranks, std::move(found));
           })
      .def("add",
           [](const LowRankLayer& layer, Context& c, int dtype, Address x, I64 x_stride, I64 num_rows, Address out,
              I64 out_stride, bool wide, const AdapterTuple& adapters) {
             const AdapterRows rows = adapter_rows_of(adapters);
             rows.check(num_rows);
             const nb::gil_scoped_release unlocked;
             const std::lock_guard<std::mutex> lock(c.mutex);
             layer.add(c, static_cast<DType>(dtype), in(x), x_stride, to(out), out_stride, wide, rows);
           });
}

void bind_step(nb::module_& m) {
  const auto run = [](RecordedStep& step, Context& c, std::vector<const AttentionPlan*> plans, Address token_ids,
                      Address positions, const std::vector<Address>& write_index, I64 num_tokens,
                      Address logits_index, I64 num_logits, Address logits, const std::vector<Address>& slots,
                      Address query_start, Address context_len, I64 num_requests, const AdapterTuple& adapters,
                      const AdapterTuple& selected, Address told, const std::vector<Address>& vectors,
                      const std::vector<std::tuple<Address, I64, I64>>& tables) {
    const auto indices = [](Address address) { return static_cast<const I64*>(in(address)); };
    std::vector<const I64*> places;
    for (const Address address : write_index) places.push_back(indices(address));
    std::vector<const I64*> states;
    for (const Address address : slots) states.push_back(indices(address));
    std::vector<const void*> changed;
    for (const Address address : vectors) changed.push_back(in(address));
    const auto lengths = [](Address address) { return static_cast<const std::int32_t*>(in(address)); };
    std::vector<PageTable> pages;
    for (const auto& [address, stride, max_pages] : tables) pages.push_back({lengths(address), stride, max_pages});
    step.run(c, {indices(token_ids), indices(positions), std::move(places), indices(logits_index), num_tokens, num_logits,
                 static_cast<float*>(to(logits)), std::move(plans), std::move(states), lengths(query_start),
                 lengths(context_len), num_requests, adapter_rows_of(adapters), adapter_rows_of(selected),
                 to(told), std::move(changed), std::move(pages)});
  };
  nb::class_<RecordedStep> recorded(m, "RecordedStep");
  bind_state_steps(recorded);
  bind_latent_steps(recorded);
  recorded
      .def("__init__",
           [](RecordedStep* self, int dtype, std::vector<I64> widths) {
             new (self) RecordedStep(static_cast<DType>(dtype), std::move(widths));
           })
      .def("select", &RecordedStep::select)
      .def("embed",
           [](RecordedStep& step, int kind, Address rows, I64 vocab, I64 hidden, float scale, std::size_t index,
              Place out) {
             step.add(EmbedOp{{static_cast<WeightKind>(kind), in(rows), hidden}, vocab, scale, index, out});
           })
      .def("norm",
           [](RecordedStep& step, Place x, Place residual, bool centered, Address weight, Address bias, I64 width,
              float eps, Place out) {
             step.add(NormOp{x, residual, centered, in(weight), in(bias), width, eps, out});
           })
      .def("multiply",
           [](RecordedStep& step, Place x, const LinearWeight& weight, Place out) {
             step.add(MultiplyOp{x, weight, out});
           })
      .def("low_rank",
           [](RecordedStep& step, Place x, I64 x_width, const LowRankLayer& layer, Place out, I64 out_width) {
             step.add(LowRankOp{x, x_width, &layer, out, out_width});
           })
      .def("rotate_and_write",
           [](RecordedStep& step, Place x, const HeadTuple& heads, Address q_norm, Address k_norm, float eps,
              Address cos_sin, I64 max_positions, int rotary_dim, const CacheTuple& cache, std::size_t group,
              Place out) {
             step.add(RotateAndWriteOp{x, heads_of(heads), in(q_norm), in(k_norm), eps,
                                       static_cast<const float*>(in(cos_sin)), max_positions, rotary_dim,
                                       cache_of(cache), group, out});
           })
      .def("attend",
           [](RecordedStep& step, Place x, const HeadTuple& heads, int plan, const CacheTuple& cache, float scale,
              const TraitTuple& traits, Place out, int value_dim, bool sparse) {
             step.add(AttendOp{x, heads_of(heads), plan, cache_of(cache), scale, traits_of(traits), out, value_dim,
                               sparse});
           })
      .def("activate",
           [](RecordedStep& step, Place x, int activation, bool gated, I64 width, Place out) {
             step.add(ActivateOp{x, static_cast<Activation>(activation), gated, width, out});
           })
      .def("add",
           [](RecordedStep& step, Place x, I64 width, Place residual, I64 first, I64 residual_width) {
             step.add(AddOp{x, residual, width, first, residual_width});
           })
      .def("join",
           [](RecordedStep& step, Place x, I64 x_width, Place y, I64 y_width, Place out) {
             step.add(JoinOp{x, y, x_width, y_width, out});
           })
      .def("resize_heads",
           [](RecordedStep& step, Place x, I64 x_width, I64 first, I64 count, I64 size, I64 new_size, Place out) {
             step.add(ResizeHeadsOp{x, x_width, first, count, size, new_size, out});
           })
      .def("scale",
           [](RecordedStep& step, Place residual, I64 width, float factor) {
             step.add(ScaleOp{residual, width, factor});
           })
      .def("gate_rows",
           [](RecordedStep& step, Place gate, Place residual, I64 parts, I64 width) {
             step.add(GateRowsOp{gate, residual, parts, width});
           })
      .def("mix",
           [](RecordedStep& step, Place x, Place taken, const LinearWeight& router, Address bias,
              const RoutingTuple& routing, I64 num_identity, const ExpertLayers& layers,
              const std::vector<const LowRankLayer*>& gate_up, const std::vector<const LowRankLayer*>& down,
              Place out) {
             step.add(MixOp{x, taken, router, static_cast<const float*>(in(bias)), routing_of(routing), num_identity,
                            &layers, {gate_up, down}, out});
           })
      .def("add_positions",
           [](RecordedStep& step, Place residual, Address table, I64 first, I64 num_positions, I64 width) {
             step.add(AddPositionsOp{residual, in(table), first, num_positions, width});
           })
      .def("norm_columns",
           [](RecordedStep& step, Place residual, const std::tuple<I64, I64, I64, I64>& columns, bool centered,
              Address weight, Address bias, float eps) {
             const auto& [width, first, size, count] = columns;
             step.add(NormColumnsOp{residual, width, first, size, count, centered, in(weight), in(bias), eps});
           })
      .def("scale_columns",
           [](RecordedStep& step, Place residual, I64 width, I64 first, I64 size, Address factors, Address shifts) {
             step.add(ScaleColumnsOp{residual, width, first, size, in(factors), in(shifts)});
           })
      .def("scale_by_position",
           [](RecordedStep& step, Place residual, I64 width, Address factors, I64 num_positions) {
             step.add(ScaleByPositionOp{residual, width, static_cast<const float*>(in(factors)), num_positions});
           })
      .def("clip",
           [](RecordedStep& step, Place residual, I64 width, float limit) { step.add(ClipOp{residual, width, limit}); })
      .def("xielu",
           [](RecordedStep& step, Place x, float above, float below, I64 width, Place out) {
             step.add(XieluOp{x, above, below, width, out});
           })
      .def("keep_states",
           [](RecordedStep& step, Place x, Place more, I64 width, I64 first, I64 total) {
             step.add(KeepStatesOp{x, more, width, first, total});
           })
      .def("select_rows",
           [](RecordedStep& step, Place x, I64 width, Place out) { step.add(SelectRowsOp{x, width, out}); })
      .def("logits",
           [](RecordedStep& step, Place x, const LinearWeight& weight, const LowRankLayer* additions, I64 vocab) {
             step.add(LogitsOp{x, weight, additions, vocab});
           },
           nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
      .def("run", run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace
}  // namespace sapwood

NB_MODULE(_native, m) {
  using namespace sapwood;
    // The kernels live as long as the process: whatever Python has not freed at its exit is no leak.
  nb::set_leak_warnings(false);
  m.attr("COMPILED_ISAS") = SAPWOOD_COMPILED;
  m.def("usable_isas", &usable_isas);
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("HEAD_DIM_STEP") = kHeadDimStep;
  nb::class_<Context>(m, "Context")
      .def(nb::init<const std::string&, int>(), nb::arg("isa"), nb::arg("threads"))
      .def_prop_ro("isa", [](const Context& c) { return std::string(c.ops().name); })
      .def_prop_rw("threads", &Context::threads, &Context::set_threads)
      .def_prop_rw("exact_products", &Context::exact_products, &Context::set_exact_products);
  nb::class_<AttentionPlan>(m, "AttentionPlan")
      .def("__init__",
           [](AttentionPlan* self, const Context& c, int num_heads, int num_kv_heads, int head_dim,
              int page_size, I64 num_pages, Address page_table, I64 page_table_stride, I64 max_pages,
              const std::vector<I64>& query_lens, const std::vector<I64>& context_lens,
              const std::vector<std::pair<std::vector<I64>, I64>>& groups, Address sees) {
             std::vector<AttentionPlan::Group> shared;
             for (const auto& [requests, pages] : groups) shared.push_back({requests, pages});
             new (self) AttentionPlan({num_heads, num_kv_heads, head_dim, page_size, num_pages},
                                      page_table, page_table_stride, max_pages,
                                      {query_lens, context_lens}, shared, sees, c.threads());
           })
      .def("run", &attend, Unlocked())
      .def_prop_ro("num_tokens", &AttentionPlan::num_tokens)
      .def("prepare", &AttentionPlan::prepare)
      .def("num_tasks", &AttentionPlan::num_tasks)
      .def("num_merges", &AttentionPlan::num_merges);
  nb::class_<SharedSums>(m, "SharedSums")
      .def("__init__",
           [](SharedSums* self, Address memory, int rank, int ranks, std::size_t capacity) {
             new (self) SharedSums(to(memory), rank, ranks, capacity);
           })
      .def_static("bytes", &SharedSums::bytes)
      .def("add_up", [](SharedSums& s, int dtype, Address x, I64 n) { s.add_up(static_cast<DType>(dtype), to(x), n); },
           Unlocked())
      .def("gather",
           [](SharedSums& s, Address x, Address out, I64 rows, I64 row_bytes) {
             s.gather(in(x), to(out), rows, row_bytes);
           },
           Unlocked())
      .def("exchange",
           [](SharedSums& s, Address x, Address out, Address bytes) {
             s.exchange(in(x), to(out), reinterpret_cast<const I64*>(in(bytes)));
           },
           Unlocked())
      .def("stop", &SharedSums::stop);
  bind_experts(m);
  bind_low_rank(m);
  bind_step(m);
  m.def("embedding", &embedding, Unlocked());
  m.def("rms_norm", &rms_norm, Unlocked());
  m.def("layer_norm", &layer_norm, Unlocked());
  m.def("add_to", &add_to, Unlocked());
  m.def("carry_rows", &carry_rows, Unlocked());
  m.def("norm_rotate_heads", &norm_rotate_heads, Unlocked());
  m.def("activate", &activate, Unlocked());
  m.def("activate_and_mul", &activate_and_mul, Unlocked());
  m.def("xielu", &xielu, Unlocked());
  m.def("attend_both_ways", &attend_to_texts, Unlocked());
  bind_state_ops(m);
  bind_latent_ops(m);
  m.def("argmax", &argmax, Unlocked());
  m.def("mask_logits", &mask_logits);
  m.def("sample_rows", &sample_rows);
  m.def("qk_norm_rope_write_kv", &qk_norm_rope_write_kv, Unlocked());
  nb::class_<CodedLayout>(m, "CodedLayout")
      .def("__init__", &make_coded_layout)
      .def("packed_bytes", [](const CodedLayout& layout, I64 n) {
        return (n + kPanel - 1) / kPanel * extent_of(layout).panel_bytes;
      });
  m.def("pack_coded", &pack_codes, Unlocked());
  nb::class_<LinearWeight>(m, "LinearWeight")
      .def("__init__", &make_linear_weight, nb::arg("kind"), nb::arg("data"), nb::arg("scales"),
           nb::arg("bias"), nb::arg("n"), nb::arg("k"), nb::arg("out_stride"),
           nb::arg("following").none(), nb::arg("fine") = false, nb::keep_alive<1, 9>())
      .def("__init__", &make_coded_weight, nb::arg("layout"), nb::arg("data"), nb::arg("scales"),
           nb::arg("bias"), nb::arg("n"), nb::arg("out_stride"), nb::arg("following").none(),
           nb::keep_alive<1, 2>(), nb::keep_alive<1, 8>())
      .def_ro("n", &LinearWeight::n)
      .def_ro("k", &LinearWeight::k)
      .def_ro("out_stride", &LinearWeight::out_stride);
  m.def("packed_bytes",
        [](int kind, I64 n, I64 k) { return packed_bytes(static_cast<WeightKind>(kind), n, k); });
  m.def("pack_int8", &pack_int8_weight, Unlocked());
  m.def("pack_blocks", &pack_blocks, Unlocked());
  m.def("quantize", &quantize, Unlocked());
  m.def("linear_any", &linear_any, Unlocked());
  m.def("linear_fp32", &linear_fp32, Unlocked());
  m.attr("PANEL") = kPanel;
  m.def("pack_weight", &pack_weight, Unlocked());
  m.def("linear", &linear, Unlocked());
}
