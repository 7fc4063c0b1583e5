"""Self-attention with rotary positions over the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.interface import PLAIN, AttentionTraits
from sapwood.kernels.recording import Attend, Buffer, CannotRecord, Program, RotateAndWrite
from sapwood.layers.build import Build
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.linear import ColumnParallelLinear, Part, RowParallelLinear, divide, even_part
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Slice, Target, prefixed, whole

RMSNormMaker = Callable[[int], RMSNorm]
"""From a size to a norm without weights."""


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

    def qkv_parts(
        self, group: Group, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    ) -> tuple[Part, Part, Part]:
        """This rank's q, k and v in the fused projection; `names`: theirs in the checkpoint."""
        self.num_heads_of(group)
        num_kv_heads = self.num_kv_heads_of(group)
        first = group.rank * self.num_kv_heads // group.size
        whole_size = self.num_kv_heads * self.head_dim
        k, v = (
            Part(name, whole_size, first * self.head_dim, num_kv_heads * self.head_dim)
            for name in names[1:]
        )
        return even_part(names[0], self.num_heads * self.head_dim, group), k, v


class Attention:
    """o(attention(rope(qk_norm(qkv(x))))) for one layer of a decoder."""

    def __init__(
        self,
        build: Build,
        layer: int,
        hidden_size: int,
        heads: HeadLayout,
        *,
        cos_sin: Tensor,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: RMSNormMaker | None = None,
        norms_all_heads: bool = False,
        eps: float = 1e-6,
        scale: float | None = None,
        traits: AttentionTraits = PLAIN,
        sinks: bool = False,
        o_name: str = "o_proj",
    ) -> None:
        """An attention layer.

        layer    index of the layer, which picks its KV cache
        cos_sin  table of cosines and sines (layers/rotary)
        qk_norm  makes the norms of queries and keys before their rotation; None: there are none
        norms_all_heads  whether these are over all heads at once; else over each head
        eps      of norms over each head
        scale    factor of the scores; None: head_dim ** -0.5
        traits   what its attention does beyond scores, causal mask and softmax
        sinks    whether the checkpoint has sinks (AttentionTraits), one per query head
        o_name   name of the output projection in the checkpoint
        """
        group = build.groups.attention
        self._layer = layer
        self._num_heads = heads.num_heads_of(group)
        self._num_kv_heads = heads.num_kv_heads_of(group)
        self._head_dim = heads.head_dim
        self._eps = eps
        self._cos_sin = cos_sin
        self._kernels = build.kernels
        self._scale = heads.head_dim**-0.5 if scale is None else scale
        self._sinks: Tensor | None = None
        if sinks:
            self._sinks = torch.empty(self._num_heads, dtype=torch.float32, device=build.device)
            traits = replace(traits, sinks=self._sinks)
        self._first_head = group.rank * self._num_heads
        self._whole_heads = heads.num_heads
        self._traits = traits
        self._qkv = ColumnParallelLinear(build, hidden_size, heads.qkv_parts(group), bias=qkv_bias)
        self._o = RowParallelLinear(
            build,
            o_name,
            heads.num_heads * heads.head_dim,
            hidden_size,
            bias=o_bias,
            group=group,
        )
        if norms_all_heads and group.size > 1:
            raise ConfigError(
                "norms over all heads cannot be split over ranks; leave --tp-size at 1"
            )
        self._norms_all_heads = norms_all_heads
        self._norms: dict[str, RMSNorm] = {}
        if qk_norm is not None:
            counts = {"q_norm": self._num_heads, "k_norm": self._num_kv_heads}
            self._norms = {
                name: qk_norm(heads.head_dim * (count if norms_all_heads else 1))
                for name, count in counts.items()
            }
        self._q_norm, self._k_norm = (
            None if norms_all_heads or qk_norm is None else self._norms[name].weight
            for name in ("q_norm", "k_norm")
        )

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the new tokens' keys and values to the cache"""
        return self._o(self._attend(x, batch))

    def steps(self, x: Tensor, batch: ForwardBatch) -> Generator[Tensor, None, Tensor]:
        """As Mixer.steps."""
        yield x
        attended = self._attend(x, batch)
        yield attended
        return self._o(attended)

    def _attend(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, hidden] -> the inputs [T, heads * head_dim] of the output projection; writes the
        new tokens' keys and values to the cache"""
        qkv = self._qkv(x)
        if self._norms_all_heads:
            qkv = self._normed(qkv)
        key_cache, value_cache = batch.kv_caches[self._layer]
        inputs = batch.inputs_of(self._layer)
        q = self._kernels.qk_norm_rope_write_kv(
            qkv,
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

    def _normed(self, qkv: Tensor) -> Tensor:
        """The same with norms over all heads of q, and over all heads of k."""
        q_size, kv_size = (n * self._head_dim for n in (self._num_heads, self._num_kv_heads))
        q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
        q, k = (self._norms[name](x.contiguous()) for name, x in (("q_norm", q), ("k_norm", k)))
        return torch.cat((q, k, v), dim=-1)

    def targets(self) -> dict[str, Target]:
        found = self._qkv.targets() | self._o.targets()
        for name, norm in self._norms.items():
            found |= prefixed(name, norm.targets())
        if self._sinks is not None:
            own = Slice.unless_whole(0, self._first_head, self._num_heads, self._whole_heads)
            found["sinks"] = Target((self._whole_heads,), whole(self._sinks).put, part=own)
        return found

    def pack(self) -> None:
        self._qkv.linear.pack()
        self._o.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As Mixer.record."""
        if self._norms_all_heads:
            raise CannotRecord("a recorded step has no norms over all heads")
        qkv = self._qkv.record(program, x)
        width = self._num_heads * self._head_dim
        q, attended = program.buffer(width), program.buffer(width)
        program.add(
            RotateAndWrite(
                x=qkv,
                layer=self._layer,
                num_heads=self._num_heads,
                num_kv_heads=self._num_kv_heads,
                head_dim=self._head_dim,
                q_norm=self._q_norm,
                k_norm=self._k_norm,
                eps=self._eps,
                cos_sin=self._cos_sin,
                out=q,
            )
        )
        program.add(
            Attend(
                x=q,
                layer=self._layer,
                num_heads=self._num_heads,
                num_kv_heads=self._num_kv_heads,
                head_dim=self._head_dim,
                scale=self._scale,
                traits=self._traits,
                out=attended,
            )
        )
        return self._o.record(program, attended)
