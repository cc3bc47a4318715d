# idunno/coordinator/roster.py: who belongs to the cluster, and what is known of them for certain.
#
# Rule 1: counts of copies follow this roster, never what gossip believes: only then do all nodes count alike.
# Rule 2: a node id, a name and a certificate stand here once each; what would use one twice is refused.
# Rule 3: every method either raises and has changed nothing, or has done all of it.
from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from idunno.base.errors import Conflict, Exhausted, Incompatible, InvalidArgument, NotFound, Unauthenticated
from idunno.base.ids import NodeId, check_label, printable
from idunno.coordinator.commands import Genesis, UpdateNode
from idunno.coordinator.names import check_request
from idunno.coordinator.records import (
    COPIES_WANTED,
    MACHINE_VERSION,
    NodeRecord,
    Record,
    TokenRecord,
    UserRecord,
)
from idunno.coordinator.results import Done, NodeAdded, UserAdded
from idunno.coordinator.rows import Row
from idunno.wire.calls import Actor, Peer, Role

NODES_MAX: Final = 10_000
USERS_MAX: Final = 10_000
TOKENS_MAX: Final = 1_000
SLOTS_MAX: Final = 1_024
TOKEN_KEPT_MS: Final = 30 * 24 * 3600 * 1000
"""How long an expired token is still listed, so that its owner sees why it no longer works."""
TEXT_MAX: Final = 1_000
"""Characters kept of a reason, an address or a version that somebody else wrote."""
PRESENCES: Final = ("present", "failed", "stopped")
TOKEN_ROLES: Final = (Role.NODE.value, Role.ADMIN.value, Role.USER.value, Role.READER.value)


class RosterState(Record, frozen=True):
    cluster: str = ""
    cluster_key: bytes = b""
    machine_version: int = (
        1  # stays 1 whatever this release knows: what is left out of a snapshot must mean the same for ever
    )
    nodes: tuple[NodeRecord, ...] = ()
    users: tuple[UserRecord, ...] = ()
    tokens: tuple[TokenRecord, ...] = ()
    key_is_stale: bool = False  # a node that is out knows the cluster's key


