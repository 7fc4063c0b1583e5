// The table of one instruction set; see CMakeLists.txt for what SAPWOOD_BASE and SAPWOOD_OWN_ say.
#include "table.h"

#define SAPWOOD_TEXT_OF(x) #x
#define SAPWOOD_TEXT(x) SAPWOOD_TEXT_OF(x)

namespace sapwood::SAPWOOD_ISA {

#if defined(SAPWOOD_BASE)
static Ops on_base() {
  Ops own = SAPWOOD_BASE::ops;
  own.name = SAPWOOD_TEXT(SAPWOOD_ISA);
#if defined(SAPWOOD_OWN_ATTENTION)
  own.paged_attention = paged_attention;
  own.attention_scratch = attention_scratch;
#endif
#if defined(SAPWOOD_OWN_LINEAR)
  own.linear = linear;
#endif
#if defined(SAPWOOD_OWN_LINEAR_INT8)
  own.linear_int8 = linear_int8;
#endif
#if defined(SAPWOOD_OWN_LINEAR_GROUPED)
  own.linear_grouped = linear_grouped;
#endif
  return own;
}

const Ops ops = on_base();  // the base's table is a constant: it is there before
#else
const Ops ops = {
    SAPWOOD_TEXT(SAPWOOD_ISA), rms_norm,        silu_and_mul,      argmax,
    mask_logits,               sampling_weights, qk_norm_rope_write_kv, paged_attention, attention_scratch,
    linear,                    linear_int8,     linear_grouped,    quantize,
    linear_coded,
};
#endif

}  // namespace sapwood::SAPWOOD_ISA
