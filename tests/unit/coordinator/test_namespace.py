"""Files: versions, exactly-once puts, conditions, tombstones; and a model-checked random history."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idunno.base.errors import Conflict, DecodeError, Exhausted, InvalidArgument, NotFound
from idunno.base.ids import BlockId, Index
from idunno.coordinator import commands as c
from idunno.coordinator import namespace as ns
from idunno.coordinator.effects import FileDeleted, KeepSmall, VersionMade
from idunno.coordinator.machine import Machine
from idunno.coordinator.namespace import small_block
from idunno.coordinator.records import Block
from tests.unit.coordinator.world import ADMIN, ALICE, BOB, SYSTEM, World, block


def small(put: str, name: str, content: bytes = b"hello", if_version: int | None = None) -> c.PutSmall:
    return c.PutSmall(put, name, small_block(content).block, content, if_version)


def test_a_put_makes_a_version_only_at_its_commit() -> None:
    world = World()
    opened = world.do(c.BeginPut("p1", "a/b"))
    assert (opened.put, opened.committed) == ("p1", None)
    assert world.machine.namespace.find("a/b") is None
    applied = world.apply(c.CommitPut("p1", "a/b", 10, (block("x"),)))
    assert applied.effects == (VersionMade("a/b", 1, (block("x"),)),)
    assert world.machine.namespace.latest("a/b").owner == "alice"
    assert world.machine.namespace.open_puts() == []


def test_a_retried_put_finds_its_version_at_begin_and_at_commit() -> None:
    world = World()
    assert world.do(c.BeginPut("p1", "a")) == world.do(c.BeginPut("p1", "a"))
    first = world.do(c.CommitPut("p1", "a", 10, (block("x"),)))
    world.put("a", "y")
    again = world.apply(c.CommitPut("p1", "a", 10, (block("x"),)))
    assert (again.result, again.effects) == (first, ())
    assert world.do(c.BeginPut("p1", "a")).committed.version == 1
    assert world.machine.namespace.latest("a").version == 2


def test_a_retried_small_put_makes_one_version_and_one_copy() -> None:
    world = World()
    first = world.apply(small("p1", "a"))
    assert first.effects[0] == KeepSmall(small_block(b"hello").block, b"hello")
    again = world.apply(small("p1", "a"))
    assert (again.result, again.effects) == (first.result, ())
    assert world.machine.namespace.latest("a").small


def test_a_retry_after_a_delete_does_not_bring_the_file_back() -> None:
    world = World()
    first = world.do(small("p1", "a"))
    world.do(c.DeleteFile("a"), request="r1")
    assert world.do(small("p1", "a")) == first
    assert world.do(c.BeginPut("p1", "a")).committed.blocks == ()
    assert world.machine.namespace.find("a") is None


@pytest.mark.parametrize("count", range(1, ns.PUTS_REMEMBERED + 1))
def test_a_retry_of_any_of_the_last_puts_before_a_delete_finds_its_version(count: int) -> None:
    world = World.newest()
    made = [world.do(small(f"p{number}", "a")) for number in range(count)]
    world.do(c.DeleteFile("a"), request="r1")
    restored = Machine.restore(world.machine.snapshot())
    for number, done in enumerate(made):
        assert world.do(small(f"p{number}", "a")) == done
        assert restored.namespace.made(f"p{number}") == ("a", done.version)
    assert world.machine.namespace.find("a") is None


def test_versions_go_on_after_a_delete() -> None:
    world = World()
    world.put("a")
    world.put("a")
    assert world.do(c.DeleteFile("a"), request="r1").versions == 2
    assert world.put("a") == 3
    with pytest.raises(NotFound, match="no version 2, it has 3 to 3"):
        world.machine.namespace.version("a", 2)


def test_a_retried_put_whose_version_has_expired_is_not_done_again() -> None:
    world = World.newest()
    first = world.do(small("p1", "a"))
    world.put("a")
    world.do(c.Expire("a", (1,)), SYSTEM)
    for machine in (world.machine, Machine.restore(world.machine.snapshot())):
        world.machine = machine
        assert world.do(small("p1", "a")) == first
        assert world.do(c.BeginPut("p1", "a")).committed.blocks == ()
        assert world.machine.namespace.latest("a").version == 2
    world.do(c.DeleteFile("a"), request="r1")
    assert world.do(small("p1", "a")) == first
    entries = tuple(world.machine.namespace.trash.entries)
    world.do(c.Purge(entries), SYSTEM)
    assert world.machine.namespace.made("p1") is None  # gone for good a day later, and nobody retries any more


def test_a_delete_that_is_retried_after_a_later_delete_spares_what_came_after_both() -> None:
    world = World.newest()
    for request in ("r1", "r2"):
        world.put("a")
        world.do(c.DeleteFile("a"), request=request)
    assert world.put("a") == 3
    again = world.apply(c.DeleteFile("a"), request="r1")
    assert (again.error, again.effects) == (None, ())
    assert world.machine.namespace.latest("a").version == 3


def test_a_retried_setting_does_not_undo_what_another_set_in_between() -> None:
    world = World.newest()
    world.do(c.SetRetention("a", 5), request="r1")
    world.do(c.SetRetention("a", 6), BOB, request="r2")
    world.do(c.SetRetention("a", 5), request="r1")
    rules = {rule.owner: rule.versions for rule in world.machine.namespace.retention.rules()}
    assert rules == {"alice": 5, "bob": 6}
    world.do(c.SetRetention("a", 7), request="r3")
    world.do(c.SetRetention("a", 5), request="r1")
    assert world.machine.namespace.retention.rule_for("a", "alice").versions == 7  # type: ignore[union-attr]
    world.deployed()
    for request, size in (("b1", 8), ("b2", 16), ("b1", 8)):
        world.do(c.SetBatchSize("digits", size), request=request)
    assert world.machine.registry.get("digits").batch_size == 16


def test_a_retried_delete_spares_what_came_after_it() -> None:
    world = World()
    world.put("a")
    first = world.apply(c.DeleteFile("a"), request="r1")
    assert isinstance(first.effects[0], FileDeleted)
    world.put("a")
    assert world.apply(c.DeleteFile("a"), request="r1").result == first.result
    assert world.machine.namespace.find("a") is not None
    with pytest.raises(NotFound):
        world.do(c.DeleteFile("b"), request="r2")


def test_a_condition_is_checked_at_begin_and_again_at_commit() -> None:
    world = World()
    world.put("a")
    with pytest.raises(Conflict, match=r"a exists, in version 1; the put wanted no file there \(version 0\)"):
        world.do(c.BeginPut("p2", "a", if_version=0))
    with pytest.raises(Conflict, match="a is at version 1, the put wanted version 7"):
        world.do(c.BeginPut("p2", "a", if_version=7))
    with pytest.raises(Conflict, match=r"b does not exist \(version 0\), the put wanted version 1"):
        world.do(small("p2", "b", if_version=1))
    world.do(c.BeginPut("p2", "a", if_version=1))
    world.put("a")
    with pytest.raises(Conflict, match="a is at version 2, the put wanted version 1"):
        world.do(c.CommitPut("p2", "a", 10, (block("z"),)))
    assert world.machine.namespace.open_put("p2") is not None  # until its client aborts it
    assert world.do(small("p3", "c", if_version=0)).version == 1


def test_after_an_abort_the_commit_is_refused() -> None:
    world = World()
    world.do(c.BeginPut("p1", "a"))
    assert world.do(c.AbortPut("p1", "client went away")).changed
    assert not world.do(c.AbortPut("p1", "client went away")).changed
    with pytest.raises(Conflict, match="not open: it was aborted, or never begun"):
        world.do(c.CommitPut("p1", "a", 10, (block("x"),)))


def test_a_put_id_stands_for_one_name() -> None:
    world = World()
    world.do(c.BeginPut("p1", "a"))
    for command in (c.BeginPut("p1", "b"), small("p1", "b"), c.CommitPut("p1", "b", 10, (block("x"),))):
        with pytest.raises(Conflict, match=r"open.* for a"):
            world.do(command)
    world.do(c.CommitPut("p1", "a", 10, (block("x"),)))
    with pytest.raises(Conflict, match="made version 1 of a"):
        world.do(c.BeginPut("p1", "b"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        "./a",
        "a\nb",
        "a\x7f",
        "x" * 513,
        "a\u202eb",
        "a\u2028b",
        "\x85",
        "\u00e9" * 257,
    ],
)
def test_a_bad_name_is_refused(name: str) -> None:
    world = World()
    for command in (c.BeginPut("p1", name), small("p1", name)):
        with pytest.raises(InvalidArgument):
            world.do(command, ADMIN)
    assert world.machine.namespace.open_puts() == []


@pytest.mark.parametrize("name", ["a", "a b", "ä/ö", "模型.onnx", "x" * 512, "...", "a\u00a0b"])
def test_a_good_name_is_taken(name: str) -> None:
    assert World().put(name) == 1


@pytest.mark.parametrize(
    ("size", "blocks"),
    [
        (11, (block("x"),)),
        (0, (block("x", 0),)),
        (8 * 1024 * 1024 + 1, (block("x", 8 * 1024 * 1024 + 1),)),
        (10, (Block(BlockId("X" * 64), 10),)),
        (10, (Block(BlockId("abc"), 10),)),
        (6_001, (block("x", 1),) * 6_001),
    ],
)
def test_blocks_that_cannot_be_are_refused(size: int, blocks: tuple[Block, ...]) -> None:
    world = World()
    world.do(c.BeginPut("p1", "a"))
    with pytest.raises(InvalidArgument):
        world.do(c.CommitPut("p1", "a", size, blocks))


def test_small_content_is_checked_against_its_name_and_bound() -> None:
    world = World()
    with pytest.raises(InvalidArgument, match=r"not .* as it says"):
        world.do(c.PutSmall("p1", "a", small_block(b"other").block, b"hello"))
    with pytest.raises(InvalidArgument, match="at most 4096"):
        world.do(c.PutSmall("p1", "a", BlockId("0" * 64), bytes(4097)))
    assert world.do(small("p1", "a", bytes(4096))).size == 4096
    assert world.do(small("p2", "b", b"")).size == 0


@pytest.mark.parametrize("put", ["", "x" * 129, "a\nb", "ä"])
def test_a_put_needs_a_plain_id(put: str) -> None:
    with pytest.raises(InvalidArgument, match="put id"):
        World().do(c.BeginPut(put, "a"))


def test_open_puts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns, "OPEN_PUTS_MAX", 2)
    world = World()
    world.do(c.BeginPut("p1", "a"))
    world.do(c.BeginPut("p2", "a"))
    assert world.apply(c.BeginPut("p3", "a")).error is not None
    assert world.apply(c.BeginPut("p2", "a")).error is None


def test_nobody_takes_the_open_puts_or_rules_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns, "OPEN_PUTS_OF_ONE_MAX", 2)
    monkeypatch.setattr("idunno.coordinator.trash.RULES_OF_ONE_MAX", 2)
    world = World.newest()
    for number in range(2):
        world.do(c.BeginPut(f"p{number}", "a"))
        world.do(c.SetRetention(f"a{number}", 1, 0))
    for _ in range(2):
        with pytest.raises(Exhausted, match="2 puts of alice are open"):
            world.do(c.BeginPut("p9", "a"))
        with pytest.raises(Exhausted, match="alice has 2 retention rules"):
            world.do(c.SetRetention("a9", 1, 0))
        world.do(c.BeginPut("b1", "b"), BOB)
        world.do(c.SetRetention("b", 1, 0), BOB)
        world.machine = Machine.restore(world.machine.snapshot())
    world.do(c.AbortPut("p0", ""))
    world.do(c.BeginPut("p9", "a"))
    world.do(c.SetRetention("a0", 0, 0))
    world.do(c.SetRetention("a9", 1, 0))


def test_tombstones_are_bounded_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ns, "TOMBSTONES_MAX", 2)
    world = World()
    for name in ("a", "b", "c"):
        world.put(name)
        world.do(c.DeleteFile(name), request=f"r-{name}")
    assert [world.put(name) for name in ("a", "b", "c")] == [1, 2, 2]


def test_looking_back_in_time() -> None:
    world = World()
    for i in range(1, 5):
        world.now_ms = i * 1_000
        world.put("a", str(i))
    files = world.machine.namespace
    assert [v.version for v in files.last("a", 2)] == [4, 3]
    assert [v.version for v in files.last("a", 9)] == [4, 3, 2, 1]
    assert files.as_of("a", 2_999).version == 2
    assert files.version("a", 3).created_ms == 3_000
    with pytest.raises(NotFound, match="no version that old"):
        files.as_of("a", 999)


def test_machine_time_never_goes_back() -> None:
    world = World()
    world.now_ms = 5_000
    world.put("a")
    world.now_ms = 2_000
    world.put("a")
    assert [v.created_ms for v in world.machine.namespace.last("a", 2)] == [5_000, 5_000]


def test_listing_pages_by_prefix_and_hides_the_systems_own() -> None:
    world = World()
    for name in ("-a", "d/1", "d/2", "d/3", "e", "\U0001f600"):
        world.put(name)
    world.put(".idunno/jobs/j/input")
    files = world.machine.namespace
    assert files.names("", "", 10) == (["-a", "d/1", "d/2", "d/3", "e", "\U0001f600"], False)
    assert files.names("d/", "", 2) == (["d/1", "d/2"], True)
    assert files.names("d/", "d/2", 2) == (["d/3"], False)
    assert files.names("d/", "zzz", 2) == ([], False)
    assert files.names("", "", 2, system=True) == (["-a", ".idunno/jobs/j/input"], True)
    assert files.names(".idunno/", "", 9) == ([".idunno/jobs/j/input"], False)
    assert files.files == 6
    assert [name for name, _ in files.each()][:2] == ["-a", ".idunno/jobs/j/input"]


class Histories(RuleBasedStateMachine):
    """Random histories of one user, against a model that is a few dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.versions: dict[str, list[tuple[int, str]]] = {}  # name -> (version, put)
        self.last: dict[str, int] = {}
        self.open: dict[str, str] = {}
        self.made: dict[str, tuple[str, int]] = {}
        self.trash: dict[int, tuple[str, list[tuple[int, str]]]] = {}  # entry -> name, its versions
        self.small: set[str] = set()
        self.serial = 0

    names = st.sampled_from(["a", "b", "b/c", "d"])

    def fresh(self) -> str:
        self.serial += 1
        return f"id{self.serial}"

    def add(self, name: str, put: str) -> int:
        self.last[name] = self.last.get(name, 0) + 1
        self.versions.setdefault(name, []).append((self.last[name], put))
        self.made[put] = (name, self.last[name])
        return self.last[name]

    def expected(self, name: str, if_version: int | None) -> bool:
        current = self.versions[name][-1][0] if self.versions.get(name) else 0
        return if_version is None or if_version == current

    @rule(name=names, if_version=st.none() | st.integers(0, 3))
    def begin(self, name: str, if_version: int | None) -> None:
        put = self.fresh()
        applied = self.world.apply(c.BeginPut(put, name, if_version))
        assert (applied.error is None) == self.expected(name, if_version)
        if applied.error is None:
            self.open[put] = name
            self.world.do(c.BeginPut(put, name, if_version))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        put = data.draw(st.sampled_from(sorted(self.open)))
        opened = self.world.machine.namespace.open_put(put)
        assert opened is not None
        applied = self.world.apply(c.CommitPut(put, self.open[put], 10, (block(put),)))
        if self.expected(self.open[put], opened.if_version):
            assert applied.result is not None
            assert applied.result.version == self.add(self.open.pop(put), put)  # type: ignore[attr-defined]
        else:
            assert isinstance(applied.error, Conflict)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        put = data.draw(st.sampled_from(sorted(self.open)))
        name = self.open.pop(put)
        self.world.do(c.AbortPut(put, "test"))
        assert self.world.apply(c.CommitPut(put, name, 10, (block(put),))).error is not None

    @rule(name=names)
    def put_small(self, name: str) -> None:
        put = self.fresh()
        self.small.add(put)
        assert self.world.do(small(put, name)).version == self.add(name, put)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def retry(self, data: Any) -> None:
        put = data.draw(st.sampled_from(sorted(self.made)))
        name, version = self.made[put]
        if any(given == (version, put) for given in self.versions[name]):
            assert self.world.do(c.CommitPut(put, name, 10, (block(put),))).version == version
            assert self.world.do(c.BeginPut(put, name)).committed.version == version

    @rule(name=names)
    def delete(self, name: str) -> None:
        request = self.fresh()
        applied = self.world.apply(c.DeleteFile(name), request=request)
        count = len(self.versions.get(name, []))
        if count:
            assert applied.result.versions == count  # type: ignore[union-attr]
            assert self.world.do(c.DeleteFile(name), request=request).versions == count
            self.into_trash(name, self.versions[name])
            self.versions[name] = []
        else:
            assert isinstance(applied.error, NotFound)

    def into_trash(self, name: str, gone: list[tuple[int, str]]) -> None:
        self.trash[self.world.machine.namespace.trash.last] = (name, gone)

    @rule(name=names, numbers=st.sets(st.integers(0, 8)))
    def expire(self, name: str, numbers: set[int]) -> None:
        applied = self.world.apply(c.Expire(name, tuple(sorted(numbers))), SYSTEM)
        assert applied.error is None
        versions = self.versions.get(name, [])
        gone = [given for given in versions[:-1] if given[0] in numbers]
        if gone:
            self.into_trash(name, gone)
            self.versions[name] = [given for given in versions if given not in gone]

    @rule(name=names)
    def restore(self, name: str) -> None:
        mine = [entry for entry, (of, _) in self.trash.items() if of == name]
        applied = self.world.apply(c.RestoreTrash(name), request=self.fresh())
        if not mine:
            assert isinstance(applied.error, NotFound)
            return
        back = [given for entry in mine for given in self.trash.pop(entry)[1]]
        assert applied.result.versions == len(back)  # type: ignore[union-attr]
        self.versions[name] = sorted([*self.versions.get(name, []), *back])

    @rule(entries=st.sets(st.integers(1, 12)))
    def purge(self, entries: set[int]) -> None:
        gone = [given for entry in entries if entry in self.trash for given in self.trash.pop(entry)[1]]
        freed = {block(put).block for _, put in gone if put not in self.small}
        applied = self.world.apply(c.Purge(tuple(sorted(entries))))
        assert applied.result.versions == len(gone)  # type: ignore[union-attr]
        assert [set(effect.blocks) for effect in applied.effects] == ([freed] if freed else [])  # type: ignore[union-attr]

    @rule()
    def restart_from_a_snapshot(self) -> None:
        restored = Machine.restore(self.world.machine.snapshot())
        assert restored.digest() == self.world.machine.digest()
        self.world.machine = restored

    @invariant()
    def what_is_there_is_what_was_made(self) -> None:
        files = self.world.machine.namespace
        alive = sorted(name for name, versions in self.versions.items() if versions)
        assert files.names("", "", 100) == (alive, False)
        assert files.files == len(alive)
        for name in alive:
            assert [(v.version, v.request) for v in files.last(name, 99)] == self.versions[name][::-1]
        assert sorted(put.put for put in files.open_puts()) == sorted(self.open)
        lying = {
            number: (e.name, [(v.version, v.request) for v in e.versions]) for number, e in files.trash.entries.items()
        }
        assert lying == self.trash
        kept = [given for versions in self.versions.values() for given in versions]
        kept += [given for _, versions in self.trash.values() for given in versions]
        assert set(self.world.machine.references) == {block(put).block for _, put in kept if put not in self.small}


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_refused_command_changes_nothing() -> None:
    world = World()
    world.put("a")
    before = world.machine.namespace.state()
    for command in (
        c.BeginPut("p9", "a", if_version=5),
        c.CommitPut("p9", "a", 10, (block("x"),)),
        small("p9", "a", if_version=0),
        c.DeleteFile("nothing"),
        c.RestoreTrash("nothing"),
        c.SetRetention("a", -1),
    ):
        assert world.apply(command, ALICE, "r").error is not None
        assert world.machine.namespace.state() == before


def test_an_entry_that_is_not_known_stops_the_machine() -> None:
    world = World()
    good = c.encode_entry(c.Entry(c.FORMAT, 1, SYSTEM.name, "node", "", c.DeleteFile("a")))
    for bad in (b"x", good[:-1], good.replace(b"delete-file", b"delete-life"), good.replace(b"\xa4node", b"\xa4nude")):
        with pytest.raises(DecodeError):
            world.machine.apply(Index(2), bad)
    assert world.machine.index == 1
    assert world.machine.apply(Index(2), b"").result is None  # a leader's no-op
