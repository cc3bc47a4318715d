# tests/unit/membership/lone.py: one core by itself, and others that say what a test has them say.
from __future__ import annotations

import random

from idunno.membership.config import SwimConfig
from idunno.membership.events import (
    Changed,
    Input,
    Output,
    Received,
    Self,
    Send,
    Tick,
)
from idunno.membership.messages import (
    Ack,
    Gossip,
    Message,
    Ping,
    Rumor,
    State,
)
from idunno.membership.swim import Swim
from tests.unit.membership.net import node_id

ORDER = [State.ACTIVE, State.SUSPICIOUS, State.FAILED, State.STOPPED, State.LEFT]


def address(number: int) -> str:
    return f"10.0.0.{number}:7400"


class Lone:
    """Node 1, with others that say what the test has them say."""

    def __init__(self, others: int = 4, config: SwimConfig | None = None, now_ms: int = 1_000) -> None:
        me = Self(node_id(1), "n1", address(1), boot=1)
        self.core, self.now_ms = Swim(me, config or SwimConfig(), random.Random(1)), now_ms
        for number in range(2, others + 2):
            self.say(number, Gossip(f"n{number}", address(number)))

    def feed(self, event: Input) -> list[Output]:
        return self.core.handle(event, self.now_ms)

    def say(self, number: int, message: Message, boot: int = 1) -> list[Output]:
        return self.feed(Received(node_id(number), boot, address(number), message))

    def tell(self, number: int, *rumors: Rumor) -> list[Output]:
        """Node `number` passes rumors on; its own incarnation is what is known of it."""
        member = self.core.members.get(node_id(number))
        incarnation = max(0, member.version[1]) if member else 0
        return self.say(number, Gossip(f"n{number}", address(number), incarnation, rumors))

    def wait(self, ms: int, *, answering: set[int] | None = None) -> list[Output]:
        """Let time pass; those in `answering` (all by default) answer pings."""
        end, out = self.now_ms + ms, list[Output]()
        while (due := self.core.due_ms()) is not None and due <= end:
            self.now_ms = max(self.now_ms, due)
            todo = self.feed(Tick())
            while todo:
                output = todo.pop(0)
                out.append(output)
                if isinstance(output, Send) and isinstance(output.message, Ping):
                    number = int(output.address.split(":")[0].rsplit(".", 1)[1])
                    if answering is None or number in answering:
                        known = self.core.members[node_id(number)].version[1]
                        todo += self.say(number, Ack(output.message.seq, f"n{number}", address(number), known))
        self.now_ms = end
        return out

    def state(self, number: int) -> State:
        return self.core.members[node_id(number)].state


def rumor(number: int, state: State, incarnation: int = 0, boot: int = 1, accusers: tuple[int, ...] = ()) -> Rumor:
    who = tuple(node_id(accuser) for accuser in accusers)
    return Rumor(node_id(number), boot, incarnation, state, f"n{number}", address(number), who)


def changes(out: list[Output]) -> list[tuple[str, State]]:
    return [(o.member.name, o.new) for o in out if isinstance(o, Changed)]
