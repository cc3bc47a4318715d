# idunno/consensus/install.py: taking snapshots, sending them to followers that need one, taking one in.
#
# Rule 1: the machine is captured between two entries and encoded in slices of a few ms; a snapshot counts when its file is
#         synced and has its name, and the log lets go of what it covers after that, but for a tail for slow followers.
# Rule 2: what the machine refers to and the snapshot does not hold (small contents) is durable here before the log is cut,
#         and before a snapshot that was taken in counts.
# Rule 3: one snapshot is taken or put in place at a time. None is taken while one is being sent to somebody who answers, unless
#         the log grows too long.
# Rule 4: a transfer is a window of pieces, each answered with the place that is wanted next; what is lost is sent again after
#         a second. A follower that works on what it got says so every second; one that says nothing costs a piece a second.
# Rule 5: who cannot get what a snapshot refers to says nothing after some minutes, for a while: the sender's disk must not fill.
from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final, Protocol

from idunno.base.disk import Disk, File
from idunno.base.errors import Corrupt, DiskFailed, IdunnoError, NotFound, Unavailable
from idunno.base.ids import Index, NodeId, Term
from idunno.consensus import snapshot as files
from idunno.consensus.config import RaftConfig
from idunno.consensus.events import Installed, TakeInstall
from idunno.consensus.log import Log
from idunno.consensus.messages import INSTALL_BYTES_MAX, Install, InstallAnswer, RaftMessage
from idunno.consensus.raft import Raft

log = logging.getLogger("idunno.consensus")

WINDOW_BYTES: Final = 4 * INSTALL_BYTES_MAX
"""Under way to one follower: 8 ms of a gigabit link, above its round trip with a write."""
RESEND_S: Final = 1.0
AWAY_RESENDS: Final = 3
"""After so many in vain a follower is taken to be away."""
RETRY_S: Final = 10.0
"""After a snapshot that could not be written, or that was taken in and is not one, the next is begun so much later."""
COMPLETE_S: Final = 300.0
"""After so long the next failure to get what a snapshot refers to ends its taking in: the sender keeps what an older machine
referred to as long as somebody is at it."""
INCOMPLETE_RETRY_S: Final = 60.0
"""After that: the sender takes this node for away, and has time to take a snapshot and let go of what that does not refer to."""
INBOX_MAX: Final = 16
READ_BYTES: Final = 512 * 1024
READ_ENTRIES_MAX: Final = 256
"""Of the log at once, when a snapshot lacks what entries brought: read and looked through in a few ms."""
LIGHT_BYTES: Final = 40 * 1024 * 1024
"""A snapshot of 180,000 files: a restart reads it in a second, and takes two for as many entries as make one due. A million files
with what may lie behind them are there again in 17 s."""
SHORT_SHARE: Final = 0.1
"""Of what makes one due, when the disk is full: what the log can let go of is wanted."""


class Restore(Protocol):
    """A machine in the making."""

    def feed(self, piece: bytes) -> None:
        """The next bytes of the snapshot. Raises DecodeError, Corrupt, Incompatible."""
        ...

    async def finish(self) -> None:
        """All bytes came. Raises like `feed`."""
        ...

    async def complete(self, leader: NodeId) -> None:
        """Get, and make durable, what the snapshot refers to and does not hold. Raises IdunnoError: try again."""
        ...

    def install(self) -> None:
        """From now on this is the machine."""
        ...


class StateMachine(Protocol):
    def capture(self) -> Iterator[bytes]:
        """The machine as it is now; encoded as the iteration goes on, whatever is applied meanwhile."""
        ...

    async def room(self) -> None:
        """Wait until there is room for what a slice of entries brings; for a bounded time. Raises nothing."""
        ...

    async def secure(self, payloads: AsyncGenerator[bytes]) -> None:
        """Make durable what the machine refers to and a snapshot does not hold. Raises IdunnoError: the log stays.

        `payloads`: of all entries up to the snapshot that the log still holds, oldest first; they are read when asked for.
        """
        ...

    async def settled(self) -> None:
        """The snapshot last captured counts: what neither it nor anything since refers to is wanted no more. Raises nothing."""
        ...

    def restore(self) -> Restore: ...


