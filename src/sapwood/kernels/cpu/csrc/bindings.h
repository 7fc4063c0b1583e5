// What the files that make the Python module `_native` share. Tensors arrive as addresses and strides.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "step.h"

namespace sapwood {

using Address = std::uintptr_t;
using I64 = std::int64_t;
using Unlocked = nanobind::call_guard<nanobind::gil_scoped_release>;

inline const void* in(Address address) { return reinterpret_cast<const void*>(address); }
inline void* to(Address address) { return reinterpret_cast<void*>(address); }

// Of convolutions, and of what else has states (state_bindings.cpp).
void bind_state_ops(nanobind::module_& m);
void bind_state_steps(nanobind::class_<RecordedStep>& step);

// Of latent attention (latent_bindings.cpp).
void bind_latent_ops(nanobind::module_& m);
void bind_latent_steps(nanobind::class_<RecordedStep>& step);

}  // namespace sapwood
