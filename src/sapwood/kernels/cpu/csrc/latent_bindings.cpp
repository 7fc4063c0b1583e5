// The ops of latent attention in the Python module; attention itself is that of module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <tuple>

#include "bindings.h"
#include "context.h"
#include "head_products.h"
#include "key_choice.h"
#include "step.h"

namespace nb = nanobind;

namespace sapwood {
namespace {

// (query heads, entries of a query, of a latent, of a row; norm, eps; cos_sin, positions in it, its row)
using LatentTuple = std::tuple<int, int, int, int, Address, float, Address, I64, int>;
using RowsTuple = std::tuple<Address, I64, int, I64, int>;  // (cache, page stride, format, pages, page size)

LatentRopeArgs latent_of(const LatentTuple& form, const RowsTuple& rows) {
  LatentRopeArgs a{};
  Address norm = 0, cos_sin = 0;
  std::tie(a.num_heads, a.key_dim, a.rank, a.row, norm, a.eps, cos_sin, std::ignore, a.rotary_dim) = form;
  a.norm = in(norm);
  a.cos_sin = static_cast<const float*>(in(cos_sin));
  a.cache = to(std::get<0>(rows));
  a.page_stride = std::get<1>(rows);
  a.kv = static_cast<KvFormat>(std::get<2>(rows));
  a.page_size = std::get<4>(rows);
  return a;
}

void norm_rope_write_latent(const Context& c, int dtype, Address q, Address latent, I64 latent_stride, I64 tokens,
                            const LatentTuple& form, Address positions, Address write_index, const RowsTuple& rows) {
  LatentRopeArgs a = latent_of(form, rows);
  a.positions = static_cast<const I64*>(in(positions));
  a.write_index = static_cast<const I64*>(in(write_index));
  check_indices("positions", a.positions, tokens, std::get<7>(form));
  check_indices("write_index", a.write_index, tokens, std::get<3>(rows) * a.page_size);
  a.q = to(q);
  a.latent = in(latent);
  a.latent_stride = latent_stride;
  a.num_tokens = tokens;
  a.team = c.team();
  c.ops().norm_rope_write_latent(static_cast<DType>(dtype), a);
}

KeyChoice choice_of(int num_heads, int head_dim, const RowsTuple& keys, I64 num_chosen) {
  KeyChoice choice{};
  choice.num_heads = num_heads;
  choice.head_dim = head_dim;
  choice.keys = in(std::get<0>(keys));
  choice.page_stride = std::get<1>(keys);
  choice.kv = static_cast<KvFormat>(std::get<2>(keys));
  choice.num_pages = std::get<3>(keys);
  choice.page_size = std::get<4>(keys);
  choice.num_chosen = num_chosen;
  return choice;
}

// What KeyChoice has; of the page table (address, entries between rows, entries of a row).
void choose(Context& c, int dtype, Address q, Address weights, int num_heads, int head_dim, const RowsTuple& keys,
            const std::tuple<Address, I64, I64>& table, std::vector<I64> query, std::vector<I64> context,
            I64 num_chosen, Address out) {
  KeyChoice choice = choice_of(num_heads, head_dim, keys, num_chosen);
  choice.q = in(q);
  choice.weights = static_cast<const float*>(in(weights));
  choice.page_table = static_cast<const std::int32_t*>(in(std::get<0>(table)));
  choice.page_table_stride = std::get<1>(table);
  choice.max_pages = std::get<2>(table);
  choice.query = std::move(query);
  choice.context = std::move(context);
  choice.out = static_cast<I64*>(to(out));
  choose_keys(c, static_cast<DType>(dtype), choice);
}

}  // namespace

void bind_latent_ops(nb::module_& m) {
  m.def("norm_rope_write_latent", &norm_rope_write_latent, Unlocked());
  m.def("choose_keys", &choose, Unlocked());
  nb::class_<HeadProducts>(m, "HeadProducts")
      .def(nb::init<std::vector<LinearWeight>>())
      .def("run",
           [](HeadProducts& products, Context& c, int dtype, Address x, I64 x_token, I64 x_head, Address out,
              I64 out_token, I64 out_head, I64 tokens, I64 kept) {
             const std::lock_guard<std::mutex> lock(c.mutex);
             products.run(c, static_cast<DType>(dtype), {to(x), x_token, x_head}, {to(out), out_token, out_head},
                          tokens, kept);
           },
           Unlocked());
}

void bind_latent_steps(nb::class_<RecordedStep>& step) {
  step.def("rotate_latent",
           [](RecordedStep& step, Place x, I64 x_width, Place q, const LatentTuple& form, const RowsTuple& rows,
              std::size_t group) {
             LatentRopeArgs args = latent_of(form, rows);
             args.latent_stride = x_width;
             step.add(RotateLatentOp{x, q, args, std::get<7>(form), std::get<3>(rows), group});
           })
      .def("multiply_heads",
           [](RecordedStep& step, Place x, HeadProducts& layer, I64 kept, Place out) {
             step.add(MultiplyHeadsOp{x, &layer, kept, out});
           })
      .def("choose_keys",
           [](RecordedStep& step, Place x, Place q, const LinearWeight& weights, float scale, int num_heads,
              int head_dim, const RowsTuple& keys, I64 num_chosen, std::size_t group) {
             step.add(ChooseKeysOp{x, q, weights, scale, choice_of(num_heads, head_dim, keys, num_chosen), group});
           })
      .def("take_columns", [](RecordedStep& step, Place x, I64 x_width, I64 first, I64 width, Place out) {
        step.add(TakeColumnsOp{x, x_width, first, width, out});
      });
}

}  // namespace sapwood
