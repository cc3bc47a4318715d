# idunno/coordinator/views.py: how the machine's records look to people.
from __future__ import annotations

from datetime import UTC, datetime

from idunno.coordinator.messages import MemberAddress, TokenRow, UserRow
from idunno.coordinator.records import NodeRecord, TokenRecord, UserRecord

_LAST_MS = 253_402_300_799_999  # the end of the year 9999, the last that ISO 8601 writes with four digits


def iso_time(at_ms: int) -> str:
    """Milliseconds since 1970 as ISO 8601 in UTC: 2026-11-20T12:08:00.123Z."""
    seconds, ms = divmod(min(max(0, at_ms), _LAST_MS), 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"


def token_row(token: TokenRecord, now_ms: int) -> TokenRow:
    state = "revoked" if token.revoked else "expired" if token.expires_ms <= now_ms else "valid"
    return TokenRow(token.token, token.role, iso_time(token.expires_ms), token.created_by, state)


def user_row(user: UserRecord) -> UserRow:
    return UserRow(user.name, user.role, iso_time(user.since_ms), "valid" if user.fingerprint else "revoked")


def member_address(node: NodeRecord) -> MemberAddress:
    return MemberAddress(node.node, node.name, node.address, node.fingerprint, node.voter)
