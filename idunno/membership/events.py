# idunno/membership/events.py: what the detector hears and says, as small frozen values.
from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from idunno.base.ids import NodeId
from idunno.membership.messages import MemberView as MemberView
from idunno.membership.messages import Message, State


@dataclass(frozen=True, slots=True)
class Self:
    """The member this process is."""

    node: NodeId
    name: str
    address: str  # "host:port", as others reach it; an IPv6 host in brackets
    boot: int  # raised by every start of the process


@dataclass(frozen=True, slots=True)
class Seed:
    """A member named by the roster, or by an introducer's answer."""

    node: NodeId
    name: str
    address: str


# -- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """It is `due_ms` or later."""


@dataclass(frozen=True, slots=True)
class Received:
    """A datagram that opened and decoded. `sender` and `boot` are the seal's; `source` is where it came from."""

    sender: NodeId
    boot: int
    source: str
    message: Message


@dataclass(frozen=True, slots=True)
class Seeds:
    seeds: tuple[Seed, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Removed from the roster: nothing is kept of it, and late rumours do not bring it back."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Announce:
    """This member stops (STOPPED) or leaves for good (LEFT)."""

    state: State


# -- outputs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    address: str
    message: Message


@dataclass(frozen=True, slots=True)
class Changed:
    """A member changed its state, or (old and new both ACTIVE) its process was restarted."""

    member: MemberView
    old: State
    new: State
    reason: str
    accuser: NodeId | None = None


@dataclass(frozen=True, slots=True)
class Announced:
    """All who were told have answered, or the time for it is over."""

    told: int
    answered: int


Input: TypeAlias = Tick | Received | Seeds | Forget | Announce
Output: TypeAlias = Send | Changed | Announced
