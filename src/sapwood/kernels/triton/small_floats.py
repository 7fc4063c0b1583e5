"""Numbers of 8 bits and less, decoded and rounded by whole-number arithmetic.

The hardware's own conversions are not used: GPUs before compute capability 8.9 have none for E4M3,
and Triton's interpreter loses a carry. A format is MANTISSA bits and the BIAS of its exponents, as
in E4M3 (3, 7), E5M2 (2, 15) and E2M1 (1, 1); fp32 has 23 and 127."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_2(EXPONENT: tl.constexpr):
    """fp32, exact."""
    bits = tl.full((), EXPONENT + 127, tl.int32) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode(code, BITS: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The fp32 values of codes (int32, with the sign in the highest of BITS).

    The codes of NaN and infinities get the numbers that would come next. Exponent and mantissa are
    moved to their places in fp32; then the difference of the biases is multiplied in, which is
    right for subnormal numbers too.
    """
    sign: tl.constexpr = 1 << (BITS - 1)
    wide = (code & (sign - 1)) << (23 - MANTISSA)
    wide |= (code & sign) << (32 - BITS)
    return wide.to(tl.float32, bitcast=True) * power_of_2(127 - BIAS)


@triton.jit
def encode(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """x fp32 -> codes of 8 bits (int32), rounded half to even. x must be in the format's range; NaN
    becomes NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    dropped: tl.constexpr = 23 - MANTISSA
    half = (1 << (dropped - 1)) - 1 + ((size >> dropped) & 1)
    normal = ((size + half) >> dropped) - ((127 - BIAS) << MANTISSA)
    # Subnormal numbers are multiples of one step, which a sum with this number has as its last bit.
    step_up = power_of_2(23 + 1 - BIAS - MANTISSA)
    summed = size.to(tl.float32, bitcast=True) + step_up
    subnormal = summed.to(tl.int32, bitcast=True) - step_up.to(tl.int32, bitcast=True)
    is_normal = size >= ((127 + 1 - BIAS) << 23)
    code = tl.minimum(tl.where(is_normal, normal, subnormal), 127)
    return code | ((bits >> 24) & 128)
