"""Each cache group finds its own pages and states."""

from __future__ import annotations

import torch

from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.inputs import build_inputs
from sapwood.executor.rows import RowTable
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.memory.buffers import allocate_caches
from sapwood.schema.cache import (
    CacheGroup,
    CacheKind,
    CacheTensor,
    keys_and_values,
    pools_of,
    shifted,
)
from sapwood.schema.step import ScheduledTokens, StepPlan

CPU = torch.device("cpu")
PAGE = 4
FULL = keys_and_values([0, 3], num_kv_heads=1, head_dim=8, dtype="float32")
WINDOW = keys_and_values([1], num_kv_heads=1, head_dim=8, window=6, dtype="float32")
LONGER = keys_and_values([4], num_kv_heads=1, head_dim=8, window=9, dtype="float32")
STATE = CacheGroup(
    kind=CacheKind.STATE, layers=(2,), tensors={"state": CacheTensor((3,), "float32")}
)


def batch_of(groups: list[CacheGroup], scheduled: list[ScheduledTokens]) -> ForwardBatch:
    num_windows = sum(group.window is not None for group in groups)
    rows = RowTable(num_rows=4, max_pages=8, device=CPU, num_windows=num_windows)
    for entry in scheduled:
        rows.take_pages(entry)
    plan = StepPlan(step=0, starts=[], scheduled=scheduled)
    places = CachePlaces(groups)
    return build_inputs(plan, rows, page_size=PAGE, kv_caches=(), device=CPU, places=places).batch


def entry(row: int, position: int, num_new: int, **fields: object) -> ScheduledTokens:
    values = {"first_page": 0, "pages": [], "num_output": None} | fields
    return ScheduledTokens(row=row, position=position, token_ids=[0] * num_new, **values)


def test_every_layer_has_the_table_of_its_pool() -> None:
    batch = batch_of(
        [FULL, WINDOW, STATE, LONGER],
        [
            entry(2, 9, 1, pages=[5, 6, 7], windows=[(1, [30, 31]), (0, [40, 41, 42])], slot=3),
            entry(0, 0, 2, pages=[1], windows=[(0, [33]), (0, [44])], slot=1),
        ],
    )
    full, window, longer = (batch.inputs_of(layer) for layer in (0, 1, 4))
    assert batch.inputs_of(3) is full
    assert full.write_index.tolist() == [7 * PAGE + 1, PAGE, PAGE + 1]
    assert window.write_index.tolist() == [31 * PAGE + 1, 33 * PAGE, 33 * PAGE + 1]
    assert longer.write_index.tolist() == [42 * PAGE + 1, 44 * PAGE, 44 * PAGE + 1]
    assert full.attention.page_table.tolist() == [[5, 6, 7], [1, 0, 0]]
    assert window.attention.page_table.tolist() == [[0, 30, 31], [33, 0, 0]]
    assert longer.attention.page_table.tolist() == [[40, 41, 42], [44, 0, 0]]
    assert window.attention.context_lens == full.attention.context_lens == (10, 2)
    assert window.attention.host_page_table is None, "old pages are shared by nobody"
    assert batch.inputs_of(2).slots.tolist() == [3, 1]


def test_a_model_whose_layers_are_alike_has_one_table() -> None:
    scheduled = [entry(0, 0, 2, pages=[1], windows=[(0, [3])])]
    for group, page in ((FULL, 1), (WINDOW, 3)):
        batch = batch_of([group], scheduled if group is WINDOW else [entry(0, 0, 2, pages=[1])])
        assert batch.groups == ()
        assert batch.inputs_of(group.layers[0]) is batch
        assert batch.write_index.tolist() == [page * PAGE, page * PAGE + 1]
        assert (batch.attention.host_page_table is None) == (group is WINDOW)


def test_a_model_of_states_alone_has_slots() -> None:
    only = CacheGroup(kind=CacheKind.STATE, layers=(0,), tensors=STATE.tensors)
    batch = batch_of([only], [entry(1, 4, 1, slot=2), entry(3, 0, 3, slot=0)])
    assert batch.inputs_of(0).slots.tolist() == [2, 0]
    assert batch.inputs_of(0).attention.query_lens == (1, 3)


def test_the_copies_of_a_plan_happen_at_once() -> None:
    groups = [CacheGroup(kind=CacheKind.STATE, layers=(0, 1), tensors=STATE.tensors)]
    caches = allocate_caches(groups, [4], page_size=PAGE, device=CPU)
    for layer, (states,) in enumerate(caches):
        states[:] = torch.arange(4.0)[:, None] + 10 * layer
    swapped = [entry(0, 4, 1, copies=[(0, 1), (1, 2)]), entry(1, 4, 1, copies=[(2, 0)])]
    CachePlaces(groups).copy_states(swapped, caches, CPU)
    assert [states[:, 0].tolist() for (states,) in caches] == [[2, 0, 1, 3], [12, 10, 11, 13]]


def test_two_models_share_the_tables_of_all_pools() -> None:
    """A draft model whose windows are the second pool of windows finds its own table."""
    model = (keys_and_values([0], num_kv_heads=1, head_dim=8, window=8),)
    draft = (
        keys_and_values([0], num_kv_heads=1, head_dim=8, window=16),
        keys_and_values([1], num_kv_heads=1, head_dim=8, window=8),
    )
    pools = pools_of((*model, *shifted(draft, 1)))
    assert [pool.window for pool in pools] == [8, 16]
    rows = RowTable(num_rows=1, max_pages=4, device=CPU, num_windows=2)
    of_model, of_draft = (CachePlaces(groups, pools=pools) for groups in (model, draft))
    assert of_model.is_window_first
    assert of_draft.is_window_first
    assert of_model.first_table(rows) is rows.window_tables[0]
    assert of_draft.first_table(rows) is rows.window_tables[0]
    assert CachePlaces(draft[:1], pools=pools).first_table(rows) is rows.window_tables[1]
