# tests/simulation/clients.py: users of the simulated cluster, who write down what they were promised.
#
# Rule 1: a client runs on a machine of its own, talks to any node over the product's own session, and shows a user's certificate.
# Rule 2: `Promises` holds what was acknowledged, and what may have happened. Each name has one writer, so what anybody's read
#         may return is known (linearizability of one register): no version older than the newest that was acknowledged or
#         read before it began, and a content that was put.
# Rule 3: an answer that contradicts a promise is a finding at once; whether promises are kept in the end, `verify` asks.
from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from idunno.base.disk import Buffer
from idunno.base.errors import IdunnoError, NotFound
from idunno.client.locate import Door, Place, TcpDoor
from idunno.client.session import Link, Session
from idunno.coordinator.records import BLOCK_BYTES_MAX
from idunno.scheduler.messages import (
    DEPLOY,
    GET_JOB,
    GET_MODEL,
    OUTPUTS,
    SUBMIT,
    DeployModel,
    FileVersion,
    GetJob,
    GetModel,
    JobInfo,
    JobRequest,
    ModelInfo,
    OutputInfo,
    Submit,
)
from idunno.sdfs.client import FileClient, source_of
from idunno.sdfs.messages import PutAnswer
from idunno.wire.rpc import connect_tcp
from tests.simulation.loop import new_loop
from tests.simulation.machine import PORT, TLS, certificate_of
from tests.simulation.models import answer_to
from tests.simulation.network import Host

if TYPE_CHECKING:
    from tests.simulation.world import World

T = TypeVar("T")

ADMIN: Final = "alice"
FILES_A_CLIENT: Final = 6
PUT_S: Final = 15.0
GET_S: Final = 10.0
VERIFY_S: Final = 40.0


@dataclass(slots=True)
class FileStory:
    """What one name went through."""

    acknowledged: dict[int, bytes] = field(default_factory=dict)
    """By version."""
    tried: list[bytes] = field(default_factory=list)
    """All contents that were ever sent: each may be a version."""
    read: dict[int, bytes] = field(default_factory=dict)
    """What reads gave, by version."""

    @property
    def newest(self) -> int:
        return max(max(self.acknowledged, default=0), max(self.read, default=0))


@dataclass(slots=True)
class JobStory:
    lines: list[bytes]
    info: JobInfo | None = None


@dataclass(slots=True)
class Promises:
    files: dict[str, FileStory] = field(default_factory=dict)
    jobs: dict[str, JobStory] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    puts_under_way: int = 0
    deploys_under_way: int = 0
    done: dict[str, int] = field(default_factory=dict)
    on_acknowledged: list[Callable[[str, bytes, PutAnswer], None]] = field(default_factory=list)
    """Told name, content and answer of each put."""

    def count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    @property
    def jobs_under_way(self) -> int:
        return sum(1 for job in self.jobs.values() if job.info is None or job.info.finished is None)


