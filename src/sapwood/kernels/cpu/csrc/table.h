// The functions that the *.isa.cpp files of one instruction set offer to its table. There is no include
// guard: the functions are declared in the namespace that SAPWOOD_ISA names at that moment, and the file
// that joins all tables includes this header once per set.
#include "ops.h"

namespace sapwood::SAPWOOD_ISA {

void rms_norm(DType dtype, const void* x, void* residual, const void* weight, void* out,
              std::int64_t rows, std::int64_t hidden, float eps, const Team& team);
void layer_norm(DType dtype, const void* x, const void* weight, const void* bias, void* out, std::int64_t rows,
                std::int64_t hidden, float eps, const Team& team);
void add_to(DType dtype, const void* x, void* total, std::int64_t n, const Team& team);
void activate(DType dtype, Activation activation, const void* x, void* out, std::int64_t n, const Team& team);
void activate_and_mul(DType dtype, Activation activation, const void* x, void* out, std::int64_t rows,
                      std::int64_t inner, const Team& team);
void xielu(DType dtype, const void* x, void* out, std::int64_t n, float above, float below, const Team& team);
void add_scaled(const float* x, float factor, float* sum, std::int64_t n);
void narrow(const float* from, void* to, std::int64_t n);
void argmax(DType dtype, const void* x, std::int64_t rows, std::int64_t columns, std::int64_t* out,
            const Team& team);
void mask_logits(DType dtype, void* x, std::int64_t stride, std::int64_t columns,
                 const std::uint32_t* masks, const std::int64_t* rows, std::int64_t count,
                 const Team& team);
void sampling_weights(DType dtype, const void* x, std::int64_t n, float inverse_temperature,
                      float* weights, float* block_sum, float* block_top);
void widen(WeightKind kind, const void* from, float* to, std::int64_t n);
void qk_norm_rope_write_kv(DType dtype, const RopeArgs& args);
void norm_rotate_heads(DType dtype, const RotateArgs& args);
void norm_rope_write_latent(DType dtype, const LatentRopeArgs& args);
void index_scores(DType dtype, const IndexArgs& args);
std::size_t index_scratch(DType dtype, const IndexArgs& args);
void both_ways(DType dtype, const BothWaysArgs& args);
std::size_t both_ways_scratch(DType dtype, const BothWaysArgs& args);
void paged_attention(DType dtype, const AttentionArgs& args);
std::size_t attention_scratch(DType dtype, int rows, int head_dim);
void linear(DType dtype, const LinearArgs& args);
std::size_t linear_scratch(DType dtype, WeightKind kind, std::int64_t m, std::int64_t k, int threads);
void linear_int8(DType dtype, const QuantizedArgs& args);
void linear_grouped(DType dtype, const QuantizedArgs& args);
void quantize(DType dtype, const QuantizeArgs& args);
void linear_coded(DType dtype, const CodedArgs& args);
void causal_conv(DType dtype, const ConvArgs& args);
void multiply_logistic(DType dtype, void* x, const void* gate, std::int64_t gate_stride, std::int64_t rows,
                       std::int64_t width, const Team& team);
void gated_rms_norm(DType dtype, const GatedNormArgs& args);
void gated_delta_rule(DType dtype, const DeltaArgs& args);
void low_rank(DType dtype, const LowRankArgs& args);
void scan(DType dtype, const ScanArgs& args);
bool linear_many(const QuantizedArgs& args);  // of the sets with AMX, as the next
std::size_t linear_many_scratch(int threads);
bool linear_digits(const QuantizedArgs& args);  // likewise
std::size_t linear_digits_scratch(const LinearWeight& weight, std::int64_t m, int threads);

extern const Ops ops;  // of the sets that provide every op (table.isa.cpp)

}  // namespace sapwood::SAPWOOD_ISA
