"""Options of a conversion. No torch, so that the command line starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

SCHEMES = ("int8", "fp8", "fp8_block", "int4", "nvfp4", "mxfp4", "nf4")
FORMATS: Mapping[str, tuple[str, ...]] = {
    "compressed-tensors": ("int8", "fp8", "fp8_block", "int4", "nvfp4", "mxfp4"),
    "awq": ("int4",),
    "gptq": ("int4", "int8"),
    "bitsandbytes": ("nf4", "int8"),
}
"""Layouts on disk, and the schemes that each layout can store."""
METHODS = ("nearest", "gptq")

DEFAULT_CALIBRATION_TOKENS = 16384
DEFAULT_TEXT_TOKENS = 8192
DEFAULT_DAMPING = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """The options of a conversion and of its measurements."""

    scheme: str = option(
        "int8",
        "Numbers of the weights: int8 and fp8, one scale per output, with activations rounded per "
        "token; fp8_block, a scale per 128x128 weights; int4, a scale per group of inputs; nvfp4, "
        "E2M1, per 16; mxfp4, E2M1, a power of two per 32; nf4, per 64; these four with "
        "activations as they are.",
        choices=SCHEMES,
    )
    format: str | None = option(
        None,
        "How files hold them: as compressed-tensors does; as AutoAWQ does (int4); as GPTQModel "
        "does (int4, and int8 with activations as they are); as bitsandbytes does (nf4, and int8 "
        "with activations as they are); default: bitsandbytes for nf4, else compressed-tensors.",
        choices=tuple(FORMATS),
    )
    method: str | None = option(
        None,
        "How weights are rounded: nearest, each for itself; gptq, so that the layer's outputs for "
        "a calibration text change least; default: gptq.",
        choices=METHODS,
    )
    fast: bool = option(
        False,
        "Need no calibration text, and take seconds: round each weight for itself, as --method "
        "nearest --no-rescale does, and measure no perplexity unless --num-text-tokens or "
        "--text-file is given. Costs accuracy, in few bits most: docs/convert.md has the numbers.",
    )
    rescale: bool | None = option(
        None,
        "Move factors from the layers' inputs into their weights before rounding, as SmoothQuant "
        "and AWQ do; default: on for int8 with activations that are rounded.",
    )
    group_size: int | None = option(
        None,
        "Inputs per scale of int4, and of int8 as GPTQModel has it; default: the largest of 128, "
        "64 and 32 that fits all layers.",
        unit="inputs",
    )
    asymmetric: bool | None = option(
        None, "Give each such group a zero point of its own; default: on for awq."
    )
    act_order: bool | None = option(
        None, "Let gptq round the inputs with the largest activations first; default: on."
    )
    damping: float | None = option(
        None,
        f"Share of the mean diagonal that gptq adds to its Hessian; default: {DEFAULT_DAMPING:g}.",
    )
    calibration_file: str | None = option(
        None,
        "Calibration text, UTF-8; default: docstrings of the packages in Python's standard "
        "library.",
    )
    calibration_tokens: int | None = option(
        None,
        f"Tokens of that text to use at most; default: {DEFAULT_CALIBRATION_TOKENS}.",
        unit="tokens",
    )
    text_file: str | None = option(
        None,
        "Text to measure perplexity with, UTF-8; default: docstrings of the modules at the top of "
        "Python's standard library, as `sapwood bench perplexity` has it.",
    )
    num_text_tokens: int | None = option(
        None,
        "Tokens of the text to score at most; 0: measure nothing; default: "
        f"{DEFAULT_TEXT_TOKENS}, with --fast 0.",
        unit="tokens",
    )
    window: int = option(
        1024, "Tokens that both texts are cut into, each on its own context.", unit="tokens"
    )
    max_shard_size: float = option(5.0, "Size of one weight file at most.", unit="GB")

    def __post_init__(self) -> None:
        check_options(self)
        if self.scheme not in FORMATS[self.layout]:
            fitting = " or ".join(name for name, held in FORMATS.items() if self.scheme in held)
            raise ConfigError(
                f"--format {self.layout} cannot hold --scheme {self.scheme}, which {fitting} can; "
                f"it holds {' and '.join(FORMATS[self.layout])}"
            )
        if not self.has_groups and (self.group_size is not None or self.asymmetric is not None):
            raise ConfigError(
                "--group-size and --asymmetric are for --scheme int4 and for --format gptq, not "
                f"for {self.scheme} in {self.layout}"
            )
        self._check_calibration()
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(f"--group-size is {self.group_size} but must be >= 1")
        if self.damping is not None and not 0 < self.damping <= 1:
            raise ConfigError(f"--damping is {self.damping} but must be above 0 and at most 1")
        if self.window < 2:
            raise ConfigError(f"--window is {self.window} but must be >= 2")
        for flag, value in (
            ("--num-text-tokens", self.scored_tokens or self.window),
            ("--calibration-tokens", self.calibration_tokens or self.window),
        ):
            if value < self.window:
                raise ConfigError(
                    f"{flag} is {value} but must be at least one --window ({self.window})"
                )
        if not self.max_shard_size > 0:
            raise ConfigError(f"--max-shard-size is {self.max_shard_size} but must be above 0")

    @property
    def layout(self) -> str:
        """One of FORMATS."""
        return self.format or ("bitsandbytes" if self.scheme == "nf4" else "compressed-tensors")

    @property
    def has_groups(self) -> bool:
        """Whether the scheme has groups of whole numbers, whose size can be chosen."""
        return self.scheme == "int4" or self.layout == "gptq"

    @property
    def has_zeros(self) -> bool:
        return self.layout == "awq" if self.asymmetric is None else self.asymmetric

    @property
    def rounds_int8_inputs(self) -> bool:
        return self.scheme == "int8" and self.layout == "compressed-tensors"

    @property
    def rounding(self) -> str:
        """ "nearest" or "gptq"."""
        return self.method or ("nearest" if self.fast else "gptq")

    @property
    def rescales(self) -> bool:
        if self.rescale is None:
            return self.rounds_int8_inputs and not self.fast
        return self.rescale

    @property
    def scored_tokens(self) -> int:
        """Tokens to measure perplexity with at most; 0: nothing is measured."""
        if self.num_text_tokens is None:
            return 0 if self.fast and self.text_file is None else DEFAULT_TEXT_TOKENS
        return self.num_text_tokens

    @property
    def needs_calibration(self) -> bool:
        return self.rounding == "gptq" or self.rescales

    def _check_calibration(self) -> None:
        if self.fast and self.needs_calibration:
            flag = "--method gptq" if self.method == "gptq" else "--rescale"
            raise ConfigError(
                f"--fast uses no calibration text, which {flag} needs; leave one of them out"
            )
        if self.rounding != "gptq":
            for flag, value in (("--act-order", self.act_order), ("--damping", self.damping)):
                if value is not None:
                    raise ConfigError(
                        f"{flag} is an option of gptq, and this conversion rounds to the nearest; "
                        "leave one of them out"
                    )
        given = self.calibration_file is not None or self.calibration_tokens is not None
        if given and not self.needs_calibration:
            raise ConfigError(
                f"--scheme {self.scheme} with --method nearest and without --rescale uses no "
                "calibration text; leave the text out, or change one of them"
            )
