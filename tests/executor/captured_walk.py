"""Steps of a model with any cache groups, as captured and op by op, side by side.

Each pool of pages gives a request numbers of its own. A window pool gives so few of them that the
older entries of a table are pages which newer tokens have overwritten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.captured import CapturedSteps, capture_steps
from sapwood.executor.captured_memory import CapturePlan
from sapwood.executor.inputs import build_inputs
from sapwood.executor.rows import RowTable
from sapwood.kernels.interface import Kernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.memory.buffers import allocate_caches
from sapwood.schema.cache import CacheKind, pages_of_window, pools_of
from sapwood.schema.step import ScheduledTokens, StepPlan
from tests.executor.recording_capture import RecordingCapture
from tests.models.lm.cases import peer_of
from tests.models.lm.harness import make_decoder

PAGE, CONTEXT = 4, 48
MAX_PAGES = CONTEXT // PAGE
MOST_NEW = 12
CPU = torch.device("cpu")
RESTART = -1
"""In the place of a number of new tokens: the request ends, and another one gets its places."""

Caches = list[tuple[Tensor, ...]]


class Walk:
    """A model on two kernels, with requests in rows 0, 1, ... that grow step by step."""

    def __init__(
        self,
        case: str,
        kernels: Kernels,
        *,
        decode: tuple[int, ...] = (2, 4),
        prefill: tuple[int, ...] = (8, 40),
        num_rows: int = 4,
        recorder: RecordingCapture | None = None,
    ) -> None:
        peer = peer_of(case)
        self._num_rows = num_rows
        self.eager, self.captured = (
            make_decoder(peer.hf_config, peer.weights, one, context_length=CONTEXT)
            for one in (TorchKernels(), kernels)
        )
        config = self.captured.config
        self.groups = [
            group.with_dtypes(kv="float32", activations="float32") for group in config.cache_groups
        ]
        self._places, self._pools = CachePlaces(self.groups), pools_of(self.groups)
        rings = [
            MAX_PAGES if pool.window is None else pages_of_window(pool.window, MOST_NEW, PAGE)
            for pool in self._pools
        ]
        self._rings = [min(ring, MAX_PAGES) for ring in rings]
        self._sizes = [
            num_rows * (1 if pool.kind is CacheKind.STATE else ring)
            for pool, ring in zip(self._pools, self._rings, strict=True)
        ]
        self.captured_caches, self.eager_caches = (
            allocate_caches(
                self.groups, [size + 1 for size in self._sizes], page_size=PAGE, device=CPU
            )
            for _ in range(2)
        )
        plan = CapturePlan(
            decode=decode,
            prefill=prefill,
            max_pages=MAX_PAGES,
            page_size=PAGE,
            spares=self._places.spares(self._sizes),
            vocab_size=config.vocab_size,
            dtype=torch.float32,
            device=CPU,
            of_groups=self._places.of_groups,
            group_of_layer=self._places.group_of_layer,
            shares_pages=self._places.shares_pages,
        )
        self.recorder = recorder or RecordingCapture()
        self.steps: CapturedSteps = capture_steps(
            self.captured, kernels, self.captured_caches, plan, self.recorder
        )
        self.reset()

    def reset(self) -> None:
        """Begin anew, with caches full of NaN."""
        num_windows = sum(pool.window is not None for pool in self._pools)
        self._rows = RowTable(
            num_rows=self._num_rows, max_pages=MAX_PAGES, device=CPU, num_windows=num_windows
        )
        self._computed = [0] * self._num_rows
        self._number = 0
        for layer in (*self.captured_caches, *self.eager_caches):
            for tensor in layer:
                tensor.fill_(torch.nan)

    def step(self, news: Sequence[int]) -> bool | None:
        """New tokens of each row, 0 for none: whether the step was replayed, None for no step.

        Raises AssertionError if logits or caches differ."""
        entries = []
        for row, num_new in enumerate(news):
            if num_new == RESTART:
                self._computed[row] = 0
            num_new = min(num_new, CONTEXT - self._computed[row])
            if num_new > 0:
                entries.append(self._entry(row, num_new))
        if not entries:
            return None
        entries.sort(key=lambda one: one.num_new != 1)
        for entry in entries:
            self._rows.take_pages(entry)
        self._number += 1
        plan = StepPlan(step=self._number, starts=[], scheduled=entries)
        with torch.inference_mode():
            batch, eager = (
                build_inputs(
                    plan, self._rows, page_size=PAGE, kv_caches=caches, device=CPU,
                    places=self._places,
                ).batch
                for caches in (self.captured_caches, self.eager_caches)
            )  # fmt: skip
            expected = self.eager.compute(eager)
            got = self.steps.replay(batch)
            was_replayed = got is not None
            if got is None:
                got = self.captured.compute(batch)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return was_replayed

    def check_caches(self) -> None:
        """Nothing but the spare places, which come last, differs."""
        for mine, its in zip(self.captured_caches, self.eager_caches, strict=True):
            for one, other in zip(mine, its, strict=True):
                torch.testing.assert_close(
                    one[:-1], other[:-1], rtol=1e-4, atol=1e-4, equal_nan=True
                )

    def _entry(self, row: int, num_new: int) -> ScheduledTokens:
        position = self._computed[row]
        self._computed[row] += num_new
        first, end = position // PAGE, -(-self._computed[row] // PAGE)
        pages: list[int] = []
        windows: list[tuple[int, list[int]]] = []
        slot = -1
        for pool, ring, size in zip(self._pools, self._rings, self._sizes, strict=True):
            own = [row * ring + page % ring for page in range(first, end)]
            if pool.kind is CacheKind.STATE:
                slot = self._num_rows - 1 - row
            elif pool.window is not None:
                # Other numbers than those of the pool that keeps every token.
                windows.append((first, [size - 1 - page for page in own]))
            else:
                pages = own
        ids = [(7 * self._number + 11 * row + 5 * at) % 120 for at in range(num_new)]
        return ScheduledTokens(
            row=row, position=position, token_ids=ids, first_page=first, pages=pages,
            num_output=0, windows=windows, slot=slot,
        )  # fmt: skip
