# idunno/client/operations.py: the cluster itself: members, status, tokens, users, logs.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from idunno.base.errors import DecodeError, InvalidArgument
from idunno.client.base import Base, new_request
from idunno.coordinator.messages import (
    MEMBER_EVENTS,
    MEMBERS,
    NODE_LEAVE,
    NODE_REMOVE,
    STATUS,
    TOKEN_LIST,
    TOKEN_NEW,
    TOKEN_REVOKE,
    UPGRADE,
    UPGRADE_CHECK,
    USER_REVOKE,
    USERS,
    ById,
    GoneNode,
    LeaveNode,
    Member,
    MemberEvent,
    Members,
    NewToken,
    NewTokenAnswer,
    RemoveDead,
    Status,
    StatusAnswer,
    TokenRow,
    Upgrade,
    UpgradeAnswer,
    UserRow,
)
from idunno.grep.messages import QUERY, Line, LineBatch, Query, QueryAnswer
from idunno.wire.calls import Empty

LEAVE_S: Final = 3_600.0
"""All copies of a node are moved meanwhile: 180 GB at 50 MB/s."""
GREP_S: Final = 300.0
"""A search over all logs: they are bounded in size, so minutes are plenty."""
TOKEN_ROLES: Final = ("node", "admin", "user", "reader")


class Operations(Base):
    async def members(self) -> list[Member]:
        """The members as the node that answers sees them."""
        return (await self._ask(MEMBERS, Members())).members

    async def member_events(self) -> list[MemberEvent]:
        """The last changes of members' states, oldest first, as the node that answers saw them."""
        return (await self._ask(MEMBER_EVENTS, Empty())).events

    async def status(self) -> StatusAnswer:
        return await self._ask(STATUS, Status())

    async def new_token(self, role: str, *, ttl_s: int = 86_400) -> NewTokenAnswer:
        """A token to join (role node) or to log in with; its text is shown this once. Raises InvalidArgument."""
        if role not in TOKEN_ROLES:
            raise InvalidArgument(f"role {role!r}: a token is for one of {', '.join(TOKEN_ROLES)}")
        return await self._ask(TOKEN_NEW, NewToken(role, ttl_s, new_request()))

    async def tokens(self) -> list[TokenRow]:
        return (await self._ask(TOKEN_LIST, Empty())).tokens

    async def revoke_token(self, token_id: str) -> None:
        await self._ask(TOKEN_REVOKE, ById(token_id, new_request()))

    async def users(self) -> list[UserRow]:
        return (await self._ask(USERS, Empty())).users

    async def revoke_user(self, name: str) -> None:
        """The user's certificate no longer works; live connections are cut."""
        await self._ask(USER_REVOKE, ById(name, new_request()))

    async def leave(self, node: str) -> GoneNode:
        """Have a node leave for good: its copies are moved, it votes no more, it is out of the roster. Takes what moving takes.

        Raises NotFound, Conflict.
        """
        return await self._ask(NODE_LEAVE, LeaveNode(node, new_request()), self._deadline(LEAVE_S))

    async def remove(self, node: str) -> GoneNode:
        """Take a node that is down for good out of the roster. Raises NotFound, Conflict when it is up."""
        return await self._ask(NODE_REMOVE, RemoveDead(node, new_request()))

    async def upgrade(self, *, check: bool = False) -> UpgradeAnswer:
        """Raise the cluster's machine version to the newest that all nodes know; `check`: only say whether that can be.

        Raises Conflict, naming the nodes that are not ready.
        """
        return await self._ask(UPGRADE_CHECK if check else UPGRADE, Upgrade(check, new_request()))

    async def grep(
        self,
        pattern: str,
        heard: Callable[[list[Line]], None],
        *,
        ignore_case: bool = False,
        invert: bool = False,
        count_only: bool = False,
        before: int = 0,
        after: int = 0,
        since_ms: int | None = None,
        until_ms: int | None = None,
        level: str = "",
        nodes: Sequence[str] = (),
        limit: int = 10_000,
    ) -> QueryAnswer:
        """Search the logs of all living nodes; `heard` gets the lines as they come. Raises InvalidArgument."""
        query = Query(
            pattern=pattern,
            ignore_case=ignore_case,
            invert=invert,
            count_only=count_only,
            before=before,
            after=after,
            since_ms=since_ms,
            until_ms=until_ms,
            level=level,
            nodes=list(nodes),
            limit=limit,
        )
        deadline = self._deadline(GREP_S)
        async with self.session.open(QUERY, query, timeout_s=deadline.left_s("grep")) as stream:
            while (item := await stream.receive()) is not None:
                try:
                    batch = msgspec.msgpack.decode(item.note, type=LineBatch)
                except msgspec.MsgspecError as error:
                    raise DecodeError(f"{len(item.note)} bytes of grep's answer are no lines: {error}") from error
                heard(batch.lines)
            return await stream.answer()