class Roster:
    def __init__(self, state: RosterState | None = None) -> None:
        self._load(state if state is not None else RosterState())

    def _load(self, state: RosterState) -> None:
        self.cluster = state.cluster
        self.cluster_key = state.cluster_key
        self.machine_version = state.machine_version
        self.key_is_stale = state.key_is_stale
        self.present = 0  # nodes held present
        self._nodes: dict[NodeId, NodeRecord] = {}
        self._users: dict[str, UserRecord] = {}
        self._tokens: dict[str, TokenRecord] = {token.token: token for token in state.tokens}
        self._by_name: dict[str, NodeId] = {}
        self._by_fingerprint: dict[bytes, Peer] = {}
        for node in state.nodes:
            self._keep_node(node)
        for user in state.users:
            self._keep_user(user)

    def state(self) -> RosterState:
        return RosterState(
            self.cluster,
            self.cluster_key,
            self.machine_version,
            tuple(self._nodes.values()),
            tuple(self._users.values()),
            tuple(self._tokens.values()),
            self.key_is_stale,
        )

    def capture(self) -> Iterator[Row]:
        """Rows for a snapshot, as things are now."""
        return _rows(self.state())

    # -- reading ------------------------------------------------------------------------------------------------------

    def find(self, node: NodeId) -> NodeRecord | None:
        return self._nodes.get(node)

    def node(self, node: NodeId) -> NodeRecord:
        """Raises NotFound."""
        record = self._nodes.get(node)
        if record is None:
            raise NotFound(f"no node {node[:80]} in the roster; see `idunno members`")
        return record

    def resolve(self, name_or_id: str) -> NodeRecord:
        """The node of that name, or else of that id. Raises NotFound."""
        return self.node(self._by_name.get(name_or_id, NodeId(name_or_id)))

    def name(self, node: NodeId) -> str:
        """The node's name for people; its id when it is not (any more) in the roster."""
        record = self._nodes.get(node)
        return record.name if record is not None else node

    def nodes(self) -> list[NodeRecord]:
        """All nodes, in the order in which they joined."""
        return list(self._nodes.values())

    def user(self, name: str) -> UserRecord | None:
        return self._users.get(name)

    def users(self) -> list[UserRecord]:
        return list(self._users.values())

    def token(self, token: str) -> TokenRecord | None:
        return self._tokens.get(token)

    def tokens(self) -> list[TokenRecord]:
        return list(self._tokens.values())

    def peer(self, fingerprint: bytes) -> Peer | None:
        """Who holds the certificate with that fingerprint: a node or a user. None: nobody, any more."""
        return self._by_fingerprint.get(fingerprint)

    @property
    def size(self) -> int:
        """Nodes, present or not."""
        return len(self._nodes)

    def acknowledge_copies(self) -> int:
        """On how many nodes an entry must be synced before its reply leaves: min(4, present nodes), at least 1."""
        return min(COPIES_WANTED, self.present) or 1

    def copies_wanted(self) -> int:
        """How many copies of a block there should be: min(4, all nodes), at least 1."""
        return min(COPIES_WANTED, len(self._nodes)) or 1

    # -- nodes --------------------------------------------------------------------------------------------------------

    def begin(self, command: Genesis, now_ms: int) -> Done:
        """The first entry of the log."""
        if self.cluster:
            raise Conflict(f"this log belongs to cluster {self.cluster} already")
        if command.machine_version > MACHINE_VERSION:
            raise Incompatible(
                f"the log needs machine version {command.machine_version}, this idunno has {MACHINE_VERSION}: upgrade it"
            )
        fresh = Roster()
        for node in command.nodes:
            fresh._check_new_node(node)
            fresh._keep_node(msgspec.structs.replace(node, since_ms=now_ms))
        nodes = tuple(fresh.nodes())
        self._load(
            RosterState(
                command.cluster, command.cluster_key, command.machine_version, nodes, users=(), tokens=command.tokens
            )
        )
        return Done()

    def add_node(self, node: NodeRecord, token: str, now_ms: int) -> NodeAdded:
        old = self._nodes.get(node.node)
        if old is not None and old.key != b"" and old.key == node.key:
            return NodeAdded(old, changed=False)
        self._check_token(token, Role.NODE.value, now_ms)
        self._check_new_node(node)
        # It has a certificate, but nobody runs it yet. Counted present now, every reply would wait for its copy until it starts.
        new = msgspec.structs.replace(
            node, presence="stopped", boot=0, voter=False, since_ms=now_ms, reason="has not been started yet"
        )
        self._keep_node(new)
        return NodeAdded(new)

    def update_node(self, command: UpdateNode, now_ms: int) -> Done:
        old = self.node(command.node)
        if command.boot < old.boot:
            raise Conflict(
                f"node {old.name} says boot {command.boot}, but boot {old.boot} of it was seen: this data directory is a "
                f"copy or was restored from an old image; join with an empty directory instead"
            )
        _check_node_texts(command.address, command.zone, command.software, command.slots)
        new = msgspec.structs.replace(
            old,
            address=command.address,
            boot=command.boot,
            slots=command.slots,
            zone=command.zone,
            software=command.software,
        )
        if command.boot > old.boot and old.presence != "present":
            new = msgspec.structs.replace(new, presence="present", since_ms=now_ms, reason="")
        if new == old:
            return Done(changed=False)
        self._keep_node(new)
        return Done()

    def set_presence(self, node: NodeId, presence: str, boot: int, reason: str, now_ms: int) -> Done:
        old = self.node(node)
        if presence not in PRESENCES:
            raise InvalidArgument(f"presence {presence[:40]!r} is none of {', '.join(PRESENCES)}")
        if boot < old.boot or (boot == old.boot and presence == old.presence):
            return Done(changed=False)
        self._keep_node(
            msgspec.structs.replace(old, presence=presence, boot=boot, since_ms=now_ms, reason=reason[:TEXT_MAX])
        )
        return Done()

    def remove_node(self, node: NodeId) -> NodeRecord:
        """Out for good; it knows the cluster's key, which is to be renewed. Raises NotFound, Conflict while it votes."""
        record = self.node(node)
        if record.voter:
            raise Conflict(f"{record.name} still votes; `idunno leave {record.name}` ends that first")
        self.key_is_stale = True
        self.present -= record.presence == "present"
        del self._nodes[node]
        del self._by_name[record.name]
        del self._by_fingerprint[record.fingerprint]
        return record

    def raise_version(self, version: int) -> Done:
        if version <= self.machine_version:
            return Done(changed=False)
        self.machine_version = version
        return Done()

    def renew_key(self, cluster_key: bytes) -> Done:
        if len(cluster_key) != 32:
            raise InvalidArgument(f"a cluster key has 32 bytes, this one {len(cluster_key)}")
        if not self.key_is_stale:
            return Done(changed=False)  # renewed by somebody else meanwhile
        self.cluster_key, self.key_is_stale = cluster_key, False
        return Done()

    def set_voters(self, voters: frozenset[NodeId]) -> Done:
        """What an entry of the log that names the voters said; each node's `voter` follows it."""
        changed = [node for node in self._nodes.values() if node.voter != (node.node in voters)]
        for node in changed:
            self._keep_node(msgspec.structs.replace(node, voter=not node.voter))
        return Done(changed=bool(changed))

    def _check_new_node(self, node: NodeRecord) -> None:
        check_label("node", node.name)
        if len(node.node) != 16 or any(c not in "0123456789abcdef" for c in node.node):
            raise InvalidArgument(f"{node.node[:40]!r} is no node id: 16 hex digits")
        if len(node.fingerprint) != 32:
            raise InvalidArgument(f"a certificate's fingerprint has 32 bytes, this one {len(node.fingerprint)}")
        _check_node_texts(node.address, node.zone, node.software, node.slots)
        if node.presence not in PRESENCES:
            raise InvalidArgument(f"presence {node.presence[:40]!r} is none of {', '.join(PRESENCES)}")
        same = self._nodes.get(node.node)
        if same is not None:
            raise Conflict(
                f"node id {node.node} belongs to {same.name} at {same.address}, and {node.address} comes with another key: "
                f"this data directory is a copy; join with an empty one"
            )
        holder = self._by_name.get(node.name)
        if holder is not None:
            raise Conflict(
                f"the name {node.name} is in use by the node at {self._nodes[holder].address}; the one at {node.address} "
                f"needs another: `--name NAME`"
            )
        if node.fingerprint in self._by_fingerprint:
            raise Conflict(
                f"the certificate of {node.name} is in use by {self._by_fingerprint[node.fingerprint].actor.name}"
            )
        if len(self._nodes) >= NODES_MAX:
            raise Exhausted(f"the roster holds {NODES_MAX} nodes, its bound")

    def _keep_node(self, node: NodeRecord) -> None:
        old = self._nodes.get(node.node)
        self.present += (node.presence == "present") - (old is not None and old.presence == "present")
        self._nodes[node.node] = node
        self._by_name[node.name] = node.node
        self._by_fingerprint[node.fingerprint] = Peer(Actor(node.node, Role.NODE), node=node.node)

    # -- users --------------------------------------------------------------------------------------------------------

    def add_user(self, user: UserRecord, token: str, now_ms: int) -> UserAdded:
        old = self._users.get(user.name)
        if old is not None and old.key != b"" and old.key == user.key:
            return UserAdded(old, changed=False)
        self._check_token(token, user.role, now_ms)
        check_label("user", user.name)
        if user.role not in TOKEN_ROLES or user.role == Role.NODE.value:
            raise InvalidArgument(f"role {user.role[:40]!r} is none of admin, user, reader")
        if len(user.fingerprint) != 32:
            raise InvalidArgument(f"a certificate's fingerprint has 32 bytes, this one {len(user.fingerprint)}")
        if old is not None and not old.fingerprint:
            raise Conflict(
                f"{user.name} was revoked, and what {user.name} stored is still there under that name; log in under another "
                f"one, or let an admin free it, with all it holds: `idunno users revoke {user.name}` a second time"
            )
        if old is not None:
            raise Conflict(
                f"the name {user.name} is taken, by role {old.role}; log in under another name, or let an admin "
                f"`idunno users revoke {user.name}` first"
            )
        if NodeId(user.name) in self._nodes:
            raise Conflict(f"{user.name} is a node's id; log in under another name")
        if user.fingerprint in self._by_fingerprint:
            raise Conflict(
                f"the certificate of {user.name} is in use by {self._by_fingerprint[user.fingerprint].actor.name}"
            )
        if len(self._users) >= USERS_MAX:
            raise Exhausted(f"the roster holds {USERS_MAX} users, its bound; `idunno users revoke NAME` frees one")
        new = msgspec.structs.replace(user, since_ms=now_ms)
        self._keep_user(new)
        return UserAdded(new)

    def revoke_user(self, name: str, now_ms: int) -> Done:
        """End the certificate. The name stays taken, with what it owns, until it is revoked a second time: nobody else gets
        somebody's files by logging in under a name that has become free. In machine version 1 the name is free at once."""
        user = self._users.get(name)
        if user is None:
            raise NotFound(f"no user {name[:80]}; see `idunno users`")
        if user.fingerprint:
            del self._by_fingerprint[user.fingerprint]
        if user.fingerprint and self.machine_version >= 2:
            self._users[name] = UserRecord(name, user.role, b"", now_ms)
        else:
            del self._users[name]
        return Done()

    def _keep_user(self, user: UserRecord) -> None:
        self._users[user.name] = user
        if user.fingerprint:
            self._by_fingerprint[user.fingerprint] = Peer(Actor(user.name, Role(user.role)))

    # -- tokens -------------------------------------------------------------------------------------------------------

    def add_token(self, token: TokenRecord, by: str, now_ms: int) -> Done:
        new = msgspec.structs.replace(token, created_by=by, revoked=False)
        old = self._tokens.get(token.token)
        if old is not None:
            if old.secret_hash != new.secret_hash:
                raise Conflict(f"there is another token {token.token} already")
            return Done(changed=False)
        check_request("token", token.token)
        if token.role not in TOKEN_ROLES:
            raise InvalidArgument(f"role {token.role[:40]!r} is none of {', '.join(TOKEN_ROLES)}")
        if len(token.secret_hash) != 32 or token.expires_ms < 0:
            raise InvalidArgument("a token has the 32 bytes SHA-256 of its secret, and expires after 1970")
        dead = [t.token for t in self._tokens.values() if t.expires_ms + TOKEN_KEPT_MS < now_ms]
        if len(self._tokens) - len(dead) >= TOKENS_MAX:
            raise Exhausted(f"there are {TOKENS_MAX} tokens, the bound; they go 30 days after they expire")
        for gone in dead:
            del self._tokens[gone]
        self._tokens[token.token] = new
        return Done()

    def revoke_token(self, token: str) -> Done:
        old = self._tokens.get(token)
        if old is None:
            raise NotFound(f"no token {token[:80]}; see `idunno token ls`")
        if old.revoked:
            return Done(changed=False)
        self._tokens[token] = msgspec.structs.replace(old, revoked=True)
        return Done()

    def _check_token(self, token: str, role: str, now_ms: int) -> None:
        """Whether the token may bring in a `role` now. Its secret was compared by the leader; here only its state counts."""
        record = self._tokens.get(token)
        if record is None:
            raise Unauthenticated(
                f"no token {token[:40]} in this cluster; ask an admin for `idunno token new --role {role}`"
            )
        if record.revoked:
            raise Unauthenticated(
                f"token {record.token} was revoked; ask an admin for `idunno token new --role {record.role}`"
            )
        if record.expires_ms <= now_ms:
            raise Unauthenticated(
                f"token {record.token} has expired; ask an admin for `idunno token new --role {record.role}`"
            )
        if record.role != role:
            raise Unauthenticated(
                f"token {record.token} is for a {record.role}, not for a {role}; ask an admin for another"
            )


def _rows(state: RosterState) -> Iterator[Row]:
    yield "roster", msgspec.structs.replace(state, nodes=(), users=(), tokens=()), 1
    for kind, records in (("node", state.nodes), ("user", state.users), ("token", state.tokens)):
        for record in records:
            yield kind, record, 10


def _check_node_texts(address: str, zone: str, software: str, slots: int) -> None:
    host, colon, port = address.rpartition(":")
    if (
        not host
        or not colon
        or not printable(address)
        or not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536)
    ):
        raise InvalidArgument(f"{address[:80]!r} is no HOST:PORT")
    if len(address) > 300 or len(zone) > 63 or len(software) > 63 or not printable(zone + software):
        raise InvalidArgument("an address has at most 300 characters, zone and software version 63 printable ones")
    if not 1 <= slots <= SLOTS_MAX:
        raise InvalidArgument(f"a node has 1 to {SLOTS_MAX} slots, not {slots}")
