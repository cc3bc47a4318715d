# idunno/membership/events.py: what the detector hears and says, as small frozen values.
from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from idunno.base.ids import NodeId
from idunno.membership.messages import MemberView as MemberView
from idunno.membership.messages import Message, State, WholeList


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
    message: Message | WholeList


@dataclass(frozen=True, slots=True)
class TcpProbed:
    """A member answered over TCP to the ProbeTcp of this `seq`."""

    node: NodeId
    seq: int


@dataclass(frozen=True, slots=True)
class NotExchanged:
    """The Exchange with this member did not come about: no TCP to it, or none at all here."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something speaks against this member (a connection to it was lost): it is probed now instead of at its turn."""

    node: NodeId


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
class ProbeTcp:
    """Ask this member for any answer over TCP; tell TcpProbed with the same `seq` if it comes within `timeout_ms`."""

    node: NodeId
    address: str
    seq: int
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """Exchange whole lists with this member over TCP; feed its list, or NotExchanged."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Changed:
    """A member changed its state, or (old and new both ACTIVE) its process was restarted."""

    member: MemberView
    old: State
    new: State
    reason: str
    accuser: NodeId | None = None
    restarted: bool = False

    @property
    def kind(self) -> str:
        """joined | refuted | suspicious | failed | stopped | left, as events are named and counted."""
        if self.new is not State.ACTIVE:
            return str(self.new.value)
        back = self.restarted or self.old in (State.UNKNOWN, State.STOPPED, State.LEFT)
        return "joined" if back else "refuted"


@dataclass(frozen=True, slots=True)
class Event:
    """One line of `idunno members --events`."""

    at_ms: int  # wall clock
    kind: str  # as Changed.kind
    node: NodeId
    name: str
    reason: str
    accuser: str  # name of who accused it, "" for nobody


@dataclass(frozen=True, slots=True)
class Announced:
    """All who were told have answered, or the time for it is over."""

    told: int
    answered: int


Input: TypeAlias = Tick | Received | TcpProbed | NotExchanged | Doubt | Seeds | Forget | Announce
Output: TypeAlias = Send | ProbeTcp | Exchange | Changed | Announced
