"""Replays a long random log of commands and prints the machine's digest and snapshot hash. Run under several PYTHONHASHSEEDs."""

from __future__ import annotations

import random
import sys

from blake3 import blake3

from idunno.base.ids import NodeId
from idunno.coordinator import commands as c
from idunno.coordinator.machine import Machine
from idunno.coordinator.names import output_name
from idunno.coordinator.namespace import small_block
from idunno.coordinator.records import ModelFile
from idunno.wire.calls import Actor
from tests.unit.coordinator.world import ADMIN, ALICE, BOB, N1, SYSTEM, World, block, done, node, timing, token, user


def history(seed: int, length: int) -> World:
    """A world after about `length` random commands of every kind, many refused, with whole stories of jobs in between."""
    rng, world = random.Random(seed), World()
    nodes = [NodeId(f"{i:016x}") for i in range(1, 7)]
    while len(world.log) < length:
        world.now_ms += rng.randrange(-500, 2_000)
        at = len(world.log)
        if rng.random() < 0.02:
            _story(rng, world, f"s{at}")
        command, actor = _command(rng, nodes, at, world)
        world.apply(command, actor, rng.choice(["", f"r{rng.randrange(200)}"]))
    return world


def _story(rng: random.Random, world: World, job: str) -> None:
    """A job from its model's deploy to some end, with every report made twice."""
    weights, given = small_block(b"story"), f".idunno/jobs/{job}/input"
    files = (ModelFile("m.onnx", "models/story", 1, weights.size, (weights,)),)
    last = world.machine.registry.find("story")
    version = (last.version if last is not None else 0) + 1
    steps: list[tuple[c.Command, Actor]] = [
        (c.PutSmall("w-story", "models/story", weights.block, b"story"), ALICE),
        (c.Deploy("story", "onnx", files, 0, 0, 1_000, 0, 0, (N1,)), ALICE),
        (c.ReportWorker("story", version, N1), SYSTEM),
        (c.PutSmall(f"in-{job}", given, small_block(b"in").block, b"in"), ALICE),
        (c.SubmitJob(job, "story", given, 1, "lines"), ALICE),
        (c.PlanJob(job, 11, 3), SYSTEM),
    ]
    for task in rng.sample(range(4), 4):
        queries = 2 if task == 3 else 3
        error = c.FailAttempt(job, task, N1, 0, "broke", rng.random() < 0.1)
        steps += [(error, SYSTEM), (done(job, task, queries, errors=rng.randrange(queries)), SYSTEM)]
    if rng.random() < 0.3:
        steps.insert(rng.randrange(6, len(steps)), (c.CancelJob(job), ALICE))
    if rng.random() < 0.5:
        steps.append((c.ForgetJob(job), ALICE))
    for command, actor in steps:
        for _ in range(2):
            world.now_ms += rng.randrange(10)
            world.apply(command, actor, f"{job}-{type(command).__name__}")