class Client:
    """One user's program. `begin` work on it; `inside` runs something and waits for it."""

    def __init__(self, world: World, number: int, promises: Promises) -> None:
        self.world, self.promises, self.name = world, promises, f"c{number}"
        self.host = Host(world.network, f"10.0.1.{number}", certificate_of(ADMIN))
        self.loop = self.host.loop = new_loop(world.scheduler, self.name, self.host)
        self.rng = random.Random(f"{world.seed} client {number}")
        self.stopping = False
        self._working: list[asyncio.Future[None]] = []
        world.know_client(self.host)
        doors = tuple(TcpDoor(machine.address, PORT, machine.name) for machine in world.machines)
        self._place = Place("the world", doors, "look at the story")

    def inside(self, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Future[T]:
        """A future of the world's loop for what `work()` returns or raises."""
        answer: asyncio.Future[T] = self.world.loop.create_future()

        async def do() -> None:
            # The session belongs to the client's loop: it is made there.
            if not hasattr(self, "session"):
                self.session = Session(self._place, _dial, self.rng)
                self.files = FileClient(self.session.caller, offload=_inline, rng=self.rng)
            try:
                result = await work()
            except Exception as error:  # noqa: BLE001 - carried over to who waits
                self.world.loop.call_soon(answer.set_exception, error)
            else:
                self.world.loop.call_soon(answer.set_result, result)

        self.loop.call_soon(lambda: self.loop.create_task(do()))
        return answer

    def begin(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._working.append(self.inside(work))

    async def finish(self) -> None:
        """Let what was begun end, and wait for it."""
        self.stopping = True
        for future in self._working:
            await future

    # -- files ----------------------------------------------------------------------------------------------------

    async def work_with_files(self) -> None:
        rng = self.rng
        while not self.stopping:
            await asyncio.sleep(rng.random() * 0.6)
            name = f"{self.name}/file-{rng.randrange(FILES_A_CLIENT)}"
            chance = rng.random()
            if chance < 0.55:
                await self.put(name, self._content())
            elif chance < 0.92:
                await self.check_latest(rng.choice(list(self.promises.files) or [name]))
            elif chance < 0.96:
                await self._delete_one(f"{self.name}/gone-{rng.getrandbits(32):08x}")
            else:
                await asyncio.sleep(3.0 * rng.random())  # now and then nobody wants anything

    def _content(self) -> bytes:
        rng = self.rng
        kind = rng.random()
        if kind < 0.01:
            return rng.randbytes(BLOCK_BYTES_MAX + rng.randrange(1, 500_000))  # two blocks
        size = rng.randrange(1, 600) if kind < 0.5 else rng.randrange(4096, 40_000) if kind < 0.9 else 0
        return rng.randbytes(size) if size else b""

    async def _delete_one(self, name: str) -> None:
        """A file of its own comes and goes. What was deleted stays so; a deletion whose fate is not known promises nothing."""
        await self.put(name, b"to be deleted")
        acknowledged = bool(self.promises.files.pop(name).acknowledged)
        try:
            await self.files.delete(name, timeout_s=PUT_S)
        except IdunnoError as error:
            self.promises.count(f"delete: {error.code}")
            return
        self.promises.count("delete")
        if acknowledged:
            self.promises.deleted.append(name)

    async def put(self, name: str, content: bytes) -> None:
        promises, story = self.promises, self.promises.files.setdefault(name, FileStory())
        promises.puts_under_way += 1
        story.tried.append(content)
        try:
            answer = await self.files.put(source_of(content), name, size=len(content), timeout_s=PUT_S)
        except IdunnoError as error:
            promises.count(f"put: {error.code}")
            self.world.trace.tell("put failed", client=self.name, name=name, error=str(error)[:300])
            return
        finally:
            promises.puts_under_way -= 1
        promises.count("put")
        for known in (story.acknowledged.get(answer.version), story.read.get(answer.version)):
            if known is not None and known != content:
                self.world.found(
                    f"{name} version {answer.version} is acknowledged, and is the version of another content"
                )
        story.acknowledged[answer.version] = content
        for hear in promises.on_acknowledged:
            hear(name, content, answer)
        self.world.trace.note("put acknowledged", self.name, name, answer.version)

    async def check_latest(self, name: str) -> None:
        story = self.promises.files.get(name)
        least = story.newest if story is not None else 0
        got = await self._get(name, None, GET_S)
        if name not in self.promises.files:
            return  # deleted meanwhile, or never there
        if isinstance(got, NotFound):
            if least:
                self.world.found(f"{name}: version {least} was there, a read says {got}")
        elif not isinstance(got, IdunnoError):
            self.promises.count("get")
            self._check(name, got[0], got[1], least)

    def _check(self, name: str, version: int, content: bytes, least: int) -> None:
        story = self.promises.files[name]
        if version < least:
            self.world.found(f"{name}: version {least} was there, a later read gives version {version}")
        known = story.acknowledged.get(version, story.read.get(version))
        if known is None and content not in story.tried:
            self.world.found(f"{name} version {version} has a content that nobody put as that version")
        if known is not None and content != known:
            self.world.found(
                f"{name} version {version} is not as it was put: {len(content)} bytes, {len(known)} were put"
            )
        story.read[version] = content

    async def _get(self, name: str, version: int | None, timeout_s: float) -> tuple[int, bytes] | IdunnoError:
        pieces: dict[int, bytes] = {}

        async def sink(offset: int, content: Buffer) -> None:
            pieces[offset] = bytes(content)

        try:
            info = await self.files.get(name, sink, version=version, timeout_s=timeout_s)
        except IdunnoError as error:
            self.promises.count(f"get: {error.code}")
            return error
        return info.version, b"".join(pieces[offset] for offset in sorted(pieces))

    # -- models and jobs ------------------------------------------------------------------------------------------

    async def work_with_jobs(self, model: str) -> None:
        deployed = False
        while not self.stopping:
            if deployed:
                await self._job(model)
            else:
                deployed = await self._deploy(model)
            await asyncio.sleep(self.rng.random() * self.rng.choice([1.0, 1.0, 6.0]))

    async def _deploy(self, model: str) -> bool:
        promises, rng = self.promises, self.rng
        request = f"{rng.getrandbits(128):032x}"
        name = f".idunno/models/{model}/{request}/weights.onnx"
        promises.deploys_under_way += 1
        try:
            put = await self.files.put(source_of(rng.randbytes(20_000)), name, timeout_s=PUT_S, system=True)
            deploy = DeployModel(model, "onnx", [FileVersion("weights.onnx", name, put.version)], request)
            info = await self.session.call(DEPLOY, deploy, timeout_s=PUT_S)
            while info.state == "undeployed" and not self.stopping:
                info = await self._changed(info)
        except IdunnoError as error:
            promises.count(f"deploy: {error.code}")
            self.world.trace.tell("deploy failed", client=self.name, model=model, error=str(error)[:300])
            return False
        finally:
            promises.deploys_under_way -= 1
        promises.count(f"deploy {info.state}")
        self.world.trace.tell("model", model=model, state=info.state, reason=info.reason)
        return info.state == "deployed"

    async def _changed(self, info: ModelInfo) -> ModelInfo:
        return await self.session.call(GET_MODEL, GetModel(info.model, 3.0, info), timeout_s=PUT_S)

    async def _job(self, model: str) -> None:
        promises, rng = self.promises, self.rng
        job = f"{rng.getrandbits(128):032x}"
        lines = [b"%d of %s" % (number, job.encode()) for number in range(rng.randrange(1, 90))]
        name = f".idunno/jobs/{job}/input"
        try:
            put = await self.files.put(source_of(b"\n".join(lines) + b"\n"), name, timeout_s=PUT_S, system=True)
            submit = Submit(job, model, name, put.version, "jsonl", rng.choice([0, 5, 17]))
            info = await self.session.call(SUBMIT, submit, timeout_s=PUT_S)
        except IdunnoError as error:
            promises.count(f"submit: {error.code}")
            self.world.trace.tell("job not submitted", client=self.name, error=str(error)[:300])
            return
        promises.count("submit")
        story = promises.jobs[job] = JobStory(lines, info)
        self.world.trace.note("job acknowledged", self.name, job)
        while info.finished is None and not self.stopping:
            try:
                info = story.info = await self.session.call(GET_JOB, GetJob(job, 3.0, info), timeout_s=GET_S)
            except IdunnoError as error:
                promises.count(f"job: {error.code}")
                if isinstance(error, NotFound):
                    self.world.found(f"job {job} was acknowledged, the cluster says {error}")
            await asyncio.sleep(0.1)

    # -- whether promises are kept --------------------------------------------------------------------------------

    async def verify(self) -> None:
        """Everything that was acknowledged is there, as it was acknowledged. Findings otherwise."""
        for name, story in self.promises.files.items():
            for version, content in story.acknowledged.items():
                got = await self._get(name, version, VERIFY_S)
                if isinstance(got, IdunnoError):
                    self.world.found(f"{name} version {version}, {len(content)} bytes, was acknowledged: {got}")
                elif got[1] != content:
                    self.world.found(f"{name} version {version} is not as it was put")
        for name in self.promises.deleted:
            got = await self._get(name, None, VERIFY_S)
            if not isinstance(got, NotFound):
                self.world.found(f"{name} was deleted, a read says {got}")
        for job, job_story in self.promises.jobs.items():
            await self._verify_job(job, job_story)

    async def _verify_job(self, job: str, story: JobStory) -> None:
        info = await self.session.call(GET_JOB, GetJob(job), timeout_s=VERIFY_S)
        if (
            info.finished is None and "is failed" in info.reason
        ):  # no worker could set the model up: its user tries again
            self.stopping = False
            await self._deploy(info.model)
            self.stopping = True
        end = self.loop.time() + 90.0
        while info.finished is None and self.loop.time() < end:
            info = await self.session.call(GET_JOB, GetJob(job, 5.0, info), timeout_s=VERIFY_S)
        story.info = info
        if info.finished is None:
            self.world.found(f"job {job} is {info.state} 90 s after everything is well: {info.reason}, {info.tasks}")
            return
        self.promises.count(f"job {info.state}")
        short = info.state == "success" and info.done != info.queries
        if short or info.done > info.queries or info.queries not in (0, len(story.lines)):
            self.world.found(f"job {job} has {len(story.lines)} queries; it counts {info.done} done of {info.queries}")
        answered = 0
        for part in await self._outputs(job):
            if part.first != answered:
                self.world.found(f"job {job}: query {answered} is followed by {part.first}")
            answered = part.last
            if part.name:
                await self._verify_output(job, part, story.lines)
        if info.state == "success" and answered != len(story.lines):
            self.world.found(f"job {job}: {answered} of {len(story.lines)} queries are answered")

    async def _outputs(self, job: str) -> list[OutputInfo]:
        found: list[OutputInfo] = []
        while True:
            first = found[-1].last if found else 0
            answer = await self.session.call(OUTPUTS, JobRequest(job, first=first), timeout_s=VERIFY_S)
            found += answer.outputs
            if not answer.more or not answer.outputs:
                return found

    async def _verify_output(self, job: str, part: OutputInfo, lines: list[bytes]) -> None:
        got = await self._get(part.name, None, VERIFY_S)
        if isinstance(got, IdunnoError):
            self.world.found(f"job {job}: output {part.name} cannot be read: {got}")
            return
        rows = [msgspec.json.decode(line) for line in got[1].splitlines()]
        wanted = [{"query": n, "output": answer_to(lines[n])} for n in range(part.first, part.last)]
        if rows != wanted:
            self.world.found(f"job {job}: output {part.name} answers other queries than {part.first} to {part.last}")


async def _dial(door: Door, timeout_s: float) -> Link:
    assert isinstance(door, TcpDoor)
    return await connect_tcp(door.host, door.port, TLS, timeout_s=timeout_s)


async def _inline(work: Callable[[], T], /) -> T:
    return work()
