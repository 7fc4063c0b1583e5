// tanh and the error function. Included only by *.isa.cpp.
#pragma once

#include "simd.h"

namespace sapwood::SAPWOOD_ISA {
namespace {

// tanh(x), within 4 ulp.
SAPWOOD_INLINE VF vtanh(VF x) {
  const VF size = x < VF{} ? -x : x, square = x * x;
  // Of the series, where 1 - e^-2x would lose digits.
  VF p = splat(-8.8632355e-3f);
  p = p * square + splat(2.1869488e-2f);
  p = p * square + splat(-5.3968254e-2f);
  p = p * square + splat(1.3333333e-1f);
  p = p * square + splat(-3.3333333e-1f);
  const VF small = x + x * square * p;
  const VF power = vexp(size * splat(-2.0f));
  const VF large = (splat(1.0f) - power) / (splat(1.0f) + power);
  return size < splat(0.4f) ? small : x < VF{} ? -large : large;
}

// 1 - erf(x) for x of 0 or more, within 1e-6 of itself.
SAPWOOD_INLINE VF verfc(VF x) {
  const VF t = splat(1.0f) / (splat(1.0f) + x * splat(0.5f));
  // erfc(x) e^(x^2) / t is smooth in t: fitted so that the largest relative error is least (4e-8).
  VF p = splat(-5.906923770e-2f);
  p = p * t + splat(2.845762739e-1f);
  p = p * t + splat(-4.872025118e-1f);
  p = p * t + splat(2.780700218e-1f);
  p = p * t + splat(-2.662753962e-2f);
  p = p * t + splat(2.026876166e-1f);
  p = p * t + splat(2.431035863e-1f);
  p = p * t + splat(2.823753309e-1f);
  p = p * t + splat(2.820864167e-1f);
  return p * t * vexp(-x * x);
}

}  // namespace
}  // namespace sapwood::SAPWOOD_ISA