def _command(rng: random.Random, nodes: list[NodeId], at: int, world: World) -> tuple[c.Command, Actor]:
    """Ids are drawn from a window that moves on with `at`, so that commands meet what others made, and retries happen."""
    person = rng.choice([ALICE, ALICE, ALICE, BOB, ADMIN])
    serial = at // 12 - rng.choice([0, 0, 0, 1, 5])
    put, name, model = f"p{serial}", f"f/{serial % 20}", f"m{at // 150 % 3}"
    job, task, who, i = f"j{at // 150}", rng.randrange(4), rng.choice(nodes), rng.randrange(4, 9)
    record = world.machine.registry.find(model)
    current = record.version if record is not None and rng.random() < 0.9 else 1
    weights = small_block(model.encode())
    files = (ModelFile("m.onnx", f"models/{model}", 1, weights.size, (weights,)),)
    choices: list[tuple[c.Command, Actor]] = [
        (c.AddNode(node(i), "t-node"), SYSTEM),
        (c.UpdateNode(who, f"h:{i}", rng.randrange(9), 1, "z", "0.1"), Actor(who, SYSTEM.role)),
        (c.SetPresence(who, rng.choice(["present", "failed", "stopped"]), rng.randrange(9), "seen"), SYSTEM),
        (c.RemoveNode(nodes[-1]), ADMIN),
        (c.RenewClusterKey(bytes([i]) * 32), SYSTEM),
        (c.RaiseVersion(rng.randrange(3)), ADMIN),
        (c.TakeDigest(), SYSTEM),
        (c.ConfirmDigest(at, bytes(32)), SYSTEM),
        (c.AddUser(user(f"u{i}", i=i), "t-user"), SYSTEM),
        (c.RevokeUser(f"u{i}"), ADMIN),
        (c.AddToken(token(f"t{i}", "user", 10**7)), ADMIN),
        (c.RevokeToken(f"t{i}"), ADMIN),
        (c.BeginPut(put, name, rng.choice([None, None, 0, 2])), person),
        (c.CommitPut(put, name, 10, (block("b"),)), person),
        (c.CommitPut(put, name, 10, (block("b"),)), person),
        (c.AbortPut(put, "enough"), person),
        (c.PutSmall(put, f".idunno/jobs/{job}/input", small_block(b"in").block, b"in"), ALICE),
        (c.PutSmall(put, name, small_block(put.encode()).block, put.encode()), person),
        (c.PutSmall(f"w-{model}", f"models/{model}", weights.block, model.encode()), ALICE),
        (c.DeleteFile(name), person),
        (c.SetRetention(rng.choice(["f/", "f/1", ""]), rng.randrange(4), rng.choice([0, 5_000])), person),
        (c.Expire(name, tuple(range(rng.randrange(4)))), SYSTEM),
        (c.RestoreTrash(name), person),
        (
            c.Purge(tuple(range(max(0, world.machine.namespace.trash.last - i), world.machine.namespace.trash.last))),
            ADMIN,
        ),
        (c.Deploy(model if record is None or at % 40 == 0 else "m9", "onnx", files, 0, i, 1_000, 0, 0, (who,)), person),
        (c.Undeploy("m9"), person),
        (c.Assign(model, current, who, "more"), SYSTEM),
        (c.Unassign(model, current if at % 5 == 0 else 99, who, "less"), SYSTEM),
        *[(c.ReportWorker(model, current, n, rng.choice(["", "", "no"])), SYSTEM) for n in nodes[:3]],
        (c.SetBatchSize(model, i), person),
        *[(c.SubmitJob(job, model, f".idunno/jobs/{job}/input", 1, "lines"), ALICE)] * 3,
        (c.SubmitJob(job, model, name, 1, "lines"), person),
        (c.PlanJob(job, rng.choice([0, 3, 6, 9]), 3), SYSTEM),
        *[(done(job, task, 3, errors=task % 2), SYSTEM)] * 3,
        (done(job, task, 3, put=put, size=10, blocks=(block("b"),), content=b"", timing=timing(3)), SYSTEM),
        (c.BeginPut(put, output_name(job, task), node=who), SYSTEM),
        (c.FailAttempt(job, task - 1, who, rng.randrange(3), "broke", rng.random() < 0.2), SYSTEM),
        (c.CancelJob(job if at % 3 == 0 else "j0"), person),
        (c.ForgetJob(f"j{at // 150 - rng.randrange(3)}"), person),
    ]
    return rng.choice(choices)


def main(seed: int, length: int) -> None:
    world = history(seed, length)
    counted = world.machine.recount()
    assert counted == world.machine.references
    snapshot = world.machine.snapshot()
    assert Machine.restore(snapshot).snapshot() == snapshot
    log = blake3(b"".join(world.log)).hexdigest()
    sys.stdout.write(f"{log} {world.machine.digest().hex()} {blake3(snapshot).hexdigest()}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
