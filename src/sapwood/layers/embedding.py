"""The token embedding and the output layer, with the vocabulary split over the ranks.

Each rank holds ceil(vocab / ranks) rows; the last rank may have fewer, and then zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels, PackedLinear
from sapwood.layers.linear import Linear
from sapwood.layers.quantization.dense import DENSE, check_range
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.targets import Target


class VocabEmbedding:
    """weight [this rank's vocab, hidden]"""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: of the vectors; weight_dtype: in which they are kept, if narrower."""
        self._kernels = kernels
        self._group = group
        self._dtype = dtype
        self._vocab_size = vocab_size
        size = rows_per_rank(vocab_size, group)
        self._first = group.rank * size
        self.weight = torch.empty(size, hidden_size, device=device, dtype=weight_dtype or dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] int64 -> [T, hidden], the same on every rank"""
        if self._group.size == 1:
            return self._kernels.embedding(token_ids, self.weight, self._dtype)
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = self._kernels.embedding(local.masked_fill(elsewhere, 0), self.weight, self._dtype)
        return self._group.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0.0))

    def targets(self) -> dict[str, Target]:
        def place(tensor: Tensor) -> None:
            own = vocab_rows(tensor, self.weight.shape[0], self._first)
            self.weight.copy_(own)
            check_range(self.weight, own)

        def place_blocks(weight: LinearPart) -> None:
            own = self.own_blocks(weight).dequantized(torch.float32)
            self.weight.copy_(own)
            check_range(self.weight, own)

        shape = (self._vocab_size, self.weight.shape[1])
        return {"weight": Target(shape, place, place_blocks)}

    def own_blocks(self, weight: LinearPart) -> LinearPart:
        """This rank's rows of the whole vocabulary's weight; zeros after the last token."""
        num_own = own_rows(self.weight.shape[0], self._vocab_size, self._first)
        return weight.rows(self._first, num_own).with_rows(self.weight.shape[0])


class LMHead:
    """The output layer: from hidden states to logits over the whole vocabulary.

    A layer that shares the weight of the embedding `tied` has only the target `tied_target`.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied: VocabEmbedding | None,
        kernels: Kernels,
        group: Group,
        device: torch.device,
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
    ) -> None:
        self._shape = (vocab_size, hidden_size)
        self._group = group
        self._size = rows_per_rank(vocab_size, group)
        self._first = group.rank * self._size
        self._tied = tied
        self._linear = Linear(
            hidden_size,
            (self._size,),
            bias=False,
            kernels=kernels,
            device=device,
            dtype=dtype,
            scheme=scheme,
            makes_logits=True,
            tied=tied is not None,
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab] in fp32, the same on every rank"""
        return self._group.all_gather(self._linear.packed.fp32(hidden))[:, : self._shape[0]]

    @property
    def packed(self) -> PackedLinear:
        """This rank's rows, packed by the kernels."""
        return self._linear.packed

    def targets(self) -> dict[str, Target]:
        if self._tied is not None:
            return {}
        storage = self._linear.storage

        def place(tensor: Tensor) -> None:
            storage.place(0, vocab_rows(tensor, self._size, self._first))

        def place_blocks(weight: LinearPart) -> None:
            num_own = own_rows(self._size, self._shape[0], self._first)
            storage.place_blocks(0, weight.rows(self._first, num_own).with_rows(self._size))

        blocks = place_blocks if storage.takes_blocks else None
        return {"weight": Target(self._shape, place, blocks)}

    def tied_target(self) -> Target:
        """The target of the shared weight: it fills the embedding and this layer, and packs this.

        Raises RuntimeError if the layer is not tied."""
        if self._tied is None:
            raise RuntimeError("this output layer has a weight of its own")
        tied, storage = self._tied, self._linear.storage
        target = tied.targets()["weight"]

        def place(tensor: Tensor) -> None:
            target.place(tensor)
            storage.share(tied.weight, None)
            self._linear.pack()

        def place_blocks(weight: LinearPart) -> None:
            assert target.place_blocks is not None
            target.place_blocks(weight)
            storage.share(tied.weight, tied.own_blocks(weight))
            self._linear.pack()

        return Target(target.shape, place, place_blocks)

    def pack(self) -> None:
        self._linear.pack()


def rows_per_rank(vocab_size: int, group: Group) -> int:
    return -(-vocab_size // group.size)


def own_rows(size: int, vocab_size: int, first: int) -> int:
    """How many of a rank's rows first .. first + size are in the vocabulary."""
    return max(0, min(size, vocab_size - first))


def vocab_rows(tensor: Tensor, size: int, first: int) -> Tensor:
    """Rows first .. first + size of the weight; zeros after the vocabulary's last token."""
    rows = tensor[first : first + size]
    return rows if rows.shape[0] == size else F.pad(rows, (0, 0, 0, size - rows.shape[0]))
