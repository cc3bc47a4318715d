# What is copied next, and what waits: the rules of repair alone, without nodes or network.
from __future__ import annotations

from collections.abc import Iterator

from idunno.base.disk import Space
from idunno.base.ids import BlockId, NodeId
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.placement import Candidate
from idunno.sdfs.repair import NAMED_MAX, WALKS_MAX, Copying, Nodes, RepairCore

MB = 1_000_000
CONFIG = SdfsConfig(floor_bytes=0, floor_percent=0)
NODES = [NodeId(f"{i:016x}") for i in range(1, 9)]


class Store:
    """Blocks and their holders, as a leader knows them."""

    def __init__(self, *, present: int = 8, zones: tuple[str, ...] = ("",) * 8, free: int = 10**12) -> None:
        self.size: dict[BlockId, int] = {}
        self.held: dict[BlockId, list[NodeId]] = {}
        self.small: set[BlockId] = set()
        self.core = RepairCore(
            lambda block: self.size.get(block, 0),
            lambda: list(self.size),
            lambda block: self.held[block],
            CONFIG,
            self.small.__contains__,
        )
        self.candidates = tuple(
            Candidate(node, node[-2:], zone, "present", Space(free, 2 * free))
            for node, zone in zip(NODES[:present], zones, strict=False)
        )
        self.see()

    def see(self, *, waited: frozenset[NodeId] = frozenset(), draining: frozenset[NodeId] = frozenset()) -> None:
        giving = frozenset(candidate.node for candidate in self.candidates) - waited
        self.core.set_nodes(Nodes(self.candidates, giving, waited, 0, draining))

    def add(self, number: int, holders: list[NodeId], size: int = 8 * MB) -> BlockId:
        block = BlockId(f"{number:064x}")
        self.size[block], self.held[block] = size, holders
        self.core.touch([block])
        return block

    def next(self, now_ms: int = 0) -> list[Copying]:
        while self.core.judge(now_ms, 100):
            pass
        return self.core.next_copies(now_ms)


def test_fewest_copies_come_first_then_the_oldest() -> None:
    store = Store()
    three = store.add(1, NODES[:3])
    two = [store.add(number, NODES[:2]) for number in (2, 3)]
    one = store.add(4, NODES[:1])
    assert [order.block for order in store.next()] == [one, *two, three]
    assert (store.core.missing, store.core.bytes_left) == (3 + 2 + 2 + 1, 8 * 8 * MB)


def test_256_mb_of_what_has_three_copies_at_once_the_rest_after_a_minute() -> None:
    store = Store()
    for number in range(50):
        store.add(number, NODES[:3])
    copied = 0
    for _ in range(50):
        for order in store.next(1_000):
            copied += order.size
            store.held[order.block] = [*order.sources, order.target]
            store.core.copied(order, 1_000)
    assert copied == 32 * 8 * MB
    assert store.next(59_000) == []
    assert store.core.begins_s(59_000) == 2.0
    urgent = store.add(99, NODES[:2])
    assert [order.block for order in store.next(59_500)] == [urgent]
    assert len(store.next(61_000)) > 0
    assert store.core.begins_s(61_000) == 0.0
    assert store.core.estimate_s(61_000) is None  # nothing was copied in the last 10 s


def _copy_all(store: Store, now_ms: int) -> int:
    """Bytes of what is copied at once, until nothing more is ordered."""
    copied = 0
    while orders := store.next(now_ms):
        for order in orders:
            copied += order.size
            store.held[order.block].append(order.target)
            store.core.copied(order, now_ms)
    return copied


def _lose_a_copy_of(store: Store, numbers: range) -> None:
    for number in numbers:
        store.add(number, NODES[:3])


def test_a_block_that_is_lost_for_good_does_not_make_all_later_ones_wait() -> None:
    store = Store()
    store.add(999, [])
    _lose_a_copy_of(store, range(40))
    assert _copy_all(store, 1_000) == 32 * 8 * MB
    assert _copy_all(store, 61_000) == 8 * 8 * MB
    _lose_a_copy_of(store, range(100, 140))
    assert _copy_all(store, 121_000) == 32 * 8 * MB
    assert len(store.core.lost()) == 1


def test_a_block_that_nobody_takes_does_not_make_all_later_ones_wait() -> None:
    store = Store(present=5, free=4 * MB)
    store.add(999, NODES[:3])  # no node has room for it
    for number in range(200):
        store.add(number, NODES[:3], size=2 * MB)
    assert _copy_all(store, 1_000) == 256 * MB
    assert _copy_all(store, 61_000) == 144 * MB
    store.add(1_000, NODES[:3], size=2 * MB)
    assert _copy_all(store, 121_000) == 2 * MB


def test_attempts_that_failed_are_not_among_the_first_256_mb() -> None:
    store = Store()
    store.add(999, NODES[:3])
    tries = 0
    for now_ms in range(0, 50_000, 500):
        for order in store.next(now_ms):
            tries += 1
            store.core.not_copied(order, now_ms, blame_target=False)
    assert tries > 32
    _lose_a_copy_of(store, range(31))
    assert _copy_all(store, 50_000) == 32 * 8 * MB


