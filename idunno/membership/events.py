# idunno/membership/events.py: what the detector hears and says, as small frozen values.
from __future__ import annotations

from typing import TypeAlias

import msgspec

from idunno.base.ids import NodeId
from idunno.membership.messages import MemberView as MemberView
from idunno.membership.messages import Message, State, WholeList


class Self(msgspec.Struct, frozen=True):
    """The member this process is."""

    node: NodeId
    name: str
    address: str  # "host:port", as others reach it; an IPv6 host in brackets
    boot: int  # raised by every start of the process


class Seed(msgspec.Struct, frozen=True):
    """A member named by the roster, or by an introducer's answer."""

    node: NodeId
    name: str
    address: str


# -- inputs -----------------------------------------------------------------------------------------------------------


class Tick(msgspec.Struct, frozen=True):
    """It is `due_ms` or later."""


class Received(msgspec.Struct, frozen=True):
    """A datagram that opened and decoded. `sender` and `boot` are the seal's; `source` is where it came from."""

    sender: NodeId
    boot: int
    source: str
    message: Message | WholeList


class TcpProbed(msgspec.Struct, frozen=True):
    """A member answered over TCP to the ProbeTcp of this `seq`."""

    node: NodeId
    seq: int


class NotExchanged(msgspec.Struct, frozen=True):
    """The Exchange with this member did not come about: no TCP to it, or none at all here."""

    node: NodeId


class Doubt(msgspec.Struct, frozen=True):
    """Something speaks against this member (a connection to it was lost): it is probed now instead of at its turn."""

    node: NodeId


class Seeds(msgspec.Struct, frozen=True):
    seeds: tuple[Seed, ...]


class Forget(msgspec.Struct, frozen=True):
    """Removed from the roster: nothing is kept of it, and late rumours do not bring it back."""

    node: NodeId


class Announce(msgspec.Struct, frozen=True):
    """This member stops (STOPPED) or leaves for good (LEFT)."""

    state: State


# -- outputs ----------------------------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True):
    address: str
    message: Message


class ProbeTcp(msgspec.Struct, frozen=True):
    """Ask this member for any answer over TCP; tell TcpProbed with the same `seq` if it comes within `timeout_ms`."""

    node: NodeId
    address: str
    seq: int
    timeout_ms: int


class Exchange(msgspec.Struct, frozen=True):
    """Exchange whole lists with this member over TCP; feed its list, or NotExchanged."""

    node: NodeId


class Changed(msgspec.Struct, frozen=True):
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


class Event(msgspec.Struct, frozen=True):
    """One line of `idunno members --events`."""

    at_ms: int  # wall clock
    kind: str  # as Changed.kind
    node: NodeId
    name: str
    reason: str
    accuser: str  # name of who accused it, "" for nobody


class Announced(msgspec.Struct, frozen=True):
    """All who were told have answered, or the time for it is over."""

    told: int
    answered: int


Input: TypeAlias = Tick | Received | TcpProbed | NotExchanged | Doubt | Seeds | Forget | Announce
Output: TypeAlias = Send | ProbeTcp | Exchange | Changed | Announced
