# idunno/node/seed.py: where the members are now, from one that is where the operator says (`node run --seed`).
#
# Rule 1: whoever shows a member's certificate at the seed's address is that member, and there it is now. What it knows of others
#         comes on top: it may have started a moment ago itself, and gossip brings the rest.
# Rule 2: who joined while a node was away, stopped or cut off, is told to it by the members that it knows (`meet_newcomers`).
# Rule 3: the seed is asked until it has answered once: it may start after this node.
from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from ssl import SSLContext
from typing import Final

import msgspec

from idunno.base.errors import IdunnoError
from idunno.base.ids import NodeId
from idunno.coordinator.messages import KNOWN_MEMBERS, MEMBERS, MemberAddress, Members
from idunno.node.config import parse_address
from idunno.node.known import Known
from idunno.wire.calls import Empty, Peers
from idunno.wire.rpc import connect_tcp

log = logging.getLogger("idunno.node")

SEED_S: Final = 5.0
MEET_S: Final = 2.0
"""Who starts has usually caught up within this, and asks nobody."""
AGAIN_S: Final = 1.0
"""Between two attempts: a process takes seconds to start."""


async def ask_until_answered(
    seed: str, client_tls: SSLContext | None, known: Known, learned: Callable[[], None]
) -> None:
    """`ask_seed` again and again, until it answers or is not needed any more; then `learned`."""
    while not known.is_caught_up:
        await asyncio.sleep(AGAIN_S)
        if await ask_seed(seed, client_tls, known):
            learned()
            return


async def meet_newcomers(
    me: NodeId,
    peers: Peers,
    known: Known,
    *,
    has_leader: Callable[[], bool],
    follows: Callable[[], bool],
    learned: Callable[[], None],
    caught_up: Callable[[], None],
) -> None:
    """While this node hears no leader, ask the members that it knows for those that it does not.

    `follows`: whether it has applied what it has of a leader that its own roster holds; then the roster alone counts again.
    """
    alone = 0
    while True:
        await asyncio.sleep(MEET_S)
        if has_leader():
            alone = 0
            if known.has_newcomers and follows():
                caught_up()
            continue
        alone += 1
        if known.is_caught_up and alone == 1:
            continue  # an election takes a second
        for member in known.members():
            if member.node == me or has_leader():
                continue
            try:
                answer = await peers.to(member.node).call(KNOWN_MEMBERS, Empty(), timeout_s=MEET_S)
            except IdunnoError as error:
                log.debug("did not tell its members", extra={"node_id": member.node, "error": str(error)})
                continue
            if known.meet_newcomers(answer.members):
                log.info("newcomers met", extra={"told_by": member.name})
                learned()


async def ask_seed(seed: str, client_tls: SSLContext | None, known: Known) -> bool:
    """Learn where the members are. False when the seed does not answer: told in the log, and no reason not to start."""
    host, port = parse_address(seed)
    try:
        connection = await connect_tcp(host, port, client_tls, expect=None, timeout_s=SEED_S)
    except IdunnoError as error:
        log.warning("seed did not answer", extra={"seed": seed, "error": str(error)})
        return False
    try:
        old = {member.node: member for member in known.members()}
        shown = [member for member in old.values() if member.fingerprint == connection.fingerprint]
        known.meet([msgspec.structs.replace(member, address=seed) for member in shown])
        answer = await connection.call(MEMBERS, Members(), timeout_s=SEED_S)
        known.meet(
            [
                MemberAddress(row.id, row.name, row.address, old[row.id].fingerprint, old[row.id].voter)
                for row in answer.members
                if row.id in old and old[row.id] not in shown
            ]
        )
        return True
    except IdunnoError as error:
        log.warning("seed did not answer", extra={"seed": seed, "error": str(error)})
        return bool(shown)
    finally:
        await connection.close()
