// The tables of kernels that were compiled, and which of them this machine can run. CMakeLists.txt
// defines SAPWOOD_HAS_<SET> for each. This file is compiled without flags for any instruction set, like all
// code that runs before a table is chosen.
#include <algorithm>
#include <cstring>
#include <vector>

#include "context.h"
#include "pack.h"
#include "quantized.h"

#if defined(SAPWOOD_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(SAPWOOD_HAS_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(SAPWOOD_HAS_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#define SAPWOOD_ISA generic
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA avx2
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA avx2_vnni
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA avx512
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA avx512_vnni
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA avx512_bf16
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA amx
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA amx_emulated
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA neon
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA neon_dotprod
#include "table.h"
#undef SAPWOOD_ISA
#define SAPWOOD_ISA neon_bf16
#include "table.h"
#undef SAPWOOD_ISA

namespace sapwood {

namespace {

#if defined(SAPWOOD_X86)

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// AVX-VNNI: products of bytes in registers of 256 bits. Source: Intel SDM volume 2, CPUID.
[[maybe_unused]] bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;  // leaf 7, subleaf 1, eax
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni) != 0;
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The processor has the matrix unit, the system keeps its registers, and lets this process use it.
// Source: Intel SDM volume 1, 13.3 and 18.2; Linux, Documentation/arch/x86/xstate.rst.
[[maybe_unused]] bool has_matrix_unit() {
  constexpr unsigned kOsxsave = 1u << 27;                                 // leaf 1, ecx
  constexpr unsigned kUnit = 1u << 22 | 1u << 24 | 1u << 25;              // leaf 7, edx: bf16, tiles, int8
  constexpr unsigned kStates = 1u << 17 | 1u << 18;                       // shapes and tiles
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsxsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kUnit) != kUnit) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kStates) == kStates && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// VDPBF16PS of Intel's processors does less per second than multiply-adds of fp32: 158 GFLOP/s beside 257
// on an Emerald Rapids, in the same register tiles. On AMD's (Zen 5) it does nearly twice as much.
[[maybe_unused]] bool has_slow_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx &&
         d == signature_INTEL_edx;
}

constexpr std::int64_t kRows = 37, kInputs = 160, kOutputs = 32;  // sizes in the comparison below

