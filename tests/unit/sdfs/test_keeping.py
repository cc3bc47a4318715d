# Retention and trash as users see them.
from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from idunno.base.errors import InvalidArgument, NotFound, PermissionDenied
from idunno.base.ids import NodeId
from idunno.coordinator.commands import Expire, SetRetention
from idunno.coordinator.machine import Machine
from idunno.coordinator.namespace import Namespace
from idunno.coordinator.records import VersionRecord
from idunno.coordinator.trash import RetentionRule, TrashEntry
from idunno.sdfs import keeping
from idunno.sdfs.client import source_of
from idunno.sdfs.config import SdfsConfig
from idunno.sdfs.expiry import Expiry
from idunno.sdfs.small import SmallStore
from idunno.wire.calls import Actor, Role
from tests.unit.sdfs.world import CONFIG, MB, OTHER, USER, World, content_of, run

CONTENT = content_of(MB)
ADMIN = Actor("root", Role.ADMIN)
READER = Actor("rita", Role.READER)


def test_old_versions_expire_into_the_trash_small_ones_too() -> None:
    async def story() -> None:
        async with World(4) as world:
            client = world.client()
            for number in range(5):
                await world.put(content_of(MB, number), "logs/a")
                await world.put(b"small" + bytes([number]), "logs/b")
                await world.put(b"small", "other")
            rules = await client.retain("logs/", versions=2)
            assert [(r.prefix, r.owner, r.versions, r.age_ms) for r in rules] == [("logs/", "alice", 2, 0)]
            assert await client.retain("logs/a", show=True) == rules
            await asyncio.sleep(5)
            for name in ("logs/a", "logs/b"):
                assert [row.version for row in await client.versions(name)] == [5, 4]
            assert len(await client.versions("other")) == 5
            assert [(row.name, row.versions, row.expired) for row in await client.trash("logs/")] == [
                ("logs/a", [1, 2, 3], True),
                ("logs/b", [1, 2, 3], True),
            ]
            assert await client.retain("logs/", versions=0) == []
            with pytest.raises(InvalidArgument, match="no rule holds there"):
                await client.retain(".idunno/jobs/", versions=1)
            assert (await client.restore("logs/b")).versions == 3
            assert await world.get("logs/b", version=1) == b"small\0"
            await asyncio.sleep(200)
            assert len(await client.versions("logs/b")) == 5

    run(story)


def test_by_age_a_version_goes_so_long_after_it_was_replaced() -> None:
    async def story() -> None:
        async with World(4) as world:
            client = world.client()
            await world.put(b"1", "a")
            world.now_ms += 100_000
            await world.put(b"2", "a")  # replaces 1 now
            await client.retain("", age_ms=50_000)
            await asyncio.sleep(70)
            assert len(await client.versions("a")) == 2
            world.now_ms += 60_000
            await world.put(b"x", "b")  # machine time goes on with commands
            await asyncio.sleep(70)
            assert [row.version for row in await client.versions("a")] == [2]

    run(story)


def test_very_many_versions_of_one_file_expire_one_command_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.expiry.VERSIONS_MAX", 3)
    monkeypatch.setattr("idunno.sdfs.expiry.PROPOSALS_MAX", 4)  # so that one look is not enough

    async def story() -> None:
        async with World(3) as world:
            for number in range(40):
                await world.put(b"small" + bytes([number]), "logs/a")
            await world.client().retain("logs/", versions=2)
            await asyncio.sleep(10)
            assert [row.version for row in await world.client().versions("logs/a")] == [40, 39]

    run(story)


def test_a_look_at_what_expires_passes_each_file_once_whatever_rules_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    history = Namespace.history

    def told(self: Namespace, name: str) -> tuple[VersionRecord, ...]:
        looked_at.append(name)
        return tuple(history(self, name))

    async def story() -> None:
        async with World(3) as world:
            for number in range(4):
                for name in ("a", "logs/a", "logs/x/b", "other"):
                    await world.put(b"small" + bytes([number]), name)
            for number in range(9):
                world.apply(SetRetention("logs/", 3), Actor(f"u{number}", Role.USER))
            await world.client().retain("logs/x/", versions=1)
            await world.client().retain("a", versions=9)
            await asyncio.sleep(5)
            monkeypatch.setattr(Namespace, "history", told)
            await world.leading._expiry.look()
            assert looked_at == ["a", "logs/a", "logs/x/b"]

    run(story)


def test_who_writes_faster_than_versions_expire_keeps_nobody_elses_from_expiring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("idunno.sdfs.expiry.PROPOSALS_MAX", 4)
    namespace, put = Namespace(version=3), itertools.count(1)
    for prefix in ("a/", "z/"):
        namespace.retention.set(RetentionRule(prefix, "", 1, 0), 3)

    def write(name: str) -> None:
        number = next(put)
        namespace.add(name, 0, (), "ann", f"put-{number}", number, small=True)

    async def propose(command: Expire, **_: Any) -> None:
        namespace.expire(command.name, command.versions, "", 1)
        for number in range(20):
            write(f"a/{number}")

    async def read(timeout_s: float) -> Any:
        return SimpleNamespace(namespace=namespace, now_ms=1)

    async def story() -> None:
        for name in [f"a/{number}" for number in range(20)] + ["z/old"]:
            write(name)
            write(name)
        expiry = Expiry(
            NodeId("n1"), cast(Any, SimpleNamespace(read=read, now_ms=lambda: 1, propose=propose)), config=SdfsConfig()
        )
        looks = 0
        while len(namespace.history("z/old")) > 1:
            looks += 1
            assert looks <= 6
            await expiry.look()

    run(story)


