# idunno/node/seed.py: where the members are now, from one that is where the operator says (`node run --seed`).
from __future__ import annotations

import logging
from ssl import SSLContext
from typing import Final

from idunno.base.errors import IdunnoError
from idunno.coordinator.messages import MEMBERS, MemberAddress, Members
from idunno.node.config import parse_address
from idunno.node.known import Known
from idunno.wire.rpc import connect_tcp

log = logging.getLogger("idunno.node")

SEED_S: Final = 5.0


async def ask_seed(seed: str, client_tls: SSLContext | None, known: Known) -> None:
    """Learn the members' present addresses; a seed that does not answer is told in the log, and no reason not to start."""
    host, port = parse_address(seed)
    try:
        connection = await connect_tcp(host, port, client_tls, expect=None, timeout_s=SEED_S)
    except IdunnoError as error:
        log.warning("seed did not answer", extra={"seed": seed, "error": str(error)})
        return
    try:
        answer = await connection.call(MEMBERS, Members(), timeout_s=SEED_S)
        old = {member.node: member for member in known.members()}
        known.meet(
            [
                MemberAddress(row.id, row.name, row.address, old[row.id].fingerprint, old[row.id].voter)
                for row in answer.members
                if row.id in old
            ]
        )
    except IdunnoError as error:
        log.warning("seed did not answer", extra={"seed": seed, "error": str(error)})
    finally:
        await connection.close()