std::vector<std::uint16_t> whole_numbers(std::int64_t count, int step) {
  std::vector<std::uint16_t> numbers(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < numbers.size(); i++) {
    const float number = static_cast<float>(static_cast<int>(i * static_cast<std::size_t>(step) % 15) - 7);
    std::uint32_t bits;
    std::memcpy(&bits, &number, 4);
    numbers[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  return numbers;
}

// Products of small whole numbers by one table: without rounding, so all tables must agree.
[[maybe_unused]] std::vector<float> products(const Ops& ops) {
  const Team alone{1, nullptr, nullptr};
  const std::vector<std::uint16_t> x = whole_numbers(kRows * kInputs, 7);
  const std::vector<std::uint16_t> weight = whole_numbers(kOutputs * kInputs, 11);
  const std::vector<float> scales(kOutputs, 1.0f);
  // The same bytes as int8; 128 inputs, of which the rows of x begin kInputs apart.
  const LinearWeight bytes{WeightKind::int8, weight.data(), scales.data(), nullptr, kOutputs, 128, kOutputs,
                           nullptr};
  const std::size_t scratch_bytes =
      std::max(ops.linear_scratch(DType::bf16, WeightKind::bf16, kRows, kInputs, 1),
               static_cast<std::size_t>(quantized_scratch(bytes, kRows, 1)));
  Buffer scratch;
  std::byte* own = scratch.at_least(scratch_bytes);
  std::vector<float> out(kRows * kOutputs);
  ops.linear(DType::bf16, {x.data(), kInputs, WeightKind::bf16, weight.data(), nullptr, out.data(), kRows,
                           kOutputs, kInputs, own, alone, true, false, true, kOutputs});
  std::vector<std::uint16_t> rounded(kRows * kOutputs);
  ops.linear_int8(DType::bf16, {x.data(), kInputs, &bytes, rounded.data(), kRows, own, alone});
  out.insert(out.end(), rounded.begin(), rounded.end());
  return out;
}

#elif defined(SAPWOOD_HAS_NEON)

// What an ARM processor has beside the vectors that every 64-bit one has. In these sets the compiler may
// use any instruction of ARMv8.2, so `dotprod` stands for all parts of it that ordinary code may need.
struct ArmFeatures {
  bool dotprod = false, bf16 = false;  // bf16: and products of signed with unsigned bytes (i8mm)
};

[[maybe_unused]] ArmFeatures arm_features() {
#if defined(__linux__)
  // Source: Linux, arch/arm64/include/uapi/asm/hwcap.h: atomics, crc32, asimdrdm, asimddp; i8mm, bf16.
  constexpr unsigned long kArmv82 = 1ul << 8 | 1ul << 7 | 1ul << 12, kDotprod = 1ul << 20;
  constexpr unsigned long kBf16 = 1ul << 13 | 1ul << 14;
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  const bool has_dotprod = (first & (kArmv82 | kDotprod)) == (kArmv82 | kDotprod);
  return {has_dotprod, has_dotprod && (second & kBf16) == kBf16};
#elif defined(__APPLE__)
  // Every processor that macOS runs on is beyond ARMv8.2.
  const auto has = [](const char* feature) {
    int value = 0;
    std::size_t size = sizeof(value);
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value == 1;
  };
  const bool has_dotprod = has("hw.optional.arm.FEAT_DotProd");
  return {has_dotprod, has_dotprod && has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16")};
#else
  return {};
#endif
}

#endif

// Sets that differ from another set only in the ops named here.
#define SAPWOOD_WITH_BYTES(SET)                               \
  Ops with_##SET(Ops table) {                                 \
    table.name = #SET;                                        \
    table.linear_int8 = SET::linear_int8;                     \
    table.linear_grouped = SET::linear_grouped;               \
    table.decoded_rows = kDecodedRowsOfPrompts;               \
    table.decoded_rows_bf16 = kDecodedRowsOfPrompts;          \
    return table;                                             \
  }
#if defined(SAPWOOD_HAS_AVX2_VNNI)
SAPWOOD_WITH_BYTES(avx2_vnni)
#endif
#if defined(SAPWOOD_HAS_AVX512_VNNI)
SAPWOOD_WITH_BYTES(avx512_vnni)
#endif

#define SAPWOOD_WITH_UNIT(SET)                                \
  Ops with_##SET(Ops table) {                                 \
    table.name = #SET;                                        \
    table.paged_attention = SET::paged_attention;             \
    table.attention_scratch = SET::attention_scratch;         \
    table.index_scores = SET::index_scores;                   \
    table.index_scratch = SET::index_scratch;                 \
    table.both_ways = SET::both_ways;                         \
    table.both_ways_scratch = SET::both_ways_scratch;         \
    table.linear = SET::linear;                               \
    table.linear_scratch = SET::linear_scratch;               \
    table.linear_int8 = SET::linear_int8;                     \
    table.linear_grouped = SET::linear_grouped;               \
    table.linear_many = SET::linear_many;                     \
    table.linear_many_scratch = SET::linear_many_scratch;     \
    table.linear_digits = SET::linear_digits;                 \
    table.linear_digits_scratch = SET::linear_digits_scratch; \
    table.decoded_rows_bf16 = 9;                              \
    return table;                                             \
  }
#if defined(SAPWOOD_HAS_AMX)
SAPWOOD_WITH_UNIT(amx)
#endif
#if defined(SAPWOOD_HAS_AMX_EMULATED)
SAPWOOD_WITH_UNIT(amx_emulated)
#endif

#if defined(SAPWOOD_HAS_NEON_DOTPROD)
Ops with_dotprod(Ops table) {
  table.name = "neon_dotprod";
  table.linear_int8 = neon_dotprod::linear_int8;
  table.linear_grouped = neon_dotprod::linear_grouped;
  table.decoded_rows = kDecodedRowsOfPrompts;
  table.decoded_rows_bf16 = kDecodedRowsOfPrompts;
  return table;
}
#endif
#if defined(SAPWOOD_HAS_NEON_BF16)
Ops with_bf16(Ops table) {
  table.name = "neon_bf16";
  table.rms_norm = neon_bf16::rms_norm;
  table.layer_norm = neon_bf16::layer_norm;
  table.add_to = neon_bf16::add_to;
  table.activate = neon_bf16::activate;
  table.activate_and_mul = neon_bf16::activate_and_mul;
  table.xielu = neon_bf16::xielu;
  table.argmax = neon_bf16::argmax;
  table.sampling_weights = neon_bf16::sampling_weights;
  table.widen = neon_bf16::widen;
  table.qk_norm_rope_write_kv = neon_bf16::qk_norm_rope_write_kv;
  table.norm_rotate_heads = neon_bf16::norm_rotate_heads;
  table.paged_attention = neon_bf16::paged_attention;
  table.attention_scratch = neon_bf16::attention_scratch;
  table.linear = neon_bf16::linear;
  table.linear_scratch = neon_bf16::linear_scratch;
  table.linear_int8 = neon_bf16::linear_int8;
  table.linear_grouped = neon_bf16::linear_grouped;
  table.decoded_rows = kDecodedRowsOfPrompts;
  table.decoded_rows_bf16 = kDecodedRowsOfPrompts;
  table.linear_coded = neon_bf16::linear_coded;
  table.causal_conv = neon_bf16::causal_conv;
  table.multiply_logistic = neon_bf16::multiply_logistic;
  table.gated_rms_norm = neon_bf16::gated_rms_norm;
  table.gated_delta_rule = neon_bf16::gated_delta_rule;
  table.low_rank = neon_bf16::low_rank;
  table.scan = neon_bf16::scan;
  table.norm_rope_write_latent = neon_bf16::norm_rope_write_latent;
  table.index_scores = neon_bf16::index_scores;
  table.index_scratch = neon_bf16::index_scratch;
  table.both_ways = neon_bf16::both_ways;
  table.both_ways_scratch = neon_bf16::both_ways_scratch;
  return table;
}
#endif

std::vector<Ops> find_usable() {
  std::vector<Ops> usable{generic::ops};
#if defined(SAPWOOD_X86)
  __builtin_cpu_init();
  if (!has_avx2()) return usable;
#if defined(SAPWOOD_HAS_AVX2)
  usable.push_back(avx2::ops);
#endif
#if defined(SAPWOOD_HAS_AVX2_VNNI)
  if (has_avx_vnni()) usable.push_back(with_avx2_vnni(avx2::ops));
#endif
  if (!has_avx512()) return usable;
#if defined(SAPWOOD_HAS_AVX512)
  usable.push_back(avx512::ops);
#endif
  if (!__builtin_cpu_supports("avx512vnni")) return usable;
#if defined(SAPWOOD_HAS_AVX512_VNNI)
  usable.push_back(with_avx512_vnni(avx512::ops));
#endif
  if (!__builtin_cpu_supports("avx512bf16")) return usable;
#if defined(SAPWOOD_HAS_AMX_EMULATED)
  usable.push_back(with_amx_emulated(avx512_bf16::ops));
#endif
#if defined(SAPWOOD_HAS_AVX512_BF16)
  usable.push_back(avx512_bf16::ops);
  if (has_slow_bf16()) {
    usable.back().widens_bf16 = true;
    usable.back().decoded_rows_bf16 = usable.back().decoded_rows;
  }
#endif
#if defined(SAPWOOD_HAS_AMX)
  if (has_matrix_unit()) {
    const Ops unit = with_amx(avx512_bf16::ops);
    if (products(unit) == products(avx512_bf16::ops)) usable.push_back(unit);
  }
#endif
#elif defined(SAPWOOD_HAS_NEON)
  usable.push_back(neon::ops);
  [[maybe_unused]] const ArmFeatures has = arm_features();
#if defined(SAPWOOD_HAS_NEON_DOTPROD)
  if (has.dotprod) usable.push_back(with_dotprod(neon::ops));
#endif
#if defined(SAPWOOD_HAS_NEON_BF16)
  if (has.bf16) usable.push_back(with_bf16(neon::ops));
#endif
#endif
  return usable;
}

}  // namespace

const std::vector<Ops>& usable_ops() {
  static const std::vector<Ops> usable = find_usable();
  return usable;
}

}  // namespace sapwood
