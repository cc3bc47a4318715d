# idunno/coordinator/enroll.py: how a stranger with a token becomes a node or a user. The leader's part.
#
# Rule 1: the secret is compared in constant time; who does not know it learns nothing else about the token.
# Rule 2: the leader alone says what a certificate says: the request's key is used, its names are not.
# Rule 3: the same key asking again gets the certificate of the first time: the answer may have been lost, the roster has it.
from __future__ import annotations

import hmac
from collections.abc import Callable

from idunno.base.errors import InvalidArgument, NotReady, Unauthenticated
from idunno.base.ids import NodeId, check_label
from idunno.coordinator.client import Coordinator
from idunno.coordinator.commands import AddNode, AddUser
from idunno.coordinator.messages import Enroll, EnrollAnswer
from idunno.coordinator.records import NodeRecord, TokenRecord, UserRecord
from idunno.coordinator.results import NodeAdded, UserAdded
from idunno.coordinator.views import member_address
from idunno.wire import security
from idunno.wire.calls import Actor, Role
from idunno.wire.tokens import check_ca, hash_secret, parse_token


class Enrolment:
    def __init__(self, coordinator: Coordinator, *, ca_pem: bytes, ca_key_pem: Callable[[], bytes | None]) -> None:
        """`ca_key_pem`: the CA's key, None on a node that does not hold it (only voters do, and only they lead)."""
        self._coordinator, self._ca_pem, self._ca_key_pem = coordinator, ca_pem, ca_key_pem
        self._ca_fingerprint = security.fingerprint(ca_pem)

    async def enroll(self, request: Enroll, timeout_s: float) -> EnrollAnswer:
        """Raises Unauthenticated, InvalidArgument, Conflict (a name or id in use), NotReady, and what proposing raises."""
        token = await self.check_token(request.token, timeout_s)
        key = security.key_fingerprint(request.csr_pem)
        if token.role == Role.NODE.value:
            if request.node is None:
                raise Unauthenticated("this token is for a node: use it with `idunno join`, not `idunno login`")
            return await self._node(request, request.node, key, token, timeout_s)
        if request.node is not None:
            raise Unauthenticated(f"this token is for a {token.role}: use it with `idunno login`, not `idunno join`")
        return await self._user(request, key, token, timeout_s)

    async def check_token(self, text: str, timeout_s: float) -> TokenRecord:
        """The token's record, if the text proves it and it still holds. Raises InvalidArgument, Unauthenticated, NoQuorum."""
        try:
            return self._proven(text)
        except Unauthenticated:
            # This node, a new leader too, may yet have to apply what made the token: refuse only by what is certainly true.
            await self._coordinator.read(timeout_s)
            return self._proven(text)

    def _proven(self, text: str) -> TokenRecord:
        parsed = parse_token(text)
        check_ca(parsed, self._ca_fingerprint)
        record = self._coordinator.machine.roster.token(parsed.token_id)
        known = record.secret_hash if record is not None else bytes(32)
        if not hmac.compare_digest(hash_secret(parsed.secret), known) or record is None:
            raise Unauthenticated("this token is not known here; ask an admin for `idunno token new`")
        if record.revoked or record.expires_ms <= self._coordinator.now_ms():
            how = "was revoked" if record.revoked else "has expired"
            raise Unauthenticated(
                f"token {record.token} {how}; ask an admin for `idunno token new --role {record.role}`"
            )
        return record

    async def _node(
        self, request: Enroll, node: NodeId, key: bytes, token: TokenRecord, timeout_s: float
    ) -> EnrollAnswer:
        record = self._coordinator.machine.roster.find(node)
        if record is None or record.key != key:
            certificate = self._sign(request.csr_pem, node, Role.NODE)
            new = NodeRecord(
                node=node,
                name=check_label("node", request.name),
                address=request.address,
                fingerprint=security.fingerprint(certificate),
                slots=request.slots,
                zone=request.zone,
                software=request.software,
                key=key,
                certificate=certificate,
            )
            added = await self._propose(AddNode(new, token.token), timeout_s)
            assert isinstance(added, NodeAdded)
            record = added.node
        return self._answer(
            record.certificate, Role.NODE.value, record.name, self._coordinator.machine.roster.cluster_key
        )

    async def _user(self, request: Enroll, key: bytes, token: TokenRecord, timeout_s: float) -> EnrollAnswer:
        record = self._coordinator.machine.roster.user(request.name)
        if record is None or record.key != key:
            certificate = self._sign(request.csr_pem, check_label("user", request.name), Role(token.role))
            new = UserRecord(
                name=request.name,
                role=token.role,
                fingerprint=security.fingerprint(certificate),
                key=key,
                certificate=certificate,
            )
            added = await self._propose(AddUser(new, token.token), timeout_s)
            assert isinstance(added, UserAdded)
            record = added.user
        return self._answer(record.certificate, record.role, record.name, b"")

    async def _propose(self, command: AddNode | AddUser, timeout_s: float) -> object:
        me = Actor(self._coordinator.me, Role.NODE)
        done = await self._coordinator.propose_here(command, actor=me, request="", timeout_s=timeout_s)
        return done.result

    def _sign(self, csr_pem: bytes, common_name: str, role: Role) -> bytes:
        ca_key_pem = self._ca_key_pem()
        if ca_key_pem is None:
            raise NotReady("the leader does not hold the CA's key (ca.key in its directory), so nobody can join")
        return security.sign(self._ca_pem, ca_key_pem, csr_pem, common_name=common_name, role=role)

    def _answer(self, certificate: bytes, role: str, name: str, cluster_key: bytes) -> EnrollAnswer:
        if not certificate:
            raise InvalidArgument(f"{name} was there from the beginning, its certificate is in its own directory")
        roster = self._coordinator.machine.roster
        members = [member_address(node) for node in roster.nodes()]
        return EnrollAnswer(roster.cluster, certificate, role, name, members, cluster_key)
