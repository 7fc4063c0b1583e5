// Compares every op of every instruction set that this processor has with plain loops in double, or,
// where two sets must agree bit by bit, with the first set. Made for processors that only an emulator
// has (tests/kernels/test_arm.py): small sizes, no Python.
//
// Prints the sets, slowest first, then a line for every comparison that failed; ends with 1 if any did.
#include <algorithm>
#include <string>
#include <vector>

#include "attention_ops.h"
#include "latent_ops.h"
#include "linear_ops.h"
#include "row_ops.h"

namespace sapwood {
namespace {

// Appends to `same` what must be equal for all sets.
void test_all(Context& context, std::vector<double>* same) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    test_rms_norm(context, dtype);
    test_layer_norm(context, dtype);
    test_activations(context, dtype);
    test_xielu(context, dtype);
    test_add_to(context, dtype);
    test_both_ways(context, dtype, 3, 20);
    test_both_ways(context, dtype, 70, 64);
    test_causal_conv(context, dtype);
    test_low_rank(context, dtype);
    test_argmax(context, dtype);
    test_mask_logits(context, dtype);
    test_sampling_weights(context, dtype);
    test_linear(context, dtype, same);
    test_quantize(context, dtype, same);
    for (const KvFormat format : {KvFormat::dense, KvFormat::int8, KvFormat::fp8_e4m3, KvFormat::fp8_e5m2}) {
      test_attention(context, dtype, format, 3, 64, {});
      test_attention(context, dtype, format, 1, 32, {});
      test_attention(context, dtype, format, 3, 64, {.has_tree = true});
      test_attention(context, dtype, format, 3, 64, {.window = 20, .has_sinks = true});
      test_attention(context, dtype, format, 1, 32, {.soft_cap = 0.7f, .has_alibi = true});
      test_attention(context, dtype, format, 3, 32, {.window = 3, .soft_cap = 2, .has_sinks = true, .has_alibi = true});
      test_latent_attention(context, dtype, format, 3, 64, 32);
      test_latent_attention(context, dtype, format, 18, 96, 64);
      test_choose_keys(context, dtype, format);
    }
  }
  for (const std::int64_t k : {6, 576, 900}) test_wide(context, k);
  test_widen(context);
  test_sums(context);
}

}  // namespace
}  // namespace sapwood

// Arguments: the sets to test, all without any. With --list none is tested.
int main(int count, char** arguments) {
  using namespace sapwood;
  const std::vector<std::string> asked(arguments + 1, arguments + count);
  std::setvbuf(stdout, nullptr, _IOLBF, 4096);  // what was found must be seen if an instruction ends this
  std::vector<double> first;
  for (const Ops& ops : usable_ops()) std::printf("%s%s", &ops == &usable_ops().front() ? "" : " ", ops.name);
  std::printf("\n");
  for (const Ops& ops : usable_ops()) {
    if (!asked.empty() && std::find(asked.begin(), asked.end(), ops.name) == asked.end()) continue;
    set_name = ops.name;
    Context context(set_name, kThreads);
    std::vector<double> same;
    test_all(context, &same);
    if (first.empty()) first = same;
    check("what does not depend on the instruction set", same, first, 0);
  }
  return failures == 0 ? 0 : 1;
}
