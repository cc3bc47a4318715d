# idunno/coordinator/service.py: the coordinator's calls: proposing, reading, tokens, users, joining.
#
# Rule 1: any node answers; what only the leader can do is passed on to it, once: a leader that is none any more says NotLeader
#         to the node that asked, which looks for the new one.
# Rule 2: commands come from nodes only, on behalf of whom they name. People use the calls of the parts, which check more.
from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from idunno.base.errors import InvalidArgument, NotLeader, PermissionDenied
from idunno.base.version import VERSION
from idunno.coordinator import messages as m
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import AddToken, RevokeToken, RevokeUser, decode_command
from idunno.coordinator.enroll import Enrolment
from idunno.coordinator.records import TokenRecord
from idunno.coordinator.roster import TOKEN_ROLES
from idunno.coordinator.views import iso_time, token_row, user_row
from idunno.wire import security
from idunno.wire.answering import left_s
from idunno.wire.calls import A, Call, Empty, Method, Q, Registrar
from idunno.wire.tokens import make_token

TTL_MAX_S: Final = 366 * 24 * 3600
"""A token is for letting somebody in, not for keeping."""


class CoordinatorService:
    def __init__(
        self,
        coordinator: Coordinator,
        registrar: Registrar,
        *,
        ca_pem: bytes,
        ca_key_pem: Callable[[], bytes | None],
        version: str = VERSION,
        succeeds: tuple[m.Succession, ...] = (),
    ) -> None:
        """Registers its handlers. `ca_key_pem`: None on a node that does not hold the CA's key."""
        self._coordinator, self._ca_pem, self._version = coordinator, ca_pem, version
        self._succeeds = succeeds
        self._enrolment = Enrolment(coordinator, ca_pem=ca_pem, ca_key_pem=ca_key_pem)
        registrar.register(m.PROPOSE, self._propose)
        registrar.register(m.READ_INDEX, self._read_index)
        registrar.register(m.HELLO, self._hello)
        registrar.register(m.ENROLL, self._enroll)
        registrar.register(m.TOKEN_NEW, self._token_new)
        registrar.register(m.TOKEN_LIST, self._token_list)
        registrar.register(m.TOKEN_REVOKE, self._token_revoke)
        registrar.register(m.USERS, self._users)
        registrar.register(m.USER_REVOKE, self._user_revoke)

    # -- between nodes ------------------------------------------------------------------------------------------------

    async def check_token(self, text: str, timeout_s: float) -> TokenRecord:
        """The record of a token that holds. Raises InvalidArgument, Unauthenticated, NoQuorum."""
        return await self._enrolment.check_token(text, timeout_s)

    async def _propose(self, call: Call[m.Propose]) -> m.Proposed:
        if call.peer.node is None:
            raise PermissionDenied("commands come from nodes; use the calls for files, models and jobs")
        command = decode_command(call.request.command)
        done = await self._coordinator.propose_here(
            command, actor=call.actor, request=call.request.request, timeout_s=call.remaining_s()
        )
        return msgspec.structs.replace(done, result=msgspec.to_builtins(done.result, builtin_types=(bytes,)))

    async def _read_index(self, call: Call[m.ReadIndex]) -> m.ReadIndexAnswer:
        return await self._coordinator.read_index_here(call.remaining_s())

    async def _at_leader(
        self, method: Method[Q, A], call: Call[Q], here: Callable[[float], Awaitable[A]], *, again: bool
    ) -> A:
        """`here` at the leader; a call that a node passed on already is not passed on again."""
        if call.peer.node is not None and self._coordinator.driver.leader != self._coordinator.me:
            raise NotLeader(f"{self._coordinator.me} does not lead")
        if call.peer.node is not None:
            return await here(left_s(call))
        return await self._coordinator.ask_leader(
            method, call.request, here, timeout_s=left_s(call), actor=call.actor, again=again
        )

    # -- joining ------------------------------------------------------------------------------------------------------

    async def _hello(self, call: Call[m.Hello]) -> m.HelloAnswer:
        roster = self._coordinator.machine.roster
        return m.HelloAnswer(roster.cluster, self._ca_pem, self._version, self._succeeds)

    async def _enroll(self, call: Call[m.Enroll]) -> m.EnrollAnswer:
        request = call.request

        async def here(timeout_s: float) -> m.EnrollAnswer:
            return await self._enrolment.enroll(request, timeout_s)

        return await self._at_leader(m.ENROLL, call, here, again=True)

    # -- tokens and users ---------------------------------------------------------------------------------------------

    async def _token_new(self, call: Call[m.NewToken]) -> m.NewTokenAnswer:
        request, actor = call.request, call.actor
        if request.role not in TOKEN_ROLES:
            raise InvalidArgument(f"role {request.role[:40]!r} is none of {', '.join(TOKEN_ROLES)}")
        if not 1 <= request.ttl_s <= TTL_MAX_S:
            raise InvalidArgument(f"a token holds for 1 s to {TTL_MAX_S // 86_400} days, not {request.ttl_s} s")

        async def here(timeout_s: float) -> m.NewTokenAnswer:
            # Made at the leader: expiry counts by its clock, which also moves machine time.
            text, token, secret_hash = make_token(security.fingerprint(self._ca_pem))
            expires_ms = self._now_ms() + request.ttl_s * 1000
            record = TokenRecord(token, request.role, secret_hash, expires_ms, actor.name)
            await self._coordinator.propose_here(
                AddToken(record), actor=actor, request=request.request, timeout_s=timeout_s
            )
            return m.NewTokenAnswer(token, text, request.role, iso_time(expires_ms))

        # Asked twice it makes two tokens; the one whose text nobody has seen lets nobody in.
        return await self._at_leader(m.TOKEN_NEW, call, here, again=True)

    async def _token_list(self, call: Call[Empty]) -> m.TokenRows:
        machine = await self._coordinator.read(left_s(call))
        return m.TokenRows([token_row(token, self._now_ms()) for token in machine.roster.tokens()])

    async def _token_revoke(self, call: Call[m.ById]) -> Empty:
        await self._command(RevokeToken(call.request.id), call)
        return Empty()

    async def _users(self, call: Call[Empty]) -> m.UserRows:
        machine = await self._coordinator.read(left_s(call))
        return m.UserRows([user_row(user) for user in machine.roster.users()])

    async def _user_revoke(self, call: Call[m.ById]) -> Empty:
        await self._command(RevokeUser(call.request.id), call)
        return Empty()

    async def _command(self, command: RevokeToken | RevokeUser, call: Call[m.ById]) -> Any:
        result, _ = await self._coordinator.propose(
            command, actor=call.actor, request=call.request.request, timeout_s=left_s(call)
        )
        return result

    def _now_ms(self) -> int:
        return max(self._coordinator.machine.now_ms, self._coordinator.now_ms())
