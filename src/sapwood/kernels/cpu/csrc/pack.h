// The layout of packed weights, the same for every instruction set.
//
// A weight [N, K] becomes panels of 32 outputs, 0 beyond N: [ceil(N / 32), K, 32] numbers; but of bf16
// two neighbouring inputs of an output lie together, [ceil(N / 32), K / 2, 32] lanes of 32 bits, as
// products of bf16 want them. Where there are none, a lane's halves are fp32 by a shift and a mask.
#pragma once

#include <cstdint>

namespace sapwood {

constexpr std::int64_t kPanel = 32;

}  // namespace sapwood
