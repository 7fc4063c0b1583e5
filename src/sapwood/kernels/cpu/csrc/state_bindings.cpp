// The ops on states in the Python module: convolutions, gated norms, the gated delta rule and scans.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <mutex>
#include <tuple>

#include "bindings.h"
#include "context.h"
#include "states.h"
#include "step.h"

namespace nb = nanobind;

namespace sapwood {
namespace {

// bias may be 0; weight_stride as in ConvArgs; the states of slot s begin at states + s * state_stride
void causal_conv(const Context& c, int dtype, Address x, Address weight, I64 weight_stride, Address bias,
                 Address states, I64 state_stride, I64 num_slots, Address slots, Address query_start, Address context_len,
                 I64 num_requests, I64 num_tokens, I64 channels, I64 length, I64 x_stride, bool silu, Address out) {
  ConvArgs a{};
  a.slots = static_cast<const I64*>(in(slots));
  a.query_start = static_cast<const std::int32_t*>(in(query_start));
  check_indices("slots", a.slots, num_requests, num_slots);
  check_query_start(a.query_start, num_requests, num_tokens);
  a.x = in(x);
  a.x_stride = x_stride;
  a.silu = silu;
  a.weight = in(weight);
  a.weight_stride = weight_stride;
  a.bias = in(bias);
  a.states = to(states);
  a.state_stride = state_stride;
  a.context_len = static_cast<const std::int32_t*>(in(context_len));
  a.num_requests = num_requests;
  a.channels = channels;
  a.length = length;
  a.out = to(out);
  a.team = c.team();
  c.ops().causal_conv(static_cast<DType>(dtype), a);
}

// (width, group, eps, norm_first, logistic)
using GatedNormTuple = std::tuple<I64, I64, float, bool, bool>;

GatedNormArgs gated_norm_of(const void* weight, const GatedNormTuple& form) {
  GatedNormArgs a{};
  a.weight = weight;
  std::tie(a.width, a.group, a.eps, a.norm_first, a.logistic) = form;
  return a;
}

void gated_rms_norm(const Context& c, int dtype, Address x, Address gate, I64 gate_stride, Address weight, I64 rows,
                    const GatedNormTuple& form, Address out) {
  GatedNormArgs a = gated_norm_of(in(weight), form);
  a.x = in(x);
  a.gate = in(gate);
  a.gate_stride = gate_stride;
  a.rows = rows;
  a.out = to(out);
  a.team = c.team();
  c.ops().gated_rms_norm(static_cast<DType>(dtype), a);
}

// (key heads, heads, key_dim, value_dim, per channel, rate, shift, write_scale, eps, lowest or 0)
using DeltaTuple = std::tuple<I64, I64, I64, I64, bool, Address, Address, float, float, float>;
using StatesTuple = std::tuple<Address, int, I64, I64>;  // address, dtype, elements between slots, slots
using ColumnsTuple = std::tuple<Address, I64, I64>;      // address or place, first column, columns of a row

DeltaArgs delta_of(const DeltaTuple& form, const StatesTuple& states) {
  DeltaArgs a{};
  Address rate, shift, at;
  int state_dtype;
  I64 num_slots;
  std::tie(a.num_key_heads, a.num_heads, a.key_dim, a.value_dim, a.per_channel, rate, shift, a.write_scale, a.eps,
           a.lowest) = form;
  std::tie(at, state_dtype, a.state_stride, num_slots) = states;
  a.rate = static_cast<const float*>(in(rate));
  a.shift = static_cast<const float*>(in(shift));
  a.states = to(at);
  a.state_dtype = static_cast<DType>(state_dtype);
  return a;
}

// Of qkv, decay and write: the address of the first row, and the elements between rows.
void gated_delta_rule(Context& c, int dtype, const ColumnsTuple& qkv, const ColumnsTuple& decay,
                      const ColumnsTuple& write, const DeltaTuple& form, const StatesTuple& states, Address slots,
                      Address query_start, Address context_len, I64 num_requests, I64 num_tokens, Address out) {
  DeltaArgs a = delta_of(form, states);
  a.slots = static_cast<const I64*>(in(slots));
  a.query_start = static_cast<const std::int32_t*>(in(query_start));
  a.context_len = static_cast<const std::int32_t*>(in(context_len));
  a.num_requests = num_requests;
  check_indices("slots", a.slots, num_requests, std::get<3>(states));
  check_query_start(a.query_start, num_requests, num_tokens);
  a.qkv = in(std::get<0>(qkv));
  a.qkv_stride = std::get<2>(qkv);
  a.decay = in(std::get<0>(decay));
  a.decay_stride = std::get<2>(decay);
  a.write = in(std::get<0>(write));
  a.write_stride = std::get<2>(write);
  a.out = to(out);
  const std::lock_guard<std::mutex> lock(c.mutex);
  run_delta_rule(c, static_cast<DType>(dtype), a);
}

// (heads, channels of a head, groups, numbers of a key, whether each entry of a state has a rate, rates, biases of
// time steps or 0, skips or 0, smallest and largest time step)
using ScanTuple = std::tuple<I64, I64, I64, I64, bool, Address, Address, Address, double, double>;
// x, b, c, dt and gate: each an address, or a place counted from 1; of the last two it may be 0
using ScanInputs = std::array<ColumnsTuple, kScanInputs>;

ScanArgs scan_of(const ScanTuple& form, const StatesTuple& states, const ScanInputs& inputs) {
  const auto& [heads, head_dim, groups, state_size, own_rates, rates, dt_bias, skip, dt_least, dt_most] = form;
  const auto numbers = [](Address at) { return static_cast<const float*>(in(at)); };
  ScanArgs a{};
  a.layer = {heads, head_dim, groups, state_size, own_rates, numbers(rates), numbers(dt_bias), numbers(skip),
             static_cast<float>(dt_least), static_cast<float>(dt_most)};
  a.states = to(std::get<0>(states));
  a.state_dtype = static_cast<DType>(std::get<1>(states));
  a.state_stride = std::get<2>(states);
  for (std::size_t i = 0; i < kScanInputs; i++) a.strides[i] = std::get<2>(inputs[i]);
  return a;
}

// Of each input: the address of the first row, and the elements between rows.
void scan(const Context& c, int dtype, const ScanInputs& inputs, const ScanTuple& form, const StatesTuple& states,
          Address slots, Address query_start, Address context_len, I64 num_requests, I64 num_tokens, Address out) {
  ScanArgs a = scan_of(form, states, inputs);
  a.slots = static_cast<const I64*>(in(slots));
  a.query_start = static_cast<const std::int32_t*>(in(query_start));
  a.context_len = static_cast<const std::int32_t*>(in(context_len));
  a.num_requests = num_requests;
  check_indices("slots", a.slots, num_requests, std::get<3>(states));
  check_query_start(a.query_start, num_requests, num_tokens);
  for (std::size_t i = 0; i < kScanInputs; i++) a.inputs[i] = in(std::get<0>(inputs[i]));
  a.out = to(out);
  a.team = c.team();
  c.ops().scan(static_cast<DType>(dtype), a);
}

}  // namespace

void bind_state_ops(nb::module_& m) {
  m.attr("MAX_CONV_LENGTH") = kMaxConvLength;
  m.def("causal_conv", &causal_conv, Unlocked());
  m.def(
      "gate_columns",
      [](const Context& c, int dtype, Address x, Address gate, I64 gate_stride, I64 rows, I64 width) {
        c.ops().multiply_logistic(static_cast<DType>(dtype), to(x), in(gate), gate_stride, rows, width, c.team());
      },
      Unlocked());
  m.def("gated_rms_norm", &gated_rms_norm, Unlocked());
  m.def("gated_delta_rule", &gated_delta_rule, Unlocked());
  m.attr("MAX_STATE_SIZE") = kMaxStateSize;
  m.def("scan", &scan, Unlocked());
}

void bind_state_steps(nb::class_<RecordedStep>& step) {
  step.def("convolve",
           [](RecordedStep& step, Place x, I64 x_width, I64 first, bool gated, bool silu, I64 channels, I64 length,
              Address weight, Place weights, Address bias, Address states, I64 state_stride, I64 num_slots,
              std::size_t group, Place out) {
             step.add(ConvolveOp{x, x_width, first, gated, silu, channels, length, in(weight), weights, in(bias),
                                 to(states), state_stride, num_slots, group, out});
           })
      .def("gate_columns",
           [](RecordedStep& step, Place gate, I64 first, I64 gate_width, Place residual, I64 width) {
             step.add(GateColumnsOp{gate, residual, first, gate_width, width});
           })
      .def("gated_norm",
           [](RecordedStep& step, Place x, Place gate, I64 first, I64 gate_width, Address weight,
              const GatedNormTuple& form, Place out) {
             step.add(GatedNormOp{x, gate, first, gate_width, gated_norm_of(in(weight), form), out});
           })
      .def("delta_rule",
           [](RecordedStep& step, Place qkv, const ColumnsTuple& decay, const ColumnsTuple& write,
              const DeltaTuple& form, const StatesTuple& states, std::size_t group, Place out) {
             DeltaArgs args = delta_of(form, states);
             const auto& [decay_place, decay_first, decay_width] = decay;
             const auto& [write_place, write_first, write_width] = write;
             args.qkv_stride = 2 * args.num_key_heads * args.key_dim + args.num_heads * args.value_dim;
             args.decay_stride = decay_width;
             args.write_stride = write_width;
             step.add(DeltaOp{qkv, static_cast<Place>(decay_place), static_cast<Place>(write_place), decay_first,
                              write_first, args, std::get<3>(states), group, out});
           })
      .def("scan", [](RecordedStep& step, const ScanInputs& inputs, const ScanTuple& form, const StatesTuple& states,
                      std::size_t group, Place out) {
        ScanOp op{};
        op.args = scan_of(form, states, inputs);
        for (std::size_t i = 0; i < kScanInputs; i++) {
          op.inputs[i] = std::get<0>(inputs[i]) == 0 ? kNowhere : static_cast<Place>(std::get<0>(inputs[i]) - 1);
          op.firsts[i] = std::get<1>(inputs[i]);
        }
        op.num_slots = std::get<3>(states);
        op.group = group;
        op.out = out;
        step.add(op);
      });
}

}  // namespace sapwood
