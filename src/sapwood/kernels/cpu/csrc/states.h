// What single ops and recorded steps share of the ops on states: the room that they need.
#pragma once

#include "context.h"

namespace sapwood {

// Fills in scratch and team, and computes; the mutex of the context is held by the caller.
inline void run_delta_rule(Context& context, DType dtype, DeltaArgs args) {
  const std::int64_t room = delta_scratch(args.key_dim, args.value_dim) * context.threads();
  args.scratch = reinterpret_cast<float*>(context.scratch.at_least(static_cast<std::size_t>(room) * sizeof(float)));
  args.team = context.team();
  context.ops().gated_delta_rule(dtype, args);
}

}  // namespace sapwood
