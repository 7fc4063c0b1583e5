"""Where an answer depends on its request alone on a GPU (--enable-deterministic-inference)."""

from __future__ import annotations

from sapwood.base.errors import ConfigError
from sapwood.models.config import DecoderConfig
from sapwood.models.encoder.config import EncoderConfig
from sapwood.models.foreign.structure import ForeignConfig
from sapwood.schema.cache import CacheKind
from sapwood.schema.config.engine import ResolvedConfig

_KEPT = frozenset({CacheKind.FULL, CacheKind.WINDOW})


def check_fixed_on_gpu(
    config: ResolvedConfig, shape: DecoderConfig | EncoderConfig, kernels: str, *, generates: bool
) -> None:
    """ConfigError, naming what stands against it, if a GPU's sums would depend on the batch."""
    device = config.execution.device
    if device == "cpu" or not config.execution.enable_deterministic_inference:
        return
    reasons = []
    if kernels != "triton":
        reasons.append(f"kernels {kernels} choose their sums by the batch (--kernels triton)")
    if not isinstance(shape, DecoderConfig) or not generates:
        reasons.append("embedding models compute with torch's products")
    elif isinstance(shape, ForeignConfig):
        reasons.append("the layers of the transformers library compute")
    elif others := {group.kind for group in shape.cache_groups} - _KEPT:
        kinds = " and ".join(sorted(kind.value for kind in others))
        reasons.append(f"layers with a {kinds} cache choose their sums by the step")
    if config.parallel.num_ranks > 1:
        reasons.append("ranks add their parts in an order that depends on how large these are")
    if config.speculation.speculative_algorithm is not None:
        reasons.append("drafts in a tree lie elsewhere than the tokens that they guess")
    if reasons:
        raise ConfigError(
            f"--enable-deterministic-inference does not hold on {device}: {'; '.join(reasons)}. "
            "Leave it out, or what stands against it"
        )