def test_attempts_that_fail_after_all_was_whole_give_no_more_than_256_mb_to_the_others() -> None:
    store = Store()
    _lose_a_copy_of(store, range(10))
    orders = store.next(0)
    assert len(orders) == 10
    for number in range(10):
        store.add(number, NODES[:4])  # the node is back
    assert (store.next(1_000), store.core.short) == ([], 0)
    for order in orders:
        store.core.not_copied(order, 1_000, blame_target=False)
    _lose_a_copy_of(store, range(100, 140))
    assert _copy_all(store, 1_000) == 32 * 8 * MB


def test_nodes_that_reboot_one_after_the_other_have_256_mb_a_minute_together() -> None:
    """The blocks of one are whole again, and those of the next are short already but not judged yet."""
    store = Store()
    copied = 0
    for reboot in range(20):
        for number in range(100 * (reboot - 1), 100 * reboot) if reboot else ():
            store.add(number, NODES[:4])
        _lose_a_copy_of(store, range(100 * reboot, 100 * (reboot + 1)))
        copied += _copy_all(store, 30_000 * reboot)
    assert copied == 10 * 256 * MB


def test_a_copy_goes_to_another_zone_with_room_and_no_node_gets_too_many() -> None:
    store = Store(zones=("a", "a", "a", "b", "a", "a", "b", "a"))
    for number in range(20):
        store.add(number, NODES[:3])
    orders = store.next()
    assert [order.target for order in orders[:4]].count(NODES[3]) == 2
    loads = {node: sum(order.target == node or order.sources[0] == node for order in orders) for node in NODES}
    assert max(loads.values()) > 0
    assert all(sum(order.target == node for order in orders) <= 2 for node in NODES)
    assert {orders[0].target, orders[1].target} <= {NODES[3], NODES[6]}


def test_a_full_node_gets_nothing_and_what_cannot_be_placed_is_missing_but_not_left() -> None:
    store = Store(present=4, free=MB)
    store.add(1, NODES[:3])
    assert store.next() == []
    assert (store.core.short, store.core.missing, store.core.bytes_left) == (1, 1, 0)


def test_a_target_that_fails_is_left_alone_for_a_while() -> None:
    store = Store(present=5)
    block = store.add(1, NODES[:3])
    (order,) = store.next(0)
    store.core.not_copied(order, 0, blame_target=True)
    (other,) = store.next(100)
    assert (other.block, other.target) == (block, ({NODES[3], NODES[4]} - {order.target}).pop())
    store.core.not_copied(other, 100, blame_target=True)
    assert store.next(5_000) == []
    assert len(store.next(11_000)) == 1


def test_a_block_is_judged_again_by_what_is_told_and_forgotten_when_nothing_refers_to_it() -> None:
    store = Store()
    block = store.add(1, NODES[:3])
    store.next()
    del store.size[block]
    store.core.touch([block])
    store.core.judge(0, 10)
    assert (store.core.short, store.core.missing, store.core.bytes_left) == (0, 0, 0)


def test_what_is_being_drained_counts_not_but_gives() -> None:
    store = Store(present=6)
    block = store.add(1, NODES[:1])
    store.see(draining=frozenset(NODES[:1]))
    (order,) = store.next()
    assert (order.block, order.sources, order.copies) == (block, (NODES[0],), 0)
    assert store.core.lost() == []


def test_lost_is_what_nobody_can_give_the_short_end_of_a_file_too_but_not_a_models_small_file() -> None:
    store = Store()
    lost = store.add(1, [])
    end = store.add(3, [], size=100)  # of a file of many blocks: nothing else has it
    store.small.add(store.add(2, [], size=4096))
    assert store.next() == []
    assert store.core.lost() == [lost, end]
    assert store.core.missing == 8
    store.held[lost] = store.held[end] = NODES[:4]
    store.core.touch([end])
    store.core.touch([lost])
    store.core.judge(0, 10)
    assert (store.core.lost(), store.core.missing) == ([], 0)


def test_surplus_is_trimmed_after_a_while_over_zones_and_only_when_nothing_is_urgent() -> None:
    store = Store(zones=("a", "a", "b", "b", "c", "d", "d", "d"))
    block = store.add(1, NODES[:5])
    urgent = store.add(2, NODES[:2])
    store.next(0)
    assert store.core.next_trims(20_000) == []
    store.held[urgent] = NODES[:4]
    store.core.touch([urgent])
    store.core.judge(20_000, 10)
    (order,) = store.core.next_trims(20_000)
    assert (order.block, len(order.keep)) == (block, 4)
    assert order.drop in NODES[:4]  # of zone a or b, of which there are two
    assert store.core.next_trims(20_000) == []  # it is under way
    store.core.trimmed(order, 20_000, done=False)
    store.core.judge(20_000, 10)
    assert store.core.next_trims(30_000) == []
    assert len(store.core.next_trims(36_000)) == 1


