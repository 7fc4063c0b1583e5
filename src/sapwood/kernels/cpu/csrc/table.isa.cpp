// The table of one instruction set that provides every op.
#include "table.h"

#define SAPWOOD_TEXT_OF(x) #x
#define SAPWOOD_TEXT(x) SAPWOOD_TEXT_OF(x)

namespace sapwood::SAPWOOD_ISA {

// constinit: the table is a constant in the file, not written by code when the module loads. Such code
// would be compiled for this instruction set, and would end the process on a processor without it.
constinit const Ops ops = {
    SAPWOOD_TEXT(SAPWOOD_ISA), rms_norm,         layer_norm,            activate,        activate_and_mul,
    argmax,                    mask_logits,      sampling_weights,      widen,           qk_norm_rope_write_kv,
    paged_attention,           attention_scratch,
    linear,                    linear_scratch,   linear_int8,           linear_grouped,  quantize,
    linear_coded,
};

}  // namespace sapwood::SAPWOOD_ISA
