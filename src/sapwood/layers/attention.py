"""Self-attention with rotary positions over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.interface import PLAIN, AttentionTraits, Kernels, PackedLinear, lacking
from sapwood.kernels.recording import CannotRecord
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import ColumnParallelLinear, Part, RowParallelLinear, divide, even_part
from sapwood.layers.norm import RMSNorm
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.targets import Target, prefixed


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayout:
    """The heads of the whole model.

    num_heads     query heads
    num_kv_heads  key and value heads; num_heads is a multiple of this number
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def num_heads_of(self, group: Group) -> int:
        """Query heads of one rank; ConfigError if the ranks cannot have equally many."""
        return divide(self.num_heads, group, f"{self.num_heads} attention heads")

    def num_kv_heads_of(self, group: Group) -> int:
        """Key and value heads of one rank; several ranks share a head if there are more ranks.

        Raises ConfigError if the ranks cannot have equally many."""
        if self.num_kv_heads >= group.size:
            return divide(self.num_kv_heads, group, f"{self.num_kv_heads} key and value heads")
        if group.size % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_kv_heads} key and value heads cannot be shared evenly by {group.size} "
                f"ranks; choose a --tp-size that is a multiple or a divisor of {self.num_kv_heads}"
            )
        return 1

    def qkv_parts(self, group: Group) -> tuple[Part, Part, Part]:
        """This rank's q, k and v in the fused projection."""
        self.num_heads_of(group)
        num_kv_heads = self.num_kv_heads_of(group)
        first = group.rank * self.num_kv_heads // group.size
        whole_size = self.num_kv_heads * self.head_dim
        k, v = (
            Part(name, whole_size, first * self.head_dim, num_kv_heads * self.head_dim)
            for name in ("k_proj", "v_proj")
        )
        return even_part("q_proj", self.num_heads * self.head_dim, group), k, v


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParts:
    """One rank's part of an attention layer; shapes as in kernels/recording.DecoderParts."""

    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear
    num_heads: int
    num_kv_heads: int
    scale: float
    cos_sin: Tensor


class Attention:
    """o(attention(rope(qk_norm(qkv(x))))) for one layer of a decoder."""

    def __init__(
        self,
        layer: int,
        hidden_size: int,
        heads: HeadLayout,
        *,
        qkv_bias: bool,
        o_bias: bool,
        qk_norm: bool,
        eps: float,
        cos_sin: Tensor,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
        traits: AttentionTraits = PLAIN,
    ) -> None:
        """An attention layer.

        layer    index of the layer, which picks its KV cache
        cos_sin  the model's table of cosines and sines (layers/rotary)
        traits   what its attention does beyond scores, causal mask and softmax
        """
        self._layer = layer
        self._num_heads = heads.num_heads_of(group)
        self._num_kv_heads = heads.num_kv_heads_of(group)
        self._head_dim = heads.head_dim
        self._eps = eps
        self._cos_sin = cos_sin
        self._kernels = kernels
        self._scale = heads.head_dim**-0.5
        self._traits = traits
        self._qkv = ColumnParallelLinear(
            hidden_size,
            heads.qkv_parts(group),
            bias=qkv_bias,
            kernels=kernels,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )
        self._o = RowParallelLinear(
            "o_proj",
            heads.num_heads * heads.head_dim,
            hidden_size,
            bias=o_bias,
            kernels=kernels,
            group=group,
            device=device,
            dtype=dtype,
            scheme=scheme,
        )
        self._norms = {
            name: RMSNorm(heads.head_dim, eps=eps, kernels=kernels, device=device, dtype=dtype)
            for name in (("q_norm", "k_norm") if qk_norm else ())
        }
        self._q_norm = self._norms["q_norm"].weight if qk_norm else None
        self._k_norm = self._norms["k_norm"].weight if qk_norm else None

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the new tokens' keys and values to the cache"""
        return self.project(self.attend(x, batch))

    def attend(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> the inputs [T, heads * head_dim] of the output projection; writes the
        new tokens' keys and values to the cache"""
        key_cache, value_cache = batch.kv_caches[self._layer]
        inputs = batch.inputs_of(self._layer)
        q = self._kernels.qk_norm_rope_write_kv(
            self._qkv(x),
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            eps=self._eps,
            cos_sin=self._cos_sin,
            positions=batch.positions,
            key_cache=key_cache,
            value_cache=value_cache,
            write_index=inputs.write_index,
        )
        attend = batch.attend or self._kernels.paged_attention
        out = attend(q, key_cache, value_cache, inputs.attention, self._scale, self._traits)
        return out.view(x.shape[0], self._num_heads * self._head_dim)

    def project(self, attended: Tensor) -> Tensor:
        """attended [T, heads * head_dim] -> [T, hidden]"""
        return self._o(attended)

    def targets(self) -> dict[str, Target]:
        found = self._qkv.targets() | self._o.targets()
        for name, norm in self._norms.items():
            found |= prefixed(name, norm.targets())
        return found

    def pack(self) -> None:
        self._qkv.linear.pack()
        self._o.linear.pack()

    def parts(self) -> AttentionParts:
        """This rank's parts of the layer; RuntimeError before `pack`, CannotRecord if its attention
        is not plain."""
        if reason := lacking(self._traits.features):
            raise CannotRecord(f"in a recorded step, {reason}")
        return AttentionParts(
            qkv=self._qkv.linear.packed,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            o=self._o.linear.packed,
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            scale=self._scale,
            cos_sin=self._cos_sin,
        )