def test_the_touched_are_stepped_through_once_a_slice_not_once_a_block() -> None:
    """A dict steps over what was taken out at its front, each time it is walked."""
    walks = 0

    class Watched(dict[BlockId, None]):
        def __iter__(self) -> Iterator[BlockId]:
            nonlocal walks
            walks += 1
            return super().__iter__()

    store = Store()
    store.core._dirty = Watched()
    for number in range(1_000):
        store.add(number, NODES[:3])
    assert store.core.judge(0, 100)
    assert (walks, store.core.short) == (1, 100)


def test_a_long_list_is_walked_over_by_judge_not_when_it_is_touched() -> None:
    drawn = 0

    class Watched(list[BlockId]):
        def __iter__(self) -> Iterator[BlockId]:
            nonlocal drawn
            for block in super().__iter__():
                drawn += 1
                yield block

    store = Store()
    many = Watched(BlockId(f"{number:064x}") for number in range(NAMED_MAX + 1))
    store.size, store.held = dict.fromkeys(many, MB), dict.fromkeys(many, NODES[:3])
    drawn = 0
    store.core.touch(many)
    assert (drawn, store.core.unjudged, store.core.is_short(many[-1])) == (0, True, True)
    one = store.add(NAMED_MAX + 1, NODES[:2])
    assert store.core.judge(0, 100)
    assert drawn == 99  # the one that was named came first
    assert store.core.is_short(one)
    while store.core.judge(0, 1_000):
        pass
    assert (store.core.short, store.core.missing) == (NAMED_MAX + 2, NAMED_MAX + 3)


def test_more_long_lists_than_are_kept_become_one_of_all_blocks() -> None:
    store = Store()
    assert not store.core.judge(0, 1)  # all of none, since the number of copies wanted is known
    for number in range(5):
        block = BlockId(f"{number:064x}")
        store.size[block], store.held[block] = MB, NODES[:3]
    strange = [BlockId(f"{1 << 40 | number:064x}") for number in range(NAMED_MAX + 1)]
    for _ in range(WALKS_MAX + 1):
        store.core.touch(strange)
    assert not store.core.judge(0, 6)
    assert store.core.short == 5


def test_blocks_that_only_a_failing_node_could_take_keep_no_others_waiting() -> None:
    store = Store(present=4)
    for number in range(500):
        store.add(number, NODES[:3], size=1_000)
    others = {store.add(number, [*NODES[:2], NODES[3]], size=1_000) for number in range(500, 600)}
    made, now_ms = set[BlockId](), 0
    while made != others and now_ms < 600_000:
        now_ms += 500
        for order in store.next(now_ms):
            if order.target == NODES[3]:
                store.core.not_copied(order, now_ms, blame_target=True)
            else:
                store.held[order.block].append(order.target)
                made.add(order.block)
                store.core.copied(order, now_ms)
    assert made == others


def test_a_copy_that_was_not_made_for_want_of_a_source_is_not_ordered_again_at_once() -> None:
    store = Store()
    store.add(1, NODES[:2])
    store.add(2, NODES[:2])
    orders = list[tuple[int, str]]()
    for now_ms in range(0, 3_000, 10):
        for order in store.next(now_ms):
            orders.append((now_ms, order.block[-1]))
            store.core.not_copied(order, now_ms, blame_target=False)
    pause_ms = CONFIG.repair_again_ms // 10
    assert orders == [(at, block) for at in range(0, 3_000, pause_ms) for block in "12"]


def test_blocks_that_were_freed_are_forgotten_also_when_all_are_looked_at_before_them() -> None:
    store = Store()
    freed = [store.add(number, []) for number in range(NAMED_MAX + 1)]  # nobody has them any more
    kept = store.add(NAMED_MAX + 1, NODES[:2])
    store.next()
    assert len(store.core.lost()) == len(freed)
    for block in freed:
        del store.size[block]
    store.core.touch(freed)
    store.core.touch_all()
    store.next()
    assert (store.core.lost(), store.core.short, store.core.is_short(kept)) == ([], 1, True)


def test_a_block_that_is_put_again_and_again_is_looked_at_all_the_same() -> None:
    store = Store()
    block = store.add(1, NODES[:4])
    store.next()
    store.held[block] = NODES[:1]
    store.core.touch([block])
    ordered = list[int]()
    for now_ms in range(0, 10_000, 500):
        store.core.hold_back([block], now_ms + 2_000)
        ordered += [now_ms for _ in store.next(now_ms)]
    assert ordered == [2_000]


def test_a_block_that_was_touched_since_it_was_judged_is_judged_before_it_is_copied() -> None:
    store = Store()
    block = store.add(1, NODES[:3])
    (order,) = store.next()
    store.held[block].append(order.target)
    store.core.copied(order, 0)
    assert store.core.next_copies(0) == []
    assert store.next(60_000) == []
