"""Schemes: how the weights of a converted checkpoint are stored. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.convert.options import ConvertOptions

GROUP_SIZES = (128, 64, 32)
"""Sizes of groups, tried in this order if the options do not name one."""
BLOCK = 128
"""Rows and columns of a weight, and inputs of an activation, that share a scale in fp8_block."""
PACKED_BITS = 32
E4M3_MAX, E2M1_MAX = 448.0, 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """How a weight [out, in] is stored.

    num_bits    bits of one weight
    numbers     "int", "e4m3", "e2m1" or "nf4"
    strategy    "channel": a scale per output; "group": a scale per output and group_size inputs,
                which is a power of two for E2M1; "tensor_group": like group, but with E4M3 scales
                and a scale of the whole tensor; "block": a scale per BLOCK x BLOCK weights
    group_size  inputs per scale; None: all
    symmetric   whether there are no zero points
    rounds_activations  whether layers round their inputs too, with a scale per token, or with
                "block" per token and BLOCK inputs
    layout      one of options.FORMATS
    """

    num_bits: int
    numbers: str = "int"
    strategy: str = "channel"
    group_size: int | None = None
    symmetric: bool = True
    rounds_activations: bool = True
    layout: str = "compressed-tensors"

    @property
    def is_float(self) -> bool:
        return self.numbers in ("e4m3", "e2m1")

    @property
    def is_e2m1(self) -> bool:
        return self.numbers == "e2m1"

    @property
    def lowest(self) -> float:
        return -float(2 ** (self.num_bits - 1)) if self.numbers == "int" else -self.highest

    @property
    def highest(self) -> float:
        limits = {"e4m3": E4M3_MAX, "e2m1": E2M1_MAX, "nf4": 1.0}
        return limits.get(self.numbers, float(2 ** (self.num_bits - 1) - 1))

    @property
    def lowest_zero(self) -> float:
        """GPTQ's files hold zero points less one."""
        return self.lowest + (1 if self.layout == "gptq" else 0)

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        num_rows, num_columns = shape
        if self.strategy == "block":
            return -(-num_rows // BLOCK), -(-num_columns // BLOCK)
        return num_rows, -(-num_columns // (self.group_size or num_columns))

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why the scheme cannot store a weight of that shape; None if it can."""
        num_rows, num_columns = shape
        if self.group_size is not None and self.strategy != "block":
            if num_columns % self.group_size:
                return f"its {num_columns} inputs are no multiple of the group's {self.group_size}"
            per_word = PACKED_BITS // self.num_bits
            if num_columns % per_word:
                return f"its {num_columns} inputs are no multiple of {per_word}, which one word has"
            # AWQ and GPTQ store zero points even where all are equal.
            rows_share_words = not self.symmetric or self.layout in ("awq", "gptq")
            if rows_share_words and num_rows % per_word:
                return f"its {num_rows} outputs are no multiple of {per_word} zero points of a word"
        if self.strategy == "block" and (num_rows % BLOCK or num_columns % BLOCK):
            return f"its sizes {num_rows} x {num_columns} are no multiples of {BLOCK}"
        return None


NVFP4 = WeightScheme(
    num_bits=4,
    numbers="e2m1",
    strategy="tensor_group",
    group_size=16,
    rounds_activations=False,
)
MXFP4 = WeightScheme(
    num_bits=4, numbers="e2m1", strategy="group", group_size=32, rounds_activations=False
)
NF4 = WeightScheme(
    num_bits=4,
    numbers="nf4",
    strategy="group",
    group_size=64,
    rounds_activations=False,
    layout="bitsandbytes",
)


def choose_scheme(options: ConvertOptions, in_sizes: Sequence[int]) -> WeightScheme:
    """The scheme that the options describe.

    in_sizes  inputs of all layers that will be converted
    """
    layout = options.layout
    match options.scheme:
        case "fp8":
            return WeightScheme(num_bits=8, numbers="e4m3")
        case "fp8_block":
            return WeightScheme(num_bits=8, numbers="e4m3", strategy="block", group_size=BLOCK)
        case "nvfp4":
            return NVFP4
        case "mxfp4":
            return MXFP4
        case "nf4":
            return NF4
    num_bits = 8 if options.scheme == "int8" else 4
    if not options.has_groups:
        rounds_activations = options.rounds_int8_inputs
        return WeightScheme(num_bits=num_bits, rounds_activations=rounds_activations, layout=layout)
    fitting = (size for size in GROUP_SIZES if not any(n % size for n in in_sizes))
    return WeightScheme(
        num_bits=num_bits,
        strategy="group",
        group_size=options.group_size or next(fitting, GROUP_SIZES[-1]),
        symmetric=not options.has_zeros,
        rounds_activations=False,
        layout=layout,
    )