class Snapshots:
    """`step` hands an event to the core; `forget` lets the log go up to an index, when its turn comes."""

    def __init__(
        self,
        machine: StateMachine,
        disk: Disk,
        config: RaftConfig,
        *,
        send: Callable[[NodeId, RaftMessage], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self._machine, self._disk, self._config, self._send, self._spawn = machine, disk, config, send, spawn
        self.index = Index(0)
        """Of the newest snapshot on this node's disk."""
        self.incoming: Restore | None = None  # to be installed when the core says so
        self._lock = asyncio.Lock()
        self._taking = False
        self._not_before_s = 0.0
        self._bytes = 0  # of that snapshot
        self._log_bytes = 0  # of the log when the last snapshot was taken
        self._sending: dict[NodeId, asyncio.Event] = {}  # set when the follower answered
        self._answers: dict[NodeId, InstallAnswer] = {}
        self._silent: set[NodeId] = set()  # of those it is sent to: who has not answered AWAY_RESENDS of them
        self._inbox: deque[TakeInstall] = deque(maxlen=INBOX_MAX)
        self._receiving = False
        self._part: _Part | None = None

    @property
    def busy(self) -> bool:
        """One is being taken, sent or taken in."""
        return self._taking or self._receiving or bool(self._sending)

    async def load(self) -> files.Head | None:
        """At start: become the machine of the snapshot on disk, if there is one. Raises Corrupt, Incompatible, DiskFailed."""
        await files.clear(self._disk)
        try:
            reader = await files.Reader.open(self._disk, files.PATH)
        except NotFound:
            return None
        try:
            restore = await self._read(reader)
        finally:
            await reader.close()
        restore.install()
        self.index, self._bytes = reader.head.index, reader.size
        return reader.head

    def bind(self, core: Raft, log: Log, step: Callable[[Installed], None], forget: Callable[[Index], None]) -> None:
        """The log is open."""
        self._core, self._log, self._step, self._forget = core, log, step, forget
        # Behind a snapshot only a tail is kept. What is more came since: each restart would begin to count anew.
        tail_bytes = self._config.keep_bytes + 2 * self._config.segment_bytes
        self._log_bytes = min(log.size_bytes, tail_bytes) if self.index else 0

    async def _read(self, reader: files.Reader) -> Restore:
        restore = self._machine.restore()
        async for piece in reader.content():
            restore.feed(piece)
            await asyncio.sleep(0)  # a piece takes a few ms
        await restore.finish()
        return restore

    # -- taking -----------------------------------------------------------------------------------------------------

    def consider(self, applied: Index) -> None:
        """Entries were applied: begin a snapshot if it is time."""
        size = self._log.size_bytes
        self._log_bytes = min(self._log_bytes, size)  # it was cut since: from there it grows anew
        grown = self._grown(applied - self.index, size - self._log_bytes)
        due = SHORT_SHARE if self._log.short else 1.0
        if grown < due:
            return
        patience = 4.0 if self._sending.keys() - self._silent else 1.0
        now_s = asyncio.get_running_loop().time()
        if grown < due * patience or self._taking or now_s < self._not_before_s or applied <= self.index:
            return
        self._taking = True
        term = self._core.terms.term(applied)
        assert term is not None, f"{applied} is applied and not in the log"
        at, voters = self._core.named.at(applied)
        head = files.Head(applied, term, tuple(sorted(voters)), Index(at))
        self._spawn(self._take(head, self._machine.capture()), "raft snapshot")

    def _grown(self, entries: int, log_bytes: int) -> float:
        """How much of what makes the next snapshot due has come since: 1 when it is.

        That is more where the last one was large: else a large machine would be written all the time. A restart that reads much
        of a snapshot may as well read as much of a log.
        """
        config = self._config
        entries_due = config.snapshot_entries * max(1.0, self._bytes / LIGHT_BYTES)
        return max(entries / entries_due, log_bytes / max(config.snapshot_bytes, 2 * self._bytes))

    async def _take(self, head: files.Head, pieces: Iterator[bytes]) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            async with self._lock:
                size = await self._write(head, pieces)
                await self._machine.secure(self._payloads(head.index))
                if head.index > self.index:
                    await files.replace(self._disk, files.NEW_PATH)
                    self.index, self._bytes, self._log_bytes = head.index, size, self._log.size_bytes
            seconds = round(loop.time() - began_s, 3)
            log.info("snapshot taken", extra={"index": head.index, "bytes": size, "seconds": seconds})
            self._forget(self._tail_begin(head.index))
            if self.index == head.index and not self._receiving and not self._sending.keys() - self._silent:
                # Else somebody may still want what an older snapshot refers to, or this node what a newer one does.
                await self._machine.settled()
        except IdunnoError as error:
            self._not_before_s = loop.time() + RETRY_S
            log.warning("snapshot not taken", extra={"index": head.index, "problem": str(error)})
            await self._remove_if_possible(files.NEW_PATH)  # its space, before the log takes its reserve
            if isinstance(error, DiskFailed):
                await self._log.use_reserve()
        finally:
            self._taking = False

    async def _payloads(self, last: Index) -> AsyncGenerator[bytes]:
        """Raises NotFound when the log is cut meanwhile, as by a snapshot that is taken in; Corrupt, DiskFailed."""
        terms, at = self._core.terms, 0
        while (at := max(at, terms.base)) < last:
            end, _ = terms.batch_end(at + 1, READ_BYTES, READ_ENTRIES_MAX)
            for payload in await self._log.read(at + 1, min(end, last)):
                yield payload
            at = min(end, last)
            await asyncio.sleep(0)

    async def _remove_if_possible(self, path: str) -> None:
        try:
            await files.clear(self._disk, [path])
        except IdunnoError as error:  # the next attempt writes over it
            log.warning("snapshot's beginning not removed", extra={"path": path, "problem": str(error)})

    async def _write(self, head: files.Head, pieces: Iterator[bytes]) -> int:
        async def sliced() -> AsyncIterator[bytes]:
            loop, slice_s = asyncio.get_running_loop(), self._config.snapshot_slice_ms / 1000
            end_s = loop.time() + slice_s
            for piece in pieces:
                yield piece
                if loop.time() >= end_s:
                    await asyncio.sleep(0 if self._urgent(head.index) else slice_s * self._config.snapshot_rest)
                    end_s = loop.time() + slice_s

        return await files.write(self._disk, files.NEW_PATH, head, sliced())

    def _urgent(self, index: Index) -> bool:
        """The log waits for this snapshot: it has no space, or has grown again by what makes one due."""
        log_bytes = (self._log.size_bytes - self._log_bytes) // 2  # half of them made it due
        return self._log.short or self._grown(self._core.commit - index, log_bytes) >= 1.0

    def _tail_begin(self, index: Index) -> Index:
        """The last entry that need not be kept for followers that are a little behind."""
        config, terms = self._config, self._core.terms
        at, size = int(index), 0
        while at > terms.base and index - at < config.keep_entries and size < config.keep_bytes:
            size += terms.size(at)
            at -= 1
        return Index(at)

    # -- sending ----------------------------------------------------------------------------------------------------

    def send(self, to: NodeId, term: Term) -> None:
        if to not in self._sending:
            self._sending[to] = asyncio.Event()
            self._spawn(self._send_to(to, term), f"raft snapshot for {to}")

    def answered(self, sender: NodeId, answer: InstallAnswer) -> None:
        if sender in self._sending:
            self._answers[sender] = answer
            self._silent.discard(sender)
            self._sending[sender].set()

    def _is_wanted(self, to: NodeId, term: Term, index: int | None = None) -> bool:
        """A snapshot, or the one of `index`: who has that already needs a newer one, and says nothing to more of this."""
        progress = self._core.peers.get(to)
        if not self._core.is_leader or self._core.term != term or progress is None or not progress.installing:
            return False
        return index is None or progress.match < index

    async def _send_to(self, to: NodeId, term: Term) -> None:
        try:
            reader = await files.Reader.open(self._disk, files.PATH)
            try:
                log.info(
                    "snapshot begun to be sent", extra={"to": to, "index": reader.head.index, "bytes": reader.size}
                )
                await self._send_file(to, term, reader)
            finally:
                await reader.close()
        except IdunnoError as error:
            log.error("snapshot not sent", extra={"to": to, "problem": str(error)})
            await asyncio.sleep(RESEND_S)
        finally:
            del self._sending[to]
            self._answers.pop(to, None)
            self._silent.discard(to)
        if self._is_wanted(to, term):
            self.send(
                to, term
            )  # the disk failed, or the log was cut further, or there is a newer one: the newest one now

    async def _send_file(self, to: NodeId, term: Term, reader: files.Reader) -> None:
        heard, head = self._sending[to], reader.head
        acked = sent = timeouts = 0
        window = WINDOW_BYTES
        while self._is_wanted(to, term, head.index):
            while sent < reader.size and sent - acked < window:
                data = await reader.read(sent, INSTALL_BYTES_MAX)
                if not self._is_wanted(to, term, head.index):
                    return
                self._send(to, Install(term, head.index, head.term, reader.size, sent, data))
                sent += len(data)
            heard.clear()
            try:
                async with asyncio.timeout(RESEND_S):
                    await heard.wait()
            except TimeoutError:
                timeouts += 1
                if timeouts >= AWAY_RESENDS:
                    self._silent.add(to)
                if timeouts >= AWAY_RESENDS and self.index > head.index:
                    return  # it is away, or begins anew anyway: the newest it is then, and the old file's space is free
                sent, window = acked, INSTALL_BYTES_MAX
                if acked == reader.size:
                    sent = max(0, reader.size - INSTALL_BYTES_MAX)  # asks: is it still at it?
                continue
            answer, timeouts = self._answers[to], 0
            if answer.index == head.index and not answer.done:
                if answer.offset < acked:
                    sent = answer.offset
                acked, window = min(answer.offset, reader.size), WINDOW_BYTES

    # -- taking in --------------------------------------------------------------------------------------------------

    def take_in(self, order: TakeInstall) -> None:
        self._inbox.append(order)  # the oldest is lost when the disk does not follow; it is sent again
        if not self._receiving:
            self._receiving = True
            self._spawn(self._receive(), "raft snapshot received")

    async def _receive(self) -> None:
        try:
            while self._inbox:
                order = self._inbox.popleft()
                if asyncio.get_running_loop().time() < self._not_before_s or order.message.index <= self._core.commit:
                    continue
                try:
                    await self._take_piece(order)
                except IdunnoError as error:
                    rest_s = INCOMPLETE_RETRY_S if isinstance(error, Unavailable) else RETRY_S
                    self._not_before_s = asyncio.get_running_loop().time() + rest_s
                    log.warning("snapshot not taken in", extra={"from": order.sender, "problem": str(error)})
                    await self._drop_part_if_possible()
                    if isinstance(error, DiskFailed):
                        await self._log.use_reserve()
        finally:
            self._receiving = False

    async def _take_piece(self, order: TakeInstall) -> None:
        message = order.message
        if self._part is None or not self._part.is_of(order):
            if message.offset == 0 and 0 < message.size <= files.BYTES_MAX:
                await self._drop_part()
                file = await self._disk.open(files.PART_PATH, create=True)
                self._part = _Part(order, file)
                await file.truncate(0)  # what could not be removed
            else:
                self._answer(order, 0)
                return
        part = self._part
        if message.offset == part.have < message.size and 0 < len(message.data) <= message.size - part.have:
            await part.file.write(part.have, [message.data])
            part.have += len(message.data)
        self._answer(order, part.have)
        if part.have == message.size:
            await part.file.sync()
            await self._take_whole(order)
            await self._drop_part()

    def _answer(self, order: TakeInstall, offset: int) -> None:
        self._send(order.sender, InstallAnswer(order.message.term, order.message.index, offset))

    async def _drop_part(self) -> None:
        if self._part is not None:
            part, self._part = self._part, None
            await part.file.close()
            await files.clear(self._disk, [files.PART_PATH])

    async def _drop_part_if_possible(self) -> None:
        try:
            await self._drop_part()
        except IdunnoError as error:  # the next part is written over it
            log.warning("part of a snapshot not removed", extra={"problem": str(error)})

    async def _take_whole(self, order: TakeInstall) -> None:
        """The file is here: check it, get what it refers to, put it in place."""
        message = order.message
        alive = self._spawn(self._say_alive(order), "raft snapshot keep-alive")
        try:
            reader = await files.Reader.open(self._disk, files.PART_PATH)
            try:
                head = reader.head
                if (head.index, head.term) != (message.index, message.last_term):
                    raise Corrupt(f"{order.sender} sent a snapshot of {head.index}, not of {message.index}")
                restore = await self._read(reader)
            finally:
                await reader.close()
            if not await self._complete(restore, order):
                return
            async with self._lock:  # one of its own may be being taken, and that can last
                if head.index > self._core.commit and self._core.terms.term(head.index) != head.term:
                    await files.replace(self._disk, files.PART_PATH)
                    self.index, self._bytes, self._log_bytes = head.index, message.size, 0
                self.incoming = restore
                self._step(Installed(order.sender, head.index, head.term, frozenset(head.voters), head.voters_index))
                self.incoming = None
        finally:
            alive.cancel()
        log.info("snapshot taken in", extra={"index": head.index, "bytes": message.size, "from": order.sender})

    async def _complete(self, restore: Restore, order: TakeInstall) -> bool:
        """False when there is another leader: perhaps it has what is missing, or a newer snapshot. Raises Unavailable."""
        now_s, index = asyncio.get_running_loop().time, order.message.index
        end_s = now_s() + COMPLETE_S
        while True:
            try:
                await restore.complete(order.sender)
                return True
            except IdunnoError as error:
                log.warning("snapshot not complete yet", extra={"index": index, "problem": str(error)})
                if now_s() >= end_s:
                    raise Unavailable(f"snapshot {index} not complete after {COMPLETE_S:g} s: {error}") from error
            if self._core.leader not in (order.sender, None):
                return False
            await asyncio.sleep(RESEND_S)

    async def _say_alive(self, order: TakeInstall) -> None:
        while True:
            self._answer(order, order.message.size)
            await asyncio.sleep(RESEND_S / 2)


class _Part:
    """A snapshot that is being taken in."""

    def __init__(self, order: TakeInstall, file: File) -> None:
        self._sender, self._of, self.file, self.have = order.sender, _identity(order.message), file, 0

    def is_of(self, order: TakeInstall) -> bool:
        return self._sender == order.sender and self._of == _identity(order.message)


def _identity(message: Install) -> tuple[int, int, int, int]:
    return message.term, message.index, message.last_term, message.size