def test_everybody_keeps_house_with_his_own() -> None:
    async def story() -> None:
        async with World(4) as world:
            alice, bob, admin, reader = (world.client(actor) for actor in (world_user(), OTHER, ADMIN, READER))
            for _ in range(3):
                await world.put(CONTENT, "shared/a")
            await bob.retain("shared/", versions=1)
            await asyncio.sleep(70)
            assert len(await alice.versions("shared/a")) == 3  # bob's rule is for bob's files
            await alice.delete("shared/a")
            with pytest.raises(PermissionDenied, match="belongs to alice"):
                await bob.restore("shared/a")
            with pytest.raises(PermissionDenied):
                await reader.retain("shared/", versions=1)
            assert (await bob.empty_trash()).versions == 0
            assert len(await reader.trash()) == 1
            assert (await admin.empty_trash("other/")).versions == 0
            emptied = await admin.empty_trash()
            assert (emptied.versions, emptied.size) == (3, 3 * MB)
            with pytest.raises(NotFound, match="the trash holds nothing"):
                await alice.restore("shared/a")

    run(story)


def world_user() -> Actor:
    return Actor("alice", Role.USER)


def test_a_trash_of_many_is_emptied_in_parts_and_purged_by_itself_in_time() -> None:
    async def story() -> None:
        async with World(3, config=replace(CONFIG, trash_ms=1_000_000)) as world:
            client = world.client()
            for number in range(30):
                for _ in range(50):
                    await world.put(b"x", f"f{number}")
                await client.delete(f"f{number}")
            assert world.machine.namespace.trash.versions == 1_500
            assert (await client.empty_trash("f1")).versions == 11 * 50
            world.now_ms += 1_000_000  # and nobody gives a command any more: machine time stands still
            await asyncio.sleep(130)
            assert world.machine.namespace.trash.versions == 0

    run(story)


def test_whoever_looks_through_the_trash_of_others_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.keeping.LOOKED_AT_MAX", 5)

    async def story() -> None:
        async with World(3) as world:
            client = world.client()
            for number in range(50):
                await world.put(b"x", f"f{number:02}")
                await client.delete(f"f{number:02}")
            turns = 0

            async def others() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            rest = asyncio.create_task(others())
            before = turns
            assert (await world.client(OTHER).empty_trash("")).versions == 0
            assert turns - before >= 10
            assert [row.name for row in await client.trash("f4")] == [f"f4{n}" for n in range(10)]
            page = await world.client(OTHER).trash("f49")
            assert [row.name for row in page] == ["f49"]
            rest.cancel()

    run(story)


def test_a_trash_that_is_emptied_in_parts_is_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idunno.sdfs.keeping.PURGE_VERSIONS_MAX", 1)
    looked_at, entries = list[str](), keeping._entries

    async def told(machine: Machine, after: int) -> AsyncIterator[TrashEntry]:
        async for entry in entries(machine, after):
            looked_at.append(entry.name)
            yield entry

    async def story() -> None:
        async with World(3) as world:
            for number in range(30):
                client = world.client(OTHER if number % 3 else USER)
                await client.put(source_of(b"x"), f"f{number:02}", size=1)
                await client.delete(f"f{number:02}")
            monkeypatch.setattr(keeping, "_entries", told)
            assert (await world.client().empty_trash()).versions == 10
            assert len(looked_at) <= 30 + 10  # the next of one's own is looked at twice: it did not fit

    run(story)


def test_a_long_listing_counts_shared_blocks_once() -> None:
    async def story() -> None:
        async with World(4) as world:
            await world.put(CONTENT, "a")
            await world.put(CONTENT, "a")
            await world.put(CONTENT + b"more" * 2000, "a")
            row = (await world.client().ls("a", long=True))[0]
            assert (row.versions, row.logical, row.stored) == (3, 3 * MB + 8_000, 2 * MB + 8_000)
            assert (await world.client().ls("a"))[0].versions == 0

    run(story)


def test_looking_at_very_many_versions_or_blocks_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def turns_of(asked: Callable[[], Awaitable[object]]) -> int:
        before = turns
        await asked()
        return turns - before

    async def story() -> None:
        async with World(2) as world:
            client = world.client()
            for number in range(20):
                for name in ("a", "b", "c"):
                    await world.put(b"x" + bytes([number]), name)
            await world.put(content_of(80 * MB), "large")
            # So that all versions are looked at for what the node stores.
            monkeypatch.setattr(SmallStore, "__contains__", lambda self, block: False)
            asked: list[Callable[[], Awaitable[object]]] = [
                lambda: client.ls("", long=True),
                lambda: client.store("n1"),
                lambda: client.stat("large"),
            ]
            rest = asyncio.create_task(others())
            in_one_turn = [await turns_of(each) for each in asked]
            monkeypatch.setattr("idunno.sdfs.views.SLICE_VERSIONS", 5)
            monkeypatch.setattr("idunno.sdfs.where.ORDER_SLICE", 2)
            in_slices = [await turns_of(each) for each in asked]
            rest.cancel()
            more = [many - few for many, few in zip(in_slices, in_one_turn, strict=True)]
            assert [count >= least for count, least in zip(more, (12, 12, 5), strict=True)] == [True] * 3, more

    run(story)
