"""The table of docs/roles.md, row by row: every command, every role, one's own and somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from idunno.base.errors import Conflict, PermissionDenied
from idunno.base.ids import NodeId
from idunno.coordinator import commands as c
from idunno.coordinator import messages, permissions
from idunno.coordinator.names import output_name
from idunno.coordinator.namespace import small_block
from idunno.coordinator.records import ModelFile
from idunno.wire.calls import Actor, Method, Role
from tests.unit.coordinator.world import (
    ADMIN,
    ALICE,
    BOB,
    N1,
    N2,
    READER,
    SYSTEM,
    World,
    block,
    done,
    genesis,
    node,
    token,
    user,
)

PAGE = Path(__file__).parents[3] / "docs" / "roles.md"
FILES = (ModelFile("m.onnx", "models/digits", 1, 10, (block("digits"),)),)

METHODS = {method.name: method for method in vars(messages).values() if isinstance(method, Method)}
COMMANDS: list[c.Command] = [
    genesis(),
    c.AddNode(node(4), "t-node"),
    c.UpdateNode(N1, "h:1", 1, 1, "", ""),
    c.SetPresence(N1, "failed", 0, ""),
    c.RemoveNode(N2),
    c.RenewClusterKey(bytes(32)),
    c.RaiseVersion(2),
    c.TakeDigest(),
    c.ConfirmDigest(1, bytes(32)),
    c.AddUser(user("carol"), "t-user"),
    c.RevokeUser("alice"),
    c.AddToken(token("t1", "user")),
    c.RevokeToken("t-user"),
    c.BeginPut("p9", "file"),
    c.CommitPut("open", "other", 10, (block("x"),)),
    c.AbortPut("open", ""),
    c.PutSmall("p9", "file", small_block(b"x").block, b"x"),
    c.DeleteFile("file"),
    c.Deploy("digits", "onnx", FILES, 0, 0, 1_000, 0, 0, (N1,)),
    c.Undeploy("digits"),
    c.Assign("digits", 1, N1, ""),
    c.Unassign("digits", 1, N1, ""),
    c.ReportWorker("digits", 1, N1),
    c.SetBatchSize("digits", 5),
    c.SubmitJob("job2", "digits", "file", 1, "lines"),
    c.PlanJob("job1", 1, 1),
    done("job1", 0, 4),
    c.FailAttempt("job1", 0, N1, 0, ""),
    c.CancelJob("job1"),
    c.ForgetJob("job1"),
    c.SetRetention("f", 3),
    c.Expire("file", (1,)),
    c.RestoreTrash("gone"),
    c.Purge((1,)),
]


def tag(command: c.Command) -> str:
    return str(type(command).__struct_config__.tag)


def alices_world() -> World:
    """Alice owns a file, an open put, a model and a job."""
    world = World()
    world.do(c.AddUser(user("alice", i=60), "t-user"), SYSTEM)
    world.put("file")
    world.put("gone")
    world.do(c.DeleteFile("gone"))
    world.do(c.BeginPut("open", "other"))
    world.planned(4, 4)
    return world


def allowed(command: c.Command, actor: Actor, world: World | None = None) -> bool:
    try:
        permissions.check(command, actor, (world or alices_world()).machine)
    except PermissionDenied:
        return False
    except Conflict:
        return isinstance(command, c.Genesis)
    return True


def rows(head: str = "command") -> list[list[str]]:
    """The table whose first column has that title."""
    text = PAGE.read_text()
    table = text[text.index(f"| {head} |") :].split("\n\n")[0]
    lines = [line for line in table.splitlines() if "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_a_row_and_the_code_a_rule_for_every_command() -> None:
    known = [tag(command) for command in COMMANDS]
    assert [row[0] for row in rows()[1:]] == known
    assert [kind.__struct_config__.tag for kind in permissions.RULES] == known
    assert set(permissions.RULES) == set(c.Command.__args__)


@pytest.mark.parametrize("row", rows()[1:], ids=lambda row: row[0])
def test_row(row: list[str]) -> None:
    command = next(command for command in COMMANDS if tag(command) == row[0])
    assert rows()[0] == ["command", "reader", "user", "admin", "node"]
    for cell, owner, stranger in zip(
        row[1:],
        (Actor("alice", Role.READER), ALICE, ADMIN, SYSTEM),
        (READER, BOB, Actor("other", Role.ADMIN), Actor(N2, Role.NODE)),
        strict=True,
    ):
        expected = {
            "no": (False, False),
            "own": (True, False),
            "yes": (True, True),
            "itself": (True, False),
            "first entry": (True, True),
        }[cell]
        assert (allowed(command, owner), allowed(command, stranger)) == expected, f"{row[0]}: {cell}"
        if cell == "own":
            assert allowed(command, stranger, World()), f"{row[0]}: what nobody owns is free"


@pytest.mark.parametrize("command", COMMANDS, ids=tag)
def test_apply_enforces_it_too(command: c.Command) -> None:
    world = alices_world()
    before = world.machine.digest()
    nobody = world.apply(command, Actor("", Role.ANYONE))
    assert isinstance(nobody.error, PermissionDenied)
    assert nobody.effects == ()
    world.machine.index -= 1  # type: ignore[assignment]
    assert world.machine.digest() == before


def test_refusals_name_whose_it_is() -> None:
    world = alices_world()
    cases: list[tuple[c.Command, str]] = [
        (c.BeginPut("p", "file"), "file belongs to alice; choose another name, or ask alice or an admin"),
        (c.DeleteFile("file"), "file belongs to alice"),
        (c.CommitPut("open", "other", 10, (block("x"),)), "put open belongs to alice"),
        (c.Undeploy("digits"), "model digits belongs to alice"),
        (c.CancelJob("job1"), "job job1 belongs to alice"),
        (c.AddToken(token("t", "user")), "add token takes the role admin; bob is a user"),
    ]
    for command, text in cases:
        with pytest.raises(PermissionDenied, match=text):
            world.do(command, BOB)


def test_a_file_that_changed_hands_while_a_put_was_open_is_not_overwritten() -> None:
    world = World()
    world.do(c.BeginPut("p1", "new"), ALICE)
    world.put("new", actor=BOB)
    with pytest.raises(PermissionDenied, match="new belongs to bob"):
        world.do(c.CommitPut("p1", "new", 10, (block("x"),)), ALICE)


def test_a_retry_of_what_was_done_is_answered_whoever_owns_the_file_now() -> None:
    world = World()
    world.put("a", put="p1")
    world.put("a", actor=ADMIN)
    assert world.do(c.BeginPut("p1", "a"), ALICE).committed.version == 1
    with pytest.raises(PermissionDenied, match="a belongs to root"):
        world.do(c.BeginPut("p2", "a"), ALICE)


@pytest.mark.parametrize(
    "name", [".idunno", ".idunno/x", ".idunno/jobs/j/output/000000.jsonl", ".idunno/jobs/j/input/x", ".idunno/models/m"]
)
def test_system_names_are_for_nodes(name: str) -> None:
    world = World()
    for actor in (ALICE, ADMIN):
        for command in (c.BeginPut("p1", name), c.DeleteFile(name)):
            with pytest.raises(PermissionDenied, match="the system's own"):
                world.do(command, actor)
    world.do(c.BeginPut("p1", name), SYSTEM)


def test_a_jobs_input_is_its_clients_until_it_is_submitted() -> None:
    world = World()
    world.deployed()
    name = ".idunno/jobs/job1/input"
    world.put(name)
    with pytest.raises(PermissionDenied, match="belongs to alice"):
        world.do(c.BeginPut("p", name), BOB)
    world.put(name)
    world.submit()
    for command in (c.BeginPut("p", name), c.DeleteFile(name)):
        with pytest.raises(Conflict, match="job1 is submitted"):
            world.do(command)


def test_a_models_files_are_its_owners() -> None:
    world = World()
    world.deployed()
    world.put(".idunno/models/digits/d2/m.onnx")
    world.put(".idunno/models/fresh/d1/a/m.onnx", actor=BOB)
    with pytest.raises(PermissionDenied, match="model digits belongs to alice"):
        world.put(".idunno/models/digits/d3/m.onnx", actor=BOB)


def test_outputs_are_for_nodes_to_write() -> None:
    world = alices_world()
    with pytest.raises(PermissionDenied):
        world.do(c.BeginPut("p", output_name("job1", 0)))
    world.do(c.BeginPut("p", output_name("job1", 0), node=N2), Actor(NodeId(N2), Role.NODE))


def test_the_files_of_a_job_are_its_clients_to_read_and_to_use() -> None:
    world = alices_world()
    world.do(done("job1", 0, 4), SYSTEM)
    machine = world.machine
    for name in (".idunno/jobs/job1/input", output_name("job1", 0)):
        may = {actor.name: permissions.may_read(name, actor, machine) for actor in (ALICE, BOB, READER, ADMIN, SYSTEM)}
        assert may == {"alice": True, "bob": False, "rita": True, "root": True, N1: True}
        size, blocks = machine.namespace.latest(name).size, machine.namespace.latest(name).blocks
        commands: list[c.Command] = [
            c.SubmitJob("mine", "digits", name, 1, "lines"),
            c.Deploy("mine", "onnx", (ModelFile("m.onnx", name, 1, size, blocks),), 0, 0, 1_000, 0, 0, ()),
        ]
        for command in commands:
            with pytest.raises(PermissionDenied, match="somebody else's job"):
                world.do(command, BOB)
            world.do(command, ALICE)
        world.do(c.Undeploy("mine"), ALICE)
        world.do(c.CancelJob("mine"), ALICE)
        world.do(c.ForgetJob("mine"), ALICE)
    assert permissions.may_read("file", BOB, machine)


def test_nobody_takes_a_jobs_id_with_the_input_in_it() -> None:
    world = World()
    world.deployed()
    world.put(".idunno/jobs/job1/input")
    world.put("bobs", actor=BOB)
    with pytest.raises(PermissionDenied, match="the input of job job1 belongs to alice"):
        world.do(c.SubmitJob("job1", "digits", "bobs", 1, "lines"), BOB)
    world.submit("job1")


@pytest.mark.parametrize("row", rows("call")[1:], ids=lambda row: row[0])
def test_a_call_for_admins_is_for_those_that_its_row_names(row: list[str]) -> None:
    name, *allowed = row
    actors = [READER, BOB, ADMIN, SYSTEM]
    assert ["yes" if actor.may(METHODS[name].access) else "no" for actor in actors] == allowed


def test_every_call_for_admins_has_a_row() -> None:
    for_admins = [name for name, method in METHODS.items() if method.access is Role.ADMIN]
    assert [row[0] for row in rows("call")[1:]] == for_admins
