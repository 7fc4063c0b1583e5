// The table of one instruction set that provides every op.
#include "table.h"

#define SAPWOOD_TEXT_OF(x) #x
#define SAPWOOD_TEXT(x) SAPWOOD_TEXT_OF(x)

namespace sapwood::SAPWOOD_ISA {

// See Ops::decoded_rows.
#if defined(__AVX512BF16__)
constexpr std::int64_t kDecodedRows = kDecodedRowsOfPrompts, kDecodedRowsBf16 = 13;
#elif defined(__AVX512F__)
constexpr std::int64_t kDecodedRows = 25, kDecodedRowsBf16 = 25;
#else
constexpr std::int64_t kDecodedRows = 9, kDecodedRowsBf16 = 9;
#endif

// constinit: the table is a constant in the file, not written by code when the module loads. Such code
// would be compiled for this instruction set, and would end the process on a processor without it.
constinit const Ops ops = {
    SAPWOOD_TEXT(SAPWOOD_ISA), rms_norm,         layer_norm,            add_to,          activate,        activate_and_mul,
    xielu,                     add_scaled,       narrow,                argmax,          mask_logits,
    sampling_weights,          widen,            qk_norm_rope_write_kv, norm_rotate_heads, paged_attention,
    attention_scratch,         linear,           linear_scratch,        linear_int8,     linear_grouped,
    quantize,                  linear_coded,     causal_conv,           multiply_logistic, gated_rms_norm,
    gated_delta_rule,          low_rank,         scan,                  norm_rope_write_latent, index_scores,
    index_scratch,             both_ways,        both_ways_scratch,     kDecodedRows,    kDecodedRowsBf16,
};

}  // namespace sapwood::SAPWOOD_ISA
