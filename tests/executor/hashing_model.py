"""A pretend decoder over real pages: its logits are a hash of the context that it reads there.

Writing a token's KV stores the token's id. A wrong page, position or token therefore changes every
logit that follows it, and is noticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.recording import CannotRecord, Program
from sapwood.layers.forward_batch import ForwardBatch

VOCAB = 24
_TABLE = torch.randn(997, VOCAB, generator=torch.Generator().manual_seed(5)) * 2


class HashingModel:
    def forward(self, batch: ForwardBatch) -> Tensor:
        """[T, 1]: which row of the table each token's logits are."""
        [(keys, _)] = batch.kv_caches
        page_size = keys.shape[2]
        stored = keys.view(-1)
        stored[batch.write_index] = batch.token_ids.to(stored.dtype)
        attention = batch.attention
        found: list[int] = []
        for table, num_new, length in zip(
            attention.page_table.tolist(), attention.query_lens, attention.context_lens, strict=True
        ):
            digests, digest = [], 1
            for position in range(length):
                page, offset = divmod(position, page_size)
                token = int(stored[table[page] * page_size + offset])
                assert token >= 0, "read KV that was never written"
                digest = (digest * 31 + token + 7) % 1_000_003
                digests.append(digest % len(_TABLE))
            found += digests[length - num_new :]
        return torch.tensor(found)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return _TABLE[hidden[:, 0]].clone()

    def compute(self, batch: ForwardBatch) -> Tensor:
        return self.logits(self.forward(batch).index_select(0, batch.logits_index))

    def program(self) -> Program:
        raise CannotRecord("it is pretended")


def make_pages(num_pages: int, page_size: int) -> list[tuple[Tensor, Tensor]]:
    """The KV cache of its one layer, nothing written."""
    shape = (num_pages, 1, page_size, 1)
    return [(torch.full(shape, -1.0), torch.zeros(shape))]
