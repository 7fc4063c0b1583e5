"""Tile sizes of the attention kernels and numbers of splits: a table, nothing is tuned at run time.

Chosen for the H200: 132 multiprocessors with 65,536 registers and 228 KiB of shared memory each,
227 KiB at most for one program. The loop over keys is pipelined by Triton: page ids are fetched
first, keys and values of the page then, so that half of `num_stages` are spent on page ids. 5 leave

    keys and values of 2 blocks in shared memory where programs have 16 or 32 rows (mma.sync),
    of 3 blocks where they have more (wgmma, which reads shared memory while the next block comes):

    2 or 3 * 2 * block_n * block_d * bytes per entry

    16 bits, head size 64:    2 * 2 * 128 *  64 * 2 =  64 KiB    3 * 2 * 64 *  64 * 2 =  48 KiB
             head size 128:   2 * 2 *  64 * 128 * 2 =  64 KiB    3 * 2 * 64 * 128 * 2 =  96 KiB
             head size 256:   2 * 2 *  32 * 256 * 2 =  64 KiB    3 * 2 * 32 * 256 * 2 =  96 KiB
    32 bits, head size 256:   2 * 2 *  16 * 256 * 4 =  64 KiB

and the queries, block_m * block_d, are added: 64 KiB at 128 rows of 256 entries. Three decode
programs fit on a multiprocessor, with 32 KiB each on their way at least: 4.8 TB/s at 700 ns of
latency need 25 KiB per multiprocessor. Wide tiles are one program per multiprocessor, by their
registers (190 to 227 per thread, 8 warps). A test compiles the kernels for the H200 and compares
what they take with its limits.

Head sizes that are no power of two are padded to one in registers and shared memory, not in what is
read: 80 and 96 multiply 128 entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_HEAD_DIM = 256
MAX_GROUP = 128
"""Query heads per key and value head: the rows of the largest tile."""

_LEAST_ROWS = 16
"""Rows of the smallest matrix product."""

_MULTIPROCESSORS = 132


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSizes:
    """Constants of one launch.

    block_m     rows: (token, query head) pairs
    block_n     keys per step of the loop
    block_d     the head size, padded to a power of two
    num_warps   of 32 threads
    num_stages  depth of the pipeline; see above
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def tokens(self, group: int) -> int:
        """Tokens of a tile, if each is `group` rows."""
        return self.block_m // group


def tile_sizes(num_tokens: int, group: int, head_dim: int, dtype: torch.dtype) -> TileSizes:
    """Sizes for tiles of one to `num_tokens` tokens, each of `group` rows.

    A tile may hold fewer tokens than that; then they take more tiles.
    """
    block_d = max(16, next_power_of_2(head_dim))
    block_m = max(_LEAST_ROWS, next_power_of_2(num_tokens * group))
    if dtype == torch.float32:
        # Without matrix units: what a thread multiplies must fit in its registers.
        block_m = min(block_m, max(32, next_power_of_2(group)))
        block_n, num_warps = 16, 8
    else:
        block_m = min(block_m, MAX_GROUP)
        keys_of_few_rows = 128 if block_m <= 32 else 64
        block_n = {256: 32, 128: 64}.get(block_d, keys_of_few_rows)
        num_warps = 8 if block_m == 128 else 4
    return TileSizes(
        block_m=block_m, block_n=block_n, block_d=block_d, num_warps=num_warps, num_stages=5
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRule:
    """Into how many parts a kernel cuts the keys of a request.

    programs   number of programs that are wanted, as far as there are keys for them
    min_chunk  keys of a part at least: each part costs a write, a read and a place in the merge
    max_chunk  keys of a part at most, so that one long request does not hold up a batch of short
               requests; None: no limit
    """

    programs: int
    min_chunk: int
    max_chunk: int | None = None

    def num_splits(self, num_tiles: int, max_keys: int) -> int:
        """For `num_tiles` programs without splits, of requests that may have `max_keys` keys.

        Both are bounds that do not change within a captured graph; where a request's keys begin and
        end is read on the device, and splits that are left over end at once."""
        splits = max(1, self.programs // num_tiles)
        if self.max_chunk is not None:
            splits = max(splits, -(-max_keys // self.max_chunk))
        return max(1, min(splits, -(-max_keys // self.min_chunk)))


DECODE = SplitRule(programs=4 * _MULTIPROCESSORS, min_chunk=128, max_chunk=8192)
EXTEND = SplitRule(programs=_MULTIPROCESSORS, min_chunk=512)
SHARED = SplitRule(programs=2 * _MULTIPROCESSORS, min_chunk=256)
FIXED_CHUNK = 2048
"""Keys of a chunk where chunks are fixed: a decode of 128k keys has 64 parts per query head."""
_FIXED_ROWS = 64


def fixed_sizes(group: int, head_dim: int, dtype: torch.dtype) -> TileSizes:
    """Sizes for tiles of any number of tokens, each of `group` rows."""
    return tile_sizes(max(1, _FIXED_ROWS // group), group, head_dim, dtype)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
