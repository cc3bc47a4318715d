# idunno/node/keys.py: the keys of the cluster that this node holds, as they change while it runs.
#
# Rule 1: the CA's key comes from the leader, over TLS, to a node that is to vote; it is on disk, mode 0600, before it answers.
# Rule 2: a new cluster key is in the log. For a minute both open datagrams; half of it the old one still seals, so that who
#         hears of the new one late is not deaf meanwhile.
from __future__ import annotations

import asyncio
import logging
from typing import Final

from idunno.base.disk import Disk
from idunno.base.errors import IdunnoError, InvalidArgument, PermissionDenied
from idunno.coordinator.messages import CA_KEY, CaKey
from idunno.coordinator.roster import Roster
from idunno.node.identity import Secrets
from idunno.wire.calls import Call, Empty, Registrar
from idunno.wire.sealed import Opener, Sealer
from idunno.wire.security import is_key_of

log = logging.getLogger("idunno.node")

OPENS_S: Final = 60.0
SEALS_S: Final = 30.0


class Keys:
    def __init__(self, held: Secrets, sealer: Sealer, opener: Opener, disk: Disk, registrar: Registrar) -> None:
        self.ca_key_pem = held.ca_key_pem
        self._ca_pem, self._key = held.ca_pem, held.cluster_key
        self._sealer, self._opener, self._disk = sealer, opener, disk
        self._timers: list[asyncio.TimerHandle] = []
        self._writing: asyncio.Task[None] | None = None
        self._written = held.cluster_key
        registrar.register(CA_KEY, self._take_ca_key)

    async def _take_ca_key(self, call: Call[CaKey]) -> Empty:
        if call.peer.node is None:
            raise PermissionDenied("the CA's key comes from nodes only")
        if not is_key_of(self._ca_pem, call.request.key_pem):
            raise InvalidArgument("this is not the key of this cluster's CA")
        if call.request.key_pem != self.ca_key_pem:
            await self._disk.replace("ca.key", call.request.key_pem, mode=0o600)
            self.ca_key_pem = call.request.key_pem
        return Empty()

    def follow(self, roster: Roster) -> None:
        """The roster changed: perhaps so did the cluster's key."""
        if roster.cluster_key == self._key:
            return
        old, self._key = self._key, roster.cluster_key
        self.close_timers()
        self._opener.rekey([self._key, old])
        loop = asyncio.get_running_loop()
        self._timers = [
            loop.call_later(SEALS_S, self._sealer.rekey, [self._key]),
            loop.call_later(OPENS_S, self._opener.rekey, [self._key]),
        ]
        log.info("cluster key renewed")
        if self._writing is None:
            self._writing = loop.create_task(self._write(), name="cluster.key")

    async def _write(self) -> None:
        try:
            while self._written != self._key:
                key = self._key
                await self._disk.replace("cluster.key", key.hex().encode(), mode=0o600)
                self._written = key
        except IdunnoError as error:
            log.warning("cluster key not written", extra={"problem": str(error)})  # the log has it
        finally:
            self._writing = None

    def close_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers = []

    async def close(self) -> None:
        self.close_timers()
        if self._writing is not None:
            await self._writing
