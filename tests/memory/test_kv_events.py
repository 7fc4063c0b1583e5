import hashlib
from functools import partial

from sapwood.engine.request_state import adapter_in
from sapwood.memory.eviction import EVICTION_POLICIES
from sapwood.memory.kv_events import KVEventSource
from sapwood.memory.namespace import MEDIUM, Branch
from sapwood.memory.prefix_tree import PrefixTree, token_key
from sapwood.schema.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent
from tests.memory.event_follower import names_of

PAGE = 2


def make_tree() -> tuple[PrefixTree, list[KVEvent]]:
    told: list[KVEvent] = []
    source = KVEventSource(told.append, 0, partial(adapter_in, has_lengths=False))
    return PrefixTree(PAGE, EVICTION_POLICIES["lru"], listener=source), told


def keep(tree, namespace, tokens, pages):
    return tree.insert(namespace, token_key(tokens), pages)[0]


def test_one_event_for_each_page_with_sglangs_hashes() -> None:
    tree, told = make_tree()
    keep(tree, "", [1, 2, 3, 4], [10, 11])
    first = hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0]))
    second = hashlib.sha256(first.digest() + bytes([3, 0, 0, 0, 4, 0, 0, 0]))
    names = [int(one.hexdigest()[:16], 16) for one in (first, second)]
    names = [name - 2**64 if name >= 2**63 else name for name in names]
    assert told == [
        BlockStored([names[0]], None, [1, 2], 2, None, "GPU"),
        BlockStored([names[1]], names[0], [3, 4], 2, None, "GPU"),
    ]


def test_only_what_is_new_is_told_and_a_split_is_not() -> None:
    tree, told = make_tree()
    keep(tree, "", [1, 2, 3, 4], [10, 11])
    told.clear()
    assert tree.match("", token_key([1, 2, 9, 9])).length == 1, "splits the node"
    assert told == []
    keep(tree, "", [1, 2, 5, 6], [10, 12])
    first = names_of("", token_key([1, 2]), 8)[0]
    assert [(event.parent_block_hash, event.token_ids) for event in told] == [(first, [5, 6])]
    told.clear()
    keep(tree, "", [1, 2, 5, 6], [10, 13])
    assert told == [], "the tree had these pages"


def test_pages_are_removed_from_the_end() -> None:
    tree, told = make_tree()
    keep(tree, "", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    names = names_of("", token_key([1, 2, 3, 4, 5, 6]), 8)
    told.clear()
    tree.evict(2)
    assert told == [BlockRemoved([names[2]], "GPU"), BlockRemoved([names[1]], "GPU")]


def test_namespaces_and_adapters_have_pages_of_their_own() -> None:
    tree, told = make_tree()
    keep(tree, "", [1, 2], [10])
    keep(tree, "tenant", [1, 2], [11])
    keep(tree, "poet\0", [1, 2], [12])
    keep(tree, "poet\0tenant", [1, 2], [13])
    names = [event.block_hashes[0] for event in told]
    assert len(set(names)) == 4
    assert names[1] == names_of("tenant", token_key([1, 2]), 8)[0]
    base, tenant, poet, of_both = (event.lora_id for event in told)
    assert base is tenant is None
    assert poet == of_both is not None


def test_a_branch_goes_on_from_its_bases_pages_with_others() -> None:
    tree, told = make_tree()
    keep(tree, "", [1, 2, 3, 4, 5, 6], [10, 11, 12])
    keep(tree, Branch(base="", first_token=3, name="poet"), [1, 2, 3, 4, 5, 6], [10, 21, 22])
    base, branch = told[:3], told[3:]
    assert [event.token_ids for event in branch] == [[3, 4], [5, 6]]
    assert branch[0].parent_block_hash == base[0].block_hashes[0]
    assert branch[1].parent_block_hash == branch[0].block_hashes[0]
    assert {one.block_hashes[0] for one in branch}.isdisjoint(one.block_hashes[0] for one in base)
    keep(tree, "poet\0", [9, 9], [30])
    assert branch[0].lora_id == branch[1].lora_id == told[-1].lora_id is not None


def test_a_flush_clears_all_or_removes_what_nobody_uses() -> None:
    tree, told = make_tree()
    node = keep(tree, "", [1, 2], [10])
    keep(tree, "", [1, 2, 3, 4], [10, 11])
    tree.lock(node)
    told.clear()
    tree.forget()
    assert told == [BlockRemoved([names_of("", token_key([1, 2, 3, 4]), 8)[1]], "GPU")]
    tree.unlock(node)
    told.clear()
    tree.forget()
    assert told == [AllBlocksCleared()]
    keep(tree, "", [1, 2], [10])
    assert isinstance(told[-1], BlockStored), "all is told again afterwards"


def test_pages_that_show_a_picture_are_other_blocks_of_the_same_adapter() -> None:
    tree, told = make_tree()
    one, two = (Branch(base="", first_token=3, name=MEDIUM + name) for name in ("one", "two"))
    keep(tree, one, [1, 2, 3, 4], [10, 21])
    keep(tree, two, [1, 2, 3, 4], [10, 31])
    text, first, second = told
    assert [event.lora_id for event in told] == [None] * 3
    assert first.parent_block_hash == second.parent_block_hash == text.block_hashes[0]
    assert first.token_ids == second.token_ids == [3, 4]
    assert first.block_hashes != second.block_hashes
